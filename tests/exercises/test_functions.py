"""The graders accept what is right, and name each mistake, also where there are several."""

import re
from itertools import combinations

import numpy as np
import pytest

from minilora import LoRA, exercises
from minilora.exercises import grading
from minilora.exercises.functions import EXERCISES
from minilora.exercises.grading import DIFFERENT, EQUAL_SIZES

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


def kaiming(fan, slope=5**0.5):
    """The bound of torch's kaiming_uniform_ for a fan and the slope a."""
    return (6 / ((1 + slope**2) * fan)) ** 0.5


def started(scale, shape=("rank", "in_features"), draw="uniform", B=0.0):
    """An answer to `start` whose A has entries of a size."""

    def start(in_features, out_features, rank, rng):
        sizes = {"in_features": in_features, "rank": rank}
        size = scale(in_features, out_features, rank)
        A = {"uniform": rng.uniform(-1, 1, (rank, in_features)), "normal": rng.standard_normal((rank, in_features))}
        return size * A[draw].reshape([sizes[name] for name in shape]), np.full((out_features, rank), B)

    return start


def as_asked(function):
    """A backward of ours in the order of an interview's arguments."""
    return lambda x, A, B, dL_dy, alpha, r: function(dL_dy, x, A, B, alpha)


RIGHT |= {
    "check_start": started(lambda n_in, out, r: kaiming(n_in)),  # PEFT's
    "check_lora_backward": as_asked(backward),
    "check_count": lambda n_in, n_out, r: sum(a.size for a in (np.zeros((r, n_in)), np.zeros((n_out, r)))),
    "check_first_to_move": lambda A_zero, B_zero: [n for n, stays in (("A", B_zero), ("B", A_zero)) if not stays],
}


def with_part(index, change):
    def wrong(dy, x, A, B, alpha):
        parts = list(backward(dy, x, A, B, alpha))
        parts[index] = change(parts[index], dy=dy, x=x, A=A, B=B, s=alpha / len(A))
        return tuple(parts)

    return wrong


ACCEPTED = [
    *RIGHT.items(),
    ("check_start", started(lambda n_in, out, r: (3 * n_in) ** -0.5, draw="normal")),
    ("check_lora_backward", as_asked(lambda *given: backward(*given)[1:])),  # two gradients, or three
    ("check_grad_B", lambda dy, h, s: s * dy.T @ h * (1 + 1e-10)),  # off by rounding
    ("check_first_to_move", lambda A_zero, B_zero: "A" * (not B_zero) + "B" * (not A_zero)),
]


@pytest.mark.parametrize(("grader", "answer"), ACCEPTED)
def test_a_right_answer_is_accepted(grader, answer, capsys):
    assert getattr(exercises, grader)(answer) is True
    assert re.search("[Rr]ight|the closest matrix of its rank", capsys.readouterr().out)


def in_half(W, A, B, alpha):
    """As public code merges: weight and change are rounded, and then their sum."""
    return (W.astype(np.float16) + (alpha / len(A) * B @ A).astype(np.float16)).astype(float)


