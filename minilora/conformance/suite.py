"""Hold an implementation of LoRA against the formulas: `check`, and what it says.

An implementation is a module or an object with functions on NumPy arrays; only ``forward`` is required::

    forward(x, weight, bias, lora_A, lora_B, alpha) -> y
    backward(dy, x, weight, bias, lora_A, lora_B, alpha) -> {"x": ..., "lora_A": ..., "lora_B": ...}
    merge(weight, lora_A, lora_B, alpha) -> weight
    init(in_features, out_features, rank, rng) -> (lora_A, lora_B)
    step(params, grads, state) -> (params, state)          Adam with lr 1e-3; state is None at first
    kinds = {"rslora": another such object}                other kinds of layers

    dtype = "float64"            the precision to be checked in: "float64", "float32" or "bfloat16"
    orientation = "out, in"      how its weights lie: "out, in" as in PyTorch, or "in, out": weight (in, out),
                                 lora_A (in, r), lora_B (r, out)

x is (N, in), weight (out, in), bias (out,) or None, lora_A (r, in), lora_B (out, r).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..checks import check_choice
from .diagnoses import FACTORS, describe_unknown, diagnose
from .problems import Problem
from .reference import KINDS, QUANTITIES, UNIT, Arrays, Formulas, Trial

PROBLEMS = (
    Problem(7, 5, 3, 2, alpha=3.0),
    Problem(4, 3, 6, 4, alpha=10.0, bias=False, seed=1),
    Problem(1, 8, 2, 3, alpha=0.5, seed=2),
    Problem(6, 6, 6, 4, alpha=7.0, seed=3),  # square: there a transposed factor fits
    Problem(3, 4, 9, 5, alpha=2.5, bias=False, seed=4),
    Problem(5, 2, 3, 6, alpha=16.0, seed=5),  # of a rank above both widths
    Problem(9, 130, 70, 8, alpha=12.0, seed=6),
)
CLAIMS = ("forward", "slope", "merge", "start", "adam", "frozen base", "nothing is changed")
"""The contract, in the order of the report."""
HABITS = ("same bits twice", "memory order", "dtype kept")
ORIENTATIONS = ("out, in", "in, out")


class CannotRun(ValueError):
    """The implementation cannot be checked; the message says what it lacks."""


@dataclass
class Report:
    """What `check` found; ``str(report)`` begins with the diagnoses.

    Attributes
    ----------
    name : str
        The implementation's.
    dtype : str
        The precision that it was checked in.
    claims, habits : dict of str to str
        ``"ok"``, ``"not offered"``, or what is wrong, for each claim of the contract and each habit.
    diagnoses : list of str
        What is wrong with it, the likeliest first; empty where all claims hold.
    kinds : dict of str to Report
        The same for each further kind of layer.
    """

    name: str
    dtype: str
    claims: dict[str, str] = field(default_factory=dict)
    habits: dict[str, str] = field(default_factory=dict)
    diagnoses: list[str] = field(default_factory=list)
    kinds: dict[str, Report] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every claim that it offers holds, for every kind. Habits do not count."""
        own = all(verdict in ("ok", "not offered") for verdict in self.claims.values())
        return own and all(report.passed for report in self.kinds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        kinds = {kind: report.as_dict() for kind, report in self.kinds.items()}
        own = {name: getattr(self, name) for name in ("name", "dtype", "passed", "diagnoses", "claims", "habits")}
        return {**own, "kinds": kinds}

    def __str__(self) -> str:
        lines = [*self.diagnoses, f"{self.name}: {'passed' if self.passed else 'WRONG'}, in {self.dtype}"]
        for title, verdicts in (("claims", self.claims), ("habits, which do not count", self.habits)):
            lines.append(f"  {title}:")
            lines += [f"    {name:20}{verdict}" for name, verdict in verdicts.items()]
        for report in self.kinds.values():
            lines += str(report).splitlines()
        return "\n".join(lines)


def check(implementation: Any, *, dtype: str | None = None, name: str | None = None) -> Report:
    """Hold an implementation of LoRA against the formulas.

    Parameters
    ----------
    implementation : module or object
        With the functions that the module's page lists. What it lacks is not offered, and never failed.
    dtype : {"float64", "float32", "bfloat16"}, optional
        The precision; by default the implementation's own ``dtype``, or float64.
    name : str, optional
        For the report.

    Returns
    -------
    Report
        Claims, habits and diagnoses.

    Raises
    ------
    CannotRun
        If it has no ``forward``, or declares a precision, an orientation or a kind that is not known.
    """
    title = str(name or getattr(implementation, "__name__", type(implementation).__name__))
    report = _check_kind(implementation, title, dtype, KINDS["linear"])
    for kind, other in dict(getattr(implementation, "kinds", {})).items():
        if kind not in KINDS:
            raise CannotRun(f"{title} has the kind {kind!r}; known are {', '.join(KINDS)}")
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, KINDS[kind])
    return report


