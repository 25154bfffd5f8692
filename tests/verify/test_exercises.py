"""The graders accept what is right, and tell each mistake by its own hint."""

import re
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, exercises
from minilora.exercises import Hint

RIGHT = {
    "check_loss_gradient": lambda p, t: 2 * (p - t) / p.size,
    "check_grad_B": lambda dy, h, s: s * dy.T @ h,
    "check_grad_h": lambda dy, B, s: s * dy @ B,
    "check_grad_A": lambda dh, x: dh.T @ x,
}


def backward(dy, x, A, B, alpha):
    """The answer to step 5, from the layer itself: the graders do not use it."""
    layer = LoRA(A, B, alpha)
    dx, grads = layer.backward(dy, layer.forward(x)[1])
    return dx, grads["lora_A"], grads["lora_B"]


def with_part(index, change):
    def wrong(dy, x, A, B, alpha):
        parts = list(backward(dy, x, A, B, alpha))
        parts[index] = change(parts[index], dy=dy, x=x, A=A, B=B, s=alpha / len(A))
        return tuple(parts)

    return wrong


@pytest.mark.parametrize("grader", RIGHT)
def test_the_right_answer_is_accepted(grader):
    assert "is right" in getattr(exercises, grader)(RIGHT[grader])


def test_the_layer_itself_answers_the_last_step():
    assert "rebuilt" in exercises.check_backward(backward)


WRONG = [
    # step 1
    ("check_loss_gradient", lambda p, t: 2 * (p - t) / len(p), "wrong mean: .*not N$"),
    ("check_loss_gradient", lambda p, t: 2 * (p - t) / p.shape[1], "wrong mean: .*not out$"),
    ("check_loss_gradient", lambda p, t: 2 * (p - t), "no mean"),
    ("check_loss_gradient", lambda p, t: (p - t) / p.size, "factor of 2"),
    ("check_loss_gradient", lambda p, t: 2 * (t - p) / p.size, "sign"),
    ("check_loss_gradient", lambda p, t: (p - t) ** 2 / p.size, "this is the loss"),
    (
        "check_loss_gradient",
        lambda p, t: ((p - t) ** 2).mean(),
        r"wrong shape: dy must be \(7, 3\), you returned a float64",
    ),
    ("check_loss_gradient", lambda p, t: 2 * (p - t).sum(axis=0) / p.size, r"wrong shape: .*\(7, 3\).*shape \(3,\)"),
    # step 2
    ("check_grad_B", lambda dy, h, s: dy.T @ h, "alpha/r is missing"),
    ("check_grad_B", lambda dy, h, s: s * s * dy.T @ h, "alpha/r twice"),
    ("check_grad_B", lambda dy, h, s: s * h.T @ dy, r"transposed: .*wrong shape.*\(3, 2\).*\(2, 3\)"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h, "missing transpose: .*ValueError"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h.T, "wrong transpose"),
    ("check_grad_B", lambda dy, h, s: s * h @ dy, "swapped factors, and a missing transpose"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / len(dy), "wrong mean: .*twice"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h + 1, "wrong values"),
    ("check_grad_B", lambda dy, h, s: None, "returned None"),
    ("check_grad_B", lambda dy, h, s: dy.T @ unknown, "NameError"),  # noqa: F821
    # step 3
    ("check_grad_h", lambda dy, B, s: dy @ B, "alpha/r is missing"),
    ("check_grad_h", lambda dy, B, s: s * dy @ B.T, "transpose too many"),
    ("check_grad_h", lambda dy, B, s: s * dy.T @ B, "dy is not transposed"),
    ("check_grad_h", lambda dy, B, s: s * B @ dy, "swapped factors"),
    ("check_grad_h", lambda dy, B, s: s * (dy @ B).T, "transposed: .*wrong shape"),
    ("check_grad_h", lambda dy, B, s: s * dy @ B / len(dy), "wrong mean"),
    # step 4
    ("check_grad_A", lambda dh, x: dh @ x, "a missing transpose"),
    ("check_grad_A", lambda dh, x: dh @ x.T, "wrong transpose"),
    ("check_grad_A", lambda dh, x: x.T @ dh, "swapped factors: .*wrong shape"),
    ("check_grad_A", lambda dh, x: x @ dh, "swapped factors, and a missing transpose"),
    ("check_grad_A", lambda dh, x: dh.T @ x / len(x), "wrong mean"),
    # step 5
    ("check_backward", with_part(2, lambda dB, s, **_: dB / s), "dB: alpha/r is missing"),
    ("check_backward", with_part(2, lambda dB, A, **_: dB * len(A)), "dB: alpha where alpha/r"),
    ("check_backward", with_part(2, lambda dB, dy, x, A, s, **_: s * dy.T @ (x @ A)), "dB: h = x A.T: a missing"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA / s), "dA: alpha/r is missing"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA * s), "dA: alpha/r twice"),
    ("check_backward", with_part(1, lambda dA, **_: dA.T), "dA: transposed"),
    ("check_backward", with_part(1, lambda dA, x, **_: dA / len(x)), "dA: wrong mean"),
    ("check_backward", with_part(0, lambda dx, s, **_: dx / s), "dx: alpha/r is missing"),
    ("check_backward", with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ A @ B), "dx: swapped factors"),
    ("check_backward", with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ B @ A.T), "dx: a transpose too many"),
    ("check_backward", lambda dy, x, A, B, alpha: dy, "return 3 arrays.*shape"),
    ("check_backward", lambda *args: backward(*args)[:2], "return 3 arrays.*2 values"),
    ("check_backward", lambda *args: backward(*args)[::-1], "wrong shape: dx must be"),
]


@pytest.mark.parametrize(("grader", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_own_hint(grader, answer, hint):
    with pytest.raises(Hint, match=f"(?s){hint}"):
        getattr(exercises, grader)(answer)


@pytest.mark.parametrize("grader", RIGHT)
def test_an_answer_that_is_off_by_a_millionth_is_refused(grader):
    with pytest.raises(Hint, match="wrong values"):
        getattr(exercises, grader)(lambda *args: RIGHT[grader](*args) * (1 + 1e-6))


def test_an_answer_that_changes_its_argument_is_told_so():
    def in_place(dy, h, s):
        dy *= s
        return dy.T @ h

    with pytest.raises(Hint, match="changed its argument dy in place"):
        exercises.check_grad_B(in_place)


def test_the_solutions_on_the_page_are_right():
    page = (Path(__file__).parents[2] / "docs" / "exercises.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\} ipython3\n---\n(.*?)\n---\n(.*?)^```", page, re.S | re.M)
    solutions = [code for options, code in cells if "tags: [hide-cell]" in options]
    graders = [name for name in vars(exercises) if name.startswith("check_")]
    assert [re.search(r"exercises\.(check_\w+)", code)[1] for code in solutions] == graders
    for code in solutions:
        exec(code, {"np": np, "exercises": exercises})