WRONG = {
    "check_loss_gradient": [
        (lambda p, t: 2 * (p - t) / len(p), "dy: wrong mean: .*not N$"),
        (lambda p, t: 2 * (p - t) / p.shape[1], "dy: wrong mean: .*not out$"),
        (lambda p, t: 2 * (p - t), "no mean"),
        (lambda p, t: (p - t) / p.size, "factor of 2$"),
        (lambda p, t: 2 * (t - p) / p.size, "sign"),
        (lambda p, t: (t - p) / len(p), "not N; and .*factor of 2; and the sign"),
        (lambda p, t: (p - t) ** 2 / p.size, "this is the loss"),
        (lambda p, t: ((p - t) ** 2).mean(), r"must be \(N, out\), here \(11, 5\); you returned a float64"),
        (lambda p, t: 2 * (p - t).sum(axis=0) / p.size, r"here \(11, 5\).*shape \(5,\)"),
    ],
    "check_grad_B": [
        (lambda dy, h, s: dy.T @ h, "dB: alpha/r is missing"),
        (lambda dy, h, s: s * s * dy.T @ h, "dB: the scaling is applied twice: s enters once"),
        (lambda dy, h, s: -s * dy.T @ h, "dB: the sign"),
        (lambda dy, h, s: 2 * s * dy.T @ h, "dB: an extra factor of 2"),
        (lambda dy, h, s: 2 * s * dy.T @ h * (1 + 8e-10), "dB: an extra factor of 2"),  # off by rounding
        (lambda dy, h, s: s * dy.T @ h / h.shape[1], "dB: a division by r"),
        (lambda dy, h, s: s * dy.T @ h / dy.shape[1], "dB: a division by out"),
        (lambda dy, h, s: s * h.T @ dy, r"transposed: .*shape of B.*\n\(wrong shape.*\(5, 3\).*\(3, 5\)\)$"),
        (lambda dy, h, s: s * dy @ h, "dy must be transposed"),
        (lambda dy, h, s: dy @ h, "dy must be transposed: .*; and alpha/r is missing"),
        (lambda dy, h, s: -dy @ h.T, "dy must be transposed and h must not be transposed.*missing.*the sign"),
        (lambda dy, h, s: s * dy @ h.T, "h must not be transposed"),
        (lambda dy, h, s: s * h @ dy, "the factors are swapped and .* must be transposed"),
        (lambda dy, h, s: s * dy.T @ h / len(dy), "wrong mean: .*twice"),
        (lambda dy, h, s: s * dy @ h / len(dy), "dy must be transposed.*0.1666667 times the right result"),
        (lambda dy, h, s: s * dy.T @ h + 1, "values are wrong"),
        (lambda dy, h, s: None, r"(?<= )your function returned None; is the return missing\?$"),
        (lambda dy, h, s: "dB", "must be numbers, you returned a str"),
        (lambda dy, h, s: [[1, 2], [3]], "must be numbers, you returned 2 values"),
        (lambda dy, h, s: dy.T @ h * np.nan, "values are wrong"),
        (lambda dy, h, s: dy.T @ h * 0, "dB: the shape is right, but the values are wrong; write out one entry$"),
        (lambda dy, h, s: dy.T @ h * 1j, "dB: the shape is right, but the values are wrong"),
        (lambda dy, h, s: s * dy.T @ h + 1j, "the values are wrong"),  # but the real part is right
        (lambda dy, h, s: dy.T @ unknown, "NameError"),  # noqa: F821
        (lambda dy, h, s: np.multiply(dy, s, out=dy).T @ h, "changed its argument dy in place; make a new array$"),
    ],
    "check_grad_h": [
        (lambda dy, B, s: dy @ B, "alpha/r is missing"),
        (lambda dy, B, s: s * dy @ B.T, "B must not be transposed"),
        (lambda dy, B, s: s * dy.T @ B, "dy must not be transposed"),
        (lambda dy, B, s: s * B @ dy, "the factors are swapped"),
        (lambda dy, B, s: s * (dy @ B).T, "transposed: .*wrong shape"),
        (lambda dy, B, s: s * dy @ B / len(dy), "wrong mean"),
        (lambda dy, B, s: s * dy @ B / B.shape[0], "a division by out"),
    ],
    "check_grad_A": [
        (lambda dh, x: dh @ x, "dh must be transposed"),
        (lambda dh, x: dh @ x.T, "dh must be transposed and x must not be transposed"),
        (lambda dh, x: x.T @ dh, "transposed: .*wrong shape"),
        (lambda dh, x: x @ dh, "the factors are swapped and .* must be transposed"),
        (lambda dh, x: dh.T @ x / len(x), "wrong mean"),
        (lambda dh, x: 1.3 / dh.shape[1] * dh.T @ x, "dA: the scaling is applied twice: dh already contains it$"),
        (lambda dh, x: dh.shape[1] / 1.3 * dh.T @ x, "dA: alpha/r is missing: dA gets it from dh = s dy B$"),
    ],
    "check_backward": [
        (with_part(2, lambda dB, s, **_: dB / s), "dB: alpha/r is missing"),
        (with_part(2, lambda dB, A, **_: dB * len(A)), "dB: alpha is not divided by the rank"),
        (with_part(2, lambda dB, dy, x, A, s, **_: s * dy.T @ (x @ A)), "dB: A must be transposed: h = x A.T"),
        (with_part(2, lambda dB, dy, x, B, s, **_: s * dy.T @ (x @ B.T)), "dB: .*h uses A"),
        (with_part(1, lambda dA, s, **_: dA / s), "dA: alpha/r is missing"),
        (with_part(1, lambda dA, s, **_: dA * s), "dA: the scaling is applied twice"),
        (with_part(1, lambda dA, **_: dA.T), "dA: the right numbers, transposed: the result must have the shape of A"),
        (with_part(1, lambda dA, x, **_: dA / len(x)), "dA: wrong mean"),
        (with_part(0, lambda dx, s, **_: -dx / s), "dx: alpha/r is missing.*; and the sign"),
        (with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ A @ B), "dx: the wrong factor"),
        (with_part(0, lambda dx, dy, A, B, s, **_: s * dy @ B @ A.T), "dx: A must not be transposed"),
        (lambda *a: (backward(*a)[0], a[4] / len(a[2]) * a[0] @ a[3] @ a[1], backward(*a)[2]),
         r"dA: dh must be transposed[^\n]*$"),
        (lambda *a: (backward(*a)[0] + 1, a[4] / len(a[2]) * a[0] @ a[3] @ a[1], backward(*a)[2]),
         r"dA: dh must be transposed[^\n]*$"),  # which stops it where the sizes differ: no more is told
        (lambda dy, x, A, B, alpha: dy, "return 3 arrays.*shape"),
        (lambda *args: backward(*args)[:2], "return 3 arrays.*2 values"),
        (lambda *args: backward(*args)[::-1], r"swapped\? expected \(dx, dA, dB\), .*\(dB, dA, dx\)$"),
        (lambda *args: [backward(*args)[i] for i in (1, 0, 2)], r"swapped\?.*shapes of \(dA, dx, dB\)$"),
        (lambda *args: [part.T for part in backward(*args)], "dx: the right numbers, transposed"),
        (with_part(2, lambda dB, A, **_: dB * len(A) ** 0.5),
         "alpha is divided by the square root of the rank, .* by the rank$"),
        (with_part(1, lambda dA, A, **_: -dA * len(A) ** 0.5), "dA: alpha is divided by the square .*; and the sign"),
    ],
    "check_first_to_move": [
        (lambda A_zero, B_zero: {"A", "B"}, "B zero: A does not move: dA .* contains B, and that is zero.$"),
        (lambda A_zero, B_zero: {"B"}, "A random and B random: A moves, too: dA .*B, which is not zero.$"),
        (lambda A_zero, B_zero: ["A", "B", 1, "C"], "1 is not the name of a factor; and 'C' is not"),
        (lambda A_zero, B_zero: 1 / 0, "stopped with ZeroDivisionError"),
        (lambda A_zero, B_zero: ["A"] * (not A_zero) + ["B"] * (not B_zero), "too: dB .*; and A does not move"),
        (lambda A_zero, B_zero: None, "returned None"),
        (lambda A_zero, B_zero: 2, "return a set such as {'A'}; you returned a int"),
    ],
    "check_merged": [
        (lambda W, A, B, alpha: W + alpha / len(A) ** 0.5 * B @ A, "merged: alpha is divided by the square root of"),
        (lambda W, A, B, alpha: W + (alpha / len(A)) ** 2 * B @ A, "merged: the scaling is applied twice: the change"),
        (lambda W, A, B, alpha: W + B @ A, "merged: alpha/r is missing"),
        (lambda W, A, B, alpha: W + alpha * B @ A, "merged: alpha is not divided by the rank"),
        (lambda W, A, B, alpha: merged(W, A, B, alpha) - W, "merged: merge returns only the change"),
        (lambda W, A, B, alpha: 2 * merged(W, A, B, alpha) - W, "merge adds the change twice"),
        (lambda W, A, B, alpha: merged(W, A, -B, alpha), "merge subtracts the change"),
        (lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T, "transposed"),
        (in_half, "merged: weight and change are rounded to 16 bits"),
    ],
    "check_count": [
        (lambda n_in, n_out, r: n_in * n_out, "the full weight"),
        (lambda n_in, n_out, r: r * n_in * n_out, "do not multiply"),
        (lambda n_in, n_out, r: r * (n_in + n_out) + n_out, "the bias belongs to the base"),
        (lambda n_in, n_out, r: r * n_in, "this is only A"),
        (lambda n_in, n_out, r: r * n_out, "this is only B"),
        (lambda n_in, n_out, r: r * (n_in + n_out) + n_in * n_out, "the base is frozen"),
        (lambda n_in, n_out, r: n_in + n_out, "this is rank 1"),
        (lambda n_in, n_out, r: 7, "write down the shapes"),
        (lambda n_in, n_out, r: 2 * r * (n_in + n_out), "write down the shapes"),
        (lambda n_in, n_out, r: r * (n_in + n_out) + r * r, "write down the shapes"),
        (lambda n_in, n_out, r: r * r, "write down the shapes"),
        (lambda n_in, n_out, r: True, "count must be numbers, you returned a bool$"),
        (lambda n_in, n_out, r: np.full(1, r * (n_in + n_out)),
         r"wrong shape: count must be a number; you returned an array of shape \(1,\)$"),
    ],
    "check_factors": [
        (lambda change, r: factors(change, r)[::-1],
         r"swapped\? expected \(A, B\), you returned the shapes of \(B, A\)"),
        (lambda change, r: (factors(change, r)[0] * 0, factors(change, r)[1]), "its distance from the change"),
        (lambda change, r: (np.linalg.svd(change)[2][:r], factors(change, r)[1]), "values are missing"),
        (lambda change, r: smallest(change, r), "the smallest singular values"),
        (lambda change, r: (factors(change, r)[0], factors(change, r)[1] * np.linalg.svd(change)[1][:r]), "squares"),
        (lambda change, r: factors(np.multiply(change, 2, out=change), r), "changed its argument change in place"),
        (lambda change, r: (change, change),
         r"A must be \(rank, in\), here \(3, 7\); you returned an array of shape \(5, 7\)$"),
        (lambda change, r: change, "return 2 arrays"),
        (lambda change, r: ([[1, 2], [3]], factors(change, r)[1]), "must be numbers, you returned 2 values"),
        (lambda change, r: (factors(change, r)[0], "B"), "must be numbers, you returned a str"),
    ],
    "check_grad_scores": [
        (lambda P, dP: P * dP, "dS: S_tu is also in the denominator"),
        (lambda P, dP: P * (1 - P) * dP, "dS: this is only the effect on P_tu"),
        (lambda P, dP: P * (dP - dP.sum(1)[:, None]), "dS: dP is summed without the probabilities"),
        (lambda P, dP: P * (dP - dP.mean(1)[:, None]), "dS: the mean of dP must be weighted"),
        (lambda P, dP: P * (dP + (P * dP).sum(1)[:, None]), "dS: the denominator's part must be subtracted"),
        (lambda P, dP: dP - (P * dP).sum(1)[:, None], "dS: the factor P_tu in front"),
        (lambda P, dP: P * (P * dP).sum(1)[:, None], "dS: this is only the denominator's part"),
        (lambda P, dP: P * (dP - (P * dP).sum(0)), "dS: the sum is over the columns"),
        (lambda P, dP: P * (dP - (P * dP).sum()), "dS: the sum is over everything"),
        (lambda P, dP: P * (dP - (P * dP).sum(1)), "dS: the sum of row t must stay in row t"),
        (lambda P, dP: grad_scores(P, dP).T, "dS: the right numbers, transposed: .*P"),
        (lambda P, dP: -grad_scores(P, dP), "dS: the sign"),
        (lambda P, dP: -P * dP, "dS: S_tu is also .*; and the sign"),
    ],
    "check_grad_V": [
        (lambda dW, V, m: (m / np.linalg.norm(V, axis=1))[:, None] * dW, "dV: n is held constant"),
        (lambda dW, V, m: grad_V(dW, V, np.ones_like(m) * np.linalg.norm(V, axis=1)), "dV: the factor m/n"),
        (lambda dW, V, m: grad_V(dW, V, np.ones_like(m)), "dV: m is missing"),
        (lambda dW, V, m: grad_V(dW, V, m * np.linalg.norm(V, axis=1)), "dV: m instead of m/n"),
        (lambda dW, V, m: with_square(dW, V, m, 0), "dV: V_o does not have norm 1"),
        (lambda dW, V, m: with_square(dW, V, m, 1), "dV: n instead of n.2"),
        (lambda dW, V, m: with_square(dW, V, m, 2, -1), "dV: the gradient through DoRA's norm is added"),
        (lambda dW, V, m: grad_V(dW, V, m) - with_square(dW, V, m, 2, 0), "dV: this is only the part through n"),
        (lambda dW, V, m: m / np.linalg.norm(V, axis=1) * dW, "dV: n is held constant.*; and use keepdims"),
        (lambda dW, V, m: m / (n := (V**2).sum(1) ** 0.5) * (dW - V * (dW * V).sum(1) / n**2), "dV: use keepdims"),
        (lambda dW, V, m: -grad_V(dW, V, m), "dV: the sign"),
    ],
    "check_start": [
        (started(lambda n_in, out, r: kaiming(r, 0)), "A: A's fan .* wrong side: .*; and the bound is too large"),
        (started(lambda n_in, out, r: kaiming(r)), "A: A's fan is taken from the wrong side: [^;]*$"),
        (started(lambda n_in, out, r: r**-0.5, draw="normal"), "A: A's fan is taken from the wrong side: [^;]*$"),
        (started(lambda n_in, out, r: kaiming(n_in, 0)), "A: the bound is too large by sqrt.6."),
        (started(lambda n_in, out, r: kaiming(out)), "A: A's fan is in, not out"),
        (started(lambda n_in, out, r: (6 / (n_in + r)) ** 0.5), "A: this is Glorot's bound"),
        (started(lambda n_in, out, r: 1, draw="normal"), "A: A has size 1"),
        (started(lambda n_in, out, r: 0.02, draw="normal"), "A: A has size 0.02 at any width"),
        (started(lambda n_in, out, r: n_in**-0.5, draw="normal"), "A: 1/sqrt.in. is the bound"),
        (started(lambda n_in, out, r: 1 / n_in), "A: 1/in instead of 1/sqrt.in."),
        (started(lambda n_in, out, r: 0), "A: A is zero"),
        (started(lambda n_in, out, r: 7), "A: its RMS"),
        (started(lambda n_in, out, r: np.nan), "A: its RMS"),
        (started(lambda n_in, out, r: kaiming(r, 0), shape=("in_features", "rank")),
         r"A: A's fan .*\(wrong shape: A must be \(rank, in\), here \(80, 640\); .*shape \(640, 80\)\)"),
        (started(lambda n_in, out, r: kaiming(n_in), B=1.0), "B: it must be zero"),
        (started(lambda n_in, out, r: 0, B=0.02), "A: A is zero.*B: it must be"),
        (lambda *sizes: [kaiming(sizes[0]) + part for part in started(lambda *_: kaiming(sizes[0]))(*sizes)],
         "A: its RMS"),  # around another mean the spread is the same
        (lambda n_in, out, r, rng: (RIGHT["check_start"](n_in, out, r, rng)[0], np.resize([0.02, -0.02], (out, r))),
         "B: it must be zero"),
        (lambda *given: started(lambda *sizes: 1)(*given)[::-1], "swapped"),
        (lambda n_in, out, r, rng: np.zeros((r, n_in)), "return 2 arrays"),
    ],  # starts of public code, torch's kaiming_uniform_ among them, each reckoned by its own formula
    "check_lora_backward": [
        (as_asked(lambda *given: backward(*given)[:2]), r"dA must be \(r, in\), here \(3, 7\); you .*\(11, 7\)$"),
        (as_asked(lambda *given: backward(*given)[1]), r"return 3 arrays, \(dx, dA, dB\); you returned an array"),
    ],
}  # fmt: skip
"""By grader: answers that people give, and the end of what is said."""
for grader in ("check_loss_gradient", "check_grad_B", "check_grad_h", "check_grad_A"):
    off = lambda *args, right=RIGHT[grader]: right(*args) * (1 + 1e-6)  # noqa: E731
    WRONG[grader] += [(off, "a wrong factor: yours is 1.000001 times the right result$")]
