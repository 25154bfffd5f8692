"""Gradients that are wrong at some problems only: at equal sizes, at one row, with more axes, where a number is zero.

Each row says in which family's problems of `support/search.py` it must be found; no example there is made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora import DoRA, Embedding, Linear, LoRA, LoRALinear, losses, optim
from minilora.fast import blockwise
from minilora.layer import rows
from minilora.layers import attention, embedding
from minilora.layers.convolution import Convolution
from minilora.variants import dora
from minilora.variants.adapter import AdaptedRows
from minilora.variants.dropout import DroppingLoRALinear

from . import search
from .replaced import Bug, Wrong, backward_becomes, bug, first, instead

Where = Callable[[Any, np.ndarray], bool]
"""Of a layer and dy: whether the mistake shows."""


def dx_where(where: Where, change: Callable[[Any, np.ndarray, np.ndarray, Any], Any]) -> Wrong:
    """A backward whose dx is changed, by a function of the layer, dx, dy and the cache, at some problems."""

    def changed(self, dx, grads, dy, cache):
        return (change(self, dx, dy, cache.kept) if dx is not None and where(self, dy) else dx), grads

    return backward_becomes(changed)


def grad_where(name: str, where: Where, change: Callable[[Any, np.ndarray, np.ndarray, Any], Any]) -> Wrong:
    """A backward with one gradient changed, by a function of the layer, the gradient, dy and the cache."""

    def changed(self, dx, grads, dy, cache):
        wrong = name in grads and where(self, dy)
        return dx, grads | ({name: change(self, grads[name], dy, cache.kept)} if wrong else {})

    return backward_becomes(changed)


def transposed(self, grad, *_):
    return grad.T.reshape(grad.shape)


def twice(self, grad, *_):
    return 2 * grad


def of_the_first(factor: Callable[[Any], float] = lambda self: 1.0):
    """The product with dy where only the first of the leading axes' entries counts; x stands in the cache."""

    def dW(self, grad, dy, cache):
        return rows(dy[0]).T @ rows(cache[-1][0]) * grad.dtype.type(factor(self))

    return dW


def square(self, dy):
    return self.in_features == self.out_features


def number_of_rows(dy):
    return int(np.prod(dy.shape[:-1]))


def one_row(self, dy):
    return number_of_rows(dy) == 1


def more_axes(self, dy):
    return dy.ndim > 2 and dy.shape[0] > 1


def by_rows_drawn(self, grad, dy, cache):
    """Divided by the number of rows, and multiplied by it."""
    n = np.float64(number_of_rows(dy))
    return (grad * n / n).astype(grad.dtype)


LINEAR = [
    bug("dW transposed where in = out", "linear", Linear, backward=grad_where("weight", square, transposed)),
    bug("dW of the first batch only, of more axes", "linear", Linear,
        backward=grad_where("weight", more_axes, of_the_first())),
    bug("db of the first batch only, of more axes", "linear", Linear,
        backward=grad_where("bias", more_axes, lambda self, grad, dy, cache: rows(dy[0]).sum(axis=0))),
    bug("0 / 0 without rows", "linear", Linear, backward=grad_where("weight", lambda *_: True, by_rows_drawn)),
    bug("dx of a vector doubled", "linear", Linear, backward=dx_where(lambda self, dy: dy.ndim == 1, twice)),
    bug("dW of one row, dx^T y in its place", "linear", Linear, backward=grad_where("weight", one_row,
        lambda self, grad, dy, cache: np.outer(rows(cache[-1]), rows(dy)).reshape(grad.shape))),
    bug("dW of as many rows as inputs, where there are more", "linear", Linear, backward=grad_where("weight",
        lambda self, dy: number_of_rows(dy) > self.in_features,
        lambda self, grad, dy, cache: rows(dy)[: self.in_features].T @ rows(cache[-1])[: self.in_features])),
    bug("dW by the order in memory", "linear", Linear, backward=grad_where("weight",
        lambda self, dy: not dy.flags.c_contiguous,
        lambda self, grad, dy, cache: rows(dy.ravel(order="K").reshape(dy.shape)).T @ rows(cache[-1]))),
    bug("dx where W is zero is not zero", "linear", Linear, backward=dx_where(
        lambda self, dy: not self.weight.any(), lambda self, dx, *_: dx + 1)),
]  # fmt: skip

