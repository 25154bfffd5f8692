"""Bugs by hand: something wrong in the place of a function of the package, where no change of one node makes it.

A row says in whose claims the bug shows (a case's name), and what stands in the place of which attributes of a class or
a module. `tests/test_mutants.py` plants each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from minilora import Conv2d, DoRA, Embedding, Linear, LoRA, LoRALinear, QuantizedLinear, Rotary
from minilora.layer import inner
from minilora.layers import attention, embedding, experts, gated, mixture, norm, rotary, router, stacked
from minilora.layers.rotary import rotate
from minilora.variants import stackedlora

Wrong = Callable[[Any], Any]
"""Takes what is right, returns what is wrong."""


@dataclass(frozen=True)
class Bug:
    """What is wrong, in whose claims that shows, and what stands in the place of attributes of a class or module."""

    name: str
    subject: str
    owner: Any
    wrong: Mapping[str, Wrong]

    @contextmanager
    def planted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, wrong in self.wrong.items():
                patch.setattr(self.owner, name, wrong(vars(self.owner).get(name, getattr(self.owner, name))))
            yield


def bug(name: str, subject: str, owner: Any, **wrong: Wrong) -> Bug:
    return Bug(name, subject, owner, wrong)


def instead(function: Any) -> Wrong:
    """This one, whatever is right."""
    return lambda right: function


def backward_becomes(change: Callable[..., tuple[Any, dict[str, np.ndarray]]]) -> Wrong:
    """A backward whose dx and gradients are changed, by a function of the layer, both, dy and the cache.

    A frozen layer's are not: that it has no gradients would be seen at once.
    """

    def wrong(right):
        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = right(self, dy, cache, need_dx=need_dx)
            return change(self, dx, grads, dy, cache) if grads else (dx, grads)

        return backward

    return wrong


def factors_become(change: Callable[[Any, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Wrong:
    """A backward whose dA and dB are changed, by a function of the layer and both."""
    return backward_becomes(
        lambda self, dx, grads, *_: (dx, dict(zip(grads, change(self, *grads.values()), strict=True)))
    )


def of_another_dy(other: Callable[[np.ndarray], np.ndarray]) -> Wrong:
    """A backward that takes dA from another dy."""

    def wrong(right):
        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = right(self, dy, cache, need_dx=need_dx)
            return dx, {**grads, **({"lora_A": right(self, other(dy), cache)[1]["lora_A"]} if grads else {})}

        return backward

    return wrong


def first(array: np.ndarray, axis: int) -> np.ndarray:
    """The first along an axis, and zero elsewhere."""
    found = np.zeros_like(array)
    place = tuple(slice(1) if i == axis % array.ndim else slice(None) for i in range(array.ndim))
    found[place] = array[place]
    return found


def number(array: np.ndarray, n: int) -> np.ndarray:
    """True at the entry of that number, counted row by row."""
    return np.arange(array.size).reshape(array.shape) == n % array.size


def added_up(self, dx, grads, *_):
    self.total = {name: getattr(self, "total", {}).get(name, 0) + grad for name, grad in grads.items()}
    return dx, self.total


def into_dy(self, dx, grads, dy, cache):
    dy *= self.scaling
    return dx, grads


def over_the_last_axis(self, dx, grads, dy, cache):
    dB = np.swapaxes(np.atleast_2d(dy), -1, -2) @ np.atleast_2d(cache.kept[-1]) * self.scaling
    return dx, grads | {"lora_B": dB}


def twice_dh(self, dx, grads, *_):
    return None if dx is None else 2 * dx, grads | {"lora_A": 2 * grads["lora_A"]}


BACKWARDS: dict[str, Wrong] = {
    "dA of the first row only": of_another_dy(lambda dy: first(dy, 0)),
    "one entry of dA off by a millionth": factors_become(
        lambda self, dA, dB: (np.where(number(dA, -1), dA + dA.dtype.type(1e-6), dA), dB)
    ),
    "an entry of dA missing, as behind a mask": factors_become(
        lambda self, dA, dB: (np.where(number(dA, 0), 0, dA), dB)
    ),
    "gradients added up over calls": backward_becomes(added_up),
    "gradient written into the caller's dy": backward_becomes(into_dy),
    "dA rounded to float32": factors_become(lambda self, dA, dB: (dA.astype(np.float32).astype(dA.dtype), dB)),
    "float64 returned for float32": factors_become(lambda self, dA, dB: (dA, dB * np.float64(1))),
    "only the last of the leading axes summed": backward_becomes(over_the_last_axis),
    "dh doubled, and with it dA and dx": backward_becomes(twice_dh),
    "dA transposed and put back into its shape": factors_become(lambda lora, dA, dB: (dA.T.reshape(dA.shape), dB)),
    "the cached h taken again through A": factors_become(lambda self, dA, dB: (dA, dB @ self.lora_A @ self.lora_A.T)),
    "dA from the factor B of one output only": of_another_dy(lambda dy: first(dy, -1)),
    "dA from the mean of dy over outputs": of_another_dy(lambda dy: dy.mean(axis=-1, keepdims=True) + 0 * dy),
}


def along_the_base(right):
    def backward(self, dy, cache, *, need_dx=True):
        with bug("", "", DoRA, direction=instead(lambda self: self.base.weight)).planted():
            return right(self, dy, cache, need_dx=need_dx)

    return backward


def adapter_alone_scaled(right):
    def forward(self, x):
        y, cache = right(self, x)
        return y + (1 - self.adapter.magnitude / self.norm()) * (x @ self.base.weight.T), cache

    return forward


def with_its_bases_bias(right):
    return lambda self: Linear(right(self).weight, self.base.bias)


def in_other_bytes(**change: Callable[[Any], Any]) -> Wrong:
    """The weight of a layer in NF4 that reads one of its own attributes otherwise."""

    def wrong(right):
        def weight(self):
            other = copy(self)
            vars(other).update({name: read(getattr(self, name)) for name, read in change.items()})
            return right.fget(other)

        return property(weight)

    return wrong


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


DORA, IN_FOUR_BITS = "linear with DoRA, norm full", "QuantizedLinear, scales of 8 bits, LoRA"
LINEAR = [
    bug("bias gradient forgotten", "Linear", Linear,
        backward=backward_becomes(lambda self, dx, grads, *_: (dx, without("bias")(grads)))),
    bug("the input handed back as its own gradient", "Linear", Linear,
        backward=backward_becomes(lambda self, dx, grads, dy, cache: (None if dx is None else cache.kept[0], grads))),
    bug("NF4: the halves of a byte are exchanged", IN_FOUR_BITS, QuantizedLinear,
        weight=in_other_bytes(packed=lambda packed: packed // 16 + packed % 16 * 16)),
    bug("NF4: the mean of the scales is not added", IN_FOUR_BITS, QuantizedLinear,
        weight=in_other_bytes(mean=lambda mean: 0.0)),
    bug("DoRA: magnitude left out of what trains", DORA, DoRA,
        trainable=lambda right: lambda self: without("magnitude")(right(self))),
    *(bug(name, "LoRA", LoRA, backward=wrong) for name, wrong in BACKWARDS.items()),
    bug("a merged layer shares its base's bias", "LoRALinear", LoRALinear, merge=with_its_bases_bias),
    bug("DoRA: the magnitude scales the adapter alone", DORA, DoRA, forward=adapter_alone_scaled),
    bug("DoRA: dV along W in the place of V", DORA, DoRA, backward=along_the_base),
]  # fmt: skip


def scatter(add: Callable[[np.ndarray, Any, np.ndarray], None]) -> dict[str, Wrong]:
    return {"add_at": instead(add)}


def overwriting(out, ids, values):
    out[ids] = values


def adding_repeats_once(out, ids, values):
    out[ids] += values


def mean_of_repeats(out, ids, values):
    np.add.at(out, ids, values / np.bincount(ids)[ids][:, None])


def first_is_padding(out, ids, values):
    np.add.at(out, ids, values)
    out[ids[0]] = 0


def without_the_last_offset(right):
    def to_rows_adjoint(self, dz, shape):
        dz = dz.reshape(-1, self.weight.shape[1], *self.kernel).copy()
        dz[:, :, -1, -1] = 0
        return right(self, dz.reshape(len(dz), -1), shape)

    return to_rows_adjoint


def overwriting_adjoint(self, dz, shape):
    n, c, *sizes = shape
    dz = dz.T.reshape(c, *self.kernel, n, *self.positions(shape))
    dx = np.zeros((c, n, *(s + 2 * p for s, p in zip(sizes, self.padding, strict=True))), dz.dtype)
    for offset, window in self.windows(self.positions(shape)):
        dx[(..., *window)] = dz[(slice(None), *offset)]
    inner = (slice(p, p + s) for s, p in zip(sizes, self.padding, strict=True))
    return dx[(..., *inner)].swapaxes(0, 1)


def exchanged(right):
    def __init__(self, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1):
        right(self, weight, bias, stride=dilation, padding=padding, dilation=stride, groups=groups)

    return __init__


def channel_last(z, channels):
    return z.reshape(len(z), channels, -1).swapaxes(1, 2).reshape(z.shape)


def channel_first(z, channels):
    return z.reshape(len(z), -1, channels).swapaxes(1, 2).reshape(z.shape)


def with_a_border(right):
    def to_rows(self, x):
        pads = ((0, 0), (0, 0), *((p, p) for p in self.padding))
        inner = Conv2d(self.weight, stride=self.stride, dilation=self.dilation)
        return right(inner, np.pad(x.real, pads, mode="edge"))

    return to_rows


def not_moved(self, y, shape):
    return y.reshape(shape[0], y.shape[-1], *self.positions(shape))


CHANNEL_LAST: dict[str, Wrong] = {
    "to_rows": lambda right: lambda self, x: channel_last(right(self, x), x.shape[1]),
    "to_rows_adjoint": lambda right: lambda self, dz, shape: right(self, channel_first(dz, shape[1]), shape),
}
SHIFTED = {"to_rows": lambda right: lambda self, x: right(self, (x + 1) % len(self.weight))}
REWRITING = [
    *(Bug(f"embedding: scatter, {add.__name__}", "embedding", embedding, scatter(add)) for add in
      (overwriting, adding_repeats_once, mean_of_repeats, first_is_padding)),
    Bug("embedding: columns of A for rows of another id", "embedding with LoRA", Embedding, SHIFTED),
    bug("convolution: overlapping patches overwrite each other in dx", "conv2d", Conv2d,
        to_rows_adjoint=instead(overwriting_adjoint)),
    bug("convolution: stride and dilation swapped", "conv2d", Conv2d, __init__=exchanged),
    Bug("convolution: patches with the channel last, the weight with it first", "conv2d", Conv2d, CHANNEL_LAST),
    bug("convolution: padded with the border in place of zeros", "conv2d", Conv2d, to_rows=with_a_border),
    bug("convolution: rows reshaped into images without moving the axis", "conv2d", Conv2d,
        from_rows=instead(not_moved)),
    bug("convolution: dx of the last offset missing", "conv2d", Conv2d, to_rows_adjoint=without_the_last_offset),
    bug("convolution: dx still shifted by the padding", "conv2d", Conv2d,
        to_rows_adjoint=lambda right: lambda self, dz, shape: np.roll(right(self, dz, shape), self.padding, (2, 3))),
]  # fmt: skip


def shares(axis: Any) -> dict[str, Wrong]:
    return {"softmax": instead(lambda z: np.exp(z) / np.exp(z).sum(axis=axis, keepdims=True))}


def last_expert_is_the_best(right):
    return lambda scores, k: right(scores, k)[:, [*range(k - 1), 0]]


def counts_further(right):
    def sort_by_expert(choice, count):
        order, place, counts = right(choice, count)
        return order, place, [counts[-1], *counts[:-1]]

    return sort_by_expert


def unsorted(right):
    return lambda choice, count: (np.arange(choice.size), np.arange(choice.size), right(choice, count)[2])


def order_for_inverse(right):
    return lambda choice, count: (right(choice, count)[0],) * 2 + right(choice, count)[2:]


def of_all_rows(dy, x, counts):
    return np.stack([dy.T @ x for _ in counts])


def mean_over_rows(right):
    return lambda dy, x, counts: right(dy, x, counts) / np.maximum(counts, 1)[:, None, None]


SLOW_B: dict[str, Wrong] = {
    "stacked_B": instead(lambda B, E: B.reshape(len(B), E, -1).swapaxes(0, 1)),
    "packed_B": instead(lambda B: B.swapaxes(0, 1).reshape(B.shape[1], -1)),
}
FAST_A: dict[str, Wrong] = {"stacked_A": instead(lambda A, E: A.reshape(-1, E, A.shape[1]).swapaxes(0, 1))}
A_BEFORE: dict[str, Wrong] = {"stacked_A": lambda right: lambda A, E: np.roll(right(A, E), 1, axis=0)}
MIXTURE, SHARED, ADAPTED = (f"MixtureOfExperts{more}" for more in ("", ", shared expert", ", LoRA"))
MIXTURES = [
    bug("router: a sigmoid, and no softmax", "Router", router, softmax=instead(lambda z: 1 / (1 + np.exp(-z)))),
    bug("router: the best expert in the last one's place", "Router", router, top_experts=last_expert_is_the_best),
    bug("router: the kept in the order of their numbers", "Router", router,
        top_experts=lambda right: lambda scores, k: np.sort(right(scores, k), axis=1)),
    bug("router: no gradient to the scores", "Router", router, softmax_back=instead(lambda p, dp: 0 * p)),
    bug("router: divided by the sum as by a constant", "Router", router,
        softmax_back=instead(lambda p, dp: p * dp - p * p * dp)),
    bug("experts: the counts of rows one expert further", MIXTURE, mixture, sort_by_expert=counts_further),
    bug("experts: rows are not gathered", MIXTURE, mixture, sort_by_expert=unsorted),
    bug("experts: the order in place of its inverse", MIXTURE, mixture, sort_by_expert=order_for_inverse),
    bug("experts: gate and up alternate", MIXTURE, experts, halves=instead(lambda c: (c[:, ::2], c[:, 1::2]))),
    bug("experts: dg from a mean", MIXTURE, mixture, inner=instead(lambda a, b: inner(a, b) / b.shape[-1])),
    bug("shared expert: not opened by its gate", SHARED, mixture, logistic=instead(lambda t: 1 + 0 * t)),
    bug("stack: the first expert's weight for all", MIXTURE, stacked,
        grouped_matmul=instead(lambda x, W, counts: x @ W[0].T)),
    bug("stack: dx by the first expert's weight", MIXTURE, stacked,
        grouped_matmul_dx=instead(lambda d, W, n: d @ W[0])),
    bug("stack: every expert has the gradient of all rows", MIXTURE, stacked, grouped_dw=instead(of_all_rows)),
    bug("stack: an expert's gradient is a mean over its rows", MIXTURE, stacked, grouped_dw=mean_over_rows),
    Bug("experts with LoRA: B with the expert as the slow index", ADAPTED, stackedlora, SLOW_B),
    bug("experts with LoRA: the gradient of B packed so", ADAPTED, stackedlora, packed_B=SLOW_B["packed_B"]),
    Bug("experts with LoRA: A with the expert as the fast index", ADAPTED, stackedlora, FAST_A),
    Bug("experts with LoRA: the A of the expert before", ADAPTED, stackedlora, A_BEFORE),
]  # fmt: skip


def halves(x):
    return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)


def neighbours(x):
    return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)


def on_heads(change: Callable[[Any], Any]) -> Wrong:
    """A function of each row's angles that is changed."""
    return lambda right: lambda self, x, start: change(right(self, x, start))


