"""Hold an implementation of LoRA against the formulas: `check`, and what it says.

An implementation is a module or an object with functions on NumPy arrays; only ``forward`` is required::

    forward(x, weight, bias, lora_A, lora_B, alpha) -> y
    backward(dy, x, weight, bias, lora_A, lora_B, alpha) -> {"x": ..., "lora_A": ..., "lora_B": ...}
    merge(weight, lora_A, lora_B, alpha) -> weight
    init(in_features, out_features, rank, rng) -> (lora_A, lora_B)
    step(params, grads, state) -> (params, state)          Adam with lr 1e-3; state is None at first
    kinds = {"conv2d": another such object}                other kinds of layers

    dtype = "float64"            the precision to be checked in: "float64", "float32", "float16" or "bfloat16"; if
                                 nothing is said, float64, or that in which it answers where its output is not right
                                 in float64
    scaling = "alpha / r"        or "alpha / sqrt(r)", "alpha", "1"
    orientation = "out, in"      how its weights lie: "out, in" as in PyTorch, or "in, out": weight (in, out),
                                 lora_A (in, r), lora_B (r, out)

x is (N, in), weight (out, in), bias (out,) or None, lora_A (r, in), lora_B (out, r). Each function gets all that it
needs: a backward may not count on which forward was called last. The kinds are "rslora", "dora",
"embedding", "conv1d" and "conv2d". `minilora.conformance.kinds` has their shapes, and their functions take more:

- "dora": magnitude (out,) as the last argument of ``forward``, ``backward`` and ``merge``, and its gradient in the
  dict; weight as the last argument of ``init``, which returns the magnitude as well. ``detached_norm`` is True, as in
  PEFT, or False where the gradient passes through the norm.
- "embedding": x are ids, bias is None, and there is no dx.
- "conv1d", "conv2d": those of the keywords stride, padding, dilation (a tuple each) and groups that a function has
  among its parameters; without them they are 1, 0, 1 and 1. ``init`` takes the kernel's shape last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import numpy as np

from ..checks import check_choice
from ..files.errors import printable
from . import judges
from .bugs import Bug
from .calling import Watch, answers, suited
from .diagnoses import EVERY_ENTRY, describe_unknown, diagnose, left_out, listed, unexplained
from .kinds import AGAIN, DECLARED, SETS, Images
from .problems import Arrays, Problem
from .reference import QUANTITIES, SCALINGS, TINY, TOLERANCE, UNIT, Formulas, Trial

CONTRACT = ("forward", "scaling", "slope", "merge", "start", "adam", "frozen base", "nothing is changed")
"""What is checked, in the order of the report."""
FACTORS = ("lora_A", "lora_B", "magnitude")
ANSWERS = {"forward": ("forward", ("y",)), "slope": ("backward", ("x", *FACTORS)), "merge": ("merge", ("merged",))}
"""The function that each claim about numbers is about, and its answers."""
ORIENTATIONS = ("out, in", "in, out")
NOT_FAILED = ("ok", "not offered")


class CannotRun(ValueError):
    """The implementation cannot be checked; the message says what it lacks."""


@dataclass
class Report:
    """What `check` found; ``str(report)`` begins with the diagnoses."""

    name: str  # the implementation's
    dtype: str  # the precision that it was checked in
    claims: dict[str, str] = field(default_factory=dict)  # "ok", "not offered", or what is wrong, for each claim
    habits: dict[str, str] = field(default_factory=dict)  # the same for each habit, which does not count
    diagnoses: list[str] = field(default_factory=list)  # what is wrong, the likeliest first; empty where all is right
    # For each answer that it offers, the largest error on any problem, relative to the largest entry; infinite where an
    # answer has another shape or is not finite.
    errors: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, Report] = field(default_factory=dict)  # a report for each further kind of layer

    @property
    def passed(self) -> bool:
        """Whether every claim that it offers holds, for every kind. Habits do not count."""
        own = all(verdict in NOT_FAILED for verdict in self.claims.values())
        return own and all(report.passed for report in self.kinds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        kinds = {kind: report.as_dict() for kind, report in self.kinds.items()}
        own = {name: getattr(self, name) for name in ("name", "dtype", "passed", "diagnoses", "claims", "habits")}
        errors = {name: error if np.isfinite(error) else None for name, error in self.errors.items()}  # JSON has no inf
        return {**own, "errors": errors, "kinds": kinds}

    def __str__(self) -> str:
        wrong = [f"{kind}: {text}" for kind, report in self.kinds.items() for text in report.diagnoses]
        return "\n".join(printable(line, len(line)) for line in [*self.diagnoses, *wrong, *self._lines()])

    def _lines(self) -> list[str]:
        own = all(verdict in NOT_FAILED for verdict in self.claims.values())
        lines = [f"{self.name}: {'passed' if own else 'WRONG'}, in {self.dtype}"]
        for title, verdicts in (("claims", self.claims), ("habits, which do not count", self.habits)):
            lines += [f"  {title}:"] if verdicts else []
            lines += [f"    {name:20}{verdict}" for name, verdict in verdicts.items()]
        return lines + [line for report in self.kinds.values() for line in report._lines()]


def check(implementation: Any, *, dtype: str | None = None, name: str | None = None) -> Report:
    """Hold an implementation of LoRA against the formulas.

    Parameters
    ----------
    implementation : module or object
        With the functions that the module's page lists. What it lacks is not offered, and never failed.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        The precision; by default the implementation's own ``dtype``. Where it has none, float64, or the precision in
        which it answers to float64 where its output is not right in float64.
    name : str, optional
        For the report.

    Returns
    -------
    Report
        Claims, habits and diagnoses.

    Raises
    ------
    CannotRun
        If it has no ``forward``, or declares a precision, an orientation, a scaling or a kind that is not known.
    """
    title = str(name or getattr(implementation, "__name__", type(implementation).__name__))
    kinds = getattr(implementation, "kinds", {})
    if not isinstance(kinds, Mapping):
        raise CannotRun(f"kinds of {title} must be a dict of objects, got {type(kinds).__name__}")
    if unknown := [kind for kind in kinds if kind not in DECLARED]:
        raise CannotRun(f"{title} has the kind {unknown[0]!r}; known are {', '.join(DECLARED)}")
    report = _check_kind(implementation, title, dtype, "linear")
    for kind, other in kinds.items():
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, kind)
    return report


def formulas_of(kind: str, implementation: Any) -> Formulas:
    """Return what a kind of problems should give, by the scaling that an implementation declares."""
    formulas = SETS[kind].formulas
    if hasattr(implementation, "scaling"):
        return replace(formulas, scaling=SCALINGS[implementation.scaling])
    return formulas


def _check_kind(implementation: Any, name: str, dtype: str | None, kind: str) -> Report:
    """Check one object with functions for one kind of layer."""
    if not callable(getattr(implementation, "forward", None)):
        raise CannotRun(f"{name} has no function forward(x, weight, bias, lora_A, lora_B, alpha)")
    if isinstance(implementation, type) and _takes_self(getattr(implementation, "forward")):  # noqa: B009
        raise CannotRun(f"{name} is a class, hand over an object: {implementation.__name__}(...)")
    wanted = dtype or getattr(implementation, "dtype", None)
    declared = {
        "dtype": (wanted or "float64", tuple(UNIT)),
        "orientation": (getattr(implementation, "orientation", "out, in"), ORIENTATIONS),
        "scaling": (getattr(implementation, "scaling", "alpha / r"), tuple(SCALINGS)),
    }
    for what, (value, choices) in declared.items():
        try:
            check_choice(f"{what} of {name}", value, choices)
        except ValueError as error:
            raise CannotRun(str(error)) from None
    full = kind == "dora" and not getattr(implementation, "detached_norm", True)
    kind_of_problems = "dora-full" if full else kind
    formulas, watch = formulas_of(kind_of_problems, implementation), Watch(implementation, kind)
    problems = [suited(problem, watch) for problem in SETS[kind_of_problems].problems]
    report = _compare(watch, name, wanted or "float64", kind_of_problems, formulas, problems)
    answered = report.habits["dtype kept"].partition(" ")[0]
    if wanted is None and answered in UNIT and report.claims["forward"] != "ok":  # an output in float64 settles it
        return _compare(Watch(implementation, kind), name, answered, kind_of_problems, formulas, problems)
    return report


def _takes_self(function: Callable[..., Any]) -> bool:
    try:
        return next(iter(signature(function).parameters), "") == "self"
    except (TypeError, ValueError):  # of a compiled function nothing is known
        return False


def _compare(watch: Watch, name: str, dtype: str, kind: str, formulas: Formulas, problems: Sequence[Problem]) -> Report:
    """Let an implementation answer every problem, and judge the answers."""
    trials = [Trial.draw(problem, dtype, formulas) for problem in problems]
    found = [answers(watch, trial) for trial in trials]
    if not any(found):
        raise CannotRun(f"{name}: forward {watch.told('forward')}")
    between = Trial.draw(replace(problems[0], seed=1 + problems[0].seed), dtype, formulas)
    again = answers(watch, trials[0], between)
    report = Report(name, dtype)
    judge_numbers(report, kind, trials, found, watch.returned)
    for claim, (function, _) in ANSWERS.items():
        if function in watch.raised:
            report.claims[claim] = f"{function}{_common(watch.failed[function], problems)} {watch.told(function)}"
            if function == "forward" or watch.raised[function] != watch.raised.get("forward"):
                report.diagnoses.append(report.claims[claim])
        elif text := _changes_its_mind(trials[0], found[0], again, claim):
            report.claims[claim] = text
            report.diagnoses.insert(0, text)
    verdicts = {
        "start": watch.judge("init", judges.start),
        "adam": watch.judge("step", lambda watch: judges.adam(watch, dtype)),
        "frozen base": watch.judge("backward", lambda watch: judges.frozen(watch, trials[0])),
        "nothing is changed": watch.look_back() or "ok",
    }
    if "backward" in watch.raised:
        verdicts["frozen base"] = "not offered"
    told = [verdict for verdict in verdicts.values() if verdict not in NOT_FAILED and verdict != watch.changed]
    report.diagnoses = [*filter(None, [watch.changed]), *report.diagnoses, *told]
    report.claims |= verdicts
    report.habits = judges.habits(watch, trials[0], found[0])
    return report


def judge_numbers(
    report: Report, kind: str, trials: Sequence[Trial], found: Sequence[Arrays], returned: Sequence[str] | None
) -> None:
    """Compare answers with the right ones, and put verdicts, diagnoses and errors into a report.

    Parameters
    ----------
    report : Report
        It gets the claims "forward", "scaling", "slope" and "merge".
    kind : str
        Of the problems, as `minilora.conformance.kinds.SETS` has it.
    trials : sequence of Trial
        The problems, all of one precision.
    found : sequence of dict
        The answers to each of them.
    returned : sequence of str, or None
        The names of the gradients that the backward returned, where there is one: none may be missing.
    """
    there = {key for one in found for key in one}
    wrong = frozenset(key for key in there if not _all_agree(trials, found, key))
    factors = _factors(trials, found)
    bugs = diagnose(kind, trials, found, wrong, _other_scaling(trials, factors))
    report.diagnoses += [str(bug) for bug in bugs]
    rest = list(unexplained(wrong, bugs))
    single = [key for key in rest if _is_single(trials, found, key)]
    if single:
        report.diagnoses.append(f"{listed([QUANTITIES[key].split(',')[0] for key in single])}: {SINGLE}")
    unknown = [_describe(trials, found, key) for key in rest if key not in single]
    report.diagnoses += sorted(unknown, key=lambda text: EVERY_ENTRY not in text)
    for claim, (_, keys) in ANSWERS.items():
        texts = [_describe(trials, found, key) for key in keys if key in wrong]
        if claim == "slope" and returned is not None and (missing := _missing(kind, trials, there, returned)):
            texts.append(missing)
            report.diagnoses.append(missing)
        report.claims[claim] = "; ".join(texts) or ("ok" if there & set(keys) else "not offered")
    report.claims["scaling"] = _scaling(trials, found, factors)
    report.claims = {claim: report.claims[claim] for claim in CONTRACT if claim in report.claims}
    for key in QUANTITIES:
        if key in there:
            report.errors[key] = max(
                _error(one[key], trial.right[key]) for trial, one in zip(trials, found, strict=True) if key in one
            )


def _missing(kind: str, trials: Sequence[Trial], there: set[str], returned: Sequence[str]) -> str:
    """Say which array that trains has no gradient. That of x may be left out: the first layer needs none."""
    missing = [key for key in FACTORS if key in trials[0].right and key not in there]
    if not missing:
        return ""
    if bug := left_out(kind, trials[0], missing):
        return str(bug)
    got = f"it returns those of {', '.join(returned)}" if returned else "it returns none"
    return f"backward returns no gradient of {' and '.join(missing)}; {got}"


def _changes_its_mind(trial: Trial, first: Arrays, second: Arrays, claim: str) -> str:
    """Say where the same arguments give other numbers the second time, by more than two orders of summation may."""
    for key in ANSWERS[claim][1]:
        if key not in first or key not in second or _as_before(trial, key, first[key], second[key]):
            continue
        if trial.agrees(key, first[key]):
            return f"{QUANTITIES[key]} is another one the second time it is asked for: something is kept between calls"
        if np.shape(first[key]) == np.shape(trial.right[key]) and np.isfinite(first[key]).all():
            return f"{QUANTITIES[key]} is another one at each call with the same arguments: is dropout on?"
    return ""


def _as_before(trial: Trial, key: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two answers are the same up to the rounding of both. A wrong one may be larger than the right."""
    largest = np.abs(trial.right[key]).max(initial=TINY)
    times = max(1.0, float(np.abs(first.astype(np.float64)).max(initial=0.0) / largest))
    sizes = {key: trial.sizes[key] * times}
    return trial.distance(key, second, first.astype(np.float64), sizes) <= 2 * TOLERANCE


