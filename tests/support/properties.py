"""What must hold for a layer, a loss or an optimizer, as functions that raise where it does not.

The tests beside this file call them on the library's own code; `test_gradient_bugs.py` calls the same ones on code that
is wrong on purpose, and there they must raise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from minilora import LoRA, gradcheck, mse

from .cases import Case
from .problems import Problem, SmallIntegers

Loss = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare as gradcheck does: absolute below 1, relative to the largest entry above."""
    assert np.shape(actual) == np.shape(expected)
    if np.size(expected):
        assert np.max(np.abs(actual - expected)) <= tolerance * max(1.0, np.max(np.abs(expected)))


# --- a layer's forward and backward ---------------------------------------------------------------


def forward_is_the_sum_written_out(case: Case, problem: Problem) -> None:
    params = case.params(problem)
    layer = case.build(problem, params)
    expected = case.loops(problem, params, problem.x)
    assert_close(layer(problem.x), expected, 1e-13)
    assert_close(layer.forward(problem.x)[0], expected, 1e-13)


def backward_is_the_slope_of_forward(case: Case, problem: Problem) -> None:
    """By complex step, central differences, and a step of 1, which is exact: each layer is linear in each array."""
    params, dy = case.params(problem), problem.dy
    grads, f = case.gradients(problem, params, dy), case.output(problem)
    gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12)
    gradcheck(f, params, grads, cotangent=dy, method="central", tolerance=1e-8)
    gradcheck(f, params, grads, cotangent=dy, method="central", step=1.0, tolerance=1e-12)


def float32_follows_float64(case: Case, problem: Problem) -> None:
    params, dy = case.params(problem), problem.dy
    single = {name: p.astype(np.float32) for name, p in params.items()}
    exact = {name: p.astype(np.float64) for name, p in single.items()}
    layer, exact_layer = case.build(problem, single), case.build(problem, exact)
    y = layer(single["x"])
    assert y.dtype == np.float32
    assert_close(y, exact_layer(exact["x"]), 5e-5)
    grads = case.gradients(problem, single, dy.astype(np.float32))
    exact_grads = case.gradients(problem, exact, dy.astype(np.float32).astype(np.float64))
    for name, grad in grads.items():
        assert grad.dtype == np.float32
        assert exact_grads[name].dtype == np.float64
        assert_close(grad, exact_grads[name], 5e-5)


def backward_is_pure(case: Case, problem: Problem) -> None:
    """Twice the same bits; nothing the caller holds is changed or handed back under another name."""
    params, dy = case.params(problem), problem.dy
    held = {**params, "dy": dy}
    before = {name: array.copy() for name, array in held.items()}
    layer = case.build(problem, params)
    y, cache = layer.forward(params["x"])
    first, second = ({"x": dx, **grads} for dx, grads in (layer.backward(dy, cache) for _ in range(2)))
    for name, array in held.items():
        np.testing.assert_array_equal(array, before[name])
    for name, grad in first.items():
        np.testing.assert_array_equal(grad, second[name])
        assert not np.shares_memory(grad, second[name])
        assert not any(np.shares_memory(grad, array) for array in (*held.values(), y))


def backward_is_linear_in_the_cotangent(case: Case, problem: Problem) -> None:
    params, dy, other = case.params(problem), problem.dy, problem.target
    one, two = case.gradients(problem, params, dy), case.gradients(problem, params, other)
    both = case.gradients(problem, params, 2 * dy - 3 * other)
    nothing = case.gradients(problem, params, 0 * dy)
    for name in one:
        assert_close(both[name], 2 * one[name] - 3 * two[name], 1e-13)
        assert not nothing[name].any()


def backward_knows_no_large_and_no_small(case: Case, problem: Problem) -> None:
    """A power of two goes through to the last bit, so nothing is clipped, flushed to zero or moved off it."""
    for dtype in (np.float32, np.float64):
        params, dy = {name: p.astype(dtype) for name, p in case.params(problem).items()}, problem.dy.astype(dtype)
        once = case.gradients(problem, params, dy)
        for scale in (dtype(2.0**-60), dtype(2.0**60)):
            for name, grad in case.gradients(problem, params, scale * dy).items():
                np.testing.assert_array_equal(grad, scale * once[name])


def every_precision_is_exact_on_small_integers(case: Case, problem: Problem) -> None:
    integers = SmallIntegers(**{**vars(problem), "alpha": 2.0 * problem.rank})
    exact, dy = case.params(integers), integers.dy
    y, grads = case.output(integers)(exact), case.gradients(integers, exact, dy)
    for dtype in (np.float16, np.float32):
        params = {name: p.astype(dtype) for name, p in exact.items()}
        found = {"y": case.output(integers)(params), **case.gradients(integers, params, dy.astype(dtype))}
        for name, expected in {"y": y, **grads}.items():
            assert found[name].dtype == dtype
            np.testing.assert_array_equal(found[name], expected)


