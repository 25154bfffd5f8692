"""The suite's `World` for `naming`: problems in one precision, their right answers, known mistakes.

Two kinds of rows are added to the table of known mistakes. One is built on the spot, for a scaling that is measured in
the outputs and that no other row has. The others are tried last, since they are many and not known to occur in anyone's
code: an intermediate result rounded to half precision, a sum without some of its terms, ranks or a bias out of order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np

from ..naming import MEASURED_COUNT, Factor, Parts, World, Wrong, factor
from ..problems.bugs import bugs_of
from ..problems.formulas import QUANTITIES, SCALINGS
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import TOLERANCE, UNIT, Trial, round_to
from .in_common import in_common

HALF_PRECISIONS = ("float16", "bfloat16")
SENTENCE_NAMES = {key: words.split(",")[0] for key, words in QUANTITIES.items()}
"""The answers' names within a sentence."""
Factors = Mapping[Problem, Factor]


def suite_of(kind: str, trials: tuple[Trial, ...]) -> World:
    """Return the world of a kind's problems in one precision, with the bugs that are known now."""
    return _suite(trials, tuple(bugs_of(kind)))


@lru_cache(maxsize=16)
def _suite(trials: tuple[Trial, ...], bugs: tuple[Wrong, ...]) -> World:
    """Return a world; it is cached, so that the next check can use what its rows have predicted."""
    of, precise = {trial.problem: trial for trial in trials}, trials[0].unit <= UNIT["float32"]
    latest: tuple[Any, Any, Arrays] = (None, None, {})  # the last sizes, which are of all answers

    def answers(problem: Problem, parts: Parts) -> Mapping[str, Any]:
        found = of[problem].answer(**parts) if parts else of[problem].right
        return {key: found.get(key) for key in of[problem].right}

    def allowed(problem: Problem, key: str, parts: Parts) -> np.ndarray:
        nonlocal latest
        if latest[0] is not problem or latest[1] is not parts:
            latest = (problem, parts, of[problem].size(**parts))
        return of[problem].allowed(latest[2][key])

    # In half precision a few numbers can agree by chance, so each row is tried by itself, on all problems together.
    return World(
        cases=list(of),
        answers=answers,
        allowed=allowed,
        table=[row if precise else _uncombined(row) for row in bugs],
        measured=lambda given: other_scaling(of, measured_scalings(trials, given)),
        last=last_rows(trials[0].formulas.scaling) if precise else (),
        when=in_common if precise else None,
        words=SENTENCE_NAMES,
    )


@cache
def _uncombined(row: Wrong) -> Wrong:
    """Return a row that is never tried together with another one."""
    return replace(row, slot="")


# --- a scaling that was measured ------------------------------------------------------------------


def measured_scalings(trials: Sequence[Trial], replies: Sequence[Mapping[str, Any]]) -> dict[Problem, Factor]:
    """Measure the factor of the update in each output; empty if all outputs are right, or one has no such factor."""
    factors: dict[Problem, Factor] = {}
    pairs = list(zip(trials, replies, strict=True))
    if all(reply.get("y") is None or trial.agrees("y", reply["y"]) for trial, reply in pairs):
        return {}
    for trial, reply in pairs:
        if reply.get("y") is None or "magnitude" in trial.arrays:
            continue
        if trial.problem.start:  # the update is zero, but lora_B's gradient has the factor
            key, without, change = "lora_B", np.zeros(()), trial.answer(scaling=SCALINGS["1"])["lora_B"]
        else:
            key, without = "y", trial.answer(update=0.0)["y"]
            change = trial.answer(scaling=SCALINGS["1"], s_in_base=_nothing, s_in_bias=_nothing)["y"]
        array = reply.get(key)
        measured = None if array is None else factor(array, change, partial(_allowed_at, trial, key), without)
        if measured is None and key == "y":
            return {}
        if measured is not None:
            factors[trial.problem] = measured if measured.differs_from(0.0) else Factor(0.0, measured.slack)
    return factors


def _nothing(s: float) -> float:
    return 0.0


def _allowed_at(trial: Trial, key: str, value: float) -> np.ndarray:
    """Return how far an answer may be off if the scaling is `value`."""
    return trial.allowed(trial.size(scaling=lambda alpha, r: value)[key])


