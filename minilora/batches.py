"""Which rows a step takes: of a pass through all of them, in an order of its own; or, as in the article, of a new draw.

    S = ceil(n / b)                        steps of a pass through n rows, b at a time
    p, k = divmod(t - 1, S)                step t, counted from 1, is the k-th of pass p
    order_p = permutation of 0 ... n - 1   drawn from the seed and p alone
    rows_t  = order_p[k b : (k + 1) b]     of the last step of a pass as many as are left

Each row is in each pass once. Where b does not divide n, the last step of a pass is of fewer rows, as with PyTorch's
`DataLoader` and transformers' `Trainer`: no row is left out, and none comes twice so that a batch is full.

The seed and a step's number are all that its rows depend on. So a training that goes on needs nothing but these, and
neither the parts of a batch nor who computes them changes the rows.

The article draws each batch from all rows, without replacement in the batch:

    rows_t  = b of 0 ... n - 1, drawn from the generator as step t left it

A row can come up twice in n / b steps, or not at all: of many rows, 1/e are missing then, or 37 %.
"""

from __future__ import annotations

import math

import numpy as np

from .checks import check_integer

__all__ = ["Passes", "draw_batches"]


class Passes:
    """The row numbers of each step, for ``train(..., batches=Passes(len(X), batch_size, seed))``.

    Parameters
    ----------
    n : int
        The rows that there are.
    batch_size : int
        The rows of a step, from 1 to n; the last of a pass may have fewer.
    seed : int
        Of the orders, at least 0.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n = check_integer("n", n, at_least=1)
        self.batch_size = check_integer("batch_size", batch_size, at_least=1, at_most=n)
        self.seed = check_integer("seed", seed, at_least=0)
        self.steps = math.ceil(self.n / self.batch_size)  # of a pass
        self._latest, self._order = -1, np.empty(0, np.int64)

    def __repr__(self) -> str:
        return f"Passes(n={self.n}, batch_size={self.batch_size}, seed={self.seed})"

    def __call__(self, t: int) -> np.ndarray:
        """Return the row numbers of step t, counted from 1, (at most batch_size,) int64."""
        number, k = divmod(t - 1, self.steps)
        if number != self._latest:
            self._latest, self._order = number, self.order(number)
        return self._order[k * self.batch_size : (k + 1) * self.batch_size]

    def order(self, number: int) -> np.ndarray:
        """Return the order of all rows in a pass, (n,) int64. The passes are counted from 0."""
        # A spawned sequence: that of [seed, 0] would be the seed's own, from which the adapters start.
        seeds = np.random.SeedSequence(self.seed, spawn_key=(number,))
        return np.random.default_rng(seeds).permutation(self.n)


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (steps, batch_size), each batch drawn afresh, as in the article."""
    batches = np.empty((n // batch_size if steps is None else steps, batch_size), np.int64)
    for batch in batches:
        batch[...] = rng.choice(n, batch_size, replace=False, shuffle=False)
    return batches
