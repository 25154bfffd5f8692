"""The graders of functions, one for each step that asks for one.

Each knows the right formula and the mistakes that people make, and hands both to `grading.grade`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from ..conformance.problems.bugs import known
from ..optim import Adam
from .experiments import first_problem
from .grading import (
    DIFFERENT,
    DIVISIONS,
    EQUAL,
    NOT_DIVIDED,
    ROOT,
    SCALES,
    SIGN,
    SIZES,
    Data,
    Formula,
    Hinted,
    data,
    grade,
    is_numbers,
    kind_of_value,
    product_forms,
    same,
    say,
    stopped,
    value_or_none,
)


def check_loss_gradient(answer: Callable) -> bool:
    """Grade step 1, ``loss_gradient(prediction, target) -> dy``: the gradient of the mean over all entries.

    Parameters
    ----------
    answer : callable
        Your function.

    Returns
    -------
    bool
        Whether it is right. The verdict, or a hint for each mistake, is printed.
    """
    means: Sequence[Hinted] = [
        (lambda d: d.out, "wrong mean: the loss is a mean over all N * out entries, not N"),
        (lambda d: d.N, "wrong mean: the loss is a mean over all N * out entries, not out"),
        (lambda d: d.N * d.out, "no mean: this is the gradient of the sum of squares; divide by N * out"),
        (lambda d: 1 / 2, "the derivative of a square brings a factor of 2"),
        (lambda d: -1, "the sign: the error is prediction - target"),
    ]
    forms: Sequence[Hinted] = [
        (lambda d: 2 * (d.p - d.t) / d.p.size, ""),
        (lambda d: (d.p - d.t) ** 2 / d.p.size, "this is the loss, entry by entry; its gradient was asked"),
    ]
    praise = "dy is right. Note that the 1/(N out) is in it now: no later step divides again."
    return grade(lambda d: answer(d.p, d.t), {"dy": forms}, means, praise)


class Product(NamedTuple):
    """A step whose answer is one product: what it is made of, the forms that people write, and the praise."""

    result: str
    shape: str
    inputs: tuple[str, ...]  # the names of the arguments, in order
    forms: Sequence[Hinted]
    scales: Sequence[Hinted]
    praise: str


PRODUCTS = {
    "grad_B": Product(
        "dB",
        "(out, r)",
        ("dy", "h", "s"),
        product_forms(
            ("dy", lambda d: d.s * d.dy),
            ("h", lambda d: d.h),
            transposed=(True, False),
            like="B (out, r)",
            why="B_ok meets column o of dy and column k of h, so the sum runs over the rows n of both",
        ),
        SCALES,
        "dB is right: the column of dy against the column of h, added up over the rows.",
    ),
    "grad_h": Product(
        "dh",
        "(N, r)",
        ("dy", "B", "s"),
        product_forms(
            ("dy", lambda d: d.s * d.dy),
            ("B", lambda d: d.B),
            transposed=(False, False),
            like="h (N, r)",
            why="h_nk meets row n of dy and column k of B, so the sum runs over the outputs o",
        ),
        SCALES,
        "dh is right. It carries the s to everything that comes after it.",
    ),
    "grad_A": Product(
        "dA",
        "(r, in)",
        ("dh", "x"),
        product_forms(
            ("dh", lambda d: d.dh),
            ("x", lambda d: d.x),
            transposed=(True, False),
            like="A (r, in)",
            why="A_ki meets column k of dh and column i of x, so the sum runs over the rows n of both",
        ),
        SIZES,
        "dA is right, and it has no s of its own: that came with dh.",
    ),
}
"""Steps 2 to 4. `check_grad_B` and its two neighbours grade a function, the site an expression, by the same forms."""


def grade_product(name: str, answer: Callable) -> bool:
    """Grade a function that should return the product of a step."""
    step = PRODUCTS[name]
    return grade(lambda d: answer(*attrgetter(*step.inputs)(d)), {step.result: step.forms}, step.scales, step.praise)


def expression_sheet(name: str) -> dict[str, Any]:
    """Return what an expression for a step is judged by, as JSON can hold it: `docs/_static/expression.js` judges.

    Each list has two entries: for sizes that all differ, and for sizes that are all equal.
    """
    step, both = PRODUCTS[name], (data(**DIFFERENT), data(**EQUAL))

    def listed(formula: Formula) -> list[Any]:
        products = [value_or_none(formula, d) for d in both]
        return [None if value is None else np.asarray(value).tolist() for value in products]

    def told_apart(scale: Hinted) -> list[Any]:
        different, equal = listed(scale[0])  # where all sizes are equal, a division by one of them could be by any
        return [different, None if scale in DIVISIONS else equal]

    return {
        "result": step.result,
        "shape": step.shape,
        "inputs": {given: listed(attrgetter(given)) for given in step.inputs},
        "forms": [{"values": listed(formula), "hint": hint} for formula, hint in step.forms],
        "scales": [{"values": told_apart(scale), "hint": scale[1]} for scale in step.scales],
        "praise": step.praise,
    }


def check_grad_B(answer: Callable) -> bool:
    """Grade step 2, ``grad_B(dy, h, s) -> dB`` of y = s h B^T. Results are as in `check_loss_gradient`."""
    return grade_product("grad_B", answer)


def check_grad_h(answer: Callable) -> bool:
    """Grade step 3, ``grad_h(dy, B, s) -> dh`` of y = s h B^T. Results are as in `check_loss_gradient`."""
    return grade_product("grad_h", answer)


def check_grad_A(answer: Callable) -> bool:
    """Grade step 4, ``grad_A(dh, x) -> dA`` of h = x A^T. Results are as in `check_loss_gradient`."""
    return grade_product("grad_A", answer)


def check_backward(answer: Callable) -> bool:
    """Grade step 5, ``backward(dy, x, A, B, alpha) -> (dx, dA, dB)``. Results are as in `check_loss_gradient`."""
    dh, h = ("dh", lambda d: d.s * d.dy @ d.B), ("h", lambda d: d.x @ d.A.T)
    over_rows = "the sum runs over the rows of both"
    other_dh, other_h = "swapped factors: dh is made with B, and not with A", "swapped factors: h is made with A"
    forms = {
        "dx": [
            *product_forms(
                dh,
                ("A", lambda d: d.A),
                transposed=(False, False),
                like="x (N, in)",
                why="h has A^T, so dx has A itself",
            ),
            (lambda d: d.s * d.dy @ d.A @ d.B, other_dh),
        ],
        "dA": [
            *product_forms(dh, ("x", lambda d: d.x), transposed=(True, False), like="A (r, in)", why=over_rows),
            (lambda d: d.s * (d.dy @ d.A).T @ d.x, other_dh),
        ],
        "dB": [
            *product_forms(("dy", lambda d: d.s * d.dy), h, transposed=(True, False), like="B (out, r)", why=over_rows),
            (lambda d: d.s * d.dy.T @ (d.x @ d.A), "h = x A^T: a missing transpose"),
            (lambda d: d.s * d.dy.T @ (d.x @ d.B.T), other_h),
        ],
    }
    praise = "All three are right. You have rebuilt LoRA.backward."
    return grade(lambda d: answer(d.dy, d.x, d.A, d.B, d.alpha), forms, SCALES, praise)


def check_first_to_move(answer: Callable) -> bool:
    """Grade step 7, ``first_to_move(A_is_zero, B_is_zero) -> {"A", "B"}``, on real layers, for all four starts.

    Your function returns a set, or a list, of the names of the factors that the first step of Adam changes; it may be
    empty. Results are as in `check_loss_gradient`.
    """
    for zero_A, zero_B in product((False, True), repeat=2):
        moved = _moved(zero_A, zero_B)
        start = " and ".join(f"{n} {'zero' if zero else 'random'}" for n, zero in (("A", zero_A), ("B", zero_B)))
        try:
            got = answer(zero_A, zero_B)
        except Exception as error:  # whatever a learner's code may raise
            return say(stopped(error))
        if got is None:
            return say("your function returned None; is the return missing?")
        try:
            names = set(got) if isinstance(got, (set, frozenset, list, tuple, str, dict)) else None
        except TypeError:  # of a list of lists no set can be made
            names = None
        if names is None:
            return say(f"return a set such as {{'A'}}; you returned {kind_of_value(got)}")
        if names != moved:
            missing, extra = sorted(moved - names), sorted(names - moved, key=str)
            parts = [f"{name} moves, too: {_SLOPE[name]}, which is not zero" for name in missing]
            parts += [f"{name} does not move: {_SLOPE[name]}, and that is zero" for name in extra if name in _SLOPE]
            parts += [f"{name!r} is not the name of a factor" for name in extra if name not in _SLOPE]
            return say(f"{start}: {'; and '.join(parts)}.")
    print("All four are right. Each gradient contains the other factor, so a zero factor stops the other one.")
    return True


_SLOPE = {"A": "dA = s (dy B)^T x contains B", "B": "dB = s dy^T h contains h = x A^T, and so A"}


def _moved(zero_A: bool, zero_B: bool) -> set[str]:
    """Return which factors the first step changes."""
    layer, x, _ = first_problem()
    rng = np.random.default_rng(7)
    layer.lora_A[...] = 0 if zero_A else rng.standard_normal(layer.lora_A.shape)
    layer.lora_B[...] = 0 if zero_B else rng.standard_normal(layer.lora_B.shape)
    before = {name: p.copy() for name, p in layer.trainable().items()}
    _, grads = layer.backward(rng.standard_normal((8, 4)), layer.forward(x)[1])
    Adam(layer.trainable()).step(grads)
    return {name[-1] for name, p in layer.trainable().items() if not np.array_equal(p, before[name])}


def check_merged(answer: Callable) -> bool:
    """Grade step 8, ``merged(W, A, B, alpha) -> W'``, one weight for base and adapter. Results are as in
    `check_loss_gradient`.
    """  # noqa: D205
    why = "the change must be (out, in), as W is"
    forms = product_forms(
        ("B", lambda d: d.s * d.B), ("A", lambda d: d.A), transposed=(False, False), like="W (out, in)", why=why
    )
    alone: Sequence[Hinted] = [(lambda d: d.s * d.B @ d.A - d.W, known("merge-returns-the-change-alone").says)]
    scales: Sequence[Hinted] = [
        (lambda d: 1 / d.s, "alpha/r is missing: the change is s B A"),
        (lambda d: d.s, f"{known('the-scaling-is-applied-twice').says}: the change is s B A"),
        NOT_DIVIDED,
        ROOT,
        (lambda d: 2, known("merge-adds-the-change-twice").says),
        (lambda d: -1, known("merge-subtracts-the-change").says),
    ]
    praise = "The merged weight is right: one plain layer gives what base and adapter gave together."

    return grade(lambda d: answer(d.W, d.A, d.B, d.alpha), {"W'": [*forms, *alone]}, scales, praise, lambda d: d.W)


def check_count(answer: Callable) -> bool:
    """Grade step 9, ``count(in_features, out_features, rank) -> int``. Results are as in `check_loss_gradient`."""
    forms: Sequence[Hinted] = [
        (lambda d: d.r * (d.n_in + d.out), ""),
        (lambda d: d.n_in * d.out, "this is the count of the full weight"),
        (lambda d: d.r * d.n_in * d.out, "A is (r, in) and B is (out, r): their counts add, they do not multiply"),
        (lambda d: d.r * d.n_in, "this is A alone; B trains, too"),
        (lambda d: d.r * d.out, "this is B alone; A trains, too"),
        (lambda d: d.r * (d.n_in + d.out) + d.out, "the bias belongs to the base, which is frozen"),
        (lambda d: d.r * (d.n_in + d.out) + d.n_in * d.out, "the base is frozen: it counts for nothing"),
        (lambda d: d.n_in + d.out, "this is rank 1; each rank adds a row to A and a column to B"),
    ]
    praise = "The count is right: r (in + out), against in * out for the full weight."
    return grade(lambda d: answer(d.n_in, d.out, d.r), {"the count": forms}, [], praise)


def check_factors(answer: Callable) -> bool:
    """Grade step 10, ``factors(change, rank) -> (A, B)`` with B A as near to the change as the rank allows.

    Any two factors of the right product will do: (Q A, B Q^-1) has the same. Results are as in `check_loss_gradient`.
    """
    change, r = np.random.default_rng(3).standard_normal((5, 7)), 2
    U, S, Vt = np.linalg.svd(change, full_matrices=False)
    argument = change.copy()
    try:
        got = answer(argument, r)
    except Exception as error:  # whatever a learner's code may raise
        return say(stopped(error))
    if not np.array_equal(argument, change):
        return say("your code changed its argument in place; make a new array")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        return say(f"return 2 arrays, (A, B); you returned {kind_of_value(got)}")
    if other := [part for part in got if not is_numbers(part)]:
        return say(f"A and B must be numbers, you returned {kind_of_value(other[0])}")
    A, B = (np.asarray(part) for part in got)
    if (A.shape, B.shape) != ((2, 7), (5, 2)):
        swapped = " (swapped?)" if (A.shape, B.shape) == ((5, 2), (2, 7)) else ""
        return say(f"A must be (2, 7) and B (5, 2); you returned {kind_of_value(A)} and {kind_of_value(B)}{swapped}")
    likely: list[tuple[np.ndarray, str]] = [
        (U[:, :r] @ Vt[:r], "the singular values are missing: they belong into one of the factors"),
        (U[:, :r] * S[:r] ** 2 @ Vt[:r], "the singular values are in both factors: B A has their squares"),
        (U[:, -r:] * S[-r:] @ Vt[-r:], "these are the smallest singular values; the nearest matrix keeps the largest"),
    ]
    if same(B @ A, U[:, :r] * S[:r] @ Vt[:r]):
        print("B A is the nearest matrix of its rank, by Eckart and Young: the largest singular values, and no others.")
        return True
    for wrong, hint in likely:
        if same(B @ A, wrong):
            return say(hint)
    off, least = np.linalg.norm(B @ A - change), np.linalg.norm(S[r:])
    return say(f"B A is {off:.3g} away from the change; {least:.3g} is possible. Think of its singular values")


def check_grad_scores(answer: Callable) -> bool:
    """Grade step 11, ``grad_scores(P, dP) -> dS``: back through the softmax P_tu = exp(S_tu) / sum_w exp(S_tw).

    P and dP are (T, U), and each row of P sums to 1. Results are as in `check_loss_gradient`.
    """

    def mean(d: Data) -> Any:
        return (d.P * d.dP).sum(axis=1, keepdims=True)

    row = "the sum runs along row t, over the shares of one softmax"
    forms: Sequence[Hinted] = [
        (lambda d: d.P * (d.dP - mean(d)), ""),
        (lambda d: d.P * d.dP, "S_tu stands in the denominator of its whole row, too: something must be subtracted"),
        (
            lambda d: d.P * (1 - d.P) * d.dP,
            "this is the share's own part; S_tu acts on all other shares of its row, too",
        ),
        (lambda d: d.P * (d.dP - d.dP.sum(axis=1, keepdims=True)), "dP is added up without the shares P_tw as weights"),
        (lambda d: d.P * (d.dP - d.dP.mean(axis=1, keepdims=True)), "the plain mean of dP; the shares P_tw weigh it"),
        (lambda d: d.P * (d.dP + mean(d)), "the denominator's part is subtracted: it is below the line"),
        (lambda d: d.dP - mean(d), "the factor P_tu in front is missing"),
        (lambda d: d.P * mean(d), "this is the denominator's part alone; dP_tu itself is missing"),
        (lambda d: d.P * (d.dP - (d.P * d.dP).sum(axis=0)), f"the sum runs down the columns; {row}"),
        (lambda d: d.P * (d.dP - (d.P * d.dP).sum()), f"the sum runs over everything; {row}"),
        (lambda d: d.P * (d.dP - mean(d).T), "the sum of row t must stand in row t: keepdims=True, or [:, None]"),
        (lambda d: (d.P * (d.dP - mean(d))).T, "the right numbers, transposed: dS must have the shape of P (T, U)"),
    ]
    praise = "dS is right. Each row sums to zero, since a number added to all scores of a row changes nothing."
    return grade(lambda d: answer(d.P, d.dP), {"dS": forms}, [SIGN], praise)


def check_grad_V(answer: Callable) -> bool:
    """Grade step 15, ``grad_V(dW, V, m) -> dV``: back through DoRA's weight W_oi = m_o V_oi / n_o with n_o = |V_o|.

    dW and V are (out, in), m is (out,). Results are as in `check_loss_gradient`.
    """

    def n(d: Data) -> Any:
        return np.linalg.norm(d.V, axis=1, keepdims=True)

    def m(d: Data) -> Any:
        return d.m[:, None]

    def along(d: Data) -> Any:
        return (d.dW * d.V).sum(axis=1, keepdims=True)

    held = "n is held constant, as the paper proposes and PEFT does; asked is the full gradient, and n_o depends on V_o"
    row = "keepdims=True, or [:, None]: the length and the magnitude of row o must stand in row o"
    forms: Sequence[Hinted] = [
        (lambda d: m(d) / n(d) * (d.dW - d.V * along(d) / n(d) ** 2), ""),
        (lambda d: m(d) / n(d) * d.dW, held),
        (lambda d: d.dW - d.V * along(d) / n(d) ** 2, "the factor m/n in front is missing"),
        (lambda d: (d.dW - d.V * along(d) / n(d) ** 2) / n(d), "m is missing: the weight is m V / n"),
        (lambda d: m(d) * (d.dW - d.V * along(d) / n(d) ** 2), "m where m/n belongs"),
        (lambda d: m(d) / n(d) * (d.dW - d.V * along(d)), "V_o is not of length 1: divide its part by n^2"),
        (lambda d: m(d) / n(d) * (d.dW - d.V * along(d) / n(d)), "n where n^2 belongs: each of the two V_o brings one"),
        (
            lambda d: m(d) / n(d) * (d.dW + d.V * along(d) / n(d) ** 2),
            known("the-gradient-through-dora-norm-is-added").says,
        ),
        (
            lambda d: -m(d) / n(d) * d.V * along(d) / n(d) ** 2,
            "this passes through n alone; V_oi stands above n_o, too",
        ),
        (lambda d: d.m / n(d).T * (d.dW - d.V * along(d).T / n(d).T ** 2), row),
        (lambda d: d.m / n(d).T * d.dW, f"{held}; and {row}"),
    ]
    if not grade(lambda d: answer(d.dW, d.V, d.m), {"dV": forms}, [SIGN], "dV is right."):
        return False
    d = data(**DIFFERENT)
    full, constant = (np.abs((formula(d) * d.V).sum(axis=1)).max() for formula, _ in forms[:2])
    print(f"Each row is orthogonal to its row of V: the largest product is {full:.0e}.", end=" ")
    print(f"With n held constant it would be {constant:.2g}.")
    return True
