"""The kinds whose input is not rows: embeddings, which have ids, and convolutions, which have images.

Both are converted to rows. Ids become one-hot rows. An image becomes patches through a table that gives, for each entry
of a row, its position in the image. The library's own layers use a different method, so that the two can be compared.

With g groups, weight is (out, C/g, ...), lora_A (r, C, ...) and lora_B (out, r/g, ...), as in PEFT since its pull
request 2567: each group of outputs uses its share of the r hidden channels, and these use the whole image. This is not
an update of the grouped weight, so it cannot be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .kind import Kind
from .problem import Arrays, Problem


@dataclass(frozen=True)
class EmbeddingProblem(Problem):
    """An embedding: `in_features` is the number V of ids, `out_features` the width of their vectors."""

    bias: bool = False

    @property
    def x(self) -> np.ndarray:
        """The ids, (N,): the first one is repeated, and at least one id does not occur."""
        ids = np.random.default_rng([self.seed, 1]).integers(0, self.in_features - 1, self.n)
        ids[-1] = ids[0]
        return ids

    @property
    def full(self) -> Arrays:
        """The table (V, dim)."""
        return {"weight": self.randn("weight", self.in_features, self.out_features)}

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return one-hot rows and the transposed table."""
        one_hot = np.eye(self.in_features)[arrays["x"]]
        return {**arrays, "x": one_hot, "weight": arrays["weight"].T}

    def unflatten(self, answers: Arrays) -> Arrays:
        """Return the merged table as (V, dim), without dx: ids have no derivative."""
        return {**{k: a for k, a in answers.items() if k != "x"}, "merged": answers["merged"].T}


@dataclass(frozen=True)
class ConvolutionProblem(Problem):
    """A convolution over any number of axes. `in_features` and `out_features` are channels."""

    kernel: tuple[int, ...] = (3, 3)
    sizes: tuple[int, ...] = (6, 5)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    keywords: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation", "groups")

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line, with default steps along each axis of the kernel if it has none."""
        return super().from_line({**cls.default_steps(len(line.get("kernel", cls.kernel))), **line})

    @staticmethod
    def default_steps(axes: int) -> dict[str, Any]:
        """Return stride 1, padding 0, dilation 1 and one group for a kernel with the given number of axes."""
        return {"stride": (1,) * axes, "padding": (0,) * axes, "dilation": (1,) * axes, "groups": 1}

    @property
    def x(self) -> np.ndarray:
        """The images, (N, C, *sizes)."""
        return self.randn("x", self.n, self.in_features, *self.sizes)

    @property
    def dy(self) -> np.ndarray:
        """The gradient of a loss at the output, (N, out, *positions)."""
        return self.randn("dy", self.n, self.out_features, *self.positions)

    @property
    def full(self) -> Arrays:
        """The weight (out, C / groups, *kernel) and, if there is one, the bias."""
        shape = (self.out_features, self.in_features // self.groups, *self.kernel)
        return {**super().full, "weight": self.randn("weight", *shape)}

    @property
    def factors(self) -> Arrays:
        """lora_A (r, C, *kernel) and lora_B (out, r / groups, 1, ...)."""
        ones = (1 for _ in self.kernel)
        of_B = (self.out_features, self.rank // self.groups, *ones)
        return self.pair((self.rank, self.in_features, *self.kernel), of_B)

    @property
    def positions(self) -> tuple[int, ...]:
        """The number of positions of the kernel along each axis."""
        steps = zip(self.sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps)

    @property
    def options(self) -> dict[str, Any]:
        """The stride, padding, dilation and groups."""
        return {name: getattr(self, name) for name in self.keywords}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> ConvolutionProblem:
        """Return the problem with default values for the options that an implementation does not accept."""
        default = self.default_steps(len(self.kernel))
        return replace(self, **{name: value for name, value in default.items() if name not in takes})

    @cached_property
    def places(self) -> np.ndarray:  # (P, C K)
        """The index in a flattened image of each entry of a row; padding has the index after the last entry."""
        entries = np.arange(self.in_features * math.prod(self.sizes)).reshape(self.in_features, *self.sizes)
        padded = np.pad(entries, ((0, 0), *((p, p) for p in self.padding)), constant_values=entries.size)
        corners = [np.arange(n) * s for n, s in zip(self.positions, self.stride, strict=True)]
        offsets = [np.arange(k) * d for k, d in zip(self.kernel, self.dilation, strict=True)]
        table = [
            [padded[(slice(None), *(np.array(corner) + offset))] for offset in _pairs(offsets)]
            for corner in _pairs(corners)
        ]
        return np.array(table).swapaxes(1, 2).reshape(len(table), -1)  # (P, K, C) -> (P, C K)

    def flatten(self, arrays: Arrays) -> Arrays:
        """Return the images as patches, and all arrays with a kernel as matrices."""
        n, out = self.n, self.out_features
        flat = np.concatenate([arrays["x"].reshape(n, -1), np.zeros((n, 1))], axis=1)
        return {
            **arrays,
            "x": flat[:, self.places].reshape(-1, self.places.shape[1]),
            "dy": np.moveaxis(arrays["dy"], 1, -1).reshape(-1, out),
            "weight": _block_diagonal(arrays["weight"].reshape(out, -1), self.groups),
            "lora_A": arrays["lora_A"].reshape(self.rank, -1),
            "lora_B": _block_diagonal(arrays["lora_B"].reshape(out, -1), self.groups),
        }

    def unflatten(self, answers: Arrays) -> Arrays:
        """Return images and kernels; each entry of dx sums the gradients of all rows that contain the pixel."""
        n, ones = self.n, (1 for _ in self.kernel)
        dx = np.zeros((n, self.in_features * math.prod(self.sizes) + 1), answers["x"].dtype)
        np.add.at(dx.T, self.places, np.moveaxis(answers["x"].reshape(n, *self.places.shape), 0, -1))
        shaped = {
            "y": np.moveaxis(answers["y"].reshape(n, *self.positions, -1), -1, 1),
            "x": dx[:, :-1].reshape(n, self.in_features, *self.sizes),
            "lora_A": answers["lora_A"].reshape(self.rank, self.in_features, *self.kernel),
            "lora_B": _diagonal_blocks(answers["lora_B"], self.groups).reshape(self.out_features, -1, *ones),
        }
        if self.groups == 1:
            shaped["merged"] = answers["merged"].reshape(self.out_features, self.in_features, *self.kernel)
        return shaped

    def shape_hint(self, shape: tuple[int, ...]) -> str:
        """Return the mistake in the kernel's steps that would give the output this shape; empty if there is none."""
        default = self.default_steps(len(self.kernel))
        others: dict[str, dict[str, Any]] = {
            "if stride were 1": {"stride": default["stride"]},
            "without padding": {"padding": default["padding"]},
            "if dilation were 1": {"dilation": default["dilation"]},
            "if stride and dilation were swapped": {"stride": self.dilation, "dilation": self.stride},
            "if the two axes of each step were swapped": {
                name: getattr(self, name)[::-1] for name in ("stride", "padding", "dilation")
            },
        }
        fitting = (words for words, steps in others.items() if replace(self, **steps).positions == shape[2:])
        return next((f", as it would be {words}" for words in fitting), "")

    def with_two_row_axes(self) -> None:
        """Return None: an image's axes are fixed by the kernel."""


