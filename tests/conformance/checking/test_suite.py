"""The suite's world: each row of each kind is named; a scaling that no row has is measured."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.checking.kindreport import CANNOT_BE_TOLD
from minilora.conformance.checking.suite import in_digits_that_differ, suite_of
from minilora.conformance.naming import name, off
from minilora.conformance.problems.bugs import bugs_of, known
from minilora.conformance.problems.formulas import SCALINGS
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import Trial

from ...support.sample import one_in
from ..implementations import PLAIN, from_formulas, report_of


def trials_of(kind, dtype):
    """A kind's problems, drawn anew: of those that are kept the world is kept too."""
    return tuple(Trial.draw(problem, dtype, KINDS[kind].formulas) for problem in KINDS[kind].problems)


def answers_by(row, trial):
    """What a row's mistake gives: where it does not show, the right answers."""
    parts = row.replaced_in(trial.problem)
    wrong = trial.answer(**parts) if parts else trial.right
    return {key: wrong.get(key) if not row.shows or key in row.shows else right for key, right in trial.right.items()}


def same(trials, row, other):
    """Whether two rows give the same numbers wherever the first one shows."""
    return all(off(array, answers_by(other, t)[key], t.allowed(t.size(**other.replaced_in(t.problem))[key])) <= 1
               for t in trials for key, array in answers_by(row, t).items())  # fmt: skip


FEW = ("linear", "conv1d", "combine")
"""The kinds of the default run; the others take longer."""
LONG = [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS if kind not in FEW]


@pytest.mark.parametrize("kind", [*FEW, *LONG])
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.long)])
def test_every_row_of_every_kind_is_named_alone(kind, dtype):
    """Formulas planted against themselves: this is about the namer, and the evidence for a row is planted by hand."""
    trials = trials_of(kind, "float32" if kind in ("nf4", "mixed") else dtype)
    for row in bugs_of(kind):
        given = [answers_by(row, trial) for trial in trials]
        wrong, named = name(suite_of(kind, trials), given)
        flags = [one.flag for one in named]
        assert len(flags) == bool(wrong), (row.flag, flags)
        twin = known(flags[0]) if flags else row
        assert twin is row or ((twin.count, twin.flag) < (row.count, row.flag) and same(trials, row, twin)), row.flag


@pytest.mark.parametrize(
    ("shows", "where"),
    [
        (("y", "x", "lora_A", "lora_B"), ", only in the output, dx, lora_A's gradient and lora_B's gradient"),
        (("y",), ", only in the output"),
        (None, ", in everything that is computed"),
    ],
)
def test_where_a_bug_shows_is_told(shows, where):
    bug = known("alpha-is-not-divided-by-the-rank")
    (text,) = check(from_formulas("linear", bug.parts, shows=shows)).diagnoses
    assert text == f"{bug.says}{where} (made in {bug.source})"


@pytest.mark.parametrize(
    ("parts", "flags"),
    [
        ({"dx_base": 0.0, "s_in_dB": lambda s: 1.0}, ["dx-lacks-dy-w", "lora-b-gradient-lacks-the-scaling-alpha-r"]),
        ({"dx_base": 0.0, "scaling": SCALINGS["alpha"]}, ["alpha-is-not-divided-by-the-rank", "dx-lacks-dy-w"]),
    ],
)
def test_two_bugs_are_both_named(parts, flags):
    assert [one.flag for one in check(from_formulas("linear", parts)).found] == flags


@pytest.mark.parametrize(
    ("parts", "shows", "flag"),
    [
        ({"bias": lambda b, G: 0 * b}, ("y",), "the-output-lacks-the-bias"),
        ({"dx_base": 0.0}, ("x",), "dx-lacks-dy-w"),
    ],
)
def test_two_bugs_in_one_number_are_named_together(parts, shows, flag):
    both = from_formulas("linear", parts | {"scaling": SCALINGS["alpha"]}, shows=shows)
    (one,) = check(both).found
    assert one.flag == f"alpha-is-not-divided-by-the-rank+{flag}"
    first, second = known("alpha-is-not-divided-by-the-rank"), known(flag)
    assert one.source == ", ".join(filter(None, (first.source, second.source)))
    where = {"y": "the output", "x": "dx"}[shows[0]]
    assert one.says == f"{first.says} and, at the same time, {second.says}, only in {where}"
    assert "+" not in "".join(
        one.flag for one in check(both, dtype="bfloat16").found
    )  # there two of many fit by chance


