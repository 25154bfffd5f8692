"""The exercises that ask for a function, with their graders.

`EXERCISES` has the right formula and common mistakes for each, as lines of NumPy. `grading.grade` judges an answer by
these lines, and so does the page on the site.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from ..conformance.problems.bugs import known
from ..optim import Adam
from .experiments import first_problem
from .grading import (
    DIVISIONS,
    NOT_DIVIDED,
    ROOT,
    SCALES,
    SIGN,
    SIZE_HINTS,
    WIDE,
    Exercise,
    Hinted,
    data,
    grade,
    kind_of_value,
    print_hint,
    product_forms,
    stopped,
)

OVER_ROWS = "the sum is over the rows of both"
OTHER_DH, OTHER_H = "the wrong factor: dh uses B, not A", "the wrong factor: h uses A, not B"


def backward_forms(dy: str) -> dict[str, Sequence[Hinted]]:
    """Return common answers for the three gradients of y = s x A^T B^T; `dy` is the name of its gradient."""
    dh = f"s * {dy} @ B"
    return {
        "dx": [
            *product_forms({"dh": dh, "A": "A"}, "x (N, in)", "h contains A^T, so dx contains A"),
            (f"s * {dy} @ A @ B", OTHER_DH),
        ],
        "dA": [
            *product_forms({"dh": dh, "x": "x"}, "A (r, in)", OVER_ROWS, transposed="dh"),
            (f"s * ({dy} @ A).T @ x", OTHER_DH),
        ],
        "dB": [
            *product_forms({"dy": f"s * {dy}", "h": "x @ A.T"}, "B (out, r)", OVER_ROWS, transposed="dy"),
            (f"s * {dy}.T @ (x @ A)", "A must be transposed: h = x A^T"),
            (f"s * {dy}.T @ (x @ B.T)", OTHER_H),
        ],
    }


BACKWARD = {"dx": "(N, in)", "dA": "(r, in)", "dB": "(out, r)"}
SHARES = "(P * dP).sum(axis=1, keepdims=True)"
ROW = "the sum is over row t, the probabilities of one softmax"
N_O, M_O, ALONG = "np.linalg.norm(V, axis=1, keepdims=True)", "m[:, None]", "(dW * V).sum(axis=1, keepdims=True)"
HELD_CONSTANT = (
    "n is held constant, as in the paper and in PEFT; the full gradient is asked for, and n_o depends on V_o"
)
KEEPDIMS = "use keepdims=True or [:, None]: the norm and the magnitude of row o must stay in row o"
WRONG_SIDE = "A's fan is taken from the wrong side: h = x A^T sums over in, so the fan is in, not the rank"
GAIN = "the bound is too large by sqrt(6), with the gain of ReLU; PEFT passes a=sqrt(5), which makes it 1/sqrt(in)"

EXERCISES: dict[str, Exercise] = {
    "loss_gradient": Exercise(
        ("prediction", "target"),
        {"dy": "(N, out)"},
        {
            "dy": [
                ("2 * (prediction - target) / prediction.size", ""),
                (
                    "(prediction - target)**2 / prediction.size",
                    "this is the loss, entry by entry; the question is its gradient",
                ),
            ]
        },
        "dy is right. Note that it now contains 1/(N out): no later step divides again.",
        scales=[
            ("out", "wrong mean: the loss is a mean over all N * out entries, not N"),
            ("N", "wrong mean: the loss is a mean over all N * out entries, not out"),
            ("N * out", "no mean: this is the gradient of the sum of squares; divide by N * out"),
            ("1 / 2", "the derivative of a square brings a factor of 2"),
            ("-1", "the sign: the error is prediction - target"),
        ],
    ),
    "grad_B": Exercise(
        ("dy", "h", "s"),
        {"dB": "(out, r)"},
        {
            "dB": product_forms(
                {"dy": "s * dy", "h": "h"},
                "B (out, r)",
                "B_ok meets column o of dy and column k of h, so the sum is over the rows n of both",
                transposed="dy",
            )
        },
        "dB is right: each entry is a column of dy times a column of h, summed over the rows.",
        scales=SCALES,
        also=("x", "A", "B", "alpha", "r"),
    ),
    "grad_h": Exercise(
        ("dy", "B", "s"),
        {"dh": "(N, r)"},
        {
            "dh": product_forms(
                {"dy": "s * dy", "B": "B"},
                "h (N, r)",
                "h_nk meets row n of dy and column k of B, so the sum is over the outputs o",
            )
        },
        "dh is right. It passes s on to everything that is computed from it.",
        scales=SCALES,
        also=("x", "h", "A", "alpha", "r"),
    ),
    "grad_A": Exercise(
        ("dh", "x"),
        {"dA": "(r, in)"},
        {
            "dA": product_forms(
                {"dh": "dh", "x": "x"},
                "A (r, in)",
                "A_ki meets column k of dh and column i of x, so the sum is over the rows n of both",
                transposed="dh",
            )
        },
        "dA is right. It needs no factor s, because dh already contains it.",
        scales=[
            ("1 / s", "alpha/r is missing: dA gets it from dh = s dy B"),
            ("s", f"{known('the-scaling-is-applied-twice').says}: dh already contains it"),
            *SIZE_HINTS,
        ],
        also=("dy", "h", "A", "B", "s", "alpha", "r"),
    ),
    "backward": Exercise(
        ("dy", "x", "A", "B", "alpha"),
        BACKWARD,
        backward_forms("dy"),
        "All three are right. You have rebuilt LoRA.backward.",
        scales=SCALES,
    ),
    "lora_backward": Exercise(
        ("x", "A", "B", "dL_dy", "alpha", "r"),
        BACKWARD,
        backward_forms("dL_dy"),
        "Right. These are the same products as in backward; only the names and their order differ.",
        scales=SCALES,
        may_lack="dx",
    ),
    "start": Exercise(
        ("in_features", "out_features", "rank", "rng"),
        {"A": "(rank, in)", "B": "(out, rank)"},
        {
            "A": [
                ("(3 * in_features)**-0.5", ""),
                ("(3 * rank)**-0.5", WRONG_SIDE),
                ("(2 / rank)**0.5", f"{WRONG_SIDE}; and {GAIN}"),
                ("rank**-0.5", WRONG_SIDE),
                ("(3 * out_features)**-0.5", "A's fan is in, not out, which is B's"),
                ("(2 / in_features)**0.5", GAIN),
                ("in_features**-0.5", "1/sqrt(in) is the bound of uniform numbers; their RMS is smaller by sqrt(3)"),
                ("(2 / (in_features + rank))**0.5", "this is Glorot's bound, with in + rank; PEFT uses only in"),
                ("1.0", "A has size 1 at any width, so an entry of h is sqrt(in) times as large as one of x"),
                ("0.02", "A has size 0.02 at any width, but the bound must depend on in"),
                ("1 / 3**0.5 / in_features", "1/in instead of 1/sqrt(in): the squares add up over in"),
                ("0.0", "A is zero; A is initialised at random, and B with zeros"),
            ],
            "B": [("0.0", "")],
        },
        "The start is right: B = 0 changes nothing yet, and the size of h does not depend on the width.",
        judged={"A": "np.sqrt((A**2).mean())", "B": "np.abs(B).max()"},
        unknown={
            "A": "its RMS is not that of uniform numbers between -1/sqrt(in) and 1/sqrt(in)",
            "B": "it must be zero: otherwise B A changes the layer before anything is learned",
        },
        tolerance=0.02,
        sizes=(WIDE,),
    ),
    "merged": Exercise(
        ("W", "A", "B", "alpha"),
        {"merged": "(out, in)"},
        {
            "merged": [
                *product_forms({"B": "s * B", "A": "A"}, "W (out, in)", "the change must be (out, in), like W"),
                ("s * B @ A - W", known("merge-returns-the-change-alone").says),
                (
                    "np.float64(np.float16(W) + np.float16(s * B @ A)) - W",
                    "weight and change are rounded to 16 bits, and their sum again; add first, then round once",
                ),
            ]
        },
        "The merged weight is right: one plain layer computes what base and adapter computed together.",
        scales=[
            ("1 / s", "alpha/r is missing: the change is s B A"),
            ("s", f"{known('the-scaling-is-applied-twice').says}: the change is s B A"),
            NOT_DIVIDED,
            ROOT,
            ("2", known("merge-adds-the-change-twice").says),
            ("-1", known("merge-subtracts-the-change").says),
        ],
        judged={"merged": "merged - W"},
    ),
    "count": Exercise(
        ("in_features", "out_features", "rank"),
        {"count": "a number"},
        {
            "count": [
                ("r * (n_in + out)", ""),
                ("n_in * out", "this is the size of the full weight"),
                ("r * n_in * out", "A is (r, in) and B is (out, r): their sizes add, they do not multiply"),
                ("r * n_in", "this is only A; B is trained, too"),
                ("r * out", "this is only B; A is trained, too"),
                ("r * (n_in + out) + out", "the bias belongs to the base, which is frozen"),
                ("r * (n_in + out) + n_in * out", "the base is frozen, so it does not count"),
                ("n_in + out", "this is rank 1; each rank adds a row to A and a column to B"),
            ]
        },
        "The count is right: r (in + out), compared with in * out for the full weight.",
        unknown={"count": "write down the shapes of A and B"},
    ),
    "factors": Exercise(
        ("change", "rank"),
        {"A": "(rank, in)", "B": "(out, rank)"},
        {
            "B A": [
                ("left[:, :r] * singular[:r] @ right[:r]", ""),
                ("left[:, :r] @ right[:r]", "the singular values are missing: they belong in one of the factors"),
                (
                    "left[:, :r] * singular[:r]**2 @ right[:r]",
                    "the singular values are in both factors, so B A contains their squares",
                ),
                (
                    "left[:, -r:] * singular[-r:] @ right[-r:]",
                    "these are the smallest singular values; the closest matrix keeps the largest",
                ),
            ]
        },
        "B A is the closest matrix of its rank, by Eckart and Young: it keeps only the largest singular values.",
        judged={"B A": "B @ A"},
        unknown={"B A": "its distance from the change is {off}, and {least} is possible. Think of the singular values"},
        aim="change",
    ),
    "grad_scores": Exercise(
        ("P", "dP"),
        {"dS": "(T, U)"},
        {
            "dS": [
                (f"P * (dP - {SHARES})", ""),
                ("P * dP", "S_tu is also in the denominator of its whole row: something must be subtracted"),
                ("P * (1 - P) * dP", "this is only the effect on P_tu; S_tu also affects the other P_tw of its row"),
                ("P * (dP - dP.sum(axis=1, keepdims=True))", "dP is summed without the probabilities P_tw as weights"),
                ("P * (dP - dP.mean(axis=1, keepdims=True))", "the mean of dP must be weighted by P_tw"),
                (f"P * (dP + {SHARES})", "the denominator's part must be subtracted"),
                (f"dP - {SHARES}", "the factor P_tu in front is missing"),
                (f"P * {SHARES}", "this is only the denominator's part; dP_tu itself is missing"),
                ("P * (dP - (P * dP).sum(axis=0))", f"the sum is over the columns; {ROW}"),
                ("P * (dP - (P * dP).sum())", f"the sum is over everything; {ROW}"),
                (f"P * (dP - {SHARES}.T)", "the sum of row t must stay in row t: use keepdims=True or [:, None]"),
                (f"(P * (dP - {SHARES})).T", "the right numbers, transposed: dS must have the shape of P (T, U)"),
            ]
        },
        "dS is right. Each of its rows sums to zero, since adding a constant to all scores of a row changes nothing.",
        scales=[SIGN],
    ),
    "grad_V": Exercise(
        ("dW", "V", "m"),
        {"dV": "(out, in)"},
        {
            "dV": [
                (f"{M_O} / {N_O} * (dW - V * {ALONG} / {N_O}**2)", ""),
                (f"{M_O} / {N_O} * dW", HELD_CONSTANT),
                (f"dW - V * {ALONG} / {N_O}**2", "the factor m/n in front is missing"),
                (f"(dW - V * {ALONG} / {N_O}**2) / {N_O}", "m is missing: the weight is m V / n"),
                (f"{M_O} * (dW - V * {ALONG} / {N_O}**2)", "m instead of m/n"),
                (f"{M_O} / {N_O} * (dW - V * {ALONG})", "V_o does not have norm 1: divide its part by n^2"),
                (f"{M_O} / {N_O} * (dW - V * {ALONG} / {N_O})", "n instead of n^2: each of the two V_o needs one"),
                (
                    f"{M_O} / {N_O} * (dW + V * {ALONG} / {N_O}**2)",
                    known("the-gradient-through-dora-norm-is-added").says,
                ),
                (
                    f"-{M_O} / {N_O} * V * {ALONG} / {N_O}**2",
                    "this is only the part through n; V_oi is in the numerator, too",
                ),
                (f"m / {N_O}.T * (dW - V * {ALONG}.T / {N_O}.T**2)", KEEPDIMS),
                (f"m / {N_O}.T * dW", f"{HELD_CONSTANT}; and {KEEPDIMS}"),
            ]
        },
        "dV is right. Each of its rows is orthogonal to the same row of V; with n held constant it would not be.",
        scales=[SIGN],
    ),
}
"""The exercises, by the function's name; a new one also needs a grader below."""