@dataclass(frozen=True)
class Factor:
    """What the update is multiplied by in an output, as measured."""

    value: float
    size: float  # of the factor, as an answer has one: what its rounding is measured in
    unit: float  # unit roundoff

    def is_other(self, expected: float) -> bool:
        """Return whether it is another factor than the expected one, beyond rounding."""
        return abs(self.value - expected) > TOLERANCE * self.unit * self.size


def _factor(trial: Trial, key: str, found: np.ndarray, without: np.ndarray, update: np.ndarray) -> Factor | None:
    """Measure by least squares how often an answer adds an update; None where it adds something else."""
    if np.shape(found) != np.shape(update) or not np.isfinite(found).all():
        return None
    squares = float((update * update).sum())
    with np.errstate(over="ignore"):
        value = float(((found - without) * update).sum() / squares)
    if not np.isfinite(value):
        return None
    sizes = trial.sizes_by(scaling=lambda alpha, r: value)
    if trial.distance(key, found, without + value * update, sizes) > TOLERANCE:
        return None
    top = max(float(sizes[key].max()), TINY)  # taken out, or the square of a huge one would overflow
    size = top * float(np.sqrt(((sizes[key] / top * update) ** 2).sum())) / squares  # each entry rounds on its own
    return Factor(value if Factor(value, size, trial.unit).is_other(0.0) else 0.0, size, trial.unit)


