"""The best adapter in closed form: nothing of its rank does better, and training ends there."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import LoRA, best_adapter, best_adapter_from_gram, evaluate, mse, train

from ..support.compare import assert_close
from ..support.problems import ALL_ONES, MANY_ROWS, RANK_ABOVE_WIDTHS, Problem, problems


def from_gram(x: np.ndarray, residual: np.ndarray, *, rank: int, alpha: float = 1.0) -> LoRA:
    """Feed the rows one by one, as from a stream."""
    xtx, xtr = np.zeros((x.shape[1],) * 2), np.zeros((x.shape[1], residual.shape[1]))
    for row, target in zip(x, residual, strict=True):
        xtx += np.outer(row, row)
        xtr += np.outer(row, target)
    return best_adapter_from_gram(xtx, xtr, rank=rank, alpha=alpha)


ROUTES = pytest.mark.parametrize("route", [best_adapter, from_gram], ids=["from rows", "from Gram matrices"])


def best_loss(x: np.ndarray, residual: np.ndarray, rank: int) -> float:
    """The least loss at that rank, by singular values alone: what X cannot reach, and what the rank discards."""
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    u = u[:, s > 1e-10 * s[0]]
    fitted = u @ (u.T @ residual)
    discarded = np.linalg.svd(fitted, compute_uv=False)[rank:]
    return (((residual - fitted) ** 2).sum() + (discarded**2).sum()) / residual.size


@ROUTES
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=RANK_ABOVE_WIDTHS)
@example(problem=MANY_ROWS)
@example(problem=Problem(n=40, in_features=15, out_features=12, rank=10))
def test_its_loss_is_the_unreachable_plus_the_discarded_squares(route, problem):
    x, residual = problem.x, problem.target
    lora = route(x, residual, rank=problem.rank, alpha=problem.alpha)
    assert_close(mse(lora(x), residual)[0], np.array(best_loss(x, residual, problem.rank)), 1e-8)


@given(problem=problems())
def test_both_routes_agree_where_the_rows_determine_the_change(problem):
    x = problem.randn("many rows", 40, problem.in_features)
    residual = problem.randn("many targets", 40, problem.out_features)
    one, two = (route(x, residual, rank=problem.rank).delta() for route in (best_adapter, from_gram))
    assert_close(one, two, 1e-9)


@ROUTES
@given(problem=problems())
def test_its_change_is_inverse_to_the_size_of_x(route, problem):
    x = problem.randn("many rows", 40, problem.in_features)
    residual = problem.randn("many targets", 40, problem.out_features)
    once = route(x, residual, rank=problem.rank).delta()
    for scale in (2.0**-40, 2.0**40):
        assert_close(scale * route(scale * x, residual, rank=problem.rank).delta(), once, 1e-9)


@pytest.mark.parametrize(("route", "small"), [(best_adapter, 2.0**-30), (from_gram, 2.0**-12)])
@given(problem=problems())
def test_a_column_of_x_counts_however_small_it_is(route, small, problem):
    x = problem.randn("many rows", 40, problem.in_features)
    residual = problem.randn("many targets", 40, problem.out_features)
    loss = mse(route(x, residual, rank=problem.rank)(x), residual)[0]
    x[:, -1] *= small
    assert_close(mse(route(x, residual, rank=problem.rank)(x), residual)[0], loss, 1e-6)


@ROUTES
@given(problem=problems())
def test_a_target_of_that_rank_is_met_exactly(route, problem):
    x = problem.randn("many rows", 40, problem.in_features)
    true = LoRA(**problem.factors, alpha=problem.alpha)
    rank = min(problem.rank, problem.in_features, problem.out_features)
    lora = route(x, true(x), rank=rank, alpha=problem.alpha)
    assert_close(lora.delta(), true.delta(), 1e-9)
    assert mse(lora(x), true(x))[0] <= 1e-16 * max(1, np.square(true(x)).max())


@ROUTES
@pytest.mark.parametrize(("widths", "needed"), [((3, 2), 2), ((2, 5), 2)])
def test_what_a_rank_does_not_need_is_zero(route, widths, needed):
    problem = Problem(20, *widths, rank=5)
    lora = route(problem.x, problem.target, rank=5, alpha=2.0)
    assert (lora.rank, lora.alpha) == (5, 2.0)
    assert lora.lora_B[:, :needed].T @ lora.lora_B[:, :needed] == pytest.approx(np.eye(needed))
    assert not lora.lora_A[needed:].any()
    assert not lora.lora_B[:, needed:].any()
    assert_close(lora.delta().T, np.linalg.lstsq(problem.x, problem.target, rcond=None)[0], 1e-10)


def test_a_direction_that_rounding_explains_is_taken_as_constant():
    eps = np.finfo(np.float64).eps
    for square, kept in ((3 * eps, False), (5 * eps, True)):  # the limit is the number of inputs times eps
        lora = best_adapter_from_gram(np.diag([1.0, 1.0, 1.0, square]), np.ones((4, 2)), rank=1)
        assert bool(abs(lora.delta()[:, 3]).max() > 1) is kept


@ROUTES
@given(seed=st.integers(0, 2**32 - 1), rank_of_x=st.integers(1, 3), rank=st.integers(1, 3))
def test_an_x_of_low_rank_is_no_obstacle(route, seed, rank_of_x, rank):
    """Its columns are mixtures: no two are equal, and no coordinate shows what is missing."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    x = (rng.standard_normal((30, rank_of_x)) * 2.0 ** rng.integers(-3, 4, rank_of_x)) @ rotation[:rank_of_x]
    residual = rng.standard_normal((30, 4))
    lora = route(x, residual, rank=rank)
    assert_close(mse(lora(x), residual)[0], np.array(best_loss(x, residual, rank)), 1e-10)
    # Where X does not reach, nothing is learned: the change vanishes on all directions that X lacks.
    assert np.abs(lora.delta() @ rotation[rank_of_x:].T).max() <= 1e-6 * np.abs(lora.delta()).max()


