"""Mixtures of experts under test, each with a second way to compute its forward: row by row and expert by expert."""

import math
from functools import partial

import numpy as np

from minilora import Layer
from minilora.layers.experts import MixtureOfExperts, Router
from minilora.variants.stackedlora import StackedLoRALinear

from .claims import Arrays, Case
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


def router_case(cls: type | None = None, row: str = "Router") -> Case:
    return case_of(row, router_by_loops, cls=cls)


def mixture_case(cls: type | None = None, row: str = "MixtureOfExperts") -> Case:
    return case_of(row, mixture_by_loops, MODEL_CLAIMS, cls=cls)


over_all_case = partial(router_case, row="Router, over all")
shared_case = partial(mixture_case, row="MixtureOfExperts, shared expert")
adapted_experts_case = partial(mixture_case, row="MixtureOfExperts, LoRA")

by_rows_case = partial(mixture_case, row="MixtureOfExperts, by rows")

EXPERT_CASES = (
    *(router_case(), over_all_case()),
    *(mixture_case(), shared_case(), adapted_experts_case(), by_rows_case()),
)
