"""The findings of an audit, with the texts that list their modules.

A rule is a function that yields findings. Each file lists its rules at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..texts import short

WRONG, SUSPICIOUS, NOTE = "wrong", "suspicious", "note"
LEVELS = (WRONG, SUSPICIOUS, NOTE)
MODULES_NAMED = 3
"""The number of modules that a text lists; the rest are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found."""

    level: str  # one of `LEVELS`
    code: str  # a stable identifier
    text: str  # one sentence
    modules: tuple[str, ...] = ()  # the modules, or tensors, that it is about


Fault = tuple[str, str, str]
"""A problem of one module: level, code and text."""


def about(
    level: str, code: str, text: str, names: Iterable[str], what: str = "module", **values: Any
) -> Iterator[Finding]:
    """Yield one finding about `names`, each a `what`, if there are any: the text may use `{names}` and `{count}`."""
    if names := tuple(names):
        text = text.format(names=listed(names, what), count=counted(len(names), what), **values)
        yield Finding(level, code, text, names)


def one_per_code(faults: Iterable[tuple[str, Fault]]) -> Iterator[Finding]:
    """Yield one finding for each level and code: the first module's text, and a list of all modules that share it."""
    texts: dict[tuple[str, str], str] = {}
    paths: dict[tuple[str, str], list[str]] = {}
    for path, (level, code, text) in faults:
        texts.setdefault((level, code), text)
        paths.setdefault((level, code), []).append(path)
    for (level, code), own in paths.items():
        also = f"; likewise in {counted(len(own), 'module')}: {listed(own)}" if len(own) > 1 else ""
        yield Finding(level, code, f"{short(own[0])}: {texts[level, code]}{also}", tuple(own))


def listed(names: Sequence[str], what: str = "module") -> str:
    """Return the first names and the number of the others: "'a', 'b', 'c' and 7 more modules"."""
    text = ", ".join(short(name) for name in names[:MODULES_NAMED])
    more = len(names) - MODULES_NAMED
    return text if more <= 0 else f"{text} and {more} more {what}{'s' if more > 1 else ''}"


def counted(count: int, what: str) -> str:
    """Return a number with its noun, singular or plural: "1 module", "2 modules"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