@dataclass(frozen=True)
class _Measured(Bug):
    """A scaling that no known bug gives, as it was measured on each problem."""

    factors: Mapping[Problem, Factor] = field(default_factory=dict)

    def by(self, problem: Problem | None = None) -> Mapping[str, Any]:
        """Return the scaling of a problem."""
        factor = self.factors.get(problem) if problem else None
        return {"scaling": lambda alpha, r: factor.value} if factor else {}

    def largest(self, problem: Problem) -> Mapping[str, Any]:
        """Return the scaling with its own rounding, which the answers that it explains have beside theirs."""
        factor = self.factors.get(problem)
        return {"scaling": lambda alpha, r: abs(factor.value) + factor.size} if factor else {}


def _factors(trials: Sequence[Trial], found: Sequence[Arrays]) -> dict[Problem, Factor]:
    """Measure the factor of the update in each output; empty where an output is not the base plus a factor times it."""
    factors: dict[Problem, Factor] = {}
    for trial, one in zip(trials, found, strict=True):
        if "y" not in one or "magnitude" in trial.arrays:
            continue
        if trial.problem.start:  # the update is zero there: lora_B's gradient has the factor
            key, without, update = "lora_B", np.zeros(()), trial.by(scaling=SCALINGS["1"])["lora_B"]
        else:
            key, without = "y", trial.by(update=0.0)["y"]
            update = trial.by(scaling=SCALINGS["1"], s_in_base=_nothing, s_in_bias=_nothing)["y"]
        factor = _factor(trial, key, one[key], without, update) if key in one else None
        if factor is None and key == "y":
            return {}
        if factor is not None:
            factors[trial.problem] = factor
    return factors


