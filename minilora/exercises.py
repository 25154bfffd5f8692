r"""Rebuild `LoRA.backward` in five steps; each grader tells what is right, or what went wrong.

Write a function, give it to its grader:

=====  =======================================  ============================================
step   you write                                it returns
=====  =======================================  ============================================
1      ``loss_gradient(prediction, target)``    dy (N, out) of the mean squared error
2      ``grad_B(dy, h, s)``                     dB (out, r)
3      ``grad_h(dy, B, s)``                     dh (N, r)
4      ``grad_A(dh, x)``                        dA (r, in)
5      ``backward(dy, x, A, B, alpha)``         dx (N, in), dA (r, in), dB (out, r)
=====  =======================================  ============================================

A grader calls your function with sizes that all differ, N = 7, in = 5, out = 3, r = 2, so that a wrong product mostly
does not fit. If the answer is not right, it calls again with all sizes equal: there every product fits, and the answer
shows which one was taken. It is compared with the mistakes that people make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

Data: TypeAlias = SimpleNamespace
Formula: TypeAlias = Callable[[Data], Any]
Mistakes: TypeAlias = Sequence[tuple[Formula, str]]


class Hint(AssertionError):
    """Not right yet; the message says what to look at."""


def check_loss_gradient(answer: Callable) -> str:
    """Grade step 1, ``loss_gradient(prediction, target) -> dy``: the gradient of the mean over all entries.

    Parameters
    ----------
    answer : callable
        Your function.

    Returns
    -------
    str
        A word of praise.

    Raises
    ------
    Hint
        If it is not right yet.
    """
    _grade(
        lambda d: answer(d.p, d.t),
        ("dy",),
        (lambda d: 2 * (d.p - d.t) / d.p.size,),
        (
            [
                (lambda d: 2 * (d.p - d.t) / d.N, "wrong mean: the loss is a mean over all N * out entries, not N"),
                (lambda d: 2 * (d.p - d.t) / d.out, "wrong mean: it runs over all N * out entries, not out"),
                (lambda d: 2 * (d.p - d.t), "no mean: this is the gradient of the sum of squares; divide by N * out"),
                (lambda d: (d.p - d.t) / d.p.size, "the derivative of a square brings a factor of 2"),
                (lambda d: 2 * (d.t - d.p) / d.p.size, "the sign: the error is prediction - target"),
                (lambda d: (d.p - d.t) ** 2 / d.p.size, "this is the loss, entry by entry; its gradient was asked"),
            ],
        ),
    )
    return "dy is right. Note that the 1/(N out) is in it now: no later step divides again."


def check_grad_B(answer: Callable) -> str:
    r"""Grade step 2, ``grad_B(dy, h, s) -> dB`` of :math:`y = s\,h B^T`. Results are as in `check_loss_gradient`."""
    _grade(
        lambda d: answer(d.dy, d.h, d.s),
        ("dB",),
        (lambda d: d.s * d.dy.T @ d.h,),
        (
            [
                (lambda d: d.dy.T @ d.h, _MISSING_SCALING),
                (lambda d: d.s**2 * d.dy.T @ d.h, "alpha/r twice: h = x A^T has no factor s of its own, y has it"),
                (lambda d: d.s * d.h.T @ d.dy, "transposed: this is the gradient of B^T, (r, out)"),
                (lambda d: d.s * d.dy @ d.h, "a missing transpose: sum over rows n, the first index of both arrays"),
                (lambda d: d.s * d.dy @ d.h.T, "the wrong transpose: this sums over columns; dB sums over rows n"),
                (lambda d: d.s * d.h @ d.dy, "swapped factors, and a missing transpose: B is (out, r)"),
                (lambda d: d.s * d.dy.T @ d.h / d.N, _SECOND_MEAN),
            ],
        ),
    )
    return "dB is right: the column of dy against the column of h, added up over the rows."


def check_grad_h(answer: Callable) -> str:
    r"""Grade step 3, ``grad_h(dy, B, s) -> dh`` of :math:`y = s\,h B^T`. Results are as in `check_loss_gradient`."""
    _grade(
        lambda d: answer(d.dy, d.B, d.s),
        ("dh",),
        (lambda d: d.s * d.dy @ d.B,),
        (
            [
                (lambda d: d.dy @ d.B, _MISSING_SCALING),
                (lambda d: d.s * d.dy @ d.B.T, "a transpose too many: y has B^T, so dh has B itself"),
                (lambda d: d.s * d.dy.T @ d.B, "dy is not transposed here: each row of h acts in its own row of y"),
                (lambda d: d.s * d.B @ d.dy, "swapped factors: dy comes first, (N, out) times (out, r)"),
                (lambda d: d.s * d.B.T @ d.dy.T, "transposed: this is (r, N), and dh has the shape of h, (N, r)"),
                (lambda d: d.s * d.dy @ d.B / d.N, _SECOND_MEAN),
            ],
        ),
    )
    return "dh is right. It carries the s to everything that comes after it."


def check_grad_A(answer: Callable) -> str:
    r"""Grade step 4, ``grad_A(dh, x) -> dA`` of :math:`h = x A^T`. Results are as in `check_loss_gradient`."""
    _grade(
        lambda d: answer(d.dh, d.x),
        ("dA",),
        (lambda d: d.dh.T @ d.x,),
        (
            [
                (lambda d: d.dh @ d.x, "a missing transpose: sum over rows n, the first index of both arrays"),
                (lambda d: d.dh @ d.x.T, "the wrong transpose: this sums over columns; dA sums over rows n"),
                (lambda d: d.x.T @ d.dh, "swapped factors: this is (in, r), the gradient of A^T; A is (r, in)"),
                (lambda d: d.x @ d.dh, "swapped factors, and a missing transpose: A is (r, in)"),
                (lambda d: d.dh.T @ d.x / d.N, _SECOND_MEAN),
            ],
        ),
    )
    return "dA is right, and it has no s of its own: that came with dh."


def check_backward(answer: Callable) -> str:
    """Grade step 5, ``backward(dy, x, A, B, alpha) -> (dx, dA, dB)``. Results are as in `check_loss_gradient`."""

    def right_dB(d: Data) -> Any:
        return d.s * d.dy.T @ (d.x @ d.A.T)

    def right_dA(d: Data) -> Any:
        return d.s * (d.dy @ d.B).T @ d.x

    def right_dx(d: Data) -> Any:
        return d.s * d.dy @ d.B @ d.A

    def usual(right: Formula) -> list[tuple[Formula, str]]:
        return [
            (lambda d: right(d) / d.s, _MISSING_SCALING),
            (lambda d: right(d) * d.r, "alpha where alpha/r belongs: divide by the rank"),
            (lambda d: right(d) * d.s, "alpha/r twice: it enters once, in dB and in dh"),
            (lambda d: right(d).T, "transposed: a gradient has the shape of its array"),
            (lambda d: right(d) / d.N, _SECOND_MEAN),
        ]

    _grade(
        lambda d: answer(d.dy, d.x, d.A, d.B, d.alpha),
        ("dx", "dA", "dB"),
        (right_dx, right_dA, right_dB),
        (
            [
                *usual(right_dx),
                (lambda d: d.s * d.dy @ d.B @ d.A.T, "a transpose too many: h has A^T, so dx has A itself"),
                (lambda d: d.s * d.dy @ d.A @ d.B, "swapped factors: dy meets B first, then A"),
            ],
            [
                *usual(right_dA),
                (lambda d: d.s * (d.dy @ d.B) @ d.x, "a missing transpose: sum over the rows of dh and x"),
                (lambda d: d.s * (d.dy @ d.A).T @ d.x, "swapped factors: dh is made with B, not with A"),
            ],
            [
                *usual(right_dB),
                (lambda d: d.s * d.dy.T @ (d.x @ d.A), "h = x A^T: a missing transpose"),
                (lambda d: d.s * d.dy.T @ (d.x @ d.B.T), "swapped factors: h is made with A, not with B"),
            ],
        ),
    )
    return "All three are right. You have rebuilt LoRA.backward."


_MISSING_SCALING = "alpha/r is missing: y = s h B^T, so everything that flows back through y gets a factor s = alpha/r"
_SECOND_MEAN = "wrong mean: the division by N is in dy already, so this divides twice"


def _grade(
    answer: Formula, names: tuple[str, ...], rights: tuple[Formula, ...], mistakes: tuple[Mistakes, ...]
) -> None:
    """Return where the answer is right; otherwise raise the hint that fits best."""
    different, equal = _data(N=7, n_in=5, out=3, r=2), _data(N=4, n_in=4, out=4, r=4)
    got, problem = _call(answer, different, names, [right(different).shape for right in rights])
    if problem is None and all(_same(value, right(different)) for value, right in zip(got, rights, strict=True)):
        return
    again, _ = _call(answer, equal, names, [right(equal).shape for right in rights])
    for data, values in ((different, got), (equal, again)):
        for name, value, right, known in zip(names, values, rights, mistakes, strict=False):
            for mistake, hint in known if not _same(value, right(data)) else ():
                if _same(value, _or_none(mistake, data)):
                    raise Hint(f"{name}: {hint}" + (f"\n({problem})" if problem else ""))
    wrong = [name for name, value, right in zip(names, got, rights, strict=False) if not _same(value, right(different))]
    raise Hint(problem or f"{' and '.join(wrong)}: the right shape, the wrong values; write it out in indices")


def _call(answer: Formula, data: Data, names: Sequence[str], shapes: Sequence[tuple]) -> tuple[tuple, str | None]:
    """Call the answer; return the arrays it gave, and what is plainly wrong with them."""
    given = deepcopy(data)
    try:
        got = answer(given)
    except Exception as error:  # whatever a learner's code may raise
        return (), f"your code stopped with {type(error).__name__}: {error}"
    changed = [name for name, value in vars(data).items() if not np.array_equal(getattr(given, name), value)]
    if changed:
        raise Hint(f"your code changed its argument {changed[0]} in place; make a new array")
    if got is None:
        raise Hint("your function returned None; is the return missing?")
    if len(names) == 1:
        got = (got,)
    elif not isinstance(got, tuple) or len(got) != len(names):
        raise Hint(f"return {len(names)} arrays, ({', '.join(names)}); you returned {_describe(got)}")
    for name, value, shape in zip(names, got, shapes, strict=True):
        if np.shape(value) != shape:
            return got, f"wrong shape: {name} must be {shape}, you returned {_describe(value)}"
    return got, None


def _same(value: Any, other: Any) -> bool:
    return other is not None and np.shape(value) == np.shape(other) and np.allclose(value, other, rtol=1e-9, atol=1e-12)


def _or_none(formula: Formula, data: Data) -> Any:
    """Return what the formula gives, or None, which equals no answer, where its shapes do not fit."""
    try:
        return formula(data)
    except ValueError:
        return None


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"


def _data(N: int, n_in: int, out: int, r: int) -> Data:
    """Return random arrays of these sizes. No scale is 1, since a missing factor of 1 cannot be seen."""
    rng = np.random.default_rng(N)
    shapes = {"x": (N, n_in), "h": (N, r), "dh": (N, r), "dy": (N, out), "p": (N, out), "t": (N, out)}
    arrays = {key: rng.standard_normal(shape) for key, shape in {**shapes, "A": (r, n_in), "B": (out, r)}.items()}
    alpha = 3.0
    return SimpleNamespace(**arrays, N=N, out=out, r=r, alpha=alpha, s=alpha / r)