def _check_kind(implementation: Any, name: str, dtype: str | None, formulas: Formulas) -> Report:
    """Check one object with functions for one kind of layer."""
    if not callable(getattr(implementation, "forward", None)):
        raise CannotRun(f"{name} has no function forward(x, weight, bias, lora_A, lora_B, alpha)")
    wanted = dtype or getattr(implementation, "dtype", "float64")
    try:
        dtype = check_choice(f"dtype of {name}", wanted, UNIT)
        check_choice(f"orientation of {name}", getattr(implementation, "orientation", "out, in"), ORIENTATIONS)
    except ValueError as error:
        raise CannotRun(str(error)) from None
    report = Report(name, dtype)
    trials = [Trial.draw(problem, dtype, formulas) for problem in PROBLEMS]
    watch = _Watch(implementation)
    found = [_answers(watch, trial) for trial in trials]
    if not any(found):
        raise CannotRun(f"{name}: {watch.raised['forward']}")

    offered = {key for answers in found for key in answers}
    wrong = {key for key in offered if not _all_agree(trials, found, key)}
    verdicts = {}
    for claim, (function, keys) in ANSWERS.items():
        texts = [_describe(trials, found, key) for key in keys if key in wrong]
        texts += [watch.raised[function]] if function in watch.raised else []
        verdicts[claim] = "; ".join(texts) or ("ok" if offered & set(keys) else "not offered")
    for claim, (function, judge) in JUDGES.items():
        verdicts[claim] = watch.judge(function, judge)
    verdicts["nothing is changed"] = watch.changed or "ok"
    report.claims = {claim: verdicts[claim] for claim in CLAIMS}
    report.habits = _habits(watch, trials[0])

    bugs = diagnose(trials, found, frozenset(wrong))
    told = {key for bug in bugs for key in bug.shows}
    report.diagnoses = [str(bug) for bug in bugs]
    report.diagnoses += [_describe(trials, found, key) for key in QUANTITIES if key in wrong - told]
    report.diagnoses += [watch.raised[function] for function, _ in ANSWERS.values() if function in watch.raised]
    rest = [verdicts[claim] for claim in (*JUDGES, "nothing is changed")]
    report.diagnoses += [verdict for verdict in rest if verdict not in ("ok", "not offered")]
    return report


class _Watch:
    """Calls an implementation's functions in its own orientation, and sees whether they change what they are handed."""

    def __init__(self, implementation: Any) -> None:
        self.functions, self.changed = implementation, ""
        self.raised: dict[str, str] = {}
        self.transposed = getattr(implementation, "orientation", "out, in") == "in, out"

    def offers(self, function: str) -> bool:
        return callable(getattr(self.functions, function, None))

    def turn(self, name: str, array: Any) -> Any:
        """Return a weight or a factor as it lies in the implementation, or one of its own as it lies here."""
        turned = self.transposed and name in ("weight", "lora_A", "lora_B", "merged") and np.ndim(array) == 2
        return np.ascontiguousarray(np.asarray(array).T) if turned else array

    def call(self, function: str, arrays: Mapping[str, Any]) -> Any:
        """Call a function with arguments in order, and note it where it changes one of them."""
        given = {name: self.turn(name, a.copy() if isinstance(a, np.ndarray) else a) for name, a in arrays.items()}
        before = {name: a.copy() for name, a in given.items() if isinstance(a, np.ndarray)}
        result = getattr(self.functions, function)(*given.values())
        for name, array in before.items():
            if not np.array_equal(given[name], array, equal_nan=True) and not self.changed:
                self.changed = f"{function} changes {name}, which belongs to the caller"
        return result

    def try_call(self, function: str, arrays: Mapping[str, Any], p: Problem) -> Any:
        """Return what a function gives, or None where it is not there or raises, which is noted."""
        if not self.offers(function):
            return None
        try:
            return self.call(function, arrays)
        except Exception as error:  # whatever a foreign function raises
            at = f"N={p.n} in={p.in_features} out={p.out_features} r={p.rank}, {'a' if p.bias else 'no'} bias"
            self.raised.setdefault(function, f"{function} raises {type(error).__name__}: {error} ({at})")
            return None

    def judge(self, function: str, judge: Callable[[_Watch], str]) -> str:
        """Return a judge's verdict on a function, where there is one and it does not raise."""
        if not self.offers(function):
            return "not offered"
        try:
            return judge(self)
        except Exception as error:  # whatever a foreign function raises
            return f"{function} raises {type(error).__name__}: {error}"


