"""The layers and models under test, each with a second way to compute its forward.

A `Case` is made from a class, not from the library's own layer alone: `mutants.py` hands in broken ones, and the claims
that hold for ours must fail for those.
"""

from __future__ import annotations

import math

import numpy as np

from minilora import MLP, Linear, LoRA, LoRALinear, ReLU, SiLU, Tanh, attach
from minilora.conformance.claims import CLAIMS, LINEAR_CLAIMS, ROW_CLAIMS, Arrays, Case
from minilora.conformance.problems import Problem

LAYER_CLAIMS = CLAIMS + ROW_CLAIMS + LINEAR_CLAIMS
HIDDEN = 4


def linear_by_loops(p: Arrays, x: np.ndarray) -> np.ndarray:
    y = np.zeros((len(x), len(p["weight"])), x.dtype)
    for n, o in np.ndindex(y.shape):
        y[n, o] = p["bias"][o] if "bias" in p else 0.0
        for i in range(x.shape[1]):
            y[n, o] += x[n, i] * p["weight"][o, i]
    return y


def lora_by_loops(p: Arrays, x: np.ndarray, alpha: float) -> np.ndarray:
    A, B = p["lora_A"], p["lora_B"]
    y = np.zeros((len(x), len(B)), x.dtype)
    for n, o in np.ndindex(y.shape):
        for k in range(len(A)):
            for i in range(x.shape[1]):
                y[n, o] += alpha / len(A) * x[n, i] * A[k, i] * B[o, k]
    return y


def linear_case(cls: type = Linear) -> Case:
    return Case(
        "Linear",
        lambda c: c.full,
        lambda c, p: cls(p["weight"], p.get("bias")),
        lambda c, p, x: linear_by_loops(p, x),
        claims=LAYER_CLAIMS,
    )


def lora_case(cls: type = LoRA) -> Case:
    return Case(
        "LoRA",
        lambda c: c.factors,
        lambda c, p: cls(p["lora_A"], p["lora_B"], c.alpha),
        lambda c, p, x: lora_by_loops(p, x, c.alpha),
        claims=LAYER_CLAIMS,
    )


def lora_linear_case(cls: type = LoRALinear) -> Case:
    def build(problem: Problem, p: Arrays) -> LoRALinear:
        frozen = {name: array.astype(p["lora_A"].real.dtype) for name, array in problem.full.items()}
        return cls(Linear(**frozen), LoRA(p["lora_A"], p["lora_B"], problem.alpha))

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        return linear_by_loops(problem.full, x) + lora_by_loops(p, x, problem.alpha)

    return Case("LoRALinear", lambda c: c.factors, build, loops, claims=LAYER_CLAIMS)


def each(function):
    """A function of one Python number, for every entry of an array."""
    return np.vectorize(function, otypes=[float])


FUNCTIONS = {
    "relu": each(lambda x: max(x, 0.0)),
    "tanh": each(math.tanh),
    "silu": each(lambda x: x / (1 + math.exp(-x))),
}


def away_from_zero(problem: Problem) -> np.ndarray:
    """The kink of ReLU is at 0, and a central difference across it measures no slope; some entry must be above."""
    x = problem.x + np.sign(problem.x)
    x[0, 0] = abs(x[0, 0])
    return x


def activation_case(name: str, cls: type) -> Case:
    return Case(
        cls.__name__,
        lambda c: {},
        lambda c, p: cls(),
        lambda c, p, x: FUNCTIONS[name](x),
        away_from_zero,
        CLAIMS,
    )


def named(path: str, arrays: Arrays) -> Arrays:
    return {f"{path}.{name}": array for name, array in arrays.items()}


def child(path: str, arrays: Arrays) -> Arrays:
    start = f"{path}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def mlp_arrays(problem: Problem) -> Arrays:
    """Of a size that leaves tanh its slope: where it is flat, nothing can be measured."""
    fc1 = {"weight": problem.randn("w1", HIDDEN, problem.in_features) / 4, "bias": problem.randn("b1", HIDDEN) / 4}
    fc2 = {
        "weight": problem.randn("w2", problem.out_features, HIDDEN),
        "bias": problem.randn("b2", problem.out_features),
    }
    return named("fc1", fc1) | named("fc2", fc2)


def mlp_by_loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
    h = linear_by_loops(child("fc1", p), x)
    return linear_by_loops(child("fc2", p), each(math.tanh)(h))


def build_mlp(p: Arrays) -> MLP:
    return MLP(fc1=Linear(**child("fc1", p)), act=Tanh(), fc2=Linear(**child("fc2", p)))


def mlp_case() -> Case:
    return Case("MLP", mlp_arrays, lambda c, p: build_mlp(p), mlp_by_loops, claims=CLAIMS + ROW_CLAIMS)


def adapted_mlp_case(*targets: str) -> Case:
    """An MLP with LoRA beside the layers named, and what it should give: the merged weights in loops."""

    def arrays(problem: Problem) -> Arrays:
        found = {}
        for path in targets:
            weight = mlp_arrays(problem)[f"{path}.weight"]
            found |= {
                f"{path}.lora_A": problem.randn(f"{path} A", problem.rank, weight.shape[1]),
                f"{path}.lora_B": problem.randn(f"{path} B", weight.shape[0], problem.rank) / 4,
            }
        return found

    def build(problem: Problem, p: Arrays) -> MLP:
        dtype = p[f"{targets[0]}.lora_A"].real.dtype
        base = build_mlp({name: array.astype(dtype) for name, array in mlp_arrays(problem).items()})
        return attach(base, {path: LoRA(**child(path, p), alpha=problem.alpha / 8) for path in targets})

    def loops(problem: Problem, p: Arrays, x: np.ndarray) -> np.ndarray:
        merged = mlp_arrays(problem)
        for path in targets:
            A, B = p[f"{path}.lora_A"], p[f"{path}.lora_B"]
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + problem.alpha / 8 / len(A) * (B @ A)
        return mlp_by_loops(problem, merged, x)

    return Case(f"MLP with LoRA on {', '.join(targets)}", arrays, build, loops, claims=CLAIMS + ROW_CLAIMS)


CASES = (linear_case(), lora_case(), lora_linear_case())
"""The layers of one product, which every test of training and devices takes."""
ACTIVATION_CASES = tuple(activation_case(name, cls) for name, cls in {"relu": ReLU, "tanh": Tanh, "silu": SiLU}.items())
MODEL_CASES = (mlp_case(), adapted_mlp_case("fc1"), adapted_mlp_case("fc2"), adapted_mlp_case("fc1", "fc2"))
ALL_CASES = CASES + ACTIVATION_CASES + MODEL_CASES
