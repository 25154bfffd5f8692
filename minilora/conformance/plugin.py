"""A pytest plugin: an implementation held against the formulas, in any project's own tests.

    python -m pytest -p minilora.conformance.plugin --pyargs minilora.conformance.test_implementation
                     --lora MODULE[:OBJECT] [--lora-xfails FILE]

gives a test for each claim and problem. Its id, in brackets, is that of its case in JSON, and the first word
of a line of FILE, which lists the failures that are known. The implementation runs in the tests' process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import pytest

from ..checks import printable
from .checking.check import check
from .checking.child import imported
from .checking.contract import ids
from .checking.kindreport import ClaimOutcome, KindReport
from .report import CannotRun, on_github, read_known

HELD = pytest.StashKey["Held"]()


class Held:
    """The implementation that the options name, and what is found of it: once for all tests."""

    def __init__(self, target: str, known: dict[str, str]) -> None:
        self.target, self.known = target, known
        self.implementation = imported(target)
        self.ids = ids(self.implementation)

    @cached_property
    def report(self) -> KindReport | str:
        """What is found, or why nothing could be checked."""
        try:
            return check(self.implementation, name=self.target)
        except CannotRun as error:
            return str(error)

    def _cases(self) -> Iterator[ClaimOutcome]:
        assert isinstance(self.report, KindReport)
        for report in (self.report, *self.report.kinds.values()):
            yield from report.cases

    def outcome(self, id: str) -> ClaimOutcome:
        """Return what is found for an id."""
        return next(case for case in self._cases() if case.id == id)

    def why(self, case: ClaimOutcome) -> str:
        """Return what is wrong, and the diagnoses of the kind of layer that it is wrong in."""
        assert isinstance(self.report, KindReport)
        reports = (self.report, *self.report.kinds.values())
        diagnoses = next(report.diagnoses for report in reports if case in report.cases)
        problem = f" ({case.problem})" if case.problem else ""
        return "\n".join(printable(line) for line in (f"{case.verdict}{problem}", *diagnoses))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("minilora")
    group.addoption("--lora", metavar="MODULE[:OBJECT]", help="the LoRA to be checked; a path to a .py file does too")
    group.addoption("--lora-xfails", metavar="FILE", help="known failures, a line each: an id and a reason")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options: the modules and files that they name lie where pytest was started."""
    target, file = config.getoption("--lora"), config.getoption("--lora-xfails")
    if target is None:
        if file is not None:
            raise pytest.UsageError("--lora-xfails: expected --lora MODULE[:OBJECT] with it")
        return
    sys.path.insert(0, str(config.invocation_params.dir))
    try:
        known = {} if file is None else read_known(config.invocation_params.dir / file)
        subject = Held(target, known)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise pytest.UsageError(f"--lora {target}: {error}") from None
    if unknown := [id for id in known if id not in subject.ids]:
        raise pytest.UsageError(f"--lora-xfails {file}: {unknown[0]!r} is the id of no test of {target}")
    config.stash[HELD] = subject


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each claim and problem."""
    if metafunc.module.__name__ == f"{__package__}.test_implementation":
        if HELD not in metafunc.config.stash:
            raise pytest.Collector.CollectError("expected --lora MODULE[:OBJECT], the LoRA to be checked")
        subject = metafunc.config.stash[HELD].ids
        metafunc.parametrize("lora_id", subject, ids=subject)


@pytest.fixture(scope="session")
def held(request: pytest.FixtureRequest) -> Held:
    """Return the implementation, which has been checked."""
    subject = request.config.stash[HELD]
    if isinstance(subject.report, str):
        pytest.fail(f"{subject.target} could not be checked: {subject.report}", pytrace=False)
    return subject


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the report, diagnoses first, and on GitHub what fails otherwise than is known."""
    subject = config.stash.get(HELD, None)
    report = vars(subject).get("report") if subject else None  # where a test asked for it
    if subject and isinstance(report, KindReport):
        terminalreporter.section("minilora.conformance")
        report.known = subject.known
        for line in [str(report), *(report.annotations() if on_github() else ())]:
            terminalreporter.write_line(line)