WRONG["check_lora_backward"] += [
    (as_asked(answer), hint) for answer, hint in WRONG["check_backward"] if "2 values" not in hint
]


@pytest.mark.parametrize("grader", WRONG)
def test_a_wrong_answer_gets_its_own_hint(grader, capsys):
    for answer, hint in WRONG[grader]:
        assert getattr(exercises, grader)(answer) is False, hint
        assert re.match(f"(?s)Not yet. .*{hint}", capsys.readouterr().out.strip())


SCALES = {
    "alpha/r is missing": lambda s, N, out: 1 / s,
    "the sign": lambda s, N, out: -1,
    "a factor of 2": lambda s, N, out: 2,
    "wrong mean": lambda s, N, out: 1 / N,
    "a division by out": lambda s, N, out: 1 / out,
}


@pytest.mark.parametrize("some", [*combinations(SCALES, 2), *combinations(SCALES, 3)], ids=" and ".join)
def test_two_or_three_wrong_factors_are_named(some, capsys):
    def wrong(dy, h, s):
        return s * dy.T @ h * np.prod([SCALES[name](s, *dy.shape) for name in some])

    assert not exercises.check_grad_B(wrong)
    said = capsys.readouterr().out
    assert [name in said for name in SCALES] == [name in some for name in SCALES]