def masked(later: Callable[[Any, Any], Any], value: float = -np.inf) -> dict[str, Wrong]:
    """A mask that hides `later(u, t)`."""

    def mask(S, T):
        U = S.shape[-1]
        S.reshape(*S.shape[:2], -1, T, U)[..., later(np.arange(U), np.arange(T)[:, None])] = value
        return S

    return {"mask": instead(mask)}


def interleaved(self, x, T):
    D = self.rotary.in_features
    K = self.k_proj.out_features // D
    return x.reshape(len(x) // T, T, x.shape[1] // (K * D), K, D).transpose(0, 3, 2, 1, 4)


def of_the_last_head(name: str) -> Wrong:
    """What the last head of a group adds to its keys' gradient, and not the sum over the heads."""
    place = ("q", "k", "v").index(name)

    def wrong(right):
        def attend_backward(do, q, k, v, P):
            T, found = q.shape[-2], list(right(do, q, k, v, P))
            found[place] = right(do[:, :, -1:], q[:, :, -1:], k, v, P[:, :, -T:])[place]
            return found

        return attend_backward

    return wrong


def queries_turned_again(right):
    def attend_backward(self, do, q, k, v, P):
        dq, dk, dv = right(self, do, q, k, v, P)
        return rotate(dq, *self.rotary.angles(dq, 0)), dk, dv

    return attend_backward


def gate_and_up(right):
    def gate(act, a, b):
        z, p, u = right(act, b, a)
        return z, u, p

    return gate


ONE_NORM = lambda norm, heads: (heads / np.sqrt((heads**2).mean(axis=(1, 2, 4), keepdims=True) + 0.3), None)  # noqa: E731
NEIGHBOURS: dict[str, Wrong] = {"rotate": lambda right: lambda x, cos, sin: neighbours(right(halves(x), cos, sin))}
ATTENTION, NORMED = "Attention", "Attention, q and k normed"
LANGUAGE = [
    bug("RMSNorm: the mean over rows", "RMSNorm", norm, inner=instead(lambda a, b: (a * b).sum(axis=0, keepdims=True))),
    Bug("rotary: neighbours paired in place of halves", "Rotary", rotary, NEIGHBOURS),
    bug("rotary: turned the other way", "Rotary", Rotary, angles=on_heads(lambda cos_sin: (cos_sin[0], -cos_sin[1]))),
    bug("rotary: positions from 1", "Rotary", Rotary, angles=lambda right: lambda self, x, s: right(self, x, s + 1)),
    bug("rotary: the exponent -j/D in place of -2j/D", "Rotary", rotary,
        _angles=lambda right: lambda f, *more: right(tuple(v**0.5 for v in f), *more)),
    Bug("attention: the next position is seen", ATTENTION, attention, masked(lambda u, t: u > t + 1)),
    Bug("attention: its own position is hidden", ATTENTION, attention, masked(lambda u, t: (u >= t) & (t > 0))),
    Bug("attention: the mask transposed", ATTENTION, attention, masked(lambda u, t: u < t)),
    Bug("attention: masked scores 0 in place of minus infinity", ATTENTION, attention, masked(lambda u, t: u > t, 0)),
    Bug("attention: the sum of all shares in place of each row's", ATTENTION, attention, shares((-1, -2))),
    bug("attention: dk of a group's last head alone", ATTENTION, attention, attend_backward=of_the_last_head("k")),
    bug("attention: dv of a group's last head alone", ATTENTION, attention, attend_backward=of_the_last_head("v")),
    bug("attention: head h asks key h modulo K", ATTENTION, attention.Attention, split=instead(interleaved),
        join=lambda right: lambda self, heads: right(self, heads.swapaxes(1, 2))),
    bug("attention: the gradient of the queries not turned back", ATTENTION, attention.Attention,
        attend_backward=queries_turned_again),
    bug("attention: one norm over all heads", NORMED, attention, normed=instead(ONE_NORM)),
    bug("attention: the norms passed over in the backward", NORMED, attention,
        normed_back=lambda right: lambda norm, dy, cache: (dy, right(norm, dy, cache)[1])),
    bug("gated MLP: gate and up exchanged", "GatedMLP", gated, gate=gate_and_up),
]  # fmt: skip

BUGS: list[Bug] = [*LINEAR, *REWRITING, *MIXTURES, *LANGUAGE]
