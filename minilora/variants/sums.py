"""Combining adapters: their weighted sum, exactly, by factors, or as the best adapter of a given rank.

THE SUM ("cat"). Changes of weight add up, and so do products of factors that lie side by side:

    sum_j w_j s_j B_j A_j = B A      B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]    A = [A_1; A_2; ...]      (sum.1)

The rank is the sum of the ranks, and alpha = r, so that the scaling is 1. A negative weight goes into B like any other.

A SMALLER RANK ("svd"). The best change of rank r near D = s B A, in the sum of squares, has the r largest singular
values of D and their vectors (Eckart and Young). D (out, in) need not be formed for them. With thin factors
B = Q_B R_B and A^T = Q_A R_A, where Q has orthonormal columns,

    D = Q_B (s R_B R_A^T) Q_A^T                                                                      (sum.2)

and the small matrix in brackets, (r, r) at most, has the singular values of D: from U S V^T of it,

    B_r = Q_B U_r sqrt(S_r)          A_r = sqrt(S_r) V_r^T Q_A^T                                     (sum.3)

No adapter of rank r is nearer, and the distance is what the discarded singular values have together:

    |D - B_r A_r| = sqrt(S_{r+1}^2 + S_{r+2}^2 + ...)                                                (sum.4)

THE FACTORS ADDED ("linear"). Where all ranks are one, PEFT also adds B to B and A to A, each with the root of its
c_j = w_j s_j, and the sign in A:

    B = sum_j sqrt|c_j| B_j     A = sum_j sign(c_j) sqrt|c_j| A_j                                    (sum.5)

    B A = sum_j c_j B_j A_j + sum_{i != j} sign(c_j) sqrt|c_i c_j| B_i A_j

The rank stays, and the first sum is the wanted one. The others, B_1 A_2 and B_2 A_1 of two adapters, are no one's.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np

from ..backend import backend_of
from ..checks import RECAST, Array, check_array, check_choice, check_instance, check_number, check_rank_within, kind_of
from ..lora import LoRA
from .adapter import Adapter

COMBINATIONS = ("cat", "linear", "svd")
"""The methods of `weighted_sum`, under PEFT's names."""


def weighted_sum(
    adapters: Sequence[LoRA], weights: Sequence[float], combination_type: str = "cat", rank: int | None = None
) -> LoRA:
    """Return one adapter whose change of weight is the weighted sum of the others', or close to it.

    Parameters
    ----------
    adapters : sequence of LoRA
        Of one shape, dtype and library; their ranks and alphas may differ.
    weights : sequence of float
        One for each adapter; negative ones subtract.
    combination_type : {"cat", "linear", "svd"}
        "cat" is exact, and its rank is the sum of the ranks. "svd" is the nearest adapter of a smaller rank. "linear"
        adds factors of one rank, which also adds the cross terms of (sum.5).
    rank : int, optional
        Of "svd" alone. By default the largest of the adapters' ranks, or the smaller width where that is below it.

    Returns
    -------
    LoRA
        With new arrays and a scaling of 1; an `Adapter` where the first one is.

    Raises
    ------
    ValueError, TypeError
        If there is no adapter, or not one weight for each, if two adapters do not fit each other, or `rank` does not
        fit. If one's change of the original base is not s B A: a DoRA's, or that of one that started by PiSSA, of which
        `over_original` can be added.
    """
    check_choice("combination_type", combination_type, COMBINATIONS)
    weights = check_summands(adapters, weights)
    ranks = [adapter.rank for adapter in adapters]
    if rank is not None and combination_type != "svd":
        raise ValueError(f"rank is for combination_type 'svd' alone, got {rank!r} for {combination_type!r}")
    if combination_type == "linear":
        if len({*ranks}) > 1:
            raise ValueError(f"combination_type 'linear' adds factors of one rank, got ranks {ranks}")
        return _factors_added(adapters, weights)
    whole = _side_by_side(adapters, weights)
    if combination_type == "cat":
        return whole
    return best_of_rank(whole, min(max(ranks), *whole.shape) if rank is None else rank)


