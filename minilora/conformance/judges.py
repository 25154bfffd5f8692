"""The claims that are no comparison of numbers: how an adapter starts, Adam's steps, the frozen base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .calling import Watch, answers, described, layer_arrays
from .problems import Arrays
from .reference import Trial

N_IN, N_OUT, RANK, KERNEL = 400, 100, 9, {"conv1d": (4,), "conv2d": (2, 2)}
"""Of the start: sizes at which no fan's spread is near that of another, under any start in use."""


def start(watch: Watch) -> str:
    """Check that a new adapter adds nothing, can learn, and has the spread of its input's width."""
    kernel = KERNEL.get(watch.kind, ())
    given: dict[str, Any] = {"in_features": N_IN, "out_features": N_OUT, "rank": RANK}
    given["rng"] = np.random.default_rng(0)
    if kernel:
        given["kernel"] = kernel
    if watch.kind == "dora":
        given["weight"] = np.random.default_rng(1).standard_normal((N_OUT, N_IN))
    new = dict(zip(("lora_A", "lora_B", "magnitude"), watch.call("init", given)))  # noqa: B905  DoRA has three
    if "lora_B" not in new:
        return "init returns one array, expected lora_A and lora_B"
    A, B = (np.asarray(watch.turn(name, new[name])) for name in ("lora_A", "lora_B"))
    shapes = {"lora_A": (RANK, N_IN, *kernel), "lora_B": (N_OUT, RANK, *(1 for _ in kernel))}
    for (name, shape), factor in zip(shapes.items(), (A, B), strict=True):
        if factor.shape != shape:
            return f"{name} starts with shape {factor.shape}, expected {shape}"
        if not np.isfinite(factor).all():
            return f"{name} starts with numbers that are not finite"
    if not A.any() and not B.any():
        return "both factors start at zero: both gradients are zero, and nothing ever moves"
    if A.any() and B.any():
        return "neither factor starts at zero: the new adapter changes the output before the first step"
    if watch.kind == "dora" and "magnitude" in new:
        return _magnitude(np.asarray(new["magnitude"]), given["weight"])
    return _spread(A, N_IN * int(np.prod(kernel))) if A.any() and watch.kind != "embedding" else "ok"


def _spread(A: np.ndarray, fan_in: int) -> str:
    """Check that A is as large as its input's width asks: a product with x is then of the size of x."""
    spread = float(A.std())
    fans = {"fan r": RANK, "fan out": N_OUT, "the channels alone, without the kernel": N_IN}
    for name, fan in fans.items():
        times = spread * (3 * fan) ** 0.5  # 1 for a uniform start as PEFT's, sqrt(6) for he_uniform
        if fan != fan_in and (0.9 < times < 1.1 or 0.9 < times / 6**0.5 < 1.1):
            source = " (made in catid/dora #1)" if name == "fan r" else ""
            return f"A's start has the spread of {name} = {fan}, not fan in = {fan_in}: {spread:.3g}{source}"
    if not 1e-3 < spread / _usual(fan_in) < 50:
        return f"A's start has the spread {spread:.3g}; PEFT's is 1 / sqrt(3 in) = {_usual(fan_in):.3g}"
    return "ok"


def _usual(fan_in: int) -> float:
    """Return the spread of PEFT's start, uniform in +-1/sqrt(in)."""
    return float((3 * fan_in) ** -0.5)


def _magnitude(m: np.ndarray, weight: np.ndarray) -> str:
    if m.size == N_IN:
        return f"DoRA's magnitude starts with {N_IN} entries, one for each input, expected {N_OUT}, one for each output"
    if m.size != N_OUT or not np.allclose(m.ravel(), np.linalg.norm(weight, axis=1), rtol=1e-5):
        return "DoRA's magnitude does not start as the length of each row of the weight: the output changes"
    return "ok"


ADAM_BUGS: Mapping[str, Callable[..., np.ndarray]] = {
    "Adam's eps stands inside the root": lambda m, v, t, g: (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t) + 1e-8),
    "Adam has no bias correction": lambda m, v, t, g: m / (np.sqrt(v) + 1e-8),
    "Adam corrects no bias of v": lambda m, v, t, g: m / (1 - 0.9**t) / (np.sqrt(v) + 1e-8),
    "Adam corrects no bias of m": lambda m, v, t, g: m / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),
    "Adam's eps is added before the correction": lambda m, v, t, g: (
        m / (1 - 0.9**t) / ((np.sqrt(v) + 1e-8) / np.sqrt(1 - 0.999**t))
    ),
    "Adam has no eps": lambda m, v, t, g: m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t)),
    "Adam divides by v, not by its root": lambda m, v, t, g: (m / (1 - 0.9**t)) / (v / (1 - 0.999**t) + 1e-8),
    "Adam goes uphill": lambda m, v, t, g: -(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),
    "the step is plain gradient descent": lambda m, v, t, g: g,
}
"""Known wrong steps, as functions of the means after step t, and of the gradient."""


