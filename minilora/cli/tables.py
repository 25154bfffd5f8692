"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def align(lines: Sequence[tuple[str, ...]], left: set[int]) -> str:
    """Return rows of text as columns, those in `left` flush left and the others flush right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