def exercise_sheet(name: str) -> dict[str, Any]:
    """Return the data by which `docs/_static/exercises.js` judges an answer in the page, ready for JSON."""
    exercise = EXERCISES[name]
    forms = {
        result: [form for form in own if "float16" not in form[0]]  # the page cannot evaluate it
        for result, own in exercise.forms.items()
    }
    lines = [line for own in (*forms.values(), exercise.scales) for line, _ in own]
    words = re.findall(r"\w+", " ".join([*lines, *exercise.judged.values(), *exercise.returns.values(), exercise.aim]))
    needed = {*exercise.arguments, *exercise.also, *words, "N", "out"} - {"rng", *exercise.returns}
    return {
        **asdict(exercise),
        "forms": forms,
        "scales": [(*scale, scale in DIVISIONS) for scale in exercise.scales],
        "data": [
            {word: np.asarray(value).tolist() for word, value in vars(data(**sizes)).items() if word in needed}
            for sizes in exercise.sizes
        ],
    }


def check_loss_gradient(answer: Callable) -> bool:
    """Grade step 1, ``loss_gradient(prediction, target) -> dy``, the gradient of the mean over all entries.

    Parameters
    ----------
    answer : callable
        Your function.

    Returns
    -------
    bool
        Whether it is right. The function also prints praise, or a hint for each mistake.
    """
    return grade(EXERCISES["loss_gradient"], answer)


