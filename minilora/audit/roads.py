r"""The weights that a right merge may write: roads from W and s B A to a number of the file's type.

    m = Q(W + s B A)                        the sum taken wide, and rounded once

Other programs round on the way, and are right too. PEFT multiplies factors in half precision in float32, rounds the
change to their type, and adds it in the weight's:

    m = Q(Q(W) + q(s q(q(B) q(A))))         each Q and q may be left out: see `roads_of`

With DoRA the sum, its lengths and the gain are rounded likewise. A merge is right if one road leads to all of its
numbers. Sums of r products are rounded in another order on each processor, so a road leads to an interval: Q is
monotone, and each number lies between the Q of both ends.

    |error of s B A|_ij <= r u |s B_i| |A_j|    for each order of the sum
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, finfo

from ..files.dtypes import cast
from .units import Matrix

HALVES = (np.dtype(bfloat16), np.dtype(np.float16))
UNIT = 2.0**-24
"""Half the distance from 1 to the next float32, in which programs multiply."""


def roundings(x: np.ndarray, dtype: Any) -> list[np.ndarray]:
    """Return numbers in a type as right programs round them: float64 to half precision over float32, or in one step."""
    if x.dtype != np.float64 or dtype not in HALVES:
        return [cast(x, dtype)]
    single = cast(x, np.float32)
    return [cast(single, dtype), cast(rounded_to_odd(x, single), dtype)]


def rounded_to_odd(x: np.ndarray, single: np.ndarray) -> np.ndarray:
    """Return, for each float64 number that is not a float32, its float32 neighbour whose last bit is 1.

    Rounding that to half precision gives the same as rounding x in one step. `single` is x in float32.
    """
    toward = np.where(single < x, np.inf, -np.inf).astype(np.float32)
    return np.where((single != x) & (bits(single) % 2 == 0), np.nextafter(single, toward), single)


def stored_as(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return numbers rounded to a type, in the type that they have; None rounds nothing."""
    return x if dtype is None else cast(cast(x, dtype), x.dtype)


def digits(dtype: Any) -> int:
    """Return how many bits a type has after the point."""
    return int(finfo(dtype).nmant)  # type: ignore[no-untyped-call]


