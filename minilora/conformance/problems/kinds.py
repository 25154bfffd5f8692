"""Kinds of layers, and the set of problems that each is tried on: every one is a linear layer on rows.

    kind                  x               weight             lora_A            lora_B
    linear, rslora, dora  (N, in)         (out, in)          (r, in)           (out, r)
    dropout               (N, in)         (out, in)          (r, in)           (out, r)
    embedding             (N,) ids        (V, dim)           (r, V)            (dim, r)
    conv1d                (N, C, L)       (out, C, K)        (r, C, K)         (out, r, 1)
    conv2d                (N, C, H, W)    (out, C, KH, KW)   (r, C, KH, KW)    (out, r, 1, 1)
    nf4                   (N, in)         codes and scales   (r, in)           (out, r)
    mixed                 (N, in)         (out, in)          (r, in)           (out, r)
    fused                 (N, in)         (out, in)          a list, one entry for each slot of the outputs
    experts               (N, in)         (E, out, in)       (E r, in)         (out, r E)
    combine               a list of adapters, each (r, in) and (out, r), and their weights

The shapes are those of PyTorch and of PEFT. `mixed`, `slots`, `stacks` and `sums` have a file each for the last four
kinds. `Ids` and `Images` rewrite them in a way of their own, since this library's layers are held against them. Ids
become one-hot rows. An image becomes patches by a table of places, which says for each entry of a row where in the
image it stands.

With g groups, weight is (out, C/g, ...), lora_A (r, C, ...) and lora_B (out, r/g, ...), as PEFT has them since its pull
request 2567: each group of outputs sees a share of the r hidden channels, and these see the whole image. That is no
change of a grouped weight, so there is nothing to merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ...layers.nf4 import NF4, SCALES_IN_A_BLOCK, scale_book
from .mixed import Mixed
from .problem import Arrays, Problem
from .reference import DORA, DROPOUT, RIGHT, RSLORA, Formulas
from .slots import Fused
from .stacks import Stacks
from .sums import Sums

BLOCK = 64
"""Weights in NF4 that share a scale."""


@dataclass(frozen=True)
class Ids(Problem):
    """An embedding: `in_features` is the number V of its ids, `out_features` the width of their vectors."""

    bias: bool = False

    @property
    def x(self) -> np.ndarray:
        """Ids, (N,): the first one comes twice, and one of them not at all."""
        ids = np.random.default_rng([self.seed, 1]).integers(0, self.in_features - 1, self.n)
        ids[-1] = ids[0]
        return ids

    @property
    def full(self) -> Arrays:
        """The table (V, dim)."""
        return {"weight": self.randn("weight", self.in_features, self.out_features)}

    def rows(self, arrays: Arrays) -> Arrays:
        """Return one-hot rows, and the table transposed."""
        one_hot = np.eye(self.in_features)[arrays["x"]]
        return {**arrays, "x": one_hot, "weight": arrays["weight"].T}

    def shaped(self, answers: Arrays) -> Arrays:
        """Return the merged table as it lies. Ids have no derivative, so there is no dx."""
        return {**{k: a for k, a in answers.items() if k != "x"}, "merged": answers["merged"].T}


@dataclass(frozen=True)
class Images(Problem):
    """A convolution over any number of axes. `in_features` and `out_features` are channels."""

    kernel: tuple[int, ...] = (3, 3)
    sizes: tuple[int, ...] = (6, 5)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @property
    def x(self) -> np.ndarray:
        """Images, (N, C, *sizes)."""
        return self.randn("x", self.n, self.in_features, *self.sizes)

    @property
    def dy(self) -> np.ndarray:
        """The gradient of a loss at the output, (N, out, *positions)."""
        return self.randn("dy", self.n, self.out_features, *self.positions)

    @property
    def full(self) -> Arrays:
        """The weight (out, C / groups, *kernel) and, where there is one, the bias."""
        shape = (self.out_features, self.in_features // self.groups, *self.kernel)
        return {**super().full, "weight": self.randn("weight", *shape)}

    @property
    def factors(self) -> Arrays:
        """lora_A (r, C, *kernel) and lora_B (out, r / groups, 1, ...)."""
        lora_B = self.randn("lora_B", self.out_features, self.rank // self.groups, *(1 for _ in self.kernel))
        return {
            "lora_A": self.randn("lora_A", self.rank, self.in_features, *self.kernel),
            "lora_B": 0 * lora_B if self.start else lora_B,
        }

    @property
    def positions(self) -> tuple[int, ...]:
        """How many places the kernel has along each axis."""
        steps = zip(self.sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps)

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel moves: a function is handed those of these that it names."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    def only(self, names: frozenset[str]) -> Images:
        """Return the same problem with 1, 0 and 1 for the options that are not among the names."""
        ones, zeros = (1,) * len(self.kernel), (0,) * len(self.kernel)
        plain: dict[str, Any] = {"stride": ones, "padding": zeros, "dilation": ones, "groups": 1}
        return replace(self, **{name: value for name, value in plain.items() if name not in names})

    @cached_property
    def places(self) -> np.ndarray:  # (P, C K)
        """Which entry of an image, flattened, each entry of a row is; for the padding, one past the last."""
        entries = np.arange(self.in_features * math.prod(self.sizes)).reshape(self.in_features, *self.sizes)
        padded = np.pad(entries, ((0, 0), *((p, p) for p in self.padding)), constant_values=entries.size)
        corners = [np.arange(n) * s for n, s in zip(self.positions, self.stride, strict=True)]
        offsets = [np.arange(k) * d for k, d in zip(self.kernel, self.dilation, strict=True)]
        table = [
            [padded[(slice(None), *(np.array(corner) + offset))] for offset in _pairs(offsets)]
            for corner in _pairs(corners)
        ]
        return np.array(table).swapaxes(1, 2).reshape(len(table), -1)  # (P, K, C) -> (P, C K)

    def rows(self, arrays: Arrays) -> Arrays:
        """Return patches, and all that has a kernel as matrices."""
        n, out = self.n, self.out_features
        flat = np.concatenate([arrays["x"].reshape(n, -1), np.zeros((n, 1))], axis=1)
        return {
            **arrays,
            "x": flat[:, self.places].reshape(-1, self.places.shape[1]),
            "dy": np.moveaxis(arrays["dy"], 1, -1).reshape(-1, out),
            "weight": _blocks(arrays["weight"].reshape(out, -1), self.groups),
            "lora_A": arrays["lora_A"].reshape(self.rank, -1),
            "lora_B": _blocks(arrays["lora_B"].reshape(out, -1), self.groups),
        }

    def shaped(self, answers: Arrays) -> Arrays:
        """Return images, and kernels; an entry of dx is the sum over its places in all rows."""
        n, ones = self.n, (1 for _ in self.kernel)
        dx = np.zeros((n, self.in_features * math.prod(self.sizes) + 1), answers["x"].dtype)
        np.add.at(dx.T, self.places, np.moveaxis(answers["x"].reshape(n, *self.places.shape), 0, -1))
        shaped = {
            "y": np.moveaxis(answers["y"].reshape(n, *self.positions, -1), -1, 1),
            "x": dx[:, :-1].reshape(n, self.in_features, *self.sizes),
            "lora_A": answers["lora_A"].reshape(self.rank, self.in_features, *self.kernel),
            "lora_B": _own_blocks(answers["lora_B"], self.groups).reshape(self.out_features, -1, *ones),
        }
        if self.groups == 1:
            shaped["merged"] = answers["merged"].reshape(self.out_features, self.in_features, *self.kernel)
        return shaped


@dataclass(frozen=True)
class FourBits(Problem):
    """A linear layer whose weight is in NF4: codes, two in a byte, and a scale for each block of 64.

    Codes and scales are drawn, and no weight is quantised for them: this is another way to the same numbers.
    """

    double: bool = False  # whether the scales are quantised too
    layer: ClassVar[tuple[str, ...]] = ("packed", "absmax", "bias", "lora_A", "lora_B")
    exact: ClassVar[tuple[str, ...]] = ("absmax", "nested_absmax", "mean")

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
        """The scales of the scales and their mean: a function is handed them where it names them."""
        full = self.full if self.double else {}
        return {"nested_absmax": full["nested_absmax"], "mean": float(full["mean"][0])} if full else {}

    def only(self, names: frozenset[str]) -> FourBits:
        """Return the same problem with scales of 32 bits, unless both options are among the names."""
        return replace(self, double=self.double and names >= {"nested_absmax", "mean"})

    def scales(self, **changes: Any) -> np.ndarray:  # -> (blocks,)
        """Return each block's scale; with other numbers in the place of the problem's own, if any are given."""
        full = {**self.full, **changes}
        if not self.double:
            return np.asarray(full["absmax"])
        nested = np.repeat(full["nested_absmax"], SCALES_IN_A_BLOCK)[: self.blocks]
        return np.asarray(nested * scale_book()[full["absmax"]] + np.float32(full["mean"]))

    def weight(self, book: np.ndarray = NF4, low_first: bool = False, **changes: Any) -> np.ndarray:  # -> (out, in)
        """Return the weight in float64, its products rounded to float32; by another book or order, if asked."""
        packed = self.full["packed"]
        halves = [packed & 15, packed >> 4] if low_first else [packed >> 4, packed & 15]
        codes, count = np.stack(halves, axis=1).ravel(), self.in_features * self.out_features
        scales = np.repeat(self.scales(**changes), BLOCK)[:count]
        products = book.astype(np.float32)[codes[:count]] * scales
        return np.asarray(products.astype(np.float64).reshape(self.out_features, self.in_features))

    def rows(self, arrays: Arrays) -> Arrays:
        """Return the arrays with the weight that the codes stand for in their place."""
        coded = ("packed", "absmax", "nested_absmax", "mean")
        return {name: a for name, a in arrays.items() if name not in coded} | {"weight": self.weight()}

    def __str__(self) -> str:
        return Problem.__str__(replace(self, double=False)) + (" scales of 8 bits" if self.double else "")


def _pairs(axes: list[np.ndarray]) -> np.ndarray:
    """Return every choice of one entry of each axis, a row each, the last axis fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def _blocks(matrix: np.ndarray, groups: int) -> np.ndarray:  # (out, n / groups) -> (out, n)
    """Return the matrix of a grouped layer: each group of outputs has its own columns, and zeros in the others."""
    whole = np.zeros((len(matrix), matrix.shape[1] * groups), matrix.dtype)
    for rows, columns in _own(whole.shape, groups):
        whole[rows, columns] = matrix[rows]
    return whole


