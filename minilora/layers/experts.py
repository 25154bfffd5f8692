"""A mixture of experts: E gated MLPs, of which each row goes through K, as many as its router keeps for it.

Row n of x goes through its K kept experts, and y_n is the sum of what they give, o_nk = expert e of x_n, weighted by
the router's g, see `minilora.layers.router`:

    y_n = sum_k g_nk o_nk                          (moe.8)     (N, d)

g and o both depend on what trains, so each has a gradient, the other one times dy:

    dg_nk = sum_i dy_ni o_nki                      (moe.9)     (N, K)
    do_nk = g_nk dy_n                              (moe.10)    (N, K, d)
    dx_n = sum_k dx_nk + what the router returns               (N, d)       x is read by K experts and by the router

An expert is the gated MLP of `minilora.layers.gated`, with both of its first weights in one, W_gu (2 m, d):
c = x W_gu^T, whose first m entries are a and whose last m are b, z = f(a) b by (gate.1), and o = z W_d^T.

THE ROWS of an expert are gathered first, so that each weight is one product of matrices, see `minilora.layers.stacked`.
A row meets an expert at most once, and the K rows of the sum come back by the inverse of the order that gathered them.

A SHARED EXPERT (Qwen2-MoE) is one more gated MLP, s_n = shared(x_n), through which each row goes, as far as a gate of
its own lets it, of one output t_n = x_n w^T:

    y_n = routed_n + q_n s_n                       (moe.11)    (N, d)       q_n = 1/(1 + e^-t_n)
    ds_n = q_n dy_n                                (moe.12)    (N, d)
    dt_n = q_n (1 - q_n) sum_i dy_ni s_ni          (moe.13)    (N, 1)

How many rows each expert has must be known on the host before its products can be asked for: on a GPU each forward of a
mixture waits once, and no backward does.

Sources: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; Jiang et al., "Mixtral of Experts",
arXiv 2401.04088; the names are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..backend import backend_of
from ..checks import Array, check_instance
from ..layer import Cache, Layer, check_cache, check_has_widths, check_input, check_widths, inner, nest, rows, trains
from ..linear import Linear
from .activation import SiLU, logistic
from .gated import GatedMLP, gate
from .router import Router, tallied
from .stacked import StackedLinear


@dataclass(eq=False, repr=False)
class Experts(Layer):
    """E gated MLPs of one size, on rows that stand in the experts' order."""

    gate_up_proj: StackedLinear  # d -> 2 m
    down_proj: StackedLinear  # m -> d
    act_fn: Layer = field(default_factory=SiLU)

    def __post_init__(self) -> None:
        _check_experts(self)

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, d) -> (R, d)
        """Return o, of `counts` rows of each expert, and a cache with p and u of the gate."""
        check_input(self, x)
        c, c_cache = self.gate_up_proj.forward(x, counts)
        z, p, u = self.gated(c)
        o, o_cache = self.down_proj.forward(z, counts)
        return o, (self, o.shape, c_cache, o_cache, p, u)

    def gated(self, c: Array) -> tuple[Array, Array, Array]:  # (R, 2 m) -> (R, m) each
        """Return z, and its slopes p and u."""
        return gate(self.act_fn, *halves(c))

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, d), and the gradients of both weights, of dy = do."""
        c_cache, o_cache, p, u = check_cache(self, dy, cache)
        below = need_dx or trains(self.gate_up_proj)
        dz, o_grads = self.down_proj.backward(dy, o_cache, need_dx=below)
        grads = nest("down_proj", o_grads)
        if dz is None:  # nothing below asks
            return None, grads
        xp = backend_of(dz).xp
        dc = xp.empty((len(dz), 2 * dz.shape[1]), dz.dtype)
        for half, slope in zip(halves(dc), (p, u), strict=True):  # da and db, (gate.2) and (gate.3)
            xp.multiply(dz, slope, out=half)
        dx, c_grads = self.gate_up_proj.backward(dc, c_cache, need_dx=need_dx)
        return dx, nest("gate_up_proj", c_grads) | grads

    count = property(lambda self: self.gate_up_proj.experts, doc="How many there are, E.")
    shape = property(lambda self: (self.down_proj.out_features, self.gate_up_proj.in_features), doc="(d, d).")


@dataclass(eq=False, repr=False)
class MixtureOfExperts(Layer):
    """A router and its experts, and perhaps one that all rows share: what stands in the place of a decoder's MLP."""

    gate: Router
    experts: Experts
    shared_expert: GatedMLP | None = None
    shared_expert_gate: Linear | None = None  # d -> 1

    def __post_init__(self) -> None:
        _check_mixture(self)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., d)
        """Return y, and a cache with g, o and the order in which rows were gathered."""
        check_input(self, x)
        h = rows(x)  # (N, d)
        g, choice, g_cache = self.gate.route(h)
        order, place, counts = gathered(choice, self.experts.count)
        o, o_cache = self.experts.forward(h[order // self.gate.top_k], counts)
        o = o[place].reshape(*choice.shape, h.shape[1])  # (N, K, d)
        y = (g[:, :, None] * o).sum(axis=1)  # eq. (moe.8)
        shared = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            s, s_cache = self.shared_expert.forward(h)
            t, t_cache = self.shared_expert_gate.forward(h)
            routed, q = y, logistic(t)
            y = routed + q * s  # eq. (moe.11)
            shared = (s_cache, t_cache, s, q)
        y = y.reshape(x.shape)
        return y, (self, y.shape, g_cache, o_cache, order, place, g, o, shared)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradients of the router, the experts and the shared expert."""
        g_cache, o_cache, order, place, g, o, shared = check_cache(self, dy, cache)
        d_rows = rows(dy)
        do = g[:, :, None] * d_rows[:, None]  # eq. (moe.10)
        dx_experts, grads = self.experts.backward(do.reshape(len(order), do.shape[2])[order], o_cache, need_dx=need_dx)
        grads, dx = nest("experts", grads), None
        if need_dx:
            dx = dx_experts[place].reshape(o.shape).sum(axis=1)  # type: ignore[index]
        if need_dx or trains(self.gate):
            dg = inner(d_rows[:, None], o)[..., 0]  # eq. (moe.9)
            dx_gate, g_grads = self.gate.backward(dg, g_cache, need_dx=need_dx)
            grads = nest("gate", g_grads) | grads
            dx = dx if dx is None else dx + dx_gate
        if shared is not None:
            dx_shared, s_grads = self._shared_backward(d_rows, shared, need_dx=need_dx)
            grads |= s_grads
            dx = dx if dx is None else dx + dx_shared
        return None if dx is None else dx.reshape(dy.shape), grads

    def _shared_backward(self, dy: Array, cache: Cache, *, need_dx: bool) -> tuple[Array | None, dict[str, Array]]:
        """Return what the shared expert and its gate add to dx, and their gradients."""
        s_cache, t_cache, s, q = cache
        ds = q * dy  # eq. (moe.12)
        dt = q * (1 - q) * inner(dy, s)  # eq. (moe.13)
        dx_s, s_grads = self.shared_expert.backward(ds, s_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx_t, t_grads = self.shared_expert_gate.backward(dt, t_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx = dx_s + dx_t if dx_s is not None else None
        return dx, nest("shared_expert", s_grads) | nest("shared_expert_gate", t_grads)

    shape = property(lambda self: self.experts.shape, doc="(d, d).")


def gathered(choice: Array, experts: int) -> tuple[Array, Array, list[int]]:  # (N, K) -> (N K,), (N K,), E numbers
    """Return the order that puts the N K pairs of a row and a kept expert by expert, its inverse, and their counts.

    Pair i is of row i // K. Within an expert rows keep their order.
    """
    backend, pairs = backend_of(choice), choice.reshape(-1)
    order = backend.xp.argsort(pairs, kind="stable")
    counts = backend.to_numpy(tallied(choice, experts))  # a GPU is waited for here
    return order, backend.xp.argsort(order, kind="stable"), counts.tolist()


def halves(c: Array) -> tuple[Array, Array]:  # (R, 2 m) -> (R, m), (R, m)
    """Return a and b, the gate's and the up projection's outputs: views."""
    m = c.shape[1] // 2
    return c[:, :m], c[:, m:]


def _check_experts(layer: Experts) -> None:
    """Refuse weights that are no stacks of one length, or whose widths do not fit."""
    check_has_widths("down_proj", layer.down_proj)
    d, m = layer.down_proj.out_features, layer.down_proj.in_features
    check_widths("gate_up_proj", layer.gate_up_proj, d, 2 * m)
    counts = [getattr(stack, "experts", None) for stack in (layer.gate_up_proj, layer.down_proj)]
    if None in counts or counts[0] != counts[1]:
        raise ValueError(
            f"gate_up_proj and down_proj have {counts[0]} and {counts[1]} experts, expected as many in both"
        )
    check_instance("act_fn", layer.act_fn, Layer)


def _check_mixture(layer: MixtureOfExperts) -> None:
    """Refuse parts that do not make a mixture."""
    check_instance("gate", layer.gate, Router)
    check_instance("experts", layer.experts, Experts)
    d, E = layer.experts.in_features, layer.experts.count
    if (layer.gate.in_features, layer.gate.experts) != (d, E):
        got = f"{layer.gate.experts} experts on {layer.gate.in_features} entries"
        raise ValueError(f"gate scores {got}, and there are {E} on {d}")
    if (layer.shared_expert is None) != (layer.shared_expert_gate is None):
        raise ValueError("shared_expert and shared_expert_gate go together: give both or none")
    if layer.shared_expert is not None and layer.shared_expert_gate is not None:
        check_widths("shared_expert", layer.shared_expert, d, d)
        check_widths("shared_expert_gate", layer.shared_expert_gate, d, 1)
