"""The graders accept what is right, and name each mistake, also where there are several."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, exercises

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


def merged(W, A, B, alpha):
    return W + LoRA(A, B, alpha).delta()


def factors(change, rank):
    U, S, Vt = np.linalg.svd(change)
    return np.diag(S[:rank]) @ Vt[:rank], U[:, :rank]


def smallest(change, rank):
    U, S, Vt = np.linalg.svd(change, full_matrices=False)
    return np.diag(S[-rank:]) @ Vt[-rank:], U[:, -rank:]


RIGHT |= {"check_backward": backward, "check_merged": merged, "check_factors": factors}
RIGHT |= {
    "check_count": lambda n_in, n_out, r: sum(a.size for a in (np.zeros((r, n_in)), np.zeros((n_out, r)))),
    "check_first_to_move": lambda A_zero, B_zero: [n for n, stays in (("A", B_zero), ("B", A_zero)) if not stays],
}


def with_part(index, change):
    def wrong(dy, x, A, B, alpha):
        parts = list(backward(dy, x, A, B, alpha))
        parts[index] = change(parts[index], dy=dy, x=x, A=A, B=B, s=alpha / len(A))
        return tuple(parts)

    return wrong


@pytest.mark.parametrize("grader", RIGHT)
def test_the_right_answer_is_accepted(grader, capsys):
    assert getattr(exercises, grader)(RIGHT[grader]) is True
    assert "right" in capsys.readouterr().out or grader == "check_factors"


WRONG = [
    # step 1
    ("check_loss_gradient", lambda p, t: 2 * (p - t) / len(p), "dy: wrong mean: .*not N$"),
    ("check_loss_gradient", lambda p, t: 2 * (p - t) / p.shape[1], "dy: wrong mean: .*not out$"),
    ("check_loss_gradient", lambda p, t: 2 * (p - t), "no mean"),
    ("check_loss_gradient", lambda p, t: (p - t) / p.size, "factor of 2$"),
    ("check_loss_gradient", lambda p, t: 2 * (t - p) / p.size, "sign"),
    ("check_loss_gradient", lambda p, t: (t - p) / len(p), "not N; and .*factor of 2; and the sign"),
    ("check_loss_gradient", lambda p, t: (p - t) ** 2 / p.size, "this is the loss"),
    ("check_loss_gradient", lambda p, t: ((p - t) ** 2).mean(), r"must be \(11, 5\), you returned a float64"),
    ("check_loss_gradient", lambda p, t: 2 * (p - t).sum(axis=0) / p.size, r"must be \(11, 5\).*shape \(5,\)"),
    # step 2
    ("check_grad_B", lambda dy, h, s: dy.T @ h, "dB: alpha/r is missing"),
    ("check_grad_B", lambda dy, h, s: s * s * dy.T @ h, "dB: alpha/r twice"),
    ("check_grad_B", lambda dy, h, s: -s * dy.T @ h, "dB: the sign"),
    ("check_grad_B", lambda dy, h, s: 2 * s * dy.T @ h, "dB: a factor of 2 too many"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / h.shape[1], "dB: a division by r"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / dy.shape[1], "dB: a division by out"),
    ("check_grad_B", lambda dy, h, s: s * h.T @ dy, r"transposed: .*\n\(wrong shape.*\(5, 3\).*\(3, 5\)\)$"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h, "a missing transpose, of dy"),
    ("check_grad_B", lambda dy, h, s: dy @ h, "a missing transpose, of dy: .*; and alpha/r is missing"),
    ("check_grad_B", lambda dy, h, s: -dy @ h.T, "transpose, of dy and a transpose too many, of h.*missing.*the sign"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h.T, "a transpose too many, of h"),
    ("check_grad_B", lambda dy, h, s: s * h @ dy, "swapped factors and a missing transpose"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / len(dy), "wrong mean: .*twice"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h / len(dy), "a missing transpose.*0.25 times what it should be"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h + 1, "wrong values"),
    ("check_grad_B", lambda dy, h, s: None, "returned None"),
    ("check_grad_B", lambda dy, h, s: "dB", "must be numbers, you returned a str"),
    ("check_grad_B", lambda dy, h, s: [[1, 2], [3]], "must be numbers, you returned 2 values"),
    ("check_grad_B", lambda dy, h, s: dy.T @ h * np.nan, "wrong values"),
    ("check_grad_B", lambda dy, h, s: dy.T @ unknown, "NameError"),  # noqa: F821
    # step 3
    ("check_grad_h", lambda dy, B, s: dy @ B, "alpha/r is missing"),
    ("check_grad_h", lambda dy, B, s: s * dy @ B.T, "a transpose too many, of B"),
    ("check_grad_h", lambda dy, B, s: s * dy.T @ B, "a transpose too many, of dy"),
    ("check_grad_h", lambda dy, B, s: s * B @ dy, "swapped factors"),
    ("check_grad_h", lambda dy, B, s: s * (dy @ B).T, "transposed: .*wrong shape"),
    ("check_grad_h", lambda dy, B, s: s * dy @ B / len(dy), "wrong mean"),
    ("check_grad_h", lambda dy, B, s: s * dy @ B / B.shape[0], "a division by out"),
    # step 4
    ("check_grad_A", lambda dh, x: dh @ x, "a missing transpose, of dh"),
    ("check_grad_A", lambda dh, x: dh @ x.T, "a missing transpose, of dh and a transpose too many, of x"),
    ("check_grad_A", lambda dh, x: x.T @ dh, "transposed: .*wrong shape"),
    ("check_grad_A", lambda dh, x: x @ dh, "swapped factors and a missing transpose"),
    ("check_grad_A", lambda dh, x: dh.T @ x / len(x), "wrong mean"),
    # step 5
    ("check_backward", with_part(2, lambda dB, s, **_: dB / s), "dB: alpha/r is missing"),
    ("check_backward", with_part(2, lambda dB, A, **_: dB * len(A)), "dB: alpha where alpha/r"),
    ("check_backward", with_part(2, lambda dB, dy, x, A, s, **_: s * dy.T @ (x @ A)), "dB: h = x A.T: a missing"),
    ("check_backward", with_part(2, lambda dB, dy, x, B, s, **_: s * dy.T @ (x @ B.T)), "dB: .*h is made with A"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA / s), "dA: alpha/r is missing"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA * s), "dA: alpha/r twice"),
    ("check_backward", with_part(1, lambda dA, **_: dA.T), "dA: transposed"),
    ("check_backward", with_part(1, lambda dA, x, **_: dA / len(x)), "dA: wrong mean"),
    ("check_backward", with_part(0, lambda dx, s, **_: -dx / s), "dx: alpha/r is missing.*; and the sign"),
    ("check_backward", with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ A @ B), "dx: swapped factors"),
    ("check_backward", with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ B @ A.T), "dx: a transpose too many"),
    (
        "check_backward",
        lambda dy, x, A, B, alpha: (
            alpha / len(A) * dy @ B @ A,
            alpha / len(A) * dy @ B @ x,
            backward(dy, x, A, B, alpha)[2],
        ),
        r"dA: a missing transpose, of dh[^\n]*$",
    ),
    ("check_backward", lambda dy, x, A, B, alpha: dy, "return 3 arrays.*shape"),
    ("check_backward", lambda *args: backward(*args)[:2], "return 3 arrays.*2 values"),
    ("check_backward", lambda *args: backward(*args)[::-1], "wrong shape: dx must be"),
    # steps 7 to 10
    ("check_first_to_move", lambda A_zero, B_zero: {"A", "B"}, "A random and B zero: A does not move"),
    ("check_first_to_move", lambda A_zero, B_zero: {"B"}, "A random and B random: A moves, too"),
    ("check_first_to_move", lambda A_zero, B_zero: ["A", "B", 1, "C"], "A random and B random: 1 does not move, and C"),
    ("check_first_to_move", lambda A_zero, B_zero: 1 / 0, "stopped with ZeroDivisionError"),
    ("check_merged", lambda W, A, B, alpha: W + B @ A, "W': alpha/r is missing"),
    ("check_merged", lambda W, A, B, alpha: W + alpha * B @ A, "W': alpha where alpha/r"),
    ("check_merged", lambda W, A, B, alpha: merged(W, A, B, alpha) - W, "the change alone"),
    ("check_merged", lambda W, A, B, alpha: 2 * merged(W, A, B, alpha) - W, "added twice"),
    ("check_merged", lambda W, A, B, alpha: merged(W, A, -B, alpha), "subtracted"),
    ("check_merged", lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T, "transposed"),
    ("check_count", lambda n_in, n_out, r: n_in * n_out, "the full weight"),
    ("check_count", lambda n_in, n_out, r: r * n_in * n_out, "do not multiply"),
    ("check_count", lambda n_in, n_out, r: r * (n_in + n_out) + n_out, "the bias belongs to the base"),
    ("check_count", lambda n_in, n_out, r: r * n_in, "this is A alone"),
    ("check_count", lambda n_in, n_out, r: r * n_out, "this is B alone"),
    ("check_count", lambda n_in, n_out, r: r * (n_in + n_out) + n_in * n_out, "the base is frozen"),
    ("check_count", lambda n_in, n_out, r: n_in + n_out, "this is rank 1"),
    ("check_count", lambda n_in, n_out, r: 7, "write down the shapes"),
    # Where all sizes are 4, these are other counts of the list, and no hint may be taken from there.
    ("check_count", lambda n_in, n_out, r: 2 * r * (n_in + n_out), "write down the shapes"),
    ("check_count", lambda n_in, n_out, r: r * (n_in + n_out) + r * r, "write down the shapes"),
    ("check_count", lambda n_in, n_out, r: r * r, "write down the shapes"),
    ("check_factors", lambda change, r: factors(change, r)[::-1], r"A must be \(2, 7\).*swapped"),
    ("check_factors", lambda change, r: (factors(change, r)[0] * 0, factors(change, r)[1]), "away from the change"),
    ("check_factors", lambda change, r: (np.linalg.svd(change)[2][:r], factors(change, r)[1]), "values are missing"),
    ("check_factors", lambda change, r: smallest(change, r), "the smallest singular values"),
    (
        "check_factors",
        lambda change, r: (factors(change, r)[0], factors(change, r)[1] * np.linalg.svd(change)[1][:r]),
        "squares",
    ),
    (
        "check_factors",
        lambda change, r: factors(np.multiply(change, 2, out=change), r),
        "changed its argument in place",
    ),
    ("check_factors", lambda change, r: (change, change), r"array of shape \(5, 7\) and an array of shape \(5, 7\)$"),
    ("check_factors", lambda change, r: change, "return 2 arrays"),
    (
        "check_factors",
        lambda change, r: ([[1, 2], [3]], factors(change, r)[1]),
        "must be numbers, you returned 2 values",
    ),
    ("check_factors", lambda change, r: (factors(change, r)[0], "B"), "must be numbers, you returned a str"),
]


@pytest.mark.parametrize(("grader", "answer", "hint"), WRONG)
def test_a_wrong_answer_gets_its_own_hint(grader, answer, hint, capsys):
    assert getattr(exercises, grader)(answer) is False
    assert re.match(f"(?s)Not yet. .*{hint}", capsys.readouterr().out.strip())


SCALES = {
    "alpha/r is missing": lambda s, N, out: 1 / s,
    "the sign": lambda s, N, out: -1,
    "a factor of 2": lambda s, N, out: 2,
    "wrong mean": lambda s, N, out: 1 / N,
    "a division by out": lambda s, N, out: 1 / out,
}


@pytest.mark.parametrize("two", list(combinations(SCALES, 2)), ids=" and ".join)
def test_two_wrong_factors_are_both_named(two, capsys):
    def wrong(dy, h, s):
        return RIGHT["check_grad_B"](dy, h, s) * np.prod([SCALES[name](s, *dy.shape) for name in two])

    assert not exercises.check_grad_B(wrong)
    said = capsys.readouterr().out
    assert [name in said for name in SCALES] == [name in two for name in SCALES]


@pytest.mark.parametrize("grader", ["check_loss_gradient", "check_grad_B", "check_grad_h", "check_grad_A"])
def test_an_answer_off_by_a_millionth_is_refused(grader, capsys):
    assert not getattr(exercises, grader)(lambda *args: RIGHT[grader](*args) * (1 + 1e-6))
    assert "1.000001 times" in capsys.readouterr().out


def test_an_answer_that_changes_its_argument_is_told_so(capsys):
    def in_place(dy, h, s):
        dy *= s
        return dy.T @ h

    assert not exercises.check_grad_B(in_place)
    assert "changed its argument dy in place" in capsys.readouterr().out


def test_how_far_two_factors_are_is_told(capsys):
    seen = []
    assert not exercises.check_factors(lambda change, r: seen.append(change) or (np.zeros((2, 7)), np.zeros((5, 2))))
    off = np.linalg.norm(seen[0])
    least = (off**2 - (np.linalg.svd(seen[0], compute_uv=False)[:2] ** 2).sum()) ** 0.5
    assert f"B A is {off:.3g} away from the change; {least:.3g} is possible" in capsys.readouterr().out


PREDICTIONS = {
    "first step": 0.01,
    "larger gradients": 1,
    "larger alpha": 2,
    "larger alpha, plain steps": 4,
    "off by one": 50,
}


@pytest.mark.parametrize("question", PREDICTIONS)
def test_a_prediction_is_right_or_gets_a_hint(question, capsys):
    assert exercises.check_prediction(question, PREDICTIONS[question])
    _, _, why, hint = exercises.QUESTIONS[question]
    said = capsys.readouterr().out
    assert said.startswith("Right: the experiment gives")
    assert said.endswith(f" {why}\n")
    assert hint not in said
    assert not exercises.check_prediction(question, 1.5 * PREDICTIONS[question])
    assert str(PREDICTIONS[question]) not in capsys.readouterr().out.split("comes out.")[1].replace("(22) to (24)", "")


def test_every_question_is_asked():
    assert PREDICTIONS.keys() == exercises.QUESTIONS.keys()
    with pytest.raises(ValueError, match=r"question must be .* got 'second step'"):
        exercises.check_prediction("second step", 1)
    with pytest.raises(TypeError, match="guess must be a number, got 'one'"):
        exercises.check_prediction("first step", "one")


def test_the_solutions_on_the_page_are_right(capsys):
    page = (Path(__file__).parents[2] / "docs" / "exercises.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\} ipython3\n---\n(.*?)\n---\n(.*?)^```", page, re.S | re.M)
    solutions = [code for options, code in cells if "tags: [hide-cell]" in options]
    graders = [name for name, f in vars(exercises).items() if getattr(f, "__module__", "") == exercises.__name__]
    graders = [name for name in graders if name.startswith("check_")]
    assert [re.search(r"exercises\.(check_\w+)", code)[1] for code in solutions] == graders
    for code in solutions:
        exec(code, {"np": np, "exercises": exercises})
    assert "Not yet" not in (said := capsys.readouterr().out)
    assert "is not what comes out" not in said
    folded = "".join(solutions)
    shown = re.sub(r"^```\{code-cell\} ipython3\n---\n.*?\n---\n.*?^```", "", page, flags=re.S | re.M)
    assert [line for line in folded.splitlines() if re.match(r"    (return|d[hABx]\b)", line) and line in shown] == []
