"""Blockwise attention: the same numbers as `minilora.layers.attention`, without storing all of P.

P is (T, T) for each head. Here it exists only for blocks of queries and keys, and blocks of later keys, where P is 0,
are skipped. So a step's memory grows with T instead of T^2, and a block stays in a core's cache.

FORWARD. The softmax of a row needs its largest score m_t and the sum of its exponentials Z_t, over all keys. Keep both
for the keys so far, and with them N_t, the sum of the values times the exponentials. From one block of keys J to the
next they become

    m'_t = max(m_t, max_{u in J} S_tu)                     (blk.1)    (T, 1)    at the start m = -inf, Z = N = 0
    E_tu = exp(S_tu - m'_t)    for u in J                  (blk.2)    (T, J)
    f_t  = exp(m_t - m'_t)                                 (blk.3)    (T, 1)    brings what was summed to the new m
    Z'_t = f_t Z_t + sum_{u in J} E_tu                     (blk.4)    (T, 1)
    N'_tj = f_t N_tj + sum_{u in J} E_tu v_uj              (blk.5)    (T, D)

with S of (att.1). After the last block, Z_t = sum_u exp(S_tu - m_t), so P_tu = E_tu / Z_t, and (att.3) is

    o_tj = N_tj / Z_t                                      (blk.6)    (T, D)

BACKWARD has kept o, m and Z, and computes each block of E again, by (blk.2) with the last m. o does not depend on m,
which only scales N and Z alike, so m has no gradient. Through (blk.6), with N = o Z, and then through the sums:

    dN_tj = do_tj / Z_t                                    (blk.7)    (T, D)
    dZ_t  = -sum_j do_tj N_tj / Z_t^2 = -sum_j dN_tj o_tj  (blk.8)    (T, 1)    known before any block is
    dE_tu = sum_j dN_tj v_uj + dZ_t                        (blk.9)    (T, J)
    dS_tu = dE_tu E_tu                                     (blk.10)   (T, J)    which is (att.6)

and in (att.4), (att.7) and (att.8) each block adds its part of the sum over t or u:

    dv_uj += sum_t E_tu dN_tj                              (blk.11)   (J, D)
    dq_tj += c sum_u dS_tu k_uj                            (blk.12)   (T, D)
    dk_uj += c sum_t dS_tu q_tj                            (blk.13)   (J, D)

Source: Dao et al., "FlashAttention", arXiv 2205.14135; Dao, "FlashAttention-2", arXiv 2307.08691.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import iadd, imul, isub
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array
from ..layer import inner
from ..layers.attention import Attention, group_rows, mask


@dataclass(frozen=True)
class Blocks:
    """Block sizes, and the sequence length up to which plain attention is as fast."""

    queries: int
    keys: int  # at least as many: then only the last block of a row of blocks has masked scores
    plain_up_to: int

    def __post_init__(self) -> None:
        if not 0 < self.queries <= self.keys:
            raise ValueError(f"a block has {self.queries} queries and {self.keys} keys, expected at least as many keys")


CPU = Blocks(queries=64, keys=256, plain_up_to=128)
"""The time of forward and backward relative to plain attention, measured on one core with 2 MB of its own cache::

                                           T = 128    256     512    1024    2048
    3 key heads of 3 heads, D = 64            1.05    0.75    0.61    0.52    0.46
    the same with other blocks: 32 x 256      0.96    0.70    0.59    0.54    0.48
                                64 x 64       1.08    0.82    0.63    0.55    0.52
                                128 x 256     1.35    0.81    0.67    0.54    0.47
                                256 x 256     1.27    1.08    0.81    0.61    0.49
    8 key heads of 4 heads, D = 128                   0.84            0.67

