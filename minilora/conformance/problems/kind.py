"""The record of a kind of layer, such as a convolution or DoRA, or of a way to combine adapters.

It has the kind's problems, its formulas, and everything in which the kind differs from a linear layer, so that no other
file has to distinguish between kinds. `kinds` lists them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from .formulas import RIGHT_FORMULAS, Formulas
from .problem import LEADING_ARGUMENTS, Problem
from .tolerance import UNIT

FACTORS = ("lora_A", "lora_B", "magnitude")
"""The trained parameters: a backward returns the gradient of each."""
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
"""Two sets of rank, inputs, outputs and kernel. From the first to the second, each fan changes by a different factor,
so a spread that matches a wrong fan by chance in the first set does not match it in the second."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of layer, by default a linear layer on rows. `contract` describes its functions."""

    name: str
    problem: type[Problem] = Problem
    formulas: Formulas = RIGHT_FORMULAS
    lines: str = ""  # the table of problems.toml with its problems; if empty, the one named after the kind
    functions: tuple[str, ...] = LAYER_FUNCTIONS  # the functions that an implementation may offer
    needed: tuple[str, ...] = ("forward",)  # the functions of which it must offer at least one
    answers: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=lambda: LAYER_ANSWERS)
    """For each claim about numbers, the function that returns them and the names of its answers."""
    claims: tuple[str, ...] = LAYER_CLAIMS  # in report order
    dtypes: tuple[str, ...] = tuple(UNIT)  # the precisions that it is checked in; any other is replaced by the first
    declares: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # further declarations with their values
    transposed: Mapping[str, int] = field(default_factory=lambda: {"weight": 2, "merged": 2, "lora_A": 2, "lora_B": 2})
    """The arrays that are transposed if the implementation's orientation is "in, out", with their number of axes."""
    starts: tuple[tuple[int, int, int, tuple[int, ...]], ...] = START_SIZES  # rank, in, out and kernel
    init_returns: tuple[str, ...] = ("lora_A", "lora_B")  # if this includes a magnitude, ``init`` receives the weight
    spread_follows_fan: bool = True  # whether the spread of A's initial values depends on its fan
    merge_keeps_output: bool = True  # whether merging leaves the output unchanged
    in_files: bool = True  # whether the vectors include it
    if_false: Mapping[str, Kind] = field(default_factory=dict)  # the kind that replaces it if a declaration is False
    offered_as: str = ""  # the name by which implementations offer it and ids refer to it, if not its own

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """The kind's test problems; ids contain a problem's index in this tuple."""
        lines = _lines()[self.lines or self.name]
        own = [{key: v for key, v in line.items() if key != "only"} for line in lines
               if self.name in line.get("only", [self.name])]  # fmt: skip
        return tuple(self.problem.from_line(line) for line in own)

    @property
    def claims_per_problem(self) -> tuple[str, ...]:
        """The claims that are judged on each problem; the others are judged once."""
        return tuple(claim for claim in self.claims if claim in self.answers or claim == "scaling")

    @property
    def declared(self) -> str:
        """The name by which implementations offer the kind and ids refer to it."""
        return self.offered_as or self.name

    @property
    def missing_functions(self) -> str:
        """The end of the message for an implementation that offers none of the needed functions."""
        if len(self.needed) > 1:
            return f"none of the functions {', '.join(self.needed)}"
        arguments = (*LEADING_ARGUMENTS["forward"], *self.problem.layer, "alpha", *self.problem.after_alpha)
        return f"no function forward({', '.join(arguments)})"

    def of(self, implementation: Any) -> Kind:
        """Return the kind that an implementation's declarations select."""
        others = (kind for name, kind in self.if_false.items() if not getattr(implementation, name, True))
        return next(others, self)


@cache
def _lines() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(Path(__file__).with_name("problems.toml").read_text(encoding="utf-8"))