def _pairs(axes: list[np.ndarray]) -> np.ndarray:
    """Return all combinations of one entry from each axis, one per row, the last axis varying fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def _block_diagonal(matrix: np.ndarray, groups: int) -> np.ndarray:  # (out, n / groups) -> (out, n)
    """Return the matrix of a grouped layer: each group of outputs has its own columns and zeros in the others."""
    whole = np.zeros((len(matrix), matrix.shape[1] * groups), matrix.dtype)
    for rows, columns in _group_slices(whole.shape, groups):
        whole[rows, columns] = matrix[rows]
    return whole


def _diagonal_blocks(whole: np.ndarray, groups: int) -> np.ndarray:  # (out, n) -> (out, n / groups)
    """Return only the columns that belong to each group of outputs."""
    return np.concatenate([whole[rows, columns] for rows, columns in _group_slices(whole.shape, groups)])


def _group_slices(shape: tuple[int, ...], groups: int) -> list[tuple[slice, slice]]:
    out, n = (size // groups for size in shape)
    return [(slice(g * out, (g + 1) * out), slice(g * n, (g + 1) * n)) for g in range(groups)]


EMBEDDING_KIND = Kind(
    "embedding",
    EmbeddingProblem,
    transposed={"lora_A": 2, "lora_B": 2},  # the table itself has no orientation
    spread_follows_fan=False,
)
CONV1D_KIND = Kind("conv1d", ConvolutionProblem, starts=((9, 400, 100, (4,)), (30, 40, 60, (7,))))
CONV2D_KIND = Kind("conv2d", ConvolutionProblem, starts=((9, 400, 100, (2, 2)), (30, 40, 60, (3, 3))))
