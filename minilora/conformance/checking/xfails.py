"""Failures that are known: a file of their ids and reasons, which an adopter keeps, and a report judged beside it.

A line of the file is ``ID  reason``; empty lines and those that begin with ``#`` do not count. The file is strict both
ways: a failure that it lacks counts, and so does a line whose case no longer fails.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checks import FileRefused, short
from .report import Outcome, Report


def read(path: str | Path) -> dict[str, str]:
    """Return the reason of each id in a file.

    Raises
    ------
    FileRefused
        If a line has no reason, or an id comes twice, or it is no text.
    OSError
        If it cannot be read.
    """
    known: dict[str, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise FileRefused(path, "it is no text in UTF-8") from None
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        id, *reason = line.split(None, 1)
        if not reason:
            raise FileRefused(path, f"line {number}: expected an id and a reason, got {short(line)}")
        if id in known:
            raise FileRefused(path, f"line {number}: {short(id)} stands there twice")
        known[id] = reason[0]
    return known


@dataclass(frozen=True)
class Judged:
    """A report, the failures that are known, and the claims that are required."""

    report: Report
    known: Mapping[str, str] = field(default_factory=dict)  # a reason for each id
    required: Sequence[str] = ()  # claims that each kind of layer must offer

    @property
    def failing(self) -> list[Outcome]:
        """All that fails, known or not."""
        return [case for case in self.report.every_case() if case.failed]

    @property
    def unexpected(self) -> list[Outcome]:
        """What fails and is not known."""
        return [case for case in self.failing if case.id not in self.known]

    @property
    def stale(self) -> dict[str, str]:
        """Known failures that do not fail: what becomes of each instead."""
        cases = {case.id: case for case in self.report.every_case()}
        return {id: became(cases.get(id)) for id in self.known if id not in cases or not cases[id].failed}

    @property
    def missing(self) -> list[str]:
        """The claims that are required and not offered, with the kind that lacks them."""
        kinds = {"linear": self.report, **self.report.kinds}
        offering = {claim: [kind for kind, report in kinds.items() if claim in report.claims and _has(kind, claim)]
                 for claim in self.required}  # fmt: skip
        lacking = [f"{kind}: {claim}" for kind, report in kinds.items() for claim, of in offering.items()
                   if kind in of and report.claims[claim] == "not offered"]  # fmt: skip
        return lacking + [claim for claim, of in offering.items() if not of]

    @property
    def status(self) -> int:
        """The exit code: 0 where all that fails is known, all that is known fails, and nothing required is missing."""
        unknown = self.unexpected or not (self.report.passed or self.failing)
        return 1 if unknown or self.stale or self.missing else 0

    def __str__(self) -> str:
        lines = [self.report.text(self.known)]
        lines += of_known(self.known, [case.id for case in self.failing], self.stale)
        return "\n".join([*lines, *self.lacks()])

    def lacks(self) -> list[str]:
        """Return a line for each claim that is required and not offered."""
        return [f"{text} is required, and not offered" for text in self.missing]

    def annotations(self) -> list[str]:
        """Return what to show of it on GitHub: the diagnoses of each kind that fails otherwise than is known."""
        own = {"linear": self.report, **self.report.kinds}
        unexpected = {case.id for case in self.unexpected}
        texts = [f"{report.name}: {text}" for report in own.values() for text in report.diagnoses
                 if unexpected & {case.id for case in report.cases}]  # fmt: skip
        return [*texts, *out_of_date(self.stale), *self.lacks()]

    def as_dict(self) -> dict[str, Any]:
        """Return what is judged as plain data, beside the report's own."""
        failing, unexpected = ([case.id for case in cases] for cases in (self.failing, self.unexpected))
        return {"status": self.status, "failing": failing, "unexpected": unexpected, "known": dict(self.known),
                "stale": self.stale, "missing": self.missing}  # fmt: skip


def of_known(known: Mapping[str, str], failing: Sequence[str], stale: Mapping[str, str]) -> list[str]:
    """Return what a report says of known failures, by the ids of all that fails; nothing where none is known."""
    if not known:
        return []
    unexpected = [id for id in failing if id not in known]
    count = f"{len(failing) - len(unexpected)} of {len(known)} known failures fail as they should"
    return [count, *out_of_date(stale), *([f"not known to fail: {', '.join(unexpected)}"] if unexpected else [])]


def out_of_date(stale: Mapping[str, str]) -> list[str]:
    """Return a line for each known failure that does not fail."""
    return [f"{id} is known to fail, and {now}: take its line out" for id, now in stale.items()]


def _has(kind: str, claim: str) -> bool:
    """Return whether a kind can offer a claim of its report: Adam is asked for once."""
    return claim != "adam" or kind == "linear"


def became(case: Outcome | None) -> str:
    """Say what becomes of a case that does not fail."""
    if case is None:
        return "is no case here"
    return {"ok": "passes", "not offered": "is not offered"}.get(case.verdict, case.verdict)


def on_github() -> bool:
    """Return whether this runs in a workflow of GitHub Actions, which shows lines that begin with ``::error``."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def github_error(text: str, title: str = "minilora conformance") -> str:
    """Return a line that GitHub Actions shows as an error of the run."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title={title}::{escaped}"