def other_scaling(trials: Mapping[Problem, Trial], factors: Factors) -> list[Wrong]:
    """Return a row with the measured scaling; none if the scaling is right everywhere."""
    expected = {problem: scaling_of(trials[problem]) for problem in factors}
    other = [problem for problem, s in expected.items() if factors[problem].differs_from(s)]
    if not other:
        return []
    cases = [_one_case(problem, factors[problem].value, expected[problem]) for problem in other[:3]]
    when = in_common(other, list(factors))
    says = f"the update has a different scaling{', ' * bool(when)}{when}: {'; '.join(cases)}{_rule(expected, factors)}"

    def scaled(problem: Problem, slacks: float = 0.0) -> Parts:
        if problem not in factors:
            return {}
        value, slack = factors[problem]
        return {"scaling": lambda alpha, r: value + slacks * np.copysign(slack, value)}

    def largest(problem: Problem) -> Parts:
        """Allow for the scaling's own rounding error, in units of an answer's."""
        return scaled(problem, 1 / (TOLERANCE * trials[problem].unit))

    return [Wrong("another-scaling", says, scaled, slot="scaling", count=MEASURED_COUNT, largest=largest)]


def scaling_of(trial: Trial) -> float:
    """Return the declared scaling for a problem."""
    return trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)


def _one_case(problem: Problem, value: float, expected: float) -> str:
    """Describe the scaling measured for a problem and the expected one."""
    got, right = in_digits_that_differ(value, expected)
    sizes = f"in={problem.in_features} out={problem.out_features} r={problem.rank} alpha={problem.alpha:g}"
    return f"{got} at {sizes}, expected {right}"


def in_digits_that_differ(value: float, expected: float) -> tuple[str, str]:
    """Format two numbers with six digits, or with as few more as it takes to tell them apart."""
    for digits in range(6, 17):
        got, right = f"{value:.{digits}g}", f"{expected:.{digits}g}"
        if got != right:
            break
    return got, right


def _rule(expected: Mapping[Problem, float], factors: Factors) -> str:
    """Describe how the measured scalings follow from the right ones, if one rule holds on every problem."""

    def holds(rule: Callable[[float], float]) -> bool:
        return not any(factors[problem].differs_from(rule(s)) for problem, s in expected.items())

    expected = {problem: s for problem, s in expected.items() if not problem.start}  # there it is a gradient's
    first = next(iter(expected.values()))
    for half in HALF_PRECISIONS:
        if holds(lambda s, half=half: float(round_to(np.array([s]), half)[0])):  # type: ignore[misc]
            return f"; it is the right one rounded to {half}"
    if holds(lambda s: first) and len(set(expected.values())) > 1:
        return "; it is the first problem's everywhere (is something kept between calls?)"
    times = [factors[problem].value / s for problem, s in expected.items() if s]
    if times and np.abs(np.subtract(times, 1)).max() < 4 * UNIT["float32"]:
        return "; it is the right one in single precision"
    for width in ("in", "out"):
        if not any(factors[p].differs_from(p.alpha / getattr(p, f"{width}_features")) for p in expected):
            return f"; it is alpha / {width} instead of alpha / r: is the rank read from another axis?"
    if len(times) > 1 and np.ptp(times) < 1e-5 * abs(times[0]):
        return f"; it is {times[0]:.6g} times the right one"
    return ""


# --- rows that are tried last ---------------------------------------------------------------------


def _whole_blocks(size: int, n: int) -> np.ndarray:
    return np.arange(n) < (n - n % size if n > size else n)


