"""A family of cases of which the default run takes some, `-m "long or not long"` more, and the night all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def one_in(every: int, rows: Sequence[Any], ids: Iterable[Any], long: int = 1) -> list:
    """Return the rows as parameters of a test, by their places from 0.

    What `every` divides is of the default run; of the others what `long` divides is `long`, and the rest is `full`.
    """
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    marks = [
        () if place % every == 0 else pytest.mark.long if place % long == 0 else pytest.mark.full
        for place in range(len(values))
    ]
    return [pytest.param(*value, id=id, marks=mark) for value, id, mark in zip(values, ids, marks, strict=True)]
