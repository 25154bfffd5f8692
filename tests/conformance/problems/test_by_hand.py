"""Several layers in one array, or two precisions: what is wrong by hand is named, and what is right otherwise passes.

Nothing here is computed by the suite's formulas: slots are added one after another, rows go through experts one by one,
sums of adapters are formed whole.
"""

import numpy as np
import pytest

from minilora.conformance import CannotRun
from minilora.conformance.problems.bugs import known
from minilora.conformance.problems.tolerance import round_to

from ..implementations import OURS
from ..planting import report_of_functions

# --- slots ----------------------------------------------------------------------------------------


def start(widths, i):
    return sum(widths[:i])


def slots(
    place=lambda widths, i, adapted: start(widths, i),
    scaling=lambda alpha, A, i, adapted: alpha[i] / len(A[i]),
    factor=lambda i, adapted: i,
    left_out=lambda i, adapted: False,
):
    """Slots added one after another; where a wrong place or factor does not fit, the right one."""

    def updates(A, B, alpha, widths):
        adapted = [i for i, a in enumerate(A) if a is not None]
        fits = all(place(widths, j, adapted) + widths[j] <= sum(widths) for j in adapted)
        same = len({len(A[j]) for j in adapted}) == 1
        for i in (i for i in adapted if not left_out(i, adapted)):
            first = place(widths, i, adapted) if fits else start(widths, i)
            down = A[factor(i, adapted)] if same else A[i]
            yield slice(first, first + widths[i]), scaling(alpha, A, i, adapted), down, B[i]

    def forward(x, weight, bias, *layer):
        y = x @ weight.T + (0 if bias is None else bias)
        for rows, s, A, B in updates(*layer):
            y[..., rows] += s * (x @ A.T @ B.T)
        return y

    def merge(weight, *layer):
        merged = weight.copy()
        for rows, s, A, B in updates(*layer):
            merged[rows] += s * B @ A
        return merged

    return {"forward": forward, "merge": merge}


def next_of_its_width(widths, i, adapted):
    return start(widths, i + (i + 1 < len(widths) and widths[i + 1] == widths[i]))


def first_path_alone(dy, x, weight, bias, A, B, alpha, widths):
    grads = OURS["fused"].backward(dy, x, weight, bias, A, B, alpha, widths)
    i = next(i for i, a in enumerate(A) if a is not None)
    own = dy[..., start(widths, i) : start(widths, i + 1)]
    return grads | {"x": dy @ weight + alpha[i] / len(A[i]) * own @ B[i] @ A[i]}


