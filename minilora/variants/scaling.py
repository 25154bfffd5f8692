"""rsLoRA and LoRA+: variants of LoRA that change a single number, not the layer.

RSLORA asks how far one step moves the output. B starts at zero, so the first step of plain gradient descent is
B = -lr s dy^T h, by (3). For an input x the output then changes by

    s h B^T = -lr s^2 (h . h') dy'          with h . h' = sum over the r entries of h_k h'_k

a sum of r terms of one size. It grows like s^2 r. With s = alpha / r a larger rank learns more slowly, and a rank of a
hundred hardly at all; the size stays the same only for

    s = alpha / sqrt(r)                     (rs.1)

LORA+ asks the same of Adam, whose steps have one length for every entry, whatever the gradient. A step of length lr_A
changes an entry of h by up to lr_A sum_i |x_i|, a sum of `in` terms. A step of length lr_B changes an entry of y by up
to s lr_B sum_k |h_k|, a sum of r terms. In a wide layer a rate that A can bear is too small for B. So B has a multiple
of it:

    lr_B = ratio lr_A                       (lp.1)

Sources: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732; Hayou et al.,
"LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
"""

from __future__ import annotations

import math

from ..checks import check_number


def scaling(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """Return the factor of B A: alpha / r or, if rank-stabilised, alpha / sqrt(r)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank  # eq. (rs.1)


def loraplus(lr: float, ratio: float = 16.0) -> dict[str, float]:
    """Return rates for ``train(..., lr=...)`` or ``Adam(..., lr=...)``: `lr`, and a multiple of it for every lora_B.

    The paper takes a ratio of 16 as a rule of thumb, with a smaller lr than for LoRA. Numbers that are not above 0 are
    a ValueError.
    """
    lr, ratio = check_number("lr", lr, above=0), check_number("ratio", ratio, above=0)
    return {"": lr, "lora_B": ratio * lr}  # eq. (lp.1)
