"""The gated MLP: one linear layer gates the output of another.

    a = x W_a^T,   b = x W_b^T        gate_proj, up_proj        (N, d) -> (N, m)
    z = f(a) b                        (gate.1)                  (N, m)       f is SiLU, entry by entry
    y = z W_c^T                       down_proj                 (N, m) -> (N, d)

z is a product of entries, so each factor's gradient is dz times the other factor, for a times f's slope as well:

    da = dz p                         (gate.2)                  (N, m)       p = b f'(a), f's own backward of b
    db = dz u                         (gate.3)                  (N, m)       u = f(a)
    dx = da W_a + db W_b              (gate.4)                  (N, d)       x is read twice

f is computed once: the forward keeps p and u instead of a and b.

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..checks import Array, check_instance
from ..layer import Cache, Layer, nest, rows, trains
from .activation import SiLU


@dataclass(eq=False, repr=False)
class GatedMLP(Layer):
    """Three linear layers, which can have adapters, with SiLU."""

    gate_proj: Annotated[Layer, "in -> m"]
    up_proj: Annotated[Layer, "in -> m"]
    down_proj: Annotated[Layer, "m -> in"]
    act_fn: Layer = field(default_factory=SiLU)

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("act_fn", self.act_fn, Layer)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., d)
        """Return y, and a cache with p and u."""
        a, a_cache = self.gate_proj.forward(rows(x))
        b, b_cache = self.up_proj.forward(rows(x))
        z, p, u = gate(self.act_fn, a, b)
        y, y_cache = self.down_proj.forward(z)
        y = y.reshape(x.shape)
        return y, (a_cache, b_cache, y_cache, p, u)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradients of the three layers."""
        a_cache, b_cache, y_cache, p, u = cache
        below = need_dx or trains(self.gate_proj, self.up_proj)
        dz, y_grads = self.down_proj.backward(rows(dy), y_cache, need_dx=below)
        grads = nest("down_proj", y_grads)
        if dz is None:  # no lower layer trains, and the caller needs no dx
            return None, grads
        da = dz * p  # eq. (gate.2)
        db = dz * u  # eq. (gate.3)
        dx_a, a_grads = self.gate_proj.backward(da, a_cache, need_dx=need_dx)
        dx_b, b_grads = self.up_proj.backward(db, b_cache, need_dx=need_dx)
        grads |= nest("gate_proj", a_grads) | nest("up_proj", b_grads)
        dx = dx_a + dx_b if dx_a is not None else None  # eq. (gate.4)
        return None if dx is None else dx.reshape(dy.shape), grads


def gate(f: Layer, a: Array, b: Array) -> tuple[Array, Array, Array]:  # (N, m) each
    """Return z for an activation f, and its slopes with respect to a and b: p and u."""
    u, u_cache = f.forward(a)
    z = u * b  # eq. (gate.1)
    p, _ = f.backward(b, u_cache)
    return z, p, u
