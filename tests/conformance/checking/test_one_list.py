"""The library's layers, its planted bugs and foreign code go through one suite: what is planted must not pass.

The rows of `problems.bugs` are planted in tests of their own. Here are the mutants that are no row.
"""

from functools import partial
from types import SimpleNamespace

import pytest

from minilora import Conv2d, DoRA, Embedding, LoRA, LoRALinear
from minilora.conformance import check
from minilora.variants.adapter import Rewritten

from ...support import mutants
from ...support.sample import one_in
from ..implementations import OURS, conv_functions, convolution, dora, embedding, functions_of, linear

NOT_SEEN = {
    "Wrong", "WrongDoRA", "WrongEmbedding",  # right: what others spoil a part of
    "Accumulated",  # a layer is new for each call
    "Promoted",  # a habit: another precision is returned
    "OneAxis",  # only with more than one leading axis
    "Overwrites", "Buffered", "MeanOfRepeats", "Padding", "MeanOverPositions",  # gradients of a base, which is frozen
    "NoMagnitude",  # in `trainable` alone
}  # fmt: skip


def planted(base):
    """Every class of the mutants that is wrong in a way that functions of arrays can show."""
    found = [cls for cls in vars(mutants).values() if isinstance(cls, type) and issubclass(cls, base)]
    return [cls for cls in found if cls.__module__ == mutants.__name__ and cls.__name__ not in NOT_SEEN]


MADE = {
    ("linear", LoRA): lambda cls: functions_of(partial(linear, lora=cls)),
    ("linear", LoRALinear): lambda cls: functions_of(partial(linear, cls=cls)),
    ("dora", DoRA): lambda cls: functions_of(partial(dora, cls=cls, norm="full"), detached_norm=False),
    ("embedding", Embedding): lambda cls: functions_of(partial(embedding, base=cls)),
    ("conv2d", Conv2d): lambda cls: conv_functions(partial(convolution, base=cls)),
    ("conv2d", Rewritten): lambda cls: conv_functions(partial(convolution, cls=cls)),
}
PLANTED = [(c.__name__, kind, make(c)) for (kind, base), make in MADE.items() for c in planted(base)]
PLANTED += [
    (f"merged: {name}", "conv2d", conv_functions(partial(convolution, cls=cls)))
    for name, cls in mutants.MERGES_WRONG.items()
]
# A report takes long where no known bug explains it, which is what most of these are.
CASES = one_in(8, [row[1:] for row in PLANTED], [name for name, *_ in PLANTED])


def report_of(kind, implementation):
    if kind == "linear":
        return check(implementation)
    return check(SimpleNamespace(forward=OURS["linear"].forward, kinds={kind: implementation})).kinds[kind]


@pytest.mark.parametrize(("kind", "implementation"), CASES)
def test_a_planted_bug_does_not_pass(kind, implementation):
    report = report_of(kind, implementation)
    assert not report.passed
    assert report.diagnoses


def test_what_the_planted_bugs_are_made_of_passes():
    right = {"linear": functions_of(partial(linear, lora=mutants.Wrong))}
    right["dora"] = functions_of(partial(dora, cls=mutants.WrongDoRA, norm="full"), detached_norm=False)
    right["embedding"] = functions_of(partial(embedding, base=mutants.WrongEmbedding))
    right["conv2d"] = conv_functions(partial(convolution, cls=mutants.merges_wrongly(lambda kernels, s: s * kernels)))
    for kind, implementation in right.items():
        assert report_of(kind, implementation).passed
    assert len(PLANTED) > 30
