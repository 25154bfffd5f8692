"""The kinds that are linear layers on rows: linear, rslora, dora and dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .formulas import SCALINGS, DoRAFormulas, DropoutFormulas, Formulas
from .kind import FACTORS, LAYER_FUNCTIONS, Kind
from .problem import Arrays, Problem


@dataclass(frozen=True)
class DoRAProblem(Problem):
    """A linear layer with a `magnitude` (out,), the norm of each row of its adapted weight."""

    after_alpha: ClassVar[tuple[str, ...]] = ("magnitude",)

    @property
    def factors(self) -> Arrays:
        """lora_A, lora_B and the magnitude."""
        return {**super().factors, "magnitude": 1 + np.abs(self.randn("magnitude", self.out_features))}


@dataclass(frozen=True)
class DropoutProblem(Problem):
    """A linear layer with a dropout mask (n, in) for p = 0.2, whose entries are 0 or 1 / (1 - p)."""

    after_alpha: ClassVar[tuple[str, ...]] = ("mask",)

    @property
    def full(self) -> Arrays:
        """The weight, the bias if there is one, and the mask."""
        return {**super().full, "mask": 1.25 * (self.randn("mask", self.n, self.in_features) > -0.84)}


LINEAR_KIND = Kind("linear", functions=(*LAYER_FUNCTIONS, "step"))
RSLORA_KIND = Kind("rslora", formulas=Formulas(scaling=SCALINGS["alpha / sqrt(r)"]), lines="linear")
DROPOUT_KIND = Kind(
    "dropout",
    DropoutProblem,
    Formulas(dropout=DropoutFormulas()),
    lines="linear",
    merge_keeps_output=False,  # a merged layer has no dropout
)
DORA_FULL_KIND = Kind(
    "dora-full",
    DoRAProblem,
    Formulas(dora=DoRAFormulas(through_norm=1.0)),
    lines="linear",
    init_returns=FACTORS,
    offered_as="dora",
)
DORA_KIND = Kind(
    "dora",
    DoRAProblem,
    Formulas(dora=DoRAFormulas()),
    lines="linear",
    init_returns=FACTORS,
    declares={"detached_norm": (True, False)},
    if_false={"detached_norm": DORA_FULL_KIND},
)
"""DoRA with the norm held constant, as in PEFT; in "dora-full" the gradient passes through it."""
