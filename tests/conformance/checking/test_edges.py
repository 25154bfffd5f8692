"""The edge of the contract may be refused, and must be right where it is not."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora import DoRA, DoRAAdapter, Linear
from minilora.conformance import check
from minilora.conformance.checking.claims import EDGES
from minilora.conformance.checking.kindreport import REFUSED

from ..implementations import with_kinds
from ..problems.test_tolerance import ORDERS, lora, product


def on_rows(functions):
    """Functions on rows, for any number of axes."""

    def forward(x, weight, *more):
        return functions.forward(x.reshape(-1, x.shape[-1]), weight, *more).reshape(*x.shape[:-1], len(weight))

    def backward(dy, x, *more):
        grads = functions.backward(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), *more)
        return {**grads, "x": grads["x"].reshape(x.shape)}

    return {"forward": forward, "backward": backward, "merge": functions.merge}


LINEAR = on_rows(lora(np.matmul))  # it refuses nothing; our own layers refuse an alpha of 0
NAMES = ("forward", "backward", "merge")


def every_function(change):
    """Our functions, each with its arguments or its answer changed: `change(function, arrays)` gives the answer."""

    def changed(name):
        return lambda *arrays: change(LINEAR[name], arrays)

    return SimpleNamespace(**{name: changed(name) for name in NAMES})


def has_no_rows(arrays):
    return len(arrays[0]) == 0


REFUSALS = {
    "memory order": lambda arrays: not all(a.flags.c_contiguous for a in arrays if isinstance(a, np.ndarray)),
    "more axes": lambda arrays: arrays[0].ndim == 3,
    "no rows": has_no_rows,
    "alpha of 0": lambda arrays: arrays[-1] == 0,
}


@pytest.mark.parametrize("claim", REFUSALS)
def test_what_is_refused_is_no_failure(claim):
    def change(function, arrays):
        if REFUSALS[claim](arrays):
            raise ValueError("not here")
        return function(*arrays)

    report = check(every_function(change))
    assert report.passed, str(report)
    assert report.claims[claim] == REFUSED
    assert {report.claims[other] for other in REFUSALS if other != claim} == {"ok"}
    (case,) = [case for case in report.cases if case.claim == claim]
    assert not case.failed


def is_fortran(array):
    return array.flags.f_contiguous and not array.flags.c_contiguous


def is_strided(array):
    return not (array.flags.f_contiguous or array.flags.c_contiguous)


@pytest.mark.parametrize("refused", [is_fortran, is_strided])
def test_one_layout_may_be_refused_where_the_other_is_right(refused):
    def change(function, arrays):
        if any(refused(array) for array in arrays if isinstance(array, np.ndarray)):
            raise ValueError("not in this order")
        return function(*arrays)

    assert check(every_function(change)).claims["memory order"] == "ok"


OF_A_MERGE = (("memory order", "merge"), ("alpha of 0", "merge"))
"""A merge has no rows."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("claim", "wrong"), [*((claim, name) for claim in REFUSALS for name in NAMES[:2]), *OF_A_MERGE]
)
def test_what_is_wrong_at_the_edge_alone_is_named(claim, wrong):
    def change(function, arrays):
        found = function(*arrays)
        if function is not LINEAR[wrong] or not REFUSALS[claim](arrays):
            return found
        if claim == "no rows":
            return {name: g + 1 for name, g in found.items()} if wrong == "backward" else np.ones((1, 3))
        return {name: 2 * g for name, g in found.items()} if wrong == "backward" else found + 1

    report = check(every_function(change))
    (text,) = report.diagnoses
    assert report.claims[claim] == text
    assert [case.claim for case in report.cases if case.failed] == [claim]
    where = {"memory order": "where arrays lie", "more axes": "for rows of two axes", "no rows": "for no rows"}
    assert text.startswith(where.get(claim, "for an alpha of 0"))


@pytest.mark.parametrize("shape", [(2, 4), (6, 4), (3, 2, 4)])
def test_rows_of_two_axes_in_another_shape_are_refused(shape):
    def change(function, arrays):
        if not REFUSALS["more axes"](arrays):
            return function(*arrays)
        shapes = {"x": (*shape[:-1], 5), "lora_A": (3, *shape), "lora_B": shape}
        return np.ones(shape) if function is LINEAR["forward"] else {name: np.ones(s) for name, s in shapes.items()}

    report = check(every_function(change))
    assert report.passed, str(report)
    assert report.claims["more axes"] == REFUSED


def test_a_mean_over_no_rows_is_not_zero():
    def change(function, arrays):
        found = function(*arrays)
        if function is not LINEAR["backward"] or len(arrays[0]):
            return found
        return {**found, "lora_A": found["lora_A"] * np.nan}

    (text,) = check(every_function(change)).diagnoses
    assert text == "for no rows lora_A's gradient is not zero"


@pytest.mark.long
@pytest.mark.parametrize("order", ORDERS)
def test_right_layers_on_rows_of_one_axis_pass(order):
    """They broadcast in their own way where there are more axes, and what comes out is of another shape."""
    report = check(lora(product(ORDERS[order])))
    assert report.passed, str(report)


