"""The claims that are no comparison of numbers: how an adapter starts, Adam's steps, the frozen base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..problems.bugs import Bug, bugs_of, the_named
from ..problems.formulas import StartFormulas, adam_follows, adam_problem
from ..problems.problem import Arrays
from ..problems.tolerance import TOLERANCE, Trial
from .calling import Watch, answers, described, layer_arrays
from .describing import describe_unknown


@dataclass(frozen=True)
class Sizes:
    """What a start is asked for."""

    rank: int
    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"in={self.n_in} out={self.n_out} r={self.rank}"

    @property
    def weight(self) -> np.ndarray:
        """A base's weight, (out, in): DoRA's start depends on it."""
        return np.random.default_rng(1).standard_normal((self.n_out, self.n_in))

    def spread(self, **parts: Any) -> float:
        """Return the spread of A by PEFT's start, or with some of its parts replaced."""
        return StartFormulas(**parts).spread(self.rank, self.n_in, self.n_out, math.prod(self.kernel))

    def fan(self, **parts: Any) -> int:
        """Return the fan that this spread is of."""
        return StartFormulas(**parts).fan(self.rank, self.n_in, self.n_out, math.prod(self.kernel))


LINEAR = (Sizes(9, 400, 100), Sizes(30, 150, 60))
SIZES = {
    "conv1d": (Sizes(9, 400, 100, (4,)), Sizes(30, 40, 60, (7,))),
    "conv2d": (Sizes(9, 400, 100, (2, 2)), Sizes(30, 40, 60, (3, 3))),
}
"""Two for each kind, the linear layer's by default. From one to the other the spread of each fan moves by another
factor, so a spread that is a fan's at the first by chance is not at the second."""


def start(watch: Watch) -> str:
    """Check that a new adapter adds nothing, can learn, and has the spread of its input's width."""
    sizes, other = SIZES.get(watch.kind, LINEAR)
    new = _drawn(watch, sizes)
    if isinstance(new, str):
        return new
    A, B, *magnitude = new
    if not A.any() and not B.any():
        return "both factors start at zero: both gradients are zero, and nothing ever moves"
    if A.any() and B.any():
        return "neither factor starts at zero: the new adapter changes the output before the first step"
    name, random = ("lora_A", A.reshape(len(A), -1)) if A.any() else ("lora_B", B.reshape(len(B), -1))
    if (rank := np.linalg.matrix_rank(random.astype(np.float64))) < sizes.rank:
        return f"{name} starts with rank {rank}, expected {sizes.rank}: directions that start alike may stay alike"
    once_more = _drawn(watch, sizes, seed=1)
    if not isinstance(once_more, str) and all(map(np.array_equal, once_more, new)):
        watch.notes["start"] = "the same numbers from two generators: all adapters of one size start alike"
    if magnitude:
        return _magnitude(magnitude[0], sizes.weight)
    if not A.any() or watch.kind == "embedding":
        return "ok"
    if isinstance(again := _drawn(watch, other), str):
        return again
    return _spread(watch, sizes, A, other, float(again[0].std()))


def _drawn(watch: Watch, sizes: Sizes, seed: int = 0) -> list[np.ndarray] | str:
    """Return A, B and, for DoRA, the magnitude of a new adapter, or what is wrong with their shapes."""
    arguments: dict[str, Any] = {"in_features": sizes.n_in, "out_features": sizes.n_out, "rank": sizes.rank}
    arguments["rng"] = np.random.default_rng(seed)
    if sizes.kernel:
        arguments["kernel"] = sizes.kernel
    if watch.kind == "dora":
        arguments["weight"] = sizes.weight
    returned = watch.call("init", arguments)
    if not isinstance(returned, (tuple, list)) or len(returned) < 2:
        return f"init returns {described(returned)}, expected lora_A and lora_B"
    new = dict(zip(("lora_A", "lora_B", "magnitude"), returned))  # noqa: B905  DoRA has three
    A, B = (np.asarray(watch.turn(name, new[name])) for name in ("lora_A", "lora_B"))
    ones = (1 for _ in sizes.kernel)
    shapes = {"lora_A": (sizes.rank, sizes.n_in, *sizes.kernel), "lora_B": (sizes.n_out, sizes.rank, *ones)}
    for (name, shape), factor in zip(shapes.items(), (A, B), strict=True):
        if factor.shape != shape:
            return f"{name} starts with shape {factor.shape}, expected {shape}"
        if not np.isfinite(factor).all():
            return f"{name} starts with numbers that are not finite"
    return [A, B] + ([np.asarray(new["magnitude"])] if watch.kind == "dora" and "magnitude" in new else [])


def _spread(watch: Watch, sizes: Sizes, A: np.ndarray, other: Sizes, second: float) -> str:
    """Check that A is as large as its input's width asks: a product with x is then of the size of x."""
    spread, mean, fan_in, usual = float(A.std()), float(A.mean()), sizes.fan(), sizes.spread()
    if abs(mean) > spread / 2:
        return f"A's start has the mean {mean:.3g} and the spread {spread:.3g}, and should have the mean 0"
    if all(0.9 < measured * 3**0.5 * at.fan() < 1.1 for at, measured in ((sizes, spread), (other, second))):
        return f"A's start has the spread {spread:.3g}, of 1 / in: the root of PEFT's 1 / sqrt(in) is missing"

    def explains(bug: Bug) -> bool:
        times = [measured / at.spread(**bug.of(None)) for at, measured in ((sizes, spread), (other, second))]
        return any(all(0.9 < t / gain < 1.1 for t in times) for gain in (1.0, 6**0.5))  # PEFT's start, he_uniform

    if bug := the_named(filter(explains, bugs_of(watch.kind, ("start",)))):
        source = f" (made in {bug.source})" if bug.source else ""
        return f"{bug.says} = {sizes.fan(**bug.of(None))}, not fan in = {fan_in}: {spread:.3g}{source}"
    if not 1e-3 < spread / usual < 50:
        return f"A's start has the spread {spread:.3g}; PEFT's is 1 / sqrt(3 in) = {usual:.3g}"
    if not 0.9 < second / spread * usual / other.spread() < 1.1:
        width = "the same at every width" if 0.9 < second / spread < 1.1 else "not by the input's width"
        said = f"{spread:.3g} at {sizes}, {second:.3g} at {other}: {width}; PEFT's is 1 / sqrt(3 in)"
        watch.notes["spread of A"] = said
    return "ok"


