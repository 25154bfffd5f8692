"""Problems to try a layer on: sizes and a seed. The values are Gaussian from that seed.

At zeros many wrong gradients cannot be seen, so no value is zero. The sizes of a problem should all differ: then no
transposed or swapped array fits by accident.

`Problem` is a linear layer on rows. A kind of layers that is no such layer has a subclass, which says what differs:

    restrict            before anything is drawn: leave out what an implementation does not take
    x dy full factors   to draw the arrays
    flatten             once they are rounded: take them for those of a linear layer on rows
    answer              compute answers, right or wrong, from formulas
    unflatten           in `answer`: turn those on rows into the layer's
    widen               once the sizes of right answers are known: add what a kind may round besides
    hand_over           before each call: list a function's arguments
    take_back           after each call: make one array of what was returned
    locate, would_be    of a wrong answer: say more of an entry's place, or of a shape
    two_axes            for the claim "more axes": choose other sizes
    to_file, from_file  in a folder of vectors: name the arrays
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

Arrays = dict[str, np.ndarray]
OF_ROWS = ("x", "dy", "y", "mask", "expert_ids")
"""The arrays whose first axis is of rows."""
BEFORE_THE_LAYER = {"forward": ("x",), "backward": ("dy", "x")}
"""What a function takes before the arrays that stand for the layer."""
SHORT = {"N": "n", "in": "in_features", "out": "out_features", "r": "rank"}
"""The short names of a problem's sizes."""


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
    def alphas(self) -> list[float]:
        """The alpha of each adapter."""
        return [self.alpha]

    layer: ClassVar[tuple[str, ...]] = ("weight", "bias", "lora_A", "lora_B")
    """The arrays that stand for a layer, as its functions take them before alpha."""
    last: ClassVar[tuple[str, ...]] = ()
    """Those that they take behind it."""
    keywords: ClassVar[tuple[str, ...]] = ()
    """The options that a function is handed where it names them."""
    exact: ClassVar[tuple[str, ...]] = ()
    """The arrays that keep their precision, whatever is computed in."""
    in_half: ClassVar[tuple[str, ...]] = ()
    """The answers that may be rounded to bfloat16."""
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "y": ("row", "output"),
        "x": ("row", "input"),
        "lora_A": ("rank", "input"),
        "lora_B": ("output", "rank"),
        "magnitude": ("output",),
        "merged": ("output", "input"),
    }
    """What stands along the first axes of an answer. Those that follow are a kernel's, or an image's."""

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line of ``problems.toml``: N, in, out and r, and other fields by their names."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in line.items()}
        return cls(**{SHORT.get(name, name): value for name, value in values.items()})

    @property
    def options(self) -> dict[str, Any]:
        """What a layer of this kind is built with, beside its arrays: nothing."""
        return {}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> Problem:
        """Return the same problem with the usual values for the options that are neither taken nor declared."""
        return self

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the arrays of a layer as those of a linear layer on rows, which they are."""
        return arrays

    def answer(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return what formulas give for this layer's rows, as plain arrays."""
        answers = formulas.answers(rows, self.alpha, lengths)
        return self.unflatten({name: np.asarray(a) for name, a in answers.items()})

    def unflatten(self, answers: Arrays) -> Arrays:
        """Return what the linear layer on rows gives as this layer's."""
        return answers

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes, in which the rounding of each answer is measured, with what this kind has besides."""
        return sizes

    def hand_over(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return a function's arguments in order; a merge has no bias, and none that has an entry for each row."""
        names = (*BEFORE_THE_LAYER.get(function, ()), *self.layer, "alpha", *self.last)
        given = {**arrays, "alpha": self.alpha}
        return {name: given.get(name) for name in names if function != "merge" or name not in ("bias", *OF_ROWS)}

    def take_back(self, name: str, value: Any, array: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Return what a function returned for an answer as one array; `array` makes one of a value, or refuses it."""
        return array(value, name)

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Say more of the place of an answer's entry than its numbers, where there is more to say."""
        return ""

    def would_be(self, shape: tuple[int, ...]) -> str:
        """Say when an output would be of another shape, where there is something to say."""
        return ""

    def two_axes(self) -> Problem | None:
        """Return a problem of six rows, whose rows may lie along two axes; None where they may not."""
        return replace(self, n=6, in_features=5, out_features=4, rank=7, alpha=3.0, seed=20)  # no two are alike

    def to_file(self, name: str, as_name: str, array: np.ndarray) -> Arrays:
        """Return an array as it stands in a file under a name."""
        return {as_name: array}

    def from_file(self, name: str, as_name: str, arrays: Arrays) -> np.ndarray | None:
        """Return the array that stands in a file under a name; None where it is not there."""
        return arrays.get(as_name)

    def __str__(self) -> str:
        sizes = f"N={self.n} in={self.in_features} out={self.out_features} r={self.rank} alpha={self.alpha:g}"
        return sizes + "".join(f" {name}={value}" for name, value in self.options.items())
