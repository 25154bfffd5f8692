"""`check`: check an implementation of LoRA against the formulas.

It calls every function on every problem (`calling`), compares the numbers (`comparing`), checks the claims that are not
about numbers (`claims`), and collects the results in a `Report`. `contract` defines what an implementation is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
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
from .calling import Watch, forward, reply_to, restricted
from .claims import diagnosed, habits, judge_claims
from .comparing import Answered, flagged, judge_numbers
from .contract import ORIENTATIONS, declared_dtype, formulas_of, further_kinds
from .in_common import in_common
from .kindreport import KindReport, id_of, outcome

CHANGED = "nothing is changed"
"""The claim that is reported first if it fails: a modified argument may be the cause of other wrong answers."""


def check(implementation: Any, *, dtype: str | None = None, name: str | None = None) -> KindReport:
    """Check an implementation of LoRA against the formulas.

    Parameters
    ----------
    implementation : module or object
        Has the functions that `minilora.conformance.checking.contract` lists. A missing function is reported as not
        offered, never as failed.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        The precision to check in. The default is the implementation's own ``dtype``. If it declares none, the default
        is float64; if its output is wrong in float64, it is the dtype in which it answers float64 inputs.
    name : str, optional
        The implementation's name in the report.

    Returns
    -------
    KindReport
        The claims, habits and diagnoses.

    Raises
    ------
    CannotRun
        If there is no ``forward``, or a declared precision, orientation, scaling or kind is unknown.
    """
    title = str(name or getattr(implementation, "__name__", type(implementation).__name__))
    kinds = further_kinds(implementation, title)
    report = _check_kind(implementation, title, dtype, KINDS["linear"])
    for kind, other in kinds.items():
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, KINDS[kind])
    return report


def _check_kind(implementation: Any, name: str, dtype: str | None, kind: Kind) -> KindReport:
    """Check an object's functions for one kind of layer."""
    if not any(callable(getattr(implementation, function, None)) for function in kind.needed):
        raise CannotRun(f"{name} has {kind.missing_functions}{_elsewhere(implementation, kind.needed[0])}")
    if isinstance(implementation, type) and _takes_self(getattr(implementation, kind.needed[0], None)):
        raise CannotRun(f"{name} is a class; pass an instance of it: {implementation.__name__}(...)")
    wanted, kind = declared_dtype(kind, implementation, name, dtype), kind.of(implementation)
    formulas, watch = formulas_of(kind, implementation), Watch(implementation, kind)
    problems = [restricted(problem, watch) for problem in kind.problems]
    report = _judge(watch, name, wanted or "float64", formulas, problems)
    answered = report.habits["dtype kept"].partition(" ")[0]
    if wanted is None and answered in UNIT and report.claims.get("forward") != "ok":  # a float64 output means float64
        return _judge(Watch(implementation, kind), name, answered, formulas, problems)
    return report


def _elsewhere(implementation: Any, function: str) -> str:
    """Suggest an object in a module that has the function, or the file that adapts a layer of torch."""
    for name, value in vars(implementation).items() if isinstance(implementation, ModuleType) else ():
        if any(cls.__module__.startswith("torch.nn.") for cls in getattr(value, "__mro__", type(value).__mro__)):
            return f"; {name} is a layer of torch, which functions in the file of `conformance --start torch` can call"
        if callable(getattr(value, function, None)) and not (name[0] == "_" or isinstance(value, (type, ModuleType))):
            return f"; its object {name} has: check {Path(implementation.__file__ or '').name}:{name}"
    return ""


def _takes_self(function: Any) -> bool:
    try:
        return [*signature(function).parameters][:1] == ["self"]
    except (TypeError, ValueError):  # a compiled function has no signature
        return False


