"""The tolerance: verdicts and named bugs do not depend on the order in which a processor sums."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import Trial

from ...support.sample import one_in
from ..implementations import ORDERS, OURS, implementation, lora, product

LINEAR = vars(OURS["linear"])


def merged_first(factor):
    """Return a forward that applies a scaling through the merged weight."""

    def forward(x, weight, bias, A, B, alpha):
        y = x @ (weight + factor(alpha, len(A)) * (B @ A)).T
        return y if bias is None else y + bias

    return SimpleNamespace(forward=forward)


IN_ORDER = [*((order, "float64") for order in ORDERS), ("positive first", "float32")]


@pytest.mark.parametrize(("order", "dtype"), one_in(6, IN_ORDER, map(" in ".join, IN_ORDER)))
def test_a_right_layer_passes_in_every_order_of_summation(order, dtype):
    report = check(lora(product(ORDERS[order])), dtype=dtype)
    assert report.passed, str(report)


@pytest.mark.parametrize("kind", ["dora", "dora-full"])
def test_positive_terms_first_stay_within_doras_tolerance(kind):
    """This is the gradient of the magnitude, with all of its terms in one sum."""
    for problem in KINDS[kind].problems:
        trial = Trial.draw(problem, "float64", KINDS[kind].formulas)
        p, s = trial.arrays, problem.alpha / problem.rank
        V = p["weight"] + s * p["lora_B"] @ p["lora_A"]
        n = np.sqrt((V * V).sum(axis=1))
        terms = np.einsum("no,ni,oi->oni", p["dy"], p["x"], V).reshape(len(V), -1) / n[:, None]
        assert trial.agrees("magnitude", np.cumsum(ORDERS["positive first"](terms), axis=-1)[:, -1])


def test_the_tolerance_of_long_sums_still_sees_small_errors():
    (long,) = (problem for problem in KINDS["linear"].problems if problem.in_features > 1000)
    trial = Trial.draw(long, "float64", KINDS["linear"].formulas)
    assert not trial.agrees("y", trial.right["y"] * (1 + 1e-11))


def test_the_sign_of_a_part_does_not_change_the_tolerance():
    trial = Trial.draw(KINDS["linear"].problems[0], "float64", KINDS["linear"].formulas)
    positive, negative = (trial.size(bias=lambda b, G, t=times: t * b)["y"] for times in (3, -3))
    np.testing.assert_array_equal(positive, negative)
    assert (positive > trial.sizes["y"]).all()
    np.testing.assert_array_equal(*(trial.size(dx_base=times)["x"] for times in (3.0, -3.0)))


def test_an_answer_without_a_term_must_be_zero():
    trial, zero = Trial.draw(KINDS["linear"].problems[0], "float64", KINDS["linear"].formulas), {"y": np.zeros(2)}
    empty = replace(trial, right=zero, sizes=zero)
    assert empty.agrees("y", zero["y"])
    assert not empty.agrees("y", np.array([0.0, 1e-9]))


LARGE = {
    "alpha is divided by the square root of the rank": lambda alpha, r: alpha / r**0.5,
    "the scaling is r / alpha": lambda alpha, r: r / alpha,
    "the scaling is alpha r": lambda alpha, r: alpha * r,
    "the update has a different scaling: 150 at": lambda alpha, r: 100 * alpha / r,
    "the update has a different scaling: 20 at": lambda alpha, r: 20.0,
    "the update has a different scaling: -15 at": lambda alpha, r: -10 * alpha / r,
}


SUMMED = [
    *((lambda factor, order=order: lora(product(ORDERS[order]), factor), dtype)
      for order, dtype in (("positive first", "float64"), ("last to first", "float32"))),
    (merged_first, "float64"),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("summed", "dtype"), SUMMED, ids=["positive first", "last to first", "merged first"])
@pytest.mark.parametrize("said", LARGE)
def test_a_scaling_is_named_in_every_order_of_summation(said, summed, dtype):
    report = check(summed(LARGE[said]), dtype=dtype)
    assert report.diagnoses[0].startswith(said)
    if summed is not merged_first:
        assert report.diagnoses[0].partition(" (made in")[0].endswith("in everything that is computed")
    assert report.claims["scaling"].startswith("the update is multiplied by ")


def noisy(found, trial, units):
    """Return answers moved by a number of units of rounding, up and down alternately."""
    signs = {name: np.resize([1.0, -1.0], a.shape) for name, a in found.items()}
    return {name: a + units * trial.unit * trial.sizes[name] * signs[name] for name, a in found.items()}


@pytest.mark.parametrize("units", [0, 12])
def test_a_named_bug_wins_over_a_measured_one(units):
    bug = next(bug for bug in BUGS if bug.flag == "alpha-is-divided-by-the-root-of-the-rank")
    trials = [Trial.draw(problem, "float64", KINDS["linear"].formulas) for problem in KINDS["linear"].problems]

    def forward(x, weight, bias, A, B, alpha):
        trial = next((t for t in trials if np.array_equal(t.arrays["x"], x)), None)
        if trial is None:  # another call of the suite
            return LINEAR["forward"](x, weight, bias, A, B, alpha)
        return noisy({"y": trial.answer(**bug.parts)["y"]}, trial, units)["y"]

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(bug.says)


def shuffled(factor, seed=0):
    """Return a LoRA that sums in a new order in each call, as atomic additions on a GPU do."""
    rng = np.random.default_rng(seed)

    def forward(x, weight, bias, A, B, alpha):
        order = rng.permutation(x.shape[1])
        x, weight, A = x[:, order], weight[:, order], A[:, order]
        y = product(ORDERS["first to last"])(x, weight.T) + factor * (alpha / len(A)) * (x @ A.T) @ B.T
        return y if bias is None else y + bias

    return SimpleNamespace(forward=forward)


@pytest.mark.parametrize("factor", [1, 100, 1e8])
def test_a_new_order_in_each_call_is_no_dropout(factor):
    report = check(shuffled(factor))
    assert report.passed is (factor == 1)
    assert "dropout" not in str(report)
    if factor > 1:
        assert report.diagnoses[0].startswith("the update has a different scaling")


@pytest.mark.parametrize(("units", "passed"), [(0.8 * 32, True), (1.2 * 32, False)])
def test_two_answers_may_differ_by_the_rounding_of_both(units, passed):
    trial = Trial.draw(KINDS["linear"].problems[0], "float64", KINDS["linear"].formulas)
    calls = []

    def forward(x, *layer):
        calls.append(x)
        again = sum(np.array_equal(x, before) for before in calls) == 2
        return noisy(trial.right, trial, units)["y"] if again else LINEAR["forward"](x, *layer)

    report = check(SimpleNamespace(forward=forward))
    assert report.passed is passed, str(report)


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_dropout_is_reported(kept):
    rng = np.random.default_rng(0)

    def forward(x, weight, bias, A, B, alpha):
        mask = (rng.random(x.shape) < kept) / kept
        y = x @ weight.T + 100 * ((x * mask) @ A.T) @ B.T
        return y if bias is None else y + bias

    assert check(SimpleNamespace(forward=forward)).diagnoses[0].endswith("is dropout on?")


@pytest.mark.parametrize("off", [1e-14, 1e-12])
def test_a_small_error_is_not_reported_as_single_precision(off):
    def forward(*arrays):
        return LINEAR["forward"](*arrays) * (1 + off)

    report = check(implementation(forward=forward))
    assert not report.passed
    assert "single precision" not in str(report)
