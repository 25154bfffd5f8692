"""Known bugs planted: each in an implementation of the first kind that it is of."""

from types import SimpleNamespace

import numpy as np

from minilora.conformance import check
from minilora.conformance.problems.formulas import AdamFormulas, StartFormulas

from .implementations import OURS, from_formulas, implementation, init


def start_of(**parts):
    """An init by the formulas of a start, with some parts replaced."""

    def start(in_features, out_features, rank, rng, kernel=()):
        A, B = init(in_features, out_features, rank, rng, kernel)
        sizes = (rank, in_features, out_features, int(np.prod(kernel)))
        return A * StartFormulas(**parts).spread(*sizes) / StartFormulas().spread(*sizes), B

    return start


def step_of(**parts):
    """A step by Adam's formulas, with some parts replaced."""

    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        new = {k: AdamFormulas(**parts).after(p, m[k], v[k], grads[k], t + 1) for k, p in params.items()}
        params, m, v = ({k: found[i] for k, found in new.items()} for i in range(3))
        return params, (m, v, t + 1)

    return step


def planted(bug):
    """The first kind that a bug is of, and the functions of an implementation of that kind that has it."""
    kind = bug.kinds[0]
    if bug.breaks == "adam":
        return "linear", vars(implementation(step=step_of(**bug.parts)))
    if bug.breaks == "start":
        return kind, vars(OURS[kind]) | {"init": start_of(**bug.parts)}
    if bug.breaks == "output dtype":
        return kind, vars(OURS[kind]) | {"forward": OURS["linear"].forward}
    return kind, vars(from_formulas(kind, bug.parts, shows=bug.shows or None))


def report_of(kind, dtype=None, **functions):
    """The report of functions of a kind: of another than the linear one, beside our linear layer's forward."""
    wrong = SimpleNamespace(**functions)
    if kind == "linear":
        return check(wrong, dtype=dtype)
    declared = kind.removesuffix("-full")
    return check(SimpleNamespace(forward=OURS["linear"].forward, kinds={declared: wrong}), dtype=dtype).kinds[declared]
