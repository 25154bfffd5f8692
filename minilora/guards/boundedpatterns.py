r"""Names and regular expressions that came in a file: looked up as PEFT does, within a bound on the time.

Most are plain: a module's path or its end, perhaps with ``\.`` for a dot, or with a bare ``.`` that stands for any
character. Those are looked up in a dictionary, so that thousands of them on thousands of modules take no time. The
others run in the `regex` package, whose matching can be stopped: a hostile regular expression can run for years.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import regex

from .errors import FileRefused, short

MATCHING_SECONDS = 3.0
"""Processor time for all patterns of a configuration on all module paths."""
MAX_PATTERN = 1000
"""Characters of one regular expression."""
MAX_SUBJECT = 10_000
"""Characters of a module path that a regular expression is run on."""
MAX_REPEATS = 10_000
"""What the numbers in a regular expression's counted repeats, as {3} or {2,5}, may multiply to: each is unrolled."""

ESCAPED, SPECIAL = re.compile(r"\\(\W)"), re.compile(r"[\\^$|?*+(){}\[\]]")
FLAGS = re.compile(r"((?:\(\?[aimsu]+\))*)(.*)", re.DOTALL)
REPEAT = re.compile(r"\{(\d+(?:,\d*)?|,\d+)\}")


class Clock:
    """The time that is left for the patterns of one configuration."""

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, time.process_time() + MATCHING_SECONDS

    def left(self, key: str) -> float:
        """Return the seconds left; refuse to go on where there are none."""
        left = self.end - time.process_time()
        if left <= 0:
            raise FileRefused(
                self.path,
                f"{key}: matching takes more than {MATCHING_SECONDS:g} s. Name the modules by their whole paths, which "
                "takes no time, or use simpler and fewer regular expressions",
            )
        return left


class Patterns:
    """Patterns in their order, of which the first that matches decides.

    Parameters
    ----------
    clock : Clock
        The time that they may take.
    key : str
        Where they stand in the configuration, for errors.
    patterns : iterable of str
        Each for a module's path or, from a dot on, the end of one.
    literal : bool
        Whether they are names, in which no character has a special meaning.
    """

    def __init__(self, clock: Clock, key: str, patterns: Iterable[str], *, literal: bool = False) -> None:
        self.clock, self.key = clock, key
        self.whole, self.ends = _Plain(), _Plain()
        self.others: list[tuple[int, regex.Pattern[str]]] = []
        for number, pattern in enumerate(patterns):
            plain = (False, pattern, (len(pattern),)) if literal else _plain(pattern)
            if plain:
                whole, text, lengths = plain
                (self.whole if whole else self.ends).add(text, lengths, number)
            else:
                check_length(clock, key, pattern)
                flags, rest = FLAGS.fullmatch(pattern).groups()  # type: ignore[union-attr]
                self.others.append((number, compiled(clock, key, rf"{flags}(.*\.)?({rest})$", shown=pattern)))

    def first(self, module: str) -> int | None:
        """Return the number of the first pattern that matches a module's path, None where none does."""
        self.clock.left(self.key)
        found = [*self.whole.find(module)]
        for start in re.finditer(r"^|\.", module):  # of "enc.fc" itself, and of its end "fc"
            if len(module) - start.end() in self.ends.by_length:  # a long path has too many ends to cut them all out
                found += self.ends.find(module[start.end() :])
        first = min(found, default=None)
        for number, pattern in self.others:
            if first is not None and number > first:
                break
            # PEFT's own call. `match` and `$` where another would write `fullmatch`: "a|b)(" tells the difference.
            if matched(self.clock, self.key, pattern.match, module):
                return number
        return first


class _Plain:
    """Plain patterns in dictionaries: by their length, by those of the words between their bare dots, by the words."""

    def __init__(self) -> None:
        self.by_length: dict[int, dict[tuple[int, ...], dict[tuple[str, ...], int]]] = {}

    def add(self, text: str, lengths: tuple[int, ...], number: int) -> None:
        """Add a text to match, of words of these lengths, with one character between two that may be any."""
        self.by_length.setdefault(len(text), {}).setdefault(lengths, {}).setdefault(_words(text, lengths), number)

    def find(self, text: str) -> Iterator[int]:
        """Yield the numbers of the patterns that match the whole text, of equal ones the first."""
        for lengths, numbers in self.by_length.get(len(text), {}).items():
            number = numbers.get(_words(text, lengths))
            if number is not None:
                yield number


def _words(text: str, lengths: tuple[int, ...]) -> tuple[str, ...]:
    """Cut a text into words of these lengths, and leave out the one character between two of them."""
    words, start = [], 0
    for length in lengths:
        words.append(text[start : start + length])
        start += length + 1
    return tuple(words)


def _plain(pattern: str) -> tuple[bool, str, tuple[int, ...]] | None:
    """Return whether a plain pattern is for a whole path, its text, and the lengths of the words between bare dots.

    Return None where it is none. Here no match spans more than one character or two: a match of all of a long pattern
    takes a hundred times the memory of its text.
    """
    whole = pattern.startswith("^")
    rest = pattern[whole:]
    bare = ESCAPED.sub("_", rest)  # a character for each that it matches
    if bare.endswith("$"):
        bare, rest = bare[:-1], rest[:-1]
    if SPECIAL.search(bare):
        return None
    return whole, ESCAPED.sub(r"\1", rest), tuple(map(len, bare.split(".")))


def check_length(clock: Clock, key: str, pattern: str) -> None:
    """Refuse a regular expression that is too long, before anything runs over it."""
    if len(pattern) > MAX_PATTERN:
        raise FileRefused(clock.path, f"{key}: {short(pattern)} has {len(pattern)} characters, over {MAX_PATTERN}")


def compiled(clock: Clock, key: str, pattern: str, *, shown: str) -> regex.Pattern[str]:
    """Compile a regular expression; refuse one that PEFT's engine, Python's `re`, refuses or reads otherwise."""
    clock.left(key)
    check_length(clock, key, shown)
    bare = re.sub(r"\\.", "_", pattern, flags=re.DOTALL)
    repeats = 1
    for count in REPEAT.findall(bare):
        repeats *= max(1, *(int(number or 1) for number in count.split(",")))
    if repeats > MAX_REPEATS:
        raise FileRefused(
            clock.path, f"{key}: the counts in {short(shown)} multiply to {repeats:.0e}, over {MAX_REPEATS:,}"
        )
    # `regex` reads these otherwise: an approximate match, a class by its name, spaces within a count.
    for sign, found in (
        ("{", "{" in REPEAT.sub("", bare)),
        ("[:", "[:" in bare),
        ("(?x)", re.search(r"\(\?[a-z-]*x", bare)),
    ):
        if found:
            raise FileRefused(clock.path, f"{key}: {short(shown)} holds {sign!r}, which is not supported")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what a later Python may read differently
            re.compile(pattern)
        return regex.compile(pattern, regex.V0, cache_pattern=False)
    except (re.error, regex.error, Warning, RecursionError, OverflowError) as error:
        raise FileRefused(clock.path, f"{key}: {short(shown)} is not a regular expression: {error}") from error


def matched(clock: Clock, key: str, match: Callable[..., Any], module: str) -> Any:
    """Return what a pattern's `match` or `fullmatch` finds in a path; refuse to wait longer than the clock says."""
    if len(module) > MAX_SUBJECT:
        raise FileRefused(
            clock.path, f"{key}: the path {short(module)} is too long for a regular expression; name it as it is"
        )
    try:
        return match(module, timeout=clock.left(key))
    except TimeoutError:
        clock.end = 0.0
    return clock.left(key)  # which raises
