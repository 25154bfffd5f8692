"""The report of the five judging commands, as text and as JSON.

The first line is ``NAME: VERDICT: text [flag]``, ready to be pasted into an issue. Below it are the wrong cases, one
per row, the number of right cases, and what was not offered. The ids of cases do not change, so an adopter can keep a
file of known failures, one per line: ``ID  reason``. It is strict in both directions: a failure that is not listed
counts, and so does a listed case that does not fail.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .files.disk import read_whole, written_whole
from .texts import FileRefused, printable, reading, short

FORMAT = 2
"""The version of the JSON format, which increases with incompatible changes."""
PASSED, KNOWN, IS_WRONG = "passed", "fails as is known", "WRONG"
STATUS = {PASSED: 0, KNOWN: 0, "RIGHT": 0, "SOUND": 0, IS_WRONG: 1, "SUSPICIOUS": 1, "UNDECIDED": 2}
"""The exit code of each verdict. If nothing can be judged, there is no report, and the code is 2 too."""
FAILED = ("wrong", "missing")
"""The states of failing cases. The others are "right", "not offered", "refused" and "cannot be told"."""
LONGEST_FIRST_LINE, LONGEST_FIRST_NAME = 160, 40
"""The largest number of characters of the first line, and of its name if both are too long."""
LONGEST_LINE = 10_000
"""The largest number of characters of any other line."""
CASES_NAMED = 5
"""The largest number of unanswered cases that are listed; the rest are counted."""


class CannotRun(ValueError):
    """Nothing can be judged; the message says what is missing."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case."""

    id: str
    state: str  # "right", "wrong", "missing", "not offered", "refused" or "cannot be told"
    text: str = ""  # a description of the mistake
    flags: tuple[str, ...] = ()  # the known mistakes that explain it

    @property
    def failed(self) -> bool:
        """Whether the answer is wrong or missing."""
        return self.state in FAILED

    def json(self) -> dict[str, Any]:
        """Return the outcome for JSON."""
        return {**vars(self), "flags": list(self.flags), "failed": self.failed}


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis of one mistake."""

    says: str
    flag: str = ""  # a known mistake's; two at once are joined by a plus
    source: str = ""  # where it was found in public: "owner/repository #issue", "package version" or an address
    cases: tuple[str, ...] = ()  # the ids of the cases that it explains

    def __str__(self) -> str:
        return f"{self.says} (made in {self.source})" if self.source else self.says

    def json(self) -> dict[str, Any]:
        """Return the diagnosis for JSON."""
        return {**vars(self), "made in": links(self.source), "cases": list(self.cases)}


@dataclass(repr=False)
class Report:
    """A report. It displays itself in print, at a prompt and in a notebook, with the verdict first."""

    name: str  # the name of the judged object
    command: str = "conformance"
    cases: Sequence[Outcome] = field(default_factory=list)
    found: list[Diagnosis] = field(default_factory=list)  # the diagnoses, the most likely first
    known: Mapping[str, str] = field(default_factory=dict)  # the reason for each known failure
    missing: list[str] = field(default_factory=list)  # required claims that are not offered
    not_offered: list[str] = field(default_factory=list)
    word: str = ""  # the verdict, one of `STATUS`, if no cases determine it
    text: str = ""  # the first line's text, if it is not the first diagnosis
    flag: str = ""  # the flag of `text`
    lines: list[str] = field(default_factory=list)  # the command's own lines
    rows: list[str] = field(default_factory=list)  # their long form, shown with --all
    details: dict[str, Any] = field(default_factory=dict)  # the command's own data for JSON

    # --- the verdict --------------------------------------------------------------------------------------------------

    @property
    def diagnoses(self) -> list[str]:
        """The diagnoses as sentences, the most likely first."""
        return [str(diagnosis) for diagnosis in self.found]

    @property
    def passed(self) -> bool:
        """Whether all cases are right; known failures count as failures."""
        return not self.failing and STATUS[self.word or PASSED] == 0

    @property
    def verdict(self) -> str:
        """The verdict, one of `STATUS`."""
        if self.word:
            return self.word
        if self.unexpected or self.stale or self.missing:
            return IS_WRONG
        return KNOWN if self.failing else PASSED

    @property
    def status(self) -> int:
        """The exit code: 0 if all failures are known, all known failures fail, and nothing is missing."""
        return STATUS[self.verdict]

    def every_case(self) -> Sequence[Outcome]:
        """Return the number of cases in each state."""
        return self.cases

    def every_diagnosis(self) -> list[Diagnosis]:
        """Return all diagnoses, the most likely first and the known failures last."""
        return sorted(self.found, key=self._is_known)

    def _is_known(self, diagnosis: Diagnosis) -> bool:
        """Return whether everything that a diagnosis explains is a known failure."""
        return bool(diagnosis.cases) and all(id in self.known for id in diagnosis.cases)

    @property
    def failing(self) -> list[Outcome]:
        """All failures, known or not."""
        return [case for case in self.every_case() if case.failed]

    @property
    def unexpected(self) -> list[Outcome]:
        """The failures that are not known."""
        return [case for case in self.failing if case.id not in self.known]

    @property
    def stale(self) -> dict[str, str]:
        """The listed failures that do not fail, with their outcome."""
        cases = {case.id: case for case in self.every_case()} if self.known else {}
        return {id: became(cases.get(id)) for id in self.known if id not in cases or not cases[id].failed}

    # --- as text ------------------------------------------------------------------------------------------------------

    @property
    def first_line(self) -> str:
        """The verdict in at most `LONGEST_FIRST_LINE` characters; names and paths are shortened before the text."""
        headline, name = self.headline(), printable(self.name, LONGEST_FIRST_NAME)
        says, end = headline.says, f" [{headline.flag}]" if headline.flag else ""
        bare = re.sub(r"'(?:/[^']*|[^' ]*)/([^'/]+)'", r"'\1'", says)  # the last part of a path
        tries = (self.name, str(headline)), (self.name, says), (name, says), (name, bare)
        lines = [f"{first}: {self.verdict}{text and ': ' + text}{end}" for first, text in tries]
        cut = lines[-1][: LONGEST_FIRST_LINE - len(end) - 3].rsplit(" ", 1)[0].rstrip(" ,;:(") + "..." + end
        return printable(next((line for line in lines if len(line) <= LONGEST_FIRST_LINE), cut))

    def headline(self) -> Diagnosis:
        """Return the text of the first line."""
        if self.text:
            return Diagnosis(self.text, self.flag)
        if self.status == 0:
            return Diagnosis(self.summary())
        for diagnosis in self.every_diagnosis():
            if not self._is_known(diagnosis):
                return diagnosis
        for case in self.unexpected:
            if case.state == "wrong":
                return Diagnosis(f"{case.id}: {case.text}")
        if self.unexpected:
            of = sum(case.state in ("right", *FAILED) for case in self.every_case())
            return Diagnosis(f"{len(self.unexpected)} of {of} cases have no answer")
        return Diagnosis(next(iter([*self._out_of_date(), *self._lacks()]), ""))

    def summary(self) -> str:
        """Return the number of right cases in words."""
        counts = Counter(case.state for case in self.every_case())
        return ", ".join(f"{counts[state]} {state}" for state in ("right", *FAILED, "refused") if counts[state])

    def __str__(self) -> str:
        return self.shown()

    __repr__ = __str__

    def shown(self, *, all: bool = False) -> str:
        """Return the report as lines, the verdict first; `all` includes the right cases."""
        lines = [self.first_line, *self._told(), *self.own_lines(all=all), *self._of_known(), *self._lacks()]
        return "\n".join(printable(line, LONGEST_LINE) for line in lines)  # a name in a file can contain anything

    def _told(self) -> Iterator[str]:
        """Yield a line for each diagnosis; for that in the first line, only the rest."""
        first, wrong = self.first_line, sum(case.state == "wrong" for case in self.every_case())
        for diagnosis in self.every_diagnosis():
            flag, explained = f" [{diagnosis.flag}]" if diagnosis.flag else "", len(diagnosis.cases)
            more = [f"explains {explained} of {wrong} wrong cases"] if 0 < explained < wrong else []
            more += ["known"] if self._is_known(diagnosis) else []
            if diagnosis.says not in first or flag not in first:
                yield f"  {diagnosis}{flag}" + (f" ({', '.join(more)})" if more else "")
            elif more := [*([f"made in {diagnosis.source}"] if str(diagnosis) not in first else []), *more]:
                yield f"  {', '.join(more)}"

    def own_lines(self, *, all: bool) -> list[str]:
        """Return the rows of the cases that are not right, or of all, and the command's own lines."""
        missing = [case.id for case in self.cases if case.state == "missing"]
        few = all or len(missing) <= CASES_NAMED
        rows = [case for case in self.cases if all or case.state == "wrong" or (few and case.state == "missing")]
        width = max((len(case.id) for case in rows), default=0)
        lines = [f"  {case.id:{width}}  {self._became(case)}" for case in rows]
        lines += [] if few else [f"  missing: {', '.join(missing[:CASES_NAMED])} and {len(missing) - CASES_NAMED} more"]
        lines = [self.summary(), *lines] if self.failing else lines
        lines += (self.rows or self.lines) if all else self.lines
        return lines + ([f"not offered: {', '.join(self.not_offered)}"] if self.not_offered else [])

    def _became(self, case: Outcome) -> str:
        reason = f", as is known ({self.known[case.id]})" if case.failed and case.id in self.known else ""
        flags = f" [{', '.join(case.flags)}]" if case.flags else ""
        return f"{case.state}{reason}{case.text and ': ' + case.text}{flags}"

    def _of_known(self) -> list[str]:
        """Return the lines about known failures, if there are any."""
        if not self.known:
            return []
        unexpected = [case.id for case in self.unexpected]
        count = f"{len(self.failing) - len(unexpected)} of {len(self.known)} known failures fail as they should"
        return [count, *self._out_of_date()] + ([f"not known to fail: {', '.join(unexpected)}"] if unexpected else [])

    def _out_of_date(self) -> list[str]:
        return [f"{id} is known to fail, and {now}: take its line out" for id, now in self.stale.items()]

    def _lacks(self) -> list[str]:
        return [f"{text} is required, and not offered" for text in self.missing]

    def annotations(self) -> list[str]:
        """Return the unknown failures as lines that GitHub Actions shows as errors."""
        if self.status == 0:
            return []
        new = [f"{self.name}: {d}" for d in self.every_diagnosis() if not self._is_known(d)] or [self.first_line]
        texts = [*(new if self.unexpected or self.word else []), *self._out_of_date(), *self._lacks()]
        return [github_error(text, f"minilora {self.command}") for text in texts]

    # --- as JSON ------------------------------------------------------------------------------------------------------

    def json(self) -> dict[str, Any]:
        """Return the report for JSON: the entries that all commands share, and the command's own `details`."""
        headline, every = self.headline(), self.every_case()
        return {
            "format": FORMAT,
            "minilora": __version__,
            "versions": {"minilora": __version__, "numpy": np.__version__, "python": platform.python_version()},
            "kernel": kernel(),
            "command": self.command,
            "name": self.name,
            "verdict": self.verdict.lower(),
            "status": self.status,
            "passed": self.passed,
            "first_line": self.first_line,
            "text": printable(headline.says, LONGEST_LINE),
            "flag": headline.flag,
            "diagnoses": [diagnosis.json() for diagnosis in self.every_diagnosis()],
            "cases": [case.json() for case in every],
            "failing": [case.id for case in self.failing],
            "known": dict(self.known),
            "unexpected": [case.id for case in self.unexpected],
            "stale": self.stale,
            "missing": [*self.missing, *(case.id for case in every if case.state == "missing")],
            "not offered": self.not_offered,
            **self.details,
        }


