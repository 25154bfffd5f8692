"""A scaling that no known bug has is measured, and told with the rule that it follows."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.problems.formulas import SCALINGS

from ..implementations import OURS, from_formulas
from ..planting import report_of

LINEAR = vars(OURS["linear"])


def test_a_scaling_may_be_declared():
    plain = from_formulas("linear", {"scaling": SCALINGS["alpha"]})
    assert not check(plain).passed
    plain.scaling = "alpha"
    assert check(plain).passed
    wrong = from_formulas("linear", {"scaling": lambda alpha, r: alpha / (r + 0.5)})
    said = check(wrong).claims["scaling"]
    assert said.startswith("the update is multiplied by 1.2, expected 1.5 (N=7 in=5 out=3 r=2 alpha=3)")
    (text,) = check(wrong).diagnoses
    first = "1.2 at in=5 out=3 r=2 alpha=3, expected 1.5; 2.22222 at in=3 out=6 r=4 alpha=10, expected 2.5; "
    assert text.startswith(f"the update has another scaling: {first}")
    assert text.endswith("in all that is computed")


def test_another_scaling_is_told_beside_the_declared_one():
    report = report_of("rslora", from_formulas("rslora", {"scaling": lambda alpha, r: alpha / (r + 0.5)}))
    assert report.claims["scaling"].startswith("the update is multiplied by 1.2, expected 2.12132 (")
    assert report.diagnoses[0].startswith(
        "the update has another scaling: 1.2 at in=5 out=3 r=2 alpha=3, expected 2.12132;"
    )


def test_another_scaling_is_told_where_it_is_another():
    def forward(x, weight, bias, *arrays):
        return x @ weight.T if bias is None else LINEAR["forward"](x, weight, bias, *arrays)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(
        "the update has another scaling, where there is no bias: 0 at in=3 out=6 r=4 alpha=10, expected 2.5; "
    )


HOW = {
    "it is 1.25 times the right one": lambda alpha, r: 1.25 * alpha / r,
    "it is -1 times the right one": lambda alpha, r: -alpha / r,
    "it is the right one rounded to float16": lambda alpha, r: float(np.float16(alpha / r)),
    "it is the right one in single precision": lambda alpha, r: float(np.float32(1) / np.float32(r)) * alpha,
    "it is that of the first problem everywhere (is something kept between calls?)": lambda alpha, r: 1.5,
}


@pytest.mark.parametrize("how", HOW)
def test_how_another_scaling_comes_from_the_right_one_is_told(how):
    (text,) = check(from_formulas("linear", {"scaling": HOW[how]})).diagnoses
    assert text.startswith("the update has another scaling: ")
    assert text.endswith(f"; {how}, in all that is computed")


def test_a_scaling_without_a_rule_has_none_told():
    (text,) = check(from_formulas("linear", {"scaling": lambda alpha, r: alpha / (r + 1)})).diagnoses
    assert "; it is" not in text


def test_scalings_that_are_nearly_the_right_ones_are_shown_in_digits_that_differ():
    (text,) = check(from_formulas("linear", {"scaling": lambda alpha, r: float(np.float32(alpha / r))})).diagnoses
    pairs = re.findall(r"([\d.e-]+) at in=.*?, expected ([\d.e-]+)", text)
    assert pairs
    assert all(value != expected for value, expected in pairs)
