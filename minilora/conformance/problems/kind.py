"""What functions of an implementation may be about: a layer of some kind, or adapters that are put together.

A kind is one record. It has the kind's problems and right formulas, and all in which it differs from a linear layer: no
other file asks which kind it has before it. `kinds` lists them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .formulas import RIGHT, Formulas
from .problem import BEFORE_THE_LAYER, Problem
from .tolerance import UNIT

FACTORS = ("lora_A", "lora_B", "magnitude")
"""What is trained: of these a backward returns the gradients."""
LAYER_FUNCTIONS = ("forward", "backward", "merge", "init")
LAYER_ANSWERS = {
    "forward": ("forward", ("y",)),
    "slope": ("backward", ("x", *FACTORS)),
    "merge": ("merge", ("merged",)),
}
LAYER_CLAIMS = (
    *("forward", "scaling", "slope", "merge", "merged and back", "start", "adam", "frozen base", "nothing is changed"),
    *("memory order", "more axes", "no rows", "alpha of 0", "row of zeros"),
)
START_SIZES = ((9, 400, 100, ()), (30, 150, 60, ()))
"""Two ranks, inputs, outputs and kernels. From one to the other the spread of each fan moves by another factor, so a
spread that is a fan's at the first by chance is not at the second."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind, by default of layers that are linear layers on rows. Its functions are those of `contract`."""

    name: str
    problem: type[Problem] = Problem
    formulas: Formulas = RIGHT
    lines: str = ""  # the table of problems.toml with its problems; its own name where that is empty
    functions: tuple[str, ...] = LAYER_FUNCTIONS  # that an implementation may offer
    needed: tuple[str, ...] = ("forward",)  # of which it must offer one
    answers: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=lambda: LAYER_ANSWERS)
    """For each claim about numbers the function that gives them, and the names of its answers."""
    claims: tuple[str, ...] = LAYER_CLAIMS  # in the order of a report
    dtypes: tuple[str, ...] = tuple(UNIT)  # the precisions that it is checked in; the first one in the place of another
    declares: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # what it may declare besides, and how
    turned: Mapping[str, int] = field(default_factory=lambda: {"weight": 2, "merged": 2, "lora_A": 2, "lora_B": 2})
    """The arrays that lie the other way round where the implementation's orientation is "in, out", and their axes."""
    starts: tuple[tuple[int, int, int, tuple[int, ...]], ...] = START_SIZES  # rank, in, out and kernel
    starts_with: tuple[str, ...] = ("lora_A", "lora_B")  # what ``init`` returns; with a magnitude it is handed a weight
    is_spread: bool = True  # whether A starts as widely as its inputs ask
    merges_back: bool = True  # whether a layer has the same output before and after it is merged
    in_files: bool = True  # whether vectors have it
    otherwise: Mapping[str, Kind] = field(default_factory=dict)  # the kind that it is where a declaration is False
    offered_as: str = ""  # under which name an implementation offers it, and ids have it, where that is not its own

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """The problems that it is tried on; an id has a problem's place among them."""
        lines = _lines()[self.lines or self.name]
        own = [{key: v for key, v in line.items() if key != "only"} for line in lines
               if self.name in line.get("only", [self.name])]  # fmt: skip
        return tuple(self.problem.of_line(line) for line in own)

    @property
    def of_problems(self) -> tuple[str, ...]:
        """The claims that are judged on each problem; the others are about no single one."""
        return tuple(claim for claim in self.claims if claim in self.answers or claim == "scaling")

    @property
    def declared(self) -> str:
        """The name under which an implementation offers it, and ids have it."""
        return self.offered_as or self.name

    @property
    def lacking(self) -> str:
        """What an implementation has that has none of the functions that it needs."""
        if len(self.needed) > 1:
            return f"none of the functions {', '.join(self.needed)}"
        arguments = (*BEFORE_THE_LAYER["forward"], *self.problem.layer, "alpha", *self.problem.last)
        return f"no function forward({', '.join(arguments)})"

    def of(self, implementation: Any) -> Kind:
        """Return the kind that an implementation means by what it declares."""
        others = (kind for name, kind in self.otherwise.items() if not getattr(implementation, name, True))
        return next(others, self)


@cache
def _lines() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(Path(__file__).with_name("problems.toml").read_text(encoding="utf-8"))