ORDERS: dict[str, Callable[[int], np.ndarray]] = {
    "one place on": lambda n: np.roll(np.arange(n), 1),
    "one place back": lambda n: np.roll(np.arange(n), -1),
    "half of the places back": lambda n: np.roll(np.arange(n), -(n // 2)),
    "from last to first": lambda n: np.arange(n)[::-1],
    "the even places first": lambda n: np.r_[0:n:2, 1:n:2],
    "the first one everywhere": lambda n: np.zeros(n, int),
}
"""Orders in which a bias or ranks may be."""
SUBSETS: dict[str, Callable[[int], np.ndarray]] = {
    "all {} but the last": lambda n: np.arange(n) < n - 1,
    "all {} but the first": lambda n: np.arange(n) > 0,
    "the first half of the {}": lambda n: np.arange(n) < n // 2,
    "the first half of the {}, and the one in the middle,": lambda n: np.arange(n) < n - n // 2,
    "the last half of the {}": lambda n: np.arange(n) >= n - n // 2,
    "the last half of the {}, and the one in the middle,": lambda n: np.arange(n) >= n // 2,
    **{f"whole blocks of {size} {{}}": partial(_whole_blocks, size) for size in (16, 32, 64, 128)},
}
"""Terms of a sum that may be left, as when a shard is not added or a block's tail is dropped."""


@cache
def last_rows(scaling: Callable[[float, int], float]) -> tuple[Wrong, ...]:
    """Return the rows that are tried last: plausible mistakes that are not known to occur in anyone's code.

    A row's flag is made from its sentence. Flags must not change, so neither may the sentences.
    """
    rows = [row for half in HALF_PRECISIONS for row in _rounded(half, scaling)]
    rows += [row for words, order in ORDERS.items() for row in _in_another_order(words, order)]
    rows += [row for words, counted in SUBSETS.items() for row in _parts_of_sums(words, counted)]
    rows.append(("the bias is taken by the row and not by the output", _by_the_row, "y"))
    return tuple(Wrong(re.sub("[^a-z0-9]+", "-", says.lower()), says, parts, shows=tuple(shows), count=MEASURED_COUNT)
                 for says, parts, *shows in rows)  # fmt: skip


def _rounded(half: str, scaling: Callable[[float, int], float]) -> Iterator[Any]:
    """Yield rows in which an intermediate result is rounded to half precision."""

    def short(array: np.ndarray) -> np.ndarray:
        return round_to(array, half).astype(np.float64)

    yield f"the factors are rounded to {half}", {"used_A": short, "used_B": short}
    yield f"lora_A is rounded to {half}", {"used_A": short}
    yield f"lora_B is rounded to {half}", {"used_B": short}
    yield f"the weight is rounded to {half}", {"weight": short}
    yield f"the scaling is rounded to {half}", {"scaling": lambda alpha, r: float(short(np.array(scaling(alpha, r))))}
    yield f"x A^T is rounded to {half}", {"final_update": lambda update, x, A, B, s: s * short(x @ A.T) @ B.T}, "y"
    yield f"the update is rounded to {half}", {"final_update": lambda update, *_: short(update)}, "y"
    before = {"final_update": lambda update, x, A, B, s: s * short(x @ A.T @ B.T)}
    yield f"the update is rounded to {half} before it is scaled", before, "y"


def _in_another_order(words: str, order: Callable[[int], np.ndarray]) -> Iterator[Any]:
    """Yield rows in which the ranks of one factor, or the bias, are out of order."""
    ranks = f"the ranks of lora_B stand in another order than those of lora_A: {words}"
    yield ranks, {"used_B": lambda B: B[:, order(B.shape[1])]}, "y", "x", "merged"
    yield f"the bias is taken at a wrong index: {words}", {"bias": lambda b, G: b[order(len(b))]}, "y"


def _by_the_row(problem: Problem) -> Parts:
    places = np.arange(problem.n)[:, None]
    return {} if problem.with_two_row_axes() is None else {"bias": lambda b, G: b[places % len(b)]}


def _parts_of_sums(words: str, counted: Callable[[int], np.ndarray]) -> Iterator[Any]:
    """Yield rows in which a sum lacks some of its terms."""

    def over_rows(dA: Any, dB: Any, dy: Any, x: Any, A: Any, B: Any, s: float) -> tuple[Any, Any]:
        some = (counted(len(dy))[:, None] * dy).T
        return s * B.T @ (some @ x), s * (some @ x) @ A.T

    base = {"base": lambda x, W: (x * counted(x.shape[1])) @ W.T}
    update = {"used_A": lambda A: A * counted(A.shape[1])}
    ranks = {"used_B": lambda B: B * counted(B.shape[1])}
    yield f"it sums {words.format('ranks')} only", ranks, "y", "merged"
    yield f"it sums {words.format('inputs')} only", base | update, "y"
    yield f"it sums {words.format('inputs')} only in x W^T", base, "y"
    yield f"it sums {words.format('inputs')} only in the update", update, "y"
    yield f"it sums {words.format('rows')} only", {"final_gradients": over_rows}, "lora_A", "lora_B"
