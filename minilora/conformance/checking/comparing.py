"""Compare the answers to a kind's problems with the right ones, for an outcome per claim and problem.

A claim's verdict is its first failed outcome, with what the failing problems have in common. Mistakes are named from
all problems together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...report import Diagnosis
from ...texts import enumerated
from ..naming import name
from ..problems.formulas import QUANTITIES
from ..problems.kind import Kind
from ..problems.problem import Problem
from ..problems.tolerance import TOLERANCE, UNIT, Trial
from .describing import EVERY_ENTRY, SINGLE, describe_wrong, is_single, wrong_array
from .in_common import in_common
from .kindreport import CANNOT_BE_TOLD, NOT_OFFERED, ClaimOutcome, id_of, outcome
from .suite import SENTENCE_NAMES, Factors, in_digits_that_differ, measured_scalings, scaling_of, suite_of

Reply = Mapping[str, Any]
"""The answers to a problem; None for a gradient that should have been returned and was not."""
Failed = Mapping[str, Mapping[Problem, str]]
"""The messages of functions that failed, by function and problem."""


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the answers to a kind's problems."""

    cases: list[ClaimOutcome]
    claims: dict[str, str]  # the verdicts on the claims that are judged on each problem
    found: list[Diagnosis]  # what is wrong, the likeliest first
    errors: dict[str, float]  # each answer's largest error, relative to its largest entry


@dataclass(frozen=True)
class Answered:
    """The problems of a kind, with the answers to each."""

    kind: Kind
    names: Sequence[str]  # the problems' names in ids, such as "linear-0"
    trials: Sequence[Trial]
    given: Sequence[Reply]
    lacking: Callable[[Sequence[str]], str]  # the message about gradients that are missing on every problem
    failed: Failed = field(default_factory=dict)

    @property
    def pairs(self) -> list[tuple[Trial, Reply]]:
        """Each problem with the answers to it."""
        return list(zip(self.trials, self.given, strict=True))


def judge_numbers(asked: Answered) -> Comparison:
    """Compare the answers to all problems with the right ones."""
    factors, claims = measured_scalings(asked.trials, asked.given), asked.kind.claims_per_problem
    verdicts = {claim: [_verdict(asked, claim, trial, reply, factors) for trial, reply in asked.pairs]
                for claim in claims}  # fmt: skip
    cases = [outcome(id_of(asked.names[i], claim), claim, str(trial.problem), verdicts[claim][i])
             for i, trial in enumerate(asked.trials) for claim in claims]  # fmt: skip
    of_all = {claim: _overall(verdicts[claim], [trial.problem for trial in asked.trials]) for claim in claims}
    given = {key: [(reply[key], trial.right[key]) for trial, reply in asked.pairs if reply.get(key) is not None]
             for key in QUANTITIES}  # fmt: skip
    errors = {key: max(_error(*pair) for pair in pairs) for key, pairs in given.items() if pairs}
    failing = {case.id for case in cases if case.failed}
    return Comparison(cases, of_all, list(_diagnoses(asked, failing)), errors)


def _verdict(asked: Answered, claim: str, trial: Trial, reply: Reply, factors: Factors) -> str:
    """Return the verdict on a claim about one problem."""
    if claim == "scaling":
        return _scaling(trial, reply, factors)
    function, keys = asked.kind.answers[claim]
    if text := asked.failed.get(function, {}).get(trial.problem):
        return f"{function} {text}"
    wrong = [key for key in keys if reply.get(key) is not None and not trial.agrees(key, reply[key])]
    texts = [f"{QUANTITIES[key]} {wrong_array(key, reply[key], trial)}" for key in wrong]
    if missing := [key for key in keys if reply.get(key, ...) is None]:
        texts.append(f"there is no gradient of {enumerated(missing)}")
    return "; ".join(texts) or ("ok" if {*keys} & reply.keys() else NOT_OFFERED)


