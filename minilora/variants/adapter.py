"""An adapter that knows its kind of layer: a linear layer, an embedding or a convolution.

An embedding is a linear layer on one-hot rows, a convolution one on patches: y = R(z W^T + b) with z = T(x), where T
rewrites the input and R only arranges rows as an output. An adapter of W is then LoRA, or a variant, on the rows z:

    u, cache = layer(z)    z = T(x)      (rw.1)    the adapter's layer, such as `LoRALinear`, with the base's matrix
    y = R(u)                             (rw.2)    a rearrangement
    grads = backward at du = R*(dy)      (rw.3)    (3) to (5) on rows
    dx = T*(du V)                        (rw.4)    V (out, in), the merged matrix; T*, the adjoint of T

Base and adapter share one z: it is made once. (12) adds du W and s du B A, two arrays as large as z, where a kernel's
matrix is small; so (rw.4) adds the matrices first. T, T* and R are methods of the base: see `minilora.layers.embedding`
and `minilora.layers.convolution`.

For an embedding `in` is V and `out` is dim; for a convolution `in` is C times the kernel's size, channel first.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields
from typing import Any

from ..adapted import Adapted
from ..checks import Array, check_choice, check_flag, check_instance, check_shape, is_array
from ..layer import Cache, Layer
from ..layers.convolution import Conv1d, Conv2d, Convolution
from ..layers.embedding import Embedding
from ..layers.stacked import StackedLinear
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from .scaling import scaling
from .stackedlora import StackedLoRA, StackedLoRALinear

LAYER_KINDS: dict[str, type[Layer]] = {"linear": Linear, "embedding": Embedding, "conv1d": Conv1d, "conv2d": Conv2d}


@dataclass(eq=False, repr=False)
class Adapter(LoRA):
    """Two factors for the matrix of any layer: lora_A (r, in), lora_B (out, r). `alpha` is PEFT's ``lora_alpha``.

    Arrays that do not fit together, an unknown kind, and an alpha out of range are a ValueError or a TypeError.
    """

    kind: str = "linear"  # or "embedding", "conv1d", "conv2d"
    kernel: tuple[int, ...] = ()  # a convolution's kernel sizes
    use_rslora: bool = False  # whether the scaling is alpha / sqrt(r) instead of alpha / r
    start: LoRA | None = None  # frozen: PiSSA's factors before training

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("kind", self.kind, LAYER_KINDS)
        if not isinstance(self.kernel, tuple):
            raise TypeError(f"kernel must be a tuple of sizes, one for each axis, got {self.kernel!r}")
        self.use_rslora = check_flag("use_rslora", self.use_rslora)
        if self.start is not None:
            check_instance("start", self.start, LoRA)
            check_shape("start.lora_A", self.start.lora_A, self.lora_A.shape)
            check_shape("start.lora_B", self.start.lora_B, self.lora_B.shape)

    @property
    def scaling(self) -> float:
        """The factor s: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        return scaling(self.alpha, self.rank, use_rslora=self.use_rslora)

    def over(self, base: Linear) -> Layer:
        """Return the adapted layer of a base with this adapter. A variant may override it."""
        return LoRALinear(base, self)

    def __repr__(self) -> str:
        """Omit default fields: for a plain adapter, all except the factors and alpha."""
        brief = copy(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_array(value) and value == field.default:
                del vars(brief)[field.name]
        return super(Adapter, brief).__repr__()


@dataclass(eq=False, repr=False)
class AdaptedRows(Adapted):
    """A frozen `Embedding`, `Conv1d` or `Conv2d` with an adapter of its matrix. Only the adapter trains."""

    base: Embedding | Convolution
    adapter: LoRA

    def __post_init__(self) -> None:
        self.on_rows()  # this requires that they fit

    def forward(self, x: Array) -> tuple[Array, Cache]:
        """Return y and the cache."""
        layer = self.on_rows()
        u, cache = layer.forward(self.base.to_rows(x))  # eq. (rw.1)
        y = self.base.from_rows(u, x.shape)  # eq. (rw.2)
        return y, (x.shape, cache)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (None for ids) and the gradients of the adapter."""
        shape, rows_cache = cache
        layer, du, input_gradient = rows_cache.layer, self.base.from_rows_adjoint(dy), self.base.input_gradient
        _, grads = layer.backward(du, rows_cache, need_dx=False)  # eq. (rw.3)
        if not need_dx or input_gradient is None:
            return None, grads
        dx = input_gradient(du, layer.merge().weight, shape)  # eq. (rw.4)
        return dx, grads

    def on_rows(self) -> Any:
        """Return the equivalent layer on rows: base and adapter of the matrix."""
        return over(self.base.as_linear(), self.adapter)

    def merge(self) -> Embedding | Convolution:
        """Return one new layer of the base's class, with this layer's output up to rounding. Nothing is shared."""
        return self.base.from_linear(self.on_rows().merge())

    def delta(self) -> Array:  # -> (out, in)
        """Return the change of the base's matrix."""
        return self.on_rows().delta()


Rewritten = AdaptedRows
"""The name in the fifth edition."""


def over(base: Any, adapter: Any) -> Layer:
    """Return the adapted layer of a base and its adapter, which may be a plain `LoRA`."""
    if isinstance(base, StackedLinear):
        return StackedLoRALinear(base, adapter)
    if not isinstance(base, Linear):
        return AdaptedRows(base, adapter)
    return adapter.over(base) if isinstance(adapter, Adapter) else LoRALinear(base, adapter)


def place_of(base: Any) -> dict[str, Any]:
    """Return the fields of an adapter that describe its layer."""
    if isinstance(base, StackedLinear):
        return {"kind": StackedLoRA.kind}
    return {"kind": kind_of_layer(base) or "linear", "kernel": tuple(getattr(base, "kernel", ()))}


def kind_of_layer(layer: Layer | None) -> str | None:
    """Return the kind of a layer that can have an adapter, and None for others."""
    return next((kind for kind, cls in LAYER_KINDS.items() if isinstance(layer, cls)), None)
