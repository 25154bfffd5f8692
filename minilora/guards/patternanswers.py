"""Regular expressions run on module paths, in the process of a `minilora.guards.boundedprocess`, which bounds them.

The engine is Python's `re`, which is PEFT's own. This file imports nothing of the package.
"""

from __future__ import annotations

import re
import warnings
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return for each path which pattern matches it first, and what is in the group ``layer``; or None.

    The question has ``patterns``, pairs of a number and a text, in the order of the numbers; ``paths``, pairs of a text
    and None or a number below which alone the patterns count; and ``how``, "match" or "fullmatch". A pattern that is
    none is answered with its number and the reason.
    """
    compiled = []
    for number, text in question["patterns"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of what a later Python may read differently
                compiled.append((number, getattr(re.compile(text), question["how"])))
        except (re.error, Warning, RecursionError, OverflowError, MemoryError) as error:
            return {"number": number, "error": str(error)}
    return {"first": [_first(compiled, path, limit) for path, limit in question["paths"]]}


def _first(compiled: list[tuple[int, Any]], path: str, limit: int | None) -> tuple[int, str | None] | None:
    for number, match in compiled:
        if limit is not None and number > limit:
            return None
        result = match(path)
        if result:
            return number, result.groupdict().get("layer")
    return None
