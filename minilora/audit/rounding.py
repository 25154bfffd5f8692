r"""The weights that a correct merge may write, for each valid way to round intermediate results.

    m = Q(W + s B A)                        the sum is computed in a wide type, and rounded once

Other programs round intermediate results and are correct too. PEFT multiplies half-precision factors in float32, rounds
the change to their type, and adds it in the weight's type:

    m = Q(Q(W) + q(s q(q(B) q(A))))         each Q and q is optional: see `valid_roundings`

With DoRA the sum, its norms and the gain are rounded in the same way. A merge is right if one rounding explains all of
its numbers. Processors add the r products in different orders, so a rounding gives an interval: Q is monotone, and each
number is between the Q of both ends.

    |error of s B A|_ij <= r u |s B_i| |A_j|    for every order of summation
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
TF32 = {"TF32": 0x1000, "TF32, truncated": 0}
"""How a GPU rounds float32 factors to 10 mantissa bits: what is added before the other bits are dropped."""
FLOAT32_UNIT = 2.0**-24
"""The unit roundoff of float32, the type in which programs multiply."""


def acceptable_casts(x: np.ndarray, dtype: Any) -> list[np.ndarray]:
    """Return every acceptable cast of x: from float64 to half precision, programs may or may not go through float32."""
    if x.dtype != np.float64 or dtype not in HALVES:
        return [cast(x, dtype)]
    single = cast(x, np.float32)
    return [cast(single, dtype), cast(rounded_to_odd(x, single), dtype)]


def rounded_to_odd(x: np.ndarray, single: np.ndarray) -> np.ndarray:
    """Return x in float32, rounded to the odd neighbour if it is inexact; `single` is x rounded to the nearest float32.

    Rounding the result to half precision gives the same as rounding x in one step.
    """
    toward = np.where(single < x, np.inf, -np.inf).astype(np.float32)
    return np.where((single != x) & (bits(single) % 2 == 0), np.nextafter(single, toward), single)


def round_trip(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return x rounded to `dtype`, which may be one of `TF32`, but still in its own type; with None, return x."""
    if dtype in TF32:
        dropped = (cast(x, np.float32).view(np.uint32) + np.uint32(TF32[dtype])) & np.uint32(0xFFFFE000)
        return dropped.view(np.float32).astype(x.dtype)
    return x if dtype is None else cast(cast(x, dtype), x.dtype)


def mantissa_bits(dtype: Any) -> int:
    """Return the number of explicit mantissa bits of a floating-point type."""
    return int(finfo(dtype).nmant)  # type: ignore[no-untyped-call]