def memory_order_makes_no_difference(case: Case, problem: Problem) -> None:
    """Values count, not how they lie: Fortran order, every other entry of a larger array, backwards."""

    def fortran(array: np.ndarray) -> np.ndarray:
        return array.copy(order="F")

    def strided(array: np.ndarray) -> np.ndarray:
        return np.repeat(array, 2, axis=-1)[..., ::2]

    def backwards(array: np.ndarray) -> np.ndarray:
        return array[::-1].copy()[::-1]

    params = {**case.params(problem), "x": problem.randn("x3", 2, problem.n, problem.in_features)}
    dy = problem.randn("dy3", 2, problem.n, problem.out_features)
    y, grads = case.output(problem)(params), case.gradients(problem, params, dy)
    for lay in (fortran, strided, backwards):
        moved = {name: lay(p) for name, p in params.items()}
        assert_close(case.output(problem)(moved), y, 1e-13)
        for name, grad in case.gradients(problem, moved, lay(dy)).items():
            assert_close(grad, grads[name], 1e-13)


def a_layer_remembers_nothing_but_its_cache(case: Case, problem: Problem) -> None:
    """Two forwards, then both backwards; then other numbers in the same arrays. Each time as from a new layer."""
    for dtype in (np.float32, np.float64):
        params = {name: p.astype(dtype) for name, p in case.params(problem).items()}
        layer, x, dy = case.build(problem, params), params["x"], problem.dy.astype(dtype)
        other = problem.randn("other x", *x.shape).astype(dtype)
        (y, cache), (other_y, other_cache) = layer.forward(x), layer.forward(other)
        assert not np.shares_memory(y, other_y)
        for input, output, c in ((x, y, cache), (other, other_y, other_cache)):
            new = case.build(problem, params)
            expected, new_cache = new.forward(input)
            np.testing.assert_array_equal(output, expected)
            (dx, grads), (new_dx, new_grads) = layer.backward(dy, c), new.backward(dy, new_cache)
            np.testing.assert_array_equal(dx, new_dx)
            for name, grad in grads.items():
                np.testing.assert_array_equal(grad, new_grads[name])
        layer(x)
        for p in params.values():
            p[...] = p[::-1].copy() + 1
        np.testing.assert_array_equal(layer(x), case.build(problem, params)(x))


def no_rows_give_no_rows(case: Case, problem: Problem) -> None:
    layer = case.build(problem, case.params(problem))
    for shape in ((0,), (2, 0)):
        y, cache = layer.forward(np.zeros((*shape, problem.in_features)))
        assert y.shape == (*shape, problem.out_features)
        dx, grads = layer.backward(y, cache)
        assert dx.shape == (*shape, problem.in_features)
        assert grads.keys() == layer.trainable().keys()
        for name, p in layer.trainable().items():
            np.testing.assert_array_equal(grads[name], np.zeros_like(p))


def backward_without_dx_is_the_same(case: Case, problem: Problem) -> None:
    params, dy = case.params(problem), problem.dy
    layer = case.build(problem, params)
    _, cache = layer.forward(params["x"])
    _, grads = layer.backward(dy, cache)
    dx, alone = layer.backward(dy, cache, need_dx=False)
    assert dx is None
    assert alone.keys() == grads.keys() == layer.trainable().keys()
    for name, grad in alone.items():
        np.testing.assert_array_equal(grad, grads[name])


def leading_axes_are_rows(case: Case, problem: Problem) -> None:
    """(2, n, in) and (2 n, in) are the same rows; a vector (in,) is one row."""
    params = case.params(problem)
    layer = case.build(problem, params)
    x = problem.randn("leading x", 2, problem.n, problem.in_features)
    dy = problem.randn("leading dy", 2, problem.n, problem.out_features)
    for shape in ((2 * problem.n,), (problem.n, 1, 2), (1, 2 * problem.n)):
        flat_x, flat_dy = x.reshape(*shape, problem.in_features), dy.reshape(*shape, problem.out_features)
        y, cache = layer.forward(x)
        flat_y, flat_cache = layer.forward(flat_x)
        assert_close(flat_y.reshape(y.shape), y, 1e-13)
        (dx, grads), (flat_dx, flat_grads) = layer.backward(dy, cache), layer.backward(flat_dy, flat_cache)
        assert_close(flat_dx.reshape(dx.shape), dx, 1e-13)
        for name in grads:
            assert_close(flat_grads[name], grads[name], 1e-13)
    y, cache = layer.forward(x[0, 0])
    row_y, row_cache = layer.forward(x[0, :1])
    (dx, grads), (row_dx, row_grads) = layer.backward(dy[0, 0], cache), layer.backward(dy[0, :1], row_cache)
    assert_close(y, row_y[0], 1e-13)
    assert_close(dx, row_dx[0], 1e-13)
    for name in grads:
        assert_close(grads[name], row_grads[name], 1e-13)
        assert not np.shares_memory(grads[name], dy)


