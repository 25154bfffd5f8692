"""A mixture of experts: a router, and E gated MLPs, of which each row goes through the K that the router keeps for it.

THE ROUTER scores E experts for each row, keeps the K best, and says how much of each to take.

    l_ne = sum_i x_ni W_ei                      (moe.1)    (N, d) -> (N, E)      W (E, d), the router's weight
    g_nk = p_ne at the k-th kept expert e       (moe.2)    (N, K)                p = softmax of row n of l over S

S is all experts, or the kept ones alone (`norm_topk_prob`). The second is also called renormalised: among the kept,
p_e / sum_j p_j = exp(l_e) / sum_j exp(l_j), whatever the sum over all was. So the two differ in S and in nothing else.

WHICH experts are kept is a step function of l. A small change of l changes it nowhere but where two scores are equal,
so its derivative is zero where it exists: the choice is a constant, and l acts on the loss through g alone. Of equal
scores, the expert with the lower number is kept, as a stable sort leaves them. (Others leave that open: torch.topk
keeps now the first ones, now the last ones.) Backward, dp is dg at the kept experts and zero at the others. From there
it is the softmax of attention, (att.6), with the sum over S:

    dl_ne = p_ne (dp_ne - sum_j p_nj dp_nj)     (moe.3)    (N, E)                p is 0 outside of S, and so is dl
    dx_ni = sum_e dl_ne W_ei                    (moe.4)    (N, d)                and dW = dl^T x, by (8)

Two consequences. With one kept expert and S the kept ones, g is 1 whatever l is, and the router has no gradient at all.
With S all experts, each row of W has a gradient, also that of an expert which no row keeps.

THE EXPERTS. Row n of x goes through its K kept experts, and y_n is the sum of what they give, o_nk = expert e of x_n,
weighted by the router's g:

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

THE BALANCE. A router that always keeps the same experts wastes the others. Of f_e, the part of the rows that keeps
expert e, a constant as the choice is, and the softmax p over all experts:

    loss = E sum_e f_e mean_n p_ne              (moe.14)
    dp_ne = E f_e / N                           (moe.15)   (N, E)                then dl by (moe.3)

It is K where all are kept equally often or have equal p, and larger where the often kept also have the large p. One
adds it to a model's loss, times a small number, over the scores of all its layers, one below the other.

How many rows each expert has must be known on the host before its products can be asked for: on a GPU each forward of a
mixture waits once, and no backward does.

Sources: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; Fedus et al., "Switch Transformers",
arXiv 2101.03961, for the balance; Jiang et al., "Mixtral of Experts", arXiv 2401.04088; the names are those of
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_array, check_flag, check_instance, check_integer
from ..layer import Cache, Layer, inner, nest, rows, trains
from .activation import SiLU, logistic
from .attention import softmax
from .gated import GatedMLP, gate
from .stacked import StackedLinear


@dataclass(eq=False, repr=False)
class Router(Layer):
    """A weight that scores, and a softmax. Its output is how much each row takes of each of its kept experts."""

    weight: Annotated[StackedLinear, "in -> E"]  # one weight (E, d)
    top_k: int  # K, how many experts a row keeps
    norm_topk_prob: bool = True  # whether S is the kept experts: then a row's K numbers sum to 1

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.top_k = check_integer("top_k", self.top_k, at_least=1, at_most=self.experts)
        self.norm_topk_prob = check_flag("norm_topk_prob", self.norm_topk_prob)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., K)
        """Return g, the best expert's first, and a cache with p and the choice."""
        scores, weight_cache = self.weight.forward(rows(x))  # eq. (moe.1)  (N, E)
        choice = top_experts(scores, self.top_k)
        p = softmax(masked_to_kept(scores, choice) if self.norm_topk_prob else scores)
        g = p[kept_index(choice)]  # eq. (moe.2)  (N, K)
        g = g.reshape(*x.shape[:-1], self.top_k)
        return g, (x.shape, weight_cache, p, choice)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradient of the weight, of dy = dg (..., K)."""
        shape, weight_cache, p, choice = cache
        dp = backend_of(dy).zeros(p.shape, dy.dtype)
        dp[kept_index(choice)] = rows(dy)
        d_scores = softmax_back(p, dp)
        dx, grads = self.weight.backward(d_scores, weight_cache, need_dx=need_dx)  # eq. (moe.4)
        return None if dx is None else dx.reshape(shape), nest("weight", grads)

    def route(self, x: Array) -> tuple[Array, Array, Cache]:  # (..., d) -> (..., K), (N, K)
        """Return g, the numbers of the kept experts, and the cache."""
        g, cache = self.forward(x)
        return g, cache.kept[-1], cache

    experts = property(lambda self: self.weight.out_features, doc="How many experts there are, E.")
    shape = property(lambda self: (self.top_k, self.weight.in_features), doc="(K, d).")


@dataclass(eq=False, repr=False)
class Experts(Layer):
    """E gated MLPs of one size, on rows that stand in the experts' order."""

    gate_up_proj: Annotated[Any, "in -> 2m"]
    down_proj: Annotated[Any, "m -> in"]
    act_fn: Layer = field(default_factory=SiLU)

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("act_fn", self.act_fn, Layer)
        width, m, E = self.gate_up_proj.out_features, self.down_proj.in_features, self.down_proj.experts
        if width != 2 * m or self.count != E:
            raise ValueError(
                f"gate_up_proj is of {self.count} experts, {width} wide, expected {E} and {2 * m}, to go with down_proj"
            )

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, d) -> (R, d)
        """Return o, of `counts` rows of each expert, and a cache with p and u of the gate."""
        c, c_cache = self.gate_up_proj.forward(x, counts)
        z, p, u = self.gated(c)
        o, o_cache = self.down_proj.forward(z, counts)
        return o, (c_cache, o_cache, p, u)

    def gated(self, c: Array) -> tuple[Array, Array, Array]:  # (R, 2 m) -> (R, m) each
        """Return z, and its slopes p and u."""
        return gate(self.act_fn, *halves(c))

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, d), and the gradients of both weights, of dy = do."""
        c_cache, o_cache, p, u = cache
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


@dataclass(eq=False, repr=False)
class MixtureOfExperts(Layer):
    """A router and its experts, and perhaps one that all rows share: what stands in the place of a decoder's MLP."""

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
        """Return what the shared expert and its gate add to dx, and their gradients."""
        s_cache, t_cache, s, q = cache
        ds = q * dy  # eq. (moe.12)
        dt = q * (1 - q) * inner(dy, s)  # eq. (moe.13)
        dx_s, s_grads = self.shared_expert.backward(ds, s_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx_t, t_grads = self.shared_expert_gate.backward(dt, t_cache, need_dx=need_dx)  # type: ignore[union-attr]
        dx = dx_s + dx_t if dx_s is not None else None
        return dx, nest("shared_expert", s_grads) | nest("shared_expert_gate", t_grads)


def top_experts(scores: Array, top_k: int) -> Array:  # (N, E) -> (N, K)
    """Return the numbers of each row's highest scores, the highest first; of equal ones, the lower number first."""
    return backend_of(scores).xp.argsort(-scores.real, axis=1, kind="stable")[:, :top_k]


def kept_index(choice: Array) -> tuple[Array, Array]:  # (N, K) -> an index of (N, E)
    """Return the index of each row's kept experts."""
    return backend_of(choice).xp.arange(len(choice))[:, None], choice


def tallied(choice: Array, experts: int) -> Array:  # (N, K) -> (E,)
    """Return how many rows keep each expert; `bincount` would make a GPU wait."""
    return (choice.reshape(-1, 1) == backend_of(choice).xp.arange(experts)).sum(axis=0)


def masked_to_kept(scores: Array, choice: Array) -> Array:  # (N, E) -> (N, E)
    """Return the kept experts' scores, and minus infinity elsewhere: of exp there remains 0."""
    xp = backend_of(scores).xp
    masked = xp.full_like(scores, -xp.inf)
    masked[kept_index(choice)] = scores[kept_index(choice)]
    return masked


def softmax_back(p: Array, dp: Array) -> Array:  # (N, E), (N, E) -> (N, E)
    """Return the gradient at the scores, of that at their softmax."""
    d_scores = p * (dp - inner(p, dp))  # eq. (moe.3)
    return d_scores


def balance(scores: Array, top_k: int) -> tuple[Array, Array]:  # (N, E) -> (), (N, E)
    """Return how unevenly a router spreads its rows, and the gradient at its scores.

    Parameters
    ----------
    scores : array (N, E), float
        What a router's weight gives, ``router.weight.forward(x)[0]``; of several layers, one below the other.
    top_k : int
        How many experts a row keeps.

    Returns
    -------
    loss : array without axes
        E sum_e f_e mean_n p_ne, as transformers computes it where no position is masked.
    d_scores : array (N, E)
        Its gradient.
    """
    check_array("scores", scores)
    n, E = scores.shape
    choice = top_experts(scores, check_integer("top_k", top_k, at_least=1, at_most=E))
    f = tallied(choice, E).astype(scores.dtype) / n
    p, xp = softmax(scores), backend_of(scores).xp
    loss = E * (f * p.mean(axis=0)).sum()  # eq. (moe.14)
    dp = xp.broadcast_to(E * f / n, p.shape)  # eq. (moe.15)
    return loss, softmax_back(p, dp)


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


# --- speed ---

ROWS = 128
"""Of 2,048 rows with m = 192, a gate in float32 takes 0.3 of the time of all rows at once, on one core."""


@dataclass(eq=False, repr=False)
class ExpertsByRows(Experts):
    """Experts whose gate takes some rows at a time: the same numbers, in arrays that stay in a core's cache.

    The gate takes a dozen passes over them. On a GPU it takes all rows at once: each kernel has to be started.
    """

    rows: int = ROWS

    def gated(self, c: Array) -> tuple[Array, Array, Array]:  # (R, 2 m) -> (R, m) each
        """Return z, and its slopes p and u."""
        if not isinstance(c, np.ndarray) or len(c) <= self.rows:
            return super().gated(c)
        a, b = halves(c)
        z, p, u = (np.empty(a.shape, c.dtype) for _ in range(3))
        for start in range(0, len(c), self.rows):
            part = slice(start, start + self.rows)
            z[part], p[part], u[part] = gate(self.act_fn, a[part], b[part])
        return z, p, u
