"""The pytest plugin that checks an implementation in any project's own tests: one test for each claim and problem.

Use it in a test file of your own::

    from minilora.conformance.plugin import lora_cases
    import my_lora

    @lora_cases(my_lora, xfails="lora-xfails.txt")
    def test_my_lora(case):
        case()

or without a test file::

    python -m pytest -p minilora.conformance.plugin --pyargs minilora.conformance.test_implementation
                     --lora MODULE[:OBJECT] [--lora-xfails FILE]

The name of a test ends in the id of its case, in brackets. JSON reports and the file of known failures use the same
ids. The implementation is checked once for all tests, in the process that runs them.
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

CHECKED = pytest.StashKey["Checked"]()


def lora_cases(
    implementation: Any, *, xfails: Mapping[str, str] | str | Path | None = None, name: str | None = None
) -> pytest.MarkDecorator:
    """Return a decorator that parametrizes a test over all claims and problems; its argument ``case`` is a callable.

    Parameters
    ----------
    implementation : module or object
        The implementation, as for `minilora.conformance.check`.
    xfails : mapping or path, optional
        The known failures: a mapping from ids to reasons, or a file of lines ``ID  reason``. A test fails if it is
        listed here but its case passes.
    name : str, optional
        The name of the implementation in messages.

    Raises
    ------
    ValueError
        If `xfails` has an id that no case has.
    """
    known = read_known(xfails) if isinstance(xfails, (str, Path)) else xfails or {}
    return pytest.mark.parametrize("case", Checked(implementation, name, known).params())


class Checked:
    """An implementation with its report, which is made once for all tests."""

    def __init__(self, implementation: Any, name: str | None, known: Mapping[str, str]) -> None:
        self.implementation, self.name, self.known = implementation, name, known
        self.ids = ids(implementation)
        if unknown := [id for id in known if id not in self.ids]:
            raise ValueError(f"{unknown[0]!r} is listed as a known failure, but no test has this id")

    def params(self) -> list[Any]:
        """Return one pytest parameter for each case, with the case's id."""
        return [pytest.param(partial(self.judge, id), id=id) for id in self.ids]

    @cached_property
    def report(self) -> KindReport | CannotRun:
        """The report, or the error if nothing could be checked."""
        try:
            report = check(self.implementation, name=self.name)
        except CannotRun as error:
            return error
        report.known = self.known
        return report

    def judge(self, id: str) -> None:
        """Run the test of a case: pass, fail, skip if the implementation does not offer it, or xfail."""
        report, reason = self.report, self.known.get(id)
        if isinstance(report, CannotRun):
            pytest.fail(f"the implementation could not be checked: {report}", pytrace=False)
        case = next(case for case in report.every_case() if case.id == id)
        if reason is not None and not case.failed:
            pytest.fail(f"listed as a known failure ({reason}), but {became(case)}: remove its line", pytrace=False)
        if reason is not None:
            pytest.xfail(f"{reason}: {case.text}")
        if case.failed:
            diagnoses = [str(diagnosis) for diagnosis in report.every_diagnosis() if id in diagnosis.cases]
            pytest.fail("\n".join(map(printable, [case.text, *diagnoses])), pytrace=False)
        if case.state != "right":
            pytest.skip(case.state)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options to pytest."""
    group = parser.getgroup("minilora")
    group.addoption("--lora", metavar="MODULE[:OBJECT]", help="the LoRA to check: a module, or a path to a .py file")
    group.addoption("--lora-xfails", metavar="FILE", help="known failures, one per line: an id and a reason")


def pytest_configure(config: pytest.Config) -> None:
    """Read the options; modules and files are looked up in the folder where pytest was started."""
    target, file = config.getoption("--lora"), config.getoption("--lora-xfails")
    if target is None:
        if file is not None:
            raise pytest.UsageError("--lora-xfails needs --lora MODULE[:OBJECT]")
        return
    sys.path.insert(0, str(config.invocation_params.dir))
    try:
        known = {} if file is None else read_known(config.invocation_params.dir / file)
        config.stash[CHECKED] = Checked(imported(target), target, known)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise pytest.UsageError(f"--lora {target}: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Generate one test for each claim and problem."""
    if metafunc.module.__name__ == f"{__package__}.test_implementation":
        if CHECKED not in metafunc.config.stash:
            raise pytest.Collector.CollectError("expected --lora MODULE[:OBJECT], the LoRA to check")
        metafunc.parametrize("case", metafunc.config.stash[CHECKED].params())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the report and, on GitHub, an annotation for each unexpected result."""
    checked = config.stash.get(CHECKED, None)
    report = vars(checked).get("report") if checked else None  # it exists only if a test has run
    if isinstance(report, KindReport):
        terminalreporter.section("minilora.conformance")
        for line in [str(report), *(report.annotations() if on_github() else ())]:
            terminalreporter.write_line(line)