SLOTS = ("the-last-slots-update-is-left-out", "slots-of-one-width-are-exchanged")


@pytest.mark.parametrize("flag", one_in(2, SLOTS, SLOTS))
def test_a_bug_under_a_condition_is_named_there(flag):
    bug = known(flag)
    wrong = from_formulas("fused", lambda fused: bug.replaced_in(fused) if len(fused.widths) == 3 else {})
    (one,) = report_of("fused", "float32", **vars(wrong)).found
    made = [i for i, problem in enumerate(KINDS["fused"].problems) if len(problem.widths) == 3]
    assert one.says.endswith(f" problems, those with three slots: {bug.says}, in everything that is computed")
    assert {id.split("-")[1] for id in one.cases} <= {str(i) for i in made}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flag_is_of_one_row_of_all(kind):
    trials = trials_of(kind, "float32")
    world = suite_of(kind, trials)
    flags = [row.flag for row in (*world.table, *world.last)]
    assert len({*flags}) == len(flags)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", flag) for flag in flags)


def test_what_is_allowed_is_of_the_problem_and_parts():
    first, second = trials_of("linear", "float64")[:2]
    world = suite_of("linear", (first, second))
    large, none = {"scaling": lambda alpha, r: 1e6}, {}
    for trial, parts in ((first, none), (first, large), (second, large), (second, none)):
        allowed = world.allowed(trial.problem, "y", parts)
        assert np.array_equal(allowed, trial.allowed(trial.size(**parts)["y"]))
    assert (trial.size(scaling=lambda alpha, r: 0.0)["y"] >= trial.sizes["y"]).all()  # never less than of the right one


# --- a scaling that no row has --------------------------------------------------------------------

OTHER = (
    "the update has a different scaling: 1.2 at in=5 out=3 r=2 alpha=3, expected 1.5; 2.22222 at in=3 out=6 r=4 "
    "alpha=10, expected 2.5; 0.142857 at in=8 out=2 r=3 alpha=0.5, expected 0.166667"
)


def scaled(scaling, **more):
    return from_formulas("linear", {"scaling": scaling, **more})


def test_a_scaling_may_be_declared():
    plain = scaled(SCALINGS["alpha"])
    assert not check(plain).passed
    plain.scaling = "alpha"
    assert check(plain).passed
    wrong = check(scaled(lambda alpha, r: alpha / (r + 0.5)))
    assert wrong.claims["scaling"] == "the update is multiplied by 1.2, expected 1.5 (N=7 in=5 out=3 r=2 alpha=3)"
    (one,) = wrong.found
    assert (one.says, one.flag, one.source) == (f"{OTHER}, in everything that is computed", "another-scaling", "")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("rslora", "the update is multiplied by 1.2, expected 2.12132 (N=7 in=5 out=3 r=2 alpha=3)"),
        ("dora", CANNOT_BE_TOLD),  # whose length has it too
    ],
)
def test_another_scaling_is_told_beside_the_declared_one(kind, said):
    wrong = from_formulas(kind, {"scaling": lambda alpha, r: alpha / (r + 0.5)})
    report = report_of(kind, **vars(wrong))
    assert report.claims["scaling"] == said
    assert ("another-scaling" in [one.flag for one in report.found]) == (kind == "rslora")


def test_another_scaling_is_told_where_it_is_another():
    def forward(x, weight, bias, *arrays):
        return x @ weight.T if bias is None else PLAIN.forward(x, weight, bias, *arrays)

    report = check(SimpleNamespace(forward=forward))
    (text,) = report.diagnoses
    says = "the update has a different scaling, where there is no bias: 0 at in=3 out=6 r=4 alpha=10, expected 2.5; "
    assert text == f"{says}0 at in=4 out=9 r=5 alpha=2.5, expected 0.5"
    where = "(N=4 in=3 out=6 r=4 alpha=10; where there is no bias)"
    assert report.claims["scaling"] == f"the update is multiplied by 0, expected 2.5 {where}"


