"""Mixtures of experts under test, each with a second way to compute its forward: row by row and expert by expert."""

import math

import numpy as np

from minilora import Layer
from minilora.layers.mixture import MixtureOfExperts
from minilora.layers.router import Router
from minilora.variants.stackedlora import StackedLoRALinear

from .claims import Arrays
from .language_cases import MODEL_CLAIMS, gated_by_loops, on_rows
from .loops import FUNCTIONS, case_of, child


def weight_by_loops(path: str, layer: Layer, p: Arrays) -> np.ndarray:
    """A stack's weight, with what its adapter adds: one pair of factors after the other."""
    if not isinstance(layer, StackedLoRALinear):
        return p.get(path, layer.weight)
    W, E = layer.base.weight.reshape(layer.experts, *layer.shape).copy(), layer.experts
    A, B = p[f"{path}.lora_A"], p[f"{path}.lora_B"]
    r = len(A) // E
    for e in range(E):
        for k in range(r):
            W[e] += layer.adapter.alpha / r * np.outer(B[:, k * E + e], A[e * r + k])
    return W if len(layer.base.weight.shape) == 3 else W[0]


def routed_by_loops(router: Router, W: np.ndarray, row: np.ndarray) -> dict[int, float]:
    """How much a row takes of each expert that it keeps, the best first."""
    scores = [sum(w * v for w, v in zip(of_expert, row, strict=True)) for of_expert in W]
    choice = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[: router.top_k]
    total = sum(math.exp(scores[e]) for e in (choice if router.norm_topk_prob else range(len(scores))))
    return {e: math.exp(scores[e]) / total for e in choice}


def router_by_loops(router: Router, p: Arrays, x: np.ndarray) -> np.ndarray:
    g = np.zeros((*x.shape[:-1], router.top_k))
    for at in np.ndindex(x.shape[:-1]):
        g[at] = list(routed_by_loops(router, p["weight"], x[at]).values())
    return g


def mixture_by_loops(layer: MixtureOfExperts, p: Arrays, x: np.ndarray) -> np.ndarray:
    router = weight_by_loops("gate.weight", layer.gate.weight, p)
    gate_up = weight_by_loops("experts.gate_up_proj", layer.experts.gate_up_proj, p)
    down = weight_by_loops("experts.down_proj", layer.experts.down_proj, p)
    y, m = np.zeros_like(x), down.shape[2]
    for at in np.ndindex(x.shape[:-1]):
        for e, share in routed_by_loops(layer.gate, router, x[at]).items():
            c = gate_up[e] @ x[at]
            y[at] += share * (down[e] @ (FUNCTIONS["silu"](c[:m]) * c[m:]))
    if layer.shared_expert is not None:
        opened = 1 / (1 + np.exp(-on_rows(child("shared_expert_gate", p), x)))
        y += opened * gated_by_loops(child("shared_expert", p), x)
    return y


ROUTERS = ("Router", "Router, over all")
MIXTURES = tuple(f"MixtureOfExperts{kind}" for kind in ("", ", shared expert", ", LoRA", ", by rows"))
EXPERT_CASES = (
    *(case_of(row, router_by_loops) for row in ROUTERS),
    *(case_of(row, mixture_by_loops, MODEL_CLAIMS) for row in MIXTURES),
)
