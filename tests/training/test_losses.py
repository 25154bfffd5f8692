import numpy as np
import pytest
from hypothesis import example, given

from minilora import mse
from minilora.conformance.claims import MSE_CLAIMS

from ..support.compare import assert_close
from ..support.problems import ALL_ONES, MANY_ROWS, problems


@pytest.mark.parametrize("claim", MSE_CLAIMS, ids=lambda claim: claim.__name__)
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=MANY_ROWS)
def test_mse(claim, problem):
    claim(mse, problem)


@given(problem=problems())
def test_mse_leaves_its_arguments_alone(problem):
    prediction, target = problem.dy, problem.target
    _, gradient = mse(prediction, target)
    np.testing.assert_array_equal(prediction, problem.dy)
    np.testing.assert_array_equal(target, problem.target)
    assert not np.shares_memory(gradient, prediction)
    assert not np.shares_memory(gradient, target)


def test_a_perfect_prediction_has_no_loss_and_no_gradient():
    loss, gradient = mse(np.ones((2, 3)), np.ones((2, 3)))
    assert loss == 0
    assert not gradient.any()


def test_mse_does_not_broadcast():
    with pytest.raises(ValueError, match=r"target has shape \(3, 1\), expected \(3, 2\)"):
        mse(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"target has shape \(1, 3\), expected \(3, 1\)"):
        mse(np.zeros((3, 1)), np.zeros((1, 3)))


@given(problem=problems())
def test_mse_is_of_the_entries_whatever_their_shape(problem):
    prediction, target = problem.dy, problem.target
    loss, gradient = mse(prediction, target)
    n, out = prediction.shape
    for shape in ((n * out,), (1, n, out), (n, 1, out), (out, 1, n, 1)):
        other_loss, other_gradient = mse(prediction.reshape(shape), target.reshape(shape))
        assert_close(other_loss, loss, 1e-14)
        assert_close(other_gradient, gradient.reshape(shape), 1e-15)


@given(problem=problems())
def test_mse_knows_no_large_and_no_small(problem):
    """Powers of two go through to the last bit."""
    loss, gradient = mse(problem.dy, problem.target)
    for scale in (2.0**-60, 2.0**60):
        scaled_loss, scaled_gradient = mse(scale * problem.dy, scale * problem.target)
        assert scaled_loss == scale**2 * loss
        np.testing.assert_array_equal(scaled_gradient, scale * gradient)


def test_a_nan_is_not_hidden():
    prediction = np.array([1.0, np.nan, 3.0])
    loss, gradient = mse(prediction, np.zeros(3))
    assert np.isnan(loss)
    np.testing.assert_array_equal(np.isnan(gradient), [False, True, False])


def test_each_gradient_of_mse_has_its_own_memory():
    (_, one), (_, two) = (mse(np.ones(3), np.full(3, t)) for t in (0.0, 1.0))
    assert not np.shares_memory(one, two)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_follows_the_prediction(dtype):
    loss, gradient = mse(np.ones(3, dtype), np.zeros(3, dtype))
    assert loss.dtype == gradient.dtype == dtype


def test_mse_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"prediction has shape \(0, 2\)"):
        mse(np.zeros((0, 2)), np.zeros((0, 2)))


def test_mse_refuses_mixed_precision():
    with pytest.raises(TypeError, match="target has dtype float32, expected float64 as in prediction"):
        mse(np.zeros(2), np.zeros(2, np.float32))


def test_mse_refuses_what_is_no_array():
    with pytest.raises(TypeError, match=r"^prediction must be an array, got list"):
        mse([1.0], np.zeros(1))


def test_mse_refuses_integers():
    with pytest.raises(TypeError, match="prediction has dtype int64, expected a floating-point dtype"):
        mse(np.zeros(2, int), np.zeros(2, int))
