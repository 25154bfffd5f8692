"""What no known bug explains is described: where in the array it is wrong, its order, what its sums lack."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.checking.describing import pattern
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import Trial, drawn, round_to

from ..implementations import OURS, from_formulas, implementation

pytestmark = pytest.mark.long

LINEAR = vars(OURS["linear"])


def first_line(**functions):
    report = check(implementation(**functions))
    assert not report.passed
    return report.diagnoses[0]


def half(array, name="float16"):
    return round_to(array, name).astype(np.float64)


def forward_with(change):
    """A forward whose arguments are changed: x, weight, A, B and alpha."""

    def forward(x, weight, bias, A, B, alpha):
        x, weight, A, B, alpha = change(x, weight, A, B, alpha)
        return LINEAR["forward"](x, weight, bias, A, B, alpha)

    return forward


def tail_of(axis, first, state):
    """A forward that is right up to a place along an axis."""

    def forward(x, weight, bias, *more):
        y, base = LINEAR["forward"](x, weight, bias, *more), x @ weight.T + (0 if bias is None else bias)
        tail = (slice(None),) * axis + (slice(first, None),)
        y[tail] = {"zero": 0, "without the update": base[tail], "wrong": y[tail] + 1}[state]
        return y

    return forward


@pytest.mark.parametrize(
    ("axis", "first", "word", "state"),
    [
        (0, 64, "row", "zero"),
        (1, 64, "output", "without the update"),
        (1, 9, "output", "wrong"),
        (0, 64, "row", "wrong"),
    ],
)
def test_a_tail_is_told(axis, first, word, state):
    text = first_line(forward=tail_of(axis, first, state))
    assert f"; it is right up to {word} {first - 1}, and {state} from {word} {first} on (" in text


def q_k_v(n):
    """Three parts of n places, the second and the third exchanged."""
    third = n // 3
    return np.r_[0:third, 2 * third : 3 * third, third : 2 * third, 3 * third : n]


def test_a_permuted_update_is_told():
    """The update's rows of q, k and v in another order, as in fused weights."""

    def forward(x, weight, bias, A, B, alpha):
        return LINEAR["forward"](x, weight, bias, A, B[q_k_v(len(B))], alpha)

    assert "; its update's outputs are the right ones in another order: 0, 2, 1 (" in first_line(forward=forward)


def test_a_permuted_gradient_is_told():
    def backward(*arrays):
        grads = LINEAR["backward"](*arrays)
        return {**grads, "lora_B": grads["lora_B"][::-1]}

    assert "; its outputs are the right ones in another order: 2, 1, 0 (" in first_line(backward=backward)


