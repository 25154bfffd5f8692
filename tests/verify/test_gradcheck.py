"""The checker itself: right gradients pass, wrong ones fail and are explained, worthless checks are refused."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import CheckRefused, GradientError, gradcheck, taylor_orders
from minilora.verify.gradcheck import Slopes


def randn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def cube(p):
    return (p["x"] ** 3).sum()


X = randn(4, 3)
CUBE = {"x": 3 * X**2}
OTHER = randn(4, 3, seed=5)

# --- functions it has never seen ------------------------------------------------------------------


def softmax(p):
    e = np.exp(p["z"] - p["z"].max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def softmax_problem():
    z, c = randn(4, 6), randn(4, 6, seed=1)
    s = softmax({"z": z})
    return softmax, {"z": z}, {"z": s * (c - (c * s).sum(axis=1, keepdims=True))}, c


def layer_norm(p):
    x = p["x"]  # np.var takes the square of an absolute value, so this one is not analytic
    return (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5) * p["gain"] + p["shift"]


def layer_norm_problem():
    x, gain, shift, c = randn(5, 7), randn(7), randn(7, seed=1), randn(5, 7, seed=1)
    root = np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    unit = (x - x.mean(axis=1, keepdims=True)) / root
    d = c * gain
    dx = (d - d.mean(axis=1, keepdims=True) - unit * (d * unit).mean(axis=1, keepdims=True)) / root
    params = {"x": x, "gain": gain, "shift": shift}
    return layer_norm, params, {"x": dx, "gain": (c * unit).sum(axis=0), "shift": c.sum(axis=0)}, c


def attention(p):
    scores = p["q"] @ p["k"].T / np.sqrt(p["q"].shape[1])
    return softmax({"z": scores}) @ p["v"]


def attention_problem():
    q, k, v, c = randn(5, 4), randn(6, 4), randn(6, 3), randn(5, 3, seed=1)
    weights = softmax({"z": q @ k.T / 2})
    dw = c @ v.T
    ds = weights * (dw - (dw * weights).sum(axis=1, keepdims=True))
    return attention, {"q": q, "k": k, "v": v}, {"q": ds @ k / 2, "k": ds.T @ q / 2, "v": weights.T @ c}, c


PROBLEMS = {"softmax": softmax_problem, "layer norm": layer_norm_problem, "attention": attention_problem}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["auto", "central"])
def test_right_gradients_of_an_unknown_layer_pass(name, method):
    f, params, grads, cotangent = PROBLEMS[name]()
    report = gradcheck(f, params, grads, cotangent=cotangent, method=method)
    assert report.passed
    assert {block.name for block in report.blocks} == params.keys()


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["auto", "central"])
def test_an_error_of_one_millionth_in_one_entry_is_found(name, method):
    f, params, grads, cotangent = PROBLEMS[name]()
    for wrong in params:
        i = tuple(s // 2 for s in grads[wrong].shape)
        bad = grads[wrong].copy()
        bad[i] += 1e-6
        with pytest.raises(GradientError) as caught:
            gradcheck(f, params, {**grads, wrong: bad}, cotangent=cotangent, method=method)
        failed = [block for block in caught.value.report.blocks if not block.passed]
        assert [(block.name, block.worst) for block in failed] == [(wrong, i)]
        assert failed[0].error == pytest.approx(1e-6, rel=0.01)
        assert failed[0].analytic - failed[0].numeric == pytest.approx(1e-6, rel=0.01)


@given(st.integers(0, 2**32 - 1), st.floats(1e-9, 1e3))
def test_any_error_above_the_tolerance_fails_and_any_below_passes(seed, size):
    x = np.random.default_rng(seed).standard_normal(5)
    g = 3 * x**2
    largest = max(1.0, np.abs(g).max())
    off = np.where(np.arange(5) == seed % 5, size * largest, 0.0)
    with pytest.raises(GradientError):
        gradcheck(cube, {"x": x}, {"x": g + off}, tolerance=0.99 * size)
    gradcheck(cube, {"x": x}, {"x": g + off}, tolerance=1.01 * size)


# --- large blocks ---------------------------------------------------------------------------------


def quadratic(p):
    return (p["x"] ** 2).sum()


@pytest.mark.parametrize(
    ("size", "settings", "checked"),
    [
        (1000, {}, "1000 entries"),
        (1001, {}, "8 directions"),
        (10, {"every_entry_below": 10}, "10 entries"),
        (10, {"every_entry_below": 9, "directions": 5}, "5 directions"),
        (10, {"every_entry_below": 0, "directions": 1}, "1 directions"),
    ],
)
def test_large_blocks_are_checked_along_distinct_directions(size, settings, checked):
    x, seen = randn(size), set()

    def f(p):
        seen.add(p["x"].imag.tobytes()) if np.iscomplexobj(p["x"]) else None
        return quadratic(p)

    block = gradcheck(f, {"x": x}, {"x": 2 * x}, method="complex", **settings).blocks[0]
    assert block.checked == checked
    assert (block.worst is None) is checked.endswith("directions")
    assert len(seen) == int(checked.split()[0])


@pytest.mark.parametrize(("shape", "flats"), [((1000,), (0, 1, 499, 998, 999)), ((60, 50), (0, 1, 1499, 1500, 2999))])
def test_the_wrong_entry_is_found_wherever_it_stands(shape, flats):
    for flat in flats:
        x, at = randn(*shape), np.unravel_index(flat, shape)
        bad = 2 * x
        bad[at] += 0.01
        with pytest.raises(GradientError) as caught:
            gradcheck(quadratic, {"x": x}, {"x": bad}, directions=3)
        (block,) = caught.value.report.blocks
        assert block.worst == at
        assert block.analytic - block.numeric == pytest.approx(0.01, abs=1e-9)
        assert block.ratio == pytest.approx(bad[at] / (2 * x[at]), rel=1e-9)


def test_errors_that_cancel_in_a_sum_are_found_too():
    w = randn(60, 50)
    bad = 2 * w
    bad[50, 3] += 0.01
    bad[50, 4] -= 0.01
    with pytest.raises(GradientError) as caught:
        gradcheck(lambda p: (p["w"] ** 2).sum(), {"w": w}, {"w": bad})
    assert caught.value.report.blocks[0].worst in [(50, 3), (50, 4)]


def test_the_worst_entry_is_the_one_with_the_largest_error():
    bad = CUBE["x"] + 0.9
    bad[0, 1] += 0.1
    with pytest.raises(GradientError) as caught:
        gradcheck(cube, {"x": X}, {"x": bad})
    assert caught.value.report.blocks[0].worst == (0, 1)
    assert caught.value.report.blocks[0].error == pytest.approx(1.0)


@pytest.mark.parametrize("wrong", range(6))
@pytest.mark.parametrize("method", ["complex", "central", "auto"])
def test_no_array_of_many_is_left_out(wrong, method):
    params = {str(i): randn(2, seed=i) for i in range(6)}
    grads = {name: 2 * p for name, p in params.items()}

    def f(p):
        return sum((p[name] ** 2).sum() for name in params)

    report = gradcheck(f, params, grads, method=method)
    assert report.method == {"auto": "complex"}.get(method, method)
    grads[str(wrong)] += 1e-6
    with pytest.raises(GradientError) as caught:
        gradcheck(f, params, grads, method=method)
    assert not caught.value.report.passed
    assert [block.name for block in caught.value.report.blocks if not block.passed] == [str(wrong)]


def test_the_memory_order_of_a_gradient_makes_no_difference():
    assert gradcheck(cube, {"x": X}, {"x": np.asfortranarray(CUBE["x"])}).passed
    assert gradcheck(cube, {"x": np.asfortranarray(X)}, CUBE).passed


def test_one_seed_gives_one_report():
    w = randn(40, 30)
    reports = [
        gradcheck(lambda p: (p["w"] ** 3).sum(), {"w": w}, {"w": 3 * w**2}, seed=seed, tolerance=1)
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1] != reports[2]
    assert reports[0] == gradcheck(lambda p: (p["w"] ** 3).sum(), {"w": w}, {"w": 3 * w**2}, tolerance=1)


# --- how slopes are measured ----------------------------------------------------------------------


def test_an_analytic_function_is_checked_by_complex_step():
    report = gradcheck(cube, {"x": X}, CUBE)
    assert (report.method, report.note) == ("complex", "")


@pytest.mark.parametrize(
    ("f", "gradient", "note"),
    [
        (lambda p: np.abs(p["x"]).sum(), np.sign(X), "f returns real numbers for complex ones"),
        (lambda p: (p["x"] * p["x"].conj() * p["x"]).sum(), 3 * X**2, "is f analytic"),
        (lambda p: (p["x"].conj() ** 2).sum(), 2 * X, "is f analytic"),
        (lambda p: (p["x"].astype(np.float64) ** 2).sum(), 2 * X, "f does not take complex numbers (ComplexWarning"),
        (lambda p: np.floor(p["x"]).sum() + (p["x"] ** 2).sum(), 2 * X, "f does not take complex numbers (TypeError"),
        (lambda p: float((p["x"] ** 2).sum()), 2 * X, "f does not take complex numbers (ComplexWarning"),
    ],
)
def test_a_function_not_analytic_is_checked_by_central_differences(f, gradient, note):
    report = gradcheck(f, {"x": X}, {"x": gradient})
    assert report.method == "central"
    assert note in report.note
    assert f"(not by complex step: {report.note})" in str(report)
    with pytest.raises(GradientError):
        gradcheck(f, {"x": X}, {"x": gradient * 1.0001})


def test_a_complex_step_off_by_a_ten_thousandth_is_distrusted():
    def almost_analytic(p):
        return (p["x"] ** 2).sum() + 1e-4 * (p["x"] * p["x"].conj()).sum()

    assert gradcheck(almost_analytic, {"x": X}, {"x": 2 * (1 + 1e-4) * X}).method == "central"


def test_a_function_analytic_in_one_array_is_not_trusted():
    def f(p):
        return (p["x"] ** 2).sum() + (p["y"] * p["y"].conj()).sum()

    report = gradcheck(f, {"x": X, "y": OTHER}, {"x": 2 * X, "y": 2 * OTHER})
    assert report.method == "central"
    assert "in y; is f analytic" in report.note


def test_the_complex_step_is_exact_on_a_steep_function():
    """Anything that the step leaves out would be seen here."""
    gradcheck(lambda p: np.sin(1e5 * p["x"]).sum(), {"x": X}, {"x": 1e5 * np.cos(1e5 * X)}, method="complex")


def big(p):
    return (p["x"] ** 3).sum() * 1e6


def small_and_steep(p):
    return (p["x"] ** 6).sum()


def zero_and_steep(p):
    return 100 * np.sin(100 * p["x"]).sum()


def far_from_zero(p):
    return 1e11 + (p["x"] ** 2).sum()


@pytest.mark.parametrize(
    ("f", "x", "gradient"),
    [
        (big, X, 3e6 * X**2),
        (small_and_steep, X / 100, 6 * (X / 100) ** 5),
        (zero_and_steep, 0 * X, np.full(X.shape, 1e4)),
        (far_from_zero, X, 2 * X),
        (lambda p: (p["x"] ** 2).sum().item(), X, 2 * X),
    ],
)
def test_the_complex_step_is_trusted_whatever_the_scale(f, x, gradient):
    """Its companion, the central difference, is less exact, and must not be the one to be believed."""
    report = gradcheck(f, {"x": x}, {"x": gradient})
    assert (report.method, report.note) == ("complex", "")


def test_a_warning_of_the_function_does_not_matter():
    def warns(p):
        warnings.warn("by the way", UserWarning, stacklevel=1)
        return (p["x"] ** 2).sum()

    with pytest.warns(UserWarning, match="by the way"):
        assert gradcheck(warns, {"x": X}, {"x": 2 * X}).method == "complex"


@pytest.mark.parametrize(
    ("method", "f", "gradient", "scale"),
    [
        ("complex", lambda p: 5 * p["x"].sum() + 1e3, 5.0, 5.0),  # the largest slope
        ("complex", lambda p: -5 * p["x"].sum(), -5.0, 5.0),
        ("central", lambda p: 5 * p["x"].sum(), 5.0, 5.0),
        ("complex", lambda p: 0.1 * p["x"].sum() + 1e3, 0.1, 1.0),  # never below 1
        ("central", lambda p: 0.1 * p["x"].sum(), 0.1, 1.0),
        ("central", lambda p: 5 * p["x"].sum() + 1e3, 5.0, 1e3),  # a difference of large numbers is rounded as they are
    ],
)
def test_the_error_allowed_is_in_proportion(method, f, gradient, scale):
    x = np.zeros(3)
    report = gradcheck(f, {"x": x}, {"x": np.full(3, gradient)}, method=method)
    assert report.blocks[0].allowed == pytest.approx({"complex": 1e-12, "central": 1e-9}[method] * scale, rel=1e-6)
    assert report.note == ""


def test_a_central_difference_is_felt_by_large_numbers():
    x = np.array([1e12, -1e12])
    gradcheck(lambda p: p["x"].sum(), {"x": x}, {"x": np.ones(2)}, method="central")
    for size, step in ((0.0, 1), (1e5, 1), (1e9, 1e3)):
        loss = Slopes(lambda p: p["x"].sum(), {"x": np.full(2, size)}, None)
        assert loss.step("x") == pytest.approx(step * np.finfo(float).eps ** 0.2)


def test_a_given_step_is_used_as_it_is():
    """With a step of 1 the central difference of a cube is off by exactly h^2 = 1 in each entry."""
    report = gradcheck(cube, {"x": X}, {"x": 3 * X**2 + 1}, step=1.0)
    assert report.method == "central"
    assert report.note == "a step for central differences was given"
    with pytest.raises(GradientError):
        gradcheck(cube, {"x": X}, {"x": 3 * X**2 + 0.25}, step=1.0)
    gradcheck(cube, {"x": X}, {"x": 3 * X**2 + 0.25}, method="central", step=0.5)
    gradcheck(cube, {"x": X}, {"x": 3 * X**2 + 4}, step=2.0)


def test_a_step_of_one_is_exact_for_a_quadratic():
    report = gradcheck(lambda p: (p["x"] ** 2).sum(), {"x": X}, {"x": 2 * X}, step=1.0, tolerance=1e-14)
    assert report.blocks[0].error <= 1e-14


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
@settings(max_examples=50)
def test_central_differences_are_good_to_nine_digits(seed, size):
    x = size * np.random.default_rng(seed).standard_normal(4)
    gradcheck(lambda p: np.sin(p["x"]).sum(), {"x": x}, {"x": np.cos(x)}, method="central", tolerance=3e-10)


# --- what a report tells --------------------------------------------------------------------------


EXACT = """\
gradcheck by central differences: 2 of 2 gradients agree
(not by complex step: a step for central differences was given)
gradient  shape     checked       error    allowed  worst at  analytic  numeric  ratio
half      (2,)      2 entries     0.0e+00  4.0e+00  (0,)      1         1        1      ok
one       (2, 600)  8 directions  0.0e+00  4.0e+00  all       0         0        nan    ok"""
WRONG = """\
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
    assert str(caught.value) == str(report) == repr(report) == WRONG
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


