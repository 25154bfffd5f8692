"""The kind "mixed": factors in float32 beside a base in bfloat16, as adapters are mostly trained.

    y = bf(bf(x W^T + b) + s x A^T B^T),   dx = bf(bf(dy W) + bf(s dy B A)),   bf rounds to bfloat16

are what an implementation may give; it may leave out each rounding. dA, dB and the update are those of float32.

How does one see a rounding of the update under that of the output? Two problems have an output of at most 1/2 that is
the sum of a base of about -100, an integer, and an update of about 100. The base's sums of integers are exact in
bfloat16, and the output's rounding is small, so there the update must be right to float32.

NumPy has no bfloat16. The arrays are float32, and hold numbers of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...layers.nf4 import NF4, SCALES_IN_A_BLOCK, scale_book
from .kind import LAYER_CLAIMS, Kind
from .problem import Arrays, Problem
from .tolerance import TOLERANCE, UNIT, round_to

BLOCK = 64
"""Weights in NF4 that share a scale."""


def in_half(values: np.ndarray) -> np.ndarray:
    """Return numbers rounded to bfloat16, in float64."""
    return round_to(values, "bfloat16").astype(np.float64)


@dataclass(frozen=True)
class MixedProblem(Problem):
    """A linear layer in bfloat16 whose factors are float32: x, dy, weight and bias hold numbers of bfloat16.

    What may be rounded to bfloat16 is the base's output, the output, dx and the merged weight. The update is computed
    and added in float32, and so are the factors' gradients.
    """

    near: bool = False  # whether the update takes the base's output away, up to 1/2
    in_half: ClassVar[tuple[str, ...]] = ("y", "x", "merged")

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return the values, those of the base and of the activations as numbers of bfloat16."""
        values = super().randn(name, *shape)
        return values if name in ("lora_A", "lora_B") else in_half(values)

    @property
    def x(self) -> np.ndarray:
        """The input, (n, in). Where `near`, one-hot rows beside small integers."""
        if not self.near:
            return super().x
        return np.concatenate([np.eye(self.n), self._integers("x", self.n)], axis=1)

    @property
    def full(self) -> Arrays:
        """The weight and the bias. Where `near`, integers: the one-hot inputs take away what the update adds."""
        if not self.near:
            return super().full
        weight, bias = self._integers("weight", self.out_features), np.rint(self.randn("bias", self.out_features))
        A, B = (a.astype(np.float32).astype(np.float64) for a in self.factors.values())
        update = self.alpha / self.rank * (self.x @ A.T @ B.T)
        taken = -np.rint(update + self.x[:, self.n :] @ weight.T + bias)
        return {"weight": np.concatenate([taken.T, weight], axis=1), "bias": bias}

    @property
    def factors(self) -> Arrays:
        """lora_A and lora_B. Where `near`, B is larger, and with it the update."""
        return {**super().factors, "lora_B": (1 + 9 * self.near) * super().factors["lora_B"]}

    def _integers(self, name: str, count: int) -> np.ndarray:  # -> (count, in - n)
        return np.asarray(np.rint(self.randn(name, count, self.in_features - self.n)).clip(-2, 2))

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes with what bfloat16 rounds, as it is in units of float32.

        The base's output is rounded up to twice, before and after the bias, each time by no more than the unit of
        bfloat16 times the sum S of its absolute terms; by nothing where these are integers and S is at most 256, since
        each partial sum is then a number of bfloat16. The output is rounded once, dx and its two parts once each, and
        so are the change in the merged weight and the sum.
        """
        base = {name: np.abs(rows[name]) for name in ("weight", "bias") if name in rows}
        of_base = np.abs(rows["x"]) @ base["weight"].T + base.get("bias", 0.0)
        whole = all((rows[name] == np.rint(rows[name])).all() for name in ("x", *base))
        without_B = rows | {"lora_B": 0 * rows["lora_B"]}
        right, base_alone = (formulas.answers(arrays, self.alpha) for arrays in (rows, without_B))
        rounded = {
            "y": 2 * of_base * (1 - (whole & (of_base <= 256))) + np.abs(right["y"]),
            "x": 2 * np.abs(rows["dy"]) @ base["weight"] + np.abs(right["x"] - base_alone["x"]) + np.abs(right["x"]),
            "merged": np.abs(right["merged"] - base_alone["merged"]) + np.abs(right["merged"]),
        }
        unit = 1.01 * UNIT["bfloat16"] / (TOLERANCE * UNIT["float32"])  # with a hundredth for what is rounded twice
        return {name: size + unit * np.asarray(rounded.get(name, 0.0)) for name, size in sizes.items()}

    def __str__(self) -> str:
        return super().__str__() + (" cancelling" if self.near else "")


@dataclass(frozen=True)
class NF4Problem(Problem):
    """A linear layer whose weight is in NF4: codes, two in a byte, and a scale for each block of 64.

    Codes and scales are drawn, and no weight is quantised for them: this is another way to the same numbers.
    """

    double: bool = False  # whether the scales are quantised too
    layer: ClassVar[tuple[str, ...]] = ("packed", "absmax", "bias", "lora_A", "lora_B")
    keywords: ClassVar[tuple[str, ...]] = ("nested_absmax", "mean")
    exact: ClassVar[tuple[str, ...]] = ("absmax", *keywords)

    @property
    def blocks(self) -> int:
        """How many blocks the weight has; the last one may be shorter."""
        return -(-self.in_features * self.out_features // BLOCK)

    @property
    def full(self) -> Arrays:
        """Codes (bytes,), and scales: float32 (blocks,) or their codes, uint8, with their own scales and their mean."""
        full = super().full
        rng, count = np.random.default_rng([self.seed, 4]), full.pop("weight").size
        packed = rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8)
        if count % 2:
            packed[-1] |= 15
            packed[-1] -= 8  # the code of 0
        scales = (1 + np.abs(self.randn("absmax", self.blocks))).astype(np.float32)
        if not self.double:
            return {"packed": packed, "absmax": scales, **full}
        nested = scales[: -(-self.blocks // SCALES_IN_A_BLOCK)] / 4
        codes = rng.integers(0, 256, self.blocks, dtype=np.uint8)
        mean = np.array([1.4567], np.float32)
        return {"packed": packed, "absmax": codes, "nested_absmax": nested, "mean": mean, **full}

    @property
    def options(self) -> dict[str, Any]:
        """The scales of the scales and their mean."""
        full = self.full if self.double else {}
        return {"nested_absmax": full["nested_absmax"], "mean": float(full["mean"][0])} if full else {}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> NF4Problem:
        """Return the same problem with scales of 32 bits, unless both options are taken."""
        return replace(self, double=self.double and takes >= {*self.keywords})

    def scales(self, arrays: Arrays) -> np.ndarray:  # -> (blocks,)
        """Return each block's scale."""
        if not self.double:
            return arrays["absmax"].astype(np.float32)
        nested, mean = (arrays[name].astype(np.float32) for name in self.keywords)
        nested = np.repeat(nested, SCALES_IN_A_BLOCK)[: self.blocks]
        return np.asarray(nested * scale_book()[arrays["absmax"]] + mean)

    def weight(self, book: np.ndarray = NF4, low_first: bool = False, **changes: Any) -> np.ndarray:  # -> (out, in)
        """Return the weight in float64, its products rounded to float32; of other arrays, by another book or order."""
        arrays = {**self.full, **changes}
        halves = [arrays["packed"] >> 4, arrays["packed"] & 15]
        codes = np.stack(halves[::-1] if low_first else halves, axis=1).ravel()
        count = self.in_features * self.out_features
        scales = np.repeat(self.scales(arrays), BLOCK)[:count]
        products = book.astype(np.float32)[codes[:count]] * scales
        return np.asarray(products.astype(np.float64).reshape(self.out_features, self.in_features))

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the arrays with the weight that the codes stand for in their place."""
        coded: dict[str, Any] = {name: arrays[name] for name in ("packed", "absmax", *self.keywords) if name in arrays}
        others = {name: a for name, a in arrays.items() if name not in coded}
        return {**others, "weight": self.weight(**coded)}

    def __str__(self) -> str:
        return Problem.__str__(replace(self, double=False)) + (" scales of 8 bits" if self.double else "")


FOUR_BITS = Kind("nf4", NF4Problem, dtypes=("float32", "float16", "bfloat16"))
"""In float32, in which the products are that make a weight; the factors may be in half precision."""
MIXED = Kind(
    "mixed",
    MixedProblem,
    claims=(*LAYER_CLAIMS, "output dtype"),
    dtypes=("float32",),  # that of the factors
    declares={"output": ("bfloat16", "float32")},
    merges_back=False,  # bfloat16 rounds in a merge
)