PARTS = {
    "it sums the first 4 of 5 inputs only (": lambda x, W, A, B, alpha: (x[:, :-1], W[:, :-1], A[:, :-1], B, alpha),
    "it sums the last 3 of 5 inputs only (": lambda x, W, A, B, alpha: (
        *(a[:, a.shape[1] // 2 :] for a in (x, W, A)), B, alpha),
    "it sums the first 2 of 5 inputs only in the update (": lambda x, W, A, B, alpha: (
        x, W, A * (np.arange(A.shape[1]) < A.shape[1] // 2), B, alpha),
    "it sums the first 128 of 130 inputs only (": lambda x, W, A, B, alpha: (
        *(a[:, : len(a[0]) - len(a[0]) % 64 if 100 < len(a[0]) < 1000 else None] for a in (x, W, A)), B, alpha),
    "the factors are rounded to float16 (": lambda x, W, A, B, alpha: (x, W, half(A), half(B), alpha),
    "the factors are rounded to bfloat16 (": lambda x, W, A, B, alpha: (
        x, W, half(A, "bfloat16"), half(B, "bfloat16"), alpha),
    "lora_A is rounded to float16 (": lambda x, W, A, B, alpha: (x, W, half(A), B, alpha),
    "lora_B is rounded to bfloat16 (": lambda x, W, A, B, alpha: (x, W, A, half(B, "bfloat16"), alpha),
    "the ranks of lora_B stand in another order than those of lora_A: 1, 0 (": lambda x, W, A, B, alpha: (
        x, W, np.roll(A, len(A) // 2, axis=0), B, alpha),
    "the ranks of lora_B stand in another order than those of lora_A: 3, 0, 1, 2 (": lambda x, W, A, B, alpha: (
        x, W, A, np.roll(B, 1, axis=1) if len(A) > 2 else B, alpha),
    "it sums the first 1 of 2 ranks only (": lambda x, W, A, B, alpha: (x, W, A, B * (np.arange(len(A)) < 1), alpha),
    "it sums the last 1 of 2 ranks only (": lambda x, W, A, B, alpha: (x, W, A, B * (np.arange(len(A)) > 0), alpha),
    "the weight is rounded to float16 (": lambda x, W, A, B, alpha: (x, half(W), A, B, alpha),
}  # fmt: skip


@pytest.mark.parametrize("said", PARTS)
def test_what_a_sum_lacks_is_told(said):
    assert f"; {said}" in first_line(forward=forward_with(PARTS[said]))


@pytest.mark.parametrize("kept", [slice(None, -1), slice(1, None)], ids=["all but the last", "all but the first"])
def test_a_gradient_over_some_rows_is_told(kept):
    def backward(dy, x, *layer):
        if len(x) < 2:
            return LINEAR["backward"](dy, x, *layer)
        grads = LINEAR["backward"](dy[kept], x[kept], *layer)
        return {**LINEAR["backward"](dy, x, *layer), "lora_A": grads["lora_A"]}

    said = "first 6 of 7" if kept.stop else "last 6 of 7"
    assert f"; it sums the {said} rows only (" in first_line(backward=backward)


def test_what_small_problems_do_not_show_is_told():
    """At 7 rows a missing half is too short to be told, at 67 it is not."""

    def backward(dy, x, *layer):
        grads = LINEAR["backward"](dy, x, *layer)
        return {**grads, "x": grads["x"] * (np.arange(len(x)) < len(x) // 2)[:, None]}

    said = first_line(backward=backward)
    assert "; it is right up to row 32, and zero from row 33 on (N=67 " in said


@pytest.mark.parametrize(
    ("name", "said", "update"),
    [
        ("float16", "x A^T is", lambda x, A, B, s, name: s * half(x @ A.T, name) @ B.T),
        ("bfloat16", "x A^T is", lambda x, A, B, s, name: s * half(x @ A.T, name) @ B.T),
        ("float16", "the update is", lambda x, A, B, s, name: s * half(x @ A.T @ B.T, name)),
        ("bfloat16", "the update is", lambda x, A, B, s, name: half(s * (x @ A.T @ B.T), name)),
    ],
)
def test_half_precision_on_the_way_is_told(name, said, update):
    def forward(x, weight, bias, A, B, alpha):
        y = x @ weight.T + update(x, A, B, alpha / len(A), name)
        return y if bias is None else y + bias

    assert f"; {said} rounded to {name} (" in first_line(forward=forward)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_a_merge_in_half_precision_is_told(name):
    def merge(*arrays):
        return half(LINEAR["merge"](*arrays), name)

    assert f"; it is rounded to {name} (" in first_line(merge=merge)


def test_a_scaling_that_is_rounded_in_the_merge_is_told():
    def merge(weight, A, B, alpha):
        return weight + half(np.array(alpha / len(A))) * (B @ A)

    assert "; the scaling is rounded to float16 (N=1 in=8 out=2 r=3 alpha=0.5)" in first_line(merge=merge)


@pytest.mark.parametrize("kind", ["embedding", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_noise_has_no_pattern(kind, dtype):
    rng = np.random.default_rng(0)
    for problem in KINDS[kind].problems:
        trial = drawn(problem, dtype, KINDS[kind].formulas)
        for name, right in trial.right.items():
            noise = rng.standard_normal(right.shape)
            for found in (right + noise, right * (1 + 1e-3 * noise)):
                assert trial.agrees(name, found) or pattern(name, found, trial) == ""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["embedding", "dora", "dora-full", "conv1d", "conv2d"])
def test_an_order_is_told_in_every_kind(kind):
    wrong = from_formulas(kind)

    def forward(*arrays, **steps):
        return right(*arrays, **steps)[:, ::-1]

    def of_steps(*arrays, stride, padding, dilation, groups):
        return forward(*arrays, stride=stride, padding=padding, dilation=dilation, groups=groups)

    right, wrong.forward = wrong.forward, of_steps if kind.startswith("conv") else forward
    declared = kind.removesuffix("-full")
    report = check(SimpleNamespace(forward=LINEAR["forward"], kinds={declared: wrong})).kinds[declared]
    assert "; its outputs are the right ones in another order: " in report.diagnoses[0]


def test_half_precision_itself_has_no_pattern():
    trial = Trial.draw(KINDS["linear"].problems[9], "bfloat16", KINDS["linear"].formulas)
    assert pattern("y", trial.right["y"][::-1], trial) == ""


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (lambda b, n: np.roll(b, 1), "the bias is taken at a wrong index: its outputs have the entries 2, 0, 1"),
        (lambda b, n: b[0], "the bias is taken at a wrong index: its outputs have the entries 0, 0, 0"),
        (
            lambda b, n: b[np.arange(n) % len(b)][:, None],
            "the bias is taken by the row and not by the output: its rows have the entries 0, 1, 2, 0, 1, 2, 0",
        ),
    ],
)
def test_a_wrong_index_of_the_bias_is_told(taken, said):
    def forward(x, weight, bias, A, B, alpha):
        y = x @ weight.T + alpha / len(A) * x @ A.T @ B.T
        return y if bias is None else y + taken(bias, len(x))

    assert said in first_line(forward=forward)
