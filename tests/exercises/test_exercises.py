"""The graders accept what is right, and name each mistake, also where there are several."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, exercises
from minilora.exercises import functions, grading, questions

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


def grad_scores(P, dP):
    """Row by row, with the Jacobian of a softmax written out: the graders do not use it."""
    return np.stack([dp @ (np.diag(p) - np.outer(p, p)) for p, dp in zip(P, dP, strict=True)])


def grad_V(dW, V, m):
    """Row by row, with the Jacobian of a direction written out."""
    lengths = np.linalg.norm(V, axis=1)
    Jacobians = [k / n * (np.eye(len(v)) - np.outer(v, v) / n**2) for k, n, v in zip(m, lengths, V, strict=True)]
    return np.stack([J @ dw for J, dw in zip(Jacobians, dW, strict=True)])


RIGHT |= {"check_grad_scores": grad_scores, "check_grad_V": grad_V}
RIGHT |= {"check_backward": backward, "check_merged": merged, "check_factors": factors}


def with_square(dW, V, m, power, sign=1):
    """`grad_V`, with n to another power under what passes through n, and another sign before it."""
    n = np.linalg.norm(V, axis=1, keepdims=True)
    return m[:, None] / n * (dW - sign * V * (dW * V).sum(axis=1, keepdims=True) / n**power)


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
    ("check_grad_B", lambda dy, h, s: s * s * dy.T @ h, "dB: the scaling is applied twice: s enters once"),
    ("check_grad_B", lambda dy, h, s: -s * dy.T @ h, "dB: the sign"),
    ("check_grad_B", lambda dy, h, s: 2 * s * dy.T @ h, "dB: a factor of 2 too many"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / h.shape[1], "dB: a division by r"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / dy.shape[1], "dB: a division by out"),
    (
        "check_grad_B",
        lambda dy, h, s: s * h.T @ dy,
        r"transposed: .*shape of B.*\n\(wrong shape.*\(5, 3\).*\(3, 5\)\)$",
    ),
    ("check_grad_B", lambda dy, h, s: s * dy @ h, "a missing transpose, of dy"),
    ("check_grad_B", lambda dy, h, s: dy @ h, "a missing transpose, of dy: .*; and alpha/r is missing"),
    ("check_grad_B", lambda dy, h, s: -dy @ h.T, "transpose, of dy and a transpose too many, of h.*missing.*the sign"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h.T, "a transpose too many, of h"),
    ("check_grad_B", lambda dy, h, s: s * h @ dy, "swapped factors and a missing transpose"),
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h / len(dy), "wrong mean: .*twice"),
    ("check_grad_B", lambda dy, h, s: s * dy @ h / len(dy), "a missing transpose.*0.1666667 times what it should be"),
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
    ("check_backward", with_part(2, lambda dB, A, **_: dB * len(A)), "dB: alpha is not divided by the rank"),
    ("check_backward", with_part(2, lambda dB, dy, x, A, s, **_: s * dy.T @ (x @ A)), "dB: h = x A.T: a missing"),
    ("check_backward", with_part(2, lambda dB, dy, x, B, s, **_: s * dy.T @ (x @ B.T)), "dB: .*h is made with A"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA / s), "dA: alpha/r is missing"),
    ("check_backward", with_part(1, lambda dA, s, **_: dA * s), "dA: the scaling is applied twice"),
    (
        "check_backward",
        with_part(1, lambda dA, **_: dA.T),
        "dA: the right numbers, transposed: the result must have the shape of A",
    ),
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
    ("check_backward", lambda *args: backward(*args)[::-1], r"swapped\? \(dx, dA, dB\) .*\(dB, dA, dx\)$"),
    ("check_backward", lambda *args: [backward(*args)[i] for i in (1, 0, 2)], r"swapped\?.*shapes of \(dA, dx, dB\)$"),
    ("check_backward", lambda *args: [part.T for part in backward(*args)], "dx: the right numbers, transposed"),
    (
        "check_backward",
        with_part(2, lambda dB, A, **_: dB * len(A) ** 0.5),
        "dB: alpha is divided by the root of the rank, as in rsLoRA, and should be divided by the rank$",
    ),
    (
        "check_backward",
        with_part(1, lambda dA, A, **_: -dA * len(A) ** 0.5),
        "dA: alpha is divided by the root of the rank.*; and the sign",
    ),
    # steps 7 to 10
    (
        "check_first_to_move",
        lambda A_zero, B_zero: {"A", "B"},
        "A random and B zero: A does not move: dA .* contains B, and that is zero.$",
    ),
    (
        "check_first_to_move",
        lambda A_zero, B_zero: {"B"},
        "A random and B random: A moves, too: dA .*B, which is not zero.$",
    ),
    ("check_first_to_move", lambda A_zero, B_zero: ["A", "B", 1, "C"], "1 is not the name of a factor; and 'C' is not"),
    ("check_first_to_move", lambda A_zero, B_zero: 1 / 0, "stopped with ZeroDivisionError"),
    (
        "check_first_to_move",
        lambda A_zero, B_zero: [n for n, zero in (("A", A_zero), ("B", B_zero)) if not zero],
        "A random and B zero: B moves, too: dB .* A, which is not zero; and A does not move",
    ),
    ("check_first_to_move", lambda A_zero, B_zero: None, "returned None"),
    ("check_first_to_move", lambda A_zero, B_zero: 2, "return a set such as {'A'}; you returned a int"),
    (
        "check_merged",
        lambda W, A, B, alpha: W + alpha / len(A) ** 0.5 * B @ A,
        "W': alpha is divided by the root of the rank",
    ),
    (
        "check_merged",
        lambda W, A, B, alpha: W + (alpha / len(A)) ** 2 * B @ A,
        "W': the scaling is applied twice: the change",
    ),
    ("check_merged", lambda W, A, B, alpha: W + B @ A, "W': alpha/r is missing"),
    ("check_merged", lambda W, A, B, alpha: W + alpha * B @ A, "W': alpha is not divided by the rank"),
    ("check_merged", lambda W, A, B, alpha: merged(W, A, B, alpha) - W, "W': merge returns the change alone"),
    ("check_merged", lambda W, A, B, alpha: 2 * merged(W, A, B, alpha) - W, "merge adds the change twice"),
    ("check_merged", lambda W, A, B, alpha: merged(W, A, -B, alpha), "merge subtracts the change"),
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
    # step 11
    ("check_grad_scores", lambda P, dP: P * dP, "dS: S_tu stands in the denominator"),
    ("check_grad_scores", lambda P, dP: P * (1 - P) * dP, "dS: this is the share's own part"),
    ("check_grad_scores", lambda P, dP: P * (dP - dP.sum(1)[:, None]), "dS: dP is added up without the shares"),
    ("check_grad_scores", lambda P, dP: P * (dP - dP.mean(1)[:, None]), "dS: the plain mean"),
    (
        "check_grad_scores",
        lambda P, dP: P * (dP + (P * dP).sum(1)[:, None]),
        "dS: the denominator's part is subtracted",
    ),
    ("check_grad_scores", lambda P, dP: dP - (P * dP).sum(1)[:, None], "dS: the factor P_tu in front"),
    ("check_grad_scores", lambda P, dP: P * (P * dP).sum(1)[:, None], "dS: this is the denominator's part alone"),
    ("check_grad_scores", lambda P, dP: P * (dP - (P * dP).sum(0)), "dS: the sum runs down the columns"),
    ("check_grad_scores", lambda P, dP: P * (dP - (P * dP).sum()), "dS: the sum runs over everything"),
    ("check_grad_scores", lambda P, dP: P * (dP - (P * dP).sum(1)), "dS: the sum of row t must stand in row t"),
    ("check_grad_scores", lambda P, dP: grad_scores(P, dP).T, "dS: the right numbers, transposed: .*P"),
    ("check_grad_scores", lambda P, dP: -grad_scores(P, dP), "dS: the sign"),
    ("check_grad_scores", lambda P, dP: -P * dP, "dS: S_tu stands .*; and the sign"),
    # step 15
    ("check_grad_V", lambda dW, V, m: (m / np.linalg.norm(V, axis=1))[:, None] * dW, "dV: n is held constant"),
    ("check_grad_V", lambda dW, V, m: grad_V(dW, V, np.ones_like(m) * np.linalg.norm(V, axis=1)), "dV: the factor m/n"),
    ("check_grad_V", lambda dW, V, m: grad_V(dW, V, np.ones_like(m)), "dV: m is missing"),
    ("check_grad_V", lambda dW, V, m: grad_V(dW, V, m * np.linalg.norm(V, axis=1)), "dV: m where m/n belongs"),
    ("check_grad_V", lambda dW, V, m: with_square(dW, V, m, 0), "dV: V_o is not of length 1"),
    ("check_grad_V", lambda dW, V, m: with_square(dW, V, m, 1), "dV: n where n.2 belongs"),
    ("check_grad_V", lambda dW, V, m: with_square(dW, V, m, 2, -1), "dV: the gradient through DoRA's norm is added"),
    ("check_grad_V", lambda dW, V, m: grad_V(dW, V, m) - with_square(dW, V, m, 2, 0), "dV: this passes through n"),
    ("check_grad_V", lambda dW, V, m: m / np.linalg.norm(V, axis=1) * dW, "dV: n is held constant.*; and keepdims"),
    (
        "check_grad_V",
        lambda dW, V, m: m / (n := np.linalg.norm(V, axis=1)) * (dW - V * (dW * V).sum(1) / n**2),
        "dV: keepdims=True",
    ),
    ("check_grad_V", lambda dW, V, m: -grad_V(dW, V, m), "dV: the sign"),
]


@pytest.mark.parametrize("grader", RIGHT)
def test_a_wrong_answer_gets_its_own_hint(grader, capsys):
    for answer, hint in [(answer, hint) for name, answer, hint in WRONG if name == grader]:
        assert getattr(exercises, grader)(answer) is False, hint
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


@pytest.mark.parametrize("grader", [name for name in RIGHT if name not in ("check_first_to_move", "check_factors")])
def test_each_known_mistake_gets_its_own_words(grader, capsys, monkeypatch):
    """No hint hides behind another: the mistake itself, as an answer, is told by its own."""
    listed = []
    monkeypatch.setattr(functions, "grade", lambda answer, forms, scales, *_: listed.append((forms, scales)) or True)
    getattr(exercises, grader)(RIGHT[grader])
    monkeypatch.undo()
    ((forms, scales),) = listed
    rights = {name: known[0][0] for name, known in forms.items()}

    def said(**wrong):
        if grader == "check_merged":  # its formulas are of the change alone
            wrong = {name: lambda d, f=formula: d.W + f(d) for name, formula in wrong.items()}
        answers = {**rights, **wrong}

        def answer(d, *_):
            values = tuple(np.asarray(answers[name](d)) for name in rights)
            return values if len(values) > 1 else values[0]

        monkeypatch.setattr(functions, "grade", lambda _, *given: grading.grade(answer, *given))
        assert not getattr(exercises, grader)(None)
        monkeypatch.undo()
        return capsys.readouterr().out

    for name, known in forms.items():
        for formula, hint in known[1:]:
            assert f"{name}: {hint}" in said(**{name: formula})
        for scale, hint in scales:
            assert f"{name}: {hint}\n" in said(**{name: lambda d, s=scale, n=name: s(d) * rights[n](d)})


PREDICTIONS = {
    "first step": 0.01,
    "larger gradients": 1,
    "larger alpha": 2,
    "larger alpha, plain steps": 4,
    "off by one": 50,
    "7B in full": 6.738 * (2 + 4 + 2 + 8),
    "7B at 4 bits": 6.476 * 4.127 / 8 + 0.262 * 2 + 32 * 16 * (4 * 8192 + 3 * 15104) * 16 / 1e9,
    "rank from a curve": "4",
    "rate from a curve": "0.002",
    "first move, one row": "1",
    "first move, many rows": "1/4",
    "along V": 0,
}


def say(question, guess, capsys):
    """Return whether a guess is right, and what is said."""
    right = exercises.check_prediction(question, guess)
    return right, capsys.readouterr().out.strip()


@pytest.fixture(autouse=True)
def nobody_has_guessed(monkeypatch):
    monkeypatch.setattr(questions, "_wrong", Counter())


@pytest.mark.parametrize("question", PREDICTIONS)
def test_a_right_prediction_is_told_why(question, capsys):
    right, said = say(question, PREDICTIONS[question], capsys)
    assert right
    assert said.startswith("Right: ")
    assert said.endswith(f" {exercises.QUESTIONS[question].why}")


OFF = [
    ("first step", 0, "A is not zero"),
    ("first step", 1, "in units of lr"),
    ("first step", 0.001, "divides it by 1 - beta1"),
    ("first step", -0.01, "without its sign"),
    ("larger gradients", 100, "plain step"),
    ("larger gradients", 0.01, "so does the numerator"),
    ("larger gradients", 10, "not by 10"),
    ("larger alpha", 1, "s = alpha/r"),
    ("larger alpha", 4, "contains s once"),
    ("larger alpha", 2**0.5, "no root"),
    ("larger alpha", 0.5, "grows with alpha"),
    ("larger alpha, plain steps", 1, "Both dB and y"),
    ("larger alpha, plain steps", 2, "So B grows"),
    ("larger alpha, plain steps", 8, "A has not moved"),
    ("off by one", 0, "Their squares do not"),
    ("off by one", 1, "for one input"),
    ("off by one", 50**0.5, "the root of it"),
    ("off by one", 50**2, "all inputs are 1"),
    ("7B in full", 6.738 * 2, "the weights alone"),
    ("7B in full", 6.738 * 4, "one float32"),
    ("7B in full", 6.738 * 8, "two moments alone"),
    ("7B in full", 6.738 * 12, "12 bytes"),
    ("7B in full", 6.738 * 14, "14 bytes"),
    ("7B in full", 6.738 * 16 * 1e9 / 2**30, "GiB"),
    ("7B in full", 6.738 * 18, "18 bytes"),
    ("7B at 4 bits", 0.64, "the adapters alone"),
    ("7B at 4 bits", 6.476 * 4.127 / 8 + 0.262 * 2, "the weights alone"),
    ("7B at 4 bits", 6.738 * 2 + 0.64, "in 16 bits"),
    ("7B at 4 bits", 107.8, "in full"),
    ("rank from a curve", "1", "One direction is too few"),
    ("rank from a curve", "2", "still falls a lot"),
    ("rank from a curve", "8", "new rows rises"),
    ("rank from a curve", "16", "were not seen"),
    ("rate from a curve", "0.0005", "still fall"),
    ("rate from a curve", "0.008", "did not see"),
    ("rate from a curve", "0.03", "at a smaller rate"),
    ("rate from a curve", "0.12", "so large"),
    ("first move, one row", "1/16", "16 times as many"),
    ("first move, one row", "1/4", "For one row all terms"),
    ("first move, one row", "4", r"at alpha/sqrt\(r\)"),
    ("first move, one row", "16", "But s = alpha/r falls"),
    ("first move, many rows", "1/16", "cancel in part"),
    ("first move, many rows", "1", "for one row"),
    ("first move, many rows", "4", "s = alpha/r falls to 1/16"),
    ("first move, many rows", "16", "of mixed signs, and s"),
    ("along V", 1, "the slope of the loss along V_o"),
    ("along V", -1, "What does a longer V_o change"),
]
"""Wrong answers, each reckoned as somebody would who makes that mistake."""


@pytest.mark.parametrize("question", PREDICTIONS)
def test_a_likely_wrong_prediction_gets_its_own_hint(question, capsys):
    for guess, hint in [(guess, hint) for name, guess, hint in OFF if name == question]:
        right, said = say(question, guess, capsys)
        assert not right, guess
        assert re.match(f"Not yet. .*{hint}", said)
        assert said.removeprefix("Not yet. ") not in exercises.QUESTIONS[question].hints


def test_every_known_wrong_prediction_is_tried():
    assert [q for q, _, _ in OFF] == [q for q, question in exercises.QUESTIONS.items() for _ in question.known]


@pytest.mark.parametrize("question", PREDICTIONS)
def test_a_second_wrong_prediction_gets_another_hint(question, capsys):
    asked = exercises.QUESTIONS[question]
    if asked.choices:  # each wrong one has its own
        assert {*asked.known, PREDICTIONS[question]} == {*asked.choices}
        return
    said = [say(question, guess, capsys) for guess in (345, 3456, 34567)]
    assert said == [(False, f"Not yet. {hint}") for hint in (*asked.hints, asked.hints[1])]
    assert say(question, PREDICTIONS[question], capsys)[0]
    assert say(question, 345, capsys) == said[0]


@pytest.mark.parametrize(
    "question", [q for q, right in PREDICTIONS.items() if isinstance(right, (int, float)) and right]
)
def test_a_prediction_may_be_off_by_5_percent(question, capsys):
    number = questions.sheet(question)["answer"]
    assert [say(question, number * f, capsys)[0] for f in (0.94, 0.951, 1.049, 1.06)] == [False, True, True, False]


@pytest.mark.parametrize("question", ["first step", "7B in full", "7B at 4 bits"])
def test_no_hint_gives_a_number_away(question):
    asked = exercises.QUESTIONS[question]
    hints = (*asked.hints, *asked.known.values())
    assert not [hint for hint in hints if f"{PREDICTIONS[question]:.3g}" in re.findall(r"[\d.]*\d", hint)]


def test_a_prediction_of_another_kind_is_refused(capsys):
    assert PREDICTIONS.keys() == exercises.QUESTIONS.keys()
    with pytest.raises(ValueError, match=r"question must be .* got 'second step'"):
        exercises.check_prediction("second step", 1)
    with pytest.raises(TypeError, match="guess must be a number, got 'one'"):
        exercises.check_prediction("first step", "one")
    with pytest.raises(ValueError, match="guess must be '1', '2', '4', '8' or '16', got '32'"):
        exercises.check_prediction("rank from a curve", 32)
    assert not questions._wrong
    assert not capsys.readouterr().out


def test_a_choice_may_be_given_as_a_number(capsys):
    assert exercises.check_prediction("rank from a curve", 4)
    assert not exercises.check_prediction("first move, many rows", 16)


def test_the_first_move_has_two_regimes():
    """One row keeps it at alpha/r, unrelated rows at alpha/sqrt(r); the other scaling makes a factor of 4 each."""
    found = [questions.growth(rows, root) for rows, root in ((1, False), (1, True), (256, False), (256, True))]
    assert np.allclose(np.log2(found), [0, 2, -2, 0], atol=0.5)


def test_the_curve_that_is_fitted_always_falls():
    fitted, new = zip(*exercises.rank_curve().values(), strict=True)
    assert list(fitted) == sorted(fitted, reverse=True)
    assert new[2] < 0.8 * min(new[:2] + new[3:])


def test_the_module_says_how_to_begin(capsys):
    from minilora.exercises.__main__ import main

    assert main() == 0
    said = capsys.readouterr().out
    assert all(f"\n{step} " in said for step in range(1, 16))
    assert all(f"{name!r}: {question.text}" in said for name, question in exercises.QUESTIONS.items())
    assert "`" not in said
    rows = [line for line in said.splitlines() if re.match(r"\d+ ", line)]
    assert {line[56:58] for line in rows} == {"  "}  # the columns stand


def test_the_solutions_on_the_page_are_right(capsys):
    page = (Path(__file__).parents[2] / "docs" / "exercises.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\} ipython3\n---\n(.*?)\n---\n(.*?)^```", page, re.S | re.M)
    solutions = [code for options, code in cells if "tags: [hide-cell]" in options]
    graders = [name for name in exercises.__all__ if name.startswith("check_") and name != "check_prediction"]
    assert sorted(re.search(r"exercises\.(check_\w+)", code)[1] for code in solutions) == sorted(graders)
    assert re.findall(r'^ask\("(.*)"\)$', page, re.M) == list(exercises.QUESTIONS)
    for code in solutions:
        exec(code, {"np": np, "exercises": exercises})
    assert "Not yet" not in (said := capsys.readouterr().out)
    assert "is not what comes out" not in said
    folded = "".join(solutions)
    shown = re.sub(r"^```\{code-cell\} ipython3\n---\n.*?\n---\n.*?^```", "", page, flags=re.S | re.M)
    assert [line for line in folded.splitlines() if re.match(r"    (return|d[hABx]\b)", line) and line in shown] == []
