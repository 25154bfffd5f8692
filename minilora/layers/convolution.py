"""Convolutions: a linear layer on patches.

An output depends on one patch of the image: the entries under the kernel, in all channels. In one dimension, with
stride s, dilation d and x padded with zeros,

    y_nop = sum_ck W_ock x_n,c,(s p + d k) + b_o                  W (out, C, K),  x (N, C, L),  y (N, out, P)

Collect the patch of the output at position p as one row, z_np,ck = x_n,c,(s p + d k). Then this is (7) on rows:

    z = T(x)          (conv.1)    (N, C, L) -> (N P, C K)         a copy of entries
    y = z W^T + b     (7)         (N P, C K) -> (N P, out)

(8) to (10) give dW, db and dz. x_ncl occurs in z exactly where s p + d k = l, so

    dx_ncl = sum of dz_np,ck over s p + d k = l
    dx = T*(dz)       (conv.2)    (N P, C K) -> (N, C, L)         entries summed where they came from

T* is the adjoint of T: <T(x), z> = <x, T*(z)> for all x and z. In two dimensions p, k and l are pairs, and nothing else
changes: the code handles any number of axes, with products for P and K.

The loops run over the kernel, not over the image: each of its K offsets is one strided copy (T) or sum (T*). Patches
are laid out channel first, (C K, N P), since that copies long runs; their transpose, a view, is the matrix of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_array, check_integer
from ..layer import Cache, Layer, check_fits
from ..linear import Linear

Ints = tuple[int, ...]


class Convolution(Layer):
    """A convolution over any number of axes. It stores the given arrays; training changes them in place.

    Parameters
    ----------
    weight, bias : array
        Float, of one dtype. The bias may be None.
    stride, padding, dilation : int, or a tuple of one for each axis
        As in PyTorch; the padding is zeros on all sides.
    groups : int
        Must be 1; PEFT cannot merge adapters of grouped convolutions either.
    """

    weight: Array  # declared by a subclass
    bias: Array | None = None

    def __init__(
        self, weight: Array, bias: Array | None = None, *,
        stride: int | Ints = 1, padding: int | Ints = 0, dilation: int | Ints = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        if groups != 1:
            raise ValueError(f"groups={groups!r} is not supported: every input is connected to every output here")
        self.weight, self.bias = weight, bias
        check_fits(self)
        self.stride = _each_axis("stride", stride, self.kernel, at_least=1)
        self.padding = _each_axis("padding", padding, self.kernel, at_least=0)
        self.dilation = _each_axis("dilation", dilation, self.kernel, at_least=1)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (N, C, *sizes) -> (N, out, *positions)
        """Return y and the cache, which keeps the patches unless the layer is frozen."""
        y, cache = self.as_linear().forward(self.to_rows(x))
        y = self.from_rows(y, x.shape)
        return y, (x.shape, cache)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (N, C, *sizes), and the gradients of the weight and the bias."""
        shape, rows_cache = cache
        linear, dy = rows_cache.layer, self.from_rows_adjoint(dy)
        _, grads = linear.backward(dy, rows_cache, need_dx=False)
        if grads:
            grads["weight"] = grads["weight"].reshape(self.weight.shape)
        return self.input_gradient(dy, linear.weight, shape) if need_dx else None, grads

    # --- as a linear layer on rows, for adapters (`minilora.variants.adapter`) ---

    def to_rows(self, x: Array) -> Array:  # (N, C, *sizes) -> (N P, C K)
        """Return the patches, one row for each position of each image."""
        _check_image(self, x)
        xp, (n, c), positions = backend_of(x).xp, x.shape[:2], self.positions(x.shape)
        padded = xp.pad(x, ((0, 0), (0, 0), *((p, p) for p in self.padding)))
        z = xp.empty((c, *self.kernel, n, *positions), dtype=x.dtype)
        for offset, window in self.windows(positions):
            z[(slice(None), *offset)] = padded[(..., *window)].swapaxes(0, 1)  # eq. (conv.1)
        return z.reshape(c * math.prod(self.kernel), n * math.prod(positions)).T

    rewrite = to_rows  # the name in the fifth edition

    def input_gradient(self, dy: Array, W: Array, shape: Ints) -> Array:  # (N P, out), (out, C K) -> (N, C, *sizes)
        """Return dx for a matrix W. The product is written so that dz lies channel first, as the patches do."""
        dz = (W.T @ dy.T).T  # eq. (10)
        return self.to_rows_adjoint(dz, shape)

    def to_rows_adjoint(self, dz: Array, shape: Ints) -> Array:  # (N P, C K) -> (N, C, *sizes)
        """Return dx: each entry of dz added where `to_rows` took it from. What fell on the padding is cut off."""
        (n, c, *sizes), positions = shape, self.positions(shape)
        dz = dz.T.reshape(c, *self.kernel, n, *positions)
        padded = backend_of(dz).zeros((c, n, *(s + 2 * p for s, p in zip(sizes, self.padding, strict=True))), dz.dtype)
        for offset, window in self.windows(positions):
            padded[(..., *window)] += dz[(slice(None), *offset)]  # eq. (conv.2)
        inner = (slice(p, p + s) for s, p in zip(sizes, self.padding, strict=True))
        return padded[(..., *inner)].swapaxes(0, 1)

    def windows(self, positions: Ints) -> Iterator[tuple[Ints, tuple[slice, ...]]]:
        """Yield each offset k of the kernel, with the slices s p + d k of the padded image."""
        for offset in np.ndindex(*self.kernel):
            steps = zip(offset, positions, self.stride, self.dilation, strict=True)
            yield offset, tuple(slice(d * k, d * k + s * (p - 1) + 1, s) for k, p, s, d in steps)

    def positions(self, shape: Ints) -> Ints:
        """Return the number of kernel positions along each axis of an input of that shape."""
        steps = zip(shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in steps)

    def from_rows(self, y: Array, shape: Ints) -> Array:  # (N P, out) -> (N, out, *positions)
        """Return rows as images, as a view."""
        return backend_of(y).xp.moveaxis(y.reshape(shape[0], *self.positions(shape), y.shape[-1]), -1, 1)

    def from_rows_adjoint(self, dy: Array) -> Array:  # (N, out, *positions) -> (N P, out)
        """Return images as rows."""
        dy = backend_of(dy).xp.moveaxis(dy, 1, -1)
        return dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])

    def as_linear(self) -> Linear:
        """Return the layer on patches: the weight as a matrix (out, C K), a view."""
        linear = Linear(self.weight.reshape(self.weight.shape[0], math.prod(self.weight.shape[1:])), self.bias)
        linear.frozen = self.frozen
        return linear

    def from_linear(self, linear: Linear) -> Any:
        """Return a convolution with another weight, given as a matrix (out, C K)."""
        steps: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return type(self)(linear.weight.reshape(self.weight.shape), linear.bias, **steps)

    kernel = property(lambda self: tuple(self.weight.shape[2:]), doc="The kernel's size along each axis.")