@pytest.mark.parametrize(
    ("gradient", "factor"),
    [
        (1e6 * CUBE["x"] * (1 + 1e-6 * np.sign(X)), pytest.approx(1e6, rel=1e-5)),
        (0 * CUBE["x"], 0),
        (-CUBE["x"], pytest.approx(-1)),
        (CUBE["x"] * np.linspace(1, 1.5, 12).reshape(4, 3), None),
        (CUBE["x"] * np.linspace(2, 2.0001, 12).reshape(4, 3), None),
        (CUBE["x"] + 1, None),
        (CUBE["x"] * (1 + 1e-6), pytest.approx(1 + 1e-6, abs=1e-7)),
    ],
)
def test_a_factor_is_named_where_there_is_one(gradient, factor):
    with pytest.raises(GradientError) as caught:
        gradcheck(cube, {"x": X}, {"x": gradient})
    assert caught.value.report.blocks[0].factor == factor


@pytest.mark.parametrize(("shape", "factor"), [((1,), None), ((2,), 2), ((60, 50), 2)])
def test_a_factor_is_common_to_two_slopes_or_more(shape, factor):
    x = randn(*shape)
    with pytest.raises(GradientError) as caught:
        gradcheck(quadratic, {"x": x}, {"x": 4 * x})
    assert caught.value.report.blocks[0].factor == (factor and pytest.approx(factor))


