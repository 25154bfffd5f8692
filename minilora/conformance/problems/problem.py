"""Problems to try a layer on: sizes and a seed. The values are Gaussian from that seed.

At zeros many wrong gradients cannot be seen, so no value is zero. The sizes of a problem should all differ: then no
transposed or swapped array fits by accident.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

Arrays = dict[str, np.ndarray]


@lru_cache(maxsize=64)  # each claim asks for the same arrays, and a generator takes longer to start than to draw
def _gaussian(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, *name.encode()]).standard_normal(shape)


@dataclass(frozen=True)
class Problem:
    """Rows, widths and rank, and what is drawn from the seed for them, in float64."""

    n: int  # rows
    in_features: int
    out_features: int
    rank: int
    alpha: float = 3.0
    bias: bool = True  # whether the base has one
    seed: int = 0  # of all values
    start: bool = False  # whether lora_B is zero, as before the first step

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return Gaussian values that depend on the seed and the name alone: no two arrays of a problem are alike."""
        return _gaussian(self.seed, name, shape).copy()

    @property
    def x(self) -> np.ndarray:
        """The input, (n, in)."""
        return self.randn("x", self.n, self.in_features)

    @property
    def dy(self) -> np.ndarray:
        """The gradient of a loss at the output, (n, out)."""
        return self.randn("dy", self.n, self.out_features)

    @property
    def target(self) -> np.ndarray:
        """Targets, (n, out)."""
        return self.randn("target", self.n, self.out_features)

    @property
    def full(self) -> dict[str, np.ndarray]:
        """A base's weight (out, in) and, where it has one, bias (out,)."""
        weight = {"weight": self.randn("weight", self.out_features, self.in_features)}
        return weight | {"bias": self.randn("bias", self.out_features)} if self.bias else weight

    @property
    def factors(self) -> dict[str, np.ndarray]:
        """An adapter's lora_A (r, in) and lora_B (out, r)."""
        lora_B = self.randn("lora_B", self.out_features, self.rank)
        return {
            "lora_A": self.randn("lora_A", self.rank, self.in_features),
            "lora_B": 0 * lora_B if self.start else lora_B,
        }

    @property
    def magnitude(self) -> np.ndarray:
        """DoRA's length of each row, (out,)."""
        return np.asarray(1 + np.abs(self.randn("magnitude", self.out_features)))

    layer: ClassVar[tuple[str, ...]] = ("weight", "bias", "lora_A", "lora_B")
    """The arrays that stand for a layer, as its functions take them."""
    exact: ClassVar[tuple[str, ...]] = ()
    """Those that keep their precision, whatever is computed in."""

    @property
    def mask(self) -> np.ndarray:
        """A mask of dropout at p = 0.2, (n, in): 0, or 1 / (1 - p)."""
        return 1.25 * (self.randn("mask", self.n, self.in_features) > -0.84)

    @property
    def options(self) -> dict[str, Any]:
        """What a layer of this kind is built with, beside its arrays: nothing."""
        return {}

    def restrict(self, names: frozenset[str]) -> Problem:
        """Return the same problem with the usual values for the options that are not among the names."""
        return self

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the arrays of a layer as those of a linear layer on rows, which they are."""
        return arrays

    def unflatten(self, answers: Arrays) -> Arrays:
        """Return what the linear layer on rows gives as this layer's."""
        return answers

    def answer(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return what formulas give for this layer's rows, as plain arrays."""
        answers = formulas.answers(rows, self.alpha, lengths)
        return self.unflatten({name: np.asarray(a) for name, a in answers.items()})

    def hand_over(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments that stand for the layer, in order."""
        return layer

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes, in which the rounding of each answer is measured, with what this kind has besides."""
        return sizes

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Say more of the place of an answer's entry than its numbers, where there is more to say."""
        return ""

    def __str__(self) -> str:
        sizes = f"N={self.n} in={self.in_features} out={self.out_features} r={self.rank} alpha={self.alpha:g}"
        return sizes + "".join(f" {name}={value}" for name, value in self.options.items())


@dataclass(frozen=True)
class SmallIntegers(Problem):
    """The same in integers from -2 to 2: with alpha / r a power of two, even float16 computes these exactly."""

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return the values rounded."""
        values: np.ndarray = np.rint(super().randn(name, *shape)).clip(-2, 2)
        return values
