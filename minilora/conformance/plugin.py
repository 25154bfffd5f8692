"""An implementation held against the formulas in any project's own tests: a test for each claim and problem.

In a test file of one's own::

    from minilora.conformance.plugin import lora_cases
    import my_lora

    @lora_cases(my_lora, xfails="lora-xfails.txt")
    def test_my_lora(case):
        case()

or without one, as a pytest plugin::

    python -m pytest -p minilora.conformance.plugin --pyargs minilora.conformance.test_implementation
                     --lora MODULE[:OBJECT] [--lora-xfails FILE]

A test's name has the id of its case in brackets, which is the same in JSON, and in the file of the failures that are
known. The implementation is checked once for all tests, in their process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest

from ..report import CannotRun, became, on_github, read_known
from ..texts import printable
from .checking.check import check
from .checking.child import imported
from .checking.contract import ids
from .checking.kindreport import KindReport

HELD = pytest.StashKey["Held"]()


def lora_cases(
    implementation: Any, *, xfails: Mapping[str, str] | str | Path | None = None, name: str | None = None
) -> pytest.MarkDecorator:
    """Return a decorator that gives a test each claim about each problem as its argument ``case``, to be called.

    Parameters
    ----------
    implementation : module or object
        As `minilora.conformance.check` takes it.
    xfails : mapping or path, optional
        The failures that are known: a reason for each id, or a file of lines ``ID  reason``. A test that is known to
        fail and does not fails.
    name : str, optional
        Of the implementation, for messages.

    Raises
    ------
    ValueError
        If an id of `xfails` is that of no case.
    """
    known = read_known(xfails) if isinstance(xfails, (str, Path)) else xfails or {}
    return pytest.mark.parametrize("case", Held(implementation, name, known).params())


class Held:
    """An implementation, and what is found of it: once for all tests."""

    def __init__(self, implementation: Any, name: str | None, known: Mapping[str, str]) -> None:
        self.implementation, self.name, self.known = implementation, name, known
        self.ids = ids(implementation)
        if unknown := [id for id in known if id not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is known to fail, and is the id of no test")

    def params(self) -> list[Any]:
        """Return the case of each test, under its id."""
        return [pytest.param(partial(self.judge, id), id=id) for id in self.ids]

    @cached_property
    def report(self) -> KindReport | CannotRun:
        """What is found, or why nothing could be checked."""
        try:
            report = check(self.implementation, name=self.name)
        except CannotRun as error:
            return error
        report.known = self.known
        return report

    def judge(self, id: str) -> None:
        """Be the test of a case: pass, fail, skip where it is not offered, or xfail."""
        report, reason = self.report, self.known.get(id)
        if isinstance(report, CannotRun):
            pytest.fail(f"it could not be checked: {report}", pytrace=False)
        case = next(case for case in report.every_case() if case.id == id)
        if reason is not None and not case.failed:
            pytest.fail(f"it is known to fail ({reason}), and {became(case)}: take its line out", pytrace=False)
        if reason is not None:
            pytest.xfail(f"{reason}: {case.text}")
        if case.failed:
            diagnoses = [str(diagnosis) for diagnosis in report.every_diagnosis() if id in diagnosis.cases]
            pytest.fail("\n".join(map(printable, [case.text, *diagnoses])), pytrace=False)
        if case.state != "right":
            pytest.skip(case.state)


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
        config.stash[HELD] = Held(imported(target), target, known)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise pytest.UsageError(f"--lora {target}: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each claim and problem."""
    if metafunc.module.__name__ == f"{__package__}.test_implementation":
        if HELD not in metafunc.config.stash:
            raise pytest.Collector.CollectError("expected --lora MODULE[:OBJECT], the LoRA to be checked")
        metafunc.parametrize("case", metafunc.config.stash[HELD].params())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the report, and on GitHub what fails otherwise than is known."""
    held = config.stash.get(HELD, None)
    report = vars(held).get("report") if held else None  # where a test asked for it
    if isinstance(report, KindReport):
        terminalreporter.section("minilora.conformance")
        for line in [str(report), *(report.annotations() if on_github() else ())]:
            terminalreporter.write_line(line)