LAYER_PROPERTIES = (
    forward_is_the_sum_written_out,
    backward_is_the_slope_of_forward,
    float32_follows_float64,
    backward_is_pure,
    backward_is_linear_in_the_cotangent,
    backward_knows_no_large_and_no_small,
    backward_without_dx_is_the_same,
    every_precision_is_exact_on_small_integers,
    leading_axes_are_rows,
    memory_order_makes_no_difference,
    a_layer_remembers_nothing_but_its_cache,
    no_rows_give_no_rows,
)


# --- the adapter ----------------------------------------------------------------------------------


def delta_is_the_matrix_of_forward(cls: type, problem: Problem) -> None:
    lora = cls(**problem.factors, alpha=problem.alpha)
    assert lora.delta().shape == (problem.out_features, problem.in_features)
    assert_close(problem.x @ lora.delta().T, lora(problem.x), 1e-13)


def residual_form_is_the_gradient_of_mse(cls: type, problem: Problem) -> None:
    factors, x, residual = problem.factors, problem.x, problem.target

    def loss(p: dict) -> np.ndarray:
        # The library's own LoRA, since a broken one may come in.
        return mse(LoRA(p["lora_A"], p["lora_B"], problem.alpha)(x), residual)[0]

    grads = cls(**factors, alpha=problem.alpha).mse_gradients(x, residual)
    gradcheck(loss, factors, grads, method="complex", tolerance=1e-12)
    single = cls(**{k: v.astype(np.float32) for k, v in factors.items()}, alpha=problem.alpha)
    for name, grad in single.mse_gradients(x.astype(np.float32), residual.astype(np.float32)).items():
        assert grad.dtype == np.float32
        assert_close(grad, grads[name], 2e-4)  # the rounded factors and data alone move it by as much


# --- the loss -------------------------------------------------------------------------------------


def mse_is_the_mean_written_out(loss: Loss, problem: Problem) -> None:
    prediction, target = problem.dy, problem.target
    terms = [(prediction[i] - target[i]) ** 2 for i in np.ndindex(prediction.shape)]
    assert_close(loss(prediction, target)[0], np.array(sum(terms) / len(terms)), 1e-14)


def mse_gradient_is_its_slope(loss: Loss, problem: Problem) -> None:
    prediction, target = {"prediction": problem.dy}, problem.target
    _, gradient = loss(prediction["prediction"], target)
    gradcheck(lambda p: loss(p["prediction"], target)[0], prediction, {"prediction": gradient}, tolerance=1e-12)
    single, single_gradient = loss(problem.dy.astype(np.float32), target.astype(np.float32))
    assert single.dtype == single_gradient.dtype == np.float32
    assert_close(single_gradient, gradient, 5e-5)


MSE_PROPERTIES = (mse_is_the_mean_written_out, mse_gradient_is_its_slope)


# --- the optimizer --------------------------------------------------------------------------------


def adam_is_algorithm_1_in_scalars(cls: type, problem: Problem) -> None:
    """Follow one number at a time through Algorithm 1, in Python floats."""
    lr, beta1, beta2, eps = 0.03, 0.8, 0.95, 1e-3  # an eps large enough for its place to be seen
    params = {name: p.copy() for name, p in problem.factors.items()}
    optimizer = cls(params, lr=lr, betas=(beta1, beta2), eps=eps)
    steps = [{name: problem.randn(f"{name} {t}", *p.shape) for name, p in params.items()} for t in range(4)]
    for grads in steps:
        optimizer.step(grads)
    for name, p in params.items():
        for i in np.ndindex(p.shape):
            theta, m, v = float(problem.factors[name][i]), 0.0, 0.0
            for t, grads in enumerate(steps, start=1):
                g = float(grads[name][i])
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * g**2
                theta -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)
            assert abs(p[i] - theta) <= 1e-13 * max(1.0, abs(theta))


def adam_first_step_is_lr_whatever_the_scale(cls: type, problem: Problem) -> None:
    moved = []
    for scale in (1.0, 1e6):
        params = {"p": np.zeros(problem.in_features)}
        g = {
            "p": scale * (1 + np.abs(problem.randn("g", problem.in_features))) * (-1) ** np.arange(problem.in_features)
        }
        optimizer = cls(params, lr=0.01)
        optimizer.step(g)
        assert_close(params["p"], -0.01 * np.sign(g["p"]), 1e-9)
        for _ in range(3):
            optimizer.step(g)
        moved.append(params["p"])
    assert_close(moved[0], moved[1], 1e-9)


def adam_stands_still_without_gradient(cls: type, problem: Problem) -> None:
    params = {name: p.copy() for name, p in problem.factors.items()}
    optimizer = cls(params)
    for _ in range(3):
        optimizer.step({name: np.zeros_like(p) for name, p in params.items()})
    for name, p in params.items():
        np.testing.assert_array_equal(p, problem.factors[name])


ADAM_PROPERTIES = (
    adam_is_algorithm_1_in_scalars,
    adam_first_step_is_lr_whatever_the_scale,
    adam_stands_still_without_gradient,
)
