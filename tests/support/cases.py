"""The three layers as functions of a dict of arrays, so that one property serves them all.

A `Case` is made from classes, not from the library's own layers: `tests/gradient_bugs.py` hands in broken ones, and the
properties that pass on ours must fail on those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora import Linear, LoRA, LoRALinear

from .problems import Problem

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A layer under test: how to build it from arrays, which arrays it has, and its forward in plain loops."""

    name: str
    arrays: Callable[[Problem], Arrays]
    build: Callable[[Problem, Arrays], Any]
    loops: Callable[[Problem, Arrays, np.ndarray], np.ndarray]

    def params(self, problem: Problem) -> Arrays:
        return {"x": problem.x, **self.arrays(problem)}

    def output(self, problem: Problem) -> Callable[[Arrays], np.ndarray]:
        return lambda p: self.build(problem, p)(p["x"])

    def gradients(self, problem: Problem, params: Arrays, dy: np.ndarray) -> Arrays:
        layer = self.build(problem, params)
        dx, grads = layer.backward(dy, layer.forward(params["x"])[1])
        return {"x": dx, **grads}


def linear_by_loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
    y = np.zeros((len(x), problem.out_features))
    for n in range(len(x)):
        for o in range(problem.out_features):
            total = p["bias"][o] if "bias" in p else 0.0
            for i in range(problem.in_features):
                total += x[n, i] * p["weight"][o, i]
            y[n, o] = total
    return y


def lora_by_loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
    y = np.zeros((len(x), problem.out_features))
    for n in range(len(x)):
        for o in range(problem.out_features):
            for k in range(problem.rank):
                for i in range(problem.in_features):
                    y[n, o] += problem.alpha / problem.rank * x[n, i] * p["lora_A"][k, i] * p["lora_B"][o, k]
    return y


def linear_case(cls: type = Linear) -> Case:
    return Case("Linear", lambda c: c.full, lambda c, p: cls(p["weight"], p.get("bias")), linear_by_loops)


def lora_case(cls: type = LoRA) -> Case:
    return Case("LoRA", lambda c: c.factors, lambda c, p: cls(p["lora_A"], p["lora_B"], c.alpha), lora_by_loops)


def lora_linear_case(cls: type = LoRALinear) -> Case:
    def build(problem: Problem, p: Arrays) -> LoRALinear:
        dtype = p["lora_A"].real.dtype
        frozen = {name: array.astype(dtype) for name, array in problem.full.items()}
        return cls(Linear(**frozen), LoRA(p["lora_A"], p["lora_B"], problem.alpha))

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        return linear_by_loops(problem, problem.full, x) + lora_by_loops(problem, p, x)

    return Case("LoRALinear", lambda c: c.factors, build, loops)


CASES = (linear_case(), lora_case(), lora_linear_case())