LORA = [
    bug("dB transposed where r = out", "LoRA", LoRA, backward=grad_where("lora_B",
        lambda self, dy: self.rank == self.out_features, transposed)),
    bug("dA transposed where r = in", "LoRA", LoRA, backward=grad_where("lora_A",
        lambda self, dy: self.rank == self.in_features, transposed)),
    bug("dB without s where the rank is above both widths", "LoRA", LoRA, backward=grad_where("lora_B",
        lambda self, dy: self.rank > max(self.shape), lambda self, grad, *_: grad / self.scaling)),
    bug("dA doubled at rank 1", "LoRA", LoRA, backward=grad_where("lora_A", lambda self, dy: self.rank == 1, twice)),
    bug("dA doubled where N = r", "LoRA", LoRA, backward=grad_where("lora_A",
        lambda self, dy: number_of_rows(dy) == self.rank, twice)),
    bug("s no larger than 64", "LoRA", LoRA, backward=grad_where("lora_A", lambda self, dy: self.scaling > 64,
        lambda self, grad, *_: grad * (64 / self.scaling))),
    bug("dx zero where x is zero", "LoRA", LoRA, backward=dx_where(lambda *_: True,
        lambda self, dx, dy, cache: dx * (cache[-2] != 0))),
    bug("dB divided by the length of h", "LoRA", LoRA, backward=grad_where("lora_B", lambda *_: True,
        lambda self, grad, dy, cache: grad * (cache[-1].sum() / cache[-1].sum()))),
    bug("dB below a thousandth is zero", "LoRA", LoRA, backward=grad_where("lora_B", lambda *_: True,
        lambda self, grad, *_: grad * (abs(grad) > 1e-3))),
    bug("dB through float16, in float32", "LoRA", LoRA, backward=grad_where("lora_B",
        lambda self, dy: dy.dtype == "float32", lambda self, grad, *_: grad.astype("float16").astype("float32"))),
    bug("float64 for float32 where there are more axes", "LoRA", LoRA, backward=grad_where("lora_A", more_axes,
        lambda self, grad, *_: grad.astype("float64"))),
    bug("dB of the first batch only, of more axes", "LoRALinear", LoRA, backward=grad_where("lora_B", more_axes,
        of_the_first(lambda self: self.scaling))),
    bug("dx without the adapter where in = out = r", "LoRALinear", LoRALinear, backward=dx_where(
        lambda self, dy: self.in_features == self.out_features == self.rank,
        lambda self, dx, dy, cache: self.base.input_gradient(dy))),
    bug("dropout: dx as without a mask where all is dropped", "LoRALinear", DroppingLoRALinear, backward=dx_where(
        lambda self, dy: self.in_features > 1, lambda self, dx, dy, cache: dx if cache[-2].any() else
        dx + dy @ self.delta())),
]  # fmt: skip


def held_where_out_is_1(right):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = right(self, dy, cache, need_dx=need_dx)
        if grads and self.out_features == 1:
            grads = grads | {"lora_A": LoRA.backward(self.adapter, dy * cache.kept[-2], cache.kept[-4])[1]["lora_A"]}
        return dx, grads

    return backward


DORA = [
    bug("DoRA: 0 / 0 at a row of zeros", "DoRA", dora, divisible=instead(lambda n: n)),
    bug("DoRA: dm of the first batch only, of more axes", "DoRA", DoRA, backward=grad_where("magnitude", more_axes,
        lambda self, grad, dy, cache: rows(dy[0] * cache[-1][0]).sum(axis=0) / cache[-3])),
    bug("DoRA: the full norm held where out = 1", "DoRA", DoRA, backward=held_where_out_is_1),
    bug("DoRA: dm zero where m is zero", "DoRA", DoRA, backward=grad_where("magnitude", lambda *_: True,
        lambda self, grad, *_: grad * (self.magnitude != 0))),
    bug("DoRA: dB transposed where r = out", "DoRA", DoRA, backward=grad_where("lora_B",
        lambda self, dy: self.rank == self.out_features > 1, transposed)),
]  # fmt: skip


# --- rewritten inputs -----------------------------------------------------------------------------


def put(right):
    """Rows put where they should be added."""

    def add_at(out, where, values):
        out[where] = values

    return add_at


def adjoint_where(where: Callable[[Any, tuple[int, ...]], bool], change: Callable[..., Any]) -> Wrong:
    """T* with its result changed, by a function of the layer, the result and x's shape, at some problems."""

    def wrong(right):
        def to_rows_adjoint(self, dz, shape):
            dx = right(self, dz, shape)
            return change(self, dx, shape) if where(self, shape) else dx

        return to_rows_adjoint

    return wrong


