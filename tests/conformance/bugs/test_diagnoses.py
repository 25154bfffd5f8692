"""Which bugs are named: one, two of them at once, one on top of another."""

import pytest

from minilora.conformance import check
from minilora.conformance.bugs.table import known
from minilora.conformance.problems.reference import SCALINGS

from ..implementations import from_formulas


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
        f"{known('alpha-is-not-divided-by-the-rank').name}{where} (made in rasbt/LLMs-from-scratch #821"
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