def _nothing(s: float) -> float:
    return 0.0


def _other_scaling(trials: Sequence[Trial], factors: Mapping[Problem, Factor]) -> list[Bug]:
    """Return a bug that scales as was measured; none where the scaling is right everywhere."""
    measured = [trial for trial in trials if trial.problem in factors]
    expected = {trial.problem: trial.formulas.scaling(trial.problem.alpha, trial.problem.rank) for trial in measured}
    other = [problem for problem, s in expected.items() if factors[problem].is_other(s)]
    if not other:
        return []
    cases = [f"{factors[p].value:.6g} at in={p.in_features} out={p.out_features} "
             f"r={p.rank} alpha={p.alpha:g}, expected {expected[p]:.6g}" for p in other[:3]]  # fmt: skip
    name = f"the update has another scaling{_common(other, list(factors)).rstrip(',')}: {'; '.join(cases)}"
    return [_Measured("another-scaling", name, {}, "scaling", factors=factors)]


def _scaling(trials: Sequence[Trial], found: Sequence[Arrays], factors: Mapping[Problem, Factor]) -> str:
    """Compare the factor that the update has in the output with the one that is declared."""
    if not any("y" in one for one in found):
        return "not offered"
    if _all_agree(trials, found, "y") or _is_single(trials, found, "y"):
        return "ok"
    for trial in trials:
        s = trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)
        factor = factors.get(trial.problem)
        if factor is not None and factor.is_other(s):
            return f"the update is multiplied by {factor.value:.6g}, expected {s:.6g} ({trial.problem})"
    return "cannot be told: the output is wrong in another way"


