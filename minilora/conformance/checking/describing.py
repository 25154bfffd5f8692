"""Describe a wrong answer that no known mistake explains: its error, its factor, the part or the order that is wrong.

A pattern is reported only if it holds on every problem where the answer is wrong; the numbers with it are from one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product, takewhile
from typing import Any

import numpy as np

from ..naming import factor
from ..problems.formulas import QUANTITIES
from ..problems.tolerance import TINY, TOLERANCE, UNIT, Trial, round_to
from .in_common import in_common
from .suite import HALF_PRECISIONS

SHORTEST_TAIL, LONGEST_ORDER = 8, 256
"""The smallest index at which a tail can begin, and the largest number of rows whose order is searched for."""
EVERY_ENTRY = "every entry is off by a factor of"
"""The words for a wrong answer that is right but for a factor."""
SINGLE = (
    "right to float32 only: computed, or stored, in single precision. If that is intended, declare dtype float32, or"
    " answer only the float32 vectors"
)
Pairs = Sequence[tuple[Trial, np.ndarray]]
"""Problems, each with its answer."""
Pattern = tuple[int, str]
"""The number of a problem that shows a pattern, and the pattern in words."""


def describe_wrong(key: str, answered: Pairs) -> str:
    """Describe what is wrong with an answer, using all problems that it was given for."""
    failed = [(trial, array) for trial, array in answered if not trial.agrees(key, array)]
    for other in failed[0][0].right:
        if other != key and all(other in trial.right and trial.agrees(other, array) for trial, array in answered):
            return f"{QUANTITIES[other]} is returned as {QUANTITIES[key]}"
    of = [trial.problem for trial, _ in answered if trial.right[key].any()] if _is_precise(failed) else []
    when = in_common([trial.problem for trial, _ in failed], of)
    number, pattern = _pattern(key, failed)
    trial, array = failed[number]
    said = f"{QUANTITIES[key]}{f', {when},' if when else ''} {_error_of(key, array, trial)}"
    return f"{said}{f'; {pattern}' if pattern else ''} ({trial.problem})"


def wrong_array(key: str, array: np.ndarray, trial: Trial) -> str:
    """Describe what is wrong with an answer to one problem: its shape, or its error and factor."""
    _, pattern = _pattern(key, [(trial, array)], detectors=(_factor,))
    return f"{_error_of(key, array, trial)}{f'; {pattern}' if pattern else ''}"


def is_single(key: str, answered: Pairs) -> bool:
    """Return whether an answer to problems in float64 has the accuracy of float32, and no better."""
    single = UNIT["float32"] / answered[0][0].unit
    if single <= 1:
        return False
    distances = [trial.distance(key, array) for trial, array in answered]
    return 1e-3 * single < max(distances) <= TOLERANCE * single


def _error_of(key: str, array: np.ndarray, trial: Trial) -> str:
    """Describe an answer's error: its shape, or its entry with the largest error."""
    expected = trial.right[key]
    if np.ndim(array) == np.ndim(expected) == 2 and trial.agrees(key, np.transpose(array)):
        return "is transposed"
    if np.shape(array) != np.shape(expected):
        return f"has shape {np.shape(array)}, expected {np.shape(expected)}{trial.problem.shape_hint(np.shape(array))}"
    array = np.asarray(array, np.float64)
    if not np.isfinite(array).all():
        return "is not finite"
    error = np.abs(array - expected)
    largest = error >= (1 - 1e-9) * error.max()  # of equal errors take the first, however a processor rounds
    at = np.unravel_index(int(largest.argmax()), expected.shape)
    where = f"[{', '.join(map(str, at))}]{trial.problem.locate(key, at)}"
    return f"is off by {abs(array[at] - expected[at]):.3g} at {where}: {array[at]:.7g}, expected {expected[at]:.7g}"


def _pattern(key: str, failed: Pairs, detectors: Sequence[Any] = ()) -> Pattern:
    """Return the first pattern that an answer shows on every problem where it is wrong; no words if there is none."""
    if any(np.shape(array) != trial.right[key].shape or not np.isfinite(array).all() for trial, array in failed):
        return 0, ""
    exact = [(trial, np.asarray(array, np.float64)) for trial, array in failed]
    for detect in detectors or ((_factor, _rounded, _tail, _order) if _is_precise(failed) else (_factor,)):
        if pattern := detect(key, exact):
            return pattern
    return 0, ""


def _is_precise(failed: Pairs) -> bool:
    """Return whether the problems are in float32 or float64; in half precision, numbers can agree by chance."""
    return failed[0][0].unit <= UNIT["float32"]


