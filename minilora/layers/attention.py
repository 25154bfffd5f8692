"""Causal attention with grouped queries: each position attends to those up to its own.

There are H query heads and K key heads, where K divides H: query head h uses key head k = h // g, with g = H / K heads
per group. Every head is D wide. From x (T, d), the projections give q (T, H D), k and v (T, K D); q and k are rotated
by position, see `minilora.layers.rotary`. With c = 1/sqrt(D), and for one head, position t reading from u:

    S_tu = c sum_j q_tj k_uj      for u <= t              (att.1)    (T, T)     later positions are masked
    P_tu = exp(S_tu) / sum_{w <= t} exp(S_tw)             (att.2)    (T, T)     the softmax of each row
    o_tj = sum_u P_tu v_uj                                (att.3)    (T, D)

and y = o W_o^T of the heads' outputs side by side. Backward, (att.3) and (att.1) are products of matrices, as a linear
layer is. S_tw acts on all of row t of P, with dP_tu/dS_tw = P_tu ([u = w] - P_tw). Where S is masked, P is 0, and so
dS is 0:

    dv_uj = sum_t P_tu do_tj          dv = P^T do         (att.4)    (T, D)
    dP_tu = sum_j do_tj v_uj          dP = do v^T         (att.5)    (T, T)
    dS_tu = P_tu (dP_tu - sum_w P_tw dP_tw)               (att.6)    (T, T)
    dq_tj = c sum_u dS_tu k_uj        dq = c dS k         (att.7)    (T, D)
    dk_uj = c sum_t dS_tu q_tj        dk = c dS^T q       (att.8)    (T, D)
    dx = the sum of q_proj's, k_proj's and v_proj's dx     (att.9)    (T, d)

In some models q and k are normalised before the rotation, each head separately with one weight (D,) for all heads, by
(norm.2) of `minilora.layers.norm`; dq and dk then pass through (norm.4).

The g heads of a group share k and v, so dk and dv sum over them. The code stacks the queries of a group as g T rows:
then each equation is one product for the whole group, and its sum over rows includes the sum over heads.

Source: Vaswani et al., arXiv 1706.03762; Ainslie et al., "GQA", arXiv 2305.13245, for groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from ..backend import backend_of
from ..checks import Array
from ..layer import Cache, Layer, check_input, inner, nest, rows, trains
from .norm import RMSNorm
from .rotary import Rotary

Past: TypeAlias = tuple[Array, Array]
"""The rotated keys and the values of earlier positions: (B, K, 1, T, D) each."""


@dataclass(eq=False, repr=False)
class Attention(Layer):
    """Attention with four linear layers, which can have adapters.

    D is the rotations' width; H and K follow from the widths of q_proj and k_proj.
    """

    q_proj: Annotated[Layer, "in -> HD"]
    k_proj: Annotated[Layer, "in -> KD"]
    v_proj: Annotated[Layer, "in -> KD"]
    o_proj: Annotated[Layer, "HD -> out"]
    rotary: Annotated[Rotary, "D -> D"]
    q_norm: Annotated[RMSNorm | None, "D -> D"] = None
    k_norm: Annotated[RMSNorm | None, "D -> D"] = None

    takes = "... T in"

    def __post_init__(self) -> None:
        super().__post_init__()
        HD, KD, D = self.q_proj.out_features, self.k_proj.out_features, self.rotary.in_features
        if HD % KD or KD % D:
            raise ValueError(f"q_proj has {HD} outputs, k_proj {KD}: expected H * {D} and K * {D}, where K divides H")

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., T, d) -> (..., T, d)
        """Return y, and a cache with q, k, v and P."""
        (q, k, v), linears, heads = self.heads(x)
        o, P = self.attend(q, k, v)
        y, o_cache = self.o_proj.forward(self.join(o))
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y, (x.shape, (*linears, o_cache), heads, (q, k, v, P))

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., T, d), and the gradients of the four layers and of the norms."""
        shape, linears, (q_norm, k_norm, q_turn, k_turn), (q, k, v, P) = cache
        q_cache, k_cache, v_cache, o_cache = linears
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        below = need_dx or trains(self.q_proj, self.k_proj, self.v_proj, *norms)
        do, o_grads = self.o_proj.backward(rows(dy), o_cache, need_dx=below)
        grads = nest("o_proj", o_grads)
        if do is None:  # no lower layer trains, and the caller needs no dx
            return None, grads
        dq, dk, dv = self.attend_backward(self.split(do, shape[-2]), q, k, v, P)
        dq, dk = self.rotary.backward(dq, q_turn)[0], self.rotary.backward(dk, k_turn)[0]
        dq, q_norm_grads = normed_back(self.q_norm, dq, q_norm)
        dk, k_norm_grads = normed_back(self.k_norm, dk, k_norm)
        dx_q, q_grads = self.q_proj.backward(self.join(dq), q_cache, need_dx=need_dx)
        dx_k, k_grads = self.k_proj.backward(self.join(dk), k_cache, need_dx=need_dx)
        dx_v, v_grads = self.v_proj.backward(self.join(dv), v_cache, need_dx=need_dx)
        grads |= nest("q_proj", q_grads) | nest("k_proj", k_grads) | nest("v_proj", v_grads)
        grads |= nest("q_norm", q_norm_grads) | nest("k_norm", k_norm_grads)
        dx = dx_q + dx_k + dx_v if dx_q is not None else None  # eq. (att.9)
        return None if dx is None else dx.reshape(shape), grads

    def extend(self, x: Array, past: Past | None) -> tuple[Array, Past]:  # (..., T, d) -> (..., T, d)
        """Return y for x at the positions after `past`, and the past that includes x. There is no backward."""
        check_input(self, x, self.takes)
        (q, k, v), _, _ = self.heads(x, 0 if past is None else past[0].shape[-2])
        if past is not None:
            k, v = (backend_of(x).xp.concatenate(pair, axis=-2) for pair in zip(past, (k, v), strict=True))
        o, _ = self.attend(q, k, v)
        y = self.o_proj(self.join(o))
        return y.reshape(*x.shape[:-1], y.shape[-1]), (k, v)

    def heads(self, x: Array, start: int = 0) -> tuple[tuple[Array, Array, Array], Cache, Cache]:
        """Return q, k and v for the positions from `start` on, with q and k normalised and rotated, and the caches."""
        h, T = rows(x), x.shape[-2]  # h (B T, d)
        (q, q_cache), (k, k_cache), (v, v_cache) = (p.forward(h) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, q_norm = normed(self.q_norm, self.split(q, T))
        k, k_norm = normed(self.k_norm, self.split(k, T))
        (q, q_turn), (k, k_turn) = self.rotary.forward(q, start), self.rotary.forward(k, start)
        return (q, k, self.split(v, T)), (q_cache, k_cache, v_cache), (q_norm, k_norm, q_turn, k_turn)

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        """Return o and P. `minilora.fast.blockwise` needs less memory for long texts."""
        return attend(q, k, v)

    def attend_backward(self, do: Array, q: Array, k: Array, v: Array, P: Any) -> tuple[Array, Array, Array]:
        """Return dq, dk and dv."""
        return attend_backward(do, q, k, v, P)

    def split(self, x: Array, T: int) -> Array:  # (B T, heads D) -> (B, K, heads / K, T, D)
        """Split the entries by head, grouping heads that share a key, without copying."""
        D = self.rotary.in_features
        K = self.k_proj.out_features // D
        return x.reshape(len(x) // T, T, K, x.shape[1] // (K * D), D).transpose(0, 2, 3, 1, 4)

    def join(self, heads: Array) -> Array:  # (B, K, heads / K, T, D) -> (B T, heads D)
        """Join the heads' entries."""
        B, K, g, T, D = heads.shape
        return heads.transpose(0, 3, 1, 2, 4).reshape(B * T, K * g * D)


def normed(norm: RMSNorm | None, heads: Array) -> tuple[Array, Cache | None]:  # (B, K, g, T, D)
    """Return each head's normalised rows with the cache; without a norm, the rows themselves."""
    return (heads, None) if norm is None else norm.forward(heads)


def normed_back(norm: RMSNorm | None, dy: Array, cache: Cache | None) -> tuple[Any, dict[str, Array]]:
    """Return the gradient with respect to the rows, and the norm's gradients."""
    return (dy, {}) if norm is None or cache is None else norm.backward(dy, cache)


def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Return o (B, K, g, T, D) and P (B, K, g T, U) for q (B, K, g, T, D), k and v (B, K, 1, U, D).

    The last of the T queries is at the last of the U positions.
    """
    q_rows, k_rows, v_rows = group_rows(q), group_rows(k), group_rows(v)
    c = q.shape[-1] ** -0.5
    S = mask(c * q_rows @ k_rows.swapaxes(-1, -2), q.shape[-2])  # eq. (att.1)
    P = softmax(S)  # eq. (att.2)
    o = P @ v_rows  # eq. (att.3)
    return o.reshape(q.shape), P


def attend_backward(do: Array, q: Array, k: Array, v: Array, P: Array) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv, with the shapes of q, k and v."""
    do_rows, q_rows, k_rows, v_rows = group_rows(do), group_rows(q), group_rows(k), group_rows(v)
    c = q.shape[-1] ** -0.5
    dv = P.swapaxes(-1, -2) @ do_rows  # eq. (att.4)
    dP = do_rows @ v_rows.swapaxes(-1, -2)  # eq. (att.5)
    dS = P * (dP - inner(P, dP))  # eq. (att.6)
    dq = dS @ k_rows * c  # eq. (att.7)
    dk = dS.swapaxes(-1, -2) @ q_rows * c  # eq. (att.8)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def group_rows(heads: Array) -> Array:  # (B, K, g, T, D) -> (B, K, g T, D)
    """Stack the rows of a group's heads, so that one product handles the whole group."""
    B, K, g, T, D = heads.shape
    return heads.reshape(B, K, g * T, D)


def mask(S: Array, T: int) -> Array:  # (B, K, g T, U) -> (B, K, g T, U)
    """Set S_tu to minus infinity in place where u is later than t, so that its exp is 0.

    The rows of S are the T queries of one head after another, so row i is the query at position i mod T.
    """
    xp, (gT, U) = backend_of(S).xp, S.shape[-2:]
    t = xp.arange(gT) % T + (U - T)  # (g T,)
    xp.copyto(S, -xp.inf, where=xp.arange(U) > t[:, None])
    return S


def softmax(S: Array) -> Array:  # (..., U) -> (..., U)
    """Return the softmax of each row. The row's largest entry is subtracted first, so exp cannot overflow."""
    e = backend_of(S).xp.exp(S - S.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
