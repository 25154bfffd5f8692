"""A mixture of experts: each row passes through K of E gated MLPs, which a router chooses.

Row n of x passes through its K chosen experts, and y_n is the sum of their outputs, o_nk = expert e of x_n, weighted by
the router's g:

    y_n = sum_k g_nk o_nk                          (moe.8)     (N, d)

Both g and o depend on trainable arrays, so each has a gradient, the other one times dy:

    dg_nk = sum_i dy_ni o_nki                      (moe.9)     (N, K)
    do_nk = g_nk dy_n                              (moe.10)    (N, K, d)
    dx_n = sum_k dx_nk + what the router returns               (N, d)       x is read by K experts and by the router

THE ROWS of an expert are gathered first, so that each weight needs one matrix product, see `minilora.layers.stacked`.
A row meets an expert at most once, and the inverse of the gathering order restores the K rows of the sum.

A SHARED EXPERT (Qwen2-MoE) is one more gated MLP, s_n = shared(x_n), for all rows. Its own gate, with one output
t_n = x_n w^T, scales it:

    y_n = routed_n + q_n s_n                       (moe.11)    (N, d)       q_n = 1/(1 + e^-t_n)
    ds_n = q_n dy_n                                (moe.12)    (N, d)
    dt_n = q_n (1 - q_n) sum_i dy_ni s_ni          (moe.13)    (N, 1)

The number of rows of each expert must be known on the host before its products can be launched: on a GPU each forward
of a mixture waits once, and no backward does.

Sources: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; Jiang et al., "Mixtral of Experts",
arXiv 2401.04088; the names are those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..backend import backend_of
from ..checks import Array
from ..layer import Cache, Layer, inner, nest, rows, trains
from .activation import logistic
from .experts import Experts
from .gated import GatedMLP
from .router import Router, rows_per_expert


@dataclass(eq=False, repr=False)
class MixtureOfExperts(Layer):
    """A router with its experts and optionally a shared one, which replace a decoder's MLP."""

    gate: Annotated[Router, "in -> K"]
    experts: Annotated[Experts, "in -> in"]
    shared_expert: Annotated[GatedMLP | None, "in -> in"] = None
    shared_expert_gate: Annotated[Layer | None, "in -> q"] = None  # d -> 1

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate.experts != self.experts.count:
            raise ValueError(f"gate scores {self.gate.experts} experts, and there are {self.experts.count}")
        if (self.shared_expert is None) != (self.shared_expert_gate is None):
            raise ValueError("shared_expert and shared_expert_gate go together: give both or none")
        if self.shared_expert_gate is not None and self.shared_expert_gate.out_features != 1:
            raise ValueError(f"shared_expert_gate has {self.shared_expert_gate.out_features} outputs, expected 1")

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., d)
        """Return y, and a cache with g, o and the order in which rows were gathered."""
        h = rows(x)  # (N, d)
        g, choice, g_cache = self.gate.route(h)
        order, place, counts = sort_by_expert(choice, self.experts.count)
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
        return y, (g_cache, o_cache, order, place, g, o, shared)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradients of the router, the experts and the shared expert."""
        g_cache, o_cache, order, place, g, o, shared = cache
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
        """Return the shared expert's and its gate's part of dx, and their gradients."""
        s_cache, t_cache, s, q = cache
        ds = q * dy  # eq. (moe.12)
        dt = q * (1 - q) * inner(dy, s)  # eq. (moe.13)
        dx_s, s_grads = self.shared_expert.backward(ds, s_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx_t, t_grads = self.shared_expert_gate.backward(dt, t_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx = dx_s + dx_t if dx_s is not None else None
        return dx, nest("shared_expert", s_grads) | nest("shared_expert_gate", t_grads)


def sort_by_expert(choice: Array, E: int) -> tuple[Array, Array, list[int]]:  # (N, K) -> (N K,), (N K,), E numbers
    """Return the order that sorts the N K pairs of a row and an expert by expert, its inverse, and the experts' counts.

    Pair i belongs to row i // K. Rows of one expert keep their order.
    """
    backend, pairs = backend_of(choice), choice.reshape(-1)
    order = backend.xp.argsort(pairs, kind="stable")
    counts = backend.to_numpy(rows_per_expert(choice, E))  # this waits for a GPU
    return order, backend.xp.argsort(order, kind="stable"), counts.tolist()