def spacing(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the distance between adjacent numbers of a type at each x."""
    return np.asarray(np.spacing(cast(np.abs(x), dtype)).astype(x.dtype))


@dataclass(frozen=True)
class Rounding:
    """The types to which a merge rounds its intermediate results; None means no rounding."""

    base: Any = None  # W, before the change is added
    one_step: bool = False  # whether a float64 base is rounded directly, not through float32
    factors: Any = None  # A and B, and the magnitude
    product: Any = None  # B A
    early: Any = None  # s B, if the program computes (s B) A, or s A
    into_A: bool = False  # whether s multiplies A instead of B
    change: Any = None  # s B A; with a magnitude also the sum, its norms and the gain


def valid_roundings(out: Any, base: Any, adapter: Any, between: Any = None) -> list[Rounding]:
    """Return the valid roundings for the files' types, the most direct first; a quantised base passed `between`."""
    holds = out == base or mantissa_bits(out) > 20  # all numbers of the base's type
    bases = [None, *([] if holds and base != np.float64 else [out]), *([between] if between is not None else [])]
    ways = (False, True) if base == np.float64 and out in HALVES else (False,)
    finer = [t for t in HALVES if mantissa_bits(t) > mantissa_bits(out)]  # loses no more than the file's type
    halves = list(dict.fromkeys(dtype for dtype in (out, adapter, *finer) if dtype in HALVES))
    roundings = [Rounding()]
    for t in () if adapter in HALVES else TF32:  # which holds every factor in half precision
        roundings += [Rounding(factors=t), *(Rounding(factors=t, change=half) for half in halves)]
    for t in halves:
        roundings += [Rounding(change=t), Rounding(product=t, change=t)]
        roundings += [Rounding(factors=t, early=t, change=t, into_A=into_A) for into_A in (False, True)]
        if t != adapter:
            roundings += [Rounding(factors=t), Rounding(factors=t, change=t), Rounding(factors=t, product=t, change=t)]
    of_base = [(t, one_step) for t in dict.fromkeys(bases) for one_step in (ways if t in HALVES else (False,))]
    return [replace(rounding, base=t, one_step=one_step) for rounding in roundings for t, one_step in of_base]


# --- a change ---


@dataclass(frozen=True)
class Update:
    """An adapter's change to one matrix or some of its rows, oriented as the model stores the weight."""

    left: np.ndarray  # (rows, r); W becomes W + s left right
    right: np.ndarray  # (r, columns)
    scaling: float
    dtype: Any  # of the stored factors
    magnitude: np.ndarray | None = None  # for DoRA, one number for each output
    transposed: bool = False  # whether the weight is stored (in, out)
    norms_of_base: bool = False  # a known mistake: DoRA divides by the norms of W alone

    @cached_property
    def norms(self) -> tuple[np.ndarray, np.ndarray]:
        """The norms of the rows of s `left`, and of the columns of `right`."""
        factors = (self.left * self.scaling, 1), (self.right, 0)
        left, right = (np.sqrt(np.square(x, dtype=np.float64).sum(axis=axis)) for x, axis in factors)
        return left, right


class Replay:
    """One rounding applied to one matrix: it computes the merged rows, and compares given rows with them."""

    def __init__(self, rounding: Rounding, update: Update, out: Any, base: Matrix) -> None:
        self.rounding, self.update, self.out, self.base = rounding, update, np.dtype(out), base
        self.wide = np.dtype(np.float32 if self.out in HALVES else np.float64)
        self.left, self.right = (round_trip(x.astype(self.wide), rounding.factors) for x in (update.left, update.right))
        self.scaling = self.wide.type(update.scaling)
        if rounding.early or (rounding.product is None and rounding.change is None):  # s may then be applied anywhere
            side = "right" if rounding.into_A else "left"
            setattr(self, side, round_trip(getattr(self, side) * self.scaling, rounding.early))
            self.scaling = self.wide.type(1)

    @cached_property
    def norms(self) -> np.ndarray | None:
        """DoRA's norms of the columns, computed from all rows of the base; None unless they are needed."""
        if self.update.magnitude is None or not self.update.transposed:
            return None
        squares = np.zeros(self.base.columns)
        for start, stop in self.base.blocks():
            W, product = self._start(self.base.read(start, stop), slice(start, stop))
            squares += np.square(self._norm_matrix(W, product), dtype=np.float64).sum(axis=0)
        return np.sqrt(squares)

    def _start(self, W: np.ndarray, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        if self.rounding.one_step:
            W = acceptable_casts(W, self.rounding.base)[-1]
        return round_trip(W.astype(self.wide, copy=False), self.rounding.base), self.left[rows] @ self.right

    def _sum(self, W: np.ndarray, product: np.ndarray) -> np.ndarray:
        """Return W + s B A with this rounding."""
        change = round_trip(product, self.rounding.product)
        change = change if self.scaling == 1 else change * self.scaling
        sums = W + round_trip(change, self.rounding.change)
        return sums if self.update.magnitude is None else round_trip(sums, self.rounding.change)

    def _norm_matrix(self, W: np.ndarray, product: np.ndarray) -> np.ndarray:
        """Return the matrix by whose norms DoRA divides."""
        return W if self.update.norms_of_base else self._sum(W, product)

    def _sums(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the merged rows before they are rounded to the file's type."""
        W, product = self._start(W, rows)
        sums = self._sum(W, product)
        return sums if self.update.magnitude is None else self._gains(self._norm_matrix(W, product), rows, 0.0) * sums

    def values(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the merged rows in the file's type; `rows` are their indices."""
        return cast(self._sums(W, rows), self.out)

    def change(self, W: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the change of some rows, not rounded to the file's type."""
        return self._start(W, rows)[1] if self.update.magnitude is None else self._sums(W, rows) - W

    def _gains(self, sums: np.ndarray, rows: np.ndarray, slack: float) -> np.ndarray:
        """Return DoRA's gain for each output, with the norms increased by the relative `slack`."""
        m, transposed = self.update.magnitude, self.update.transposed
        assert m is not None
        norms = np.sqrt(np.square(sums, dtype=np.float64).sum(axis=1)) if self.norms is None else self.norms
        norms = np.where(norms > 0, norms, 1.0).astype(self.wide) * self.wide.type(1 + slack)
        m = round_trip((m if transposed else m[rows]).astype(self.wide), self.rounding.factors)
        gains = round_trip(m / round_trip(norms, self.rounding.change), self.rounding.change)
        return gains[None] if transposed else gains[:, None]

    def misses(self, W: np.ndarray, rows: np.ndarray, found: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the indices, in the flattened block, of merged numbers that this rounding does not explain."""
        places = np.flatnonzero((bits(values) != bits(found)) & ~(np.isnan(values) & np.isnan(found)))
        if not places.size:
            return places
        i, j = np.unravel_index(places, found.shape)
        used, i = np.unique(i, return_inverse=True)  # the other rows of the block match
        rows, m = rows[used], found.reshape(-1)[places].astype(self.wide)
        W, product = self._start(W[used], rows)
        left, right = self.update.norms
        error = (len(self.right) + 3) * 2 * FLOAT32_UNIT * left[rows[i]] * right[j]  # theirs and ours
        error = error / abs(self.scaling or 1)  # of the product; 0 if the scaling is 0
        ends = [self._sum(W[i, j], (product[i, j] + off).astype(self.wide)) for off in (-error, error)]
        if self.update.magnitude is not None:
            slack = 2.0**-9 / W.shape[1] ** 0.5 if self.rounding.change is not None else 2.0**-20
            norm_matrix = self._norm_matrix(W, product)
            gains = [np.broadcast_to(self._gains(norm_matrix, rows, x), W.shape)[i, j] for x in (-slack, slack)]
            ends = [gain * end for gain in gains for end in ends]
        size = 2 * FLOAT32_UNIT * (np.abs(W[i, j]) + np.max(np.abs(ends), axis=0))
        low, high = np.min(ends, axis=0) - size, np.max(ends, axis=0) + size
        low, high = (round_trip(end.astype(self.wide), self.out) for end in (low, high))
        return places[~((low <= m) & (m <= high))]

    def distance(self, W: np.ndarray, rows: np.ndarray, found: np.ndarray) -> float:
        """Return the largest distance of the numbers from the exact sum, in ulps of the largest term."""
        m, (left, right) = found.astype(self.wide), self.update.norms
        largest = np.maximum(np.maximum(np.abs(W.astype(self.wide)), np.abs(m)), left[rows, None] * right)
        return float((np.abs(m - self._sums(W, rows)) / spacing(largest, self.out)).max(initial=0.0))


def bits(x: np.ndarray) -> np.ndarray:
    """Return the bit patterns of x as integers, which compare faster; -0 and 0 differ."""
    return x.view(f"u{x.dtype.itemsize}")
