"""The claims that are no comparison of numbers: how an adapter starts, Adam's steps, the frozen base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .adam import adam_follows, adam_problem
from .bugs import bugs_of
from .calling import Watch, answers, described, layer_arrays
from .problems import Arrays
from .reference import StartFormulas, Trial

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
    returned = watch.call("init", given)
    if not isinstance(returned, (tuple, list)) or len(returned) < 2:
        return f"init returns {described(returned)}, expected lora_A and lora_B"
    new = dict(zip(("lora_A", "lora_B", "magnitude"), returned))  # noqa: B905  DoRA has three
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
    name, random = ("lora_A", A.reshape(RANK, -1)) if A.any() else ("lora_B", B.reshape(N_OUT, RANK))
    if (rank := np.linalg.matrix_rank(random.astype(np.float64))) < RANK:
        return f"{name} starts with rank {rank}, expected {RANK}: directions that start alike may stay alike"
    if watch.kind == "dora" and "magnitude" in new:
        return _magnitude(np.asarray(new["magnitude"]), given["weight"])
    return _spread(watch.kind, A, math.prod(kernel)) if A.any() and watch.kind != "embedding" else "ok"


def _spread(kind: str, A: np.ndarray, kernel: int) -> str:
    """Check that A is as large as its input's width asks: a product with x is then of the size of x."""
    spread, mean, sizes = float(A.std()), float(A.mean()), (RANK, N_IN, N_OUT, kernel)
    fan_in, usual = StartFormulas().fan(*sizes), StartFormulas().spread(*sizes)
    if abs(mean) > spread / 2:
        return f"A's start has the mean {mean:.3g} and the spread {spread:.3g}, and should have the mean 0"
    if 0.9 < spread * 3**0.5 * fan_in < 1.1:
        return f"A's start has the spread {spread:.3g}, of 1 / in: the root of PEFT's 1 / sqrt(in) is missing"
    for bug in bugs_of(kind, ("start",)):
        wrong = StartFormulas(**bug.by())
        times = spread / wrong.spread(*sizes)  # 1 for a uniform start as PEFT's, sqrt(6) for he_uniform
        if 0.9 < times < 1.1 or 0.9 < times / 6**0.5 < 1.1:
            source = f" (made in {bug.source})" if bug.source else ""
            return f"{bug.name} = {wrong.fan(*sizes)}, not fan in = {fan_in}: {spread:.3g}{source}"
    if not 1e-3 < spread / usual < 50:
        return f"A's start has the spread {spread:.3g}; PEFT's is 1 / sqrt(3 in) = {usual:.3g}"
    return "ok"


def _magnitude(m: np.ndarray, weight: np.ndarray) -> str:
    if m.size == N_IN:
        return f"DoRA's magnitude starts with {N_IN} entries, one for each input, expected {N_OUT}, one for each output"
    if m.size != N_OUT or not np.allclose(m.ravel(), np.linalg.norm(weight, axis=1), rtol=1e-5):
        return "DoRA's magnitude does not start as the length of each row of the weight: the output changes"
    return "ok"


def adam_verdict(begin: Arrays, steps: list[Arrays], ends: Mapping[str, Any], tolerance: float = 1e-9) -> str:
    """Compare where an implementation's Adam ends with where it should, and with where known bugs end."""
    right = adam_follows(begin, steps)
    found = {name: np.asarray(ends[name], np.float64) for name in right}
    for name, p in right.items():
        if found[name].shape != p.shape:
            return f"{name} has shape {found[name].shape} after ten steps of Adam, expected {p.shape}"
        if not np.isfinite(found[name]).all():
            return f"{name} is not finite after ten steps of Adam"

    def same(expected: Arrays) -> bool:
        return all(np.allclose(found[name], p, rtol=0, atol=tolerance) for name, p in expected.items())

    if same(right):
        return "ok"
    for bug in bugs_of("adam", ("adam",)):
        if same(adam_follows(begin, steps, **bug.by())):
            return str(bug)
    off = {name: np.abs(found[name] - p) for name, p in right.items()}
    name = max(off, key=lambda name: float(off[name].max()))
    at = np.unravel_index(int(off[name].argmax()), off[name].shape)
    where = f"{name} is {found[name][at]:.7g} at [{', '.join(map(str, at))}], expected {right[name][at]:.7g}"
    return f"ten steps of Adam (lr 1e-3, betas 0.9 and 0.999, eps 1e-8) end elsewhere: {where}"


def adam(watch: Watch, dtype: str) -> str:
    """Follow ten steps of Adam. A precision below float64 may be declared, or seen in what is returned."""
    begin, steps = adam_problem()
    params, state = {name: p.copy() for name, p in begin.items()}, None
    for grads in steps:
        moved = watch.functions.step(params, {name: g.copy() for name, g in grads.items()}, state)
        if not isinstance(moved, tuple) or len(moved) != 2:
            return f"step returns {described(moved)}, expected the two params and state"
        params, state = moved
    single = dtype != "float64" or any(np.asarray(p).dtype.itemsize < 8 for p in params.values())
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
