"""What can be said of a wrong array that no known bug explains: how far it is off, where, its order, what it lacks.

Each pattern is tried on one problem, and told where all entries agree with it up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ..problems.images import ConvolutionProblem
from ..problems.lowprecision import MixedProblem
from ..problems.problem import Arrays, Problem
from ..problems.several import ExpertsProblem
from ..problems.tolerance import TINY, TOLERANCE, UNIT, Trial, round_to

AXES = {
    "y": ("row", "output"),
    "x": ("row", "input"),
    "lora_A": ("rank", "input"),
    "lora_B": ("output", "rank"),
    "magnitude": ("output",),
    "merged": ("output", "input"),
    **dict.fromkeys(("cat", "linear", "svd"), ("output", "input")),
}
"""What stands along the first axes of an answer. Those that follow are a kernel's, or an image's."""
STACKED = {"merged": ("expert", "output", "input")}
"""The same of a stack of weights, where it is otherwise."""
FEW, MANY = 8, 256
"""A tail begins after that many at least; orders of more than so many are not looked for."""
HALVES = ("float16", "bfloat16")
ROUNDED = {
    "the factors are": ("lora_A", "lora_B"),
    "lora_A is": ("lora_A",),
    "lora_B is": ("lora_B",),
}


EVERY_ENTRY = "every entry is off by the factor"
"""Words that say that a wrong answer is right but for a factor."""


def describe_unknown(name: str, array: np.ndarray, trial: Trial, inside: bool = False) -> str:
    """Return what can be said of a wrong answer that no known bug explains: its shape, or ratio and worst entry.

    With `inside`, also what is seen inside the array, which takes longer.
    """
    expected = trial.right[name]
    if np.ndim(array) == np.ndim(expected) == 2 and trial.agrees(name, np.transpose(array)):
        return "is transposed"
    if np.shape(array) != np.shape(expected):
        return f"has shape {np.shape(array)}, expected {np.shape(expected)}{_steps(np.shape(array), trial.problem)}"
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        return "is not finite"
    at = np.unravel_index(int(np.abs(array - expected).argmax()), expected.shape)
    where = f"[{', '.join(map(str, at))}]{trial.problem.locate(name, at)}"
    text = f"is off by {abs(array[at] - expected[at]):.3g} at {where}: {array[at]:.7g}, expected {expected[at]:.7g}"
    ratio = _ratio(name, array, trial)
    if abs(ratio - 1) > 1e-3:
        return f"{text}; {EVERY_ENTRY} {ratio:.6g}"
    seen = pattern(name, array, trial) if inside else ""
    return f"{text}; {seen}" if seen else text


def _axes(name: str, trial: Trial) -> tuple[str, ...]:
    """Return what stands along the first axes of an answer."""
    return (STACKED if isinstance(trial.problem, ExpertsProblem) else {}).get(name, AXES[name])


def _ratio(name: str, array: np.ndarray, trial: Trial) -> float:
    """Return by which factor every entry of an answer is off; 1 where no factor is that of all."""
    expected = trial.right[name]
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = float((array * expected).sum() / max(float((expected * expected).sum()), TINY))
        larger = {name: trial.sizes[name] * max(1.0, abs(ratio))}
        if trial.unit <= UNIT["float32"] and trial.distance(name, array, ratio * expected, larger) <= TOLERANCE:
            return ratio
    seen = np.abs(expected) > 1e-3 * np.abs(expected).max()  # also where it was computed in a lower precision
    ratios = array[seen] / expected[seen]
    same = ratios.size and np.ptp(ratios) <= 1e-4 * abs(ratios).max()
    return float(np.median(ratios)) if same else 1.0


def _steps(shape: tuple[int, ...], problem: Problem) -> str:
    """Say which other steps of a kernel would give an output of a shape."""
    if not isinstance(problem, ConvolutionProblem):
        return ""
    ones, zeros = (1,) * len(problem.kernel), (0,) * len(problem.kernel)
    others: dict[str, dict[str, Any]] = {
        "if stride were 1": {"stride": ones},
        "without padding": {"padding": zeros},
        "if dilation were 1": {"dilation": ones},
        "if stride and dilation were exchanged": {"stride": problem.dilation, "dilation": problem.stride},
        "if a step of two axes were exchanged": {
            name: getattr(problem, name)[::-1] for name in ("stride", "padding", "dilation")
        },
    }
    fitting = (words for words, steps in others.items() if replace(problem, **steps).positions == shape[2:])
    return next((f", as it would be {words}" for words in fitting), "")


def pattern(name: str, array: np.ndarray, trial: Trial) -> str:
    """Return what is seen in a wrong answer of the right shape; empty where nothing is, or the precision is low."""
    if trial.unit > UNIT["float32"]:
        return ""
    array = np.asarray(array, np.float64)
    for look in (_rounded, _bias, _tail, _order, _ranks, _part):
        if text := look(name, array, trial):
            return text
    return ""


def _rounded(name: str, array: np.ndarray, trial: Trial) -> str:
    """See numbers of half precision: in the answer itself, or in the factors that it is made of."""
    right = trial.right[name]
    for half in HALVES:
        near = np.abs(array - right) <= 4 * UNIT[half] * np.maximum(trial.sizes[name], np.abs(right))
        allowed = isinstance(trial.problem, MixedProblem) and name in trial.problem.in_half
        if not allowed and near.all() and np.array_equal(round_to(array, half).astype(np.float64), array):
            return f"it is rounded to {half}"
        if allowed and not (name == "y" and getattr(trial.problem, "near", False)):
            return ""  # what may be rounded itself agrees with any rounding of what it is made of
        for words, names in ROUNDED.items():
            rounded = {key: round_to(trial.arrays[key], half).astype(np.float64) for key in names}
            if _agrees(name, array, replace(trial, arrays=trial.arrays | rounded).answer(), trial):
                return f"{words} rounded to {half}"
        weight = trial.answer(weight=lambda W, half=half: round_to(W, half).astype(np.float64))
        if _agrees(name, array, weight, trial):
            return f"the weight is rounded to {half}"
        for words, y in _between(name, half, trial):
            if _near(array, y, trial.sizes["y"], trial):
                return f"{words} rounded to {half}"
        s = trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)
        short = float(round_to(np.array([s]), half)[0])
        if short != s and _agrees(name, array, trial.answer(scaling=lambda alpha, r, short=short: short), trial):
            return f"the scaling is rounded to {half}"
    return ""


def _between(name: str, half: str, trial: Trial) -> Iterator[tuple[str, np.ndarray]]:
    """Yield outputs of which x A^T, or the update, was in half precision for a while."""
    a = trial.arrays
    if name != "y" or np.ndim(a["x"]) != 2 or a["lora_A"].ndim != 2 or "mask" in a or "magnitude" in a:
        return
    base, s = trial.answer(update=0.0)["y"], trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)
    x, A, B = (a[key].astype(np.float64) for key in ("x", "lora_A", "lora_B"))
    h, up = x @ A.T, (trial.right["y"] - base) / s
    yield "x A^T is", base + s * round_to(h, half).astype(np.float64) @ B.T
    yield "the update is", base + s * round_to(up, half).astype(np.float64)
    yield "the update is", base + round_to(s * up, half).astype(np.float64)


def _bias(name: str, array: np.ndarray, trial: Trial) -> str:
    """See an output with the bias of another one, as by a wrong index."""
    b = trial.arrays.get("bias")
    if name != "y" or b is None or array.ndim != 2 or not 1 < len(b) <= MANY:
        return ""
    distance = np.abs((array - (trial.right[name] - b))[..., None] - b)  # (N, out, out), from each entry of b
    if (distance.min(axis=-1) > TOLERANCE * trial.unit * (trial.sizes[name] + TINY)).any():
        return ""
    taken = distance.argmin(axis=-1)
    if (taken == taken[:1]).all():
        return f"the bias is taken at a wrong index: its outputs have the entries {_places(taken[0])}"
    if (taken == taken[:, :1]).all():
        return f"the bias is taken by the row and not by the output: its rows have the entries {_places(taken[:, 0])}"
    return ""


def _tail(name: str, array: np.ndarray, trial: Trial) -> str:
    """See an answer that is right up to a place along one axis, and wrong from there on, as beyond a tile."""
    wrong = np.abs(array - trial.right[name]) > TOLERANCE * trial.unit * (trial.sizes[name] + TINY)
    for axis, word in enumerate(_axes(name, trial)):
        bad = np.moveaxis(wrong, axis, 0).reshape(wrong.shape[axis], -1).any(axis=1)
        first = int(bad.argmax())
        if first < FEW or not bad[first:].all():
            continue
        tail = (slice(None),) * axis + (slice(first, None),)
        state = "wrong" if array[tail].any() else "zero"
        if name == "y" and _near(array[tail], trial.answer(update=0.0)["y"][tail], trial.sizes["y"][tail], trial):
            state = "without the update"
        return f"it is right up to {word} {first - 1}, and {state} from {word} {first} on"
    return ""


def _order(name: str, array: np.ndarray, trial: Trial) -> str:
    """See the right rows or columns in another order: of the answer, or of the update that it adds."""
    right, sizes = trial.right[name], trial.sizes[name]
    without = {
        "y": lambda: trial.answer(update=0.0)["y"],
        "merged": lambda: trial.answer(merged=lambda W, BA, s: W)["merged"],
    }
    bases = [(np.zeros_like(right), "its")] + ([(without[name](), "its update's")] if name in without else [])
    for base, whose in bases:
        for axis, word in enumerate(_axes(name, trial)):
            if not 2 < right.shape[axis] <= MANY:
                continue
            mine, theirs = (np.moveaxis(a - base, axis, 0).reshape(a.shape[axis], -1) for a in (array, right))
            order = ((mine[:, None] - theirs[None]) ** 2).sum(axis=-1).argmin(axis=1)
            if (np.sort(order) != np.arange(len(order))).any() or (order == np.arange(len(order))).all():
                continue
            moved = base + np.take(right - base, order, axis)
            if _near(array, moved, np.maximum(sizes, np.take(sizes, order, axis)), trial):
                return f"{whose} {word}s are the right ones in another order: {_places(order)}"
    return ""


def _places(order: np.ndarray) -> str:
    return ", ".join(map(str, order[:8])) + (", ..." if len(order) > 8 else "")


def _ranks(name: str, array: np.ndarray, trial: Trial) -> str:
    """See the ranks of one factor in another order than the other's."""
    r = trial.problem.rank
    ranks = np.arange(r)
    orders = [ranks[::-1], *(np.roll(ranks, by) for by in (1, -1, r // 2, -(r // 2))), np.r_[ranks[::2], ranks[1::2]]]
    for order in orders if name in ("y", "x", "merged") and r > 1 and _is_one_layer(trial) else ():
        if _agrees(name, array, trial.answer(hidden=lambda B, order=order: B[:, order]), trial):
            return f"the ranks of lora_B stand in another order than those of lora_A: {_places(order)}"
    return ""


def _is_one_layer(trial: Trial) -> bool:
    """Return whether all ranks are those of one layer, and not of slots, each with ranks of its own."""
    return len(trial.arrays["lora_A"]) == trial.problem.rank


def _part(name: str, array: np.ndarray, trial: Trial) -> str:
    """See a sum that lacks a part of its terms, as where a shard is not added or a block's tail is left out."""
    if name in ("y", "merged") and _is_one_layer(trial):
        for counted, words in _parts(trial.problem.rank, "ranks"):
            if _agrees(name, array, trial.answer(hidden=lambda B, counted=counted: B * counted), trial):
                return f"it sums {words}"
    if name == "y":
        for counted, words in _parts(trial.arrays["lora_A"].shape[1] if array.ndim == 2 else 0, "inputs"):
            base = {"base": lambda x, W, counted=counted: (x * counted) @ W.T}
            update = {"down": lambda A, counted=counted: A * counted}
            for what, parts in (("", base | update), (" in x W^T", base), (" in the update", update)):
                if _agrees(name, array, trial.answer(**parts), trial):
                    return f"it sums {words}{what}"
    elif name in ("lora_A", "lora_B", "magnitude"):
        dy = trial.arrays["dy"]
        for counted, words in _parts(len(dy), "rows"):
            masked = dy * counted.reshape(-1, *(1 for _ in dy.shape[1:]))
            if _agrees(name, array, replace(trial, arrays=trial.arrays | {"dy": masked}).answer(), trial):
                return f"it sums {words}"
    return ""


def _parts(n: int, what: str) -> Iterator[tuple[np.ndarray, str]]:
    """Yield which of n terms are kept, and the words for it: halves, whole blocks, and all but the first or last."""
    blocks = [n - n % size for size in (16, 32, 64, 128)]
    for cut in sorted(cut for cut in {1, n // 2, n - n // 2, n - 1, *blocks} if 0 < cut < n):
        yield np.arange(n) < cut, f"the first {cut} of {n} {what} only"
        yield np.arange(n) >= cut, f"the last {n - cut} of {n} {what} only"


def _agrees(name: str, array: np.ndarray, predicted: Arrays, trial: Trial) -> bool:
    return _near(array, predicted[name], trial.sizes[name], trial)


def _near(array: np.ndarray, expected: np.ndarray, sizes: np.ndarray, trial: Trial) -> bool:
    return bool((np.abs(array - expected) <= TOLERANCE * trial.unit * (sizes + TINY)).all())