def _side_by_side(adapters: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    xp, pairs = backend_of(adapters[0].lora_A).xp, list(zip(adapters, weights, strict=True))
    B, A = [w * a.scaling * a.lora_B for a, w in pairs], [a.lora_A for a, _ in pairs]
    B, A = xp.concatenate(B, axis=1), xp.concatenate(A, axis=0)  # eq. (sum.1)
    return _like(adapters[0], A, B)


def _factors_added(adapters: Sequence[LoRA], weights: Sequence[float]) -> LoRA:
    changes = [w * a.scaling for a, w in zip(adapters, weights, strict=True)]
    roots = [abs(c) ** 0.5 for c in changes]
    signed, As, Bs = map(math.copysign, roots, changes), [a.lora_A for a in adapters], [a.lora_B for a in adapters]
    B, A = _added(roots, Bs), _added(signed, As)  # eq. (sum.5)
    return _like(adapters[0], A, B)


def _added(numbers: Iterable[float], arrays: Iterable[Array]) -> Array:
    """Return the weighted sum of arrays."""
    return functools.reduce(operator.add, map(operator.mul, numbers, arrays))


def best_of_rank(adapter: LoRA, rank: int) -> LoRA:
    """Return the adapter of this rank with the closest change of weight in the Frobenius norm.

    A rank that is not from 1 to the adapter's is a ValueError. So are one above min(in, out), and an adapter whose
    change of weight is no product, as in `weighted_sum`.
    """
    check_summands([adapter], [1.0])
    r = check_rank_within(rank, (adapter.rank, *adapter.shape))
    xp = backend_of(adapter.lora_A).xp
    (Q_B, R_B), (Q_A, R_A) = map(xp.linalg.qr, _tall(adapter))
    U, S, Vt = xp.linalg.svd(adapter.scaling * R_B @ R_A.T, full_matrices=False)  # eq. (sum.2)
    root = xp.sqrt(S[:r])
    B, A = Q_B @ (U[:, :r] * root), (root[:, None] * Vt[:r]) @ Q_A.T  # eq. (sum.3)
    dtype = adapter.lora_A.dtype
    return _like(adapter, A.astype(dtype, copy=False), B.astype(dtype, copy=False))


def discarded(adapter: LoRA, rank: int) -> float:
    """Return the distance of `best_of_rank` from an adapter's change of weight, the smallest for that rank."""
    r, S = check_rank_within(rank, adapter.shape), singular_values(adapter)
    lost = (S[r:] ** 2).sum() ** 0.5  # eq. (sum.4)
    return float(lost)


def singular_values(adapter: LoRA) -> Array:  # -> (min(r, in, out),)
    """Return the singular values of an adapter's change of weight, largest first."""
    linalg = backend_of(adapter.lora_A).xp.linalg
    # A factor that is not taller than wide is used directly: NumPy 2.5 needs much memory for its R.
    R_B, R_A = (linalg.qr(F, mode="r") if F.shape[0] > F.shape[1] else F for F in _tall(adapter))
    return linalg.svd(adapter.scaling * R_B @ R_A.T, compute_uv=False)  # those of eq. (sum.2), without vectors


def check_summands(adapters: Sequence[LoRA], weights: Sequence[float]) -> list[float]:
    """Return weights as floats, one for each adapter, and require adapters that can be added."""
    for name, values in (("adapters", adapters), ("weights", weights)):
        if not isinstance(values, Sequence | np.ndarray):
            raise TypeError(f"{name} must be a list, got {kind_of(values)}")
    if len(adapters) == 0 or len(adapters) != len(weights):
        raise ValueError(f"expected one weight for each adapter, got {len(adapters)} adapters, {len(weights)} weights")
    first = adapters[0]
    for i, adapter in enumerate(adapters):
        check_instance(f"adapters[{i}]", adapter, LoRA)
        check_array(f"adapters[{i}]", adapter.lora_A, like=first.lora_A, like_name="adapters[0]", how=RECAST)
        place, expected = ((a.shape, getattr(a, "kind", "linear"), getattr(a, "kernel", ())) for a in (adapter, first))
        if place != expected:
            raise ValueError(f"adapters[{i}] is of shape, kind and kernel {place}, expected {expected} as adapters[0]")
        started = getattr(adapter, "start", None) is not None
        if started or type(adapter) not in (LoRA, Adapter):
            what = f"{kind_of(adapter)}{', which has a start' if started else ''}"
            raise ValueError(f"adapters[{i}] is of the class {what}: its change of the original base is not s B A")
    return [check_number(f"weights[{i}]", w, above=-math.inf) for i, w in enumerate(weights)]


def _like(adapter: LoRA, A: Array, B: Array) -> LoRA:
    """Return new factors with a scaling of 1, for the same kind of layer."""
    if isinstance(adapter, Adapter):
        return Adapter(A, B, A.shape[0], kind=adapter.kind, kernel=adapter.kernel)
    return LoRA(A, B, A.shape[0])


def _tall(adapter: LoRA) -> tuple[Array, Array]:
    """Return B and A^T, converting float16, which LAPACK lacks, to float32."""
    half = adapter.lora_A.dtype == np.float16
    return tuple(F.astype(np.float32) if half else F for F in (adapter.lora_B, adapter.lora_A.T))
