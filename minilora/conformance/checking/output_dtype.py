"""The claim that a layer in bfloat16 with factors in float32 has besides: what precision its output is in.

A forward promotes to float32 where it adds an update in float32 to a base's output in bfloat16. If it returns that, the
next layer gets another precision than without an adapter. Whoever means it declares ``output = "float32"``.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

from ..problems.bugs import known
from ..problems.lowprecision import in_half
from ..problems.tolerance import Trial
from .calling import Watch, forward, spelled

OUTPUTS = ("bfloat16", "float32")


def output_dtype(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Look whether all numbers of an output are those of bfloat16, as is declared or left unsaid."""
    if "y" not in right:
        return "not offered"
    y = np.asarray(forward(Watch(watch.functions, watch.kind), trial), np.float64)
    declared = spelled(getattr(watch.functions, "output", "bfloat16"), OUTPUTS)
    if declared == "bfloat16" and not np.array_equal(y, in_half(y)):
        return str(known("mixed-the-output-is-float32"))
    if declared == "float32" and np.array_equal(y, in_half(y)):
        return "the output is rounded to bfloat16, and output declares float32"
    return "ok"


OUTPUT_DTYPE: dict[str, Callable[[Watch, Trial, str, Set[str]], str]] = {"output dtype": output_dtype}
"""A claim of the kind mixed."""
