import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import cross_entropy, gradcheck, mse
from minilora.losses import count

from .support.claims import MSE_CLAIMS
from .support.compare import assert_close
from .support.problems import ALL_ONES, MANY_ROWS, problems


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


MSE_REFUSES = [
    (np.zeros((3, 2)), np.zeros((3, 1)), "target has shape (3, 1), expected (3, 2)"),
    (np.zeros((3, 1)), np.zeros((1, 3)), "target has shape (1, 3), expected (3, 1)"),
    (np.zeros((0, 2)), np.zeros((0, 2)), "prediction has shape (0, 2): the mean of no entries does not exist"),
    (
        np.zeros(2),
        np.zeros(2, np.float32),
        "target has dtype float32, expected float64 as in prediction: convert it with target.astype('float64')",
    ),
    ([1.0], np.zeros(1), "prediction must be an array, got list; convert it with numpy.asarray(prediction)"),
    (np.zeros(2, int), np.zeros(2, int), "prediction has dtype int64, expected a floating-point dtype such as float32"),
]


@pytest.mark.parametrize(("prediction", "target", "message"), MSE_REFUSES)
def test_mse_refuses_what_would_be_broadcast_promoted_or_empty(prediction, target, message):
    with pytest.raises((ValueError, TypeError)) as error:
        mse(prediction, target)
    assert str(error.value) == message


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


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtype_follows_the_prediction(dtype):
    loss, gradient = mse(np.ones(3, dtype), np.zeros(3, dtype))
    assert loss.dtype == gradient.dtype == dtype


# --- cross-entropy --------------------------------------------------------------------------------


def written_out(logits, targets):
    """The mean of -log softmax at the target, one row after another, in Python floats."""
    terms = []
    for row, target in zip(logits.reshape(-1, logits.shape[-1]).tolist(), targets.ravel().tolist(), strict=True):
        if target != -100:
            top = max(row)
            terms.append(math.log(math.fsum(math.exp(z - top) for z in row)) + top - row[target])
    return math.fsum(terms) / len(terms)


def draw(shape, classes, seed, ignored=0.3):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, shape)
    targets[rng.random(shape) < ignored] = -100
    targets.flat[0] = classes - 1
    return 3 * rng.standard_normal((*shape, classes)), targets


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), classes=st.integers(1, 7), seed=st.integers(0, 2**32 - 1)
)
def test_cross_entropy_is_the_mean_written_out(shape, classes, seed):
    logits, targets = draw(tuple(shape), classes, seed)
    loss, gradient = cross_entropy(logits, targets)
    assert_close(loss, np.array(written_out(logits, targets)), 1e-13)
    assert gradient.shape == logits.shape
    assert not gradient[targets == -100].any()
    assert_close(gradient.sum(axis=-1), np.zeros(targets.shape), 1e-15)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=2), classes=st.integers(2, 6), seed=st.integers(0, 2**32 - 1)
)
def test_cross_entropys_gradient_is_its_slope(shape, classes, seed):
    logits, targets = draw(tuple(shape), classes, seed)
    grads = {"z": cross_entropy(logits, targets)[1]}
    gradcheck(lambda p: cross_entropy(p["z"], targets)[0], {"z": logits}, grads, method="complex", tolerance=1e-12)
    single, gradient = cross_entropy(logits.astype(np.float32), targets)
    assert single.dtype == gradient.dtype == np.float32
    assert_close(gradient, grads["z"], 5e-6)
    assert_close(single, cross_entropy(logits, targets)[0], 5e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(size):
    logits = np.array([[size, 0.0, -size], [-size, -size, -size]], np.float32)
    loss, gradient = cross_entropy(logits, np.array([0, 1]))
    assert float(loss) == pytest.approx(np.log(3) / 2)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1 / 6, -1 / 3, 1 / 6]], atol=1e-7)


def test_cross_entropy_leaves_its_arguments_alone():
    logits, targets = draw((3, 2), 5, 0)
    before, ids = logits.copy(), targets.copy()
    _, gradient = cross_entropy(logits, targets)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_array_equal(targets, ids)
    assert not np.shares_memory(gradient, logits)


def test_the_gradient_can_take_the_logits_place():
    logits, targets = draw((3, 2), 5, 0)
    loss, gradient = cross_entropy(logits.copy(), targets)
    there, in_place = cross_entropy(logits, targets, out=logits)
    assert in_place is logits
    assert there == loss
    np.testing.assert_array_equal(in_place, gradient)


def test_a_row_of_minus_infinity_does_not_count_when_ignored():
    logits = np.array([[0.0, 1.0], [-np.inf, 0.0]])
    loss, gradient = cross_entropy(logits, np.array([1, -100]))
    assert float(loss) == pytest.approx(np.log(1 + np.exp(-1)))
    assert not gradient[1].any()


@pytest.mark.parametrize(
    ("logits", "targets", "error", "message"),
    [
        (np.ones((2, 3)), np.array([0, 3]), ValueError, "targets holds 3 at (1,), expected 0 to 2"),
        (np.ones((2, 3)), np.array([-1, 0]), ValueError, "targets holds -1 at (0,), expected 0 to 2"),
        (np.ones((2, 3)), np.array([0.0, 1.0]), TypeError, "targets has dtype float64, expected integers"),
        (np.ones((2, 3)), [0, 1], TypeError,
         "targets must be an array of integers, got list; convert it with numpy.asarray(targets)"),
        (np.ones((2, 3)), np.array([[0, 1]]), ValueError, "targets has shape (1, 2), expected (2,)"),
        (np.ones((2, 0)), np.array([0, 1]), ValueError,
         "logits has shape (2, 0), expected (..., V) with no empty axis"),
        (np.float64(1), np.array(0), ValueError, "logits has shape (), expected (..., V) with no empty axis"),
        (np.ones((2, 3), int), np.array([0, 1]), TypeError,
         "logits has dtype int64, expected a floating-point dtype such as float32"),
    ],
)  # fmt: skip
def test_cross_entropy_refuses(logits, targets, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        cross_entropy(logits, targets)


def test_targets_of_another_library_are_named():
    ids = type("ndarray", (), {"__module__": "cupy", "dtype": np.dtype("int64"), "shape": (2,)})()
    with pytest.raises(TypeError, match=r"^targets is a cupy array and logits holds numpy arrays: "):
        cross_entropy(np.ones((2, 3)), ids)


def test_where_no_row_counts_nothing_is_lost_or_learned():
    loss, gradient = cross_entropy(np.ones((2, 3)), np.array([-100, -100]))
    assert float(loss) == 0
    assert not gradient.any()


def test_a_mean_runs_over_entries_or_over_targets_that_count():
    assert count(np.ones((3, 4), np.float32)) == 12
    for dtype in (np.int64, np.int32):
        assert count(np.array([[1, -100], [0, 2]], dtype)) == 3
    assert count(np.array([7, 200], np.uint8)) == 2
    with pytest.raises(ValueError, match=r"^target has shape \(0, 4\): the mean of no entries does not exist"):
        count(np.ones((0, 4)))