def steps(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the distance between neighbouring numbers of a type at each x."""
    return np.asarray(np.spacing(cast(np.abs(x), dtype)).astype(x.dtype))


@dataclass(frozen=True)
class Road:
    """Where a merge rounds on its way, and to which type; None is nowhere."""

    base: Any = None  # W, before anything is added
    one_step: bool = False  # whether a base in float64 is rounded in one step, not over float32
    factors: Any = None  # A and B, and the magnitude
    product: Any = None  # B A
    early: Any = None  # s B, for a program that computes (s B) A
    change: Any = None  # s B A; with a magnitude also the sum, its lengths and the gain


def roads_of(out: Any, base: Any, adapter: Any, between: Any = None) -> list[Road]:
    """Return the right roads, the most direct first, of the files' types; a base in few bits went through `between`."""
    holds = out == base or digits(out) > 20  # each number of the base's type
    bases = [None, *([] if holds and base != np.float64 else [out]), *([between] if between is not None else [])]
    ways = (False, True) if base == np.float64 and out in HALVES else (False,)
    halves = list(dict.fromkeys(dtype for dtype in (out, adapter) if dtype in HALVES))
    roads = [Road()]
    for t in halves:
        roads += [Road(change=t), Road(product=t, change=t), Road(factors=t, early=t, change=t)]
        if t != adapter:
            roads += [Road(factors=t), Road(factors=t, change=t), Road(factors=t, product=t, change=t)]
    of_base = [(t, one_step) for t in dict.fromkeys(bases) for one_step in (ways if t in HALVES else (False,))]
    return [replace(road, base=t, one_step=one_step) for road in roads for t, one_step in of_base]


# --- a change ---


@dataclass(frozen=True)
class Update:
    """What an adapter does to one matrix, or to some rows of it, lying as the model stores the weight."""

    left: np.ndarray  # (rows, r); W becomes W + s left right
    right: np.ndarray  # (r, columns)
    scaling: float
    dtype: Any  # of the factors in their file
    magnitude: np.ndarray | None = None  # DoRA's: one number for each output
    across: bool = False  # whether an output is a column
    lengths_of_base: bool = False  # a known mistake: DoRA divides by W's lengths

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """The lengths of the rows of s `left`, and of the columns of `right`."""
        factors = (self.left * self.scaling, 1), (self.right, 0)
        left, right = (np.sqrt(np.square(x, dtype=np.float64).sum(axis=axis)) for x, axis in factors)
        return left, right


class Replay:
    """One road over one matrix: block by block what it leads to, and whether given numbers lie on it."""

    def __init__(self, road: Road, update: Update, out: Any, base: Matrix) -> None:
        self.road, self.update, self.out, self.base = road, update, np.dtype(out), base
        self.wide = np.dtype(np.float32 if self.out in HALVES else np.float64)
        self.left, self.right = (stored_as(x.astype(self.wide), road.factors) for x in (update.left, update.right))
        self.scaling = self.wide.type(update.scaling)
        if road.early or (road.product is None and road.change is None):  # then s may be anywhere
            self.left, self.scaling = stored_as(self.left * self.scaling, road.early), self.wide.type(1)

    @cached_property
    def norms(self) -> np.ndarray | None:
        """DoRA's lengths of columns, which all rows of the base are needed for; None where it has none."""
        if self.update.magnitude is None or not self.update.across:
            return None
        squares = np.zeros(self.base.columns)
        for start, stop in self.base.blocks():
            W, product = self._start(self.base.read(start, stop), slice(start, stop))
            squares += np.square(self._lengthened(W, product), dtype=np.float64).sum(axis=0)
        return np.sqrt(squares)

    def _start(self, W: np.ndarray, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        if self.road.one_step:
            W = roundings(W, self.road.base)[-1]
        return stored_as(W.astype(self.wide, copy=False), self.road.base), self.left[rows] @ self.right

    def _sum(self, W: np.ndarray, product: np.ndarray) -> np.ndarray:
        """Return W + s B A, rounded as the road has it."""
        change = stored_as(product, self.road.product)
        change = change if self.scaling == 1 else change * self.scaling
        sums = W + stored_as(change, self.road.change)
        return sums if self.update.magnitude is None else stored_as(sums, self.road.change)

    def _lengthened(self, W: np.ndarray, product: np.ndarray) -> np.ndarray:
        """Return the matrix by whose lengths DoRA divides."""
        return W if self.update.lengths_of_base else self._sum(W, product)

    def _sums(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return what some rows lead to, before it is rounded to the file's type."""
        W, product = self._start(W, rows)
        sums = self._sum(W, product)
        return sums if self.update.magnitude is None else self._gains(self._lengthened(W, product), rows, 0.0) * sums

    def values(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers that some rows lead to, in the file's type; `rows` are their numbers."""
        return cast(self._sums(W, rows), self.out)

    def change(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return what the most direct road adds to some rows."""
        return self._start(W, rows)[1] if self.update.magnitude is None else self._sums(W, rows) - W

    def _gains(self, sums: np.ndarray, rows: np.ndarray, slack: float) -> np.ndarray:
        """Return DoRA's gain for each output, were its length longer by a part `slack`."""
        m, across = self.update.magnitude, self.update.across
        assert m is not None
        norms = np.sqrt(np.square(sums, dtype=np.float64).sum(axis=1)) if self.norms is None else self.norms
        norms = np.where(norms > 0, norms, 1.0).astype(self.wide) * self.wide.type(1 + slack)
        m = stored_as((m if across else m[rows]).astype(self.wide), self.road.factors)
        gains = stored_as(m / stored_as(norms, self.road.change), self.road.change)
        return gains[None] if across else gains[:, None]

    def misses(self, W: np.ndarray, rows: np.ndarray, found: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return where some rows of the merged weight do not lie on the road, as places in the flattened block."""
        places = np.flatnonzero(bits(values) != bits(found))
        if not places.size:
            return places
        i, j = np.unravel_index(places, found.shape)
        used, i = np.unique(i, return_inverse=True)  # the rest of the block is right
        rows, m = rows[used], found.reshape(-1)[places].astype(self.wide)
        W, product = self._start(W[used], rows)
        left, right = self.update.lengths
        error = (len(self.right) + 3) * 2 * UNIT * left[rows[i]] * right[j]  # others', and ours
        error = error / abs(self.scaling or 1)  # of the product; of a change of no strength it is 0
        ends = [self._sum(W[i, j], (product[i, j] + off).astype(self.wide)) for off in (-error, error)]
        if self.update.magnitude is not None:
            slack = 2.0**-9 / W.shape[1] ** 0.5 if self.road.change is not None else 2.0**-20
            lengthened = self._lengthened(W, product)
            gains = [np.broadcast_to(self._gains(lengthened, rows, x), W.shape)[i, j] for x in (-slack, slack)]
            ends = [gain * end for gain in gains for end in ends]
        size = 2 * UNIT * (np.abs(W[i, j]) + np.max(np.abs(ends), axis=0))
        low, high = np.min(ends, axis=0) - size, np.max(ends, axis=0) + size
        low, high = (stored_as(end.astype(self.wide), self.out) for end in (low, high))
        return places[~((low <= m) & (m <= high))]

    def distance(self, W: np.ndarray, rows: np.ndarray, found: np.ndarray) -> float:
        """Return how far numbers are from the road at most, in steps at the largest number that is added."""
        m, (left, right) = found.astype(self.wide), self.update.lengths
        largest = np.maximum(np.maximum(np.abs(W.astype(self.wide)), np.abs(m)), left[rows, None] * right)
        return float((np.abs(m - self._sums(W, rows)) / steps(largest, self.out)).max(initial=0.0))


def bits(x: np.ndarray) -> np.ndarray:
    """Return numbers as integers, which compare faster; -0 and 0 differ."""
    return x.view(f"u{x.dtype.itemsize}")