@pytest.mark.parametrize("alpha", [1e-100, 1e-3, 1e3, 1e100])
@ROUTES
def test_alpha_changes_the_factors_and_not_the_result(route, alpha):
    problem = Problem(n=20, in_features=3, out_features=4, rank=2)
    lora = route(problem.x, problem.target, rank=2, alpha=alpha)
    assert lora.alpha == alpha
    assert_close(lora.delta(), route(problem.x, problem.target, rank=2).delta(), 1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_columns_that_repeat_are_no_obstacle_in_single_precision_either(seed):
    problem = Problem(n=300, in_features=6, out_features=3, rank=2, seed=seed)
    exact = problem.randn("x", 300, 2) @ problem.randn("mix", 2, 6)  # six columns, of which four are the others' sums
    x, residual = exact.astype(np.float32), problem.target.astype(np.float32)
    lora = best_adapter_from_gram(x.T @ x, x.T @ residual, rank=2)
    assert np.abs(lora.delta()).max() < 1
    assert mse(lora(x), residual)[0] == pytest.approx(best_loss(exact, problem.target, 2), rel=1e-3)


def test_its_arguments_are_left_alone():
    problem = Problem(n=20, in_features=3, out_features=2, rank=1)
    x, residual = problem.x, problem.target
    xtx, xtr = x.T @ x, x.T @ residual
    best_adapter(x, residual, rank=1)
    best_adapter_from_gram(xtx, xtr, rank=1)
    for array, before in ((x, problem.x), (residual, problem.target), (xtx, x.T @ x), (xtr, x.T @ residual)):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(("k", "r"), [(1, 1), (2, 1), (1, 2)])
def test_training_by_adam_ends_within_one_percent_of_it(k, r):
    """Targets of known rank k, and noise that no adapter can learn."""
    problem = Problem(n=200, in_features=8, out_features=6, rank=k, alpha=float(k))
    residual = LoRA(**problem.factors, alpha=problem.alpha)(problem.x) + problem.randn("noise", 200, 6)
    least = evaluate(best_adapter(problem.x, residual, rank=r), problem.x, residual)
    rng = np.random.default_rng(0)
    lora = LoRA.init(8, 6, rank=r, alpha=r, rng=rng, dtype="float64")
    history = train(lora, problem.x, residual, epochs=400, batch_size=100, lr=0.02, rng=rng)
    final = train(lora, problem.x, residual, epochs=100, batch_size=200, lr=0.002, rng=rng).losses[-1]
    assert least <= final + 1e-12
    assert final <= 1.01 * least < history.losses[0]


@ROUTES
def test_dtype_follows_the_arrays(route):
    problem = Problem(n=20, in_features=3, out_features=2, rank=1)
    x, residual = problem.x.astype(np.float32), problem.target.astype(np.float32)
    if route is from_gram:
        lora = best_adapter_from_gram(x.T @ x, x.T @ residual, rank=1)
    else:
        lora = best_adapter(x, residual, rank=1)
    assert lora.lora_A.dtype == lora.lora_B.dtype == np.float32
    assert_close(lora.delta(), best_adapter(problem.x, problem.target, rank=1).delta(), 1e-4)


@given(problem=problems())
@settings(max_examples=20)
def test_leading_axes_are_rows(problem):
    x = problem.randn("x3", 3, problem.n, problem.in_features)
    residual = problem.randn("y3", 3, problem.n, problem.out_features)
    flat = best_adapter(x.reshape(-1, problem.in_features), residual.reshape(-1, problem.out_features), rank=1)
    np.testing.assert_array_equal(best_adapter(x, residual, rank=1).delta(), flat.delta())


X, R = np.ones((3, 5)), np.ones((3, 4))
SKEW = np.eye(3) + np.array([[0, 1e-6, 0], [0, 0, 0], [0, 0, 0]])
SMALL = np.diag([0, 1.0 - 1e6, 0]) + np.array([[0, 1e-2, 0], [0, 0, 0], [0, 0, 0]])
NEGATIVE = np.ones((3, 3)) - 0.9 * np.eye(3)[::-1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, R, 0), ValueError, "rank must be at least 1, got 0"),
        ((X, R, 1, 0), ValueError, "alpha must be above 0 and finite, got 0"),
        ((X, R[:2], 1), ValueError, r"residual has shape \(2, 4\), expected \(3, 4\)"),
        ((X[0], R[0], 1), ValueError, r"X has shape \(5,\), .* expected \(rows, ..., width\)"),
        (
            (X[:0], R[:0], 1),
            ValueError,
            r"X has shape \(0, 5\), residual \(0, 4\), expected \(rows, ..., width\), none empty$",
        ),
        ((X, R[:, :0], 1), ValueError, r"X has shape .*, residual \(.*, 0\), expected .*, none empty$"),
        ((X, R.astype("f4"), 1), TypeError, "residual has dtype float32, expected float64 as in X"),
        (([[1.0]], R, 1), TypeError, "X must be an array, got list"),
        ((X.view(np.matrix), R, 1), TypeError, "X is a matrix; convert it with"),
        ((np.ma.masked_array(X), R, 1), TypeError, "X is a MaskedArray; convert it with"),
        ((X * np.nan, R, 1), ValueError, "X holds NaN or infinity"),
        ((X, R + np.inf, 1), ValueError, "residual holds NaN or infinity"),
        ((X.astype("f2"), R.astype("f2"), 1), TypeError, "X has dtype float16, expected"),
    ],
)
def test_bad_rows_are_refused(arguments, error, message):
    x, residual, rank, *alpha = arguments
    with pytest.raises(error, match=f"^{message}"):
        best_adapter(x, residual, rank=rank, **dict(zip(["alpha"], alpha, strict=False)))


