"""Adapters put together: wrong sums written by hand are named; right ones pass, whatever their factors are."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance.problems.bugs import known
from minilora.conformance.problems.kinds import KINDS

from ..implementations import OURS

PROBLEMS = KINDS["combine"].problems


def report_of(dtype=None, **functions):
    both = {"combine": SimpleNamespace(**functions)}
    return check(SimpleNamespace(forward=OURS["linear"].forward, kinds=both), dtype=dtype).kinds["combine"]


def scaled(alpha, r, root):
    return alpha / r**0.5 if root else alpha / r


def counted(As, Bs, alphas, roots, weights, scaling=scaled):
    """How often each adapter's B A counts."""
    return [w * scaling(alpha, len(A), root) for A, alpha, root, w in zip(As, alphas, roots, weights, strict=True)]


def cat(As, Bs, *more):
    """A sum of changes, each formed whole."""
    return sum(c * B @ A for c, A, B in zip(counted(As, Bs, *more), As, Bs, strict=True))


def linear(As, Bs, *more):
    """The sum of all products, those of two adapters among them."""
    pairs = [list(zip(counted(As, Bs, *more), factors, strict=True)) for factors in (As, Bs)]
    return sum(np.sign(c) * np.sqrt(abs(c * d)) * B @ A for c, A in pairs[0] for d, B in pairs[1])


def svd(*lists):
    return nearest(cat(*lists[:-1]), lists[-1])


def nearest(D, r):
    """The nearest matrix of a rank, from the eigenvectors of D D^T."""
    _, vectors = np.linalg.eigh(D @ D.T)
    U = vectors[:, ::-1][:, :r]
    return U @ (U.T @ D)


def scaled_twice(As, Bs, alphas, roots, weights, rank):
    """What PEFT does up to 0.20.0."""
    return svd(As, Bs, alphas, roots, counted(As, Bs, alphas, roots, weights), rank)


def unrooted(As, Bs, *more):
    c = counted(As, Bs, *more)
    return sum(n * B for n, B in zip(c, Bs, strict=True)) @ sum(n * A for n, A in zip(c, As, strict=True))


def with_root(function):
    """Multiply with the root of the new rank where the first adapter has rsLoRA's scaling, as PEFT 0.21.2 does."""

    def wrong(As, Bs, alphas, roots, weights, *rank):
        r = rank[0] if rank else sum(map(len, As))
        return (r**0.5 if roots[0] else 1) * function(As, Bs, alphas, roots, weights, *rank)

    return wrong


def positive(function):
    def wrong(As, Bs, alphas, roots, weights, *rank):
        return function(As, Bs, alphas, roots, list(map(abs, weights)), *rank)

    return wrong


def smallest(*lists):
    D = cat(*lists[:-1])
    return D - nearest(D, min(D.shape) - lists[-1])


WRONG = {
    "combine-the-new-adapter-keeps-rsloras-root": {"cat": with_root(cat), "svd": with_root(svd)},
    "combine-the-scalings-are-left-out": {"cat": lambda *lists: cat(*lists, lambda alpha, r, root: 1)},
    "combine-rsloras-root-is-ignored": {"cat": lambda *lists: cat(*lists, lambda alpha, r, root: alpha / r)},
    "combine-the-sign-of-a-weight-is-lost": {"cat": positive(cat), "svd": positive(svd)},
    "combine-linear-takes-no-roots": {"linear": unrooted},
    "combine-svd-scales-twice": {"svd": scaled_twice},
    "combine-svd-cuts-nothing": {"svd": lambda *lists: cat(*lists[:-1])},
    "combine-svd-keeps-the-smallest": {"svd": smallest},
}


@pytest.mark.parametrize("flag", WRONG)
def test_a_wrong_sum_written_by_hand_is_named(flag):
    report, bug = report_of(**WRONG[flag]), known(flag)
    (text,) = report.diagnoses
    assert text.startswith(bug.says)
    assert bug.source in text
    assert not report.passed


def test_two_bugs_at_once_are_both_named():
    report = report_of(cat=with_root(cat), svd=with_root(scaled_twice))
    root, twice = report.diagnoses
    assert root == str(known("combine-the-new-adapter-keeps-rsloras-root")), "it is in svd too, beside the other one"
    assert twice.startswith(known("combine-svd-scales-twice").says)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_right_sums_by_other_algebra_pass(dtype):
    report = report_of(dtype, cat=cat, linear=linear, svd=svd)
    assert report.passed, str(report)
    assert [report.claims[name] for name in ("cat", "linear", "svd")] == ["ok"] * 3


def test_a_sum_that_is_not_offered_does_not_fail():
    report = report_of(cat=cat)
    assert report.passed
    assert [report.claims[name] for name in ("cat", "linear", "svd")] == ["ok", "not offered", "not offered"]
    with pytest.raises(CannotRun, match="has none of the functions cat, linear, svd"):
        report_of(forward=cat)


def test_a_sum_that_raises_fails_alone():
    def two_at_most(As, *more):
        if len(As) > 2:
            raise ValueError("two at most")
        return cat(As, *more)

    report = report_of(cat=two_at_most, svd=svd)
    assert report.claims["cat"].startswith("cat, of more than two adapters, raises ValueError: two at most (in=6 out=6")
    assert report.claims["svd"] == "ok"
    with pytest.raises(CannotRun, match="cat raises ZeroDivisionError"):
        report_of(cat=lambda *lists: 1 // 0)


def test_a_sum_in_the_place_of_another_is_said():
    assert report_of(linear=cat).diagnoses == ["the sum by cat is where the sum by linear belongs"]


def test_the_problems_have_what_can_go_wrong():
    assert {min(p.weights) < 0 for p in PROBLEMS} == {True, False}
    assert {len(p.ranks) for p in PROBLEMS} == {1, 2, 3}
    assert {(True, True), (False, False), (True, False), (False, True)} <= {p.stabilised for p in PROBLEMS}
    for p in PROBLEMS:
        S = np.linalg.svd(cat(*p.hand_over("cat", p.factors).values()), compute_uv=False)
        after = S[p.rank] if p.rank < len(S) else 0.0
        assert p.rank <= min(p.in_features, p.out_features, sum(p.ranks))
        assert S[p.rank - 1] - after > S[0] / 25, "the nearest matrix must not depend on rounding"
