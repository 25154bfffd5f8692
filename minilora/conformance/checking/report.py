"""What the suite found: a `Report` for each kind of layer, and in it an `Outcome` for each claim and problem.

An outcome's id is ``KIND-NUMBER-CLAIM``, such as ``conv2d-2-slope``; of a claim that is about no single problem
``KIND-CLAIM``, such as ``linear-start``. Ids stay: a problem keeps its number, and new ones come after the others. So
an adopter can list the failures that are known (`minilora.conformance.checking.xfails`).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...checks import printable
from ...files.disk import written_whole

REFUSED = "refused"
"""Of what stands at the edge of the contract: it raises, or answers in another shape."""
NOT_FAILED = ("ok", "not offered", REFUSED)
CANNOT_BE_TOLD = "cannot be told: the output is wrong in another way"
"""Of the scaling: the claim "forward" fails there."""
FORMAT = 1
"""Of the JSON; it grows where a program that reads it would have to change."""


class CannotRun(ValueError):
    """The implementation cannot be checked; the message says what it lacks."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one claim about one problem, or on a claim that is about no single problem."""

    id: str
    claim: str
    problem: str  # its sizes; empty where the claim is about no single problem
    verdict: str  # "ok", "not offered", "refused", or what is wrong

    @property
    def failed(self) -> bool:
        """Whether the claim is broken there. What is not offered, or cannot be told, is no failure."""
        return self.verdict not in (*NOT_FAILED, CANNOT_BE_TOLD)


def id_of(kind: str, claim: str, number: int | None = None) -> str:
    """Return the id of a claim about a kind's problem of that number, or about no single problem."""
    words = [kind, *([] if number is None else [str(number)]), claim.replace(" ", "-")]
    return "-".join(words)


@dataclass(repr=False)
class Report:
    """What `check` found. It prints, and shows itself at a prompt and in a notebook, with the diagnoses first."""

    name: str  # the implementation's
    dtype: str  # the precision that it was checked in
    claims: dict[str, str] = field(default_factory=dict)  # "ok", "not offered", "refused", or what is wrong
    habits: dict[str, str] = field(default_factory=dict)  # the same for each habit, which does not count
    diagnoses: list[str] = field(default_factory=list)  # what is wrong, the likeliest first; empty where all is right
    # For each answer that it offers, the largest error on any problem, relative to the largest entry; infinite where an
    # answer has another shape or is not finite.
    errors: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, Report] = field(default_factory=dict)  # a report for each further kind of layer
    functions: dict[str, bool] = field(default_factory=dict)  # whether each function is offered; empty for files
    cases: list[Outcome] = field(default_factory=list)  # each claim about each problem

    @property
    def passed(self) -> bool:
        """Whether every claim that it offers holds, for every kind. Habits do not count."""
        return self._own_passed and all(report.passed for report in self.kinds.values())

    @property
    def _own_passed(self) -> bool:
        return all(verdict in NOT_FAILED for verdict in self.claims.values())

    def every_case(self) -> list[Outcome]:
        """Return the outcomes of this kind and of all further ones."""
        return [*self.cases, *(case for report in self.kinds.values() for case in report.every_case())]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        own = {name: getattr(self, name) for name in ("name", "dtype", "passed", "diagnoses", "claims", "habits")}
        errors = {name: error if np.isfinite(error) else None for name, error in self.errors.items()}  # JSON has no inf
        cases = [vars(case) | {"failed": case.failed} for case in self.cases]
        kinds = {kind: report.as_dict() for kind, report in self.kinds.items()}
        return {**own, "errors": errors, "functions": self.functions, "cases": cases, "kinds": kinds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report that `as_dict` was made of."""
        plain = {name: data[name] for name in ("name", "dtype", "claims", "habits", "diagnoses", "functions")}
        errors = {name: np.inf if error is None else error for name, error in data["errors"].items()}
        cases = [Outcome(case["id"], case["claim"], case["problem"], case["verdict"]) for case in data["cases"]]
        kinds = {kind: cls.from_dict(other) for kind, other in data["kinds"].items()}
        return cls(**plain, errors=errors, cases=cases, kinds=kinds)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def text(self, known: Iterable[str] = ()) -> str:
        """Return the report in lines, the diagnoses first. A kind whose failures are all known does not count as wrong.

        Parameters
        ----------
        known : iterable of str, optional
            The ids of failures that are known.
        """
        own, ids = {"": self, **self.kinds}, frozenset(known)
        wrong = [(report._fails_as_known(ids), f"{kind}: {text}" if kind else text)
                 for kind, report in own.items() for text in report.diagnoses]  # fmt: skip
        wrong.sort(key=lambda pair: pair[0])  # what is new comes first
        lines = [*(f"{text} (known)" if is_known else text for is_known, text in wrong), *self._lines(ids)]
        return "\n".join(printable(line, len(line)) for line in lines)

    def _fails_as_known(self, known: frozenset[str]) -> bool:
        """Return whether something fails, and nothing that is not known."""
        failed = {case.id for case in self.cases if case.failed}
        return bool(failed) and failed <= known

    def _lines(self, known: frozenset[str]) -> list[str]:
        word = "passed" if self._own_passed else "fails as is known" if self._fails_as_known(known) else "WRONG"
        offered = f"; {sum(self.functions.values())} of {len(self.functions)} functions offered"
        lines = [f"{self.name}: {word}, in {self.dtype}{offered if self.functions else ''}"]
        for title, verdicts in (("claims", self.claims), ("habits, which do not count", self.habits)):
            lines += [f"  {title}:"] if verdicts else []
            lines += [f"    {name:20}{verdict}" for name, verdict in verdicts.items()]
        return lines + [line for report in self.kinds.values() for line in report._lines(known)]


def kernel() -> str | None:
    """Return the processor whose code NumPy's BLAS runs, as threadpoolctl names it; None where that is not installed.

    Sums are rounded in another order on another one.
    """
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return next((library["architecture"] for library in threadpool_info() if library.get("architecture")), None)


def save_json(path: Path, **report: Any) -> None:
    """Write what was found as JSON, after the versions that it was found with: whole, or not at all."""
    versions = {"minilora": __version__, "numpy": np.__version__, "python": platform.python_version()}
    content = {"format": FORMAT, "versions": versions, "kernel": kernel(), **report}
    with written_whole(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")
