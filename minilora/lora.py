"""LoRA: learn a weight's change as a product of two thin matrices.

Read this page with a pencil. It needs matrix products and the chain rule, nothing else.

THE IDEA. A layer y = x W^T is trained; its W (out, in) is large. Leave W alone, and learn a change of rank r beside it:

    y = x W^T + s x A^T B^T        A (r, in), B (out, r), s = alpha / r

A and B have r (in + out) numbers where W has in * out. Here is the added path alone, for N rows, in two steps:

    h = x A^T      (1)    (N, in) -> (N, r)
    y = s h B^T    (2)    (N, r) -> (N, out)

THE GRADIENTS. Let L be any number computed from y. Write dy (N, out) for its derivatives by the entries of y, and
likewise dh, dA, dB and dx. In entries, (2) says y_no = s sum_k h_nk B_ok. So B_ok acts on L through column o of y, and
the chain rule sums over its rows; h_nk acts through row n, and the chain rule sums over its columns:

    dB_ok = sum_n dy_no s h_nk        dB = s dy^T h    (3)    (out, r)
    dh_nk = sum_o dy_no s B_ok        dh = s dy B      (4)    (N, r)

(1) has the form of (2): h_nk = sum_i x_ni A_ki. The same two steps give

    dA_ki = sum_n dh_nk x_ni          dA = dh^T x      (5)    (r, in)
    dx_ni = sum_k dh_nk A_ki          dx = dh A        (6)    (N, in)

BESIDE ITS BASE, outputs add, and so do the gradients at the input that both share. Merging makes one weight of the two.
The base's own equations, (7) to (10), stand in linear.py:

    y = x W^T + b + s x A^T B^T       (11)             delta = s B A     (13)    (out, in)
    dx = dy W + dh A                  (12)             W' = W + delta    (14)    (out, in)

THE START. B is zero. Then y is zero, so the adapted layer begins as its base. By (4) dh, dA and dx are zero as well,
and only B moves in the first step. If A were zero too, h and dB would vanish, and nothing would ever move.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend, backend_of, backend_or_numpy
from .checks import Array, check_instance, check_number, check_start, warn_of_rank
from .layer import Cache, Layer, parts_besides, rows
from .linear import Linear


@dataclass(eq=False, repr=False)
class LoRA(Layer):
    """The added path, y = s x A^T B^T. It keeps the arrays that it is given; training changes them in place.

    Arrays that do not fit together, or an alpha out of range, are a ValueError or a TypeError.
    """

    lora_A: Array  # (r, in), reads the input
    lora_B: Array  # (out, r), writes the output; of the same float dtype
    alpha: float  # above 0

    fits = {"x": "... in", "lora_A": "r in", "lora_B": "out r"}  # axes; `Layer` refuses arrays with others

    def __setattr__(self, name: str, value: Any) -> None:
        """Require an alpha above 0, whenever it is set."""
        super().__setattr__(name, check_number("alpha", value, above=0) if name == "alpha" else value)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. The products run from the left, so B A, which is as large as W, is never formed.

        A frozen adapter keeps neither x nor h: only the gradients of its factors ask for them.
        """
        h = x @ self.lora_A.T  # eq. (1)  (..., r)
        y = widen(self.scaling * h, self.lora_B.T)  # eq. (2)  (..., out); `widen` is `@`, faster at rank 1
        return y, (None, None) if self.frozen else (x, h)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., in), and the gradients of both factors; a frozen adapter computes none."""
        x, h = cache
        dh = dy @ self.lora_B * self.scaling  # eq. (4)  (..., r)
        dx = dh @ self.lora_A if need_dx else None  # eq. (6)  (..., in)
        if self.frozen:
            return dx, {}
        dB = rows(dy).T @ rows(h) * self.scaling  # eq. (3)  (out, r)
        dA = rows(dh).T @ rows(x)  # eq. (5)  (r, in)
        return dx, {"lora_A": dA, "lora_B": dB}

    def delta(self) -> Array:  # -> (out, in)
        """Return the change of weight that the adapter stands for, s B A."""
        return self.scaling * self.lora_B @ self.lora_A  # eq. (13)

    @classmethod
    def init(
        cls, in_features: int, out_features: int, *, rank: int, alpha: float, rng: np.random.Generator,
        dtype: Any = "float32", backend: Backend | None = None,
    ) -> LoRA:  # fmt: skip
        """Start as PEFT does: A uniform in +-1/sqrt(in), B zero, so that the adapter adds nothing yet.

        A rank above min(in, out) is allowed and gains nothing. `rng`, `dtype` and `backend` are as in `Linear.init`.
        """
        sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
        n_in, n_out, r = check_start(rng, dtype, alpha, **sizes)
        backend, bound = backend_or_numpy(backend), 1 / math.sqrt(n_in)
        lora_A = backend.asarray(rng.uniform(-bound, bound, (r, n_in)), dtype)
        return cls(lora_A, backend.zeros((n_out, r), dtype), alpha)

    shape = property(lambda self: (self.lora_B.shape[0], self.lora_A.shape[1]), doc="(out, in), as the weight's.")
    rank = property(lambda self: int(self.lora_A.shape[0]), doc="The width r between the factors.")
    scaling = property(lambda self: self.alpha / self.rank, doc="The factor s = alpha / r.")


@dataclass(eq=False, repr=False)
class LoRALinear(Layer):
    """A frozen layer and its adapter side by side. Only the adapter trains: W's large gradient dy^T x is not formed."""

    base: Linear
    adapter: LoRA  # of the same widths and dtype

    fits = {"base": "in -> out", "adapter": "in -> out"}

    def __post_init__(self) -> None:
        check_instance("base", self.base, Linear)
        check_instance("adapter", self.adapter, LoRA)
        super().__post_init__()
        check_whole(self)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. The base needs none: its dx depends on W alone."""
        update, cache = self.adapter.forward(x)
        y = self.base(x) + update  # eq. (11)
        return y, (cache,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., in), through both paths, and the gradients of the adapter's factors."""
        (adapter_cache,) = cache
        dx_adapter, grads = self.adapter.backward(dy, adapter_cache, need_dx=need_dx)
        dx = self.base.input_gradient(dy) + dx_adapter if need_dx else None  # eq. (12)
        return dx, grads

    def merge(self) -> Linear:
        """Return one new `Linear`: as fast as the base, and this layer's output up to rounding. Nothing is shared."""
        bias = self.base.bias
        return Linear(self.base.weight + self.delta(), None if bias is None else bias.copy())  # eq. (14)

    def delta(self) -> Array:  # -> (out, in)
        """Return the adapter's change of weight, s B A."""
        return self.adapter.delta()

    def trainable(self) -> dict[str, Array]:
        """Return the adapter's arrays. The base's are not among them, so they do not train."""
        return self.adapter.trainable()

    @classmethod
    def from_linear(cls, linear: Linear, *, rank: int, alpha: float, rng: np.random.Generator) -> LoRALinear:
        """Put a new adapter beside a trained layer, which is shared. The output is the same until the first step."""
        check_instance("linear", linear, Linear)
        new: dict[str, Any] = {"dtype": linear.weight.dtype, "backend": backend_of(linear.weight)}
        lora = LoRA.init(linear.in_features, linear.out_features, rank=rank, alpha=alpha, rng=rng, **new)
        warn_of_rank(rank, {"": min(linear.shape)})
        return cls(linear, lora)

    shape = property(lambda self: self.base.shape, doc="(out, in).")
    rank = property(lambda self: self.adapter.rank, doc="The adapter's.")
    alpha = property(lambda self: self.adapter.alpha, doc="The adapter's, which is where it is set.")
    scaling = property(lambda self: self.adapter.scaling, doc="The adapter's.")


def widen(narrow: Array, factor: Array) -> Array:  # (..., r), (r, n) -> (..., n)
    """Return ``narrow @ factor``.

    NumPy does not send an outer product to the BLAS. At rank 1, as a broadcast product, 128 rows of 1000 entries take
    0.03 ms instead of 0.14, in a step of the article's adapter that takes 0.33 ms instead of 0.45.
    """
    return narrow * factor[0] if factor.shape[0] == 1 else narrow @ factor


def check_whole(layer: Any) -> None:
    """Require that a layer leaves out no array of its adapter: one that its `fits` does not name would change nothing.

    An adapter's class may compute with its arrays itself, in a `forward` and a `delta` of its own.
    """
    cls, left_out = type(layer.adapter), parts_besides(layer.adapter, "lora_A", "lora_B", "start", *layer.fits)
    if left_out and (cls.forward is LoRA.forward or cls.delta is LoRA.delta):
        raise ValueError(f"adapter has a {next(iter(left_out))}, which a {type(layer).__name__} leaves out")
