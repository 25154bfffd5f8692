"""Which known mistakes explain wrong answers: one namer, for everything that is judged by its numbers.

A mistake is the right formulas with some parts replaced, a row of a table. It explains an answer where the numbers are
as it has them on every case, and are not the right ones. `name` covers what is wrong with as few rows as it can:

1. One row at a time, alone or on top of the first one that was named. Where no row fits, two rows at once.
2. Answers that are still unexplained may be wrong on some cases alone: the same, on these cases.
3. The same two steps for what is left, with the rows that are tried last.

Of rows that explain something that one is named which explains the most answers; of equals that which would change the
fewest others, then one alone before one on top of another, then one before two at once, then that which replaces the
fewest parts, then that whose flag comes first in the alphabet. So the place of a row in its table makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ..texts import enumerated

Answers = Mapping[str, Any]  # arrays by their names; None for one that is owed and was not given
Parts = Mapping[str, Any]
MOST_KEPT = 2000
"""Predictions of a world; more are forgotten before the next search."""
MEASURED = 1000
"""The count of a row that was measured on the spot: a known one goes before it."""


@dataclass(frozen=True, eq=False)  # a row is itself alone: what it predicts can be kept
class Wrong:
    """A wrong reading: the right formulas with some parts replaced."""

    flag: str  # its identifier, which stays: a sentence may be rephrased, a flag may not
    says: str  # the diagnosis, as a report prints it
    parts: Parts | Callable[[Any], Parts]  # what it replaces; or a function of the case that returns it
    source: str = ""  # where it was made in public, as "owner/repository #issue" or "package version"
    shows: tuple[str, ...] = ()  # the answers in which it may show; none named are all
    slot: str = ""  # rows of two slots can be wrong at once
    count: int = 1  # how many parts it replaces
    largest: Callable[[Any], Parts] | None = None  # its parts at their largest, for what is allowed; as `parts` if None
    # Where it rounds on the way, one entry of fifty may be off by so many times what is allowed: near a tie it may have
    # been rounded the other way.
    ties: float = 0.0

    def of(self, case: Any) -> Parts:
        """Return the parts that it replaces in a case; none where it makes no difference."""
        return self.parts(case) if callable(self.parts) else self.parts


@dataclass(frozen=True)
class World:
    """What is asked, what is right, how far off is right, and what people get wrong."""

    cases: Sequence[Any]
    answers: Callable[[Any, Parts], Answers]  # a case and parts: every answer, by its name; no parts is right
    allowed: Callable[[Any, str, Parts], Any]  # a case, an answer's name and parts: how far each entry may be off
    table: Sequence[Wrong]
    measured: Callable[[Sequence[Answers]], Iterable[Wrong]] = lambda given: ()  # rows that given answers suggest
    last: Sequence[Wrong] = ()  # rows that are tried where none of the others fits
    # What some cases have in common and the others have not, in words, of (some, all); None: a row must hold on all.
    when: Callable[[Sequence[Any], Sequence[Any]], str] | None = None
    words: Mapping[str, str] = field(default_factory=dict)  # for each answer, in the order of a report; else unsaid
    kept: dict[Any, Any] = field(default_factory=dict)  # what rows predict, from one search to the next


@dataclass(frozen=True)
class Named:
    """One mistake, or several at once, and the answers that they explain."""

    wrongs: tuple[Wrong, ...]
    explains: frozenset[str]
    affects: frozenset[str]  # all answers that they would change
    on_top: bool = False  # whether they explain them on top of the first mistake
    where: str = ""  # in which answers they show, where they could show in others too
    when: str = ""  # on which cases, where not on all
    cases: tuple[int, ...] = ()  # the numbers of the cases on which these answers are wrong

    @property
    def says(self) -> str:
        """The diagnosis, without where it was made."""
        return self.when + " and, at once, ".join(wrong.says for wrong in self.wrongs) + self.where

    @property
    def flag(self) -> str:
        """Its flag, or those of both with a plus between them."""
        return "+".join(wrong.flag for wrong in self.wrongs)

    @property
    def source(self) -> str:
        """Where it was made in public."""
        return ", ".join(wrong.source for wrong in self.wrongs if wrong.source)

    @property
    def order(self) -> tuple[Any, ...]:
        """What the mistake that is named has least of."""
        others, replaced = len(self.affects - self.explains), sum(wrong.count for wrong in self.wrongs)
        flags = [wrong.flag for wrong in self.wrongs]
        return -len(self.explains), others, self.on_top, len(self.wrongs), replaced, flags


def off(found: Any, expected: Any, allowed: Any) -> float:
    """Return how far an answer is off, in units of what is allowed; None is an answer that is not given."""
    if not _can_be_compared(found, expected):
        return 0.0 if found is expected is None else np.inf
    return float(_distances(found, expected, allowed).max(initial=0.0))


def _can_be_compared(found: Any, expected: Any) -> bool:
    """Return whether both answers are given, of one shape, and the found one finite."""
    there = found is not None and expected is not None
    return there and np.shape(found) == np.shape(expected) and bool(np.isfinite(found).all())


def _distances(found: Any, expected: Any, allowed: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        distances = np.abs(np.asarray(found, np.float64) - expected) / allowed
    return np.asarray(np.fmin(distances, np.inf))  # infinite where it is not a number


class Factor(NamedTuple):
    """By which factor an array has a change, and how far that may be off by rounding."""

    value: float
    slack: float

    def is_other(self, expected: float) -> bool:
        """Return whether it is another factor than the expected one, beyond rounding."""
        return abs(self.value - expected) > self.slack


def factor(found: Any, change: Any, allowed: Callable[[float], Any], without: Any = 0.0) -> Factor | None:
    """Measure by least squares the t of found = without + t change; None where no t is that of all entries.

    `allowed` says how far each entry may be off at a factor.
    """
    if np.shape(found) != np.shape(change) or not np.isfinite(found).all() or not np.any(change):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(change).max()  # taken out, or the square of a huge one would leave the range
        squares = ((change / largest) ** 2).sum()
        value = float(((found - without) * (change / largest)).sum() / squares / largest)
        each = allowed(value) if np.isfinite(value) else 0.0
        if not np.any(each) or off(found, without + value * change, each) > 1:
            return None
        top = np.max(each)
        slack = float(top * np.sqrt(((each / top * change / largest) ** 2).sum()) / squares / largest)  # entries round
    return Factor(value, slack + 2.0**-50 * abs(value))  # that of the sums above


def name(world: World, given: Sequence[Answers]) -> tuple[frozenset[str], list[Named]]:
    """Return which answers are wrong, and the mistakes that explain them, those that explain most first."""
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
    """Given answers beside those of a world's rows, each of which is computed once."""

    def __init__(self, world: World, given: Sequence[Answers]) -> None:
        self.world, self.given, self.every = world, given, range(len(world.cases))
        self.right = [world.answers(case, {}) for case in world.cases]
        self.measured = [*world.measured(given)]
        self.own: dict[Any, Any] = {}  # of rows that were measured, which are of these answers alone
        if len(world.kept) > MOST_KEPT:
            world.kept.clear()
        self.wrong = [{key for key in found if not self.fits(i, key, (), found[key])}
                      for i, found in zip(self.every, given, strict=True)]  # fmt: skip

    def predicted(self, i: int, wrongs: tuple[Wrong, ...]) -> tuple[Answers, Parts, dict[str, Any]]:
        """Return the answers that rows give in a case, the parts by which is said what is allowed, and what is."""
        kept = self.own if any(row in self.measured for row in wrongs) else self.world.kept
        if (i, wrongs) not in kept:
            case = self.world.cases[i]
            parts = {key: part for row in wrongs for key, part in row.of(case).items()}
            larger = {key: part for row in wrongs if row.largest for key, part in row.largest(case).items()}
            answers = {**self.right[i], **self.world.answers(case, parts)} if parts else self.right[i]
            kept[i, wrongs] = answers, parts | larger, {}
        return kept[i, wrongs]  # type: ignore[no-any-return]

    def fits(self, i: int, key: str, wrongs: tuple[Wrong, ...], found: Any) -> bool:
        """Return whether an answer is what rows give, up to rounding."""
        answers, parts, allowed = self.predicted(i, wrongs)
        if not _can_be_compared(found, answers[key]):  # then nobody asks what is allowed, which takes longest
            return found is answers[key] is None
        if key not in allowed:
            allowed[key] = self.world.allowed(self.world.cases[i], key, parts)
        distances = _distances(found, answers[key], allowed[key])
        beyond, ties = int((distances > 1).sum()), max((row.ties for row in wrongs), default=0.0)
        return not beyond or (ties > 0 and beyond <= max(1, distances.size // 50) and bool((distances <= ties).all()))

    def explained(
        self, wrongs: tuple[Wrong, ...], below: tuple[Wrong, ...], rest: set[str], at: Iterable[int]
    ) -> Named | None:
        """Return what rows explain on top of those below: the answers that are as they have them in every case."""
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
        """Return the mistakes that explain answers in some cases, each what those before it do not."""
        chosen: list[Named] = []
        rest = set(wrong)
        while rest:
            at = self._telling_first(rest, at)
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

    def _telling_first(self, rest: set[str], at: Sequence[int]) -> list[int]:
        """Put the smallest case first where all the rest is wrong: what does not explain it shows at once there."""
        return sorted(at, key=lambda i: (not rest <= self.wrong[i], sum(np.size(a) for a in self.right[i].values())))

    def on_some_cases(self, rows: Sequence[Wrong], rest: set[str]) -> list[Named]:
        """Return the mistakes that hold on all cases where answers are wrong, and are not made on the others.

        First all answers together, since a mistake may show in one of them alone on some cases; then each on its own.
        """
        found: list[Named] = []
        for keys in (rest, *({key} for key in self._in_order(rest) if len(rest) > 1)):
            left = _rest(keys, found)
            at = [i for i in self.every if left & self.wrong[i]]
            if self.world.when and 0 < len(at) < len(self.every):
                found += [replace(named, when=self._place(named, at)) for named in self.cover(rows, left, at)]
        return found

    def _place(self, named: Named, at: Sequence[int]) -> str:
        """Say on which cases a mistake is made, of those on which it would show."""
        assert self.world.when is not None
        showing = [i for i in self.every if i in at or self._shows(named, i)]
        when = self.world.when([self.world.cases[i] for i in at], [self.world.cases[i] for i in showing])
        those = "the one" if len(at) == 1 else "those"
        return f"on {len(at)} of {len(self.every)} problems, {those} {when or 'where it shows'}: "

    def _shows(self, named: Named, i: int) -> bool:
        """Return whether a mistake would change an answer in a case."""
        answers = self.predicted(i, named.wrongs)[0]
        return not all(self.fits(i, key, (), answers[key]) for key in named.explains & self.given[i].keys())

    def _where(self, named: Named, at: Sequence[int]) -> str:
        """Say in which answers a mistake shows, where it could show in others too."""
        if not self.world.words:
            return ""
        if named.explains == named.affects:
            offered = {key for i in at for key in self.given[i]}
            return ", in all that is computed" if named.affects == offered and len(offered) > 1 else ""
        return f", in {enumerated([self.world.words[key] for key in self._in_order(named.explains)])} alone"

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """Return answers in the order of a report, or in that of the alphabet where it has none."""
        order = [*self.world.words]
        return sorted(keys, key=lambda key: (order.index(key) if key in order else len(order), key))


def _with_those_on_top(chosen: Sequence[Named]) -> Named:
    """Return the first mistake: where another one is on top of it, it shows too, and is not said to be elsewhere."""
    first, covered = chosen[0], {key for named in chosen if named.on_top for key in named.explains}
    return replace(first, where="") if covered and first.affects <= covered | first.explains else first
