"""The search for the known mistakes that explain wrong answers, shared by everything that is judged by its numbers.

A mistake is a row of a table: the right formulas with some parts replaced. It explains an answer if it predicts the
given numbers in every case and they differ from the right ones. `name` explains the wrong answers with as few rows as
it can:

1. It tries one row at a time, by itself or on top of the first mistake that was found. If no row fits, it tries pairs.
2. An answer that is still unexplained may be wrong only in some cases. The first step is repeated on these cases.
3. Both steps are repeated for what is left, with the rows that are tried last.

Of the rows that explain something, the one that explains the most answers is named. Ties go to the row that would
change the fewest other answers, then to a row by itself over one on top of another, to a single row over a pair, to the
row that replaces the fewest parts, and to the flag that comes first in the alphabet. So the order of the table does not
matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..texts import enumerated

Answers = Mapping[str, Any]  # arrays by name; None for an answer that is required but missing
Parts = Mapping[str, Any]
MAX_CACHED = 2000
"""The largest number of predictions that a world keeps; if there are more, the next search starts with none."""
MEASURED_COUNT = 1000
"""The count of a row that was measured from the answers; being large, it lets a known row win a tie."""


@dataclass(frozen=True, eq=False)  # compared by identity, so that its predictions can be cached
class Wrong:
    """A known mistake: the right formulas with some parts replaced."""

    flag: str  # the identifier; it never changes, whereas the sentence may
    says: str  # the diagnosis, as a report prints it
    parts: Parts | Callable[[Any], Parts]  # the replaced parts, or a function of the case that returns them
    source: str = ""  # where it was found in public, as "owner/repository #issue" or "package version"
    shows: tuple[str, ...] = ()  # the answers in which it may show; if empty, all of them
    slot: str = ""  # rows of different slots can be wrong at the same time
    count: int = 1  # the number of parts that it replaces
    largest: Callable[[Any], Parts] | None = None  # the parts at their largest, for the tolerance; `parts` if None
    # If the mistake rounds intermediate values, one entry in fifty may be off by up to this many tolerances: close to a
    # tie it may have been rounded the other way.
    ties: float = 0.0

    def replaced_in(self, case: Any) -> Parts:
        """Return the parts that the mistake replaces in a case; none if it makes no difference there."""
        return self.parts(case) if callable(self.parts) else self.parts


@dataclass(frozen=True)
class World:
    """The cases, the right answers to them, the tolerances, and the mistakes that people make."""

    cases: Sequence[Any]
    answers: Callable[[Any, Parts], Answers]  # (case, parts) -> all answers by name; without parts, the right ones
    allowed: Callable[[Any, str, Parts], Any]  # (case, answer's name, parts) -> the tolerance of each entry
    table: Sequence[Wrong]
    measured: Callable[[Sequence[Answers]], Iterable[Wrong]] = lambda given: ()  # rows that the given answers suggest
    last: Sequence[Wrong] = ()  # rows that are tried only if no other fits
    # (some cases, all cases) -> what sets the former apart, in words. If None, a row must hold in all cases.
    when: Callable[[Sequence[Any], Sequence[Any]], str] | None = None
    words: Mapping[str, str] = field(default_factory=dict)  # a name for each answer, in report order; may be empty
    cache: dict[Any, Any] = field(default_factory=dict)  # the rows' predictions, kept from one search to the next


@dataclass(frozen=True)
class Named:
    """One or more mistakes with the answers that they explain."""

    wrongs: tuple[Wrong, ...]
    explains: frozenset[str]
    affects: frozenset[str]  # all answers that the mistakes would change
    on_top: bool = False  # whether they explain the answers only on top of the first mistake
    where: str = ""  # the answers in which they show, if they could show in others too
    when: str = ""  # the cases in which they show, if not all
    cases: tuple[int, ...] = ()  # the numbers of the cases in which these answers are wrong

    @property
    def says(self) -> str:
        """The diagnosis, without its source."""
        return self.when + " and, at the same time, ".join(wrong.says for wrong in self.wrongs) + self.where

    @property
    def flag(self) -> str:
        """The flags of the mistakes, joined by a plus sign."""
        return "+".join(wrong.flag for wrong in self.wrongs)

    @property
    def source(self) -> str:
        """Where the mistakes were found in public."""
        return ", ".join(wrong.source for wrong in self.wrongs if wrong.source)

    @property
    def order(self) -> tuple[Any, ...]:
        """The sort key: the smallest one is named."""
        others, replaced = len(self.affects - self.explains), sum(wrong.count for wrong in self.wrongs)
        flags = [wrong.flag for wrong in self.wrongs]
        return -len(self.explains), others, self.on_top, len(self.wrongs), replaced, flags


def off(found: Any, expected: Any, allowed: Any) -> float:
    """Return the largest error of an answer in units of its tolerance; None stands for an answer that is missing."""
    if not _can_be_compared(found, expected):
        return 0.0 if found is expected is None else np.inf
    return float(_distances(found, expected, allowed).max(initial=0.0))


def _can_be_compared(found: Any, expected: Any) -> bool:
    """Return whether both answers exist and have the same shape, and the found one is finite."""
    both_given = found is not None and expected is not None
    return both_given and np.shape(found) == np.shape(expected) and bool(np.isfinite(found).all())


def _distances(found: Any, expected: Any, allowed: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        distances = np.abs(np.asarray(found, np.float64) - expected) / allowed
    return np.asarray(np.fmin(distances, np.inf))  # fmin turns NaN into infinity


class Factor(NamedTuple):
    """The factor by which a change is applied to an array, and the rounding error of this factor."""

    value: float
    slack: float

    def differs_from(self, expected: float) -> bool:
        """Return whether the factor differs from the expected one by more than rounding."""
        return abs(self.value - expected) > self.slack


def factor(found: Any, change: Any, allowed: Callable[[float], Any], without: Any = 0.0) -> Factor | None:
    """Fit t in found = without + t change by least squares; return None if no t fits all entries.

    `allowed` returns the tolerance of each entry for a given t.
    """
    if np.shape(found) != np.shape(change) or not np.isfinite(found).all() or not np.any(change):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(change).max()  # factored out, or the squares of huge changes would overflow
        squares = ((change / largest) ** 2).sum()
        value = float(((found - without) * (change / largest)).sum() / squares / largest)
        each = allowed(value) if np.isfinite(value) else 0.0
        if not np.any(each) or off(found, without + value * change, each) > 1:
            return None
        top = np.max(each)
        slack = float(top * np.sqrt(((each / top * change / largest) ** 2).sum()) / squares / largest)
    # The slack covers the rounding of the entries and, below, that of the sums above.
    return Factor(value, slack + 2.0**-50 * abs(value))


def name(world: World, given: Sequence[Answers]) -> tuple[frozenset[str], list[Named]]:
    """Return the names of the wrong answers, and the mistakes that explain them, the best explanation first."""
    search = _Search(world, given)
    wrong = set().union(*search.wrong)
    named = search.cover([*world.table, *search.measured], wrong, search.every)
    named += search.on_some_cases(world.table, _rest(wrong, named))
    named += search.cover(world.last, _rest(wrong, named), search.every)
    named += search.on_some_cases(world.last, _rest(wrong, named))
    return frozenset(wrong), named


def _rest(wrong: set[str], named: Sequence[Named]) -> set[str]:
    return wrong.difference(*(one.explains for one in named))


class _Search:
    """A search for the rows of a world that predict given answers; each prediction is computed once."""

    def __init__(self, world: World, given: Sequence[Answers]) -> None:
        self.world, self.given, self.every = world, given, range(len(world.cases))
        self.right = [world.answers(case, {}) for case in world.cases]
        self.measured = [*world.measured(given)]
        self.own: dict[Any, Any] = {}  # the cache of measured rows, which belong to these answers only
        if len(world.cache) > MAX_CACHED:
            world.cache.clear()
        self.wrong = [{key for key in found if not self.fits(i, key, (), found[key])}
                      for i, found in zip(self.every, given, strict=True)]  # fmt: skip

    def predicted(self, i: int, wrongs: tuple[Wrong, ...]) -> tuple[Answers, Parts, dict[str, Any]]:
        """Return what rows predict in a case, the parts that its tolerances depend on, and a cache of tolerances."""
        cache = self.own if any(row in self.measured for row in wrongs) else self.world.cache
        if (i, wrongs) not in cache:
            case = self.world.cases[i]
            parts = {key: part for row in wrongs for key, part in row.replaced_in(case).items()}
            larger = {key: part for row in wrongs if row.largest for key, part in row.largest(case).items()}
            answers = {**self.right[i], **self.world.answers(case, parts)} if parts else self.right[i]
            cache[i, wrongs] = answers, parts | larger, {}
        return cache[i, wrongs]  # type: ignore[no-any-return]

    def fits(self, i: int, key: str, wrongs: tuple[Wrong, ...], found: Any) -> bool:
        """Return whether an answer is what rows predict, up to rounding."""
        answers, parts, allowed = self.predicted(i, wrongs)
        if not _can_be_compared(found, answers[key]):  # this saves computing the tolerance, the slowest part
            return found is answers[key] is None
        if key not in allowed:
            allowed[key] = self.world.allowed(self.world.cases[i], key, parts)
        distances = _distances(found, answers[key], allowed[key])
        beyond, ties = int((distances > 1).sum()), max((row.ties for row in wrongs), default=0.0)
        return not beyond or (ties > 0 and beyond <= max(1, distances.size // 50) and bool((distances <= ties).all()))

    def explained(
        self, wrongs: tuple[Wrong, ...], below: tuple[Wrong, ...], rest: set[str], at: Iterable[int]
    ) -> Named | None:
        """Return the answers that rows, on top of those below, predict in every case; None if there are none."""
        left = {key for key in rest if all(not row.shows or key in row.shows for row in wrongs)}
        affects: set[str] = set()
        for i in at:
            found = self.given[i]
            left -= {key for key in left & found.keys() if not self.fits(i, key, (*below, *wrongs), found[key])}
            if not left:
                return None
            answers = self.predicted(i, (*below, *wrongs))[0]
            affects |= {key for key in found.keys() - affects if not self.fits(i, key, below, answers[key])}
        if not left & affects:
            return None
        cases = tuple(i for i in self.every if left & affects & self.wrong[i])
        return Named(wrongs, frozenset(left & affects), frozenset(affects), bool(below), cases=cases)

    def cover(self, rows: Sequence[Wrong], wrong: set[str], at: Sequence[int]) -> list[Named]:
        """Return mistakes that explain the wrong answers in some cases; each explains what those before it do not."""
        chosen: list[Named] = []
        rest = set(wrong)
        while rest:
            at = self._most_telling_first(rest, at)
            before = chosen[0].wrongs if chosen else ()
            tried: Iterable[Any] = (((row,), below) for row in rows for below in {(), before})
            fits = [fit for wrongs, below in tried if (fit := self.explained(wrongs, below, rest, at))]
            if not fits:
                by_slot = sorted(rows, key=lambda row: row.slot, reverse=True)
                pairs = (two for two in combinations(by_slot, 2) if two[0].slot != two[1].slot)
                fits = [fit for pair in pairs if (fit := self.explained(pair, (), rest, at))]
            if not fits:
                break
            best = min(fits, key=lambda fit: fit.order)
            chosen.append(replace(best, where=self._where(best, at)))
            rest -= best.explains
        return [_with_those_on_top(chosen), *chosen[1:]] if chosen else []

    def _most_telling_first(self, rest: set[str], at: Sequence[int]) -> list[int]:
        """Sort cases so that a row that does not fit is rejected soon: all of `rest` wrong first, then the smallest."""
        return sorted(at, key=lambda i: (not rest <= self.wrong[i], sum(np.size(a) for a in self.right[i].values())))

    def on_some_cases(self, rows: Sequence[Wrong], rest: set[str]) -> list[Named]:
        """Return the mistakes that are made in all cases where answers are wrong, and in no others.

        All answers are tried together first, since in some cases a mistake may show in only one of them; then each is
        tried by itself.
        """
        found: list[Named] = []
        for keys in (rest, *({key} for key in self._in_order(rest) if len(rest) > 1)):
            left = _rest(keys, found)
            at = [i for i in self.every if left & self.wrong[i]]
            if self.world.when and 0 < len(at) < len(self.every):
                found += [replace(named, when=self._place(named, at)) for named in self.cover(rows, left, at)]
        return found

    def _place(self, named: Named, at: Sequence[int]) -> str:
        """Describe the cases in which a mistake is made, among those in which it would show."""
        assert self.world.when is not None
        showing = [i for i in self.every if i in at or self._shows(named, i)]
        when = self.world.when([self.world.cases[i] for i in at], [self.world.cases[i] for i in showing])
        those = "the one" if len(at) == 1 else "those"
        return f"on {len(at)} of {len(self.every)} problems, {those} {when or 'where it shows'}: "

    def _shows(self, named: Named, i: int) -> bool:
        """Return whether a mistake would change an answer that it explains in a case."""
        answers = self.predicted(i, named.wrongs)[0]
        return not all(self.fits(i, key, (), answers[key]) for key in named.explains & self.given[i].keys())

    def _where(self, named: Named, at: Sequence[int]) -> str:
        """Describe the answers in which a mistake shows, if it could show in others too."""
        if not self.world.words:
            return ""
        if named.explains == named.affects:
            offered = {key for i in at for key in self.given[i]}
            return ", in everything that is computed" if named.affects == offered and len(offered) > 1 else ""
        return f", only in {enumerated([self.world.words[key] for key in self._in_order(named.explains)])}"

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """Return the names of answers in report order; names that the report does not have follow alphabetically."""
        order = [*self.world.words]
        return sorted(keys, key=lambda key: (order.index(key) if key in order else len(order), key))


def _with_those_on_top(chosen: Sequence[Named]) -> Named:
    """Return the first mistake, without `where` if it also shows in the answers that another one explains on top."""
    first, covered = chosen[0], {key for named in chosen if named.on_top for key in named.explains}
    return replace(first, where="") if covered and first.affects <= covered | first.explains else first
