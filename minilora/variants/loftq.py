"""LoftQ: a layer in four bits, with an adapter that starts with the quantisation error.

Q + s B A should be close to W, so each term in turn approximates what the other leaves of W, starting with B A = 0:

    Q = the quantised W - s B A                          (loftq.1)
    s B A = the best matrix of rank r near W - Q         (loftq.2)     from singular values, as (pissa.1)

The first round already makes |W - Q - s B A| smaller than the |W - Q| of plain quantisation. Later rounds gain less and
may even lose: (loftq.2) cannot make the sum worse, but (loftq.1) can. So the best round is kept.

Source: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659,
algorithm 1.
"""

from __future__ import annotations

from typing import Any

from ..layers.quantized import QuantizedLinear
from ..linear import Linear
from .adapter import Adapter
from .pissa import pissa


def loftq_layer(
    layer: Linear, *, rank: int, alpha: float, rounds: int, **options: Any
) -> tuple[QuantizedLinear, Adapter]:
    """Return the quantised layer with its adapter. `options` are those of `QuantizedLinear.from_linear`."""
    W, tried = layer.weight, []
    change = 0 * W
    for _ in range(rounds):
        rest = Linear(W - change, layer.bias)
        base = QuantizedLinear.from_linear(rest, **options)  # eq. (loftq.1)
        Q = base.weight
        _, adapter = pissa(Linear(W - Q), rank=rank, alpha=alpha)  # eq. (loftq.2)
        change = adapter.delta()
        tried.append((float(((W - Q - change) ** 2).sum()), base, adapter))
    return min(tried, key=lambda found: found[0])[1:]
