"""Adapters that read the same input: one product in the place of several thin ones, the same numbers up to rounding.

q, k and v of attention read one x, and so do gate and up of an MLP. Layer j of them is a `LoRALinear` with factors of
its own:

    h_j = x A_j^T                                        (1)
    y_j = x W_j^T + b_j + s_j h_j B_j^T                  (2), (11)

Put the A_j one below the other, A (R, in) with R = r_1 + r_2 + ..., and the h_j side by side, h (N, R). Then (1) of all
layers is one product, and (5) another. In dx layer j adds s_j dy_j B_j A_j, and a product sums over j as well:

    h = x A^T                      (proj.1)    (N, R)
    dh_j = s_j dy_j B_j            (proj.2)    (N, r_j)    (4) of each layer; side by side they are dh (N, R)
    dA = dh^T x                    (proj.3)    (R, in)     dA_j has the rows in dA that A_j has in A
    dx = dh A + sum_j dy_j W_j     (proj.4)    (N, in)

A step of a language model that shares these products does not go through `LoRA.forward` and `LoRA.backward` in q, k, v,
gate and up. To experiment with those methods, take the pages' layers, `Attention` and `GatedMLP`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any, ClassVar

from ..backend import backend_of
from ..checks import Array
from ..layer import Arrays, Caches, Layer, check_cache, nest
from ..layers.gated import GatedMLP
from ..lora import LoRA, LoRALinear, widen
from ..variants.adapter import Adapter


class SameInput:
    """The methods `project` and `project_backward` with shared products. It stands before the page's class."""

    projections: ClassVar[tuple[str, ...]]  # the names of the layers that read x

    def project(self, x: Array) -> tuple[Arrays, Caches]:  # (N, in) -> (N, out_j) of each
        """Return the output of each layer that reads x, and the caches."""
        layers = {name: getattr(self, name) for name in self.projections}
        return project(layers, x) if can_share(layers) else super().project(x)  # type: ignore[misc]

    def project_backward(self, dys: Arrays, caches: Caches, *, need_dx: bool) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (N, in), and the gradients of these layers."""
        layers = {name: getattr(self, name) for name in self.projections}
        if not can_share(layers):
            return super().project_backward(dys, caches, need_dx=need_dx)  # type: ignore[misc, no-any-return]
        return project_backward(layers, dys, caches, need_dx=need_dx)


@dataclass(eq=False, repr=False)
class SameInputMLP(SameInput, GatedMLP):
    """A gated MLP in which the adapters of gate_proj and up_proj share their products."""

    projections = ("gate_proj", "up_proj")


def can_share(layers: Mapping[str, Any]) -> bool:
    """Return whether each of these is a `LoRALinear` whose adapter trains, and computes as its class does."""
    return all(_is_plain(layer, LoRALinear) and _is_plain(layer.adapter, LoRA, Adapter) for layer in layers.values())


def _is_plain(layer: Layer, *classes: type) -> bool:
    """Return whether a layer trains, is of one of these classes, and has no `forward` or `backward` of its own."""
    return type(layer) in classes and not layer.frozen and vars(layer).keys().isdisjoint(("forward", "backward"))


def project(layers: Mapping[str, LoRALinear], x: Array) -> tuple[Arrays, Caches]:  # (N, in) -> (N, out_j) of each
    """Return the layers' outputs, and the caches that they would return themselves."""
    ys, caches, A = [], [], stacked_A(layers)
    h = x @ A.T  # eq. (proj.1)  (N, R)
    for layer, place in zip(layers.values(), places(layers), strict=True):
        adapter, h_j = layer.adapter, h[:, place]
        y = layer.base(x) + widen(adapter.scaling * h_j, adapter.lora_B.T)  # (2), (11)
        ys.append(y)
        caches.append((layer, y.shape, (adapter, y.shape, x, h_j)))
    return tuple(ys), tuple(caches)


def project_backward(
    layers: Mapping[str, LoRALinear], dys: Arrays, caches: Caches, *, need_dx: bool
) -> tuple[Array | None, dict[str, Array]]:
    """Return dx (N, in), and the gradients of all factors, by the layers' names."""
    of_layers = zip(layers.values(), dys, caches, strict=True)
    kept = [check_cache(layer.adapter, dy, *check_cache(layer, dy, cache)) for layer, dy, cache in of_layers]
    x, dhs, dBs, dxs = kept[0][0], [], [], []
    for layer, dy, (_, h_j) in zip(layers.values(), dys, kept, strict=True):  # all that a dy is needed for, in turn
        B, s = layer.adapter.lora_B, layer.scaling
        dh_j = dy @ B * s  # eq. (proj.2)
        dhs.append(dh_j)
        dBs.append(dy.T @ h_j * s)  # (3)
        dxs.append(layer.base.input_gradient(dy) if need_dx else None)
    A, dh = stacked_A(layers), backend_of(x).xp.concatenate(dhs, axis=1)
    dA = dh.T @ x  # eq. (proj.3)  (R, in)
    dx = reduce(add, dxs, dh @ A) if need_dx else None  # eq. (proj.4)
    grads: dict[str, Array] = {}
    for name, place, dB in zip(layers, places(layers), dBs, strict=True):
        grads |= nest(name, {"lora_A": dA[place], "lora_B": dB})
    return dx, grads


def stacked_A(layers: Mapping[str, LoRALinear]) -> Array:  # -> (R, in)
    """Return A, the A_j one below the other."""
    factors = [layer.adapter.lora_A for layer in layers.values()]
    return backend_of(factors[0]).xp.concatenate(factors)


def places(layers: Mapping[str, LoRALinear]) -> list[slice]:
    """Return which rows of A are each layer's, and which columns of h and dh."""
    ends = list(accumulate(layer.rank for layer in layers.values()))
    return [slice(end - layer.rank, end) for layer, end in zip(layers.values(), ends, strict=True)]