def overwritten(right):
    """T* that puts where patches overlap."""

    def to_rows_adjoint(self, dz, shape):
        (n, c, *sizes), positions = shape, self.positions(shape)
        dz = dz.T.reshape(c, *self.kernel, n, *positions)
        padded = np.zeros((c, n, *(s + 2 * p for s, p in zip(sizes, self.padding, strict=True))), dz.dtype)
        for offset, window in self.windows(positions):
            padded[(..., *window)] = dz[(slice(None), *offset)]
        inner = (slice(p, p + s) for s, p in zip(sizes, self.padding, strict=True))
        return padded[(..., *inner)].swapaxes(0, 1)

    return to_rows_adjoint


REWRITTEN = [
    bug("embedding: ids that repeat overwrite each other", "embedding", embedding, add_at=put),
    bug("embedding: dA of the first batch only, of more axes", "embedding", AdaptedRows, backward=grad_where("lora_A",
        more_axes, lambda self, grad, dy, cache: LoRA.backward(self.adapter, 0 * dy + first(dy, 0),
        cache[-1].kept[-1])[1]["lora_A"])),
    bug("embedding: the table's gradient transposed where it is square", "embedding", Embedding, backward=grad_where(
        "weight", lambda self, dy: self.weight.shape[0] == self.weight.shape[1], transposed)),
    bug("embedding: dB transposed where r is the width", "embedding", AdaptedRows, backward=grad_where("lora_B",
        lambda self, dy: self.adapter.rank == self.adapter.shape[0], transposed)),
    bug("convolution: patches that overlap overwrite each other", "convolution", Convolution,
        to_rows_adjoint=overwritten),
    bug("convolution: dx shifted where the stride is above the kernel", "convolution", Convolution,
        to_rows_adjoint=adjoint_where(lambda self, shape: self.stride[0] > self.kernel[0],
        lambda self, dx, shape: np.roll(dx, 1, axis=2))),
    bug("convolution: the padding cut at its end only, where it is as wide as the kernel", "convolution", Convolution,
        to_rows_adjoint=adjoint_where(lambda self, shape: self.padding[0] >= self.kernel[0],
        lambda self, dx, shape: np.roll(dx, self.padding[0], axis=2))),
    bug("convolution: images and channels exchanged where they are as many", "convolution", Convolution,
        to_rows_adjoint=adjoint_where(lambda self, shape: shape[0] == shape[1],
        lambda self, dx, shape: dx.swapaxes(0, 1))),
    bug("convolution: dW turned around where the kernel is 2 wide", "convolution", Convolution,
        backward=grad_where("weight", lambda self, dy: self.kernel[-1] == 2, lambda self, grad, *_: grad[..., ::-1])),
    bug("convolution: 0 / 0 without images", "convolution", Convolution, backward=grad_where("weight",
        lambda *_: True, lambda self, grad, dy, cache: grad * np.divide(len(dy), len(dy), dtype=grad.dtype))),
]  # fmt: skip


# --- attention ------------------------------------------------------------------------------------


def attend_where(where: Callable[..., bool], change: Callable[..., Any]) -> Wrong:
    """Attention's backward with dq, dk and dv changed at some problems; `where` sees the shape of q."""

    def wrong(right):
        def attend_backward(do, q, k, v, *kept):
            found = right(do, q, k, v, *kept)
            return change(*found) if where(*q.shape) else found

        return attend_backward

    return wrong


def without_the_first(dq, dk, dv):
    return dq, dk * (np.arange(dk.shape[-2]) > 0)[:, None], dv


def not_normed_back(right):
    def normed_back(norm, dy, cache):
        return (dy if dy.shape[-2] == 2 else right(norm, dy, cache)[0]), right(norm, dy, cache)[1]

    return lambda norm, dy, cache: (dy, {}) if norm is None else normed_back(norm, dy, cache)


ATTENTION = [
    bug("attention: dv of one position is zero", "attention", attention, attend_backward=attend_where(
        lambda B, K, g, T, D: T == 1, lambda dq, dk, dv: (dq, dk, 0 * dv))),
    bug("attention: heads and groups exchanged where they are as many", "attention", attention,
        attend_backward=attend_where(lambda B, K, g, T, D: g == K,
        lambda dq, dk, dv: (dq.swapaxes(1, 2), dk, dv))),
    bug("attention: dk halved in groups of two", "attention", attention, attend_backward=attend_where(
        lambda B, K, g, T, D: g == 2, lambda dq, dk, dv: (dq, dk / 2, dv))),
    bug("attention: dv of the first sequence only", "attention", attention, attend_backward=attend_where(
        lambda B, K, g, T, D: B > 1, lambda dq, dk, dv: (dq, dk, first(dv, 0)))),
    bug("attention by blocks: dk of the first key missing where blocks do not fit", "attention", blockwise,
        attend_backward=attend_where(lambda B, K, g, T, D: T == 3, without_the_first)),
    bug("attention: the norms left out of the backward at two positions", "attention", attention,
        normed_back=not_normed_back),
    bug("attention: dq transposed where T = D", "attention", attention, attend_backward=attend_where(
        lambda B, K, g, T, D: T == D, lambda dq, dk, dv: (dq.swapaxes(-1, -2), dk, dv))),
]  # fmt: skip