def became(case: Outcome | None) -> str:
    """Describe the outcome of a case that does not fail."""
    if case is None:
        return "is no case here"
    return {"right": "passes", "not offered": "is not offered", "refused": "is refused"}.get(case.state, case.state)


def read_known(path: str | Path) -> dict[str, str]:
    """Return the reason for each id in a file of known failures, which may have blank lines and # comments.

    Raises
    ------
    FileRefused
        If a line has no reason, an id occurs twice, or the file is not text.
    OSError
        If the file cannot be read.
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


def links(source: str) -> list[str]:
    """Return the sources of a mistake as addresses."""
    addresses = []
    for place in filter(None, source.split(", ")):
        name, _, number = place.rpartition(" ")
        issue = f"https://github.com/{name}/issues/{number.removeprefix('#')}"
        package = f"https://pypi.org/project/{name}/{number}/"
        addresses.append(place if not name else issue if number.startswith("#") else package)
    return addresses


def kernel() -> str | None:
    """Return the processor architecture of NumPy's BLAS from threadpoolctl; None if it is not installed.

    The order in which sums are rounded depends on it.
    """
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    return next((library["architecture"] for library in threadpool_info() if library.get("architecture")), None)


def check_replaced(path: Path) -> None:
    """Require a new file, or one with a report: a report replaces nothing else."""
    if path.exists():
        with suppress(FileRefused), reading(path):
            if {"format", "verdict"} <= json.loads(read_whole(path)).keys():
                return
        raise ValueError(f"--json {str(path)!r} is there already and has no report, expected another file")


def save_json(path: Path | None, report: Report) -> None:
    """Write a report as JSON atomically; without a path, do nothing."""
    if path is not None:
        with written_whole(path) as file:
            file.write(json.dumps(report.json(), indent=1).encode() + b"\n")


def on_github() -> bool:
    """Return whether this runs in GitHub Actions, which interprets lines that begin with ``::error``."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def github_error(text: str, title: str) -> str:
    """Return a line that GitHub Actions shows as an error."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title={title}::{escaped}"
