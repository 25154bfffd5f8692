"""What an audit finds: each thing with its weight, and the modules that it is about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import short

WRONG, SUSPICIOUS, NOTE = "wrong", "suspicious", "note"
LEVELS = (WRONG, SUSPICIOUS, NOTE)
SHOWN = 3
"""Modules that a text names; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found."""

    level: str  # one of `LEVELS`
    code: str  # its identifier, which stays
    text: str  # in a sentence
    modules: tuple[str, ...] = ()  # that it is about, or tensors


def listed(names: Sequence[str], what: str = "module") -> str:
    """Return some names and the count of the rest: "'a', 'b', 'c' and 7 more modules"."""
    text = ", ".join(short(name) for name in names[:SHOWN])
    more = len(names) - SHOWN
    return text if more <= 0 else f"{text} and {more} more {what}{'s' if more > 1 else ''}"


def have(names: Sequence[str]) -> str:
    """Return the verb after `listed`: "has" after one name, "have" after several."""
    return "has" if len(names) == 1 else "have"


def counted(count: int, what: str) -> str:
    """Return a number with its noun: "1 module", "2 modules"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