def _answers(watch: _Watch, trial: Trial) -> Arrays:
    """Return everything that an implementation offers for one problem, as it lies here."""
    p, problem = trial.arrays, trial.problem
    layer = {name: p.get(name) for name in ("weight", "bias", "lora_A", "lora_B")} | {"alpha": problem.alpha}
    found = {
        "y": watch.try_call("forward", {"x": p["x"], **layer}, problem),
        "merged": watch.try_call("merge", {name: a for name, a in layer.items() if name != "bias"}, problem),
        **(watch.try_call("backward", {"dy": p["dy"], "x": p["x"], **layer}, problem) or {}),
    }
    return {k: np.asarray(watch.turn(k, found[k])) for k in QUANTITIES if found.get(k) is not None}


def _all_agree(trials: list[Trial], found: list[Arrays], key: str) -> bool:
    return all(trial.agrees(key, answers[key]) for trial, answers in zip(trials, found, strict=True) if key in answers)


def _describe(trials: list[Trial], found: list[Arrays], key: str) -> str:
    """Say what is wrong with an answer on the first problem where it is."""
    trial, answers = next(
        (trial, answers)
        for trial, answers in zip(trials, found, strict=True)
        if key in answers and not trial.agrees(key, answers[key])
    )
    p = trial.problem
    at = f"N={p.n} in={p.in_features} out={p.out_features} r={p.rank} alpha={p.alpha:g}"
    if trial.unit < UNIT["float32"] and _all_agree_in_float32(trials, found, key):
        return f"{QUANTITIES[key]} is right to float32 only: it is computed, or kept, in single precision"
    return f"{QUANTITIES[key]} {describe_unknown(key, answers[key], trial.right[key])} ({at})"


def _all_agree_in_float32(trials: list[Trial], found: list[Arrays], key: str) -> bool:
    looser = UNIT["float32"] / UNIT["float64"]
    return all(t.agrees(key, a[key], looser=looser) for t, a in zip(trials, found, strict=True) if key in a)


def _start(watch: _Watch) -> str:
    """Check that a new adapter adds nothing, can learn, and has the spread of its input's width."""
    n_in, n_out, rank = 400, 30, 9
    given = {"in_features": n_in, "out_features": n_out, "rank": rank, "rng": np.random.default_rng(0)}
    start = dict(zip(("lora_A", "lora_B"), watch.call("init", given), strict=True))
    A, B = (np.asarray(watch.turn(name, factor)) for name, factor in start.items())
    for name, factor, shape in (("lora_A", A, (rank, n_in)), ("lora_B", B, (n_out, rank))):
        if factor.shape != shape:
            return f"{name} starts with shape {factor.shape}, expected {shape}"
    if not A.any() and not B.any():
        return "both factors start at zero: both gradients are zero, and nothing ever moves"
    if A.any() and B.any():
        return "neither factor starts at zero: the new adapter changes the output before the first step"
    spread, fan = float((A if A.any() else B).std()), n_in if A.any() else rank
    by_rank = spread * (3 * rank) ** 0.5  # 1 for a uniform start as PEFT's, sqrt(6) for he_uniform
    if A.any() and (0.8 < by_rank < 1.25 or 0.8 < by_rank / 6**0.5 < 1.25):
        return f"A's start has the spread of fan r = {rank}, not fan in = {n_in}: {spread:.3g} (made in catid/dora #1)"
    if A.any() and not 0.2 < spread * (3 * fan) ** 0.5 < 5:
        return f"A's start has the spread {spread:.3g}; PEFT's is 1 / sqrt(3 in) = {(3 * fan) ** -0.5:.3g}"
    return "ok"


