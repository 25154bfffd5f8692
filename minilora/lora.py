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
from typing import Annotated, Any

import numpy as np

from .adapted import Adapted
from .backend import Backend, backend_of, backend_or_numpy
from .checks import Array, check_instance, check_layer, warn_of_rank
from .layer import Cache, Layer, matmul, rows
from .linear import Linear


@dataclass(eq=False, repr=False)
class LoRA(Layer):
    """The added path, y = s x A^T B^T. It stores the given arrays without copying; training changes them in place.

    Arrays that do not fit together, or an alpha out of range, are a ValueError or a TypeError.
    """

    lora_A: Annotated[Array, "r in"]  # reads the input
    lora_B: Annotated[Array, "out r"]  # writes the output
    alpha: Annotated[float, "> 0"]

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. The products run from the left, so B A, which is as large as W, is never formed.

        A frozen adapter keeps neither x nor h: only the gradients of its factors ask for them.
        """
        h = x @ self.lora_A.T  # eq. (1)  (..., r)
        y = matmul(self.scaling * h, self.lora_B.T)  # eq. (2)  (..., out)
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
        """Return the change of weight, s B A."""
        return self.scaling * self.lora_B @ self.lora_A  # eq. (13)

    @classmethod
    def init(
        cls, in_features: int, out_features: int, *, rank: int, alpha: float, rng: np.random.Generator,
        dtype: Any = "float32", backend: Backend | None = None,
    ) -> LoRA:  # fmt: skip
        """Initialise like PEFT: A uniform in +-1/sqrt(in), B zero, so that the adapter adds nothing yet.

        A rank above min(in, out) is allowed, without a benefit. `rng`, `dtype` and `backend` are as in `Linear.init`.
        """
        check_layer(rng, dtype, alpha, in_features=in_features, out_features=out_features, rank=rank)
        backend, bound = backend_or_numpy(backend), 1 / math.sqrt(in_features)
        lora_A = backend.asarray(rng.uniform(-bound, bound, (rank, in_features)), dtype)
        return cls(lora_A, backend.zeros((out_features, rank), dtype), alpha)

    @property
    def rank(self) -> int:
        """The width r between the factors."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """The factor s = alpha / r."""
        return self.alpha / self.rank


@dataclass(eq=False, repr=False)
class LoRALinear(Adapted):
    """A frozen layer and its adapter side by side. Only the adapter trains: W's large gradient dy^T x is not formed.

    `Adapted` says so: its `trainable` returns the adapter's arrays.
    """

    base: Annotated[Linear, "in -> out"]
    adapter: Annotated[LoRA, "in -> out"]

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. The base needs none: its dx depends only on W."""
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
        return Linear(self.base.weight + self.adapter.delta(), None if bias is None else bias.copy())  # eq. (14)

    @classmethod
    def from_linear(cls, linear: Linear, *, rank: int, alpha: float, rng: np.random.Generator) -> LoRALinear:
        """Add a new adapter to a trained layer, which is shared. The output is the same until the first step."""
        check_instance("linear", linear, Linear)
        new: dict[str, Any] = {"rng": rng, "dtype": linear.weight.dtype, "backend": backend_of(linear.weight)}
        adapter = LoRA.init(linear.in_features, linear.out_features, rank=rank, alpha=alpha, **new)
        warn_of_rank(rank, {"": min(linear.shape)})
        return cls(linear, adapter)
