"""What an audit finds: each thing with its weight, its code, a sentence, and the modules that it is about.

A rule is a function that yields findings. The rules of a file are listed at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..texts import short

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


Fault = tuple[str, str, str]
"""What is wrong with one module: level, code and text."""


def found(
    level: str, code: str, text: str, names: Iterable[str], what: str = "module", **values: Any
) -> Iterator[Finding]:
    """Yield a finding about some names, each a `what`: `{names}` in the text lists them, `{count}` counts them."""
    if names := tuple(names):
        text = text.format(names=some(names, what), count=counted(len(names), what), **values)
        yield Finding(level, code, text, names)


def alike(faults: Iterable[tuple[str, Fault]]) -> Iterator[Finding]:
    """Yield one finding for each level and code: what is wrong with the first module, and where it is wrong too."""
    texts: dict[tuple[str, str], str] = {}
    paths: dict[tuple[str, str], list[str]] = {}
    for path, (level, code, text) in faults:
        texts.setdefault((level, code), text)
        paths.setdefault((level, code), []).append(path)
    for (level, code), of_it in paths.items():
        also = f"; so in {counted(len(of_it), 'module')}: {some(of_it)}" if len(of_it) > 1 else ""
        yield Finding(level, code, f"{short(of_it[0])}: {texts[level, code]}{also}", tuple(of_it))


def some(names: Sequence[str], what: str = "module") -> str:
    """Return some names and the count of the rest: "'a', 'b', 'c' and 7 more modules"."""
    text = ", ".join(short(name) for name in names[:SHOWN])
    more = len(names) - SHOWN
    return text if more <= 0 else f"{text} and {more} more {what}{'s' if more > 1 else ''}"


def counted(count: int, what: str) -> str:
    """Return a number with its noun: "1 module", "2 modules"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
