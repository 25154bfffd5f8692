"""float32 beside bfloat16: what may be rounded passes, what may not is named."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn, round_to

from ..implementations import OURS

RIGHT, SINGLE = OURS["mixed"], OURS["linear"]


def half(array):
    return round_to(np.asarray(array, np.float32), "bfloat16")


def report_of(implementation, **more):
    return check(SimpleNamespace(forward=SINGLE.forward, kinds={"mixed": implementation}), **more).kinds["mixed"]


def forward_with(update, rounded=half):
    """A forward whose base is rounded after each step, and whose update is given."""

    def forward(x, weight, bias, A, B, alpha):
        y = half(x @ weight.T)
        y = y if bias is None else half(y + bias)
        return rounded(y + update(x, A, B, np.float32(alpha / len(A))))

    return forward


def update(x, A, B, s):
    return s * (x @ A.T @ B.T)


def with_bias_last(x, weight, bias, A, B, alpha):
    y = half(x @ weight.T) + update(x, A, B, np.float32(alpha / len(A)))
    return half(y if bias is None else y + bias)


def test_the_base_may_be_rounded_or_not():
    for forward in (forward_with(update), with_bias_last, lambda *arrays: half(SINGLE.forward(*arrays))):
        assert report_of(SimpleNamespace(forward=forward)).passed


def test_a_merge_may_round_the_change_and_then_the_sum():
    def merge(weight, A, B, alpha):
        return half(weight + half(np.float32(alpha / len(A)) * (B @ A)))

    report = report_of(SimpleNamespace(forward=RIGHT.forward, merge=merge))
    assert report.passed, str(report)


def test_dx_and_the_merged_weight_may_be_float32():
    report = report_of(SimpleNamespace(forward=RIGHT.forward, backward=SINGLE.backward, merge=SINGLE.merge))
    assert report.passed, str(report)


def test_it_is_checked_beside_bfloat16_whatever_precision_is_asked_for():
    for dtype in (None, "float64", "bfloat16"):
        assert report_of(RIGHT, dtype=dtype).dtype == "float32"


def test_the_factors_are_float32_and_the_rest_bfloat16():
    for problem in KINDS["mixed"].problems:
        arrays = drawn(problem, "float32", KINDS["mixed"].formulas).arrays
        for name in ("x", "dy", "weight", "bias"):
            assert name not in arrays or np.array_equal(half(arrays[name]), arrays[name])
        assert not np.array_equal(half(arrays["lora_A"]), arrays["lora_A"])


def test_where_they_cancel_the_base_is_exact():
    """Each partial sum of the base is an integer up to 256, in whatever order; the update takes it away up to 1/2."""
    for problem in (problem for problem in KINDS["mixed"].problems if problem.near):
        trial = drawn(problem, "float32", KINDS["mixed"].formulas)
        p = trial.arrays
        assert (np.abs(p["x"]) @ np.abs(p["weight"]).T + np.abs(p["bias"])).max() <= 256
        assert np.abs(trial.right["y"]).max() <= 0.5 - 1e-6  # so no BLAS rounds to another integer
        assert np.abs(update(p["x"], p["lora_A"], p["lora_B"], problem.alpha / problem.rank)).max() > 50


WRONG = {
    "the update is rounded to bfloat16 before": lambda x, A, B, s: half(update(x, A, B, s)),
    "lora_A and lora_B are rounded": lambda x, A, B, s: update(x, half(A), half(B), s),
    "lora_A is rounded": lambda x, A, B, s: update(x, half(A), B, s),
    "lora_B is rounded": lambda x, A, B, s: update(x, A, half(B), s),
    "the adapter computes in bfloat16": lambda x, A, B, s: half(s * half(half(x @ half(A).T) @ half(B).T)),
    "the output lacks the update": lambda x, A, B, s: 0 * update(x, A, B, s),
    "alpha is not divided by the rank": lambda x, A, B, s: update(x, A, B, s * len(A)),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_update_in_a_lower_precision_is_named(said):
    report = report_of(SimpleNamespace(forward=forward_with(WRONG[said])))
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(said)


def test_another_rounding_of_the_update_is_told_where_it_shows():
    float16 = forward_with(lambda x, A, B, s: update(x, A, B, s).astype(np.float16).astype(np.float32))
    (text,) = report_of(SimpleNamespace(forward=float16)).diagnoses
    assert text.startswith("the output, where the update cancels the base's output, is off by ")


def test_gradients_that_are_rounded_are_named():
    def backward(*arrays):
        return {name: half(grad) for name, grad in RIGHT.backward(*arrays).items()}

    (text,) = report_of(SimpleNamespace(forward=RIGHT.forward, backward=backward)).diagnoses
    assert text.startswith("the gradients of lora_A and lora_B are rounded to bfloat16")


def test_an_output_in_float32_must_be_declared():
    kept = forward_with(update, rounded=np.asarray)
    report = report_of(SimpleNamespace(forward=kept))
    assert report.claims["output dtype"].startswith("the output is not rounded to bfloat16")
    assert report.diagnoses == [report.claims["output dtype"]]
    assert report_of(SimpleNamespace(forward=kept, output="float32")).passed
    wrong = report_of(SimpleNamespace(forward=RIGHT.forward, output="float 32"))
    assert wrong.claims["output dtype"] == "the output is rounded to bfloat16, and output declares float32"
    with pytest.raises(CannotRun, match=r"output of .* must be"):
        report_of(SimpleNamespace(forward=kept, output="float64"))


@pytest.mark.parametrize("rounded", [lambda dy, B, s: s * half(dy @ B), lambda dy, B, s: half(half(s * dy) @ B)])
def test_of_dx_it_is_not_said_that_what_is_right_is_rounded(rounded):
    """Its own rounding is as large as that of the factors or the scaling: it agrees with either."""

    def backward(dy, x, weight, bias, A, B, alpha):
        s = np.float32(alpha / len(A))
        right = RIGHT.backward(dy, x, weight, bias, A, B, alpha)
        return right | {"x": half(half(dy @ weight) + rounded(dy, B, s) @ A)}

    said = str(report_of(SimpleNamespace(forward=RIGHT.forward, backward=backward)))
    assert "dx, the gradient at the input is off by" in said
    for what in ("the scaling is rounded", "the factors are rounded", "lora_A is rounded", "lora_B is rounded"):
        assert what not in said
