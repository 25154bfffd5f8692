"""Code that is wrong on purpose and stands in no layer of the package: Adam, starts, and the bugs that the suite knows.

`tests/test_mutants.py` hands each mutant to the claims that the library's own code passes. The bugs that the suite
knows stand in `minilora.conformance.problems.bugs` alone: here those of a linear layer, of a start and of Adam are
planted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from minilora import LoRA
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.formulas import StartFormulas

from .cases import (
    LAYER_CLAIMS,
    lora_linear_case,
)
from .claims import (
    ADAM_CLAIMS,
    a_frozen_layer_only_passes_dx,
    merging_changes_no_output,
)
from .formulas import AdamByFormulas, adam_by_formulas, by_formulas
from .problems import Problem


@dataclass(frozen=True)
class Mutant:
    """What is wrong, and the properties that must reject it."""

    name: str
    claims: tuple[Callable[[Problem], None], ...]


MUTANTS: list[Mutant] = []

# That a frozen layer has no gradients is left out: most mutants below ignore it, and would be caught by that alone.
MUTANT_CLAIMS = tuple(claim for claim in LAYER_CLAIMS if claim is not a_frozen_layer_only_passes_dx)


def mutant(name: str, *claims: Callable[[Any, Problem], None], of: Callable[[Any], Any] = lambda subject: subject):
    """Register the class or function below as a mutant, to be judged by these claims."""

    def register(subject: Any) -> Any:
        MUTANTS.append(Mutant(name, tuple(partial(claim, of(subject)) for claim in claims)))
        return subject

    return register


# --- Adam -----------------------------------------------------------------------------------------


@mutant("Adam: t counted once for each array", *ADAM_CLAIMS)
class CountsArrays(AdamByFormulas):
    def move(self, name, g):
        self.t += 1
        super().move(name, g)


# --- starts ---------------------------------------------------------------------------------------


def a_start_has_the_fan_of_the_input(start: Callable[..., np.ndarray], problem: Problem) -> None:
    """A (r, in) is uniform in +-1/sqrt(in): its spread says so at widths that are large and differ."""
    n_in, rank = 40 * problem.in_features, 10 * problem.rank
    A = start(np.random.default_rng(problem.seed), n_in, 13 * problem.out_features, rank)
    assert A.shape == (rank, n_in)
    assert abs(A.std() * (3 * n_in) ** 0.5 - 1) < 0.15


def start_of_library(rng, n_in, n_out, rank):
    return LoRA.init(n_in, n_out, rank=rank, alpha=1, rng=rng, dtype=float).lora_A


STARTS_WRONG = {
    "he_uniform, sqrt 6 too large": lambda rng, n_in, n_out, r: rng.uniform(-1, 1, (r, n_in)) * (6 / n_in) ** 0.5,
    "A zero, as B is": lambda rng, n_in, n_out, r: np.zeros((r, n_in)),
}
for name, start in STARTS_WRONG.items():
    mutant(f"start: {name}", a_start_has_the_fan_of_the_input)(start)


# --- the suite's known bugs -----------------------------------------------------------------------

NOT_SHOWN = {
    *("ranks-above-32-are-left-out", "rows-from-128-on-lack-the-update"),  # no problem that is drawn is as large
    "outputs-from-128-on-lack-the-update",
    *("an-alpha-of-0-is-taken-for-1", "an-alpha-of-0-is-taken-for-the-rank"),  # nor has an alpha of 0
}
"""Rows that the drawn problems cannot show."""


def with_parts(parts: Any = None) -> Any:
    """The case of a layer that computes by the suite's formulas, with some parts replaced."""
    return lora_linear_case(by_formulas(parts or {}))


def also_squared(claims: tuple[Callable[[Any, Problem], None], ...]) -> tuple[Callable[[Any, Problem], None], ...]:
    """The claims, and the first two on equal widths, which no drawn problem has: there a transposed matrix fits."""

    def squared(claim):
        return lambda subject, problem: claim(subject, replace(problem, in_features=problem.out_features))

    return (*claims, *map(squared, claims[:2]))


def uniform_start(**parts: Any) -> Callable[..., np.ndarray]:
    """A uniform start by the suite's formulas, with some parts replaced; for an input of four entries a channel."""

    def start(rng, n_in, n_out, rank):
        return rng.uniform(-1, 1, (rank, n_in)) * 3**0.5 * StartFormulas(**parts).spread(rank, n_in // 4, n_out, 4)

    return start


for row in BUGS:
    if row.breaks == "adam":
        mutant(row.flag, *ADAM_CLAIMS)(adam_by_formulas(**row.parts))
    elif row.breaks == "start":
        mutant(row.flag, a_start_has_the_fan_of_the_input)(uniform_start(**row.parts))
    elif row.kinds[0] == "linear" and row.flag not in NOT_SHOWN:
        claims = (merging_changes_no_output,) if row.breaks == "merge" else MUTANT_CLAIMS
        mutant(row.flag, *also_squared(claims))(with_parts(row.parts))


HIDDEN_AT_THE_START = {
    row.flag: with_parts(row.parts)
    for row in BUGS
    if row.flag.startswith("lora-a-gradient-has-the-") or row.flag == "lora-a-gradient-lacks-the-scaling-alpha-r"
}
"""At B = 0, dh is zero whatever it is multiplied with, and so are dA and dx: right by accident."""