@pytest.mark.parametrize(
    ("xtx", "xtr", "error", "message"),
    [
        (X[0], R, ValueError, r"XtX has shape \(5,\), expected \(5, 5\)"),
        (X, R, ValueError, r"XtX has shape \(3, 5\), expected \(3, 3\)"),
        (np.eye(3), R[:2], ValueError, r"XtR has shape \(2, 4\), expected \(3, 4\)"),
        (np.eye(3), R[:, 0], ValueError, r"XtR has shape \(3,\), expected \(3, 3\)"),
        (np.eye(3, dtype=int), R, TypeError, "XtX has dtype int64"),
        (np.eye(3), R.astype("f4"), TypeError, "XtR has dtype float32, expected float64 as in XtX"),
        (SKEW, R, ValueError, "XtX is not symmetric, expected the sum of x.T @ x over blocks x of rows$"),
        (1e6 * np.eye(3) + SMALL, R, ValueError, "XtX is not symmetric"),
        (-np.eye(3), R, ValueError, "XtX has eigenvalue -1, expected none below 0: it is no sum of x.T @ x$"),
        (np.diag([1.0, 1.0, -1e-3]), R, ValueError, r"XtX has eigenvalue -0\.001,"),
        (NEGATIVE, R, ValueError, "XtX has eigenvalue -0"),
        (np.eye(3) + np.inf, R, ValueError, "XtX holds NaN or infinity"),
        (np.eye(3), R * np.nan, ValueError, "XtR holds NaN or infinity"),
    ],
)
def test_bad_gram_matrices_are_refused(xtx, xtr, error, message):
    with pytest.raises(error, match=f"^{message}"):
        best_adapter_from_gram(xtx, xtr, rank=1)


def test_symmetric_means_up_to_the_size_of_the_entries():
    """Columns of very different sizes: the same difference is rounding in one entry and wrong in another."""
    sizes = np.array([1e-4, 1.0, 1e4])
    XtX, XtR = np.diag(sizes**2), np.ones((3, 2))
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 1)):
        for share, right in ((1e-10, True), (1e-7, False)):
            skew = XtX.copy()
            skew[i, j] += share * sizes[i] * sizes[j]
            if right:
                best_adapter_from_gram(skew, XtR, rank=1)
            else:
                with pytest.raises(ValueError, match=r"^XtX is not symmetric"):
                    best_adapter_from_gram(skew, XtR, rank=1)


def test_a_column_of_zeros_is_no_obstacle():
    x = X.copy()
    x[:, 1] = 0
    found = best_adapter_from_gram(x.T @ x, x.T @ R, rank=2)
    assert_close(found.delta(), best_adapter(x, R, rank=2).delta(), 1e-9)
    assert not found.delta()[:, 1].any()