def _own_blocks(whole: np.ndarray, groups: int) -> np.ndarray:  # (out, n) -> (out, n / groups)
    """Return of each group of outputs its own columns."""
    return np.concatenate([whole[rows, columns] for rows, columns in _own(whole.shape, groups)])


def _own(shape: tuple[int, ...], groups: int) -> list[tuple[slice, slice]]:
    out, n = (size // groups for size in shape)
    return [(slice(g * out, (g + 1) * out), slice(g * n, (g + 1) * n)) for g in range(groups)]


@dataclass(frozen=True)
class ProblemSet:
    """What a kind of layer should give, and the problems that it is tried on."""

    formulas: Formulas
    problems: tuple[Problem, ...]


AGAIN = Problem(7, 5, 3, 2, alpha=4.5, seed=7)
"""It has the sizes of the first problem, and other numbers: nothing may be remembered by its shape."""
LINEAR = (
    Problem(7, 5, 3, 2, alpha=3.0),
    Problem(4, 3, 6, 4, alpha=10.0, bias=False, seed=1),
    Problem(1, 8, 2, 3, alpha=0.5, seed=2),
    Problem(6, 6, 6, 4, alpha=7.0, seed=3),  # square: there a transposed factor fits
    Problem(3, 4, 9, 5, alpha=2.5, bias=False, seed=4),
    Problem(5, 2, 3, 6, alpha=16.0, seed=5),  # of a rank above both widths
    Problem(2, 7, 4, 1, alpha=5.0, seed=6),  # of rank 1, for which some have code of its own
    AGAIN,
    Problem(5, 3, 4, 2, alpha=3.0, seed=8, start=True),
    Problem(67, 130, 69, 17, alpha=24.0, seed=9),  # each a little above a power of two, where blocks end
    Problem(2, 4096, 5, 3, alpha=12.0, seed=10),  # as wide as layers are in use
    Problem(3, 35, 40, 33, alpha=20.0, seed=11),  # of a rank above 32, which some kernels hold at most
    Problem(4, 30, 36, 64, alpha=40.0, seed=12),  # of a rank that is a multiple of 32
    Problem(131, 7, 5, 3, alpha=4.0, seed=13),  # more than 128 rows
    Problem(3, 6, 133, 4, alpha=9.0, seed=14),  # more than 128 outputs
)
NARROW = tuple(problem for problem in LINEAR if problem.in_features < 4096)
CONV1D = (
    Images(3, 4, 5, 2, 3.0, kernel=(3,), sizes=(9,), stride=(1,), padding=(0,), dilation=(1,)),
    Images(2, 3, 4, 5, 2.0, False, 1, kernel=(4,), sizes=(11,), stride=(2,), padding=(1,), dilation=(1,)),
    Images(2, 2, 3, 3, 7.0, True, 2, kernel=(2,), sizes=(8,), stride=(3,), padding=(2,), dilation=(3,)),
    Images(3, 4, 6, 2, 5.0, True, 3, kernel=(3,), sizes=(7,), stride=(1,), padding=(1,), dilation=(1,), groups=2),
    Images(2, 4, 8, 4, 3.0, True, 4, kernel=(3,), sizes=(6,), stride=(1,), padding=(1,), dilation=(1,), groups=4),
)
CONV2D = (
    Images(2, 3, 4, 2, 3.0),
    Images(1, 2, 5, 3, 2.0, False, 1, kernel=(2, 3), sizes=(7, 6), stride=(2, 1), padding=(1, 2)),
    Images(2, 4, 3, 5, 7.0, True, 2, kernel=(3, 2), sizes=(8, 7), stride=(1, 2), padding=(0, 1), dilation=(2, 3)),
    Images(3, 4, 4, 4, 6.0, True, 3, kernel=(1, 1), sizes=(3, 4)),
    Images(2, 4, 6, 4, 10.0, True, 4, sizes=(5, 7), padding=(1, 1), groups=2),
    Images(2, 4, 6, 2, 3.0, False, 5, kernel=(2, 2), sizes=(4, 5), groups=2),
    Images(3, 4, 8, 4, 7.0, True, 6, kernel=(3, 2), sizes=(4, 5), groups=4),  # depthwise
)
EMBEDDING = (
    Ids(7, 5, 3, 2, 3.0),
    Ids(4, 9, 6, 4, 10.0, seed=1),
    Ids(1, 6, 2, 3, 0.5, seed=2),
    Ids(12, 6, 6, 5, 7.0, seed=3),
    Ids(300, 50, 20, 8, 12.0, seed=4),
    Ids(6, 4, 5, 1, 2.0, seed=5, start=True),
)
FOUR_BITS = (
    FourBits(5, 37, 6, 2, 3.0),  # blocks end within rows, and the last one is shorter
    FourBits(3, 64, 5, 4, 10.0, bias=False, seed=1),
    FourBits(4, 15, 9, 3, 2.0, seed=2),  # an odd number of weights
    FourBits(2, 160, 110, 5, 16.0, seed=3, double=True),
    FourBits(6, 33, 3, 2, 5.0, bias=False, seed=4, double=True),
)
MIXED = (
    Mixed(7, 5, 3, 2, alpha=3.0),
    Mixed(4, 3, 6, 4, alpha=10.0, bias=False, seed=1),
    Mixed(6, 6, 6, 4, alpha=7.0, seed=3),
    Mixed(2, 7, 4, 1, alpha=5.0, seed=6),
    Mixed(5, 3, 4, 2, alpha=3.0, seed=8, start=True),
    Mixed(5, 13, 9, 4, alpha=2.7, seed=30, near=True),
    Mixed(7, 19, 11, 3, alpha=2.2, seed=31, near=True),
    Mixed(5, 130, 20, 17, alpha=24.0, seed=9),
    Mixed(3, 35, 40, 33, alpha=20.0, seed=11),
)
FUSED = (
    Fused.of(7, 5, (8, 4, 4), (2, 0, 3)),  # q, k and v, grouped; k has no adapter
    Fused.of(4, 8, (5, 5), (4, 3), alpha=10.0, bias=False, seed=1),  # gate and up
    Fused.of(5, 6, (4, 4, 4), (3, 3, 3), alpha=2.0, seed=2),  # slots and ranks of one size: there an exchange fits
    Fused.of(6, 8, (4, 2, 2), (2, 3, 5), alpha=7.0, seed=3),  # square
    Fused.of(1, 7, (6, 3, 3), (0, 4, 2), alpha=0.5, seed=4),
    Fused.of(3, 4, (7, 7), (0, 5), alpha=2.5, bias=False, seed=5),  # of two slots the second alone
    Fused.of(7, 5, (8, 4, 4), (2, 0, 3), alpha=4.5, seed=7),  # the sizes of the first, and other numbers
    Fused.of(5, 3, (6, 2, 2), (2, 3, 1), seed=8, start=True),
    Fused.of(4, 35, (34, 17, 17), (33, 5, 9), alpha=24.0, seed=9),  # a little above powers of two
)
EXPERTS = (
    Stacks(11, 5, 4, 2, alpha=3.0, experts=3),
    Stacks(9, 6, 6, 3, alpha=7.0, seed=1, experts=4),  # square: there in and out can be exchanged
    Stacks(10, 4, 8, 3, alpha=10.0, seed=2, experts=2),  # out = 2 in, as gate and up have where d = m
    Stacks(7, 5, 3, 2, alpha=5.0, seed=3, experts=4, idle=2),
    Stacks(1, 7, 4, 3, alpha=0.5, seed=4, experts=3),
    Stacks(4, 3, 5, 2, alpha=2.5, seed=5, experts=1),
    Stacks(8, 4, 7, 1, alpha=2.0, seed=6, experts=5),  # of rank 1, where both packings of a factor are one
    Stacks(11, 5, 4, 2, alpha=4.5, seed=7, experts=3),  # the sizes of the first, and other numbers
    Stacks(6, 3, 4, 2, seed=8, start=True, experts=3),
    Stacks(67, 35, 33, 17, alpha=24.0, seed=9, experts=8),
)
COMBINE = (
    Sums.of(5, 4, 2, [(2, 0.7, False), (2, 0.4, False)]),
    Sums.of(6, 7, 3, [(2, 0.7, False), (2, -0.4, False)], alpha=5.0, seed=1),
    Sums.of(7, 5, 3, [(3, 1.5, False), (2, -0.5, False)], alpha=4.4, seed=2),
    Sums.of(6, 5, 2, [(3, 0.7, True), (3, 0.3, True)], alpha=2.2, seed=3),
    Sums.of(5, 8, 4, [(3, -1.25, True), (3, 0.5, True)], alpha=7.0, seed=4),
    Sums.of(7, 6, 3, [(2, 0.6, True), (3, 1.4, False)], alpha=2.5, seed=5),
    Sums.of(8, 7, 4, [(3, 0.8, False), (3, -0.6, True)], alpha=5.0, seed=162),
    Sums.of(6, 6, 3, [(2, 0.5, False), (2, -1.5, False), (2, 2.0, False)], alpha=3.5, seed=7),
    Sums.of(5, 6, 2, [(3, -0.5, False)], alpha=4.6, seed=8),
    Sums.of(4, 7, 1, [(1, 2.0, False), (1, 0.25, False)], alpha=3.0, seed=9),
    Sums.of(5, 4, 2, [(2, 0.7, False), (2, 0.4, False)], alpha=4.5, seed=10),  # the sizes of the first
    Sums.of(9, 8, 6, [(2, 1.0, True), (4, -1.0, True)], alpha=5.6, seed=11),  # of the sum's own rank
    Sums.of(20, 17, 4, [(5, 0.9, False), (3, -1.1, True)], alpha=12.0, seed=53),
)
SETS = {
    "linear": ProblemSet(RIGHT, LINEAR),
    "rslora": ProblemSet(RSLORA, NARROW),
    "dora": ProblemSet(DORA, NARROW),
    "embedding": ProblemSet(RIGHT, EMBEDDING),
    "conv1d": ProblemSet(RIGHT, CONV1D),
    "conv2d": ProblemSet(RIGHT, CONV2D),
    "dropout": ProblemSet(DROPOUT, NARROW),
    "nf4": ProblemSet(RIGHT, FOUR_BITS),
    "mixed": ProblemSet(RIGHT, MIXED),
    "fused": ProblemSet(RIGHT, FUSED),
    "experts": ProblemSet(RIGHT, EXPERTS),
    "combine": ProblemSet(RIGHT, COMBINE),
    "dora-full": ProblemSet(DORA.with_parts(through_norm=1.0), NARROW),
}
"""The problems of each kind of layer; of DoRA twice, since the gradient may pass through its norm or not."""
DECLARED = tuple(kind for kind in SETS if kind != "dora-full")
"""The kinds that an implementation may have: with DoRA it declares ``detached_norm``."""
