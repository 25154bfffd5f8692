"""A batch's rows, gathered without new memory."""

from __future__ import annotations

import numpy as np

from ..backend import backend_of
from ..checks import Array


class Batches:
    """Gathers rows of X and Y, on a CPU each time into the same two buffers."""

    def __init__(self, X: Array, Y: Array, batch_size: int) -> None:
        self.data = X, Y
        where = backend_of(X)
        self.buffers = [where.zeros((batch_size, *d.shape[1:]), d.dtype) for d in self.data]

    def __call__(self, rows: Array) -> list[Array]:
        """Return the rows of X and Y with those numbers. The next call overwrites them."""
        return [take_rows(d, rows, out=buffer) for d, buffer in zip(self.data, self.buffers, strict=True)]


def take_rows(array: Array, rows: Array, out: Array) -> Array:
    """Return the rows of `array` with those numbers, on a CPU in the buffer `out`."""
    if isinstance(array, np.ndarray):
        # An adapter's step at the article's sizes takes 0.19 ms so, and 0.66 ms with new arrays for each batch, whose
        # memory the system hands out page by page. Without mode="clip" NumPy copies once more: 0.24 ms. Rows are
        # never out of range here, so nothing is clipped.
        return np.take(array, rows, axis=0, out=out, mode="clip")
    return array[rows]  # a GPU's library keeps a pool of memory, which makes a buffer pointless
