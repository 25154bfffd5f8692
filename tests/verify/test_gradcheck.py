"""`gradcheck` itself: right gradients pass, wrong ones fail and are explained, worthless checks are refused."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import CheckRefused, GradientError, gradcheck
from minilora.verify.gradcheck import Slopes


def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


X, OTHER = randn(4, 3), randn(4, 3, seed=5)
G = 3 * X**2  # of a cube
METHODS = pytest.mark.parametrize("method", ["complex", "central"])


def cube(p):
    return (p["x"] ** 3).sum()


def of(f):
    """A function of x alone, as one of a dict."""
    return lambda p: f(p["x"])


def passed(f, grads, params=None, **options):
    """Check a gradient that is right; of x alone unless there are others."""
    params, grads = (params or {"x": X}), (grads if isinstance(grads, dict) else {"x": grads})
    return gradcheck(f, params, grads, **options)


def failed(f, grads, params=None, **options):
    """Check one that is wrong, and return its report."""
    with pytest.raises(GradientError) as caught:
        passed(f, grads, params, **options)
    assert not caught.value.report.passed
    assert str(caught.value) == str(caught.value.report) == repr(caught.value.report)
    return caught.value.report


def wrong(report):
    """The one block of a report that did not pass."""
    (block,) = [block for block in report.blocks if not block.passed]
    return block


# --- right and wrong ------------------------------------------------------------------------------


def softmax(scores):
    weights = np.exp(scores)
    return weights / weights.sum(axis=1, keepdims=True)


def attention(p):
    return softmax(p["q"] @ (p["k"] + p["bias"]).T) @ p["v"]


def attention_problem():
    """A function that the library has nowhere, with its gradients by hand; a bias on the keys moves no softmax."""
    p = {"q": randn(5, 4), "k": randn(6, 4), "bias": randn(4), "v": randn(6, 3)}
    c, w = randn(5, 3, seed=1), softmax(p["q"] @ (p["k"] + p["bias"]).T)
    ds = w * (c @ p["v"].T - ((c @ p["v"].T) * w).sum(axis=1, keepdims=True))
    return p, {"q": ds @ (p["k"] + p["bias"]), "k": ds.T @ p["q"], "bias": 1e-17 * randn(4), "v": w.T @ c}, c


@pytest.mark.parametrize("method", ["auto", "central"])
def test_of_an_unknown_function_each_array_is_checked(method):
    params, grads, c = attention_problem()
    report = gradcheck(attention, params, grads, cotangent=c, method=method, allow_zero=["bias"])
    assert [block.name for block in report.blocks] == [*params]
    for name in ("q", "k", "v"):
        bad = grads[name].copy()
        bad[2, 1] += 1e-6
        block = wrong(failed(attention, grads | {name: bad}, params, cotangent=c, method=method, allow_zero=["bias"]))
        assert (block.name, block.worst) == (name, (2, 1))
        assert block.error == pytest.approx(1e-6, rel=0.01) == block.analytic - block.numeric
    off = {name: grad * (1 + 1e-6) for name, grad in grads.items()}
    for block in failed(attention, off, params, cotangent=c, allow_zero=["bias"]).blocks:
        assert block.passed == (block.name == "bias")
        assert block.passed or block.factor == pytest.approx(1 + 1e-6, abs=1e-7)


@METHODS
def test_a_slope_of_rounding_is_zero(method):
    params, grads, c = attention_problem()
    with pytest.raises(CheckRefused, match="bias: the slope is zero everywhere"):
        gradcheck(attention, params, grads, cotangent=c, method=method)
    claimed = grads | {"bias": np.array([0.1, 0, 0, 0])}
    assert wrong(failed(attention, claimed, params, cotangent=c, method=method)).name == "bias"
    with pytest.raises(CheckRefused, match="x: the slope is zero everywhere"):  # and nothing to compare with
        passed(lambda p: 0.0 * p["x"].sum(), 0 * X, method=method)


@METHODS
@given(
    rows=st.integers(1, 20),
    place=st.floats(0, 1),
    sign=st.sampled_from([1, -1]),
    singly=st.booleans(),
    n=st.integers(0, 2),
)
def test_the_wrong_entry_is_found_wherever_it_stands(method, rows, place, sign, singly, n):
    """In any array of several and at any entry, checked singly or along directions, in any order of memory."""
    params = {name: randn(rows, 5, seed=i) for i, name in enumerate("abc")}
    grads = {name: np.asfortranarray(2 * p) for name, p in params.items()}
    flat, name = round(place * (5 * rows - 1)), "abc"[n]
    options = {"method": method, "every_entry_below": 1000 if singly else 0, "directions": 2}

    def squares(p):
        return sum((p[name] ** 2).sum() for name in params)

    assert {block.worst is None for block in gradcheck(squares, params, grads, **options).blocks} == {not singly}
    grads[name][np.unravel_index(flat, (rows, 5))] += sign * 1e-3
    block = wrong(failed(squares, grads, params, **options))
    assert (block.name, block.worst) == (name, np.unravel_index(flat, (rows, 5)))
    assert block.analytic - block.numeric == pytest.approx(sign * 1e-3, rel=1e-5)


@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-9, 1e3))
def test_any_error_above_the_tolerance_fails_and_any_below_passes(seed, size):
    x = np.random.default_rng(seed).standard_normal(5)
    off = np.where(np.arange(5) == seed % 5, size * max(1.0, 3 * (x**2).max()), 0.0)
    failed(cube, 3 * x**2 + off, {"x": x}, tolerance=0.99 * size)
    passed(cube, 3 * x**2 + off, {"x": x}, tolerance=1.01 * size)


def test_errors_that_cancel_in_a_sum_are_found():
    w, bad = randn(60, 50), 2 * randn(60, 50)
    bad[50, 3] += 0.01
    bad[50, 4] -= 0.01
    assert wrong(failed(lambda p: (p["w"] ** 2).sum(), {"w": bad}, {"w": w})).worst in [(50, 3), (50, 4)]
    bad = 3 * X**2 + 0.9
    bad[0, 1] += 0.1
    block = wrong(failed(cube, bad))
    assert (block.worst, block.error) == ((0, 1), pytest.approx(1))


@pytest.mark.parametrize(
    ("size", "options", "checked"),
    [
        (1000, {}, "1000 entries"),
        (1001, {}, "8 directions"),
        (10, {"every_entry_below": 10}, "10 entries"),
        (10, {"every_entry_below": 9}, "8 directions"),
        (10, {"every_entry_below": 0, "directions": 1}, "1 directions"),
    ],
)  # fmt: skip
def test_few_entries_are_checked_singly_and_many_along_directions(size, options, checked):
    (block,) = passed(cube, 3 * randn(size) ** 2, {"x": randn(size)}, **options).blocks
    assert (block.checked, block.worst is None) == (checked, "directions" in checked)


def test_directions_are_distinct_and_drawn_from_the_seed():
    seen = set()
    f = of(lambda x: seen.add(tuple(x.imag)) or x.sum() if np.iscomplexobj(x) else x.sum())
    passed(f, np.ones(4), {"x": np.zeros(4)}, method="complex", every_entry_below=0, directions=5)
    assert len(seen) == 5
    options = {"every_entry_below": 0, "tolerance": 1}
    none, zero, again, one = (
        passed(cube, 3 * X**2, **options, **s) for s in ({}, {"seed": 0}, {"seed": 0}, {"seed": 1})
    )
    assert none == zero == again != one


# --- how slopes are measured ----------------------------------------------------------------------

REAL = "f returns real numbers for complex ones"
AS_IT_IS = [  # a function of x, where, its gradient there, and why it is not measured by complex step
    (lambda x: (x**3).sum(), X, 3 * X**2, ""),
    (lambda x: (x**3).sum() * 1e6, X, 3e6 * X**2, ""),
    (lambda x: (x**6).sum(), X / 100, 6 * (X / 100) ** 5, ""),
    (lambda x: 100 * np.sin(100 * x).sum(), 0 * X, np.full(X.shape, 1e4), ""),
    (lambda x: 1e11 + (x**2).sum(), X, 2 * X, ""),
    (lambda x: 1e8 + (x**2).sum(), X, 2 * X, ""),  # of which a central difference has lost what two steps do not show
    (lambda x: np.sin(1e5 * x).sum(), X, 1e5 * np.cos(1e5 * X), None),  # too steep for a central difference
    (lambda x: (x**2).sum().item(), X, 2 * X, ""),
    (lambda x: float((x**2).sum()), X, 2 * X, "f does not take complex numbers ("),
    (lambda x: np.abs(x).sum(), X, np.sign(X), REAL),
    (lambda x: (x * x.conj() * x).sum(), X, 3 * X**2, "in x; is f analytic?"),
    (lambda x: (x**2).sum() + 1e-4 * (x * x.conj()).sum(), X, 2.0002 * X, "is f analytic"),
    (lambda x: (x.astype(np.float64) ** 2).sum(), X, 2 * X, "f does not take complex numbers (ComplexWarning"),
    (lambda x: np.floor(x).sum() + (x**2).sum(), X, 2 * X, "f does not take complex numbers (TypeError"),
    (lambda x: (x**3).sum() * (np.nan if np.iscomplexobj(x) else 1), X, 3 * X**2, "nan"),
]


@pytest.mark.parametrize(("f", "x", "gradient", "note"), AS_IT_IS)
def test_an_analytic_function_is_measured_by_complex_step(f, x, gradient, note):
    report = passed(of(f), gradient, {"x": x}, method="complex" if note is None else "auto")
    assert report.method == ("central" if note else "complex")
    assert (note or "") in report.note
    assert bool(note) == bool(report.note)
    assert not note or f"(not by complex step: {report.note})" in str(report)
    failed(of(f), 1.0001 * gradient, {"x": x}, method=report.method)


def test_one_array_that_is_not_analytic_is_enough():
    f = lambda p: (p["x"] ** 2).sum() + (p["y"] * p["y"].conj()).sum()  # noqa: E731
    report = passed(f, {"x": 2 * X, "y": 2 * OTHER}, {"x": X, "y": OTHER})
    assert re.fullmatch(r"it gives \S+ for the slope \S+ in y; is f analytic\?", report.note)
    assert passed(of(np.abs), np.sign(X) * OTHER, cotangent=OTHER).note == REAL
    assert not passed(of(lambda x: x**3), G * OTHER, cotangent=OTHER).note
    failed(of(lambda x: x**3), G, cotangent=OTHER)
    with pytest.warns(UserWarning, match="by the way"):
        assert not passed(of(lambda x: warnings.warn("by the way", stacklevel=1) or (x**2).sum()), 2 * X).note


@pytest.mark.parametrize(
    ("method", "slope", "away", "scale"),
    [
        *(("complex", slope, away, max(1, abs(slope))) for slope in (0.1, 5.0, 1e6, -1e6) for away in (0, 1e3)),
        *(("central", slope, away, max(1, abs(slope), away)) for slope in (0.1, 5.0, -1e6) for away in (0, 1e3)),
    ],
)  # fmt: skip
def test_the_error_allowed_is_in_proportion(method, slope, away, scale):
    """To the largest slope, and of a difference to the numbers that it is of; never below 1."""
    report = passed(of(lambda x: slope * x.sum() + away), np.full(3, slope), {"x": np.zeros(3)}, method=method)
    assert report.blocks[0].allowed == pytest.approx({"complex": 1e-12, "central": 1e-9}[method] * scale, rel=1e-6)


@pytest.mark.parametrize(("method", "slope"), [("complex", 1.1e-11), ("central", 1.1e-8)])
def test_a_slope_is_checked_where_it_is_well_above_tolerance(method, slope):
    def f(p):
        return p["a"].sum() + slope * p["b"].sum()

    params = {"a": np.array([0.5, -0.25]), "b": np.array([0.125, 0.5])}
    grads = {"a": np.ones(2), "b": np.full(2, slope)}
    assert gradcheck(f, params, grads, method=method).passed
    slope *= 0.8
    less = "so next to nothing was checked: give f times a number, or a smaller tolerance$"
    with pytest.raises(CheckRefused, match=rf"^b: no slope is larger than \S+, and \S+ is allowed, {less}"):
        gradcheck(f, params, {"a": np.ones(2), "b": np.zeros(2)}, method=method)
    with pytest.raises(GradientError):
        gradcheck(f, params, {"a": np.ones(2), "b": np.zeros(2)}, method=method, tolerance=slope / 20)


@pytest.mark.parametrize("rows", [20, 2000])
def test_a_penalty_unseen_by_a_complex_step_is_missed(rows):
    """A lasso: next to a loss that is a sum over the rows, the slope of its penalty is small."""
    rng = np.random.default_rng(0)
    A, x = rng.standard_normal((rows, 5)), rng.standard_normal(5)
    b = A @ x + 20 * rng.standard_normal(rows)

    def lasso(p):
        return ((A @ p["x"] - b) ** 2).sum() + np.abs(p["x"]).sum()

    without = 2 * A.T @ (A @ x - b)
    report = gradcheck(lasso, {"x": x}, {"x": without + np.sign(x)})
    assert (report.method, "is f analytic" in report.note) == ("central", True)
    with pytest.raises(GradientError):
        gradcheck(lasso, {"x": x}, {"x": without})


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_central_differences_are_good_to_nine_digits(seed, size):
    x = size * np.random.default_rng(seed).standard_normal(4)
    passed(of(lambda x: np.sin(x).sum()), np.cos(x), {"x": x}, method="central", tolerance=3e-10)


def test_a_step_is_felt_by_the_largest_number():
    for size, step in ((0.0, 1), (1e5, 1), (1e9, 1e3)):
        loss = Slopes(lambda p: p["x"].sum(), {"x": np.full(2, size)}, None)
        assert loss.step("x") == pytest.approx(step * np.finfo(float).eps ** 0.2)
    passed(of(lambda x: x.sum()), np.ones(2), {"x": np.array([1e12, -1e12])}, method="central")
    for step in (0.5, 1.0, 2.0):  # the central difference of a cube is off by h^2 in each entry
        report = passed(cube, 3 * X**2 + step**2, step=step)
        assert (report.method, report.note) == ("central", "a step for central differences was given")
        failed(cube, 3 * X**2 + 0.9 * step**2, step=step)
    assert passed(of(lambda x: (x**2).sum()), 2 * X, step=1.0, tolerance=1e-14).blocks[0].error <= 1e-14
    passed(of(lambda x: x.sum()), np.ones((4, 3)), tolerance=0.0)


# --- what a report tells --------------------------------------------------------------------------


EXACT = """\
gradcheck by central differences: 2 of 2 gradients agree
(not by complex step: a step for central differences was given)
gradient  shape     checked       error    allowed  worst at  analytic  numeric  ratio
half      (2,)      2 entries     0.0e+00  4.0e+00  (0,)      1         1        1      ok
one       (2, 600)  8 directions  0.0e+00  4.0e+00  all       0         0        nan    ok"""
ONE_WRONG = """\
gradcheck by complex step: 1 of 2 gradients agree
gradient  shape  checked    error    allowed  worst at  analytic  numeric  ratio
a         (2,)   2 entries  2.0e+00  4.0e-12  (1,)      2         4        0.5    WRONG
b         (3,)   3 entries  0.0e+00  1.0e-12  (0,)      1         1        1      ok
a: every slope is off by the same factor, 0.5"""


def test_a_report_is_a_table_with_what_is_wrong_below():
    a = np.array([-1.0, 2.0])
    with pytest.raises(GradientError) as caught:
        gradcheck(lambda p: (p["a"] ** 2).sum() + p["b"].sum(), {"a": a, "b": X[0]}, {"a": a, "b": np.ones(3)})
    report = caught.value.report
    assert str(caught.value) == str(report) == repr(report) == ONE_WRONG
    assert ([block.passed for block in report.blocks], report.passed) == ([False, True], False)
    half, one = np.zeros(2), np.zeros((2, 600))
    found = gradcheck(
        lambda p: p["half"].sum() + 0 * p["one"].sum(),
        {"half": half, "one": one},
        {"half": np.ones(2), "one": one},
        step=1.0,
        tolerance=4.0,
        allow_zero=["one"],
    )
    assert str(found) == EXACT


FACTORS = [
    (1e6 * G * (1 + 1e-6 * np.sign(X)), X, pytest.approx(1e6, rel=1e-5)),
    (0 * G, X, 0),
    (-G, X, pytest.approx(-1)),
    (G * np.linspace(1, 1.5, 12).reshape(4, 3), X, None),
    (G * np.linspace(2, 2.0001, 12).reshape(4, 3), X, None),
    (G + 1, X, None),
    (6 * randn(1) ** 2, randn(1), None),  # one entry alone has none in common
    (6 * randn(2) ** 2, randn(2), pytest.approx(2)),
    (6 * randn(60, 50) ** 2, randn(60, 50), pytest.approx(2)),
    (6 * (tiny := np.append(randn(3), 1e-6)) ** 2 + 1e-15, tiny, pytest.approx(2)),  # a slope of rounding has no say
]


@pytest.mark.parametrize(("gradient", "x", "factor"), FACTORS)
def test_a_factor_is_named_where_there_is_one(gradient, x, factor):
    assert wrong(failed(cube, gradient, {"x": x})).factor == factor


def test_a_claim_where_the_slope_is_zero_has_no_ratio():
    params = {"x": X, "b": X.copy()}
    assert np.isnan(wrong(failed(cube, {"x": G, "b": X}, params)).ratio)


KINKS = [
    (lambda x: np.abs(x), (-1, 1)),
    (lambda x: -np.maximum(-x, 0), (1, 0)),
    (lambda x: 1.5e-4 * np.maximum(x, 0), (0, 1.5e-4)),
    (lambda x: 1e3 * x + 1e-2 * np.maximum(x, 0), None),  # too slight beside the slope to be told from rounding
    (lambda x: 5e-5 * np.maximum(x, 0), None),
    (lambda x: 1e3 * x**2, None),  # sharply bent, and smooth
    (lambda x: np.sin(x), None),
    (lambda x: np.tanh(40 * x), None),  # an inflection
    (lambda x: np.sin(30 * x), None),
]


@pytest.mark.parametrize(("f", "slopes"), KINKS)
def test_a_kink_is_told_from_a_bend(f, slopes):
    report = failed(of(lambda x: f(x).sum()), np.full(1, 5.0), {"x": np.zeros(1)}, method="central")
    found = wrong(report).left, wrong(report).right
    assert found == ((None, None) if slopes is None else pytest.approx(slopes, abs=1e-9))
    if slopes is not None:
        assert f"x: a kink, with slope {slopes[0]:z.9g} on the left, {slopes[1]:z.9g} on the right" in str(report)


@pytest.mark.parametrize(("away", "below"), [(1e-5, 0), *((away, 1000) for away in (2e-4, 4.6e-4, 6e-4, -6e-4, 1e-6))])
def test_a_kink_within_a_step_fails_no_right_gradient(away, below):
    """The first step of central differences, 7e-4, crosses the kink, so shorter ones follow until none is crossed."""
    x, slopes = np.array([[0.5, away], [-2.0, 1.5]]), np.array([[2.0, 3], [5, 7]])
    f, right = of(lambda x: (np.where(x.real > 0, x, 0) * slopes).sum()), np.where(x > 0, slopes, 0)
    assert passed(f, right, {"x": x}).method == "complex"
    if away != 1e-6:
        passed(f, right, {"x": x}, method="central", every_entry_below=below)
        return
    block = wrong(failed(f, right, {"x": x}, method="central", every_entry_below=below))  # within the shortest step
    assert (block.worst, block.left + 1 < block.right) == ((0, 1), True)


STEEP = [
    (lambda x: np.sin(300 * x), lambda x: 300 * np.cos(300 * x), np.linspace(-2, 2, 7)),
    (lambda x: 1 / x, lambda x: -1 / x**2, np.array([1e-3, 0.5, -0.02])),
    (lambda x: np.tanh(500 * x), lambda x: 500 / np.cosh(500 * x) ** 2, np.array([1e-3, 2e-3, -4e-4])),
]


@pytest.mark.parametrize(("f", "slope", "x"), STEEP)
def test_a_steep_function_is_measured_by_shorter_steps(f, slope, x):
    passed(of(lambda x: f(x).sum()), slope(x), {"x": x}, method="central")
    report = failed(of(lambda x: f(x).sum()), 1.01 * slope(x), {"x": x}, method="central")
    assert wrong(report).factor == pytest.approx(1.01, abs=1e-7)
    assert wrong(report).left is None


def test_a_kink_across_a_direction_alone_is_found_there():
    """Along each axis the function is smooth at this point; between the axes it is not."""
    f = of(lambda x: max(0.0, min(x)) + x.sum())
    block = wrong(failed(f, np.ones(2), {"x": np.zeros(2)}, method="central", every_entry_below=0, seed=1))
    assert block.worst is None
    assert abs(block.analytic - block.numeric) == pytest.approx(block.error)
    assert abs(block.right - block.left) > 0.01


# --- the caller's arrays --------------------------------------------------------------------------


def test_an_array_under_two_names_is_one_parameter():
    shared, other = randn(2, 3), randn(2, 3, seed=1)
    params = {"a": shared, "c": other, "b": shared}
    grads = {"a": shared * other, "b": shared * other, "c": shared**2}
    f = lambda p: (p["a"] * p["b"] * p["c"]).sum()  # noqa: E731
    for method in ("complex", "central"):
        assert [block.name for block in gradcheck(f, params, grads, method=method).blocks] == ["a", "c"]
        failed(f, grads | {"b": 0 * shared}, params, method=method)


def test_views_that_do_not_overlap_are_two_parameters():
    w = randn(4, 6)
    params = {"left": w[:, ::2], "right": w[:, 1::2]}
    passed(lambda p: (p["left"] ** 3).sum() + (p["right"] ** 3).sum(), {k: 3 * p**2 for k, p in params.items()}, params)


def test_a_function_may_change_its_dict_and_not_its_arrays():
    x = X.copy()
    passed(lambda p: p.update(x=2 * p.pop("x")) or (p["x"] ** 2).sum(), 8 * X)
    with pytest.raises(CheckRefused, match=r"f changes params\['x'\]"):
        passed(of(lambda x: x.__imul__(2).sum()), x, {"x": x})
    np.testing.assert_array_equal(x, X)


# --- refusals -------------------------------------------------------------------------------------


def counting(f):
    """A function that gives another answer each time."""
    return lambda p, calls=[]: calls.append(0) or f(p["x"], len(calls))


def changing(name):
    """One that changes an entry of one array."""
    return lambda p: p[name].__setitem__((0, 0), 9) or sum(a.sum() for a in p.values())


ONE, TWO, V = {"x": X}, {"x": X, "y": OTHER}, randn(6)
OVERLAP, SINGLE, CENTRAL = {"w": X, "x": V[:4], "y": V[3:]}, X.astype(np.float32), {"method": "central"}
LESS = "dtype float32, expected float64: slopes of less cannot be trusted"
CLOSE = "f is not finite close to params['x']: move away from that point"
GIVE = "f returns an array of shape {}: give a cotangent of that shape"
AGAIN = "f is not deterministic: two calls with the same params gave different results"
SHARED = "params['x'] and params['y'] share memory: give one array both names"
root, itself = of(lambda x: np.sqrt(x).sum()), of(lambda x: x)


def zero(name):
    return (
        f"{name}: the slope is zero everywhere, so nothing was checked. Does f read '{name}' from the dict it is "
        f"handed? If zero is right, say allow_zero=['{name}']; for LoRA, move off B = 0"
    )


REFUSED = [  # f, params, grads, settings, what is said
    (cube, {}, {}, {}, "params is empty: there is nothing to check"),
    (lambda p: (p["x"] ** 2).sum() + p["e"].sum(), {"x": X, "e": X[:0]}, {"x": 2 * X, "e": X[:0]}, {},
     f"params['e'] has shape {X[:0].shape}: an empty array has no slope to check"),
    (cube, {"x": X}, {"x": 3 * X**2}, {"cotangent": np.array(0.0)},
     "cotangent is 0 everywhere, and so is every slope: give random numbers, for example"),
    (cube, ONE, {"y": X}, {}, "grads must have the keys ['x']: missing ['x'], extra ['y']"),
    (cube, ONE, TWO, {}, "grads must have the keys ['x']: missing [], extra ['y']"),
    (cube, ONE, {"x": X[:2]}, {}, "grads['x'] has shape (2, 3), expected (4, 3)"),
    (cube, {"x": SINGLE}, ONE, {}, f"params['x'] has {LESS}"),
    (cube, ONE, {"x": SINGLE}, {}, f"grads['x'] has {LESS}"),
    (cube, {"x": X * np.nan}, ONE, {}, "params['x'] holds NaN or infinity: entry (0, 0) is nan"),
    (cube, ONE, {"x": abs(X) * np.inf}, {}, "grads['x'] holds NaN or infinity: entry (0, 0) is inf"),
    (of(np.sum), OVERLAP, OVERLAP, {}, SHARED),
    (itself, ONE, ONE, {}, GIVE.format((4, 3))),
    (of(lambda x: x.sum(keepdims=True)), ONE, ONE, {}, GIVE.format((1, 1))),
    (itself, ONE, ONE, {"cotangent": X * np.nan}, "cotangent holds NaN or infinity: entry (0, 0) is nan"),
    (itself, ONE, ONE, {"cotangent": X[0]}, GIVE.format((4, 3))),
    (itself, ONE, ONE, {"cotangent": SINGLE}, f"cotangent has {LESS}"),
    (of(lambda x: x.astype("f4").sum()), ONE, ONE, {},
     "f returns float32, expected float64: it loses the digits to be checked"),
    (of(lambda x: np.log(-1.0 + 0 * x.sum())), ONE, ONE, {}, "f is not finite at params: its value there is nan"),
    (root, {"x": np.array([1.0, 1e-9])}, {"x": np.ones(2)}, CENTRAL, CLOSE),
    (root, {"x": np.array([1e-9, 1.0])}, {"x": np.ones(2)}, CENTRAL, CLOSE),
    (changing("y"), TWO, TWO, {}, "f changes params['y']: it must leave its input as it was"),
    (counting(lambda x, n: x.sum() + n), ONE, ONE, {}, AGAIN),
    (counting(lambda x, n: x + n * (np.arange(3) == 1)), ONE, ONE, {"cotangent": X}, AGAIN),
    (cube, TWO, {"x": G, "y": 0 * X}, {}, zero("y")),
    (cube, {**TWO, "z": V}, {"x": G, "y": 0 * X, "z": 0 * V}, {"allow_zero": ["y"]}, zero("z")),
    (cube, ONE, ONE, {"method": "forward"}, "method must be 'auto', 'complex' or 'central', got 'forward'"),
    (cube, ONE, ONE, {"step": 0.0}, "step must be above 0 and finite, got 0.0"),
    (cube, ONE, ONE, {"step": np.inf}, "step must be above 0 and finite, got inf"),
    (cube, ONE, ONE, {"step": 1.0, "method": "complex"},
     "a step is for central differences, and method is 'complex', got step=1.0"),
    (cube, ONE, ONE, {"directions": 0}, "directions must be at least 1, got 0"),
    (cube, ONE, ONE, {"tolerance": -1e-9}, "tolerance must be at least 0 and finite, got -1e-09"),
    (cube, ONE, ONE, {"tolerance": np.inf}, "tolerance must be at least 0 and finite, got inf"),
]  # fmt: skip
OF_ANOTHER_TYPE = [
    (cube, [X], ONE, {}, "params must be a dict, got list"),
    (cube, ONE, [X], {}, "grads must be a dict, got list"),
    (cube, ONE, ONE, {"allow_zero": "x"}, "allow_zero must be a collection of names such as ['x'], got 'x'"),
]


@pytest.mark.parametrize(
    ("error", "f", "params", "grads", "settings", "said"),
    [*((ValueError, *row) for row in REFUSED), *((TypeError, *row) for row in OF_ANOTHER_TYPE)],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_worthless_check_is_refused(error, f, params, grads, settings, said):
    with pytest.raises(error) as caught:
        gradcheck(f, params, grads, **settings)
    assert str(caught.value) == said


def test_a_function_that_reads_another_array_is_asked_about_it():
    """A closure over the outer arrays has slopes of zero, whatever gradient is claimed."""
    p = {"x": np.arange(1.0, 4.0), "y": np.ones(2)}
    claimed = {"x": 2 * p["x"], "y": 2 * p["y"]}
    with pytest.raises(GradientError, match="every measured slope is 0: does f read 'x' from the dict") as wrong:
        gradcheck(lambda q: (p["x"] ** 2).sum() + (q["y"] ** 2).sum(), p, claimed)
    assert "does f read 'y'" not in str(wrong.value)
    with pytest.raises(GradientError) as wrong:
        gradcheck(lambda q: (q["x"] ** 2).sum() + (q["y"] ** 2).sum(), p, claimed | {"x": p["x"]})
    assert "does f read" not in str(wrong.value)
