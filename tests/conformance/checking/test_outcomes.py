"""Each claim about each problem has an id that stays, and fails where the claim of the whole does."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import Report, check
from minilora.conformance.checking.contract import ids
from minilora.conformance.checking.kindreport import CANNOT_BE_TOLD, NOT_FAILED
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.kinds import KINDS

from ..implementations import OURS, implementation, with_kinds
from ..planting import planted, report_of

pytestmark = pytest.mark.long

LINEAR = vars(OURS["linear"])


def failing(report):
    return [case.id for case in report.every_case() if case.failed]


def without_bias(problem):
    return not problem.bias


def numbers(has):
    """The numbers of the linear layer's problems that have something."""
    return [number for number, problem in enumerate(KINDS["linear"].problems) if has(problem)]


def test_the_ids_are_known_before_the_check():
    ours = with_kinds(**OURS)
    report = check(ours)
    assert [case.id for case in report.every_case()] == ids(ours)
    assert len(set(ids(ours))) == len(ids(ours))


def test_an_id_has_the_kind_the_number_and_the_claim():
    found = ids(SimpleNamespace(kinds={"conv2d": None}))
    assert found[:5] == ["linear-0-forward", "linear-0-scaling", "linear-0-slope", "linear-0-merge", "linear-1-forward"]
    assert found[-11:] == [
        *(
            "conv2d-6-merge",
            "conv2d-merged-and-back",
            "conv2d-start",
            "conv2d-adam",
            "conv2d-frozen-base",
            "conv2d-nothing-is-changed",
        ),
        *("conv2d-memory-order", "conv2d-more-axes", "conv2d-no-rows", "conv2d-alpha-of-0", "conv2d-row-of-zeros"),
    ]


@pytest.mark.parametrize("bug", BUGS[::12], ids=lambda bug: bug.flag)
def test_a_claim_fails_where_one_of_its_cases_does(bug):
    report = report_of(*planted(bug))
    broken = {claim for claim, verdict in report.claims.items() if verdict not in (*NOT_FAILED, CANNOT_BE_TOLD)}
    assert {case.claim for case in report.cases if case.failed} == broken
    assert broken


def test_nothing_fails_of_what_is_right():
    assert failing(check(with_kinds(**OURS))) == []


def test_a_bug_at_rank_1_fails_there_alone():
    def forward(x, weight, bias, A, *more):
        return LINEAR["forward"](x, weight, bias, A, *more) + (len(A) == 1)

    report = check(implementation(forward=forward))
    (number,) = numbers(lambda problem: problem.rank == 1)
    assert failing(report) == [f"linear-{number}-forward"]
    (case,) = [case for case in report.cases if case.failed]
    assert case.problem == str(KINDS["linear"].problems[number])
    assert case.verdict.startswith("the output is off by ")


def test_a_function_that_raises_fails_where_it_does():
    def backward(dy, x, weight, bias, *more):
        return LINEAR["backward"](dy, x, weight, bias + 0, *more)

    report = check(implementation(backward=backward))
    assert failing(report) == [f"linear-{number}-slope" for number in numbers(without_bias)]
    assert all("backward raises TypeError" in case.verdict for case in report.cases if case.failed)


def test_a_gradient_that_is_missing_on_some_problems_fails():
    def backward(dy, x, weight, bias, *more):
        grads = LINEAR["backward"](dy, x, weight, bias, *more)
        return grads if bias is not None else {name: grads[name] for name in ("x", "lora_B")}

    report = check(implementation(backward=backward))
    assert not report.passed
    assert failing(report) == [f"linear-{number}-slope" for number in numbers(without_bias)]
    (text,) = report.diagnoses
    assert text == ("backward returns no gradient of lora_A, wherever there is no bias, "
                    f"({KINDS['linear'].problems[1]})")  # fmt: skip
    assert report.claims["slope"] == text


def test_a_gradient_that_is_missing_everywhere_fails_everywhere():
    def backward(*arrays):
        return {name: grad for name, grad in LINEAR["backward"](*arrays).items() if name != "lora_A"}

    assert failing(check(implementation(backward=backward))) == [
        f"linear-{number}-slope" for number in numbers(lambda problem: True)
    ]


def test_a_missing_dx_is_no_failure():
    def backward(*arrays):
        return {name: grad for name, grad in LINEAR["backward"](*arrays).items() if name != "x"}

    report = check(implementation(backward=backward))
    assert report.passed, str(report)
    assert failing(report) == []


def test_what_is_kept_between_calls_fails_at_the_first_problem():
    left = []

    def forward(x, *arrays):
        left.append(x)
        return LINEAR["forward"](x, *arrays)

    def backward(dy, x, *arrays):
        return LINEAR["backward"](dy, left[-1], *arrays)

    assert failing(check(implementation(forward=forward, backward=backward))) == ["linear-0-slope"]


def test_a_wrong_scaling_fails_where_it_can_be_told():
    def forward(x, weight, bias, A, B, alpha):
        return LINEAR["forward"](x, weight, bias, A, B, alpha if len(A) > 1 else 2 * alpha)

    report = check(SimpleNamespace(forward=forward))
    (number,) = numbers(lambda problem: problem.rank == 1)
    assert failing(report) == [f"linear-{number}-forward", f"linear-{number}-scaling"]


def test_an_output_that_is_wrong_otherwise_has_no_scaling():
    report = check(SimpleNamespace(forward=lambda x, *arrays: LINEAR["forward"](x, *arrays) + 1))
    assert {case.verdict for case in report.cases if case.claim == "scaling"} == {CANNOT_BE_TOLD}
    assert {case.claim for case in report.cases if case.failed} == {"forward"}


def test_what_is_not_offered_has_cases_too():
    report = check(SimpleNamespace(forward=LINEAR["forward"]))
    offered = {case.claim for case in report.cases if case.verdict == "ok"}
    assert offered == {"forward", "scaling", "nothing is changed", "memory order", "more axes", "no rows"}
    assert {case.verdict for case in report.cases if case.claim not in offered} == {"not offered", "refused"}
    assert {case.claim for case in report.cases if case.problem} == set(KINDS["linear"].of_problems)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["forward"], "; 1 of 5 functions offered"),
        (["forward", "backward", "merge"], "; 3 of 5 functions offered"),
        (list(LINEAR), "; 5 of 5 functions offered"),
    ],
)
def test_the_verdict_counts_the_functions_that_are_offered(names, said):
    report = check(SimpleNamespace(**{name: LINEAR[name] for name in names}), name="mine")
    assert str(report).splitlines()[0] == f"mine: passed, in float64{said}"
    assert repr(report) == str(report)  # what a prompt and a notebook show


def test_a_further_kind_has_four_functions():
    report = check(SimpleNamespace(forward=LINEAR["forward"], kinds={"rslora": OURS["rslora"]}), name="mine")
    assert "mine, rslora: passed, in float64; 4 of 4 functions offered" in str(report).splitlines()


def test_a_report_survives_json():
    report = check(with_kinds(linear=implementation(merge=lambda weight, *arrays: weight + np.nan), dora=OURS["dora"]))
    assert Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False))) == report
