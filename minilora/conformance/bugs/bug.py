"""A known bug: the right formulas with a part replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..problems.kinds import SETS
from ..problems.problem import Problem
from ..problems.reference import QUANTITIES
from .parts import Parts


@dataclass(frozen=True, eq=False)  # a row is itself alone: what it predicts can be kept
class Bug:
    """A known bug. ``str(bug)`` is its name, and where it was made."""

    flag: str  # its identifier, which stays: a sentence may be rephrased, a flag may not
    name: str  # the diagnosis, as the report prints it
    parts: Parts | Callable[[Any], Parts]  # the parts that it replaces; or a function of the problem that returns them
    source: str = ""  # where it was made in public, as "owner/repository #issue" or "package version"
    breaks: str = "forward"  # the claim that it breaks, by the name that the report prints
    kinds: tuple[str, ...] = tuple(SETS)  # of problems, or "adam"; the tests plant it in the first
    shows: tuple[str, ...] = tuple(QUANTITIES)  # the answers in which it may show
    rounds: bool = False  # whether it rounds to bfloat16 on the way, where a number near a tie may go either way

    def by(self, problem: Problem | None = None) -> Parts:
        """Return the parts that it replaces for a problem of one of its kinds; none where it makes no difference."""
        return self.parts(problem) if callable(self.parts) else self.parts

    def largest(self, problem: Problem) -> Parts:
        """Return its parts at their largest: what the rounding of its answers is measured in."""
        return self.by(problem)

    @property
    def count(self) -> int:
        """How many parts it replaces, on whichever problem of its first kind it replaces most."""
        if not callable(self.parts):
            return len(self.parts)
        return max(len(self.parts(problem)) for problem in SETS[self.kinds[0]].problems)

    def __str__(self) -> str:
        return f"{self.name} (made in {self.source})" if self.source else self.name


def links(source: str) -> list[str]:
    """Return where a bug was made, as addresses."""
    addresses = []
    for place in filter(None, source.split(", ")):
        name, number = place.rsplit(" ", 1)
        issue = f"https://github.com/{name}/issues/{number.removeprefix('#')}"
        addresses.append(issue if number.startswith("#") else f"https://pypi.org/project/{name}/{number}/")
    return addresses