T is the number of positions.
"""
GPU = Blocks(queries=1024, keys=1024, plain_up_to=2048)
"""Not measured. A block needs about 25 kernels, and launching them takes longer than computing small blocks."""


BEFORE: tuple[Any, Any, Any] = -math.inf, 0.0, 0.0
"""m, Z and N before the first key."""


@dataclass(eq=False, repr=False)
class BlockwiseAttention(Attention):
    """Attention in blocks for long texts, and plain attention for short ones."""

    blocks: Blocks | None = None  # by default `CPU` or `GPU`, by the library

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        """Return o and P, or in blocks o with o, m and Z instead of P."""
        blocks = self.blocks_for(q)
        if q.shape[-2] <= blocks.plain_up_to:
            return super().attend(q, k, v)
        o, m, Z = attend(q, k, v, blocks)
        return o, (o, m, Z)

    def attend_backward(self, do: Array, q: Array, k: Array, v: Array, P: Any) -> tuple[Array, Array, Array]:
        """Return dq, dk and dv."""
        blocks = self.blocks_for(q)
        if q.shape[-2] <= blocks.plain_up_to:
            return super().attend_backward(do, q, k, v, P)
        o, m, Z = P
        return attend_backward(do, q, k, v, o, m, Z, blocks)

    def blocks_for(self, x: Array) -> Blocks:
        """Return the block sizes for arrays of this library."""
        return self.blocks or (CPU if isinstance(x, np.ndarray) else GPU)


def attend(q: Array, k: Array, v: Array, blocks: Blocks) -> tuple[Array, Array, Array]:
    """Return o, of the shape of q (B, K, g, T, D), m and Z (B, K, g, T, 1); k and v are (B, K, 1, U, D).

    The last of the T queries is at the last of the U positions. o has the memory order of `Attention.join`.
    """
    xp, (B, K, g, T, D), past = backend_of(q).xp, q.shape, k.shape[-2] - q.shape[-2]
    o = xp.empty((B, T, K, g, D), q.dtype).transpose(0, 2, 3, 1, 4)
    largest, sums = xp.empty((B, K, g, T, 1), q.real.dtype), xp.empty((B, K, g, T, 1), q.dtype)
    for t in spans(T, blocks.queries):
        n = t.stop - t.start
        m, Z, N = BEFORE
        cq_rows = group_rows(D**-0.5 * q[..., t, :])
        for u in spans(past + t.stop, blocks.keys):
            k_rows, v_rows = k[:, :, 0, u], v[:, :, 0, u]
            S = scores(cq_rows, k_rows, n, masked=u.stop == past + t.stop)
            m_new = xp.maximum(m, S.real.max(axis=-1, keepdims=True))  # eq. (blk.1)  (B, K, g n, 1)
            E = exponentials(S, m_new)
            f = xp.exp(m - m_new)  # eq. (blk.3)  (B, K, g n, 1)
            Z = f * Z + E.sum(axis=-1, keepdims=True)  # eq. (blk.4)  (B, K, g n, 1)
            N = f * N + E @ v_rows  # eq. (blk.5)  (B, K, g n, D)
            m = m_new
        o[..., t, :] = (N / Z).reshape(B, K, g, n, D)  # eq. (blk.6)
        largest[..., t, :], sums[..., t, :] = m.reshape(B, K, g, n, 1), Z.reshape(B, K, g, n, 1)
    return o, largest, sums


def attend_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, m: Array, Z: Array, blocks: Blocks
) -> tuple[Array, Array, Array]:
    """Return dq, dk and dv, of the shapes of q, k and v."""
    xp, (T, D), past = backend_of(q).xp, q.shape[-2:], k.shape[-2] - q.shape[-2]
    c = D**-0.5
    dq, dk, dv = xp.empty(q.shape, q.dtype), xp.zeros(k.shape, k.dtype), xp.zeros(v.shape, v.dtype)
    for t in spans(T, blocks.queries):
        do_rows, q_rows, o_rows, m_rows, Z_rows = (group_rows(rows[..., t, :]) for rows in (do, q, o, m, Z))
        dN = do_rows / Z_rows  # eq. (blk.7)  (B, K, g n, D)
        dZ = -inner(dN, o_rows)  # eq. (blk.8)  (B, K, g n, 1)
        cq_rows, dq_rows = c * q_rows, xp.zeros(q_rows.shape, q.dtype)
        for u in spans(past + t.stop, blocks.keys):
            k_rows, v_rows = k[:, :, 0, u], v[:, :, 0, u]
            S = scores(cq_rows, k_rows, t.stop - t.start, masked=u.stop == past + t.stop)
            E = exponentials(S, m_rows)
            dE = iadd(dN @ v_rows.swapaxes(-1, -2), dZ)  # eq. (blk.9)  (B, K, g n, J)
            dS = imul(dE, E)  # eq. (blk.10)  (B, K, g n, J), in the place of dE
            dv[:, :, 0, u] += E.swapaxes(-1, -2) @ dN  # eq. (blk.11)
            dq_rows += dS @ k_rows * c  # eq. (blk.12)
            dk[:, :, 0, u] += dS.swapaxes(-1, -2) @ cq_rows  # eq. (blk.13)
        dq[..., t, :] = dq_rows.reshape(dq[..., t, :].shape)
    return dq, dk, dv


def scores(cq_rows: Array, k_rows: Array, n: int, *, masked: bool) -> Array:  # (B, K, g n, D), (B, K, J, D)
    """Return S (B, K, g n, J) of (att.1) for queries already scaled by c; later positions are -inf."""
    S = cq_rows @ k_rows.swapaxes(-1, -2)
    return mask(S, n) if masked else S


def exponentials(S: Array, m: Array) -> Array:  # (B, K, g n, J), (B, K, g n, 1) -> (B, K, g n, J)
    """Return E, overwriting S."""
    return backend_of(S).xp.exp(isub(S, m), out=S)  # eq. (blk.2)


def spans(stop: int, length: int) -> list[slice]:
    """Return slices of one length up to `stop` in order; the first may be shorter."""
    return [slice(max(0, end - length), end) for end in range(stop, 0, -length)][::-1]
