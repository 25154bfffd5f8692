r"""Names and regular expressions that came in a file: looked up as PEFT does, within a bound on the time.

Promise: all patterns of a configuration take at most `MATCHING_SECONDS` of processor time, and little memory.
Kept by: most are plain, a module's path or its end, perhaps with ``\.`` for a dot, or with a bare ``.`` that stands for
any character; those are looked up in dictionaries, so that thousands of them on thousands of modules take no time. The
others run in Python's `re`, as in PEFT, in a `BoundedProcess`: a hostile one can run for years.
Shown by: tests/guards/test_boundedpatterns.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..checks import FileRefused, short
from .boundedprocess import BoundedProcess, BoundsExceeded

MATCHING_SECONDS = 3.0
"""Processor time for all patterns of a configuration on all module paths."""
MATCHING_MEMORY = 1 << 29
"""Bytes that the process which runs regular expressions may fill; for those in use it takes 10 MB."""
ANSWERS = Path(__file__).with_name("patternanswers.py")

ESCAPED, SPECIAL = re.compile(r"\\(\W)"), re.compile(r"[\\^$|?*+(){}\[\]]")
FLAGS = re.compile(r"((?:\(\?[aimsu]+\))*)(.*)", re.DOTALL)


class Matching:
    """The patterns of one configuration at work on the paths of its modules, with one bound on the time.

    Use it in a ``with`` statement, so that its process ends.

    Parameters
    ----------
    path : Path
        The configuration, for errors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.end = path, time.process_time() + MATCHING_SECONDS
        self.process = BoundedProcess(ANSWERS, seconds=0.0, memory=MATCHING_MEMORY)

    def __enter__(self) -> Matching:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close()

    def remaining(self, key: str) -> float:
        """Return the seconds that remain; refuse to go on where there are none."""
        remaining = self.end - time.process_time()
        if remaining <= 0:
            raise FileRefused(
                self.path,
                f"{key}: matching takes more than {MATCHING_SECONDS:g} s. Name the modules by their whole paths, which "
                "takes no time, or use simpler and fewer regular expressions",
            )
        return remaining

    def named(self, key: str, names: Iterable[str], modules: Sequence[str]) -> list[bool]:
        """Return of each module whether one of the names, in which no character has a special meaning, is its end."""
        plain = _Plain()
        for number, name in enumerate(names):
            plain.add(name, (len(name),), number)
        return [next(self._ends(key, plain, module), None) is not None for module in modules]

    def whole(self, key: str, pattern: str, modules: Sequence[str]) -> list[bool]:
        """Return of each module whether an expression matches its whole path."""
        paths = [(module, None) for module in modules]
        return [match is not None for match in self._run(key, [(0, pattern)], [pattern], paths, "fullmatch")]

    def layers(
        self, key: str, patterns: Sequence[str], shown: Sequence[str], modules: Sequence[str]
    ) -> list[str | None]:
        """Return of each module the group ``layer`` of the first expression that matches the path from its start."""
        paths = [(module, None) for module in modules]
        return [match and match[1] for match in self._run(key, list(enumerate(patterns)), shown, paths, "match")]

    def first(self, key: str, patterns: Iterable[str], modules: Sequence[str]) -> list[int | None]:
        """Return of each module the number of the first pattern that matches its path, or from a dot on its end."""
        wholes, ends, patterns = _Plain(), _Plain(), list(patterns)
        others: list[tuple[int, str]] = []
        for number, pattern in enumerate(patterns):
            plain = _plain(pattern)
            if plain:
                is_whole, text, lengths = plain
                (wholes if is_whole else ends).add(text, lengths, number)
            else:  # PEFT's own expression, for its `match`: "a|b)(" tells the difference to another's `fullmatch`
                flags, rest = FLAGS.fullmatch(pattern).groups()  # type: ignore[union-attr]
                others.append((number, rf"{flags}(.*\.)?({rest})$"))
        numbers = [min([*wholes.find(m), *self._ends(key, ends, m)], default=None) for m in modules]
        if not others:
            return numbers
        matches = self._run(key, others, patterns, list(zip(modules, numbers, strict=True)), "match")
        return [number if match is None else match[0] for number, match in zip(numbers, matches, strict=True)]

    def _ends(self, key: str, plain: _Plain, module: str) -> Iterator[int]:
        """Yield the numbers of the patterns that match a path or, from a dot on, its end: "enc.fc" and "fc"."""
        self.remaining(key)
        for start in re.finditer(r"^|\.", module):
            if len(module) - start.end() in plain.by_length:  # a long path has too many ends to cut them all out
                yield from plain.find(module[start.end() :])

    def _run(
        self,
        key: str,
        patterns: list[tuple[int, str]],
        shown: Sequence[str],
        paths: Sequence[tuple[str, int | None]],
        how: str,
    ) -> list[tuple[int, str | None] | None]:
        """Let the process answer, within the time that remains; refuse what is no expression, and what takes longer."""
        if not paths:
            return []
        before = self.process.used if self.process.runs else 0.0
        self.process.seconds = before + self.remaining(key)
        try:
            answer = self.process.ask({"patterns": patterns, "paths": list(paths), "how": how})
        except BoundsExceeded as error:
            if self.process.used > self.process.seconds:
                self.end = 0.0
                self.remaining(key)
            raise FileRefused(self.path, f"{key}: matching cannot be done: {error}") from None
        self.end -= self.process.used - before
        if "error" in answer:
            text = shown[answer["number"]]
            raise FileRefused(self.path, f"{key}: {short(text)} is not a regular expression: {answer['error']}")
        first: list[tuple[int, str | None] | None] = answer["first"]
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
