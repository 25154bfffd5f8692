"""Experts: wrong readings written by hand, expert by expert, are named; right ones pass in another form too."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.kinds import KINDS

from ..implementations import OURS


def slow(M, E, axis):
    """Each expert's part, where it is the slow index of an axis."""
    return np.split(M, E, axis=axis)


def fast(M, E, axis):
    """Each expert's part, where it is the fast index of an axis."""
    return [np.take(M, range(e, M.shape[axis], E), axis=axis) for e in range(E)]


def by_hand(of_A=slow, of_B=fast, scaling=lambda alpha, r, e, E: alpha / r, change=lambda B, A: B @ A):
    """A loop over rows, with each expert's change formed whole."""

    def changed(weight, A, B, alpha):
        E = len(weight)
        r = len(A) // E
        factors = zip(of_B(B, E, 1), of_A(A, E, 0), strict=True)
        changes = [scaling(alpha, r, e, E) * change(B_e, A_e) for e, (B_e, A_e) in enumerate(factors)]
        return weight + np.stack(changes)

    def forward(x, weight, A, B, alpha, expert_ids):
        W = changed(weight, A, B, alpha)
        return np.stack([W[e] @ row for row, e in zip(x, expert_ids, strict=True)])

    return SimpleNamespace(forward=forward, merge=changed)


def report_of(implementation):
    return check(SimpleNamespace(forward=OURS["linear"].forward, kinds={"experts": implementation})).kinds["experts"]


def transposed_where_square(B, A):
    return (B @ A).T if len(B) == A.shape[1] else B @ A


def first_alone(alpha, r, e, E):
    return alpha / r * (e == 0)


WRONG = {
    "experts-lora-b-is-read-expert-slowest": by_hand(of_B=slow),
    "experts-lora-a-is-read-expert-fastest": by_hand(of_A=fast),
    "experts-both-factors-are-read-the-other-way": by_hand(of_A=fast, of_B=slow),
    "experts-in-and-out-are-exchanged": by_hand(change=transposed_where_square),
    "experts-take-the-factors-of-the-next": by_hand(
        of_A=lambda M, E, axis: np.roll(slow(M, E, axis), -1, 0),
        of_B=lambda M, E, axis: np.roll(fast(M, E, axis), -1, 0),
    ),
    "experts-stand-in-the-opposite-order": by_hand(
        of_A=lambda M, E, axis: slow(M, E, axis)[::-1], of_B=lambda M, E, axis: fast(M, E, axis)[::-1]
    ),
    "experts-all-take-the-first-factors": by_hand(
        of_A=lambda M, E, axis: slow(M, E, axis)[:1] * E, of_B=lambda M, E, axis: fast(M, E, axis)[:1] * E
    ),
    "experts-the-first-alone-is-adapted": by_hand(scaling=first_alone),
    "experts-the-last-is-left-out": by_hand(scaling=lambda alpha, r, e, E: alpha / r * (e < E - 1 or E == 1)),
    "experts-the-scaling-compounds": by_hand(scaling=lambda alpha, r, e, E: (alpha / r) ** (e + 1)),
    "experts-alpha-is-divided-by-the-packed-rank": by_hand(scaling=lambda alpha, r, e, E: alpha / (r * E)),
    "there-is-no-scaling": by_hand(scaling=lambda alpha, r, e, E: 1.0),
    "alpha-is-divided-by-the-root-of-the-rank": by_hand(scaling=lambda alpha, r, e, E: alpha / r**0.5),
}


def test_a_loop_over_rows_passes():
    report = report_of(by_hand())
    assert report.passed, report
    assert "start" not in report.claims


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_reading_is_named_in_the_first_line(flag):
    report = report_of(WRONG[flag])
    assert not report.passed
    bug = next(bug for bug in BUGS if bug.flag == flag)
    assert report.diagnoses[0].startswith(bug.says)


def test_a_gradient_of_septembers_reading_is_named():
    """The whole reading, with the gradients that a program gets which trains by it."""

    def swapped(B, E):  # columns expert-slowest to expert-fastest
        return B.reshape(len(B), E, -1).swapaxes(1, 2).reshape(B.shape)

    def back(B, E):
        return B.reshape(len(B), -1, E).swapaxes(1, 2).reshape(B.shape)

    ours = OURS["experts"]

    def backward(dy, x, weight, A, B, alpha, expert_ids):
        grads = ours.backward(dy, x, weight, A, swapped(B, len(weight)), alpha, expert_ids)
        return grads | {"lora_B": back(grads["lora_B"], len(weight))}

    wrong = SimpleNamespace(
        forward=lambda x, W, A, B, *more: ours.forward(x, W, A, swapped(B, len(W)), *more),
        backward=backward,
        merge=lambda W, A, B, alpha: ours.merge(W, A, swapped(B, len(W)), alpha),
    )
    report = report_of(wrong)
    assert len(report.diagnoses) == 1
    assert "read with the expert as its slow index" in report.diagnoses[0]
    assert "in all that is computed (made in unslothai/unsloth-zoo #1269" in report.diagnoses[0]


@pytest.mark.parametrize("fan", [None, True])
def test_weights_that_lie_in_out_may_be_declared(fan):
    ours = OURS["experts"]

    def turned(W):
        return np.ascontiguousarray(W.swapaxes(1, 2))

    def forward(x, W, A, B, alpha, ids):
        factors = (A, B) if fan else (A.T, B.T)
        return ours.forward(x, turned(W), *factors, alpha, ids)

    def merge(W, A, B, alpha):
        factors = (A, B) if fan else (A.T, B.T)
        return turned(ours.merge(turned(W), *factors, alpha))

    declared = {"fan_in_fan_out": True} if fan else {"orientation": "in, out"}
    assert report_of(SimpleNamespace(forward=forward, merge=merge, **declared)).passed


def test_problems_show_what_the_packings_hide():
    problems = KINDS["experts"].problems
    assert {0, 1} <= {len(set(range(p.experts)) - set(p.expert_ids)) for p in problems if p.n > 1}
    assert any(p.in_features == p.out_features for p in problems)
    assert any(p.out_features == 2 * p.in_features for p in problems)
    assert {p.experts for p in problems} >= {1, 2, 3}
    assert all(p.rank != p.experts for p in problems if p.n > 1)


def test_a_wrong_entry_is_said_with_its_expert():
    ours = OURS["experts"]

    def merge(weight, *factors):
        merged = ours.merge(weight, *factors)
        merged[-1, 0, 0] += 1
        return merged

    report = report_of(SimpleNamespace(**vars(ours) | {"merge": merge}))
    assert "at [2, 0, 0], of expert 2" in report.claims["merge"] + "".join(report.diagnoses)