def _magnitude(m: np.ndarray, weight: np.ndarray) -> str:
    n_out, n_in = weight.shape
    if m.size == n_in:
        return f"DoRA's magnitude starts with {n_in} entries, one for each input, expected {n_out}, one for each output"
    if m.size != n_out or not np.allclose(m.ravel(), np.linalg.norm(weight, axis=1), rtol=1e-5):
        return "DoRA's magnitude does not start as the length of each row of the weight: the output changes"
    return "ok"


def adam_verdict(begin: Arrays, steps: list[Arrays], ends: Mapping[str, Any], tolerance: float = 1e-9) -> str:
    """Compare where an implementation's Adam ends with where it should, and with where known bugs end."""
    right = adam_follows(begin, steps)
    reached = {name: np.asarray(ends[name], np.float64) for name in right}
    for name, p in right.items():
        if reached[name].shape != p.shape:
            return f"{name} has shape {reached[name].shape} after ten steps of Adam, expected {p.shape}"
        if not np.isfinite(reached[name]).all():
            return f"{name} is not finite after ten steps of Adam"

    def same(expected: Arrays) -> bool:
        return all(np.allclose(reached[name], p, rtol=0, atol=tolerance) for name, p in expected.items())

    if same(right):
        return "ok"
    explaining = (bug for bug in bugs_of("adam", ("adam",)) if same(adam_follows(begin, steps, **bug.of(None))))
    if bug := the_named(explaining):
        return str(bug)
    moved, should = (np.concatenate([(end[name] - begin[name]).ravel() for name in right]) for end in (reached, right))
    times = float(moved @ should / (should @ should))
    if np.allclose(moved, times * should, rtol=0, atol=tolerance * max(1.0, abs(times))):
        return f"Adam's steps are {times:.6g} times as long as they should be, with lr 1e-3"
    off = {name: np.abs(reached[name] - p) for name, p in right.items()}
    name = max(off, key=lambda name: float(off[name].max()))
    at = np.unravel_index(int(off[name].argmax()), off[name].shape)
    where = f"{name} is {reached[name][at]:.7g} at [{', '.join(map(str, at))}], expected {right[name][at]:.7g}"
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
    arguments = {"dy": trial.arrays["dy"], "x": trial.arrays["x"], **layer_arrays(trial)}
    grads = watch.call("backward", arguments, watch.options("backward", trial.problem))
    extra = sorted(name for name in ("weight", "bias") if grads.get(name) is not None)
    return f"backward returns gradients of the frozen {' and '.join(extra)}" if extra else "ok"


STEPS = (
    ("", "", False),
    ("merge", "after merge", False),
    ("merge", "after a second merge", True),
    ("unmerge", "after unmerge", False),
    ("unmerge", "after a second unmerge", True),
    ("merge", "after unmerge and merge", False),
)
"""What is called in turn, the words for it, and whether it may be refused: then all must be as it was."""


def merged_and_back(watch: Watch, trial: Trial) -> str:
    """Merge a layer that keeps its state, and take that back: its output is the same all the time."""
    layer = watch.built(trial)
    if missing := [name for name in ("forward", "merge") if not callable(getattr(layer, name, None))]:
        return f"merging returns {described(layer)} without {' and '.join(missing)}"
    for step, words, may_be_refused in STEPS:
        if step == "unmerge" and not hasattr(layer, "unmerge"):
            break
        try:
            if step:
                getattr(layer, step)()
        except Exception:
            if not may_be_refused:
                raise
        y = watch.array(layer.forward(trial.arrays["x"].copy()), "y")
        if not trial.agrees("y", y):
            return f"{words} the output {_times(y, trial) or describe_unknown('y', y, trial)}".lstrip()
    return "ok"


def _times(y: np.ndarray, trial: Trial) -> str:
    """Say how many times an output has the update, where that is all that is wrong with it."""
    base = trial.answer(update=0.0)["y"]
    update = trial.right["y"] - base
    if y.shape != base.shape or not np.isfinite(y).all():
        return ""
    times = float(((y - base) * update).sum() / (update * update).sum())
    larger = {"y": trial.sizes["y"] * max(1.0, abs(times))}
    so = trial.distance("y", y, base + times * update, larger) <= TOLERANCE
    return f"has the update {round(times, 6) + 0.0:g} times" if so else ""


def habits(watch: Watch, trial: Trial, reply: Arrays) -> dict[str, str]:
    """Report what is good to know, and no reason to fail."""
    again = answers(watch, trial)
    twice = all(np.array_equal(reply[name], again[name], equal_nan=True) for name in reply if name in again)
    others = sorted({str(a.dtype) for a in reply.values()} - {str(trial.arrays["lora_A"].dtype)})
    return {
        "same bits twice": "ok" if twice else "two calls differ",
        "memory order": watch.notes.pop("memory order", "ok"),
        "dtype kept": f"{', '.join(others)} is returned for {trial.arrays['lora_A'].dtype}" if others else "ok",
        **watch.notes,
    }
