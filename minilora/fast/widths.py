"""Rows of like widths, so that a part of a batch computes little padding.

Texts of many lengths are padded to the longest. A target that does not count is -100:

    Y    [-100 -100 i_3  i_4  -100 -100]     reaches to 4, its last target that counts
         [-100 i_2  -100 -100 -100 -100]     reaches to 2

No target of a decoder depends on what comes after it. So a part is computed only as far as its widest row reaches, and
`by_width` puts rows of like widths into one part.
"""

from __future__ import annotations

import math

import numpy as np

from ..backend import backend_of
from ..checks import Array
from ..losses import IGNORE_INDEX


def widths(y: Array) -> np.ndarray:  # (n, T) -> (n,)
    """Return how far each row reaches; 0 where no target counts."""
    counts = backend_of(y).to_numpy(y != IGNORE_INDEX)
    return np.where(counts.any(axis=1), counts.shape[1] - counts[:, ::-1].argmax(axis=1), 0)


def by_width(y: Array, rows: int) -> list[np.ndarray]:
    """Return the numbers of the rows in each part of a batch, the widest first. Rows without a target are in none.

    There are at most as many parts as if each had `rows` rows. A part's area is its number of rows times the width of
    its widest. The largest area is as small as it can be, so that the parts take like times. None is larger than the
    area of the `rows` widest rows.
    """
    order, wide = _widest_first(y)
    if not len(order):
        return [np.arange(min(rows, len(y)))]
    most, low, high = math.ceil(len(order) / rows), int(wide[0]), int(wide[0]) * rows
    while low < high:  # between them lies the smallest area that needs no more parts
        area = (low + high) // 2
        low, high = (low, area) if len(_pieces(wide, area)) <= most else (area + 1, high)
    return [order[piece] for piece in _pieces(wide, low)]


def of_area(y: Array, area: int) -> list[np.ndarray]:
    """Return the numbers of the rows in each part, the widest first. A part has at most this area, or is one row."""
    order, wide = _widest_first(y)
    return [order[piece] for piece in _pieces(wide, area)]


def _widest_first(y: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows in which a target counts, the widest first, and their widths."""
    wide = widths(y)
    order = np.argsort(-wide, kind="stable")[: np.count_nonzero(wide)]
    return order, wide[order]


def _pieces(wide: np.ndarray, area: int) -> list[slice]:
    """Cut rows of these widths, the widest first, so that no piece has a larger area, unless it is one row."""
    pieces, start = [], 0
    while start < len(wide):
        pieces.append(slice(start, start + max(1, area // int(wide[start]))))
        start = pieces[-1].stop
    return pieces
