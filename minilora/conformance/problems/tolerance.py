"""A problem in one precision: the arrays as an implementation receives them, the right answers, and their tolerances.

A sum of K terms t_k, in a precision with unit roundoff u, has the error sum_j e_j p_j: the p_j are its partial sums,
and e_j is the rounding error of one addition, |e_j| <= u, with a root mean square of 0.43 u. Let S = sum_k |t_k|.

    any terms, any order     |p_j| <= S, so the error is at most K u S
    Gaussian terms           half of S has either sign, so |p_j| <= S / 2 in any order, even with all positive terms
                             first: the standard deviation of the error is at most 0.43 sqrt(K) u S / 2, a fifth of
                             sqrt(K) u S

The problems are Gaussian, so an error of max(16, sqrt(K)) u S is allowed. For up to 16 terms this is the bound itself;
for more, it is almost five standard deviations of the worst order. S is the same formula on absolute values, and K is
the same formula on ones. An answer's *size* is S, times sqrt(K) / 16 if K is above 256. Its tolerance is `TOLERANCE` u
times the size.

Sources: Wilkinson, "Rounding Errors in Algebraic Processes" (1963), for the bound; Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019), for sqrt(K). In half precision, sums in the
worst orders stop growing (1 + 256 = 256 in bfloat16), which no multiple of sqrt(K) covers; the tolerance is meant for
sums in the orders that are used in practice.
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
"""A number added to each size to avoid 0 / 0: an answer without terms has size 0 and must be zero."""


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round an array to a precision; integers stay as they are.

    NumPy has no bfloat16, so its numbers are returned as float32 with the last 16 bits zero. As in
    `minilora.files.dtypes.cast`, float64 is first rounded to float32.
    """
    if array.dtype.kind in "iu":
        return array
    if dtype != "bfloat16":
        return array.astype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        single = array.astype(np.float32)
        bits = single.view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # ties to even
    return np.where(np.isnan(single), single, nearest.view(np.float32))


@dataclass(frozen=True, eq=False)  # compared by identity, so that its properties can be cached
class Trial:
    """One problem in one precision: the arrays that an implementation receives, the right answers, and their sizes."""

    problem: Problem
    arrays: Arrays  # x, dy, weight, lora_A, lora_B and those that only some kinds have, rounded, in the kind's shapes
    right: Arrays  # the right answers in float64
    sizes: Arrays  # the unit of rounding errors: the same formulas on absolute values, larger for long sums
    unit: float  # the unit roundoff of the precision
    formulas: Formulas
    growth: Arrays  # the factor that long sums add to the sizes: sqrt(number of terms) / 16, at least 1

    @classmethod
    def draw(cls, problem: Problem, dtype: str, formulas: Formulas, view: type[np.ndarray] = np.ndarray) -> Trial:
        """Draw a problem's values, round them, and compute the answers, with arrays of type `view`."""
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
        """Return the answers with some parts of the formulas replaced, as a known bug would compute them."""
        return self.problem.answer(self.formulas.with_parts(**parts), self.rows)

    def size(self, **parts: Any) -> Arrays:
        """Return the sizes with some parts of the formulas replaced, but at least the sizes of the right answers.

        The answers of a bug, and so their rounding errors, may be much larger than the right ones.
        """
        if not parts:
            return self.sizes
        sizes = _sizes(self.problem, self.rows, self.formulas.with_parts(**parts), self.growth)
        return {name: np.maximum(size, sizes.get(name, 0.0)) for name, size in self.sizes.items()}

    def allowed(self, size: np.ndarray) -> np.ndarray:
        """Return the largest error that is allowed for each entry of an answer with the given size."""
        return np.asarray(TOLERANCE * self.unit * (size + TINY))

    def distance(self, name: str, array: np.ndarray) -> float:
        """Return the largest error of an answer, in units of rounding; infinite if the shape is wrong."""
        right = self.right[name]
        if np.shape(array) != np.shape(right):
            return float("inf")
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(np.asarray(array, np.float64) - right)
            furthest = (error / (self.unit * np.maximum(self.sizes[name], np.abs(right)) + TINY)).max(initial=0.0)
        return float("inf" if np.isnan(furthest) else furthest)

    def agrees(self, name: str, array: np.ndarray) -> bool:
        """Return whether an answer is right up to rounding."""
        return self.distance(name, array) <= TOLERANCE


@lru_cache(maxsize=256)  # all problems of all kinds in four precisions
def drawn(problem: Problem, dtype: str, formulas: Formulas) -> Trial:
    """Return the trial of a problem, cached for all checks; its arrays are read-only."""
    trial = Trial.draw(problem, dtype, formulas)
    for arrays in (trial.arrays, trial.right, trial.sizes, trial.growth):
        for array in arrays.values():
            array.flags.writeable = False
    return trial


def _sizes(problem: Problem, rows: Arrays, formulas: Formulas, growth: Arrays) -> Arrays:
    """Return the size of each answer, the unit of its rounding error: S times its growth."""
    norms = None
    if formulas.dora is not None:
        BA = rows["lora_B"] @ rows["lora_A"]
        norms = formulas.dora.norm(rows["weight"], BA, formulas.scaling(problem.alpha, problem.rank))
    sizes = problem.answer(_absolute(formulas), {name: np.abs(a) for name, a in rows.items()}, norms)
    sizes = {name: size * growth[name] for name, size in sizes.items()}
    return problem.widen(sizes, formulas, rows)


def _growth(problem: Problem, rows: Arrays, formulas: Formulas) -> Arrays:
    """Return sqrt(K) / 16, but at least 1, for the K terms of each answer."""
    ones = {name: (a != 0).astype(np.float64) for name, a in rows.items()}
    terms = problem.answer(formulas.counted(), ones)
    return {name: np.maximum(1.0, np.sqrt(count) / TOLERANCE) for name, count in terms.items()}


def _absolute(formulas: Any) -> Any:
    """Return formulas with the absolute value of each part, so that no term is subtracted from another."""
    return type(formulas)(**{name: _absolute_part(part) for name, part in vars(formulas).items()})


def _absolute_part(part: Any) -> Any:
    """Return the absolute value of a part, recursively for records, tuples and the results of functions."""
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
    """Return a problem's arrays converted to rows, in float64."""
    exact = {name: a if a.dtype.kind in "iu" else a.astype(np.float64) for name, a in arrays.items()}
    return problem.flatten(exact)