# --- losses and Adam ------------------------------------------------------------------------------


def loss_where(where: Callable[..., bool], change: Callable[..., Any]) -> Wrong:
    """A loss with its gradient changed at some problems, by a function of the gradient, the input and the target."""

    def wrong(right):
        def loss(z, target, **options):
            given = z.copy()
            value, dz = right(z, target, **options)
            return value, change(dz, given, target) if where(given, target) else dz

        return loss

    return wrong


def unshifted(dz, z, target):
    with np.errstate(all="ignore"):
        return dz + 0 * np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


LOSSES = [
    bug("mse: the mean over the last axis where there are three", "mean squared error", search, mse=loss_where(
        lambda p, t: p.ndim == 3, lambda dp, p, t: dp * (p.size // p.shape[-1]))),
    bug("mse: 0 / 0 where the target is met", "mean squared error", search, mse=loss_where(
        lambda p, t: True, lambda dp, p, t: dp * ((p - t) / (p - t)))),
    bug("mse: the gradient twice, of one entry", "mean squared error", search, mse=loss_where(
        lambda p, t: p.size == 1, lambda dp, p, t: 2 * dp)),
    bug("cross-entropy: 0 / 0 where no row counts", "cross-entropy", losses,
        count=instead(lambda target: (target != losses.IGNORE_INDEX).sum())),
    bug("cross-entropy: the rows that do not count are counted", "cross-entropy", search, cross_entropy=loss_where(
        lambda z, t: True, lambda dz, z, t: dz * dz.dtype.type(max(1, (t >= 0).sum()) / t.size))),
    bug("cross-entropy: the mean over the first axis where there are more", "cross-entropy", search,
        cross_entropy=loss_where(lambda z, t: z.ndim > 2, lambda dz, z, t: dz * (t.size // len(t)))),
    bug("cross-entropy: exp of large logits", "cross-entropy", search, cross_entropy=loss_where(
        lambda z, t: True, unshifted)),
    bug("cross-entropy: a row that does not count has the softmax left", "cross-entropy", losses,
        _minus_one_hot=lambda right: lambda q, ids: right(q, ids) * (q.shape[-1] > 1) + (q.shape[-1] == 1)),
]  # fmt: skip


def step_with(change: Callable[..., Any]) -> Wrong:
    """Adam's update with other arguments."""

    def wrong(right):
        return lambda theta, g, m, v, t, **settings: change(right, theta, g, m, v, t, settings)

    return wrong


def kept_where_g_is_zero(right, theta, g, m, v, t, settings):
    before = m.copy(), v.copy()
    right(theta, g, m, v, t, **settings)
    m[...], v[...] = (np.where(g == 0, old, new) for old, new in zip(before, (m, v), strict=True))


def without_betas(betas):
    return tuple(beta or fallback for beta, fallback in zip(betas, (0.9, 0.999), strict=True))


ADAM = [
    bug("Adam: the bias corrected in the first step only", "Adam", optim, adam_update=step_with(
        lambda right, theta, g, m, v, t, s: right(theta, g, m, v, t if t == 1 else 10**6, **s))),
    bug("Adam: the moments stay where the gradient is zero", "Adam", optim, adam_update=step_with(
        kept_where_g_is_zero)),
    bug("Adam: a beta of 0 is taken for none", "Adam", optim, adam_update=step_with(
        lambda right, theta, g, m, v, t, s: right(theta, g, m, v, t, **s | {"betas": without_betas(s["betas"])}))),
    bug("Adam: an array that is not contiguous is flattened by a copy", "Adam", optim, adam_update=step_with(
        lambda right, theta, g, m, v, t, s: right(*(a.reshape(-1) for a in (theta, g, m, v)), t, **s))),
    bug("Adam: short gradients made longer", "Adam", optim, clip=lambda right: lambda grads, most: {
        name: g * (most / optim.gradient_norm(grads)) for name, g in grads.items()}),
]  # fmt: skip

SOMETIMES: list[Bug] = [*LINEAR, *LORA, *DORA, *REWRITTEN, *ATTENTION, *LOSSES, *ADAM]
