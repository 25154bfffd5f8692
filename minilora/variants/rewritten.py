"""LoRA on embeddings and convolutions: the input is rewritten, the adapter stays as it is.

An embedding is a linear layer on one-hot rows, a convolution one on patches: y = R(z W^T + b) with z = T(x), where T
rewrites the input and R only arranges rows as an output. An adapter of W is then LoRA, or a variant, on the rows z:

    u, cache = layer(z)    z = T(x)      (rw.1)    the variant's layer, such as `LoRALinear`, with the base's matrix
    y = R(u)                             (rw.2)    a rearrangement
    grads = backward at du = R*(dy)      (rw.3)    (3) to (5) on rows
    dx = T*(du V)                        (rw.4)    V (out, in), the merged matrix; T*, the adjoint of T

Base and adapter share one z: it is made once. (12) adds du W and s du B A, two arrays as large as z, where a kernel's
matrix is small; so (rw.4) adds the matrices first. T, T* and R are methods of the base: see `minilora.layers.embedding`
and `minilora.layers.convolution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checks import Array
from ..layer import Cache, Layer, check_cache
from ..layers.convolution import Convolution
from ..layers.embedding import Embedding
from ..lora import LoRA
from .variant import variant_of


@dataclass(eq=False, repr=False)
class Rewritten(Layer):
    """A frozen `Embedding`, `Conv1d` or `Conv2d` and the adapter of its matrix. Only the adapter trains."""

    base: Embedding | Convolution
    adapter: LoRA

    def __post_init__(self) -> None:
        if not hasattr(self.base, "rewrite"):
            raise TypeError(f"base must be an Embedding, a Conv1d or a Conv2d, got {type(self.base).__name__}")
        self.on_rows()

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return y and the cache."""
        layer = self.on_rows()
        u, cache = layer.forward(self.base.rewrite(x))  # eq. (rw.1)
        y = self.base.arrange(u, x.shape)  # eq. (rw.2)
        return y, (self, y.shape, x.shape, cache)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx, None for ids, and the gradients of the adapter."""
        shape, rows_cache = check_cache(self, dy, cache)
        layer, du, input_gradient = rows_cache[0], self.base.arrange_adjoint(dy), self.base.input_gradient
        _, grads = layer.backward(du, rows_cache, need_dx=False)  # eq. (rw.3)
        if not need_dx or input_gradient is None:
            return None, grads
        dx = input_gradient(du, layer.merge().weight, shape)  # eq. (rw.4)
        return dx, grads

    def on_rows(self) -> Any:
        """Return the same layer on rows that are rewritten already: as the adapter's variant stands beside a matrix."""
        return variant_of(self.adapter).beside(self.base.as_linear(), self.adapter)

    def merge(self) -> Embedding | Convolution:
        """Return one new layer of the base's class, with this layer's output up to rounding. Nothing is shared."""
        return self.base.from_linear(self.on_rows().merge())

    def delta(self) -> Array:  # -> (out, in)
        """Return the change of the base's matrix."""
        return self.on_rows().delta()

    def trainable(self) -> dict[str, Array]:
        """Return the adapter's arrays: the base is frozen by its absence."""
        return self.adapter.trainable()

    rank = property(lambda self: self.adapter.rank, doc="The adapter's.")
    scaling = property(lambda self: self.adapter.scaling, doc="The adapter's.")
