"""What the suite found of a kind of layers: a verdict on each claim, and an outcome for each claim and problem.

An outcome's id is ``KIND-NUMBER-CLAIM``, such as ``conv2d-2-slope``; of a claim that is about no single problem
``KIND-CLAIM``, such as ``linear-start``. Ids stay: a problem keeps its number, and new ones come after the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...report import KNOWN, PASSED, WRONG, Diagnosis, Outcome, Report

REFUSED = "refused"
"""Of what stands at the edge of the contract: it raises, or answers in another shape."""
NOT_OFFERED = "not offered"
CANNOT_BE_TOLD = "cannot be told: the output is wrong in another way"
"""Of the scaling: the claim "forward" fails there."""
ANSWERED = "cases answered"
"""A habit of files: how many of the problems they answer."""
STATES = {"ok": "right", CANNOT_BE_TOLD: "cannot be told", NOT_OFFERED: NOT_OFFERED, REFUSED: REFUSED}
"""The state of a case for each verdict; where it is another text, that says what is wrong."""
PLAIN = ("kind", "dtype", "claims", "habits", "functions")
"""What JSON has as it is."""


@dataclass(frozen=True)
class ClaimOutcome(Outcome):
    """What became of one claim about one problem, or of a claim that is about no single problem."""

    claim: str = ""
    problem: str = ""  # its sizes; empty where the claim is about no single problem

    @property
    def verdict(self) -> str:
        """The outcome in words: "ok", "not offered", "refused", or what is wrong."""
        return next((word for word, state in STATES.items() if state == self.state), self.text)

    def json(self) -> dict[str, Any]:
        """Return the outcome for programs."""
        return super().json() | {"verdict": self.verdict}


def outcome(id: str, claim: str, problem: str, verdict: str) -> ClaimOutcome:
    """Return the outcome of a verdict in words."""
    state = STATES.get(verdict, "wrong")
    return ClaimOutcome(id, state, verdict if state == "wrong" else "", (), claim, problem)


def id_of(about: str, claim: str) -> str:
    """Return the id of a claim about a problem, such as ``linear-0``, or about a kind."""
    return f"{about}-{claim.replace(' ', '-')}"


@dataclass(repr=False)
class KindReport(Report):
    """What `check` found of a kind of layers, and of further ones in `kinds`."""

    cases: list[ClaimOutcome] = field(default_factory=list)  # each claim about each problem
    kinds: dict[str, KindReport] = field(default_factory=dict)  # a report for each further kind of layers
    kind: str = "linear"
    dtype: str = "float64"  # the precision that it was checked in
    claims: dict[str, str] = field(default_factory=dict)  # "ok", "not offered", "refused", or what is wrong
    habits: dict[str, str] = field(default_factory=dict)  # the same for each habit, which does not count
    # For each answer that it offers, the largest error on any problem, relative to the largest entry; infinite where an
    # answer has another shape or is not finite.
    errors: dict[str, float] = field(default_factory=dict)
    functions: dict[str, bool] = field(default_factory=dict)  # whether each function is offered; empty for files

    def every_case(self) -> list[ClaimOutcome]:
        """Return what became of all cases, of every kind."""
        return [case for report in (self, *self.kinds.values()) for case in report.cases]

    def every_diagnosis(self) -> list[Diagnosis]:
        """Return all that is wrong, that of further kinds under their names, and at the end what is known."""
        further = [replace(diagnosis, says=f"{kind}: {diagnosis.says}")
                   for kind, report in self.kinds.items() for diagnosis in report.found]  # fmt: skip
        return sorted([*self.found, *further], key=self._is_known)

    def require(self, claims: list[str]) -> None:
        """Put into `missing` the claims that are required and that a kind of layers does not offer."""
        kinds = {self.kind: self, **self.kinds}
        for claim in claims:
            having = [kind for kind, report in kinds.items() if claim in report.claims and _has(report, claim)]
            lacking = [f"{kind}: {claim}" for kind in having if kinds[kind].claims[claim] == NOT_OFFERED]
            self.missing += lacking if having else [claim]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> KindReport:
        """Return the report that `dataclasses.asdict` made plain, after its way through JSON."""
        found = [Diagnosis(**{**row, "cases": tuple(row["cases"])}) for row in plain["found"]]
        cases = [ClaimOutcome(**{**row, "flags": tuple(row["flags"])}) for row in plain["cases"]]
        kinds = {kind: cls.of(report) for kind, report in plain["kinds"].items()}
        return cls(**{**plain, "found": found, "cases": cases, "kinds": kinds})

    # --- as text ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """Say in which precision it was checked, and how much is offered."""
        if self.functions:
            return f"in {self.dtype}; {sum(self.functions.values())} of {len(self.functions)} functions offered"
        answered = f"; {self.habits[ANSWERED]} cases answered" if ANSWERED in self.habits else ""
        return f"in {self.dtype}{answered}"

    def own_lines(self, *, all: bool) -> list[str]:
        """Return the claims that are not right, a row each, the others in a line, kind by kind."""
        lines = [line for report in (self, *self.kinds.values()) for line in report.block(self.known, all)]
        return lines if self.kinds or self.status else lines[1:]  # which the first line says, of one kind

    def block(self, known: Collection[str], all: bool) -> list[str]:
        """Return the lines about this kind alone."""
        failed = {case.id for case in self.cases if case.failed}
        word = PASSED if not failed else KNOWN if failed <= set(known) else WRONG
        brief = () if all else ("ok", NOT_OFFERED)
        lines = [f"{self.kind}: {word}, {self.summary()}"]
        lines += [f"  {claim:20}{verdict}" for claim, verdict in self.claims.items() if verdict not in brief]
        for title, word in (("right", "ok"), ("not offered", NOT_OFFERED)) if brief else ():
            names = [claim for claim, verdict in self.claims.items() if verdict == word]
            lines += [f"  {title}: {', '.join(names)}"] if names else []
        hidden = (*brief, self.habits.get(ANSWERED))
        habits = [f"    {name:20}{verdict}" for name, verdict in self.habits.items() if verdict not in hidden]
        return [*lines, *(["  habits, which do not count:"] if habits else []), *habits]

    # --- for programs -------------------------------------------------------------------------------------------------

    def json(self) -> dict[str, Any]:
        """Return the report for programs."""
        own = self.as_dict()
        kinds = {self.kind: self, **self.kinds}
        absent = [f"{kind}: {claim}" for kind, report in kinds.items() for claim, verdict in report.claims.items()
                  if verdict == NOT_OFFERED and _has(report, claim)]  # fmt: skip
        return super().json() | {"not offered": absent, **{name: own[name] for name in (*PLAIN, "errors", "kinds")}}

    def as_dict(self) -> dict[str, Any]:
        """Return what was found of this kind and of further ones as plain data."""
        return {
            "name": self.name,
            **{name: getattr(self, name) for name in PLAIN},
            "passed": self.passed,
            "errors": {name: error if np.isfinite(error) else None for name, error in self.errors.items()},
            "diagnoses": [diagnosis.json() for diagnosis in self.found],
            "cases": [case.json() for case in self.cases],
            "kinds": {kind: report.as_dict() for kind, report in self.kinds.items()},
        }


def _has(report: KindReport, claim: str) -> bool:
    """Return whether a kind can offer a claim of its report: Adam's step is the linear layer's alone."""
    return claim != "adam" or "step" in report.functions
