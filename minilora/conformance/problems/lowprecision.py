"""The kinds in low precision: "mixed", with float32 factors and a bfloat16 base, and "nf4", with a base in four bits.

"mixed" is how most adapters are trained. With bf for rounding to bfloat16, an implementation may return

    y = bf(bf(x W^T + b) + s x A^T B^T),   dx = bf(bf(dy W) + bf(s dy B A))

and it may omit any of these roundings. dA, dB and the update are computed in float32.

The rounding of the output would hide a rounding of the update. So two problems have an output of at most 1/2, the sum
of an integer base of about -100 and an update of about 100. The base's sums of integers are exact in bfloat16, and the
rounding of the output is small, so the update must be right to float32.

NumPy has no bfloat16. The arrays are float32, with values that bfloat16 can represent.
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

NF4_BLOCK = 64
"""The number of NF4 weights that share a scale."""


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round numbers to bfloat16 and return them in float64."""
    return round_to(values, "bfloat16").astype(np.float64)


@dataclass(frozen=True)
class MixedProblem(Problem):
    """A linear layer in bfloat16 whose factors are float32: x, dy, weight and bias have bfloat16 values.

    The base's output, the output, dx and the merged weight may be rounded to bfloat16. The update is computed and added
    in float32, and the gradients of the factors are float32 too.
    """

    near: bool = False  # whether the update cancels the base's output up to 1/2
    rounded: ClassVar[tuple[str, ...]] = ("y", "x", "merged")

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return Gaussian values, rounded to bfloat16 for all arrays but the factors."""
        values = super().randn(name, *shape)
        return values if name in ("lora_A", "lora_B") else as_bfloat16(values)

    @property
    def x(self) -> np.ndarray:
        """The input, (n, in). If `near`, the first n columns are one-hot and the others are small integers."""
        if not self.near:
            return super().x
        return np.concatenate([np.eye(self.n), self._integers("x", self.n)], axis=1)

    @property
    def full(self) -> Arrays:
        """The weight and the bias. If `near`, they are integers, and the one-hot columns cancel the update."""
        if not self.near:
            return super().full
        weight, bias = self._integers("weight", self.out_features), np.rint(self.randn("bias", self.out_features))
        A, B = (a.astype(np.float32).astype(np.float64) for a in self.factors.values())
        update = self.alpha / self.rank * (self.x @ A.T @ B.T)
        cancelling = -np.rint(update + self.x[:, self.n :] @ weight.T + bias)
        return {"weight": np.concatenate([cancelling.T, weight], axis=1), "bias": bias}

    @property
    def factors(self) -> Arrays:
        """lora_A and lora_B. If `near`, B is ten times as large, and so is the update."""
        return {**super().factors, "lora_B": (1 + 9 * self.near) * super().factors["lora_B"]}

    def _integers(self, name: str, count: int) -> np.ndarray:  # -> (count, in - n)
        return np.asarray(np.rint(self.randn(name, count, self.in_features - self.n)).clip(-2, 2))

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes with the rounding to bfloat16 added, in units of float32.

        The base's output is rounded at most twice, before and after the bias, each time by no more than the unit
        roundoff of bfloat16 times the sum S of its absolute terms. It is exact if the terms are integers and S is at
        most 256, since bfloat16 can then represent each partial sum. The output, dx, the two terms of dx, the merged
        weight and its change are each rounded once.
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
        unit = 1.01 * UNIT["bfloat16"] / (TOLERANCE * UNIT["float32"])  # one percent more, for double rounding
        return {name: size + unit * np.asarray(rounded.get(name, 0.0)) for name, size in sizes.items()}

    def __str__(self) -> str:
        return super().__str__() + (" cancelling" if self.near else "")


@dataclass(frozen=True)
class NF4Problem(Problem):
    """A linear layer whose weight is in NF4: codes, two in each byte, and a scale for each block of 64 weights.

    Codes and scales are drawn at random instead of quantising a weight, so this does not depend on the library's codec.
    """

    double: bool = False  # whether the scales are quantised too
    layer: ClassVar[tuple[str, ...]] = ("packed", "absmax", "bias", "lora_A", "lora_B")
    keywords: ClassVar[tuple[str, ...]] = ("nested_absmax", "mean")
    exact: ClassVar[tuple[str, ...]] = ("absmax", *keywords)

    @property
    def blocks(self) -> int:
        """The number of blocks of the weight; the last one may be shorter."""
        return -(-self.in_features * self.out_features // NF4_BLOCK)

    @property
    def full(self) -> Arrays:
        """The codes (bytes,) and the scales (blocks,): float32, or uint8 codes with their own scales and a mean."""
        full = super().full
        rng, count = np.random.default_rng([self.seed, 4]), full.pop("weight").size
        packed = rng.integers(0, 256, (count + 1) // 2, dtype=np.uint8)
        if count % 2:
            packed[-1] |= 15
            packed[-1] -= 8  # the code of 0 pads the last byte
        scales = (1 + np.abs(self.randn("absmax", self.blocks))).astype(np.float32)
        if not self.double:
            return {"packed": packed, "absmax": scales, **full}
        nested = scales[: -(-self.blocks // SCALES_IN_A_BLOCK)] / 4
        codes = rng.integers(0, 256, self.blocks, dtype=np.uint8)
        mean = np.array([1.4567], np.float32)
        return {"packed": packed, "absmax": codes, "nested_absmax": nested, "mean": mean, **full}

    @property
    def options(self) -> dict[str, Any]:
        """The scales of the scales and the mean, if the scales are quantised."""
        full = self.full if self.double else {}
        return {"nested_absmax": full["nested_absmax"], "mean": float(full["mean"][0])} if full else {}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> NF4Problem:
        """Return the problem with float32 scales unless the implementation accepts both options."""
        return replace(self, double=self.double and takes >= {*self.keywords})

    def scales(self, arrays: Arrays) -> np.ndarray:  # -> (blocks,)
        """Return each block's scale."""
        if not self.double:
            return arrays["absmax"].astype(np.float32)
        nested, mean = (arrays[name].astype(np.float32) for name in self.keywords)
        nested = np.repeat(nested, SCALES_IN_A_BLOCK)[: self.blocks]
        return np.asarray(nested * scale_book()[arrays["absmax"]] + mean)

    def weight(self, book: np.ndarray = NF4, low_first: bool = False, **changes: Any) -> np.ndarray:  # -> (out, in)
        """Return the decoded weight in float64, its products rounded to float32.

        The code book, the order of the two codes of a byte, and the arrays can be replaced.
        """
        arrays = {**self.full, **changes}
        halves = [arrays["packed"] >> 4, arrays["packed"] & 15]
        codes = np.stack(halves[::-1] if low_first else halves, axis=1).ravel()
        count = self.in_features * self.out_features
        scales = np.repeat(self.scales(arrays), NF4_BLOCK)[:count]
        products = book.astype(np.float32)[codes[:count]] * scales
        return np.asarray(products.astype(np.float64).reshape(self.out_features, self.in_features))

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the arrays with the codes and scales replaced by the decoded weight."""
        coded: dict[str, Any] = {name: arrays[name] for name in ("packed", "absmax", *self.keywords) if name in arrays}
        others = {name: a for name, a in arrays.items() if name not in coded}
        return {**others, "weight": self.weight(**coded)}

    def __str__(self) -> str:
        return Problem.__str__(replace(self, double=False)) + (" scales of 8 bits" if self.double else "")


FOUR_BITS_KIND = Kind("nf4", NF4Problem, dtypes=("float32", "float16", "bfloat16"))
"""NF4 in float32, the precision of its products; the factors may also be in half precision."""
MIXED_KIND = Kind(
    "mixed",
    MixedProblem,
    claims=(*LAYER_CLAIMS, "output dtype"),
    dtypes=("float32",),  # the precision of the factors
    declares={"output": ("bfloat16", "float32")},
    merge_keeps_output=False,  # the merged weight is rounded to bfloat16
)