HOW = {
    "it is 1.25 times the right one": (
        lambda alpha, r: 1.25 * alpha / r,
        "1.875 at in=5 out=3 r=2 alpha=3, expected 1.5; 3.125 at in=3 out=6 r=4 alpha=10, expected 2.5; "
        "0.208333 at in=8 out=2 r=3 alpha=0.5, expected 0.166667",
    ),
    "it is -1 times the right one": (
        lambda alpha, r: -alpha / r,
        "-1.5 at in=5 out=3 r=2 alpha=3, expected 1.5; -2.5 at in=3 out=6 r=4 alpha=10, expected 2.5; "
        "-0.166667 at in=8 out=2 r=3 alpha=0.5, expected 0.166667",
    ),
    "it is the right one rounded to float16": (
        lambda alpha, r: float(np.float16(alpha / r)),
        "0.166626 at in=8 out=2 r=3 alpha=0.5, expected 0.166667; 2.66602 at in=2 out=3 r=6 alpha=16, "
        "expected 2.66667; 1.41211 at in=130 out=69 r=17 alpha=24, expected 1.41176",
    ),
    "it is the right one in single precision": (
        lambda alpha, r: float(np.float32(1) / np.float32(r)) * alpha,
        "0.166666672 at in=8 out=2 r=3 alpha=0.5, expected 0.166666667; 0.50000001 at in=4 out=9 r=5 alpha=2.5, "
        "expected 0.5; 2.66666675 at in=2 out=3 r=6 alpha=16, expected 2.66666667",
    ),
    "it is the first problem's everywhere (is something kept between calls?)": (
        lambda alpha, r: 1.5,
        "1.5 at in=3 out=6 r=4 alpha=10, expected 2.5; 1.5 at in=8 out=2 r=3 alpha=0.5, expected 0.166667; "
        "1.5 at in=6 out=6 r=4 alpha=7, expected 1.75",
    ),
}


@pytest.mark.parametrize("how", HOW)
def test_how_another_scaling_comes_from_the_right_one_is_told(how):
    scaling, cases = HOW[how]
    (text,) = check(scaled(scaling)).diagnoses
    assert text == f"the update has a different scaling: {cases}; {how}, in everything that is computed"


@pytest.mark.parametrize(("count", "rule"), [(1, ""), (2, "; it is 1.25 times the right one")])
def test_of_one_problem_no_rule_is_told(count, rule):
    """A further one has no answer."""
    trials = trials_of("linear", "float64")[: count + 1]
    given = [*(trial.answer(scaling=lambda alpha, r: 1.25 * alpha / r) for trial in trials[:-1]), {}]
    _, (one,) = name(suite_of("linear", trials), given)
    cases = ["1.875 at in=5 out=3 r=2 alpha=3, expected 1.5", "3.125 at in=3 out=6 r=4 alpha=10, expected 2.5"][:count]
    assert one.says == f"the update has a different scaling: {'; '.join(cases)}{rule}, in everything that is computed"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scaling_is_measured_in_lower_precision_too(dtype):
    (one,) = check(scaled(lambda alpha, r: alpha / (r + 0.5)), dtype=dtype).found
    assert one.flag == "another-scaling"


def test_a_scaling_beside_another_bug_is_named_with_it():
    found = check(scaled(lambda alpha, r: alpha / (r + 0.5), dx_base=0.0)).found
    bug = known("dx-lacks-dy-w")
    assert [(one.says, one.flag) for one in found] == [(OTHER, "another-scaling"), (bug.says, bug.flag)]


def test_two_scalings_have_the_digits_at_which_they_differ():
    assert in_digits_that_differ(1.5, 1.25) == ("1.5", "1.25")
    assert in_digits_that_differ(1.0, 1 + 1e-14) == ("1", "1.00000000000001")


def test_the_rule_of_an_output_is_told_beside_right_gradients():
    """Where lora_B is zero the scaling is measured in its gradient, and is right there."""
    wrong = from_formulas("linear", {"scaling": lambda alpha, r: 1.25 * alpha / r}, shows=("y",))
    assert check(wrong).diagnoses[0].endswith("; it is 1.25 times the right one, only in the output")
