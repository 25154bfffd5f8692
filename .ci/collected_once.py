"""mutmut, with the tests collected once: a mutant's process begins where they are, and ends with the first that fails.

    python collected_once.py PROCESSES [--known] [--sample COUNT SEED]

Of the tests that reach the mutated function, those run first that ended other mutants of that function; then the quick
ones, a module after another, so that what they share is made once. No verdict depends on the order. Without `--known`,
none runs where a mutant is on the list of those that survive with a reason. Of a sample the others are not tried.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import mutmut.__main__ as mutmut
from _pytest.config import _prepareconfig
from _pytest.main import Session
from mutation import described, known_survivors
from mutmut.configuration import config
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.runners.harness import TestRunner
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import mangled_name_from_mutant_name
from mutmut.workers.isolation import ForkRunner, run_in_fork, run_in_fork_with_result

SLOW = 0.05
"""Seconds. Up to here a module's tests stay together."""
KILLERS = 4
"""How many tests that ended other mutants of a function run before all others."""
FOLDER = "mutants"
LEFT_OUT = "left_out.txt"
"""The tests that fail without a mutant, as what reads the site or starts a process may do here."""


class CollectedOnce(TestRunner):
    """What mutmut asks to run tests. No test runs in this process, so that each fork begins with what is collected."""

    def __init__(self, *, spare_known: bool) -> None:
        self.spared = set(spared()) if spare_known else set()
        settings = config()
        options = ["--rootdir=.", "--capture=sys", "-p", "no:terminal", *settings.pytest_add_cli_args]
        with change_cwd(FOLDER):
            pytest = _prepareconfig([*options, *settings.pytest_add_cli_args_test_selection])
            self.session = Session.from_config(pytest)
            pytest._do_configure()
            pytest.hook.pytest_sessionstart(session=self.session)
            pytest.hook.pytest_collection(session=self.session)
        self.items: dict[str, Any] = {item.nodeid: item for item in self.session.items}
        self.folder, self.left_out = Path(FOLDER).absolute(), Path(LEFT_OUT)
        self.killers = Path("killers").absolute()
        self.killers.mkdir(exist_ok=True)

    def run(self, names: Iterable[str]) -> Iterable[str]:
        """Run tests, and yield the name of each that passed; the first that fails is the last."""
        os.chdir(self.folder)
        items = [self.items[name] for name in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.session.testsfailed:
                return
            yield item.nodeid

    def run_stats(self, *, tests: Iterable[str]) -> int:
        """Run all tests without a mutant: how long each takes, and which functions it calls."""

        def measured() -> tuple[dict[str, float], dict[str, set[str]]]:
            seconds: dict[str, float] = {}
            callers: dict[str, set[str]] = defaultdict(set)
            began, names = perf_counter(), list(self.items)
            while names:
                for name in self.run(names):
                    began, seconds[name] = perf_counter(), perf_counter() - began
                    for function in state()._stats:
                        callers[function].add(name)
                    state()._stats.clear()
                names = names[sum(name in seconds for name in names) + 1 :]  # behind the one that fails
                self.session.testsfailed = 0
            return seconds, callers

        seconds, callers = run_in_fork_with_result(measured)
        self.left_out.write_text("\n".join(self.items.keys() - seconds), encoding="utf-8")
        state().duration_by_test.update(seconds)
        state().tests_by_mangled_function_name.update(callers)
        return 0

    def run_forced_fail(self) -> int:
        """Run all tests where each function that has mutants raises an error."""
        return run_in_fork(lambda: int(len([*self.run(self.items)]) < len(self.items)))

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        """Run a mutant's tests, in a process of its own that mutmut has made."""
        if mutant_name is None or mutant_name in self.spared:  # without a mutant all have passed, in `run_stats`
            return 0
        took = state().duration_by_test
        names = sorted(tests, key=lambda name: (took[name] > SLOW, str(self.items[name].path), took[name]))
        killers = self.killers / mangled_name_from_mutant_name(mutant_name)
        latest = killers.read_text(encoding="utf-8").splitlines()[::-1] if killers.exists() else []
        first = [name for name in dict.fromkeys(latest) if name in took][:KILLERS]
        names = list(dict.fromkeys([*first, *names]))
        passed = len([*self.run(names)])
        if passed == len(names):
            return 0
        with killers.open("a", encoding="utf-8") as file:
            file.write(f"{names[passed]}\n")
        return 1


def described_mutant(name: str, path: Path) -> str:
    """Return a mutant as the list has it."""
    return described(name, get_diff_for_mutant(name, path=path))


def sampled(collect: Any, count: int, seed: str) -> Any:
    """Return what mutmut collects mutants with, for that many of them, which are drawn among those not on the list.

    No fork can tell a mutant of a function that runs while modules are imported alone: these are not drawn.
    """

    def collected(**more: Any) -> tuple[list[tuple[SourceFileMutationData, str, int | None]], Any]:
        mutants, by_path = collect(**more)
        reached = state().tests_by_mangled_function_name
        mutants = [mutant for mutant in mutants if reached.get(mangled_name_from_mutant_name(mutant[1]))]
        mutants.sort(key=lambda mutant: mutant[1])
        Random(seed).shuffle(mutants)
        known = known_survivors()
        unknown = (mutant for mutant in mutants if described_mutant(mutant[1], mutant[0].path) not in known)
        return list(islice(unknown, count)), by_path

    return collected


def spared() -> Iterator[str]:
    """Yield the mutants that are on the list."""
    known = known_survivors()
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        yield from (name for name in data.exit_code_by_key if described_mutant(name, path) in known)


if __name__ == "__main__":
    runner = partial(CollectedOnce, spare_known=not {"--known", "--sample"} & {*sys.argv})
    if "--sample" in sys.argv:
        drawn = sys.argv[sys.argv.index("--sample") + 1 :]
        mutmut.collect_source_file_mutation_data = sampled(
            mutmut.collect_source_file_mutation_data, int(drawn[0]), drawn[1]
        )
    mutmut.get_mutant_runner = lambda processes=1: ForkRunner(processes, runner())
    mutmut.cli(["run", "--max-children", sys.argv[1]])