def test_how_far_two_factors_are_is_told(capsys):
    seen = []
    assert not exercises.check_factors(lambda change, r: seen.append(change) or (np.ones((3, 7)), np.ones((5, 3))))
    off = np.linalg.norm(3 - seen[0])
    least = ((seen[0] ** 2).sum() - (np.linalg.svd(seen[0], compute_uv=False)[:3] ** 2).sum()) ** 0.5
    assert f"B A: its distance from the change is {off:.3g}, and {least:.3g} is possible" in capsys.readouterr().out


class NoArray:
    """As a tensor that needs gradients: NumPy cannot take it."""

    def __array__(self, *_, **__):
        raise RuntimeError("no array")


ODD = [
    *(None, "dB", 1j, float("nan"), 10**400, True, {"dB": 1}, {1, 2}, object(), [], b"abc", NoArray(), len, range(3)),
    *([[1, 2], [3]], [["A"]], ("A", ["B"]), np.zeros((0, 3)), np.array(["a"]), np.array([None, 1]), (None,) * 3),
    *(np.timedelta64(1, "s"), np.ma.masked_array([1.0], [1]), [NoArray()] * 2, (1, 2, 3), np.zeros((1,) * 30)),
    *((np.full((2, 7), np.nan), np.zeros((5, 2))), (np.zeros((2, 7, 1)), np.zeros((5, 2))), (NoArray(),) * 3),
]