def _all_agree(trials: Sequence[Trial], found: Sequence[Arrays], key: str, looser: float = 1.0) -> bool:
    pairs = zip(trials, found, strict=True)
    return all(trial.agrees(key, one[key], looser=looser) for trial, one in pairs if key in one)


def _error(found: np.ndarray, right: np.ndarray) -> float:
    if np.shape(found) != np.shape(right) or not np.isfinite(found).all():
        return float("inf")
    error = np.abs(np.asarray(found, np.float64) - right).max(initial=0.0)
    return float(error / max(np.abs(right).max(initial=0.0), np.finfo(float).tiny)) if error else 0.0


def _describe(trials: Sequence[Trial], found: Sequence[Arrays], key: str) -> str:
    """Say what is wrong with an answer on the first problem where it is, and what the problems have in common."""
    asked = [(trial, one) for trial, one in zip(trials, found, strict=True) if key in one]
    failed = [(trial, one) for trial, one in asked if not trial.agrees(key, one[key])]
    trial, one = failed[0]
    if _is_single(trials, found, key):
        return SINGLE
    for other in trial.right:
        if other != key and all(trial.agrees(other, one[key]) for trial, one in asked):
            return f"{QUANTITIES[other]} is where {QUANTITIES[key]} belongs"
    common = _common([t.problem for t, _ in failed], [t.problem for t, _ in asked if t.right[key].any()])
    return f"{QUANTITIES[key]}{common} {describe_unknown(key, one[key], trial)} ({trial.problem})"