@pytest.mark.parametrize(
    ("f", "slopes"),
    [
        (lambda x: np.abs(x), (-1, 1)),
        (lambda x: -np.maximum(-x, 0), (1, 0)),
        (lambda x: 1e3 * x + 1e-2 * np.maximum(x, 0), None),  # too slight beside the slope to be told from rounding
        (lambda x: 1.5e-4 * np.maximum(x, 0), (0, 1.5e-4)),
        (lambda x: 5e-5 * np.maximum(x, 0), None),
        (lambda x: 1e3 * x**2, None),  # sharply bent, and smooth
        (lambda x: np.sin(x), None),
        (lambda x: np.tanh(40 * x), None),  # an inflection
        (lambda x: np.sin(30 * x), None),
    ],
)
def test_a_kink_is_told_from_a_bend(f, slopes):
    with pytest.raises(GradientError) as caught:
        gradcheck(lambda p: f(p["x"]).sum(), {"x": np.zeros(1)}, {"x": np.full(1, 5.0)}, method="central")
    block = caught.value.report.blocks[0]
    if slopes is None:
        assert block.left is block.right is None
    else:
        assert (block.left, block.right) == pytest.approx(slopes, abs=1e-9)
        assert f"slope {slopes[0]:z.9g} on the left, {slopes[1]:z.9g} on the right" in str(caught.value)