FUSED = {
    "slots-stand-in-the-opposite-order": slots(place=lambda w, i, adapted: sum(w[i + 1 :])),
    "a-slots-update-is-added-to-the-next": slots(place=next_of_its_width),
    "slots-are-taken-for-equally-wide": slots(place=lambda w, i, adapted: i * (sum(w) // len(w))),
    "a-slot-without-an-adapter-gets-an-update": slots(place=lambda w, i, adapted: sum(w[j] for j in adapted if j < i)),
    "the-last-slots-update-is-left-out": slots(left_out=lambda i, adapted: i == adapted[-1]),
    "the-first-slot-alone-gets-its-update": slots(left_out=lambda i, adapted: i != adapted[0]),
    "one-scaling-for-all-slots": slots(scaling=lambda alpha, A, i, adapted: alpha[adapted[0]] / len(A[adapted[0]])),
    "alpha-is-divided-by-the-ranks-of-all-slots": slots(
        scaling=lambda alpha, A, i, adapted: alpha[i] / sum(len(A[j]) for j in adapted)
    ),
    "alpha-is-not-divided-by-the-rank": slots(scaling=lambda alpha, A, i, adapted: alpha[i]),
    "one-lora-a-for-all-slots": slots(factor=lambda i, adapted: adapted[0]),
    "dx-has-the-first-slots-path-alone": vars(OURS["fused"]) | {"backward": first_path_alone},
}

# --- experts --------------------------------------------------------------------------------------


def slow(M, E, axis):
    """Each expert's part, where it is the slow index of an axis."""
    return np.split(M, E, axis=axis)


def fast(M, E, axis):
    """Each expert's part, where it is the fast index of an axis."""
    return [np.take(M, range(e, M.shape[axis], E), axis=axis) for e in range(E)]


def experts(of_A=slow, of_B=fast, scaling=lambda alpha, r, e, E: alpha / r, change=lambda B, A: B @ A):
    """A loop over rows, with each expert's change formed whole."""

    def changed(weight, A, B, alpha):
        E = len(weight)
        factors = zip(of_B(B, E, 1), of_A(A, E, 0), strict=True)
        changes = [scaling(alpha, len(A) // E, e, E) * change(B_e, A_e) for e, (B_e, A_e) in enumerate(factors)]
        return weight + np.stack(changes)

    def forward(x, weight, A, B, alpha, expert_ids):
        W = changed(weight, A, B, alpha)
        return np.stack([W[e] @ row for row, e in zip(x, expert_ids, strict=True)])

    return {"forward": forward, "merge": changed}


def transposed_where_square(B, A):
    return (B @ A).T if len(B) == A.shape[1] else B @ A


def moved(by):
    """Which expert takes whose factors: `by` reorders a list."""
    return experts(of_A=lambda *arrays: by(slow(*arrays)), of_B=lambda *arrays: by(fast(*arrays)))


EXPERTS = {
    "experts-lora-b-is-read-expert-slowest": experts(of_B=slow),
    "experts-lora-a-is-read-expert-fastest": experts(of_A=fast),
    "experts-both-factors-are-read-the-other-way": experts(of_A=fast, of_B=slow),
    "experts-in-and-out-are-exchanged": experts(change=transposed_where_square),
    "experts-take-the-factors-of-the-next": moved(lambda parts: [*parts[1:], parts[0]]),
    "experts-stand-in-the-opposite-order": moved(lambda parts: parts[::-1]),
    "experts-all-take-the-first-factors": moved(lambda parts: parts[:1] * len(parts)),
    "experts-the-first-alone-is-adapted": experts(scaling=lambda alpha, r, e, E: alpha / r * (e == 0)),
    "experts-the-last-is-left-out": experts(scaling=lambda alpha, r, e, E: alpha / r * (e < E - 1 or E == 1)),
    "experts-the-scaling-compounds": experts(scaling=lambda alpha, r, e, E: (alpha / r) ** (e + 1)),
    "experts-alpha-is-divided-by-the-packed-rank": experts(scaling=lambda alpha, r, e, E: alpha / (r * E)),
    "there-is-no-scaling": experts(scaling=lambda alpha, r, e, E: 1.0),
    "alpha-is-divided-by-the-root-of-the-rank": experts(scaling=lambda alpha, r, e, E: alpha / r**0.5),
}


def test_a_reading_of_the_packing_is_named_with_its_gradients():
    """As a program gets them which trains by its own reading."""

    def reordered(B, E, slowest):
        shape = (len(B), E, -1) if slowest else (len(B), -1, E)
        return B.reshape(shape).swapaxes(1, 2).reshape(B.shape)

    ours = OURS["experts"]

    def backward(dy, x, W, A, B, *more):
        grads = ours.backward(dy, x, W, A, reordered(B, len(W), True), *more)
        return grads | {"lora_B": reordered(grads["lora_B"], len(W), False)}

    (text,) = report_of_functions(
        "experts",
        forward=lambda x, W, A, B, *more: ours.forward(x, W, A, reordered(B, len(W), True), *more),
        backward=backward,
        merge=lambda W, A, B, alpha: ours.merge(W, A, reordered(B, len(W), True), alpha),
    ).diagnoses
    assert text.startswith(known("experts-lora-b-is-read-expert-slowest").says)
    assert "in all that is computed (made in unslothai/unsloth-zoo #1269" in text


# --- adapters put together ------------------------------------------------------------------------


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
    return lambda As, Bs, alphas, roots, weights, *rank: function(As, Bs, alphas, roots, [*map(abs, weights)], *rank)


def smallest(*lists):
    D = cat(*lists[:-1])
    return D - nearest(D, min(D.shape) - lists[-1])


def squared(*lists):
    U, S, Vt = np.linalg.svd(svd(*lists), full_matrices=False)
    return U * S**2 @ Vt


COMBINE = {
    "combine-the-new-adapter-keeps-rsloras-root": {"cat": with_root(cat), "svd": with_root(svd)},
    "combine-the-scalings-are-left-out": {"cat": lambda *lists: cat(*lists, lambda alpha, r, root: 1)},
    "combine-rsloras-root-is-ignored": {"cat": lambda *lists: cat(*lists, lambda alpha, r, root: alpha / r)},
    "combine-the-sign-of-a-weight-is-lost": {"cat": positive(cat), "svd": positive(svd)},
    "combine-linear-takes-no-roots": {"linear": unrooted},
    "combine-svd-scales-twice": {"svd": scaled_twice},
    "combine-svd-cuts-nothing": {"svd": lambda *lists: cat(*lists[:-1])},
    "combine-svd-keeps-the-smallest": {"svd": smallest},
    "combine-svd-has-the-singular-values-in-both-factors": {"svd": squared},
}


def test_two_wrong_sums_at_once_are_both_named():
    root, twice = report_of_functions("combine", cat=with_root(cat), svd=with_root(scaled_twice)).diagnoses
    row = known("combine-the-new-adapter-keeps-rsloras-root")
    assert root == f"{row.says} (made in {row.source})", "it is in svd too, beside the other one"
    assert twice.startswith(known("combine-svd-scales-twice").says)


def test_a_sum_that_is_not_offered_or_raises_fails_alone():
    def two_at_most(As, *more):
        if len(As) > 2:
            raise ValueError("two at most")
        return cat(As, *more)

    report = report_of_functions("combine", cat=two_at_most, svd=svd)
    assert report.claims["cat"].startswith("cat, of three adapters, raises ValueError: two at most (in=6 out=6")
    assert (report.claims["svd"], report.claims["linear"]) == ("ok", "not offered")
    with pytest.raises(CannotRun, match="cat raises ZeroDivisionError"):
        report_of_functions("combine", cat=lambda *lists: 1 // 0)
    with pytest.raises(CannotRun, match="has none of the functions cat, linear, svd"):
        report_of_functions("combine", forward=cat)


# --- float32 beside bfloat16 ----------------------------------------------------------------------


def half(array):
    return round_to(np.asarray(array, np.float32), "bfloat16")


def update(x, A, B, s):
    return s * (x @ A.T @ B.T)


def beside(update, rounded=half):
    """A forward whose base is rounded after each step, and whose update is given."""

    def forward(x, weight, bias, A, B, alpha):
        y = half(x @ weight.T)
        y = y if bias is None else half(y + bias)
        return rounded(y + update(x, A, B, np.float32(alpha / len(A))))

    return {"forward": forward}


def bias_last(x, weight, bias, A, B, alpha):
    y = half(x @ weight.T) + update(x, A, B, np.float32(alpha / len(A)))
    return half(y if bias is None else y + bias)


def rounded_merge(weight, A, B, alpha):
    return half(weight + half(np.float32(alpha / len(A)) * (B @ A)))


def rounded_gradients(*arrays):
    return {name: half(grad) for name, grad in OURS["mixed"].backward(*arrays).items()}


def autocast(x, A, B, s):
    return half(s * half(half(x @ half(A).T) @ half(B).T))


KEPT = beside(update, rounded=np.asarray)
MIXED = {
    "mixed-the-update-is-rounded-before-the-sum": beside(lambda *arrays: half(update(*arrays))),
    "mixed-the-factors-are-rounded": beside(lambda x, A, B, s: update(x, half(A), half(B), s)),
    "mixed-lora-a-is-rounded": beside(lambda x, A, B, s: update(x, half(A), B, s)),
    "mixed-lora-b-is-rounded": beside(lambda x, A, B, s: update(x, A, half(B), s)),
    "mixed-the-adapter-computes-in-bfloat16": beside(autocast),
    "mixed-the-gradients-are-rounded": {"forward": OURS["mixed"].forward, "backward": rounded_gradients},
    "mixed-the-output-is-float32": KEPT,
    "the-output-lacks-the-update": beside(lambda *arrays: 0 * update(*arrays)),
    "alpha-is-not-divided-by-the-rank": beside(lambda x, A, B, s: update(x, A, B, s * len(A))),
}


def test_a_declared_output_in_float32_is_held_to_it():
    wrong = report_of_functions("mixed", forward=OURS["mixed"].forward, output="float 32")
    assert wrong.claims["output dtype"] == "the output is rounded to bfloat16, and output declares float32"


# --- all of them ----------------------------------------------------------------------------------

WRONG = {"fused": FUSED, "experts": EXPERTS, "combine": COMBINE, "mixed": MIXED}


@pytest.mark.parametrize(("kind", "flag"), [(kind, flag) for kind, flags in WRONG.items() for flag in flags])
def test_what_is_wrong_by_hand_is_named(kind, flag):
    report, bug = report_of_functions(kind, **WRONG[kind][flag]), known(flag)
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(bug.says)
    assert bug.source in text


RIGHT = {
    "slots": ("fused", slots()),
    "experts": ("experts", experts()),
    "sums": ("combine", {"cat": cat, "linear": linear, "svd": svd}),
    "the base rounded each time": ("mixed", beside(update)),
    "the bias added last": ("mixed", {"forward": bias_last}),
    "the output alone rounded": ("mixed", {"forward": lambda *arrays: half(OURS["linear"].forward(*arrays))}),
    "the change rounded, and the sum": ("mixed", {"forward": OURS["mixed"].forward, "merge": rounded_merge}),
    "dx and the merged weight kept": ("mixed", vars(OURS["linear"]) | {"forward": OURS["mixed"].forward}),
    "an output in float32, declared": ("mixed", KEPT | {"output": "float32"}),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_right_in_another_way_passes(name, dtype):
    kind, functions = RIGHT[name]
    report = report_of_functions(kind, dtype, **functions)
    assert report.passed, str(report)
    assert report.dtype == ("float32" if kind == "mixed" else dtype)
