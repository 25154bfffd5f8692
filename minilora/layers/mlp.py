"""Sequences of layers, and the MLP: the chain rule along a list.

    x_0 = x,    x_i = f_i(x_{i-1})                     (seq.1)     y = x_n
    dx_{i-1}, grads_i = backward of f_i at dx_i        (seq.2)     dx_n = dy, from the last layer to the first

The dy of a layer is the dx of the layer above. Below the lowest layer that trains no dx is needed, so the backward
stops there.

The first model is two linear layers with an activation between them. Nothing new is derived:

    h = x W1^T + b1        (N, in)     -> (N, hidden)
    a = f(h)               (N, hidden) -> (N, hidden)
    y = a W2^T + b2        (N, hidden) -> (N, out)

Either linear layer can have an adapter, by its path: ``adapt(mlp, ["fc1"], rank=4, alpha=8, rng=rng)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Backend
from ..checks import Array, check_choice, check_instance, check_layer
from ..layer import Cache, Layer, members, nest, trains
from ..linear import Linear
from .activation import ACTIVATIONS


class Sequential(Layer):
    """Named layers, applied in the given order: ``Sequential(fc1=..., act=ReLU(), fc2=...)``."""

    def __init__(self, *unnamed: Layer, **layers: Layer) -> None:
        if unnamed:
            raise TypeError("Sequential takes its layers by name, as in Sequential(fc1=Linear(...), act=ReLU())")
        if not layers:
            raise ValueError("Sequential() has no layers: give at least one, by name, such as fc=Linear(...)")
        for name, layer in layers.items():
            check_instance(name, layer, Layer)
            if name in dir(type(self)):
                raise ValueError(f"a layer cannot be named {name!r}: every layer has an attribute of that name")
        vars(self).update(layers)

    @property
    def children(self) -> dict[str, Layer]:
        """The layers by name, in order."""
        return {name: part for name, part in members(self) if isinstance(part, Layer)}

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return the last layer's output, and a cache with the layers' caches."""
        caches = []
        for layer in self.children.values():
            x, cache = layer.forward(x)  # eq. (seq.1)
            caches.append(cache)
        return x, (caches,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx, and the gradients of every layer that trains, under its name."""
        (caches,) = cache
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


class MLP(Sequential):
    """``fc1``, ``act`` and ``fc2``, in this order."""

    fc1: Any  # a Linear, or its replacement by `adapt`
    act: Layer
    fc2: Any

    @classmethod
    def init(
        cls, in_features: int, hidden_features: int, out_features: int, *, activation: str = "relu",
        rng: np.random.Generator, dtype: Any = "float32", backend: Backend | None = None,
    ) -> MLP:  # fmt: skip
        """Initialise both layers like `Linear.init`, with "relu", "tanh" or "silu" between them.

        A width below 1, an unknown activation and an argument of another type are a ValueError or a TypeError.
        """
        check_layer(rng, dtype, in_features=in_features, hidden_features=hidden_features, out_features=out_features)
        act = ACTIVATIONS[check_choice("activation", activation, ACTIVATIONS)]()
        fc1 = Linear.init(in_features, hidden_features, rng=rng, dtype=dtype, backend=backend)
        fc2 = Linear.init(hidden_features, out_features, rng=rng, dtype=dtype, backend=backend)
        return cls(fc1=fc1, act=act, fc2=fc2)