ADAM_BUGS: Mapping[str, Callable[..., np.ndarray]] = {
    "Adam's eps stands inside the root": lambda m, v, t, g: (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t) + 1e-8),
    "Adam has no bias correction": lambda m, v, t, g: m / (np.sqrt(v) + 1e-8),
    "Adam corrects no bias of v": lambda m, v, t, g: m / (1 - 0.9**t) / (np.sqrt(v) + 1e-8),
    "Adam's eps is added before the correction": lambda m, v, t, g: (
        m / (1 - 0.9**t) / ((np.sqrt(v) + 1e-8) / np.sqrt(1 - 0.999**t))
    ),
    "Adam divides by v, not by its root": lambda m, v, t, g: (m / (1 - 0.9**t)) / (v / (1 - 0.999**t) + 1e-8),
    "the step is plain gradient descent": lambda m, v, t, g: g,
}
"""Known wrong steps, as functions of the means after step t, and of the gradient."""


def _adam(watch: _Watch) -> str:
    """Follow ten steps of Adam, at gradients so small that the place of eps shows."""
    rng = np.random.default_rng(0)
    start = {"lora_A": rng.standard_normal((2, 5)), "lora_B": rng.standard_normal((3, 2))}
    steps = [{name: 1e-7 * rng.standard_normal(p.shape) for name, p in start.items()} for _ in range(10)]
    params, state = {name: p.copy() for name, p in start.items()}, None
    for grads in steps:
        params, state = watch.functions.step(params, {name: g.copy() for name, g in grads.items()}, state)

    def follow(direction: Callable[..., np.ndarray]) -> Arrays:
        found = {}
        for name, p in start.items():
            theta, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
            for t, grads in enumerate(steps, start=1):
                m, v = 0.9 * m + 0.1 * grads[name], 0.999 * v + 0.001 * grads[name] ** 2
                theta = theta - 1e-3 * direction(m, v, t, grads[name])
            found[name] = theta
        return found

    def same(expected: Arrays) -> bool:
        return all(np.allclose(params[name], p, rtol=0, atol=1e-9) for name, p in expected.items())

    if same(follow(lambda m, v, t, g: (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8))):
        return "ok"
    named = [name for name, direction in ADAM_BUGS.items() if same(follow(direction))]
    return named[0] if named else "ten steps of Adam (lr 1e-3, betas 0.9 and 0.999, eps 1e-8) end elsewhere"


def _frozen(watch: _Watch) -> str:
    """Check that no gradient is given for the frozen base."""
    p = Trial.draw(PROBLEMS[0], "float64", KINDS["linear"]).arrays
    layer = {name: p[name] for name in ("dy", "x", "weight", "bias", "lora_A", "lora_B")}
    extra = sorted(set(watch.call("backward", {**layer, "alpha": 1.0})) & {"weight", "bias"})
    return f"backward returns gradients of the frozen {' and '.join(extra)}" if extra else "ok"


def _habits(watch: _Watch, trial: Trial) -> dict[str, str]:
    """Report what is good to know, and no reason to fail."""
    one, two = _answers(watch, trial), _answers(watch, trial)
    twice = all(np.array_equal(one[name], two[name], equal_nan=True) for name in one)
    fortran = Trial(trial.problem, {k: np.asfortranarray(a) for k, a in trial.arrays.items()}, *_rest(trial))
    try:
        moved = _answers(watch, fortran)
        order = "ok" if all(trial.agrees(k, moved[k], one[k].astype(np.float64)) for k in one) else "other numbers"
    except Exception as error:  # whatever a foreign function does with arrays that lie in another way
        order = f"Fortran order is refused ({type(error).__name__})"
    kept = sorted({str(a.dtype) for a in one.values()} - {str(trial.arrays["x"].dtype)})
    return {
        "same bits twice": "ok" if twice else "two calls differ",
        "memory order": order,
        "dtype kept": f"{', '.join(kept)} is returned for {trial.arrays['x'].dtype}" if kept else "ok",
    }


def _rest(trial: Trial) -> tuple[Arrays, Arrays, float, Formulas]:
    return trial.right, trial.sizes, trial.unit, trial.formulas


ANSWERS = {"forward": ("forward", ("y",)), "slope": ("backward", ("x", *FACTORS)), "merge": ("merge", ("merged",))}
"""The function that each claim about numbers is about, and its answers."""
JUDGES = {"start": ("init", _start), "adam": ("step", _adam), "frozen base": ("backward", _frozen)}
"""The function that each other claim is about, and who judges it."""


def save_json(report: Report, path: str) -> None:
    """Write a report as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(report.as_dict(), file, indent=2)
        file.write("\n")