def check_grad_B(answer: Callable) -> bool:
    """Grade step 2, ``grad_B(dy, h, s) -> dB`` for y = s h B^T. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["grad_B"], answer)


def check_grad_h(answer: Callable) -> bool:
    """Grade step 3, ``grad_h(dy, B, s) -> dh`` for y = s h B^T. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["grad_h"], answer)


def check_grad_A(answer: Callable) -> bool:
    """Grade step 4, ``grad_A(dh, x) -> dA`` for h = x A^T. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["grad_A"], answer)


def check_backward(answer: Callable) -> bool:
    """Grade step 5, ``backward(dy, x, A, B, alpha) -> (dx, dA, dB)``. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["backward"], answer)


def check_lora_backward(answer: Callable) -> bool:
    """Grade step 5 as interviews ask it: ``lora_backward(x, A, B, dL_dy, alpha, r) -> (dx, dA, dB)``, or (dA, dB).

    A is (r, in), B is (out, r), and y = alpha/r x A^T B^T. Results are as in `check_loss_gradient`.
    """
    return grade(EXERCISES["lora_backward"], answer)


def check_start(answer: Callable) -> bool:
    """Grade step 7, ``start(in_features, out_features, rank, rng) -> (A, B)``, PEFT's initialisation, by its RMS.

    `rng` is a `numpy.random.Generator`. The width is 640, and the RMS of A may be off by 2 %. Results are as in
    `check_loss_gradient`.
    """
    return grade(EXERCISES["start"], answer)


