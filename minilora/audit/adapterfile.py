"""What an adapter is, whichever program wrote it: its modules, each with two matrices and a scaling.

Every format comes down to this. For each module there are

    A (r, in)    B (out, r)    s            the weight W (out, in) becomes W + s B A

and perhaps a magnitude and a bias. A format says under which names, which way round, and what s is. A reader of this
folder takes what it can, and says what is wrong with the rest: unlike `minilora.load_adapter`, which refuses the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..variants.stackedlora import stacked_B
from .findings import Finding
from .tensors import Tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """What a file has for one module."""

    path: str  # of the module, or of a mixture's array, without the prefix of the format
    parts: Mapping[str, str]  # the tensors' names: of "A", "B", "magnitude", "bias"
    kind: str = "linear"  # or "embedding", "conv", "experts"
    turned: str = ""  # the factors that lie transposed: "AB" for (in, r) and (r, out), "A" for (in, r) alone
    grouped: bool = False  # whether B's slow index is the expert
    experts: int = 1  # E, of which A (E r, in) and B (out, r E) have one each
    rank: int | None = None  # as it is configured; None where nothing says it
    alpha: float | None = None
    scaling: float | None = None  # s; None where nothing says it

    def shapes(self, tensors: Tensors) -> tuple[Shape | None, Shape | None]:
        """Return the shapes of A as (r, in) and of B as (out, r), of experts (E r, in) and (out, r E)."""
        A, B = (tensors.shapes[name] if (name := self.parts.get(part)) else None for part in "AB")
        return self._lying(A, "A"), self._lying(B, "B")

    def _lying(self, shape: Shape | None, part: str) -> Shape | None:
        """Return a factor's shape as that of a matrix, where it has one; a shape that is none stays as it is."""
        if shape is None or len(shape) < 2:
            return shape
        if self.kind == "experts" and len(shape) == 3:  # (E, r, in) and (E, out, r)
            E, rows, columns = shape
            return (E * rows, columns) if part == "A" else (rows, columns * E)
        if part in self.turned:
            return shape[::-1]
        return (shape[0], math.prod(shape[1:])) if self.kind == "conv" else shape

    def rank_in_file(self, tensors: Tensors) -> int | None:
        """Return r as the shapes have it, None where they do not agree or a factor is missing."""
        A, B = self.shapes(tensors)
        if A is None or B is None or len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
            return None
        whole = [tensors.shapes[self.parts[part]] for part in "AB"]
        stacked = {len(shape) for shape in whole} != {2} and self.kind == "experts"
        if stacked and not all(len(shape) == 3 and shape[0] == self.experts for shape in whole):
            return None
        if A[0] != B[1] or A[0] % self.experts:
            return None
        return A[0] // self.experts

    def widths(self, tensors: Tensors) -> tuple[int, int] | None:
        """Return (out, in) of the matrix that the factors make, None where they make none."""
        A, B = self.shapes(tensors)
        if A is None or B is None or len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
            return None
        fits = A[0] == B[1] or (self.kind == "conv" and A[0] % B[1] == 0)  # of a convolution with groups
        return (B[0], A[1]) if fits else None

    def pairs(self, A: np.ndarray, B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return A (r, in) and B (out, r) of the factors as the file has them; of a mixture a pair for each expert."""
        if self.kind != "experts":
            A, B = (factor.T if part in self.turned else factor for part, factor in (("A", A), ("B", B)))
            return [(A.reshape(len(A), -1), B.reshape(len(B), -1))]
        if A.ndim == 3:
            return list(zip(A, B, strict=True))
        of_experts = B.reshape(len(B), self.experts, -1).swapaxes(0, 1) if self.grouped else stacked_B(B, self.experts)
        return list(zip(A.reshape(self.experts, -1, A.shape[1]), of_experts, strict=True))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its files have it."""

    path: Path  # as it was named
    format: str  # in words: "PEFT folder"
    tensors: Tensors
    modules: dict[str, Module]  # by path, in the order of layers
    config: Mapping[str, Any] | None = None  # adapter_config.json, where there is one
    config_path: Path | None = None
    saved: dict[str, str] = field(default_factory=dict)  # weights and biases that were trained in full: path, tensor
    base_copies: dict[str, str] = field(default_factory=dict)  # the base's own weights: module's path, tensor
    findings: tuple[Finding, ...] = ()  # what is wrong with names and configuration

    @property
    def numbers(self) -> int:
        """How many numbers the file's tensors hold."""
        return sum(math.prod(shape) for shape in self.tensors.shapes.values())

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return sum(self.tensors.sizes.values())
