"""Test problems for a layer, each defined by its sizes and by a seed from which Gaussian values are drawn.

No value is zero, since zeros hide many wrong gradients. The sizes of a problem should all differ, so that no transposed
or swapped array fits by accident.

`Problem` is a linear layer on rows. Kinds of layers that work differently have a subclass, which overrides:

    restrict            before drawing: drop the options that an implementation does not accept
    x dy full factors   draw the arrays
    flatten             after rounding: convert the arrays to those of a linear layer on rows
    answer              compute answers, right or wrong, from formulas
    unflatten           within `answer`: convert the answers on rows back to the layer's shapes
    widen               after computing the sizes of right answers: add what a kind may round in addition
    arguments_of        before each call: list a function's arguments
    from_returned       after each call: convert the returned value to one array
    locate, shape_hint  for a wrong answer: describe the position of an entry, or explain a shape
    with_two_row_axes   for the claim "more axes": choose other sizes
    to_file, from_file  for a folder of vectors: name the arrays
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

Arrays = dict[str, np.ndarray]
ROW_ARRAYS = ("x", "dy", "y", "mask", "expert_ids")
"""The arrays that have one entry for each row along their first axis."""
LEADING_ARGUMENTS = {"forward": ("x",), "backward": ("dy", "x")}
"""The arguments of each function that precede the arrays of the layer."""
SHORT_NAMES = {"N": "n", "in": "in_features", "out": "out_features", "r": "rank"}
"""The short names of a problem's sizes in ``problems.toml``, with the names of the fields."""


@lru_cache(maxsize=64)  # all claims use the same arrays, and creating a generator takes longer than drawing from it
def _gaussian(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng([seed, *name.encode()]).standard_normal(shape)


@dataclass(frozen=True)
class Problem:
    """A linear layer on rows, whose arrays are drawn from the seed in float64."""

    n: int  # the number of rows
    in_features: int
    out_features: int
    rank: int
    alpha: float = 3.0
    bias: bool = True  # whether the base has a bias
    seed: int = 0  # for all values
    start: bool = False  # whether lora_B is zero, as it is before the first step

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return Gaussian values that depend only on the seed, the name and the shape."""
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
        """The base's weight (out, in) and, if it has one, its bias (out,)."""
        weight = {"weight": self.randn("weight", self.out_features, self.in_features)}
        return weight | {"bias": self.randn("bias", self.out_features)} if self.bias else weight

    @property
    def factors(self) -> dict[str, np.ndarray]:
        """The adapter's lora_A (r, in) and lora_B (out, r)."""
        return self.pair((self.rank, self.in_features), (self.out_features, self.rank))

    def pair(self, of_A: tuple[int, ...], of_B: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Return lora_A and lora_B of these shapes; before the first step lora_B is zero."""
        A, B = self.randn("lora_A", *of_A), self.randn("lora_B", *of_B)
        return {"lora_A": A, "lora_B": 0 * B if self.start else B}

    @property
    def alphas(self) -> list[float]:
        """The alpha of each adapter."""
        return [self.alpha]

    layer: ClassVar[tuple[str, ...]] = ("weight", "bias", "lora_A", "lora_B")
    """The arrays of a layer, in the order in which its functions accept them before alpha."""
    after_alpha: ClassVar[tuple[str, ...]] = ()
    """The arrays that functions accept after alpha."""
    keywords: ClassVar[tuple[str, ...]] = ()
    """The options that are passed to a function as keywords if its signature has them."""
    exact: ClassVar[tuple[str, ...]] = ()
    """The arrays that are never rounded to the precision of the computation."""
    rounded: ClassVar[tuple[str, ...]] = ()
    """The answers that may be rounded to bfloat16."""
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "y": ("row", "output"),
        "x": ("row", "input"),
        "lora_A": ("rank", "input"),
        "lora_B": ("output", "rank"),
        "magnitude": ("output",),
        "merged": ("output", "input"),
    }
    """The names of an answer's first axes; any further axes are those of a kernel or of an image."""

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line of ``problems.toml``, which has N, in, out, r and other fields by name."""
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in line.items()}
        return cls(**{SHORT_NAMES.get(name, name): value for name, value in values.items()})

    @property
    def options(self) -> dict[str, Any]:
        """The options that a layer has in addition to its arrays; a linear layer has none."""
        return {}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> Problem:
        """Return the problem with default values for the options that are neither accepted nor declared."""
        return self

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the arrays of a layer converted to those of a linear layer on rows; here they already are."""
        return arrays

    def answer(self, formulas: Any, rows: Arrays, norms: np.ndarray | None = None) -> Arrays:
        """Return the answers of formulas for this layer's rows, as plain arrays."""
        answers = formulas.answers(rows, self.alpha, norms)
        return self.unflatten({name: np.asarray(a) for name, a in answers.items()})

    def unflatten(self, answers: Arrays) -> Arrays:
        """Return the answers of the linear layer on rows in the shapes of this layer."""
        return answers

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes, the unit of each answer's rounding error, with the rounding that this kind adds."""
        return sizes

    def arguments_of(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return a function's arguments in order; a merge has no bias and no array that has an entry for each row."""
        names = (*LEADING_ARGUMENTS.get(function, ()), *self.layer, "alpha", *self.after_alpha)
        given = {**arrays, "alpha": self.alpha}
        return {name: given.get(name) for name in names if function != "merge" or name not in ("bias", *ROW_ARRAYS)}

    def from_returned(self, name: str, value: Any, array: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Return the value that a function returned for an answer as one array; `array` converts or rejects a value."""
        return array(value, name)

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Return a description of an entry's position beyond its indices, such as its slot; it may be empty."""
        return ""

    def shape_hint(self, shape: tuple[int, ...]) -> str:
        """Return a possible explanation for a wrong shape of the output; it may be empty."""
        return ""

    def with_two_row_axes(self) -> Problem | None:
        """Return a problem of six rows, to be split into two axes; None if the kind's input cannot have two."""
        return replace(self, n=6, in_features=5, out_features=4, rank=7, alpha=3.0, seed=20)  # no two sizes are equal

    def to_file(self, name: str, as_name: str, array: np.ndarray) -> Arrays:
        """Return the arrays that store an array in a file under a name."""
        return {as_name: array}

    def from_file(self, name: str, as_name: str, arrays: Arrays) -> np.ndarray | None:
        """Return the array that a file stores under a name; None if it has none."""
        return arrays.get(as_name)

    def __str__(self) -> str:
        sizes = f"N={self.n} in={self.in_features} out={self.out_features} r={self.rank} alpha={self.alpha:g}"
        return sizes + "".join(f" {name}={value}" for name, value in self.options.items())
