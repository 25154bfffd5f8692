"""Another scaling than the declared one: measured in each output, and told by a rule where one holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..problems.bugs import Bug
from ..problems.formulas import SCALINGS
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import TINY, TOLERANCE, UNIT, Trial, round_to
from .describing import HALVES
from .in_common import in_common


@dataclass(frozen=True)
class Factor:
    """What the update is multiplied by in an output, as measured."""

    value: float
    size: float  # of the factor, as an answer has one: what its rounding is measured in
    unit: float  # unit roundoff

    def is_other(self, expected: float) -> bool:
        """Return whether it is another factor than the expected one, beyond rounding."""
        return abs(self.value - expected) > TOLERANCE * self.unit * self.size


def _factor(trial: Trial, key: str, array: np.ndarray, without: np.ndarray, update: np.ndarray) -> Factor | None:
    """Measure by least squares how often an answer adds an update; None where it adds something else."""
    if np.shape(array) != np.shape(update) or not np.isfinite(array).all():
        return None
    squares = float((update * update).sum())
    with np.errstate(over="ignore"):
        value = float(((array - without) * update).sum() / squares)
    if not np.isfinite(value):
        return None
    sizes = trial.size(scaling=lambda alpha, r: value)
    if trial.distance(key, array, without + value * update, sizes) > TOLERANCE:
        return None
    top = max(float(sizes[key].max()), TINY)  # taken out, or the square of a huge one would overflow
    size = top * float(np.sqrt(((sizes[key] / top * update) ** 2).sum())) / squares  # each entry rounds on its own
    return Factor(value if Factor(value, size, trial.unit).is_other(0.0) else 0.0, size, trial.unit)


def _measured(says: str, factors: Mapping[Problem, Factor]) -> Bug:
    """Return a scaling that no known bug gives, as it was measured on each problem."""

    def at(problem: Problem) -> Mapping[str, Any]:
        factor = factors.get(problem)
        return {"scaling": lambda alpha, r: factor.value} if factor else {}

    def largest(problem: Problem) -> Mapping[str, Any]:
        """Return the scaling with its own rounding, which the answers that it explains have beside theirs."""
        factor = factors.get(problem)
        return {"scaling": lambda alpha, r: abs(factor.value) + factor.size} if factor else {}

    return Bug("another-scaling", says, at, breaks="scaling", largest=largest)


def factors_of(trials: Sequence[Trial], replies: Sequence[Arrays]) -> dict[Problem, Factor]:
    """Measure the factor of the update in each output; empty where an output is not the base plus a factor times it."""
    factors: dict[Problem, Factor] = {}
    for trial, reply in zip(trials, replies, strict=True):
        if "y" not in reply or "magnitude" in trial.arrays:
            continue
        if trial.problem.start:  # the update is zero there: lora_B's gradient has the factor
            key, without, update = "lora_B", np.zeros(()), trial.answer(scaling=SCALINGS["1"])["lora_B"]
        else:
            key, without = "y", trial.answer(update=0.0)["y"]
            update = trial.answer(scaling=SCALINGS["1"], s_in_base=_nothing, s_in_bias=_nothing)["y"]
        factor = _factor(trial, key, reply[key], without, update) if key in reply else None
        if factor is None and key == "y":
            return {}
        if factor is not None:
            factors[trial.problem] = factor
    return factors


def _nothing(s: float) -> float:
    return 0.0


def other_scaling(trials: Sequence[Trial], factors: Mapping[Problem, Factor]) -> list[Bug]:
    """Return a bug that scales as was measured; none where the scaling is right everywhere."""
    measured = [trial for trial in trials if trial.problem in factors]
    expected = {trial.problem: trial.formulas.scaling(trial.problem.alpha, trial.problem.rank) for trial in measured}
    other = [problem for problem, s in expected.items() if factors[problem].is_other(s)]
    if not other:
        return []
    cases = [_case(p, factors[p].value, expected[p]) for p in other[:3]]
    where, how = in_common(other, list(factors)).rstrip(","), _relation(expected, factors)
    name = f"the update has another scaling{where}: {'; '.join(cases)}{how}"
    return [_measured(name, factors)]


def _case(problem: Problem, value: float, expected: float) -> str:
    """Say which scaling was measured at a problem, and which was expected, in as many digits as tell them apart."""
    got, right = _told_apart(value, expected)
    sizes = f"in={problem.in_features} out={problem.out_features} r={problem.rank} alpha={problem.alpha:g}"
    return f"{got} at {sizes}, expected {right}"


def _told_apart(value: float, expected: float) -> tuple[str, str]:
    """Return two numbers with six digits, or with the fewest at which they differ."""
    for digits in range(6, 17):
        got, right = f"{value:.{digits}g}", f"{expected:.{digits}g}"
        if got != right:
            break
    return got, right


def _relation(expected: Mapping[Problem, float], factors: Mapping[Problem, Factor]) -> str:
    """Say how measured scalings come from the right ones, where one rule holds on every problem."""

    def so(rule: Callable[[float], float]) -> bool:
        return not any(factors[problem].is_other(rule(s)) for problem, s in expected.items())

    expected = {problem: s for problem, s in expected.items() if not problem.start}  # there it is that of a gradient
    first = next(iter(expected.values()))
    for half in HALVES:
        if so(partial(_short, half=half)):
            return f"; it is the right one rounded to {half}"
    if so(lambda s: first) and len(set(expected.values())) > 1:
        return "; it is that of the first problem everywhere (is something kept between calls?)"
    times = [factors[problem].value / s for problem, s in expected.items() if s]
    if times and np.abs(np.subtract(times, 1)).max() < 4 * UNIT["float32"]:
        return "; it is the right one in single precision"
    if len(times) > 1 and np.ptp(times) < 1e-5 * abs(times[0]):
        return f"; it is {times[0]:.6g} times the right one"
    return ""


def _short(s: float, half: str) -> float:
    return float(round_to(np.array([s]), half)[0])


def other_factor(trial: Trial, factors: Mapping[Problem, Factor]) -> str:
    """Say what the update is multiplied by in one output, where that is not the declared scaling; empty elsewhere."""
    s = trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)
    factor = factors.get(trial.problem)
    other = factor is not None and factor.is_other(s)
    if factor is None or not other:
        return ""
    got, right = _told_apart(factor.value, s)
    return f"the update is multiplied by {got}, expected {right}"
