"""`check`: hold an implementation of LoRA against the formulas.

It calls every function on every problem (`calling`), compares the numbers (`comparing`), asks for what is no number
(`claims`), and puts all of it into a `Report`. `contract` says what an implementation is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from ...report import CannotRun, Diagnosis
from ...texts import enumerated
from ..naming import off
from ..problems.formulas import QUANTITIES, Formulas
from ..problems.kind import FACTORS, Kind
from ..problems.kinds import KINDS
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import TINY, UNIT, Trial, drawn
from .calling import Watch, forward, reply_to, suited
from .claims import diagnosed, habits, judge_claims
from .comparing import Answered, flagged, judge_numbers
from .contract import ORIENTATIONS, declared_dtype, formulas_of, further_kinds
from .in_common import in_common
from .kindreport import KindReport, id_of, outcome

CHANGED = "nothing is changed"
"""The claim that is told first where it fails: what is changed may be what makes other answers wrong."""


def check(implementation: Any, *, dtype: str | None = None, name: str | None = None) -> KindReport:
    """Hold an implementation of LoRA against the formulas.

    Parameters
    ----------
    implementation : module or object
        With the functions that `minilora.conformance.checking.contract` lists. What it lacks is not offered, and never
        failed.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        The precision; by default the implementation's own ``dtype``. Where it has none, float64, or the precision in
        which it answers to float64 where its output is not right in float64.
    name : str, optional
        For the report.

    Returns
    -------
    KindReport
        Claims, habits and diagnoses.

    Raises
    ------
    CannotRun
        If it has no ``forward``, or declares a precision, an orientation, a scaling or a kind that is not known.
    """
    title = str(name or getattr(implementation, "__name__", type(implementation).__name__))
    kinds = further_kinds(implementation, title)
    report = _check_kind(implementation, title, dtype, KINDS["linear"])
    for kind, other in kinds.items():
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, KINDS[kind])
    return report


def _check_kind(implementation: Any, name: str, dtype: str | None, kind: Kind) -> KindReport:
    """Check one object with functions for one kind of layer."""
    if not any(callable(getattr(implementation, function, None)) for function in kind.needed):
        raise CannotRun(f"{name} has {kind.missing_functions}")
    if isinstance(implementation, type) and _takes_self(getattr(implementation, kind.needed[0], None)):
        raise CannotRun(f"{name} is a class, hand over an object: {implementation.__name__}(...)")
    wanted, kind = declared_dtype(kind, implementation, name, dtype), kind.of(implementation)
    formulas, watch = formulas_of(kind, implementation), Watch(implementation, kind)
    problems = [suited(problem, watch) for problem in kind.problems]
    report = _judge(watch, name, wanted or "float64", formulas, problems)
    answered = report.habits["dtype kept"].partition(" ")[0]
    if wanted is None and answered in UNIT and report.claims.get("forward") != "ok":  # an output in float64 settles it
        return _judge(Watch(implementation, kind), name, answered, formulas, problems)
    return report


def _takes_self(function: Any) -> bool:
    try:
        return [*signature(function).parameters][:1] == ["self"]
    except (TypeError, ValueError):  # of a compiled function nothing is known
        return False


def _judge(watch: Watch, name: str, dtype: str, formulas: Formulas, problems: Sequence[Problem]) -> KindReport:
    """Let an implementation answer every problem, and judge the answers."""
    trials = [drawn(problem, dtype, formulas) for problem in problems]
    replies = [reply_to(watch, trial) for trial in trials]
    if not any(replies):
        first = next(iter(watch.failed))
        raise CannotRun(f"{name}: {first} {watch.said(first)}{_instead(watch, trials[0], dtype)}")
    between = drawn(replace(problems[0], seed=1 + problems[0].seed), dtype, formulas)
    again = reply_to(watch, trials[0], between)

    pairs = list(zip(trials, replies, strict=True))
    given = [reply | _owed(watch, trial, reply) for trial, reply in pairs]
    lacking = partial(_lacking, watch)
    names = [f"{watch.kind.declared}-{number}" for number in range(len(trials))]
    numbers = judge_numbers(Answered(watch.kind, names, trials, given, lacking, watch.failed))
    raised = _raised(watch, problems)
    minds = _changes_of_mind(watch, trials[0], replies[0], again)
    # Of the first problem alone: what changes, and a function that raised for the one in between and no other.
    of_first = minds | {claim: text for claim, text in raised.items()
                        if watch.failed[watch.kind.answers[claim][0]].keys().isdisjoint(problems)}  # fmt: skip
    wrong_again = {key for claim in of_first for key in watch.kind.answers[claim][1]}
    right = {key for key in replies[0] if key not in wrong_again
             and all(trial.agrees(key, reply[key]) for trial, reply in pairs if key in reply)}  # fmt: skip
    others = judge_claims(watch, trials[0], dtype, right)

    about, verdicts = str(problems[0]), {claim: str(said) for claim, said in others.items()}
    cases = [outcome(case.id, case.claim, about, of_first[case.claim])
             if case.problem == about and case.claim in of_first else case for case in numbers.cases]  # fmt: skip
    cases += [outcome(id_of(watch.kind.declared, claim), claim, "", text) for claim, text in verdicts.items()]

    def told(said: Mapping[str, Any]) -> list[Diagnosis]:
        """Return what is wrong with claims, each with the cases that fail; nothing for one that holds."""
        failing = {claim: tuple(case.id for case in cases if case.failed and case.claim == claim) for claim in said}
        return [replace(diagnosed(said[claim]), cases=ids) for claim, ids in failing.items() if ids]

    once = {claim: text for claim, text in raised.items() if claim == "forward" or not _as_the_forward(watch, claim)}
    changed = {CHANGED: others.pop(CHANGED)}
    found = [*told(changed | minds), *numbers.found, *told(once | others)]
    claims = {**numbers.claims, **raised, **of_first, **verdicts}
    return KindReport(
        name,
        cases=flagged(cases, found),
        found=found,
        kind=watch.kind.declared,
        dtype=dtype,
        claims={claim: claims[claim] for claim in watch.kind.claims},
        habits=habits(watch, trials[0], replies[0]),
        errors=numbers.errors,
        functions={function: watch.offers(function) for function in watch.kind.functions},
    )


def _owed(watch: Watch, trial: Trial, reply: Arrays) -> dict[str, None]:
    """Return the gradients that a backward owes and did not return. It may leave out dx: a first layer needs none."""
    if not watch.offers("backward") or trial.problem in watch.failed.get("backward", {}):
        return {}
    return dict.fromkeys(key for key in FACTORS if key in trial.right and key not in reply)


def _lacking(watch: Watch, missing: Sequence[str]) -> str:
    """Say what a backward never returns."""
    got = f"it returns those of {', '.join(watch.returned)}" if watch.returned else "it returns none"
    return f"backward returns no gradient of {enumerated(missing)}; {got}"


def _raised(watch: Watch, problems: Sequence[Problem]) -> dict[str, str]:
    """Return what functions said that raise, or return no answer, by their claims."""
    texts = {}
    for claim, (function, _) in watch.kind.answers.items():
        if function in watch.failed:
            when = in_common(list(watch.failed[function]), problems)
            texts[claim] = f"{function}{f', {when},' if when else ''} {watch.said(function)}"
    return texts


def _as_the_forward(watch: Watch, claim: str) -> bool:
    """Return whether a function raised what the forward did."""
    own, of_forward = (watch.failed.get(function, {}) for function in (watch.kind.answers[claim][0], "forward"))
    return [*own.items()][:1] == [*of_forward.items()][:1]


def _changes_of_mind(watch: Watch, trial: Trial, first: Arrays, again: Arrays) -> dict[str, str]:
    """Say where the same arguments give other numbers the second time, by more than two orders of summation may."""
    minds: dict[str, str] = {}
    for claim, (_, keys) in watch.kind.answers.items():
        for key in keys:
            if key not in first or key not in again or first[key].shape != trial.right[key].shape:
                continue
            if _as_before(trial, key, first[key].astype(np.float64), again[key]):
                continue
            if trial.agrees(key, first[key]):
                text = "another one the second time it is asked for: something is kept between calls"
                minds.setdefault(claim, f"{QUANTITIES[key]} is {text}")
            elif np.isfinite(first[key]).all():
                text = "another one at each call with the same arguments: is dropout on?"
                minds.setdefault(claim, f"{QUANTITIES[key]} is {text}")
    return minds


def _as_before(trial: Trial, key: str, first: np.ndarray, again: np.ndarray) -> bool:
    """Return whether two answers are the same up to the rounding of both. A wrong one may be larger than the right."""
    times = np.abs(first).max(initial=0.0) / np.abs(trial.right[key]).max(initial=TINY)
    sizes = np.maximum(trial.sizes[key] * max(1.0, times), np.abs(first))
    return off(again, first, 2 * trial.allowed(sizes)) <= 1


def _instead(watch: Watch, trial: Trial, dtype: str) -> str:
    """Say what to declare where a forward that raises would answer in another precision or orientation."""
    for turned in (False, True) if watch.offers("forward") else ():
        for other in dict.fromkeys((dtype, "float32")):
            quiet = Watch(watch.functions, watch.kind)
            quiet.transposed = watch.transposed is not turned
            y = forward(quiet, drawn(trial.problem, other, trial.formulas))
            if np.shape(y) == trial.right["y"].shape:
                instead = [f'dtype = "{other}"'] if other != dtype else []
                instead += [f'orientation = "{ORIENTATIONS[quiet.transposed]}"'] if turned else []
                return f"; it answers with {enumerated(instead)}"
    return ""
