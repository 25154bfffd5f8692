import numpy as np
import pytest
from hypothesis import example, given

from minilora import mse

from .problems import ALL_ONES, problems
from .properties import MSE_PROPERTIES


@pytest.mark.parametrize("claim", MSE_PROPERTIES, ids=lambda claim: claim.__name__)
@given(problem=problems())
@example(problem=ALL_ONES)
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


def test_mse_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"prediction has shape \(0, 2\)"):
        mse(np.zeros((0, 2)), np.zeros((0, 2)))


def test_mse_refuses_mixed_precision():
    with pytest.raises(TypeError, match="target has dtype float32, expected float64 as in prediction"):
        mse(np.zeros(2), np.zeros(2, np.float32))


def test_mse_refuses_what_is_no_array():
    with pytest.raises(TypeError, match=r"^prediction must be an array, got list"):
        mse([1.0], np.zeros(1))
