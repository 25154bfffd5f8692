"""`check`: hold an implementation of LoRA against the formulas.

It calls every function on every problem (`calling`), compares the numbers (`comparing`), asks for what is no number
(`behaviour`, `edges`, and what a kind of layers has besides), and puts all of it into a `Report`. `contract` says what
an implementation is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np

from ...checks import check_choice
from ..bugs.diagnoses import listed
from ..problems.formulas import SCALINGS, Formulas
from ..problems.kind import FACTORS
from ..problems.kinds import KINDS
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import UNIT, Trial, drawn
from ..report import CannotRun, Diagnosis
from .calling import Watch, forward, reply_to, spelled, suited
from .claims import habits, judge_claims
from .comparing import all_agree, changes_its_mind, judge_numbers, left_out_on_some, outcomes_of, placed
from .contract import ANSWERS, ORIENTATIONS, OUTPUTS, SUMS, contract, formulas_of, functions_of, further_kinds
from .in_common import in_common
from .kindreport import NOT_FAILED, ClaimOutcome, KindReport, id_of, outcome


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
    report = _check_kind(implementation, title, dtype, "linear")
    for kind, other in kinds.items():
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, kind)
    return report


def _check_kind(implementation: Any, name: str, dtype: str | None, kind: str) -> KindReport:
    """Check one object with functions for one kind of layer."""
    if kind == "combine":
        if not any(callable(getattr(implementation, name, None)) for name in SUMS):
            raise CannotRun(f"{name} has none of the functions {', '.join(SUMS)}")
    elif not callable(getattr(implementation, "forward", None)):
        raise CannotRun(f"{name} has no function forward(x, weight, bias, lora_A, lora_B, alpha)")
    if isinstance(implementation, type) and _takes_self(getattr(implementation, "forward")):  # noqa: B009
        raise CannotRun(f"{name} is a class, hand over an object: {implementation.__name__}(...)")
    wanted = spelled(dtype or getattr(implementation, "dtype", None), tuple(UNIT))
    if kind == "mixed" or (kind == "nf4" and wanted in (None, "float64")):
        wanted = "float32"  # that of the factors; of a weight in four bits, in which a product is taken
    declared = {
        "dtype": (wanted or "float64", tuple(UNIT)),
        "orientation": (getattr(implementation, "orientation", "out, in"), ORIENTATIONS),
        "scaling": (getattr(implementation, "scaling", "alpha / r"), tuple(SCALINGS)),
        "output": (getattr(implementation, "output", "bfloat16") if kind == "mixed" else "bfloat16", OUTPUTS),
    }
    for what, (value, choices) in declared.items():
        try:
            check_choice(f"{what} of {name}", spelled(value, choices), choices)
        except ValueError as error:
            raise CannotRun(str(error)) from None
    if kind == "fused" and getattr(implementation, "slots", None) not in (None, 2, 3):
        raise CannotRun(f"slots of {name} must be 2 or 3, got {implementation.slots!r}")
    if getattr(implementation, "fan_in_fan_out", None) not in (None, False, True):
        raise CannotRun(f"fan_in_fan_out of {name} must be True or False, got {implementation.fan_in_fan_out!r}")
    full = kind == "dora" and not getattr(implementation, "detached_norm", True)
    kind_of_problems = "dora-full" if full else kind
    formulas, watch = formulas_of(kind_of_problems, implementation), Watch(implementation, kind)
    problems = [suited(problem, watch) for problem in KINDS[kind_of_problems].problems]
    report = _judge(watch, name, wanted or "float64", kind_of_problems, formulas, problems)
    answered = report.habits["dtype kept"].partition(" ")[0]
    if wanted is None and answered in UNIT and report.claims.get("forward") != "ok":  # an output in float64 settles it
        return _judge(Watch(implementation, kind), name, answered, kind_of_problems, formulas, problems)
    return report


def _takes_self(function: Callable[..., Any]) -> bool:
    try:
        return next(iter(signature(function).parameters), "") == "self"
    except (TypeError, ValueError):  # of a compiled function nothing is known
        return False


def _judge(
    watch: Watch, name: str, dtype: str, kind: str, formulas: Formulas, problems: Sequence[Problem]
) -> KindReport:
    """Let an implementation answer every problem, and judge the answers."""
    trials = [drawn(problem, dtype, formulas) for problem in problems]
    replies = [reply_to(watch, trial) for trial in trials]
    if not any(replies):
        first = next(iter(watch.raised))
        raise CannotRun(f"{name}: {first} {watch.said(first)}{_instead(watch, trials[0], dtype)}")
    between = drawn(replace(problems[0], seed=1 + problems[0].seed), dtype, formulas)
    again = reply_to(watch, trials[0], between)

    report = KindReport(
        name, kind=watch.kind, dtype=dtype, functions={f: watch.offers(f) for f in functions_of(watch.kind)}
    )
    factors = judge_numbers(report, kind, trials, replies, _lacking(watch))
    of_first = _judge_calls(report, watch, trials, replies, again)
    wrong_again = {key for claim in of_first for key in ANSWERS[claim][1]}
    right = {key for key in replies[0] if key not in wrong_again and all_agree(trials, replies, key)}
    verdicts = judge_claims(watch, trials[0], dtype, right)

    texts = [Diagnosis(verdict, cases=(claim,)) for claim, verdict in verdicts.items()
             if verdict not in NOT_FAILED and verdict != watch.changed]  # fmt: skip
    changed = [Diagnosis(watch.changed, cases=("nothing is changed",))] if watch.changed else []
    report.found = [*changed, *report.found, *texts]
    report.claims |= verdicts
    report.claims = {claim: report.claims[claim] for claim in contract(watch.kind)}
    report.cases = _cases(watch, trials, replies, factors, of_first, verdicts)
    report.habits = habits(watch, trials[0], replies[0])
    return placed(report)


def _lacking(watch: Watch) -> Callable[[Sequence[str]], str] | None:
    """Return what is said of gradients that the backward never returns; None where there is no backward."""
    returned = watch.returned
    if returned is None:
        return None
    got = f"it returns those of {', '.join(returned)}" if returned else "it returns none"
    return lambda missing: f"backward returns no gradient of {listed(missing)}; {got}"


def _judge_calls(
    report: KindReport, watch: Watch, trials: Sequence[Trial], replies: Sequence[Arrays], again: Arrays
) -> dict[str, str]:
    """Put into the report what functions do otherwise than give wrong numbers: raise, change their mind, leave out.

    Returns
    -------
    dict
        Verdicts that are about the first problem alone, by their claims.
    """
    problems, of_first = [trial.problem for trial in trials], {}
    for claim, (function, _) in ANSWERS.items():
        if function in watch.raised:
            when = in_common(list(watch.failed[function]), problems)
            report.claims[claim] = f"{function}{when} {watch.said(function)}"
            if function == "forward" or watch.raised[function] != watch.raised.get("forward"):
                report.found.append(Diagnosis(report.claims[claim], cases=(claim,)))
            if not any(problem in watch.failed[function] for problem in problems):  # on the one in between
                of_first[claim] = report.claims[claim]
        elif text := changes_its_mind(trials[0], replies[0], again, claim):
            report.claims[claim] = of_first[claim] = text
            report.found.insert(0, Diagnosis(text, cases=(claim,)))
        elif claim == "slope" and report.claims.get(claim) == "ok" and (text := left_out_on_some(trials, replies)):
            report.claims[claim] = text
            report.found.append(Diagnosis(text, cases=(claim,)))
    return of_first


def _cases(
    watch: Watch,
    trials: Sequence[Trial],
    replies: Sequence[Arrays],
    factors: Mapping[Problem, Any],
    of_first: Mapping[str, str],
    verdicts: Mapping[str, str],
) -> list[ClaimOutcome]:
    """Return the outcome of each claim about each problem, then of the claims that are about no single one."""
    owed = FACTORS if watch.offers("backward") else ()
    numbers = [outcomes_of(watch.kind, number, trial, reply, factors, owed, watch)
               for number, (trial, reply) in enumerate(zip(trials, replies, strict=True))]  # fmt: skip
    numbers[0] = [outcome(case.id, case.claim, case.problem, of_first.get(case.claim, case.verdict))
                  for case in numbers[0]]  # fmt: skip
    others = [outcome(id_of(watch.kind, claim), claim, "", verdict) for claim, verdict in verdicts.items()
              if claim in contract(watch.kind)]  # fmt: skip
    return [*(case for cases in numbers for case in cases), *others]


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
                return f"; it answers with {listed(instead)}"
    return ""
