"""Which known mistakes explain wrong answers: one namer, for everything that is judged by its numbers.

A mistake is the right formulas with some parts replaced, a row of a table. It explains an answer where the numbers are
as it has them on every case, and are not the right ones. `name` covers what is wrong with as few rows as it can.

Of rows that explain something that one is named which explains the most answers; of equals that which would change the
fewest others, then one alone before two at once, then that which replaces the fewest parts, then that whose flag comes
first in the alphabet. So the place of a row in its table makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

Answers = Mapping[str, np.ndarray]
Parts = Mapping[str, Any]


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

    def of(self, case: Any) -> Parts:
        """Return the parts that it replaces in a case; none where it makes no difference."""
        return self.parts(case) if callable(self.parts) else self.parts

    def __str__(self) -> str:
        return f"{self.says} (made in {self.source})" if self.source else self.says


@dataclass(frozen=True)
class World:
    """What is asked, what is right, how far off is right, and what people get wrong."""

    cases: Sequence[Any]
    answers: Callable[[Any, Parts], Answers]  # a case and parts: every answer, by its name; no parts is right
    allowed: Callable[[Any, str, Parts], Any]  # a case, an answer's name and parts: how far each entry may be off
    table: Sequence[Wrong]


@dataclass(frozen=True)
class Named:
    """One mistake, or several at once, and the answers that they explain."""

    wrongs: tuple[Wrong, ...]
    explains: frozenset[str]
    affects: frozenset[str]  # all answers that they would change

    @property
    def order(self) -> tuple[Any, ...]:
        """What the mistake that is named has least of."""
        others, replaced = len(self.affects - self.explains), sum(wrong.count for wrong in self.wrongs)
        return -len(self.explains), others, len(self.wrongs), replaced, [wrong.flag for wrong in self.wrongs]

    def __str__(self) -> str:
        sources = ", ".join(wrong.source for wrong in self.wrongs if wrong.source)
        says = " and, at once, ".join(wrong.says for wrong in self.wrongs)
        return f"{says} (made in {sources})" if sources else says


def off(found: np.ndarray, expected: np.ndarray, allowed: Any) -> float:
    """Return how far an answer is off, in units of what is allowed."""
    if np.shape(found) != np.shape(expected) or not np.isfinite(found).all():
        return float("inf")
    return float((np.abs(found - expected) / allowed).max(initial=0.0))


def name(world: World, given: Sequence[Answers]) -> tuple[frozenset[str], list[Named]]:
    """Return which answers are wrong, and the mistakes that explain them, those that explain most first."""
    pairs = list(zip(world.cases, given, strict=True))
    right = [world.answers(case, {}) for case in world.cases]
    wrong = {
        key
        for (case, found), expected in zip(pairs, right, strict=True)
        for key in found
        if off(found[key], expected[key], world.allowed(case, key, {})) > 1
    }

    def explained(wrongs: tuple[Wrong, ...], rest: set[str]) -> Named | None:
        left = {key for key in rest if all(not row.shows or key in row.shows for row in wrongs)}
        affects: set[str] = set()
        for (case, found), expected in zip(pairs, right, strict=True):
            parts = {key: part for row in wrongs for key, part in row.of(case).items()}
            bad = {**expected, **world.answers(case, parts)} if parts else expected
            left -= {
                key for key in left & found.keys() if off(found[key], bad[key], world.allowed(case, key, parts)) > 1
            }
            if not left:
                return None
            affects |= {key for key in found if off(bad[key], expected[key], world.allowed(case, key, {})) > 1}
        return Named(wrongs, frozenset(left & affects), frozenset(affects)) if left & affects else None

    rest, chosen = set(wrong), []
    while rest:
        fits = [named for row in world.table if (named := explained((row,), rest))]
        if not fits:
            pairs_of_rows = (pair for pair in combinations(world.table, 2) if pair[0].slot != pair[1].slot)
            fits = [named for pair in pairs_of_rows if (named := explained(pair, rest))]
        if not fits:
            break
        chosen.append(min(fits, key=lambda named: named.order))
        rest -= chosen[-1].explains
    return frozenset(wrong), chosen