def _factor(key: str, failed: Pairs) -> Pattern | None:
    """Detect an answer that is right but for a factor, even if it was computed in a lower precision."""
    measured = [factor(array, trial.right[key], partial(_allowed_at, trial, key)) for trial, array in failed]
    if None in measured or measured[0] is None or abs(measured[0].value - 1) <= 1e-3:
        return None
    return 0, f"{EVERY_ENTRY} {measured[0].value:.6g}"


def _allowed_at(trial: Trial, key: str, t: float) -> np.ndarray:
    """Return how far an answer of t times the right numbers may be off."""
    by_rounding = trial.allowed(trial.sizes[key] * max(1.0, abs(t))) if trial.unit <= UNIT["float32"] else TINY
    return np.asarray(by_rounding + 1e-4 * abs(t * trial.right[key]))


def _rounded(key: str, failed: Pairs) -> Pattern | None:
    """Detect an answer that was rounded to half precision where that is not allowed."""
    for half in reversed(HALF_PRECISIONS):  # most bfloat16 numbers are float16 numbers too
        for trial, array in failed:
            near = 4 * UNIT[half] * np.maximum(trial.sizes[key], np.abs(trial.right[key]))
            is_half = np.array_equal(round_to(array, half).astype(np.float64), array)
            if key in trial.problem.rounded or not is_half or (np.abs(array - trial.right[key]) > near).any():
                break
        else:
            return 0, f"it is rounded to {half}"
    return None


def _tail(key: str, failed: Pairs) -> Pattern | None:
    """Detect an answer that is right up to an index along one axis and wrong from there on, as beyond a tile."""
    for axis, word in enumerate(failed[0][0].problem.axes[key]):
        places = []
        for trial, array in failed:
            wrong = np.abs(array - trial.right[key]) > trial.allowed(trial.sizes[key])
            bad = np.moveaxis(wrong, axis, 0).reshape(wrong.shape[axis], -1).any(axis=1)
            places.append(int(bad.argmax()) if bad[bad.argmax() :].all() else -1)
        if min(places) < 0 or max(places) < SHORTEST_TAIL:
            continue
        number = next(i for i, place in enumerate(places) if place >= SHORTEST_TAIL)
        (trial, array), first = failed[number], places[number]
        tail = (slice(None),) * axis + (slice(first, None),)
        state = "wrong" if array[tail].any() else "zero"
        if key == "y" and _near(array[tail], trial.answer(update=0.0)["y"][tail], trial.sizes["y"][tail], trial):
            state = "without the update"
        return number, f"it is right up to {word} {first - 1}, and {state} from {word} {first} on"
    return None


def _order(key: str, failed: Pairs) -> Pattern | None:
    """Detect an answer, or an added update, that has the right rows or columns in another order."""
    wholes = ("its", "its update's") if key in ("y", "merged") else ("its",)
    for whose, (axis, word) in product(wholes, enumerate(failed[0][0].problem.axes[key])):
        moved = (_moved(key, whose, axis, trial, array) for trial, array in failed)
        orders: list[Any] = [*takewhile(lambda order: order is not None, moved)]  # stop at the first without an order
        number = next((i for i, order in enumerate(orders) if len(order) > 2), None)
        if number is not None and len(orders) == len(failed):
            places = ", ".join(map(str, orders[number][:8])) + (", ..." if len(orders[number]) > 8 else "")
            return number, f"{whose} {word}s are the right ones in another order: {places}"
    return None


def _moved(key: str, whose: str, axis: int, trial: Trial, array: np.ndarray) -> np.ndarray | None:
    """Return the order of the right rows along an axis in an answer; None if it has other rows."""
    right, sizes = trial.right[key], trial.sizes[key]
    if right.shape[axis] > LONGEST_ORDER:
        return None
    without: dict[str, Any] = {"y": {"update": 0.0}, "merged": {"merged": lambda W, BA, s: W}}
    base = np.zeros_like(right) if whose == "its" else trial.answer(**without[key])[key]
    mine, theirs = (np.moveaxis(a - base, axis, 0).reshape(a.shape[axis], -1) for a in (array, right))
    order = (np.abs(mine[:, None] - theirs[None]) ** 2).sum(axis=-1).argmin(axis=1)
    if (np.sort(order) != np.arange(len(order))).any():
        return None
    moved = base + np.take(right - base, order, axis)
    return order if _near(array, moved, np.maximum(sizes, np.take(sizes, order, axis)), trial) else None


def _near(array: np.ndarray, expected: np.ndarray, sizes: np.ndarray, trial: Trial) -> bool:
    return bool((np.abs(array - expected) <= trial.allowed(sizes)).all())