def adam_problem() -> tuple[Arrays, list[Arrays]]:
    """Return parameters and ten gradients for them, so small that the place of eps shows."""
    rng = np.random.default_rng(0)
    begin = {"lora_A": rng.standard_normal((2, 5)), "lora_B": rng.standard_normal((3, 2))}
    return begin, [{name: 1e-7 * rng.standard_normal(p.shape) for name, p in begin.items()} for _ in range(10)]


def adam_follows(
    begin: Arrays,
    steps: list[Arrays],
    direction: Callable[..., np.ndarray] = lambda m, v, t, g: (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8),
) -> Arrays:
    """Return where the steps lead: by Algorithm 1 of the paper with lr 1e-3, or in another direction."""
    found = {}
    for name, p in begin.items():
        theta, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
        for t, grads in enumerate(steps, start=1):
            m, v = 0.9 * m + 0.1 * grads[name], 0.999 * v + 0.001 * grads[name] ** 2
            theta = theta - 1e-3 * direction(m, v, t, grads[name])
        found[name] = theta
    return found


def adam_verdict(begin: Arrays, steps: list[Arrays], ends: Mapping[str, Any], tolerance: float = 1e-9) -> str:
    """Compare where an implementation's Adam ends with where it should, and with where known bugs end."""

    def same(expected: Arrays) -> bool:
        return all(np.allclose(np.asarray(ends[name]), p, rtol=0, atol=tolerance) for name, p in expected.items())

    if same(adam_follows(begin, steps)):
        return "ok"
    named = [name for name, direction in ADAM_BUGS.items() if same(adam_follows(begin, steps, direction))]
    return named[0] if named else "ten steps of Adam (lr 1e-3, betas 0.9 and 0.999, eps 1e-8) end elsewhere"


def adam(watch: Watch) -> str:
    """Follow ten steps of Adam."""
    begin, steps = adam_problem()
    params, state = {name: p.copy() for name, p in begin.items()}, None
    for grads in steps:
        moved = watch.functions.step(params, {name: g.copy() for name, g in grads.items()}, state)
        if not isinstance(moved, tuple) or len(moved) != 2:
            return f"step returns {described(moved)}, expected the two params and state"
        params, state = moved
    single = any(np.asarray(p).dtype.itemsize < 8 for p in params.values())
    return adam_verdict(begin, steps, params, 2e-6 if single else 1e-9)


def frozen(watch: Watch, trial: Trial) -> str:
    """Check that no gradient is given for the frozen base."""
    given = {"dy": trial.arrays["dy"], "x": trial.arrays["x"], **layer_arrays(trial)}
    grads = watch.call("backward", given, watch.options("backward", trial.problem))
    extra = sorted(name for name in ("weight", "bias") if grads.get(name) is not None)
    return f"backward returns gradients of the frozen {' and '.join(extra)}" if extra else "ok"


def habits(watch: Watch, trial: Trial, found: Arrays) -> dict[str, str]:
    """Report what is good to know, and no reason to fail."""
    again = answers(watch, trial)
    twice = all(np.array_equal(found[name], again[name], equal_nan=True) for name in found if name in again)
    fortran = Trial(
        trial.problem,
        {name: np.asfortranarray(a) for name, a in trial.arrays.items()},
        *(trial.right, trial.sizes, trial.unit, trial.formulas),
    )
    quiet = Watch(watch.functions, watch.kind)
    moved = answers(quiet, fortran)
    order = next((f"in Fortran order {function} {text}" for function, text in quiet.raised.items()), "ok")
    if any(trial.agrees(k, found[k]) and not trial.agrees(k, a) for k, a in moved.items() if k in found):
        order = "other numbers"
    kept = sorted({str(a.dtype) for a in found.values()} - {str(trial.arrays["weight"].dtype)})
    return {
        "same bits twice": "ok" if twice else "two calls differ",
        "memory order": order,
        "dtype kept": f"{', '.join(kept)} is returned for {trial.arrays['weight'].dtype}" if kept else "ok",
    }