class Conv1d(Convolution):
    """A convolution over sequences: weight (out, C, K), bias (out,), x (N, C, L), as in PyTorch."""

    weight: Annotated[Array, "out C width"]
    bias: Annotated[Array | None, "out"] = None


class Conv2d(Convolution):
    """A convolution over images: weight (out, C, KH, KW), bias (out,), x (N, C, H, W), as in PyTorch."""

    weight: Annotated[Array, "out C height width"]
    bias: Annotated[Array | None, "out"] = None


def _each_axis(name: str, value: Any, kernel: Ints, at_least: int) -> Ints:
    """Return one integer per axis of a kernel, given one for all axes or one for each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(kernel)
    if len(values) != len(kernel):
        raise ValueError(f"{name} must be an integer or {len(kernel)} of them, got {value!r}")
    return tuple(check_integer(name, v, at_least=at_least) for v in values)


def _check_image(layer: Convolution, x: Array) -> None:
    """Require an input (N, in, *sizes), and a kernel that fits into the padded image."""
    check_array("x", x, like=layer.weight)
    shape, weight = tuple(x.shape), layer.weight.shape
    if len(shape) != len(weight) or shape[1] != weight[1]:
        raise ValueError(f"x has shape {shape}, expected {len(weight)} axes, (N, {weight[1]}, ...)")
    if min(layer.positions(shape)) < 1:
        raise ValueError(f"x has shape {shape}: with padding {layer.padding} it is smaller than the kernel {layer!r}")
