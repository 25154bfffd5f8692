"""PiSSA: initialise the adapter with the largest part of the weight, and freeze the rest.

LoRA starts at s B A = 0, and learns a change of W. PiSSA splits W instead. With the singular value decomposition
W = sum_k u_k S_k v_k^T, the first r terms make the best matrix of rank r near W. They become the factors:

    A_k = sqrt(S_k / s) v_k^T        B_k = u_k sqrt(S_k / s)        k = 1 ... r        (pissa.1)
    W_rest = W - s B A                                                                 (pissa.2)

Then W_rest + s B A = W, and the output has not changed. But both factors have slopes from the first step on, along the
directions in which W does most.

AS A FILE. W_rest is no longer the W that others have. After training from (A0, B0) to (A, B), W has become
W + s (B A - B0 A0), and that is one adapter of rank 2r over the original W:

    B' = [B, B0]    A' = [A; -A0]    alpha' = 2 alpha                                  (pissa.3)

alpha is doubled since s = alpha / r, and r has doubled too. Under rsLoRA, where s = alpha / sqrt(r), alpha' is
sqrt(2) alpha.

Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
arXiv 2404.02948.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ..backend import backend_of
from ..checks import check_number, check_rank_within
from ..layers.quantized import FrozenQuantizedLinear
from ..linear import Linear
from ..lora import LoRA
from .adapter import Adapter
from .scaling import scaling


def pissa(linear: Linear, *, rank: int, alpha: float, use_rslora: bool = False) -> tuple[Linear, Adapter]:
    """Return a layer's remainder, and an adapter of its leading singular vectors. The layer does not change.

    A rank above min(in, out) is a ValueError: there are no more singular vectors.
    """
    if isinstance(linear, FrozenQuantizedLinear):
        raise ValueError(
            f"PiSSA subtracts its start from the weight, which a {type(linear).__name__} keeps in few bits: take "
            "LoRA's start, or minilora.loftq"
        )
    r, alpha = check_rank_within(rank, linear.shape), check_number("alpha", alpha, above=0)
    xp, s = backend_of(linear.weight).xp, scaling(alpha, r, use_rslora=use_rslora)
    U, S, Vt = xp.linalg.svd(linear.weight, full_matrices=False)
    root = xp.sqrt(S[:r] / s)
    A, B = root[:, None] * Vt[:r], U[:, :r] * root  # eq. (pissa.1)
    adapter = Adapter(A, B, alpha, use_rslora=use_rslora)
    rest = Linear(linear.weight - adapter.delta(), linear.bias)  # eq. (pissa.2)
    return rest, adapter


def over_original(adapter: Adapter) -> Adapter:
    """Return an adapter for the original base: one of rank 2r for PiSSA, otherwise the adapter itself."""
    if adapter.start is None:
        return adapter
    if type(adapter).delta is not LoRA.delta:
        raise ValueError(f"adapter is a {type(adapter).__name__}, whose own delta does not move to the original base")
    (A, B), (A0, B0) = ((a.lora_A, a.lora_B) for a in (adapter, adapter.start))
    join = backend_of(A).xp.concatenate
    times = math.sqrt(2) if adapter.use_rslora else 2
    B, A, alpha = join([B, B0], axis=1), join([A, -A0]), times * adapter.alpha  # eq. (pissa.3)
    return replace(adapter, lora_A=A, lora_B=B, alpha=alpha, start=None)