@pytest.mark.parametrize("grader", RIGHT)
def test_an_odd_answer_is_a_hint_and_no_traceback(grader, capsys):
    for value in ODD:
        assert getattr(exercises, grader)(lambda *_, value=value: value) is False
        assert capsys.readouterr().out.startswith("Not yet. ")
    assert getattr(exercises, grader)(5) is False
    assert "your code stopped with TypeError: 'int' object is not callable" in capsys.readouterr().out


def mistake(exercise, name, line, factor="1", times=1.0):
    """An answer that makes one mistake: what is judged is a line times a factor, and the rest is right."""
    places = {(d.N, d.rank): d for d in (grading.data(**sizes) for sizes in exercise.sizes)}

    def answer(*given):
        known = dict(zip(exercise.arguments, given, strict=True))
        same = [
            d for d in places.values() if all(np.array_equal(vars(d)[n], v) for n, v in known.items() if n != "rng")
        ]
        lines = {result: own[0][0] for result, own in exercise.forms.items()} | {name: line}
        value = {n: np.asarray(grading.compute(own, same[0])) for n, own in lines.items()}
        value[name] = value[name] * grading.compute(factor, same[0]) * times
        if exercise is EXERCISES["merged"]:
            return value["merged"] + same[0].W
        return tuple(value.values()) if len(value) > 1 else value[name]

    return answer