@pytest.mark.long
def test_a_layer_that_goes_row_by_row_passes():
    def forward(x, weight, bias, A, B, alpha):
        rows = [weight @ row + alpha / len(A) * (B @ (A @ row)) + (0 if bias is None else bias) for row in x]
        return np.stack(rows)

    def backward(dy, x, weight, bias, A, B, alpha):
        s = alpha / len(A)
        dA = sum(s * np.outer(B.T @ d, row) for d, row in zip(dy, x, strict=True))
        dB = sum(s * np.outer(d, A @ row) for d, row in zip(dy, x, strict=True))
        return {"x": np.array([d @ weight + s * (d @ B) @ A for d in dy]), "lora_A": dA, "lora_B": dB}

    report = check(SimpleNamespace(forward=forward, backward=backward))
    assert report.passed, str(report)


@pytest.mark.long
def test_an_answer_that_is_wrong_everywhere_is_judged_once():
    report = check(SimpleNamespace(forward=lambda x, *arrays: LINEAR["forward"](x, *arrays) + 1))
    assert len(report.diagnoses) == 1
    assert {report.claims[claim] for claim in EDGES} == {"not offered"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("order", "another", "said"),
    [("first to last", len, "the rank, as by"), ("large ones first", lambda A: 1, "1, as by")],
)
def test_an_alpha_of_0_that_is_another_number_is_named(order, another, said):
    """In each order of its sums: these round an update, which the right answer has not."""
    functions = on_rows(lora(product(ORDERS[order])))

    def taken(function):
        return lambda *arrays: function(*arrays[:-1], arrays[-1] or another(arrays[-3]))

    report = check(SimpleNamespace(**{name: taken(function) for name, function in functions.items()}))
    assert report.claims["alpha of 0"].startswith(f"an alpha of 0 is taken for {said}")


def test_without_an_alpha_an_alpha_of_0_changes_nothing():
    def forward(x, weight, bias, A, B, alpha):
        return LINEAR["forward"](x, weight, bias, A, B, len(A))

    report = check(SimpleNamespace(forward=forward, scaling="1"))
    assert report.passed, str(report)
    assert report.claims["alpha of 0"] == "ok"


# --- DoRA at a row of zeros -----------------------------------------------------------------------


def dora_of(gain):
    """DoRA by a gain of each row."""

    def forward(x, weight, bias, A, B, alpha, m):
        V = weight + alpha / len(A) * (B @ A)
        y = gain(m, np.sqrt((V * V).sum(axis=1))) * (x @ V.T)
        return y if bias is None else y + bias

    return with_kinds(dora=SimpleNamespace(forward=forward))


NAN = "DoRA divides by the length of a row of zeros"
GAINS = {
    "plain": (lambda m, n: m / n, NAN),
    "guarded": (lambda m, n: m / np.where(n == 0, 1, n), "ok"),
    "with an eps": (lambda m, n: m / np.maximum(n, 1e-30), "ok"),
    "shifted": (lambda m, n: m / n if n.all() else 1.0 + m, "where a row of the weight is zero the output is off by "),
}


def refuses(m, n):
    if not n.all():
        raise ValueError("a row of zeros")
    return m / n


GAINS["refused"] = (refuses, REFUSED)


@pytest.mark.long
@pytest.mark.parametrize(
    ("gain", "said", "dtype"),
    [
        *((*gain, "float64") for gain in GAINS.values()),
        *((*GAINS["plain"], dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_dora_at_a_row_of_zeros_is_the_bias(gain, said, dtype):
    report = check(dora_of(gain), dtype=dtype).kinds["dora"]
    assert report.claims["row of zeros"].startswith(said)
    assert report.passed is (said in ("ok", REFUSED))
    assert [case.id for case in report.cases if case.failed] == ([] if report.passed else ["dora-row-of-zeros"])


@pytest.mark.parametrize("norm", ["constant", "full"])
def test_our_dora_is_finite_at_a_row_of_zeros(norm):
    """And it does not train there: the magnitude is zero."""
    rng = np.random.default_rng(0)
    weight, x, dy = rng.standard_normal((4, 3)), rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    weight[1] = 0
    base = Linear(weight, rng.standard_normal(4))
    A, B = rng.standard_normal((2, 3)), np.zeros((4, 2))
    layer = DoRA(base, DoRAAdapter(A, B, 3.0, magnitude=np.linalg.norm(weight, axis=1), dora_norm=norm))
    y, cache = layer.forward(x)
    np.testing.assert_allclose(y, base(x), rtol=1e-13)
    np.testing.assert_allclose(layer.merge()(x), base(x), rtol=1e-13)
    dx, grads = layer.backward(dy, cache)
    np.testing.assert_allclose(dx, base.input_gradient(dy), rtol=1e-13)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert not grads["lora_B"][1].any()
    assert not grads["magnitude"][1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "other", "said"),
    [
        ("forward", lambda r: 1, "an alpha of 0 is taken for 1"),
        ("backward", lambda r: r, "an alpha of 0 is taken for the rank"),
        ("merge", lambda r: r, "an alpha of 0 is taken for the rank"),
    ],
)
def test_an_alpha_of_0_is_named_in_one_function(wrong, other, said):
    def replacing(*arrays):
        *layer, alpha = arrays
        return LINEAR[wrong](*layer, alpha or other(layer[-1].shape[1]))

    report = check(SimpleNamespace(**{**LINEAR, wrong: replacing}))
    assert not report.passed
    assert report.diagnoses[0].startswith(said)
