"""The table of bugs: each row is named where it is planted, whatever the order of the table."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilora.conformance.problems import bugs as table
from minilora.conformance.problems.bugparts import outputs_up_to_128, rows_up_to_128, swap_height_and_width
from minilora.conformance.problems.bugs import BUGS, NUMERIC_CLAIMS
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn

from ..implementations import planted, report_of

OTHERS = [bug for bug in BUGS if bug.breaks not in (*NUMERIC_CLAIMS, "row of zeros")]


@pytest.mark.parametrize("bug", OTHERS, ids=lambda bug: bug.flag)
def test_a_bug_of_a_claim_without_numbers_is_named(bug):
    """Bugs of the other claims are planted in `test_suite`, and by hand in `test_slips`."""
    kind, functions = planted(bug)
    report = report_of(kind, **functions)
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(bug.says)
    assert bug.source in text
    assert report.claims[bug.breaks] != "ok"


FLAGS = Path(__file__).with_name("flags.txt").read_text(encoding="utf-8").split()
"""The flags of minilora 0.3. Programs store them, so they stay even if their sentences change."""


def test_flags_and_sentences_are_unique_and_flags_stay():
    assert len(FLAGS) == 81
    assert set(FLAGS) <= {bug.flag for bug in BUGS}
    assert len({bug.flag for bug in BUGS}) == len({bug.says for bug in BUGS}) == len(BUGS)
    assert [bug.flag for bug in BUGS if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", bug.flag)] == []


NUMBERS = Path(__file__).with_name("numbers.txt")
"""Each bug's flag with its `number_of`, recorded because tests that plant a bug use its own formulas."""


def logarithm(arrays):
    return np.log(1 + sum((np.abs(a).ravel() * np.arange(1, a.size + 1)).sum() for a in arrays.values()))


def number_of(bug):
    """Return one number for all answers of a bug: a sum of logarithms over the problems in which it shows."""
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


def test_the_live_page_has_the_sentences_of_the_table():
    pairs = re.findall(r'label: "(.*)",\n +flag: "(.*)"', LIVE.read_text(encoding="utf-8"))
    assert len(pairs) == 3
    for label, flag in pairs:
        assert table.known(flag).says.startswith(label)


@pytest.mark.parametrize(("part", "size"), [(rows_up_to_128, "n"), (outputs_up_to_128, "out_features")])
def test_what_fits_into_a_tile_is_not_changed(part, size):
    """A row that replaces nothing in a problem is no evidence there; one more row or output is beyond the tile."""
    problem = KINDS["linear"].problems[0]
    assert part(replace(problem, **{size: 128})) == {}
    assert part(replace(problem, **{size: 129})) != {}


def test_kernels_that_are_not_square_stay_as_they_are():
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
    """The order of the table does not matter. Without a bias, scaling the base equals scaling base and bias."""
    row = table.known(flag)
    row = replace(row, kinds=("embedding",) if row.breaks == "forward" else row.kinds)
    twins = [replace(row, flag=letter, says=f"twin {letter}") for letter in "ba"]
    monkeypatch.setattr(table, "BUGS", (*twins, *BUGS)[::order])
    kind, functions = planted(row)
    (text,) = report_of(kind, **functions).diagnoses
    assert text.startswith("twin a")