def check_first_to_move(answer: Callable) -> bool:
    """Grade step 7, ``first_to_move(A_is_zero, B_is_zero) -> {"A", "B"}``, on real layers, for all four cases.

    Your function returns a set or list, possibly empty, with the names of the factors that Adam's first step changes.
    Results are as in `check_loss_gradient`.
    """
    for zero_A, zero_B in ZERO_STARTS:
        try:
            got = answer(zero_A, zero_B)
        except Exception as error:  # a learner's code may raise anything
            return print_hint(stopped(error))
        if got is None:
            return print_hint("your function returned None; is the return missing?")
        try:
            names = set(got) if isinstance(got, (set, frozenset, list, tuple, str, dict)) else None
        except TypeError:  # the entries are not hashable
            names = None
        if names is None:
            return print_hint(f"return a set such as {{'A'}}; you returned {kind_of_value(got)}")
        if wrong := what_moves(zero_A, zero_B, names):
            return print_hint(wrong)
    print(ALL_FOUR)
    return True


ZERO_STARTS = [*product((False, True), repeat=2)]
ALL_FOUR = "All four are right. Each gradient contains the other factor, so a zero factor stops the other one."
_SLOPE = {"A": "dA = s (dy B)^T x contains B", "B": "dB = s dy^T h contains h = x A^T, and so A"}


