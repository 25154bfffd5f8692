"""The problems of each kind keep their numbers."""

import hashlib

from minilora.conformance.problems.kinds import KINDS

FIRST = {"linear": 15, "rslora": 14, "dora": 14, "embedding": 6, "conv1d": 5, "conv2d": 7, "dropout": 14, "nf4": 5,
         "mixed": 9, "fused": 9, "experts": 10, "combine": 13, "dora-full": 14}  # fmt: skip
DIGEST = "5275375861fd459db488000d28b897fabf0c7671a3215ea03a71e548e302c32c"
"""Of the first problems of each kind. Adopters list failures by a problem's number: new ones come after these."""


def test_a_problem_keeps_its_number():
    lines = [f"{kind} {number} {problem!r}" for kind, count in FIRST.items()
             for number, problem in enumerate(KINDS[kind].problems[:count])]  # fmt: skip
    assert list(FIRST) == list(KINDS)
    assert len(lines) == 135
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST
