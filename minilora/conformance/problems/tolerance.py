"""A problem in one precision: arrays as they are handed over, right answers, and how far rounding may move them.

A sum of K terms t_k, in a precision of unit roundoff u, is off by sum_j e_j p_j: p_j are its partial sums,
and e_j is the rounding of one addition, |e_j| <= u, with a root mean square of 0.43 u. Let S = sum_k |t_k|.

    any terms, any order     |p_j| <= S, so the error is at most K u S
    Gaussian terms           half of S has either sign, so |p_j| <= S / 2 in any order, also with all positive terms
                             first: the standard deviation of the error is at most 0.43 sqrt(K) u S / 2, a fifth of
                             sqrt(K) u S

The problems are Gaussian. So max(16, sqrt(K)) u S is allowed: the bound itself for up to 16 terms, and almost five
standard deviations of the worst order for more. S is the same formula on absolute values, and K the same formula on
ones. An answer's *size* is S, times sqrt(K) / 16 where K is above 256, and `TOLERANCE` u times the size is allowed.

Sources: Wilkinson, "Rounding Errors in Algebraic Processes" (1963), for the bound; Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019), for sqrt(K). In half precision the worst orders
stop growing (1 + 256 = 256 in bfloat16), which no root of K covers: there, sums as they are in use are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from .formulas import Formulas
from .problem import Arrays, Problem

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number of each precision."""
TOLERANCE = 16
TINY = 1e-300
"""Added to a size of zero: an answer without a term must be zero."""


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a precision. NumPy has no bfloat16: its numbers come as float32, whose last 16 bits are zero there.

    As in `minilora.files.dtypes.cast`, float64 is rounded to float32 first.
    """
    if array.dtype.kind in "iu":
        return array
    if dtype != "bfloat16":
        return array.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        single = array.astype(np.float32)
        bits = single.view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # of two as near, the even one
    return np.where(np.isnan(single), single, nearest.view(np.float32))


@dataclass(frozen=True, eq=False)  # a trial is itself alone: what is computed for it can be kept
class Trial:
    """One problem in one precision: arrays as they are handed over, the right answers, and their sizes."""

    problem: Problem
    arrays: Arrays  # x, dy, weight, bias or not, lora_A, lora_B, magnitude, mask: rounded, and as the kind has them
    right: Arrays  # the answers in float64
    sizes: Arrays  # what rounding is measured in: the same formulas on absolute values, larger for long sums
    unit: float  # unit roundoff of the precision
    formulas: Formulas
    growth: Arrays  # of the sizes: the root of the number of terms over 16, where that is above 1

    @classmethod
    def draw(cls, problem: Problem, dtype: str, formulas: Formulas, view: type[np.ndarray] = np.ndarray) -> Trial:
        """Draw a problem's values, round them, and answer them; by the arithmetic of a subclass of arrays, if asked."""
        full = {"x": problem.x, "dy": problem.dy, **problem.full, **problem.factors}
        arrays = {name: a if name in problem.exact else round_to(a, dtype) for name, a in full.items()}
        rows = {name: a.view(view) for name, a in _rows(problem, arrays).items()}
        right, growth = problem.answer(formulas, rows), _growth(problem, rows, formulas)
        return cls(problem, arrays, right, _sizes(problem, rows, formulas, growth), UNIT[dtype], formulas, growth)

    @cached_property
    def rows(self) -> Arrays:
        """The arrays on rows, in float64."""
        return _rows(self.problem, self.arrays)

    def answer(self, **parts: Any) -> Arrays:
        """Return the answers with some parts of the formulas replaced: what a known bug would give."""
        return self.problem.answer(self.formulas.with_parts(**parts), self.rows)

    def size(self, **parts: Any) -> Arrays:
        """Return the sizes with some parts of the formulas replaced, and nowhere less than those of the right answers.

        A bug's answers may be much larger than the right ones, and their rounding with them.
        """
        if not parts:
            return self.sizes
        sizes = _sizes(self.problem, self.rows, self.formulas.with_parts(**parts), self.growth)
        return {name: np.maximum(size, sizes.get(name, 0.0)) for name, size in self.sizes.items()}

    def allowed(self, size: np.ndarray) -> np.ndarray:
        """Return how far each entry of an answer of a size may be off."""
        return np.asarray(TOLERANCE * self.unit * (size + TINY))

    def distance(self, name: str, array: np.ndarray) -> float:
        """Return how far an answer is from the right one in units of rounding."""
        right = self.right[name]
        if np.shape(array) != np.shape(right):
            return float("inf")
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(np.asarray(array, np.float64) - right)
            furthest = (error / (self.unit * np.maximum(self.sizes[name], np.abs(right)) + TINY)).max(initial=0.0)
        return float("inf" if np.isnan(furthest) else furthest)

    def agrees(self, name: str, array: np.ndarray) -> bool:
        """Return whether an answer is the right one up to rounding."""
        return self.distance(name, array) <= TOLERANCE


@lru_cache(maxsize=256)  # all problems of all kinds in four precisions
def drawn(problem: Problem, dtype: str, formulas: Formulas) -> Trial:
    """Return a problem's trial, drawn once for all checks; its arrays are read only."""
    trial = Trial.draw(problem, dtype, formulas)
    for arrays in (trial.arrays, trial.right, trial.sizes, trial.growth):
        for array in arrays.values():
            array.flags.writeable = False
    return trial


def _sizes(problem: Problem, rows: Arrays, formulas: Formulas, growth: Arrays) -> Arrays:
    """Return what the rounding of each answer is measured in: S, times its growth."""
    lengths = None
    if formulas.dora is not None:
        BA = rows["lora_B"] @ rows["lora_A"]
        lengths = formulas.dora.length(rows["weight"], BA, formulas.scaling(problem.alpha, problem.rank))
    sizes = problem.answer(_absolute(formulas), {name: np.abs(a) for name, a in rows.items()}, lengths)
    sizes = {name: size * growth[name] for name, size in sizes.items()}
    return problem.widen(sizes, formulas, rows)


def _growth(problem: Problem, rows: Arrays, formulas: Formulas) -> Arrays:
    """Return sqrt(K) / 16, and at least 1, for the K terms of each answer."""
    ones = {name: (a != 0).astype(np.float64) for name, a in rows.items()}
    terms = problem.answer(formulas.counted(), ones)
    return {name: np.maximum(1.0, np.sqrt(count) / TOLERANCE) for name, count in terms.items()}


def _absolute(formulas: Any) -> Any:
    """Return formulas with the absolute value of each part: then no term is subtracted from another."""
    return type(formulas)(**{name: _absolute_part(part) for name, part in vars(formulas).items()})


def _absolute_part(part: Any) -> Any:
    """Return the absolute value of a part, or of what it returns; of a record, of its parts."""
    if part is None:
        return None
    if is_dataclass(part):
        return _absolute(part)
    if isinstance(part, tuple):
        return tuple(map(np.abs, part))
    if callable(part):
        return lambda *arguments: _absolute_part(part(*arguments))
    return np.abs(part)


def _rows(problem: Problem, arrays: Arrays) -> Arrays:
    """Return a problem's arrays on rows, in float64."""
    exact = {name: a if a.dtype.kind in "iu" else a.astype(np.float64) for name, a in arrays.items()}
    return problem.flatten(exact)
