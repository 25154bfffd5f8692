"""Which bugs are named: one, two of them at once, one on top of another."""

import pytest

from minilora.conformance import check
from minilora.conformance.problems.bugs import known
from minilora.conformance.problems.formulas import SCALINGS
from minilora.conformance.problems.kinds import KINDS

from .implementations import from_formulas
from .planting import report_of


@pytest.mark.parametrize(
    ("shows", "where"),
    [
        (("y", "x", "lora_A", "lora_B"), ", in the output, dx, lora_A's gradient and lora_B's gradient alone"),
        (("y",), ", in the output alone"),
        (("merged",), ", in the merged weight alone"),
        (None, ", in all that is computed"),
    ],
)
def test_where_a_bug_shows_is_told(shows, where):
    wrong = from_formulas("linear", {"scaling": SCALINGS["alpha"]}, shows=shows)
    (text,) = check(wrong).diagnoses
    assert text.startswith(
        f"{known('alpha-is-not-divided-by-the-rank').says}{where} (made in rasbt/LLMs-from-scratch #821"
    )


def test_two_bugs_at_once_are_both_named():
    one = from_formulas("linear", {"dx_base": 0.0, "s_in_dB": lambda s: 1.0})
    assert [text[:25] for text in check(one).diagnoses] == ["dx lacks dy W: the base p", "lora_B's gradient lacks t"]


def test_a_bug_on_top_of_another_is_named():
    both = from_formulas("linear", {"dx_base": 0.0, "scaling": SCALINGS["alpha"]})
    first, second = check(both).diagnoses
    assert first.startswith("alpha is not divided by the rank")
    assert second.startswith("dx lacks dy W")


def test_two_bugs_in_one_number_are_named_together():
    both = from_formulas("linear", {"bias": lambda b, G: 0 * b, "scaling": SCALINGS["alpha"]}, shows=("y",))
    (text,) = check(both).diagnoses
    assert text.startswith("alpha is not divided by the rank")
    assert "and, at once, the output lacks the bias" in text


def test_both_of_two_bugs_have_their_sources():
    both = from_formulas("linear", {"dx_base": 0.0, "scaling": SCALINGS["alpha"]}, shows=("x",))
    (text,) = check(both).diagnoses
    assert "and, at once, dx lacks dy W" in text
    assert text.endswith(" (made in rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846, lora-pytorch 0.2.0)")
    assert "at once" not in str(check(both, dtype="bfloat16"))  # there two of many fit by chance


@pytest.mark.parametrize("flag", ["slots-of-one-width-are-exchanged", "the-last-slots-update-is-left-out"])
def test_a_bug_under_a_condition_is_named_where_it_shows(flag):
    bug = known(flag)
    wrong = from_formulas("fused", lambda fused: bug.of(fused) if len(fused.widths) == 3 else {})
    report = report_of("fused", wrong)
    first = report.diagnoses[0]
    assert first.endswith(f", those of three slots: {bug}, in all that is computed")
    count = len(KINDS["fused"].problems)
    assert first.startswith(f"on {sum(len(p.widths) == 3 for p in KINDS['fused'].problems)} of {count} problems")
    assert not any("is off by" in text for text in report.diagnoses)


def test_a_bug_where_no_property_decides_is_named_with_how_often_it_shows():
    bug, problems = known("the-output-lacks-the-bias"), [p for p in KINDS["linear"].problems if p.bias]
    sizes = {(p.in_features, p.out_features, p.rank) for p in (problems[0], problems[2])}

    def parts(problem):
        return bug.parts if (problem.in_features, problem.out_features, problem.rank) in sizes else {}

    report = report_of("linear", from_formulas("linear", parts, shows=bug.shows or None))
    total = len(KINDS["linear"].problems)
    count = sum((p.in_features, p.out_features, p.rank) in sizes for p in problems)
    assert 1 < count < len(problems)
    assert report.diagnoses[0].startswith(f"on {count} of {total} problems, those where it shows: {bug.says}")


@pytest.mark.parametrize("flag", ["the-first-slots-rank-for-all-slots", "the-first-slots-alpha-for-all-slots"])
def test_of_the_first_slots_scaling_each_half_is_told_apart(flag):
    bug = known(flag)
    (first,) = report_of("fused", from_formulas("fused", bug.parts)).diagnoses
    assert first == f"{bug.says}, in all that is computed"
