"""Layers one after another: the chain rule along a list.

    x_0 = x,    x_i = f_i(x_{i-1})                     (seq.1)     y = x_n
    dx_{i-1}, grads_i = backward of f_i at dx_i        (seq.2)     dx_n = dy, from the last layer to the first

What arrives at a layer as dy is what the layer above it returned as dx. Below the lowest layer that trains nobody asks
for dx, so the walk down stops there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..checks import Array, check_instance
from ..layer import Cache, Layer, check_cache, nest, parts, trains


class Sequential(Layer):
    """Named layers, applied in the order in which they are given: ``Sequential(fc1=..., act=ReLU(), fc2=...)``."""

    def __init__(self, **layers: Layer) -> None:
        _check_children(layers, reserved=dir(type(self)))
        vars(self).update(layers)

    @property
    def children(self) -> dict[str, Layer]:
        """The layers by name, in order."""
        return {name: part for name, part in parts(self) if isinstance(part, Layer)}

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return what the last layer makes of it, and a cache with theirs."""
        caches = []
        for layer in self.children.values():
            x, cache = layer.forward(x)  # eq. (seq.1)
            caches.append(cache)
        return x, (self, x.shape, caches)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx, and the gradients of every layer that trains, under its name."""
        (caches,) = check_cache(self, dy, cache)
        layers, dx = list(self.children.items()), dy
        grads: dict[str, Array] = {}
        for i in reversed(range(len(layers))):
            name, layer = layers[i]
            below = need_dx or trains(*(lower for _, lower in layers[:i]))
            dx, of_layer = layer.backward(dx, caches[i], need_dx=below)  # eq. (seq.2)
            grads |= nest(name, of_layer)
            if not below:
                break
        return dx, {name: grads[name] for name in self.trainable()}


def _check_children(layers: Mapping[str, Any], reserved: Collection[str]) -> None:
    """Refuse a model's children that are no layers, or whose names are taken or no part of a path."""
    if not layers:
        raise ValueError("Sequential() has no layers: give at least one, by name, such as fc=Linear(...)")
    for name, layer in layers.items():
        check_instance(name, layer, Layer)
        if name in reserved:
            raise ValueError(f"a layer cannot be named {name!r}: every layer has an attribute of that name")