NAMED = [name for name in EXERCISES if name not in ("start", "factors")]  # of these, what is judged is no result


@pytest.mark.parametrize("name", NAMED)
def test_each_known_mistake_gets_its_own_words(name, capsys):
    """No hint hides behind another: the mistake itself, as an answer, is told by its own."""
    exercise = EXERCISES[name]
    for result, ((right, _), *wrong) in exercise.forms.items():
        for line, hint in wrong:
            assert not grading.grade(exercise, mistake(exercise, result, line))
            assert f"{result}: {hint}" in capsys.readouterr().out
        for factor, hint in exercise.scales:
            assert not grading.grade(exercise, mistake(exercise, result, right, factor))
            assert f"{result}: {hint}\n" in capsys.readouterr().out


@pytest.mark.parametrize("size", [DIFFERENT, EQUAL_SIZES], ids=["different", "equal"])
def test_the_data_of_the_steps_belong_together(size):
    d = grading.data(**size)
    assert np.array_equal(d.x, np.random.default_rng(size["N"]).standard_normal((size["N"], size["n_in"])).round(4))
    assert d.s == 1.3 / size["r"]
    assert np.allclose(d.h, d.x @ d.A.T)
    assert np.allclose(d.dh, LoRA(d.A, d.B, d.alpha).scaling * d.dy @ d.B)
    assert np.allclose(d.P.sum(axis=1), 1)
    assert np.allclose(d.left * d.singular @ d.right, d.change)
