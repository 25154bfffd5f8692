"""A family of cases of which the default run takes some, and `-m "long or not long"` all."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def one_in(every: int, rows: Sequence[Any], ids: Iterable[Any]) -> list:
    """Return the rows as parameters of a test; all are `long` but the first of every so many."""
    marks = [() if place % every == 0 else pytest.mark.long for place in range(len(rows))]
    values = [row if isinstance(row, tuple) else (row,) for row in rows]
    return [pytest.param(*value, id=id, marks=mark) for value, id, mark in zip(values, ids, marks, strict=True)]