def _judge(watch: Watch, name: str, dtype: str, formulas: Formulas, problems: Sequence[Problem]) -> KindReport:
    """Call an implementation on every problem, and judge its answers."""
    trials = [drawn(problem, dtype, formulas) for problem in problems]
    replies = [reply_to(watch, trial) for trial in trials]
    if not any(replies):
        first = next(iter(watch.failed))
        raise CannotRun(f"{name}: {first} {watch.first_failure(first)}{_suggestion(watch, trials[0], dtype)}")
    between = drawn(replace(problems[0], seed=1 + problems[0].seed), dtype, formulas)
    again = reply_to(watch, trials[0], between)

    pairs = list(zip(trials, replies, strict=True))
    given = [reply | _missing(watch, trial, reply) for trial, reply in pairs]
    lacking = partial(_say_missing, watch)
    names = [f"{watch.kind.declared}-{number}" for number in range(len(trials))]
    numbers = judge_numbers(Answered(watch.kind, names, trials, given, lacking, watch.failed))
    failures = _failures(watch, problems)
    unstable = _unstable(watch, trials[0], replies[0], again)
    # About the first problem only: answers that change, and functions that raised on no problem but the one in between.
    of_first = unstable | {claim: text for claim, text in failures.items()
                           if watch.failed[watch.kind.answers[claim][0]].keys().isdisjoint(problems)}  # fmt: skip
    wrong_again = {key for claim in of_first for key in watch.kind.answers[claim][1]}
    right = {key for key in replies[0] if key not in wrong_again
             and all(trial.agrees(key, reply[key]) for trial, reply in pairs if key in reply)}  # fmt: skip
    others = judge_claims(watch, trials[0], dtype, right)

    about, verdicts = str(problems[0]), {claim: str(said) for claim, said in others.items()}
    cases = [outcome(case.id, case.claim, about, of_first[case.claim])
             if case.problem == about and case.claim in of_first else case for case in numbers.cases]  # fmt: skip
    cases += [outcome(id_of(watch.kind.declared, claim), claim, "", text) for claim, text in verdicts.items()]

    def diagnoses(said: Mapping[str, Any]) -> list[Diagnosis]:
        """Return a diagnosis for each claim that fails, with its failing cases."""
        failing = {claim: tuple(case.id for case in cases if case.failed and case.claim == claim) for claim in said}
        return [replace(diagnosed(said[claim]), cases=ids) for claim, ids in failing.items() if ids]

    once = {claim: text for claim, text in failures.items() if claim == "forward" or not _same_failure(watch, claim)}
    changed = {CHANGED: others.pop(CHANGED)}
    found = [*diagnoses(changed | unstable), *numbers.found, *diagnoses(once | others)]
    claims = {**numbers.claims, **failures, **of_first, **verdicts}
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


def _missing(watch: Watch, trial: Trial, reply: Arrays) -> dict[str, None]:
    """Return the gradients that the backward must return and did not. It may omit dx: a first layer needs none."""
    if not watch.offers("backward") or trial.problem in watch.failed.get("backward", {}):
        return {}
    return dict.fromkeys(key for key in FACTORS if key in trial.right and key not in reply)


def _say_missing(watch: Watch, missing: Sequence[str]) -> str:
    """Describe the gradients that the backward never returns."""
    got = f"it returns those of {', '.join(watch.returned)}" if watch.returned else "it returns none"
    return f"backward returns no gradient of {enumerated(missing)}; {got}"


def _failures(watch: Watch, problems: Sequence[Problem]) -> dict[str, str]:
    """Return, by claim, the messages of functions that raised or returned no answer."""
    texts = {}
    for claim, (function, _) in watch.kind.answers.items():
        if function in watch.failed:
            when = in_common(list(watch.failed[function]), problems)
            texts[claim] = f"{function}{f', {when},' if when else ''} {watch.first_failure(function)}"
    return texts


def _same_failure(watch: Watch, claim: str) -> bool:
    """Return whether a claim's function first failed on the same problem and with the same message as the forward."""
    own, of_forward = (watch.failed.get(function, {}) for function in (watch.kind.answers[claim][0], "forward"))
    return [*own.items()][:1] == [*of_forward.items()][:1]


def _unstable(watch: Watch, trial: Trial, first: Arrays, again: Arrays) -> dict[str, str]:
    """Return, by claim, which answers differ on a second call by more than a different order of summation explains."""
    unstable: dict[str, str] = {}
    for claim, (_, keys) in watch.kind.answers.items():
        for key in keys:
            if key not in first or key not in again or first[key].shape != trial.right[key].shape:
                continue
            if _is_same(trial, key, first[key].astype(np.float64), again[key]):
                continue
            if trial.agrees(key, first[key]):
                text = "changes on a second call with the same arguments: something is kept between calls"
                unstable.setdefault(claim, f"{QUANTITIES[key]} {text}")
            elif np.isfinite(first[key]).all():
                text = "changes on every call with the same arguments: is dropout on?"
                unstable.setdefault(claim, f"{QUANTITIES[key]} {text}")
    return unstable


def _is_same(trial: Trial, key: str, first: np.ndarray, again: np.ndarray) -> bool:
    """Return whether two answers agree up to rounding. The tolerance grows with a wrong answer that is too large."""
    times = np.abs(first).max(initial=0.0) / np.abs(trial.right[key]).max(initial=TINY)
    sizes = np.maximum(trial.sizes[key] * max(1.0, times), np.abs(first))
    return off(again, first, 2 * trial.allowed(sizes)) <= 1


def _suggestion(watch: Watch, trial: Trial, dtype: str) -> str:
    """Suggest the declaration with which a forward that raises would answer: a precision or an orientation."""
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