def test_the_two_slopes_at_a_kink_are_shown():
    x = np.array([0.0, 1.0, -1.0])
    with pytest.raises(GradientError, match=r"x: a kink, with slope 0 on the left, 1 on the right") as caught:
        gradcheck(lambda p: np.maximum(p["x"], 0).sum(), {"x": x}, {"x": np.array([0.3, 1.0, 0.0])})
    block = caught.value.report.blocks[0]
    assert (block.worst, block.left, block.right) == ((0,), pytest.approx(0, abs=1e-12), pytest.approx(1))


# --- refusals -------------------------------------------------------------------------------------


def changes_its_input(p):
    p["x"] *= 2
    return p["x"].sum()


def noisy(p, state=[0.0]):  # noqa: B006  (the shared state is the point)
    state[0] += 1
    return p["x"].sum() + state[0]


def changes_one_entry_of_the_second(p):
    p["y"][0, 0] += 1
    return p["x"].sum() + p["y"].sum()


def noisy_in_one_entry(p, state=[0.0]):  # noqa: B006  (the shared state is the point)
    state[0] += 1
    return p["x"] + np.where(np.arange(3) == 1, state[0], 0.0)


@pytest.mark.parametrize(
    ("f", "params", "grads", "settings", "message"),
    [
        (cube, {}, {}, {}, "^params is empty: there is nothing to check$"),
        (cube, {"x": X.astype(np.float32)}, {"x": X}, {}, r"params\['x'\] has dtype float32, expected float64"),
        (cube, {"x": X}, {"x": X.astype(np.float32)}, {}, r"grads\['x'\] has dtype float32, expected float64"),
        (lambda p: p["x"].sum(keepdims=True), {"x": X}, {"x": X}, {}, r"an array of shape \(1, 1\): give a cotangent"),
        (changes_one_entry_of_the_second, {"x": X, "y": X.copy()}, {"x": X, "y": X}, {}, r"f changes params\['y'\]"),
        (noisy_in_one_entry, {"x": X}, {"x": X}, {"cotangent": X}, "f is not deterministic"),
        (lambda p: p["x"], {"x": X}, {"x": X}, {}, r"f returns an array of shape \(4, 3\): give a cotangent"),
        (lambda p: p["x"], {"x": X}, {"x": X}, {"cotangent": X[0]}, r"f returns an array of shape \(4, 3\): give a c"),
        (lambda p: p["x"], {"x": X}, {"x": X}, {"cotangent": X.astype("f4")}, "cotangent has dtype float32"),
        (lambda p: p["x"].astype("f4").sum(), {"x": X}, {"x": X}, {}, "f returns float32, expected float64"),
        (lambda p: np.log(-1.0 + 0 * p["x"].sum()), {"x": X}, {"x": X}, {}, "f is not finite at params"),
        (changes_its_input, {"x": X}, {"x": X}, {}, r"f changes params\['x'\]"),
        (
            noisy,
            {"x": X},
            {"x": X},
            {},
            "^f is not deterministic: two calls with the same params gave different results$",
        ),
        (
            cube,
            {"x": X, "y": OTHER},
            {**CUBE, "y": 0 * OTHER},
            {},
            "y: the slope is zero everywhere, so nothing was checked",
        ),
        (cube, {"x": X}, CUBE, {"step": 1.0, "method": "complex"}, "a step is for central differences"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_worthless_check_is_refused(f, params, grads, settings, message):
    with pytest.raises(CheckRefused, match=message):
        gradcheck(f, params, grads, **settings)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"method": "forward"}, ValueError, "method must be 'auto', 'complex' or 'central', got 'forward'"),
        ({"step": 0.0}, ValueError, "step must be above 0 and finite, got 0.0"),
        ({"step": np.inf}, ValueError, "step must be above 0 and finite, got inf"),
        ({"directions": 0}, ValueError, "directions must be at least 1, got 0"),
        ({"tolerance": -1e-9}, ValueError, "tolerance must be at least 0 and finite, got -1e-09"),
        ({"tolerance": np.inf}, ValueError, "tolerance must be at least 0 and finite, got inf"),
        ({"allow_zero": "x"}, TypeError, r"allow_zero must be a collection of names such as \['x'\], got 'x'"),
        ({"params": [X]}, TypeError, "params must be a dict, got list"),
        ({"grads": [X]}, TypeError, "grads must be a dict, got list"),
        ({"grads": {"y": X}}, ValueError, r"grads must have the keys \['x'\]: missing \['x'\], extra \['y'\]"),
        ({"grads": CUBE | {"y": X}}, ValueError, r"grads must have the keys \['x'\]: missing \[\], extra \['y'\]"),
        ({"grads": {"x": X[:2]}}, ValueError, r"grads\['x'\] has shape \(2, 3\), expected \(4, 3\)"),
        ({"grads": {"x": X * np.inf}}, ValueError, r"grads\['x'\] holds NaN or infinity: entry \(0, 0\) is -?inf"),
        ({"params": {"x": X * np.nan}}, ValueError, r"params\['x'\] holds NaN or infinity: entry \(0, 0\) is nan"),
        ({"cotangent": X * np.nan}, ValueError, r"cotangent holds NaN or infinity: entry \(0, 0\) is nan"),
    ],
)
def test_a_setting_that_checks_nothing_is_refused(setting, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        gradcheck(**{"f": cube, "params": {"x": X}, "grads": CUBE, **setting})


def test_a_function_cannot_change_the_callers_arrays():
    x = X.copy()
    with pytest.raises(CheckRefused):
        gradcheck(changes_its_input, {"x": x}, {"x": x})
    np.testing.assert_array_equal(x, X)


def test_a_slope_of_zero_can_be_allowed_by_name():
    params, grads = {"x": X, "y": OTHER}, {**CUBE, "y": 0 * OTHER}
    assert gradcheck(cube, params, grads, allow_zero=["y"]).passed
    with pytest.raises(CheckRefused, match="z: the slope is zero everywhere"):
        gradcheck(cube, {**params, "z": randn(3)}, {**grads, "z": 0 * OTHER[0]}, allow_zero=["y"])


def test_a_function_may_change_the_dict_it_is_handed():
    def f(p):
        p["x"] = 2 * p.pop("x")
        return (p["x"] ** 2).sum()

    assert gradcheck(f, {"x": X}, {"x": 8 * X}).passed


def test_a_function_that_is_not_finite_nearby_is_refused():
    for x in (np.array([1e-9, 1.0]), np.array([1.0, 1e-9])):
        message = r"f is not finite close to params\['x'\]"
        with pytest.raises(CheckRefused, match=message), np.errstate(invalid="ignore"):
            gradcheck(lambda p: np.sqrt(p["x"]).sum(), {"x": x}, {"x": 0.5 / np.sqrt(x)}, method="central")


def test_views_that_do_not_overlap_are_no_obstacle():
    w = randn(4, 6)
    params = {"left": w[:, ::2], "right": w[:, 1::2]}
    grads = {name: 3 * p**2 for name, p in params.items()}
    assert gradcheck(lambda p: (p["left"] ** 3).sum() + (p["right"] ** 3).sum(), params, grads).passed


def test_a_cotangent_gives_the_gradient_of_its_product():
    c = OTHER
    assert gradcheck(lambda p: p["x"] ** 3, {"x": X}, {"x": 3 * X**2 * c}, cotangent=c).method == "complex"
    with pytest.raises(GradientError):
        gradcheck(lambda p: p["x"] ** 3, {"x": X}, {"x": 3 * X**2}, cotangent=c)


# --- Taylor orders --------------------------------------------------------------------------------


def test_a_right_gradient_leaves_a_remainder_of_second_order():
    orders = taylor_orders(cube, {"x": X}, CUBE, halvings=8)
    np.testing.assert_allclose(orders.zeroth_orders, 1, atol=0.15)
    np.testing.assert_allclose(orders.first_orders, 2, atol=0.15)
    assert len(orders.steps) == len(orders.zeroth) == len(orders.first) == 9
    np.testing.assert_array_equal(orders.steps[1:], orders.steps[:-1] / 2)


def test_a_wrong_gradient_leaves_a_remainder_of_first_order():
    orders = taylor_orders(cube, {"x": X}, {"x": 1.01 * CUBE["x"]}, halvings=14)
    assert orders.first_orders[-1] == pytest.approx(1, abs=0.05)


def test_taylor_steps_go_along_one_direction_of_length_one():
    orders = taylor_orders(lambda p: 3 * p["x"].sum(), {"x": np.array([1.0])}, {"x": np.array([3.0])})
    assert (len(orders.steps), len(orders.first_orders)) == (13, 12)
    np.testing.assert_allclose(orders.zeroth, 3 * orders.steps, rtol=1e-10)
    assert orders.first.max() <= 1e-14
    default, zero, one = (taylor_orders(cube, {"x": X}, CUBE, **seed) for seed in ({}, {"seed": 0}, {"seed": 1}))
    np.testing.assert_array_equal(default.first, zero.first)
    assert not np.array_equal(default.first, one.first)


def test_taylor_orders_take_a_cotangent_and_refuse_as_gradcheck_does():
    orders = taylor_orders(lambda p: p["x"] ** 3, {"x": X}, {"x": 3 * X**2 * OTHER}, cotangent=OTHER, halvings=6)
    np.testing.assert_allclose(orders.first_orders, 2, atol=0.3)
    with pytest.raises(CheckRefused, match="give a cotangent"):
        taylor_orders(lambda p: p["x"] ** 3, {"x": X}, CUBE)
    with pytest.raises(CheckRefused, match="expected float64"):
        taylor_orders(cube, {"x": X.astype(np.float32)}, CUBE)
    with pytest.raises(CheckRefused, match="cotangent has dtype float32"):
        taylor_orders(lambda p: p["x"], {"x": X}, {"x": OTHER}, cotangent=OTHER.astype(np.float32))


def test_a_remainder_that_vanishes_is_no_error():
    """x^200 underflows to nothing within a few halvings; what its order is then cannot be said."""
    orders = taylor_orders(lambda p: (p["x"] ** 200).sum(), {"x": np.zeros(1)}, {"x": np.zeros(1)})
    assert orders.first[-1] == 0
    assert np.isnan(orders.first_orders[-1])


# --- what the checker must not let through -------------------------------------------------------


def softmax_of_shifted(p):
    """A key's bias moves all scores of a query alike, and a softmax does not feel that."""
    scores = p["q"] @ (p["k"] + p["bias"]).T
    weights = np.exp(scores)
    return (weights / weights.sum(axis=1, keepdims=True) * COTANGENT).sum()


RNG = np.random.default_rng(5)
COTANGENT = RNG.standard_normal((3, 4))
ATTENTION = {"q": RNG.standard_normal((3, 2)), "k": RNG.standard_normal((4, 2)), "bias": RNG.standard_normal(2)}


def attention_gradients():
    """By complex step, entry by entry: the slope of the bias is rounding."""
    grads = {}
    for name, p in ATTENTION.items():
        grads[name] = np.zeros_like(p)
        for i in np.ndindex(p.shape):
            moved = p.astype(complex)
            moved[i] += 1e-20j
            grads[name][i] = softmax_of_shifted({**ATTENTION, name: moved}).imag / 1e-20
    return grads


@pytest.mark.parametrize("method", ["complex", "central"])
def test_a_slope_of_rounding_is_refused_as_zero(method):
    grads = attention_gradients()
    assert 0 < abs(grads["bias"]).max() < 1e-15
    with pytest.raises(CheckRefused, match="bias: the slope is zero everywhere"):
        gradcheck(softmax_of_shifted, ATTENTION, grads, method=method)
    gradcheck(softmax_of_shifted, ATTENTION, grads, method=method, allow_zero=["bias"])


@pytest.mark.parametrize("method", ["complex", "central"])
def test_a_claim_where_nothing_is_measured_is_wrong(method):
    grads = {**attention_gradients(), "bias": np.array([0.1, 0.0])}
    with pytest.raises(GradientError) as caught:
        gradcheck(softmax_of_shifted, ATTENTION, grads, method=method)
    assert [block.passed for block in caught.value.report.blocks] == [True, True, False]


@pytest.mark.parametrize(("method", "slope"), [("complex", 1.1e-11), ("central", 1.1e-8)])
def test_a_slope_is_checked_where_it_is_well_above_what_is_allowed(method, slope):
    def f(p):
        return p["a"].sum() + slope * p["b"].sum()

    params = {"a": np.array([0.5, -0.25]), "b": np.array([0.125, 0.5])}
    grads = {"a": np.ones(2), "b": np.full(2, slope)}
    assert gradcheck(f, params, grads, method=method).passed
    slope *= 0.8
    with pytest.raises(CheckRefused, match=r"^b: no slope is larger than .*, so next to nothing was checked: give f"):
        gradcheck(f, params, {"a": np.ones(2), "b": np.zeros(2)}, method=method)
    with pytest.raises(GradientError):
        gradcheck(f, params, {"a": np.ones(2), "b": np.zeros(2)}, method=method, tolerance=slope / 20)


@pytest.mark.parametrize("rows", [20, 2000])
def test_a_penalty_that_a_complex_step_does_not_see_is_missed(rows):
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


def test_a_kink_is_found_where_the_error_is():
    """Not at the first entry: only the one at (1, 2) is close to its kink."""
    x = np.full((2, 4), 3.0)
    x[1, 2] = 1e-5

    def f(p):
        return (abs(p["x"]) * np.arange(1.0, 9.0).reshape(2, 4)).sum()

    for below in (1000, 0):  # every entry; directions, which are then searched
        with pytest.raises(GradientError) as caught:
            gradcheck(f, {"x": x}, {"x": np.arange(1.0, 9.0).reshape(2, 4)}, method="central", every_entry_below=below)
        (block,) = caught.value.report.blocks
        assert (block.worst, block.left, block.right) == ((1, 2), pytest.approx(-7, rel=0.1), pytest.approx(7, rel=0.1))


@pytest.mark.parametrize("away", [1e-5, 2e-4, 4e-4, 6e-4, -6e-4])
def test_a_kink_within_a_step_fails_no_right_gradient(away):
    """As of a ReLU that is nearly off: a step of the central difference, 7e-4, reaches over its kink."""
    x = np.array([[0.5, away], [-2.0, 1.5]])

    def f(p):
        return (np.where(p["x"].real > 0, p["x"], 0) * [[2.0, 3.0], [5.0, 7.0]]).sum()

    right = {"x": np.where(x > 0, [[2.0, 3.0], [5.0, 7.0]], 0)}
    assert gradcheck(f, {"x": x}, right).method == "complex"
    with pytest.raises(GradientError) as caught:
        gradcheck(f, {"x": x}, right, method="central")
    (block,) = caught.value.report.blocks
    assert block.worst == (0, 1)
    assert block.left + 1 < block.right
    assert "a kink, with slope" in str(caught.value)


def test_a_kink_across_a_direction_alone_is_found_there():
    """Along each axis the function is smooth at this point; between the axes it is not."""

    def f(p):
        return max(0.0, min(p["x"])) + p["x"].sum()

    with pytest.raises(GradientError) as caught:
        gradcheck(f, {"x": np.zeros(2)}, {"x": np.ones(2)}, method="central", every_entry_below=0, seed=1)
    (block,) = caught.value.report.blocks
    assert block.worst is None
    assert abs(block.analytic - block.numeric) == pytest.approx(block.error)
    assert abs(block.right - block.left) > 0.01


def test_an_array_under_two_names_is_checked_once():
    shared, other = RNG.standard_normal((2, 3)), RNG.standard_normal((2, 3))

    def f(p):
        return (p["a"] * p["b"] * p["c"]).sum()

    params = {"a": shared, "c": other, "b": shared}
    grads = {"a": shared * other, "b": shared * other, "c": shared**2}
    for method in ("complex", "central"):
        report = gradcheck(f, params, grads, method=method)
        assert [block.name for block in report.blocks] == ["a", "c"]
        with pytest.raises(GradientError):
            gradcheck(f, params, {**grads, "b": 0 * shared}, method=method)
    assert abs(np.median(taylor_orders(f, params, grads).first_orders) - 2) < 0.1


def test_two_arrays_on_one_memory_are_refused():
    x = RNG.standard_normal(4)
    params = {"a": x, "b": x[:2]}
    message = r"params\['a'\] and params\['b'\] share memory and are two arrays: give one array both names"
    with pytest.raises(ValueError, match=f"^{message}$"):
        gradcheck(lambda p: p["a"].sum() + p["b"].sum(), params, {"a": np.ones(4), "b": np.ones(2)})


@pytest.mark.parametrize("method", ["complex", "central"])
def test_nothing_at_all_is_refused_too(method):
    """A function that is zero with all its slopes leaves no size to compare with."""
    with pytest.raises(CheckRefused, match="x: the slope is zero everywhere"):
        gradcheck(lambda p: 0.0 * p["x"].sum(), {"x": X}, {"x": np.zeros_like(X)}, method=method)


def test_a_complex_step_that_gives_nan_is_not_trusted():
    def f(p):
        return (p["x"] ** 3).sum() * (np.nan if np.iscomplexobj(p["x"]) else 1)

    x = np.array([0.3, -1.2, 2.0])
    report = gradcheck(f, {"x": x}, {"x": 3 * x**2})
    assert (report.passed, report.method) == (True, "central")
    assert "nan" in report.note
