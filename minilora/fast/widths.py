"""Parts with rows of similar width, so that a batch computes little padding.

Texts of different lengths are padded to the longest. An ignored target is -100:

    Y    [-100 -100 i_3  i_4  -100 -100]     reaches to 4, its last target that counts
         [-100 i_2  -100 -100 -100 -100]     reaches to 2

No target of a decoder depends on later positions. So a part is computed only up to the width of its widest row, and
`by_width` puts rows of similar width into one part.
"""

from __future__ import annotations

import math

import numpy as np

from ..backend import backend_of
from ..checks import Array
from ..losses import IGNORE_INDEX


def widths(y: Array) -> np.ndarray:  # (n, T) -> (n,)
    """Return the width of each row: the position after its last target; 0 if none counts."""
    counts = backend_of(y).to_numpy(y != IGNORE_INDEX)
    return np.where(counts.any(axis=1), counts.shape[1] - counts[:, ::-1].argmax(axis=1), 0)


def by_width(y: Array, rows: int) -> list[np.ndarray]:
    """Return the row indices of each part of a batch, the widest first, without rows that have no target.

    There are at most as many parts as with `rows` rows each. A part's area is its number of rows times the width of its
    widest row. The largest area is minimal, so that the parts take similar times, and at most that of the `rows` widest
    rows.
    """
    order, wide = _widest_first(y)
    if not len(order):
        return [np.arange(min(rows, len(y)))]
    most, low, high = math.ceil(len(order) / rows), int(wide[0]), int(wide[0]) * rows
    while low < high:  # the smallest area without more parts is between them
        area = (low + high) // 2
        low, high = (low, area) if len(_pieces(wide, area)) <= most else (area + 1, high)
    return [order[piece] for piece in _pieces(wide, low)]


def of_area(y: Array, area: int) -> list[np.ndarray]:
    """Return the row indices of each part, the widest first. A part has at most this area, or is a single row."""
    order, wide = _widest_first(y)
    return [order[piece] for piece in _pieces(wide, area)]


def _widest_first(y: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the rows with a target, the widest first, and their widths."""
    wide = widths(y)
    order = np.argsort(-wide, kind="stable")[: np.count_nonzero(wide)]
    return order, wide[order]


def _pieces(wide: np.ndarray, area: int) -> list[slice]:
    """Cut rows of these widths, the widest first, into pieces of at most this area, or of a single row."""
    pieces, start = [], 0
    while start < len(wide):
        pieces.append(slice(start, start + max(1, area // int(wide[start]))))
        start = pieces[-1].stop
    return pieces
