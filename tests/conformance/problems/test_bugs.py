"""Each row of the table is named where it is planted, wherever in the table it stands."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilora.conformance.problems import bugs as table
from minilora.conformance.problems.bugparts import swap_height_and_width
from minilora.conformance.problems.bugs import BUGS, NUMERIC_CLAIMS
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn

from ..implementations import planted, report_of

OTHERS = [bug for bug in BUGS if bug.breaks not in (*NUMERIC_CLAIMS, "row of zeros")]


@pytest.mark.parametrize("bug", OTHERS, ids=lambda bug: bug.flag)
def test_a_bug_of_a_claim_without_numbers_is_named(bug):
    """Those of numbers are planted in `test_suite`, and by hand in `test_slips`."""
    kind, functions = planted(bug)
    report = report_of(kind, **functions)
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(bug.says)
    assert bug.source in text
    assert report.claims[bug.breaks] != "ok"


FLAGS = Path(__file__).with_name("flags.txt").read_text(encoding="utf-8").split()
"""Those that minilora 0.3 has. Programs keep them, so they stay, whatever sentence comes to stand beside them."""


def test_a_flag_and_a_sentence_stand_once_and_stay():
    assert len(FLAGS) == 81
    assert set(FLAGS) <= {bug.flag for bug in BUGS}
    assert len({bug.flag for bug in BUGS}) == len({bug.says for bug in BUGS}) == len(BUGS)
    assert [bug.flag for bug in BUGS if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", bug.flag)] == []


NUMBERS = Path(__file__).with_name("numbers.txt")
"""Each bug's flag and what `number_of` gives: where a bug is planted, the suite itself makes its answers."""


def logarithm(arrays):
    return np.log(1 + sum((np.abs(a).ravel() * np.arange(1, a.size + 1)).sum() for a in arrays.values()))


def number_of(bug):
    """The sum, over the problems in which a bug shows, of the logarithm of its answers, each times its place."""
    kind = KINDS[bug.kinds[0]]
    pairs = ((drawn(p, "float64", kind.formulas), parts) for p in kind.problems if (parts := bug.replaced_in(p)))
    return sum(logarithm(trial.answer(**parts)) for trial, parts in pairs)


def test_a_known_bug_keeps_its_numbers(request):
    found = {bug.flag: number_of(bug) for bug in BUGS if bug.breaks in NUMERIC_CLAIMS}
    if request.config.getoption("approve"):
        NUMBERS.write_text("".join(f"{flag} {number:.4f}\n" for flag, number in found.items()), encoding="utf-8")
    lines = NUMBERS.read_text(encoding="utf-8").splitlines()
    expected = {flag: float(number) for flag, number in map(str.split, lines)}
    assert found.keys() == expected.keys(), "--approve writes the line of a new bug"
    assert {flag: found[flag] for flag in found if abs(found[flag] - expected[flag]) > 1e-3} == {}


LIVE = Path(__file__).parents[3] / "docs" / "_static" / "live" / "mistakes.js"


def test_the_live_pages_mistakes_have_the_tables_sentences():
    pairs = re.findall(r'label: "(.*)",\n +flag: "(.*)"', LIVE.read_text(encoding="utf-8"))
    assert len(pairs) == 3
    for label, flag in pairs:
        assert table.known(flag).says.startswith(label)


def test_kernels_with_two_unlike_sides_stay_as_they_lie():
    kernels = np.arange(12.0).reshape(1, 2, 2, 3)
    assert swap_height_and_width(kernels) is kernels
    np.testing.assert_array_equal(swap_height_and_width(kernels[..., 1:]), kernels[..., 1:].swapaxes(2, 3))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "flag",
    ["the-scaling-multiplies-the-base-too", "adam-corrects-no-bias-of-v", "a-starts-with-the-fan-of-the-rank",
     "an-alpha-of-0-is-taken-for-1"],
)  # fmt: skip
def test_of_rows_with_the_same_numbers_the_alphabet_decides(monkeypatch, flag, order):
    """Wherever they stand. Without a bias, a scaling of the base is that of the base and the bias too."""
    row = table.known(flag)
    row = replace(row, kinds=("embedding",) if row.breaks == "forward" else row.kinds)
    twins = [replace(row, flag=letter, says=f"twin {letter}") for letter in "ba"]
    monkeypatch.setattr(table, "BUGS", (*twins, *BUGS)[::order])
    kind, functions = planted(row)
    (text,) = report_of(kind, **functions).diagnoses
    assert text.startswith("twin a")
