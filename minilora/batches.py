"""The rows of each step: drawn afresh from all rows, or the next ones of a pass.

A pass visits all n rows once, b at a time; the last step of a pass takes the remaining rows:

    S = ceil(n / b)                        steps of a pass
    p, k = divmod(t - 1, S)                step t, counted from 1, is the k-th of pass p
    order_p = permutation of 0 ... n - 1   drawn from the seed and p only
    rows_t  = order_p[k b : (k + 1) b]

So a resumed training needs only the seed and a step's number. The article draws each batch from all rows, without
replacement within the batch: with many rows, 1/e or 37 % of them do not occur in n / b steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .backend import Backend
from .checks import Array, check_integer

DEFAULT_ROWS = 128  # the size of a batch
MOST_ROWS_DRAWN = 2**31 - 1  # rows in an epoch, whose indices are drawn at once


class Passes:
    """The row indices of each step, for ``train(..., batches=Passes(len(X), batch_size, seed))``.

    Parameters
    ----------
    n : int
        The number of rows.
    batch_size : int
        The number of rows in a step, from 1 to n; the last step of a pass may have fewer.
    seed : int
        The seed of the orders, at least 0.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n = check_integer("n", n, at_least=1)
        self.batch_size = check_integer("batch_size", batch_size, at_least=1, at_most=n)
        self.seed = check_integer("seed", seed, at_least=0)
        self.steps = math.ceil(self.n / self.batch_size)  # steps in a pass
        self._latest, self._order = -1, np.empty(0, np.int64)

    def __repr__(self) -> str:
        return f"Passes(n={self.n}, batch_size={self.batch_size}, seed={self.seed})"

    def __call__(self, t: int) -> np.ndarray:
        """Return the row indices of step t, counted from 1, (at most batch_size,) int64."""
        number, k = divmod(t - 1, self.steps)
        if number != self._latest:
            self._latest, self._order = number, self.order(number)
        return self._order[k * self.batch_size : (k + 1) * self.batch_size]

    def order(self, number: int) -> np.ndarray:
        """Return the order of all rows in a pass, (n,) int64. Passes are counted from 0."""
        # A spawned sequence, since [seed, 0] would be the seed's own sequence, which initialises the adapters.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,))).permutation(self.n)


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row indices of an epoch's batches, (steps, batch_size), each batch drawn afresh, as in the article."""
    batches = np.empty((n // batch_size if steps is None else steps, batch_size), np.int64)
    for batch in batches:
        batch[...] = rng.choice(n, batch_size, replace=False, shuffle=False)
    return batches


def rows_of_steps(
    batches: Callable[[int], np.ndarray], steps: Iterable[int], n: int, x: Array, backend: Backend
) -> Iterator[Array]:
    """Yield the row indices of each step after checking them, since `take_rows` clips indices out of range."""
    for t in steps:
        rows = np.asarray(batches(t))
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not 1 <= len(rows) <= len(x):
            raise ValueError(f"batches({t}) has {rows.dtype} {rows.shape}, expected 1 to {len(x)} row numbers")
        if not 0 <= rows.min() <= rows.max() < n:
            raise ValueError(f"batches({t}) holds {rows.min()} to {rows.max()}, expected rows from 0 to {n - 1}")
        yield backend.asarray(rows)


def take_rows(data: Array, rows: Array, out: Array) -> Array:
    """Return the rows at these indices, on a CPU in the array `out`."""
    if isinstance(data, np.ndarray):
        # The system allocates new memory page by page: with new arrays for each batch, an adapter's step on 512 rows of
        # 1001 takes 1.5 times as long. Without mode="clip" NumPy makes another copy; no index here is out of range.
        return np.take(data, rows, axis=0, out=out, mode="clip")
    return data[rows]  # a GPU library has a memory pool


def check_batches(batch_size: Any, steps: Any, n: int, batches: Any) -> tuple[int, int]:
    """Return the batch size and the batches per epoch, by default those of one pass over n rows."""
    usual = getattr(batches, "batch_size", min(DEFAULT_ROWS, n))
    size = check_integer("batch_size", usual if batch_size is None else batch_size, at_least=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of X, got {size}")
    steps = getattr(batches, "steps", n // size) if steps is None else steps
    return size, check_integer("steps", steps, at_least=1, at_most=MOST_ROWS_DRAWN // size)
