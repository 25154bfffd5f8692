"""The experiments that answer the questions: each returns a number or a choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from ..language.memory import LLAMA_2_7B, training_memory
from ..linear import Linear
from ..lora import LoRA
from ..optim import Adam
from ..training import evaluate, train
from ..variants.adapter import Adapter
from ..variants.dora import DoRA, DoRAAdapter
from ..verify.closed_form import best_adapter


def first_problem(alpha: float = 3.0) -> tuple[LoRA, np.ndarray, dict[str, np.ndarray]]:
    """Return a freshly initialised adapter, random inputs, and the gradients for a random dy."""
    rng = np.random.default_rng(5)
    layer = LoRA.init(6, 4, rank=2, alpha=alpha, rng=rng, dtype="float64")
    x, dy = rng.standard_normal((8, 6)), rng.standard_normal((8, 4))
    return layer, x, layer.backward(dy, layer.forward(x)[1])[1]


def _first_step(scale: float = 1.0) -> float:
    layer, _, grads = first_problem()
    Adam(layer.trainable(), lr=0.01).step({name: scale * g for name, g in grads.items()})
    return float(np.abs(layer.lora_B).max())


def _after_plain_step(alpha: float) -> float:
    layer, x, grads = first_problem(alpha)
    layer.lora_B -= 0.01 * grads["lora_B"]
    return float(np.abs(layer(x)).max())


def _slope_of_B(alpha: float) -> float:
    return float(np.abs(first_problem(alpha)[2]["lora_B"]).max())


def _off_by_one() -> float:
    X = np.random.default_rng(6).standard_normal((20_000, 50))
    return float(((X @ np.ones((50, 4))) ** 2).mean())


def _training_memory(rank: int | None = None, bits: int = 16) -> float:
    """Return the memory in GB for training a 7B model, without activations."""
    parts = training_memory(LLAMA_2_7B, tokens=1, rank=rank, bits=bits)
    return sum(parts[part] for part in ("weights", "trained", "gradients", "Adam")) / 1e9


def _square_matrices() -> int:
    """Return the number of square matrices in a block of Llama 3 8B."""
    config = replace(LLAMA_2_7B, intermediate_size=14336, num_key_value_heads=8)
    shapes = (shape for name, shape in config.shapes().items() if name.startswith("model.layers.0."))
    return sum(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


CURVE_RANKS = (1, 2, 4, 8, 16)


def rank_curve() -> dict[int, tuple[float, float]]:
    """Return for each rank the loss of the best adapter on the 60 rows that it was fitted to, and on 2,000 new rows."""
    rng = np.random.default_rng(0)
    change = rng.standard_normal((24, 4)) @ rng.standard_normal((4, 32)) / 2

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((count, 32))
        return x, x @ change.T + 2 * rng.standard_normal((count, 24))

    seen, new = rows(60), rows(2000)
    adapters = {rank: best_adapter(*seen, rank=rank) for rank in CURVE_RANKS}
    return {
        rank: (float(((layer(seen[0]) - seen[1]) ** 2).mean()), float(((layer(new[0]) - new[1]) ** 2).mean()))
        for rank, layer in adapters.items()
    }


def _best_rank() -> str:
    curve = rank_curve()
    return str(min(curve, key=lambda rank: curve[rank][1]))


RATES = (0.0005, 0.002, 0.008, 0.03, 0.12)


@cache
def rate_curve() -> dict[float, tuple[float, float]]:
    """Return for each rate the loss of an adapter of rank 4 on its 60 training rows, and on 2,000 new rows."""
    rng = np.random.default_rng(3)
    change = rng.standard_normal((8, 4)) @ rng.standard_normal((4, 24)) / 6

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((count, 24))
        return x, x @ change.T + rng.standard_normal((count, 8))

    seen, new, curve = rows(60), rows(2000), {}
    for rate in RATES:
        layer = LoRA.init(24, 8, rank=4, alpha=8, rng=np.random.default_rng(1), dtype="float64")
        train(layer, *seen, epochs=150, batch_size=20, lr=rate, rng=np.random.default_rng(2))
        curve[rate] = evaluate(layer, *seen), evaluate(layer, *new)
    return curve


def _best_rate() -> str:
    curve = rate_curve()
    return str(min(curve, key=lambda rate: curve[rate][1]))


RATIOS = {"1/16": 1 / 16, "1/4": 1 / 4, "1": 1, "4": 4, "16": 16}


def growth(rows: int, use_rslora: bool) -> float:
    """Return the ratio of the output's change from Adam's first step at rank 64 to that at rank 4, on the same rows."""
    rng = np.random.default_rng(8)

    def move(rank: int) -> float:
        start = LoRA.init(128, 32, rank=rank, alpha=8, rng=rng, dtype="float64")
        layer = Adapter(start.lora_A, start.lora_B, 8, use_rslora=use_rslora)
        x, dy = rng.standard_normal((rows, 128)), rng.standard_normal((rows, 32))
        Adam(layer.trainable(), lr=1e-3).step(layer.backward(dy, layer.forward(x)[1])[1])
        return float(np.abs(layer(x)).mean())

    times = max(8, 64 // rows)  # with fewer rows, the changes vary more
    few, many = (np.mean([move(rank) for _ in range(times)]) for rank in (4, 64))
    return float(many / few)


def _nearest_factor(rows: int) -> str:
    measured = growth(rows, use_rslora=False)
    return min(RATIOS, key=lambda name: abs(np.log(RATIOS[name] / measured)))


def _along_V() -> float:
    """Return the largest |dV_o V_o| over the rows o of a DoRA layer, for the full gradient.

    The adapter's A is the identity and s = 1. So V = W + B, and dB is dV.
    """
    rng = np.random.default_rng(9)
    W, B, m = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    layer = DoRA(Linear(W), DoRAAdapter(np.eye(4), B, alpha=4, magnitude=m, dora_norm="full"))
    x, dy = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    _, grads = layer.backward(dy, layer.forward(x)[1])
    return float(np.abs((grads["lora_B"] * (W + B)).sum(axis=1)).max())


EXPERIMENTS: dict[str, Callable[[], float | str]] = {
    "first step": _first_step,
    "larger gradients": lambda: _first_step(100) / _first_step(),
    "larger alpha": lambda: _slope_of_B(6.0) / _slope_of_B(3.0),
    "larger alpha, plain steps": lambda: _after_plain_step(6.0) / _after_plain_step(3.0),
    "off by one": _off_by_one,
    "square alone": _square_matrices,
    "7B in full": _training_memory,
    "7B at 4 bits": lambda: _training_memory(rank=16, bits=4),
    "rank from a curve": _best_rank,
    "rate from a curve": _best_rate,
    "first move, one row": lambda: _nearest_factor(1),
    "first move, many rows": lambda: _nearest_factor(512),
    "along V": _along_V,
}
"""The experiment for each question in questions.toml, by name, in the same order."""
