"""Layers one after another: the chain rule along a list.

    x_0 = x,    x_i = f_i(x_{i-1})                     (seq.1)     y = x_n
    dx_{i-1}, grads_i = backward of f_i at dx_i        (seq.2)     dx_n = dy, from the last layer to the first

What arrives at a layer as dy is what the layer above it returned as dx. Below the lowest layer that trains nobody asks
for dx, so the walk down stops there.
"""

from __future__ import annotations

from ..checks import Array, check_cache, check_children
from ..layer import Cache, Layer, nest


class Sequential(Layer):
    """Named layers, applied in the order in which they are given: ``Sequential(fc1=..., act=ReLU(), fc2=...)``."""

    def __init__(self, **layers: Layer) -> None:
        check_children(layers, Layer, reserved=dir(type(self)))
        vars(self).update(layers)

    @property
    def children(self) -> dict[str, Layer]:
        """The layers by name, in order."""
        return {name: layer for name, layer in vars(self).items() if isinstance(layer, Layer)}

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
            (name, layer), below = layers[i], [lower for _, lower in layers[:i]]
            asked = need_dx or any(lower.trainable() for lower in below)
            dx, found = layer.backward(dx, caches[i], need_dx=asked)  # eq. (seq.2)
            grads |= nest(name, found)
            if not asked:
                break
        return dx, {name: grads[name] for name in self.trainable()}
