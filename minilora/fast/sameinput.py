"""Adapters that read the same input: one product in the place of several thin ones, and the same numbers.

q, k and v of attention read one x, and so do gate and up of an MLP. Layer j of them is a `LoRALinear` with factors of
its own:

    h_j = x A_j^T                                        (1)
    y_j = x W_j^T + b_j + s_j h_j B_j^T                  (2), (11)

Put the A_j one below the other, A (R, in) with R = r_1 + r_2 + ..., and the h_j side by side, h (N, R). Then (1) of all
layers is one product, and (5) another. In dx layer j adds s_j dy_j B_j A_j, and a product sums over j as well:

    h = x A^T                                 (read.1)    (N, R)
    dh_j = s_j dy_j B_j                       (read.2)    (N, R)     (4) of each layer, side by side in dh
    dA = dh^T x                               (read.3)    (R, in)    dA_j is those of its rows that A_j is of A
    dx = dh A + sum_j dy_j W_j                (read.4)    (N, in)

A product with 8 columns takes the BLAS nearly as long as one with 24, since it goes through all of x either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from operator import iadd
from typing import Any, ClassVar

from ..backend import backend_of
from ..checks import Array
from ..layer import Arrays, Caches, Layer, check_cache
from ..layers.gated import GatedMLP
from ..lora import LoRA, LoRALinear, widen
from ..variants.adapter import Adapter


class SameInput:
    """What a page's layer needs besides: its methods `read` and `read_backward`, for several adapters at once."""

    readers: ClassVar[tuple[str, ...]]  # the names of the layers that read x

    def read(self, x: Array) -> tuple[Arrays, Caches]:  # (N, in) -> (N, out_j) of each
        """Return the outputs of all that reads x, and the caches."""
        layers = {name: getattr(self, name) for name in self.readers}
        return read(layers, x) if can_share(layers) else super().read(x)  # type: ignore[misc]

    def read_backward(self, dys: Arrays, caches: Caches, *, need_dx: bool) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (N, in), and the gradients of these layers."""
        layers = {name: getattr(self, name) for name in self.readers}
        if not can_share(layers):
            return super().read_backward(dys, caches, need_dx=need_dx)  # type: ignore[misc, no-any-return]
        return read_backward(layers, dys, caches, need_dx=need_dx)


@dataclass(eq=False, repr=False)
class SameInputMLP(SameInput, GatedMLP):
    """A gated MLP in which the adapters of gate_proj and up_proj share their products."""

    readers = ("gate_proj", "up_proj")


def can_share(layers: Mapping[str, Any]) -> bool:
    """Return whether all of these are a `LoRALinear` whose adapter trains, and none has a way of its own to compute."""
    return all(_is_plain(layer, LoRALinear) and _is_plain(layer.adapter, LoRA, Adapter) for layer in layers.values())


def _is_plain(layer: Layer, *classes: type) -> bool:
    """Return whether a layer that trains is of one of these classes, and its methods are those of the class."""
    return type(layer) in classes and not layer.frozen and vars(layer).keys().isdisjoint(("forward", "backward"))


def read(layers: Mapping[str, LoRALinear], x: Array) -> tuple[Arrays, Caches]:  # (N, in) -> (N, out_j) of each
    """Return the layers' outputs, and the caches that they would return themselves."""
    ys, caches, A = [], [], stacked(layers)
    h = x @ A.T  # eq. (read.1)  (N, R)
    for layer, columns in zip(layers.values(), places(layers), strict=True):
        adapter, h_j = layer.adapter, h[:, columns]
        y = iadd(widen(adapter.scaling * h_j, adapter.lora_B.T), layer.base(x))  # (2), (11)
        ys.append(y)
        caches.append((layer, y.shape, (adapter, y.shape, x, h_j)))
    return tuple(ys), tuple(caches)


def read_backward(
    layers: Mapping[str, LoRALinear], dys: Arrays, caches: Caches, *, need_dx: bool
) -> tuple[Array | None, dict[str, Array]]:
    """Return dx (N, in), and the gradients of all factors, by the layers' names."""
    of_layers = zip(layers.values(), dys, caches, strict=True)
    kept = [check_cache(layer.adapter, dy, *check_cache(layer, dy, cache)) for layer, dy, cache in of_layers]
    A, x, dxs, grads = stacked(layers), kept[0][0], [], {}
    dh = backend_of(x).xp.empty((len(x), len(A)), x.dtype)
    for (name, layer), dy, (_, h_j), columns in zip(layers.items(), dys, kept, places(layers), strict=True):
        B, s = layer.adapter.lora_B, layer.scaling
        dh[:, columns] = dy @ B * s  # eq. (read.2)
        grads[f"{name}.lora_B"] = dy.T @ h_j * s  # (3)
        dxs.append(layer.base.input_gradient(dy) if need_dx else None)
    dA = dh.T @ x  # eq. (read.3)  (R, in)
    dx = reduce(iadd, dxs, dh @ A) if need_dx else None  # eq. (read.4)
    grads |= {f"{name}.lora_A": dA[part] for name, part in zip(layers, places(layers), strict=True)}
    return dx, grads


def stacked(layers: Mapping[str, LoRALinear]) -> Array:  # -> (R, in)
    """Return A, the A_j one below the other."""
    factors = [layer.adapter.lora_A for layer in layers.values()]
    return backend_of(factors[0]).xp.concatenate(factors)


def places(layers: Mapping[str, LoRALinear]) -> list[slice]:
    """Return where each layer's part of A's rows is, and of the columns of h and dh."""
    ends = list(accumulate(layer.rank for layer in layers.values()))
    return [slice(end - layer.rank, end) for layer, end in zip(layers.values(), ends, strict=True)]
