"""DoRA: learn the norm of each row of the weight separately from its direction.

LoRA changes W to V = W + s B A. DoRA keeps the direction of each row of V, and gives it a length m_o of its own:

    n_o = sqrt(sum_i V_oi^2)             (dora.1)    (out,)              the length that V has
    g_o = m_o / n_o                      (dora.2)    (out,)
    y_no = g_o u_no + b_o                (dora.3)    (N, in) -> (N, out)    u = x V^T, by (11) without b

So DoRA is LoRA with one factor for each output. Backward, with n taken as a constant:

    du_no = dy_no g_o                    (dora.4)    (N, out)      and from du, (3) to (6) and (12) go on
    dm_o = sum_n dy_no u_no / n_o        (dora.5)    (out,)

The paper proposes this in its section 4.3, and PEFT does it. But n depends on A and B too. The full gradient adds what
passes through n. By (dora.2), dg_o / dn_o = -m_o / n_o^2, and by (dora.1), dn_o / dV_oi = V_oi / n_o:

    dn_o = -g_o dm_o                     (dora.6)    (out,)
    dV_oi = dn_o V_oi / n_o              (dora.7)    (out, in)
    dB = s dV A^T, dA = s B^T dV         (dora.8)    to be added, as V = W + s B A

THE START. m_o = |V_o|, so g_o = 1, and the output is the base's.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from ..adapted import Adapted
from ..backend import backend_of
from ..checks import Array, check_choice
from ..layer import Cache, rows
from ..linear import Linear
from .adapter import Adapter

NORMS = ("constant", "full")


@dataclass(eq=False, repr=False, kw_only=True)
class DoRAAdapter(Adapter):
    """Two factors, and a magnitude for each output.

    Arrays that do not fit together, an unknown norm, and what `Adapter` refuses are a ValueError or a TypeError.
    """

    magnitude: Annotated[Array, "out"]
    dora_norm: str = "constant"  # or "full": how the backward treats the norm

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dora_norm", self.dora_norm, NORMS)

    def over(self, base: Linear) -> DoRA:
        """Return the adapted layer of a base with this adapter."""
        return DoRA(base, self)


@dataclass(eq=False, repr=False)
class DoRA(Adapted):
    """A frozen layer with an adapter that has a magnitude for each output. Only the adapter's arrays train."""

    base: Annotated[Linear, "in -> out"]
    adapter: Annotated[DoRAAdapter, "in -> out"]

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache."""
        update, cache = self.adapter.forward(x)
        u = x @ self.base.weight.T + update
        n = self.norm()
        g = self.adapter.magnitude / n  # eq. (dora.2)
        y = g * u if self.base.bias is None else g * u + self.base.bias  # eq. (dora.3)
        return y, (cache, n, g, None if self.adapter.frozen else u)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., in), and the gradients of the factors and the magnitude."""
        adapter_cache, n, g, u = cache
        du = dy * g  # eq. (dora.4)
        dx_adapter, grads = self.adapter.backward(du, adapter_cache, need_dx=need_dx)
        dx = self.base.input_gradient(du) + dx_adapter if need_dx else None
        if self.adapter.frozen:
            return dx, grads
        grads["magnitude"] = dm = rows(dy * u).sum(axis=0) / n  # eq. (dora.5)
        if self.adapter.dora_norm == "full":
            A, B, s = self.adapter.lora_A, self.adapter.lora_B, self.adapter.scaling
            dn = -g * dm  # eq. (dora.6)
            dV = (dn / n)[:, None] * self.direction()  # eq. (dora.7)
            dB, dA = s * dV @ A.T, s * B.T @ dV  # eq. (dora.8)
            grads["lora_A"], grads["lora_B"] = grads["lora_A"] + dA, grads["lora_B"] + dB
        return dx, grads

    def direction(self) -> Array:  # -> (out, in)
        """Return V = W + s B A."""
        return self.base.weight + self.adapter.delta()

    def norm(self) -> Array:  # -> (out,)
        """Return the norm of each row of V, and 1 for a zero row: its u is zero too, so its output is the bias."""
        return divisible(lengths(self.direction()))

    def merge(self) -> Linear:
        """Return one new `Linear`, with this layer's output up to rounding. Nothing is shared."""
        bias, V = self.base.bias, self.direction()
        g = self.adapter.magnitude / divisible(lengths(V))  # (dora.2)
        return Linear(g[:, None] * V, None if bias is None else bias.copy())

    def delta(self) -> Array:  # -> (out, in)
        """Return the full change of weight, g V - W."""
        return self.merge().weight - self.base.weight

    magnitude = property(lambda self: self.adapter.magnitude, doc="The adapter's.")


def lengths(V: Array) -> Array:  # (out, in) -> (out,)
    """Return the norm of each row."""
    return backend_of(V).xp.sqrt((V * V).sum(axis=1))  # eq. (dora.1)


def divisible(n: Array) -> Array:  # (out,) -> (out,)
    """Return norms with 0 replaced by 1."""
    return n + (n == 0)


def with_magnitude(base: Linear, adapter: Adapter, dora_norm: str = "constant") -> DoRAAdapter:
    """Convert an adapter to DoRA with the magnitude that leaves the output unchanged."""
    same = {field.name: getattr(adapter, field.name) for field in fields(adapter)}
    return DoRAAdapter(**same, magnitude=lengths(base.weight + adapter.delta()), dora_norm=dora_norm)
