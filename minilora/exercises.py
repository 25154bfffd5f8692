"""Ten exercises with graders: rebuild `LoRA.backward` in five steps, then five questions about what it does.

Write a function and give it to its grader, ``check_...``. The grader prints what is right, or what kind of mistake it
sees, and returns whether the answer is right.

====  ==================================================  ===========================================================
step  you write                                           it returns
====  ==================================================  ===========================================================
1     ``loss_gradient(prediction, target)``               dy (N, out) of the mean squared error
2     ``grad_B(dy, h, s)``                                dB (out, r)
3     ``grad_h(dy, B, s)``                                dh (N, r)
4     ``grad_A(dh, x)``                                   dA (r, in)
5     ``backward(dy, x, A, B, alpha)``                    dx (N, in), dA (r, in), dB (out, r)
6     a number, for ``check_prediction(question, n)``     what a few lines would print
7     ``first_to_move(A_is_zero, B_is_zero)``             the names of the factors that the first step changes
8     ``merged(W, A, B, alpha)``                          the weight of one plain layer (out, in)
9     ``count(in_features, out_features, rank)``          how many numbers an adapter trains
10    ``factors(change, rank)``                           A (r, in) and B (out, r): B A as near as it gets
====  ==================================================  ===========================================================

How a grader finds a mistake. It calls your function with sizes that all differ, so that a wrong product mostly does not
fit. Then it calls it with all sizes equal: there every product fits, and the answer shows which one you took. A wrong
answer is compared with every order and transposition of the right factors, each times any number. So a wrong product
and a wrong factor in front of it are told apart, and both are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from .checks import check_choice, check_number
from .lora import LoRA
from .optim import Adam

Data: TypeAlias = SimpleNamespace
Formula: TypeAlias = Callable[[Data], Any]
Mistakes: TypeAlias = Sequence[tuple[Formula, str]]


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
    means: Mistakes = [
        (lambda d: d.out, "wrong mean: the loss is a mean over all N * out entries, not N"),
        (lambda d: d.N, "wrong mean: the loss is a mean over all N * out entries, not out"),
        (lambda d: d.N * d.out, "no mean: this is the gradient of the sum of squares; divide by N * out"),
        (lambda d: 1 / 2, "the derivative of a square brings a factor of 2"),
        (lambda d: -1, "the sign: the error is prediction - target"),
    ]
    right: Formula = lambda d: 2 * (d.p - d.t) / d.p.size  # noqa: E731
    entry = "this is the loss, entry by entry; its gradient was asked"
    loss: Mistakes = [(lambda d: (d.p - d.t) ** 2 / d.p.size, entry)]
    praise = "dy is right. Note that the 1/(N out) is in it now: no later step divides again."
    return _grade(lambda d: answer(d.p, d.t), {"dy": [(right, ""), *loss]}, means, praise)


def check_grad_B(answer: Callable) -> bool:
    """Grade step 2, ``grad_B(dy, h, s) -> dB`` of y = s h B^T. Results are as in `check_loss_gradient`."""
    why = "B_ok meets column o of dy and column k of h, so the sum runs over the rows n of both"
    forms = _forms(("dy", lambda d: d.s * d.dy), ("h", lambda d: d.h), transposed=(True, False), why=why)
    praise = "dB is right: the column of dy against the column of h, added up over the rows."
    return _grade(lambda d: answer(d.dy, d.h, d.s), {"dB": forms}, _SCALES, praise)


def check_grad_h(answer: Callable) -> bool:
    """Grade step 3, ``grad_h(dy, B, s) -> dh`` of y = s h B^T. Results are as in `check_loss_gradient`."""
    why = "h_nk meets row n of dy and column k of B, so the sum runs over the outputs o"
    forms = _forms(("dy", lambda d: d.s * d.dy), ("B", lambda d: d.B), transposed=(False, False), why=why)
    praise = "dh is right. It carries the s to everything that comes after it."
    return _grade(lambda d: answer(d.dy, d.B, d.s), {"dh": forms}, _SCALES, praise)


def check_grad_A(answer: Callable) -> bool:
    """Grade step 4, ``grad_A(dh, x) -> dA`` of h = x A^T. Results are as in `check_loss_gradient`."""
    why = "A_ki meets column k of dh and column i of x, so the sum runs over the rows n of both"
    forms = _forms(("dh", lambda d: d.dh), ("x", lambda d: d.x), transposed=(True, False), why=why)
    praise = "dA is right, and it has no s of its own: that came with dh."
    return _grade(lambda d: answer(d.dh, d.x), {"dA": forms}, _SIZES, praise)


def check_backward(answer: Callable) -> bool:
    """Grade step 5, ``backward(dy, x, A, B, alpha) -> (dx, dA, dB)``. Results are as in `check_loss_gradient`."""
    dh, h = ("dh", lambda d: d.s * d.dy @ d.B), ("h", lambda d: d.x @ d.A.T)
    over_rows = "the sum runs over the rows of both"
    other_dh, other_h = "swapped factors: dh is made with B, and not with A", "swapped factors: h is made with A"
    forms = {
        "dx": [
            *_forms(dh, ("A", lambda d: d.A), transposed=(False, False), why="h has A^T, so dx has A itself"),
            (lambda d: d.s * d.dy @ d.A @ d.B, other_dh),
        ],
        "dA": [
            *_forms(dh, ("x", lambda d: d.x), transposed=(True, False), why=over_rows),
            (lambda d: d.s * (d.dy @ d.A).T @ d.x, other_dh),
        ],
        "dB": [
            *_forms(("dy", lambda d: d.s * d.dy), h, transposed=(True, False), why=over_rows),
            (lambda d: d.s * d.dy.T @ (d.x @ d.A), "h = x A^T: a missing transpose"),
            (lambda d: d.s * d.dy.T @ (d.x @ d.B.T), other_h),
        ],
    }
    praise = "All three are right. You have rebuilt LoRA.backward."
    return _grade(lambda d: answer(d.dy, d.x, d.A, d.B, d.alpha), forms, _SCALES, praise)


def check_prediction(question: str, guess: float) -> bool:
    """Grade step 6: run the experiment of a question and compare what it gives with your guess.

    Parameters
    ----------
    question : {"first step", "larger gradients", "larger alpha", "larger alpha, plain steps", "off by one"}
        Which one; `QUESTIONS` has their texts.
    guess : float
        The number that you expect, right to 5 %.

    Returns
    -------
    bool
        Whether it is right. The verdict is printed, and the number only where you had it.

    Raises
    ------
    ValueError, TypeError
        If there is no such question, or the guess is no number.
    """
    check_choice("question", question, tuple(QUESTIONS))
    guess = check_number("guess", guess, above=-np.inf)
    _, run, why, hint = QUESTIONS[question]
    number = run()
    right = abs(guess - number) <= 0.05 * abs(number)
    print(f"Right: the experiment gives {number:.4g}. {why}" if right else f"{guess:g} is not what comes out. {hint}")
    return right


def check_first_to_move(answer: Callable) -> bool:
    """Grade step 7, ``first_to_move(A_is_zero, B_is_zero) -> {"A", "B"}``, on real layers, for all four starts.

    Your function returns a set, or a list, of the names of the factors that the first step of Adam changes; it may be
    empty. Results are as in `check_loss_gradient`.
    """
    for zero_A, zero_B in product((False, True), repeat=2):
        moved = _moved(zero_A, zero_B)
        start = " and ".join(f"{n} {'zero' if zero else 'random'}" for n, zero in (("A", zero_A), ("B", zero_B)))
        try:
            got = set(answer(zero_A, zero_B))
        except Exception as error:  # whatever a learner's code may raise
            return _say(f"your code stopped with {type(error).__name__}: {error}")
        if got != moved:
            missing, extra = sorted(moved - got), sorted(got - moved, key=str)
            parts = [f"{name} moves, too" for name in missing] + [f"{name} does not move" for name in extra]
            return _say(f"{start}: {', and '.join(parts)}. dB contains h = x A^T, and dA contains B.")
    print("All four are right. Each gradient contains the other factor, so a zero factor stops the other one.")
    return True


def check_merged(answer: Callable) -> bool:
    """Grade step 8, ``merged(W, A, B, alpha) -> W'``, one weight for base and adapter. Results are as in
    `check_loss_gradient`.
    """  # noqa: D205
    why = "the change must be (out, in), as W is"
    forms = _forms(("B", lambda d: d.s * d.B), ("A", lambda d: d.A), transposed=(False, False), why=why)
    alone: Mistakes = [(lambda d: d.s * d.B @ d.A - d.W, "this is the change alone; the base is missing")]
    scales: Mistakes = [
        (lambda d: 1 / d.s, "alpha/r is missing: the change is s B A"),
        (lambda d: d.s, "alpha/r twice: the change is s B A"),
        (lambda d: d.r, "alpha where alpha/r belongs: divide by the rank"),
        (lambda d: 2, "the change is added twice"),
        (lambda d: -1, "the change is subtracted"),
    ]
    praise = "The merged weight is right: one plain layer gives what base and adapter gave together."

    def change(got: Any, d: Data) -> Any:
        return got - d.W

    return _grade(lambda d: answer(d.W, d.A, d.B, d.alpha), {"W'": [*forms, *alone]}, scales, praise, change)


def check_count(answer: Callable) -> bool:
    """Grade step 9, ``count(in_features, out_features, rank) -> int``. Results are as in `check_loss_gradient`."""
    forms: Mistakes = [
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
    return _grade(lambda d: answer(d.n_in, d.out, d.r), {"the count": forms}, [], praise)


def check_factors(answer: Callable) -> bool:
    """Grade step 10, ``factors(change, rank) -> (A, B)`` with B A as near to the change as the rank allows.

    Any two factors of the right product will do: (Q A, B Q^-1) has the same. Results are as in `check_loss_gradient`.
    """
    change, r = np.random.default_rng(3).standard_normal((5, 7)), 2
    U, S, Vt = np.linalg.svd(change, full_matrices=False)
    given = change.copy()
    try:
        got = answer(given, r)
    except Exception as error:  # whatever a learner's code may raise
        return _say(f"your code stopped with {type(error).__name__}: {error}")
    if not np.array_equal(given, change):
        return _say("your code changed its argument in place; make a new array")
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        return _say(f"return 2 arrays, (A, B); you returned {_describe(got)}")
    if other := [part for part in got if not _is_numbers(part)]:
        return _say(f"A and B must be numbers, you returned {_describe(other[0])}")
    A, B = (np.asarray(part) for part in got)
    if (A.shape, B.shape) != ((2, 7), (5, 2)):
        swapped = " (swapped?)" if (A.shape, B.shape) == ((5, 2), (2, 7)) else ""
        return _say(f"A must be (2, 7) and B (5, 2); you returned {_describe(A)} and {_describe(B)}{swapped}")
    known: list[tuple[np.ndarray, str]] = [
        (U[:, :r] @ Vt[:r], "the singular values are missing: they belong into one of the factors"),
        (U[:, :r] * S[:r] ** 2 @ Vt[:r], "the singular values are in both factors: B A has their squares"),
        (U[:, -r:] * S[-r:] @ Vt[-r:], "these are the smallest singular values; the nearest matrix keeps the largest"),
    ]
    if _same(B @ A, U[:, :r] * S[:r] @ Vt[:r]):
        print("B A is the nearest matrix of its rank, by Eckart and Young: the largest singular values, and no others.")
        return True
    for wrong, hint in known:
        if _same(B @ A, wrong):
            return _say(hint)
    off, least = np.linalg.norm(B @ A - change), np.linalg.norm(S[r:])
    return _say(f"B A is {off:.3g} away from the change; {least:.3g} is possible. Think of its singular values")


# --- the questions of step 6 ------------------------------------------------------------------------------------------


def _problem(alpha: float = 3.0) -> tuple[LoRA, np.ndarray, dict[str, np.ndarray]]:
    """Return an adapter at its start, inputs, and its gradients for a random dy."""
    rng = np.random.default_rng(5)
    layer = LoRA.init(6, 4, rank=2, alpha=alpha, rng=rng, dtype="float64")
    x, dy = rng.standard_normal((8, 6)), rng.standard_normal((8, 4))
    return layer, x, layer.backward(dy, layer.forward(x)[1])[1]


def _first_step(scale: float = 1.0) -> float:
    layer, _, grads = _problem()
    Adam(layer.trainable(), lr=0.01).step({name: scale * g for name, g in grads.items()})
    return float(np.abs(layer.lora_B).max())


def _after_plain_step(alpha: float) -> float:
    layer, x, grads = _problem(alpha)
    layer.lora_B -= 0.01 * grads["lora_B"]
    return float(np.abs(layer(x)).max())


def _slope_of_B(alpha: float) -> float:
    return float(np.abs(_problem(alpha)[2]["lora_B"]).max())


def _off_by_one() -> float:
    X = np.random.default_rng(6).standard_normal((20_000, 50))
    return float(((X @ np.ones((50, 4))) ** 2).mean())


QUESTIONS: dict[str, tuple[str, Callable[[], float], str, str]] = {
    "first step": (
        "B is zero, and Adam takes its first step with lr = 0.01. How large is the largest entry of B?",
        _first_step,
        "Adam's first step is lr times the sign of the gradient.",
        "Look at (22) to (24) for t = 1: what are m_hat and v_hat?",
    ),
    "larger gradients": (
        "The same step, with all gradients 100 times larger. By what factor is B's largest entry larger?",
        lambda: _first_step(100) / _first_step(),
        "m_hat and the root of v_hat grow alike, and their ratio stays.",
        "Numerator and denominator of (24) both contain the gradient.",
    ),
    "larger alpha": (
        "B is zero, and alpha doubles. By what factor does dB grow, for the same dy?",
        lambda: _slope_of_B(6.0) / _slope_of_B(3.0),
        "dB = s dy^T h contains s once.",
        "How often does s stand in (3)?",
    ),
    "larger alpha, plain steps": (
        "B is zero, alpha doubles, and one plain step B -= lr dB is taken. By what factor is the new output larger?",
        lambda: _after_plain_step(6.0) / _after_plain_step(3.0),
        "s enters twice: once through dB, and once through y = s h B^T. Under Adam it would be once.",
        "s stands in (3), which makes B, and again in (2), which uses it.",
    ),
    "off by one": (
        "Inputs are 50 normal numbers of variance 1. Every weight is off by 1. What is the mean squared error?",
        _off_by_one,
        "The error of an output is a sum of 50 such numbers, and the variances add.",
        "The error of one output is the sum of a row of inputs. What is the mean of its square?",
    ),
}
"""For `check_prediction`: the question, the experiment, why, and a hint."""


def _moved(zero_A: bool, zero_B: bool) -> set[str]:
    """Return which factors the first step changes."""
    layer, x, _ = _problem()
    rng = np.random.default_rng(7)
    layer.lora_A[...] = 0 if zero_A else rng.standard_normal(layer.lora_A.shape)
    layer.lora_B[...] = 0 if zero_B else rng.standard_normal(layer.lora_B.shape)
    before = {name: p.copy() for name, p in layer.trainable().items()}
    _, grads = layer.backward(rng.standard_normal((8, 4)), layer.forward(x)[1])
    Adam(layer.trainable()).step(grads)
    return {name[-1] for name, p in layer.trainable().items() if not np.array_equal(p, before[name])}


# --- how a mistake is found -------------------------------------------------------------------------------------------

_DIVISIONS: Mistakes = [
    (lambda d: 1 / d.N, "wrong mean: the division by N is in dy already, so this divides twice"),
    (lambda d: 1 / d.out, "a division by out: the mean is in dy already"),
    (lambda d: 1 / d.r, "a division by r: only alpha is divided by the rank"),
    (lambda d: 1 / d.n_in, "a division by in: nothing here is a mean over inputs"),
]
_SIZES: Mistakes = [
    (lambda d: -1, "the sign is wrong: no step here turns it"),
    (lambda d: 2, "a factor of 2 too many: it belongs to the loss, and is in dy"),
    *_DIVISIONS,
]
_SCALES: Mistakes = [
    (lambda d: 1 / d.s, "alpha/r is missing: y = s h B^T, so what flows back through y gets a factor s = alpha/r"),
    (lambda d: d.s, "alpha/r twice: it enters once, in dB and in dh"),
    (lambda d: d.r, "alpha where alpha/r belongs: divide by the rank"),
    *_SIZES,
]


def _forms(
    one: tuple[str, Formula], two: tuple[str, Formula], *, transposed: tuple[bool, bool], why: str
) -> list[tuple[Formula, str]]:
    """Return every product of two matrices, in both orders, each transposed or not; the right one first.

    With each comes what is wrong with it. `transposed` says which of the two the right product transposes.
    """
    (X, x), (Y, y) = one, two

    def multiply(swapped: bool, flip_x: bool, flip_y: bool) -> Formula:
        def formula(d: Data) -> Any:
            left, right = x(d).T if flip_x else x(d), y(d).T if flip_y else y(d)
            return right @ left if swapped else left @ right

        return formula

    def describe(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        if swapped and (flip_x, flip_y) == (not transposed[0], not transposed[1]):
            return "transposed: the result has the shape of its array"
        found = ["swapped factors"] if swapped else []
        for name, flip, right in ((X, flip_x, transposed[0]), (Y, flip_y, transposed[1])):
            if flip != right:
                found.append(f"a missing transpose, of {name}" if right else f"a transpose too many, of {name}")
        return f"{' and '.join(found)}: {why}"

    right = (False, *transposed)
    others = [form for form in product((False, True), repeat=3) if form != right]
    return [(multiply(*right), ""), *((multiply(*form), describe(*form)) for form in others)]


def _grade(
    answer: Formula,
    forms: Mapping[str, Mistakes],
    scales: Mistakes,
    praise: str,
    prepare: Callable[[Any, Data], Any] = lambda got, d: got,
) -> bool:
    """Print the praise where the answer is right, or a hint for each wrong result; return which it was.

    `forms` has for each result the right formula and the wrong ones with their hints, and `scales` the wrong factors in
    front. `prepare` takes from a result what is the same in all of them.
    """
    different, equal = _data(N=11, n_in=7, out=5, r=3), _data(N=4, n_in=4, out=4, r=4)
    rights = {name: known[0][0] for name, known in forms.items()}
    tries = []
    for d in (different, equal):
        got, problem, stop = _call(answer, d, {name: np.shape(right(d)) for name, right in rights.items()})
        if stop:
            return _say(stop)
        tries.append(({name: _prepared(value, d, prepare) for name, value in got.items()}, problem))
    (values, problem), (again, _) = tries
    right = {name for name, formula in rights.items() if _same(values.get(name), formula(different))}
    if problem is None and right == rights.keys():
        print(praise)
        return True
    if not values:  # it stopped on sizes that differ, so what it gave on equal ones is all there is
        right = {name for name, formula in rights.items() if _same(again.get(name), formula(equal))}
    found = {}
    for name in rights.keys() - right:
        hint = _identify(values.get(name), different, forms[name], scales)
        if not hint and np.shape(rights[name](equal)) != ():  # where all sizes are equal, many wrong counts are, too
            hint = _identify(again.get(name), equal, forms[name], scales)
        if hint:
            found[name] = hint
    lines = [f"{name}: {found[name]}" for name in rights if name in found]
    if problem and (values or not lines):  # where a hint says what does not fit, NumPy's words for it add nothing
        lines.append(f"({problem})" if lines else problem)
    elif unknown := [name for name in rights if name not in right and name not in found]:
        scalar = np.shape((values or again)[unknown[0]]) == ()
        advice = (
            "write down the shapes of A and B" if scalar else "the right shape, the wrong values; write out an entry"
        )
        lines.append(f"{' and '.join(unknown)}: {advice}")
    return _say("\n".join(lines))


def _identify(value: Any, d: Data, forms: Mistakes, scales: Mistakes) -> str:
    """Say which form times which factors a value is; "" where it is none of them."""
    for formula, hint in forms:
        ratio = _ratio(value, _or_none(formula, d))
        if ratio is None or (ratio == 1 and not hint):
            continue
        return "; and ".join(part for part in (hint, _factors(ratio, d, scales)) if part)
    return ""


def _factors(ratio: float, d: Data, scales: Mistakes) -> str:
    """Say which wrong factors, of those known up to three, make up a ratio."""
    if ratio == 1:
        return ""
    if d.out == d.N:  # all sizes are equal: a division by one of them could be by any
        scales = [scale for scale in scales if scale not in _DIVISIONS]
    for some in (some for count in (1, 2, 3) for some in combinations(scales, count)):
        if np.isclose(np.prod([scale(d) for scale, _ in some]), ratio, rtol=1e-9):
            return "; and ".join(hint for _, hint in some)
    return f"a wrong factor in front: yours is {ratio:.7g} times what it should be"


def _ratio(value: Any, other: Any) -> float | None:
    """Return by which number `other` must be multiplied to give `value`, 1 exactly where it is the same; or None."""
    if other is None or value is None or np.shape(value) != np.shape(other):
        return None
    if _same(value, other):
        return 1.0
    scale = np.vdot(other, other)
    if np.size(other) == 1 or scale == 0:
        return None
    ratio = float(np.vdot(other, value) / scale)
    return ratio if ratio and np.allclose(value, ratio * np.asarray(other), rtol=1e-9, atol=1e-12) else None


def _call(
    answer: Formula, data: Data, shapes: dict[str, tuple]
) -> tuple[dict[str, np.ndarray], str | None, str | None]:
    """Call the answer; return the arrays it gave, what is wrong with their shapes, and what ends the grading."""
    given = deepcopy(data)
    try:
        got = answer(given)
    except Exception as error:  # whatever a learner's code may raise
        return {}, f"your code stopped with {type(error).__name__}: {error}", None
    changed = [name for name, value in vars(data).items() if not np.array_equal(getattr(given, name), value)]
    if changed:
        return {}, None, f"your code changed its argument {changed[0]} in place; make a new array"
    if got is None:
        return {}, None, "your function returned None; is the return missing?"
    if len(shapes) == 1:
        got = (got,)
    elif not isinstance(got, (tuple, list)) or len(got) != len(shapes):
        return {}, None, f"return {len(shapes)} arrays, ({', '.join(shapes)}); you returned {_describe(got)}"
    arrays = dict(zip(shapes, got, strict=True))
    for name, value in arrays.items():
        if not _is_numbers(value):
            return {}, None, f"{name} must be numbers, you returned {_describe(value)}"
    wrong = [name for name, value in arrays.items() if np.shape(value) != shapes[name]]
    if wrong:
        shape, value = shapes[wrong[0]], arrays[wrong[0]]
        return arrays, f"wrong shape: {wrong[0]} must be {shape}, you returned {_describe(value)}", None
    return arrays, None, None


def _is_numbers(value: Any) -> bool:
    try:
        return np.issubdtype(np.asarray(value).dtype, np.number)
    except ValueError:  # a list of lists of several lengths
        return False


def _prepared(value: Any, d: Data, prepare: Callable[[Any, Data], Any]) -> Any:
    try:
        return prepare(np.asarray(value), d)
    except ValueError:  # a shape that does not fit
        return None


def _say(hint: str) -> bool:
    print(f"Not yet. {hint}")
    return False


def _same(value: Any, other: Any) -> bool:
    return value is not None and np.shape(value) == np.shape(other) and np.allclose(value, other, rtol=1e-9, atol=1e-12)


def _or_none(formula: Formula, data: Data) -> Any:
    """Return what the formula gives, or None, which equals no answer, where its shapes do not fit."""
    try:
        return formula(data)
    except ValueError:
        return None


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


def _data(N: int, n_in: int, out: int, r: int) -> Data:
    """Return random arrays of these sizes. No scale is 1 or another size: a missing factor of 1 cannot be seen."""
    rng = np.random.default_rng(N)
    shapes = {"x": (N, n_in), "h": (N, r), "dh": (N, r), "dy": (N, out), "p": (N, out), "t": (N, out)}
    shapes |= {"W": (out, n_in), "A": (r, n_in), "B": (out, r)}
    arrays = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    alpha = 1.3
    return SimpleNamespace(**arrays, N=N, n_in=n_in, out=out, r=r, alpha=alpha, s=alpha / r)
