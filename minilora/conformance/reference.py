"""What a LoRA layer should give, in float64, and how far rounding may move it: the answers of the suite.

    y = x W^T + b + s x A^T B^T                      (..., out)
    dx = dy W + s dy B A                             (..., in)
    dA = s (dy B)^T x,   dB = s dy^T (x A^T)         (r, in), (out, r)

`Formulas` holds every part of these that public implementations got wrong, under a name: a known bug is one part
replaced, and `minilora.conformance.diagnoses` is the list of them.

ROUNDING. A sum of K terms t_k in a precision of unit roundoff u is off by about u sum_k |t_k| in any order of summation
that is used, and by K times that at worst. So every answer comes with the same formula on absolute values, its *size*,
and `TOLERANCE` u times the size is allowed. It is the same for all orders of summation, and for widths from 1 to 4,096.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .problems import Problem

Arrays = dict[str, np.ndarray]
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number of each precision."""
TOLERANCE = 16


@dataclass(frozen=True)
class Formulas:
    """LoRA, a part at a time. All arrays are float64; weight (out, in), lora_A (r, in), lora_B (out, r)."""

    scaling: Callable[[float, int], float] = lambda alpha, r: alpha / r
    base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, W: x @ W.T
    bias: float = 1.0
    update: float = 1.0
    dx_base: float = 1.0
    dx_update: float = 1.0
    s_in_dA: Callable[[float], float] = lambda s: s
    s_in_dB: Callable[[float], float] = lambda s: s
    s_in_dx: Callable[[float], float] = lambda s: s
    rows: Callable[[int], float] = lambda n: 1.0  # what the gradients of the factors are multiplied with
    merged: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = lambda W, BA, s: W + s * BA

    def answers(self, p: Arrays, alpha: float) -> Arrays:
        """Return y, the gradients and the merged weight for one problem's arrays."""
        x, dy, W, A, B = (p[name] for name in ("x", "dy", "weight", "lora_A", "lora_B"))
        s, n = self.scaling(alpha, len(A)), self.rows(len(x))
        b = p.get("bias")
        y = self.base(x, W) + self.update * s * (x @ A.T @ B.T)
        return {
            "y": y if b is None else y + self.bias * b,
            "x": self.dx_base * (dy @ W) + self.dx_update * self.s_in_dx(s) * (dy @ B @ A),
            "lora_A": n * self.s_in_dA(s) * ((dy @ B).T @ x),
            "lora_B": n * self.s_in_dB(s) * (dy.T @ (x @ A.T)),
            "merged": self.merged(W, B @ A, s),
        }


RIGHT = Formulas()
RSLORA = Formulas(scaling=lambda alpha, r: alpha / r**0.5)
KINDS = {"linear": RIGHT, "rslora": RSLORA}
"""The formulas by kind of layer."""
QUANTITIES = {
    "y": "the output",
    "x": "dx, the gradient at the input",
    "lora_A": "lora_A's gradient",
    "lora_B": "lora_B's gradient",
    "merged": "the merged weight",
}


@dataclass(frozen=True)
class Trial:
    """One problem in one precision: arrays as they are handed over, the right answers, and their sizes.

    Attributes
    ----------
    problem : Problem
        Sizes and seed.
    arrays : dict of str to array
        x, dy, weight, bias or not, lora_A, lora_B, rounded to the precision, in float64 or float32.
    right, sizes : dict of str to array
        The answers in float64, and the same formulas on absolute values.
    unit : float
        Unit roundoff of the precision.
    """

    problem: Problem
    arrays: Arrays
    right: Arrays
    sizes: Arrays
    unit: float
    formulas: Formulas = field(default=RIGHT)

    @classmethod
    def draw(cls, problem: Problem, dtype: str, formulas: Formulas) -> Trial:
        """Draw a problem's values, round them, and answer them."""
        full = {"x": problem.x, "dy": problem.dy, **problem.full, **problem.factors}
        arrays = {name: round_to(a, dtype) for name, a in full.items()}
        exact = {name: a.astype(np.float64) for name, a in arrays.items()}
        sizes = formulas.answers({name: np.abs(a) for name, a in exact.items()}, problem.alpha)
        return cls(problem, arrays, formulas.answers(exact, problem.alpha), sizes, UNIT[dtype], formulas)

    def by(self, **parts: Any) -> Arrays:
        """Return the answers with some parts of the formulas replaced: what a known bug would give."""
        exact = {name: a.astype(np.float64) for name, a in self.arrays.items()}
        return replace(self.formulas, **parts).answers(exact, self.problem.alpha)

    def agrees(self, name: str, found: np.ndarray, expected: np.ndarray | None = None, looser: float = 1.0) -> bool:
        """Return whether an answer is the expected one up to rounding; the right one by default."""
        expected = self.right[name] if expected is None else expected
        if np.shape(found) != np.shape(expected):
            return False
        allowed = looser * TOLERANCE * self.unit * np.maximum(self.sizes[name], np.abs(expected))
        with np.errstate(invalid="ignore"):
            return bool((np.abs(found.astype(np.float64) - expected) <= allowed).all())


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a precision. NumPy has no bfloat16: its numbers are float32 with the lower half of the bits zero."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