def what_moves(zero_A: bool, zero_B: bool, names: set) -> str:
    """Return a hint if `names` are not the factors that move from this start, and "" if they are."""
    moved = _moved(zero_A, zero_B)
    missing, extra = sorted(moved - names), sorted(names - moved, key=str)
    parts = [f"{name} moves, too: {_SLOPE[name]}, which is not zero" for name in missing]
    parts += [f"{name} does not move: {_SLOPE[name]}, and that is zero" for name in extra if name in _SLOPE]
    parts += [f"{name!r} is not the name of a factor" for name in extra if name not in _SLOPE]
    start = " and ".join(f"{n} {'zero' if zero else 'random'}" for n, zero in (("A", zero_A), ("B", zero_B)))
    return f"{start}: {'; and '.join(parts)}." if parts else ""


def starts_sheet() -> dict[str, Any]:
    """Return the page's hints for each answer and each start, ready for JSON."""
    answers = ("", "A", "B", "AB")
    says = [{names: what_moves(zero_A, zero_B, set(names)) for names in answers} for zero_A, zero_B in ZERO_STARTS]
    return {"starts": says, "praise": ALL_FOUR}


def _moved(zero_A: bool, zero_B: bool) -> set[str]:
    """Return the names of the factors that the first step changes."""
    layer, x, _ = first_problem()
    rng = np.random.default_rng(7)
    layer.lora_A[...] = 0 if zero_A else rng.standard_normal(layer.lora_A.shape)
    layer.lora_B[...] = 0 if zero_B else rng.standard_normal(layer.lora_B.shape)
    before = {name: p.copy() for name, p in layer.trainable().items()}
    _, grads = layer.backward(rng.standard_normal((8, 4)), layer.forward(x)[1])
    Adam(layer.trainable()).step(grads)
    return {name[-1] for name, p in layer.trainable().items() if not np.array_equal(p, before[name])}


def check_merged(answer: Callable) -> bool:
    """Grade step 8, ``merged(W, A, B, alpha) -> W``, the merged weight. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["merged"], answer)


def check_count(answer: Callable) -> bool:
    """Grade step 9, ``count(in_features, out_features, rank) -> int``. Results are as in `check_loss_gradient`."""
    return grade(EXERCISES["count"], answer)


def check_factors(answer: Callable) -> bool:
    """Grade step 10, ``factors(change, rank) -> (A, B)`` with B A as close to the change as the rank allows.

    Any two factors with the right product are accepted, such as (Q A, B Q^-1). Results are as in `check_loss_gradient`.
    """
    return grade(EXERCISES["factors"], answer)


def check_grad_scores(answer: Callable) -> bool:
    """Grade step 11, ``grad_scores(P, dP) -> dS``, the backward of the softmax P_tu = exp(S_tu) / sum_w exp(S_tw).

    P and dP are (T, U), and each row of P sums to 1. Results are as in `check_loss_gradient`.
    """
    return grade(EXERCISES["grad_scores"], answer)


def check_grad_V(answer: Callable) -> bool:
    """Grade step 15, ``grad_V(dW, V, m) -> dV``, the backward of DoRA's weight W_oi = m_o V_oi / n_o with n_o = |V_o|.

    dW and V are (out, in), m is (out,). Results are as in `check_loss_gradient`.
    """
    return grade(EXERCISES["grad_V"], answer)
