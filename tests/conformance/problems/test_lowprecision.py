"""Float32 factors on a bfloat16 base: wrong roundings written by hand are named, and other right ones pass."""

import numpy as np
import pytest

from minilora.conformance.problems.bugs import known
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import round_to
from minilora.files.dtypes import FLOATS, cast

from ..implementations import OURS, report_of


def half(array):
    return round_to(np.asarray(array, np.float32), "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_judge_rounds_to_bfloat16_as_files_do(dtype):
    """For each upper half of a float32, check both ends, the midpoint to the next number, and its neighbours."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    bits = np.concatenate([upper + lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    with np.errstate(invalid="ignore"):
        numbers = bits.view(np.float32).astype(dtype)
    if dtype == "float64":
        numbers = np.concatenate([numbers * (1 + 2.0**-40), [1e300, -1e300, 1 + 2.0**-8 + 2.0**-30]])
    rounded = round_to(numbers, "bfloat16")
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, cast(numbers, FLOATS["BF16"]).astype(np.float32))
    kept = np.signbit(rounded) == np.signbit(numbers)
    assert kept[~np.isnan(numbers)].all()


def update(x, A, B, s):
    return s * (x @ A.T @ B.T)


def beside(update, rounded=half):
    """Return a forward that rounds the base after each step and adds a given update."""

    def forward(x, weight, bias, A, B, alpha):
        y = half(x @ weight.T)
        y = y if bias is None else half(y + bias)
        return rounded(y + update(x, A, B, np.float32(alpha / len(A))))

    return {"forward": forward}


def bias_last(x, weight, bias, A, B, alpha):
    y = half(x @ weight.T) + update(x, A, B, np.float32(alpha / len(A)))
    return half(y if bias is None else y + bias)


def rounded_merge(weight, A, B, alpha):
    return half(weight + half(np.float32(alpha / len(A)) * (B @ A)))


def rounded_gradients(*arrays):
    return {name: half(grad) for name, grad in OURS["mixed"].backward(*arrays).items()}


def autocast(x, A, B, s):
    return half(s * half(half(x @ half(A).T) @ half(B).T))


KEPT = beside(update, rounded=np.asarray)
WRONG = {
    "mixed-the-update-is-rounded-before-the-sum": beside(lambda *arrays: half(update(*arrays))),
    "mixed-the-factors-are-rounded": beside(lambda x, A, B, s: update(x, half(A), half(B), s)),
    "mixed-lora-a-is-rounded": beside(lambda x, A, B, s: update(x, half(A), B, s)),
    "mixed-lora-b-is-rounded": beside(lambda x, A, B, s: update(x, A, half(B), s)),
    "mixed-the-adapter-computes-in-bfloat16": beside(autocast),
    "mixed-the-gradients-are-rounded": {"forward": OURS["mixed"].forward, "backward": rounded_gradients},
    "mixed-the-output-is-float32": KEPT,
    "the-output-lacks-the-update": beside(lambda *arrays: 0 * update(*arrays)),
    "alpha-is-not-divided-by-the-rank": beside(lambda x, A, B, s: update(x, A, B, s * len(A))),
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_rounding_is_named(flag):
    report, bug = report_of("mixed", **WRONG[flag]), known(flag)
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(bug.says)
    assert bug.source in text


def test_reading_low_bits_first_equals_swapping_the_halves():
    problem = KINDS["nf4"].problems[3]
    packed = problem.full["packed"]
    swapped = problem.weight(packed=packed >> 4 | packed << 4)
    np.testing.assert_array_equal(problem.weight(low_first=True), swapped)
    assert not np.array_equal(problem.weight(), swapped)
    flat = problem.flatten({**problem.full, "packed": packed >> 4 | packed << 4})
    np.testing.assert_array_equal(flat["weight"], swapped)
    assert flat.keys() == {"weight", "bias"}


RIGHT = {
    "the base rounded after each step": beside(update),
    "the bias added last": {"forward": bias_last},
    "only the output rounded": {"forward": lambda *arrays: half(OURS["linear"].forward(*arrays))},
    "the change and the sum rounded": {"forward": OURS["mixed"].forward, "merge": rounded_merge},
    "dx and the merged weight not rounded": vars(OURS["linear"]) | {"forward": OURS["mixed"].forward},
    "an output in float32, declared": KEPT | {"output": "float32"},
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_right_rounding_passes(name, dtype):
    report = report_of("mixed", dtype, **RIGHT[name])
    assert report.passed, str(report)
    assert report.dtype == "float32"


def test_a_declared_float32_output_must_be_float32():
    wrong = report_of("mixed", forward=OURS["mixed"].forward, output="float 32")
    text = 'the output is rounded to bfloat16, but the implementation declares output = "float32"'
    assert wrong.claims["output dtype"] == text