SINGLE = (
    "right to float32 only: computed, or kept, in single precision. If that is meant, declare dtype float32, or answer"
    " the vectors in float32 alone"
)


def _is_single(trials: Sequence[Trial], found: Sequence[Arrays], key: str) -> bool:
    """Return whether an answer to problems in double precision is right in single precision, and as far off as that."""
    single = UNIT["float32"] / trials[0].unit
    if single <= 1 or not _all_agree(trials, found, key, single):
        return False
    pairs = zip(trials, found, strict=True)
    return max(trial.distance(key, one[key]) for trial, one in pairs if key in one) > 1e-3 * single


def _common(failed: Sequence[Problem], asked: Sequence[Problem]) -> str:
    """Say when it is wrong, where one property of the problems decides that."""
    images = isinstance(failed[0], Images)
    for words, has in {**(OF_IMAGES if images else OF_LAYERS), **PROPERTIES}.items():
        if len(failed) < len(asked) and [p for p in asked if has(p)] == list(failed):
            return f", {words},"
    return ""


Properties = Mapping[str, Callable[[Any], bool]]
PROPERTIES: Properties = {
    "wherever there is a bias": lambda p: p.bias,
    "wherever there is no bias": lambda p: not p.bias,
    "at rank 1": lambda p: p.rank == 1,
    "at a single row": lambda p: p.n == 1,
    "for more than one row": lambda p: p.n > 1,
    "where alpha is below the rank": lambda p: p.alpha < p.rank,
    "where alpha is above the rank": lambda p: p.alpha > p.rank,
    "where alpha / r is no whole number": lambda p: p.alpha % p.rank != 0,
    "where lora_B is zero": lambda p: p.start,
}
"""What a problem may have, in the order in which it is told."""
OF_LAYERS: Properties = {
    "with the sizes of an earlier problem (is something kept between calls?)": lambda p: p == AGAIN,
    "where in = out": lambda p: p.in_features == p.out_features,
    "where in and out differ": lambda p: p.in_features != p.out_features,
    "where in is below out": lambda p: p.in_features < p.out_features,
    "where in is above out": lambda p: p.in_features > p.out_features,
    "where the rank is above a width": lambda p: p.rank > min(p.in_features, p.out_features),
    "in wide layers": lambda p: p.in_features > 100,
    "in layers that are not wide": lambda p: p.in_features <= 100,
}
OF_IMAGES: Properties = {
    "where the kernel has more than one entry": lambda p: max(p.kernel) > 1,
    "at a stride above 1": lambda p: max(p.stride) > 1,
    "with padding": lambda p: max(p.padding) > 0,
    "with dilation": lambda p: max(p.dilation) > 1,
    "with groups": lambda p: p.groups > 1,
}


def save_json(report: Report, path: str) -> None:
    """Write a report as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report.as_dict(), file, indent=2)
        file.write("\n")