def _scaling(trial: Trial, reply: Reply, factors: Factors) -> str:
    """Compare the scaling of the update, as measured in an output, with the declared one."""
    if reply.get("y") is None:
        return NOT_OFFERED
    if trial.agrees("y", reply["y"]):
        return "ok"
    measured, declared = factors.get(trial.problem), scaling_of(trial)
    if measured is None:
        single = trial.distance("y", reply["y"]) * trial.unit <= TOLERANCE * UNIT["float32"]
        return "ok" if single else CANNOT_BE_TOLD
    if not measured.differs_from(declared):
        return "ok"
    got, expected = in_digits_that_differ(measured.value, declared)
    return f"the update is multiplied by {got}, expected {expected}"


def _overall(verdicts: Sequence[str], problems: Sequence[Problem]) -> str:
    """Combine the verdicts on a claim about each problem into one."""
    bad = [i for i, verdict in enumerate(verdicts) if verdict not in ("ok", NOT_OFFERED, CANNOT_BE_TOLD)]
    if not bad:
        return next((word for word in (CANNOT_BE_TOLD, "ok") if word in verdicts), NOT_OFFERED)
    offered = [problem for verdict, problem in zip(verdicts, problems, strict=True) if verdict != NOT_OFFERED]
    when = in_common([problems[i] for i in bad], offered)
    return f"{verdicts[bad[0]]} ({problems[bad[0]]}{f'; {when}' if when else ''})"


def _diagnoses(asked: Answered, failing: set[str]) -> Iterable[Diagnosis]:
    """Yield a diagnosis for each known mistake, and then for each wrong answer that none of them explains."""

    def about(keys: Iterable[str], numbers: Iterable[int]) -> tuple[str, ...]:
        """Return the ids of the failing cases about these answers to these problems."""
        by = {claim: names for claim, (_, names) in asked.kind.answers.items()} | {"scaling": ("y",)}
        claims = [claim for claim in asked.kind.claims_per_problem if {*by[claim]} & {*keys}]
        ids = (id_of(asked.names[i], claim) for i in numbers for claim in claims)
        return tuple(id for id in ids if id in failing)

    wrong, named = name(suite_of(asked.kind.name, tuple(asked.trials)), asked.given)
    for one in named:
        yield Diagnosis(one.says, one.flag, one.source, about(one.explains, one.cases))
    rest = [key for key in QUANTITIES if key in wrong.difference(*(one.explains for one in named))]
    answered = {key: [(trial, reply[key]) for trial, reply in asked.pairs if key in reply] for key in rest}
    owed = {key: [array is None for _, array in answered[key]] for key in rest}
    missing = [key for key in rest if all(owed[key])]
    single = [key for key in rest if not any(owed[key]) and is_single(key, answered[key])]
    texts = [([key], _at_times(key, answered[key]) if any(owed[key]) else describe_wrong(key, answered[key]))
             for key in rest if key not in (*single, *missing)]  # fmt: skip
    texts.sort(key=lambda one: EVERY_ENTRY not in one[1])  # a factor is the most useful clue
    if single:
        texts.insert(0, (single, f"{enumerated([SENTENCE_NAMES[key] for key in single])}: {SINGLE}"))
    if missing:
        texts.append((missing, asked.lacking(missing)))
    for keys, text in texts:
        yield Diagnosis(text, cases=about(keys, range(len(asked.trials))))


def _at_times(key: str, answered: Sequence[tuple[Trial, Any]]) -> str:
    """Say on which problems the backward does not return a gradient that it returns on others."""
    where = [trial.problem for trial, array in answered if array is None]
    when = in_common(where, [trial.problem for trial, _ in answered])
    return f"backward returns no gradient of {key}{f', {when},' if when else ''} ({where[0]})"


def flagged(cases: Sequence[ClaimOutcome], found: Sequence[Diagnosis]) -> list[ClaimOutcome]:
    """Add to each outcome the flags of the known mistakes that explain it."""
    return [replace(case, flags=tuple(d.flag for d in found if d.flag and case.id in d.cases)) for case in cases]


def _error(array: np.ndarray, right: np.ndarray) -> float:
    if np.shape(array) != np.shape(right) or not np.isfinite(array).all():
        return float("inf")
    error = np.abs(np.asarray(array, np.float64) - right).max(initial=0.0)
    return float(error / max(np.abs(right).max(initial=0.0), np.finfo(float).tiny)) if error else 0.0
