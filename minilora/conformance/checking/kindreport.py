"""The report on a kind of layers, with a verdict on each claim, and an outcome for each claim and problem.

An outcome's id is ``KIND-NUMBER-CLAIM``, such as ``conv2d-2-slope``, or for a claim about the kind as a whole
``KIND-CLAIM``, such as ``linear-start``. Ids are stable: a problem keeps its number, and new ones are appended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...report import IS_WRONG, KNOWN, PASSED, Diagnosis, Outcome, Report

REFUSED = "refused"
"""The verdict on an edge case of the contract for which the function raises, or answers in another shape."""
NOT_OFFERED = "not offered"
CANNOT_BE_TOLD = "cannot be told: the output is wrong in another way"
"""The verdict on the scaling of an output that is wrong in another way, so that the claim "forward" fails as well."""
ANSWERED = "cases answered"
"""The habit with the number of problems that a folder of files answers."""
STATES = {"ok": "right", CANNOT_BE_TOLD: "cannot be told", NOT_OFFERED: NOT_OFFERED, REFUSED: REFUSED}
"""The state of a case for each verdict; any other verdict says what is wrong."""
JSON_AS_IS = ("kind", "dtype", "claims", "habits", "functions")
"""The fields that JSON has unchanged."""


@dataclass(frozen=True)
class ClaimOutcome(Outcome):
    """The outcome of a claim about one problem, or about a kind as a whole."""

    claim: str = ""
    problem: str = ""  # its sizes; empty if the claim is about the kind as a whole

    @property
    def verdict(self) -> str:
        """The outcome in words: "ok", "not offered", "refused", or what is wrong."""
        return next((word for word, state in STATES.items() if state == self.state), self.text)

    def json(self) -> dict[str, Any]:
        """Return the outcome as JSON data."""
        return super().json() | {"verdict": self.verdict}


def outcome(id: str, claim: str, problem: str, verdict: str) -> ClaimOutcome:
    """Return the outcome for a verdict in words."""
    state = STATES.get(verdict, "wrong")
    return ClaimOutcome(id, state, verdict if state == "wrong" else "", (), claim, problem)


def id_of(about: str, claim: str) -> str:
    """Return the id of a case: a claim about a problem, such as ``linear-0``, or about a kind."""
    return f"{about}-{claim.replace(' ', '-')}"


@dataclass(repr=False)
class KindReport(Report):
    """The report of `check` on a kind of layers, with the reports on other kinds in `kinds`."""

    cases: list[ClaimOutcome] = field(default_factory=list)  # one for each claim about each problem
    kinds: dict[str, KindReport] = field(default_factory=dict)  # a report for each other kind of layers
    kind: str = "linear"
    dtype: str = "float64"  # the precision that it was checked in
    claims: dict[str, str] = field(default_factory=dict)  # "ok", "not offered", "refused", or what is wrong
    habits: dict[str, str] = field(default_factory=dict)  # "ok", or what was observed; does not affect the verdict
    # For each answer offered, the largest error on any problem, relative to the largest entry; infinite if an answer
    # has another shape or is not finite.
    errors: dict[str, float] = field(default_factory=dict)
    functions: dict[str, bool] = field(default_factory=dict)  # whether each function is offered; empty for files

    def every_case(self) -> list[ClaimOutcome]:
        """Return the outcomes of all cases of every kind."""
        return [case for report in (self, *self.kinds.values()) for case in report.cases]

    def every_diagnosis(self) -> list[Diagnosis]:
        """Return all diagnoses, those of other kinds with their kind's name; known failures come last."""
        further = [replace(diagnosis, says=f"{kind}: {diagnosis.says}")
                   for kind, report in self.kinds.items() for diagnosis in report.found]  # fmt: skip
        return sorted([*self.found, *further], key=self._is_known)

    def require(self, claims: list[str]) -> None:
        """Add to `missing` the required claims that a kind of layers does not offer."""
        kinds = {self.kind: self, **self.kinds}
        for claim in claims:
            having = [kind for kind, report in kinds.items() if claim in report.claims and _has(report, claim)]
            lacking = [f"{kind}: {claim}" for kind in having if kinds[kind].claims[claim] == NOT_OFFERED]
            self.missing += lacking if having else [claim]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> KindReport:
        """Rebuild a report from the JSON of its `dataclasses.asdict`."""
        found = [Diagnosis(**{**row, "cases": tuple(row["cases"])}) for row in plain["found"]]
        cases = [ClaimOutcome(**{**row, "flags": tuple(row["flags"])}) for row in plain["cases"]]
        kinds = {kind: cls.of(report) for kind, report in plain["kinds"].items()}
        return cls(**{**plain, "found": found, "cases": cases, "kinds": kinds})

    # --- as text ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """Return the precision of the check, and how much is offered, in words."""
        if self.functions:
            return f"in {self.dtype}; {sum(self.functions.values())} of {len(self.functions)} functions offered"
        answered = f"; {self.habits[ANSWERED]} cases answered" if ANSWERED in self.habits else ""
        return f"in {self.dtype}{answered}"

    def own_lines(self, *, all: bool) -> list[str]:
        """Return the lines about each kind: a row for each claim that is not right, and the others on one line."""
        lines = [line for report in (self, *self.kinds.values()) for line in report.block(self.known, all)]
        return lines if self.kinds or self.status else lines[1:]  # with one kind, the report's first line says it

    def block(self, known: Collection[str], all: bool) -> list[str]:
        """Return the lines about this kind only."""
        failed = {case.id for case in self.cases if case.failed}
        word = PASSED if not failed else KNOWN if failed <= set(known) else IS_WRONG
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
        """Return the report as JSON data."""
        own = self.as_dict()
        kinds = {self.kind: self, **self.kinds}
        absent = [f"{kind}: {claim}" for kind, report in kinds.items() for claim, verdict in report.claims.items()
                  if verdict == NOT_OFFERED and _has(report, claim)]  # fmt: skip
        return super().json() | {"not offered": absent, **{key: own[key] for key in (*JSON_AS_IS, "errors", "kinds")}}

    def as_dict(self) -> dict[str, Any]:
        """Return the report on this kind and on other kinds as plain data."""
        return {
            "name": self.name,
            **{name: getattr(self, name) for name in JSON_AS_IS},
            "passed": self.passed,
            "errors": {name: error if np.isfinite(error) else None for name, error in self.errors.items()},
            "diagnoses": [diagnosis.json() for diagnosis in self.found],
            "cases": [case.json() for case in self.cases],
            "kinds": {kind: report.as_dict() for kind, report in self.kinds.items()},
        }


def _has(report: KindReport, claim: str) -> bool:
    """Return whether a kind can offer a claim of its report; only the linear layer has Adam's step."""
    return claim != "adam" or "step" in report.functions
