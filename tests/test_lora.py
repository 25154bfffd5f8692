"""Identities of LoRA that hold whatever the numbers are."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear, adapt, mse, train
from minilora.fast import residual_form

from .support.claims import delta_is_the_matrix_of_forward
from .support.compare import assert_close, gradients_are_the_slope_of_mse
from .support.memory import traced
from .support.problems import ALL_ONES, LARGE, ONE_ROW, RANK_ABOVE_WIDTHS, Problem, problems


def layer_of(problem: Problem, dtype: str = "float64") -> LoRALinear:
    full = {name: p.astype(dtype) for name, p in problem.full.items()}
    factors = {name: p.astype(dtype) for name, p in problem.factors.items()}
    return LoRALinear(Linear(**full), LoRA(**factors, alpha=problem.alpha))


@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=RANK_ABOVE_WIDTHS)
def test_delta_is_the_matrix_of_forward(problem):
    delta_is_the_matrix_of_forward(LoRA, problem)
    layer = layer_of(problem)
    np.testing.assert_array_equal(layer.delta(), layer.adapter.delta())


@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=ONE_ROW)
@example(problem=RANK_ABOVE_WIDTHS)
def test_residual_form_is_the_gradient_of_mse(problem):
    gradients_are_the_slope_of_mse(residual_form, problem)


@pytest.mark.parametrize("large", LARGE)
def test_a_large_adapter_is_an_adapter(large):
    delta_is_the_matrix_of_forward(LoRA, LARGE[large])
    gradients_are_the_slope_of_mse(residual_form, LARGE[large])


def test_delta_of_many_entries_is_the_matrix_of_forward():
    delta_is_the_matrix_of_forward(LoRA, Problem(n=2, in_features=1000, out_features=1100, rank=3))


@given(problem=problems())
def test_residual_form_leaves_its_arguments_alone(problem):
    x, target = problem.x, problem.target
    for layer in (layer_of(problem), layer_of(problem).adapter):
        residual_form(layer, x, target)
        np.testing.assert_array_equal(x, problem.x)
        np.testing.assert_array_equal(target, problem.target)


@given(problem=problems())
def test_delta_and_merge_follow_the_factors(problem):
    layer = layer_of(problem)
    layer.delta(), layer.merge()
    for p in (*layer.trainable().values(), *layer.base.trainable().values()):
        p += 1
    new = LoRALinear(Linear(**layer.base.trainable()), LoRA(**layer.trainable(), alpha=problem.alpha))
    np.testing.assert_array_equal(layer.delta(), new.delta())
    for name, p in layer.merge().trainable().items():
        np.testing.assert_array_equal(p, new.merge().trainable()[name])


def test_residual_form_of_many_rows_forms_no_error():
    rng = np.random.default_rng(0)
    X, Y, W = (rng.standard_normal(shape) for shape in ((400, 30), (400, 300), (300, 30)))
    layer = LoRALinear.from_linear(Linear(W), rank=1, alpha=1, rng=rng)
    with traced() as memory:
        residual_form(layer, X, Y)
    assert memory.peak < Y.nbytes / 4


@given(problem=problems())
def test_residual_form_takes_leading_axes_as_rows(problem):
    lora = LoRA(**problem.factors, alpha=problem.alpha)
    x = problem.randn("leading x", 2, problem.n, problem.in_features)
    residual = problem.randn("leading y", 2, problem.n, problem.out_features)
    flat = residual_form(lora, x.reshape(-1, problem.in_features), residual.reshape(-1, problem.out_features))
    for name, grad in residual_form(lora, x, residual).items():
        np.testing.assert_array_equal(grad, flat[name])
    layer = layer_of(problem)
    flat = residual_form(layer, x.reshape(-1, problem.in_features), residual.reshape(-1, problem.out_features))
    for name, grad in residual_form(layer, x, residual).items():
        assert_close(grad, flat[name], 1e-13)


@pytest.mark.parametrize("rank", [1, 4])
def test_residual_form_broadcasts_no_target(rank):
    x, y = np.ones((6, 3)), np.ones((6, 4))
    model = LoRALinear(Linear(np.ones((4, 3)), np.ones(4)), LoRA(np.ones((rank, 3)), np.ones((4, rank)), 1))
    for wrong in (y[:, :1], y[:1], y[0], y[:, None]):
        with pytest.raises(ValueError, match=r"^y has shape \(.*\), expected \(6, 4\)$"):
            residual_form(model, x, wrong)


@given(problem=problems())
def test_training_beside_a_base_is_training_on_the_residual(problem):
    layer = layer_of(problem)
    d_prediction = mse(layer(problem.x), problem.target)[1]
    _, by_backward = layer.backward(d_prediction, layer.forward(problem.x)[1])
    on_residual = residual_form(layer.adapter, problem.x, problem.target - layer.base(problem.x))
    for name, grad in residual_form(layer, problem.x, problem.target).items():
        assert_close(grad, by_backward[name], 1e-12)
        assert_close(grad, on_residual[name], 1e-12)


@given(problem=problems(), dtype=st.sampled_from(["float32", "float64"]))
@example(problem=ALL_ONES, dtype="float32")
def test_an_adapted_layer_starts_as_its_base_bit_for_bit(problem, dtype):
    base = Linear(**{name: p.astype(dtype) for name, p in problem.full.items()})
    layer = LoRALinear.from_linear(base, rank=problem.rank, alpha=problem.alpha, rng=np.random.default_rng(0))
    x = problem.x.astype(dtype)
    np.testing.assert_array_equal(layer(x), base(x))
    np.testing.assert_array_equal(layer.merge()(x), base(x))


@given(problem=problems())
def test_at_the_start_only_B_has_a_gradient(problem):
    rng = np.random.default_rng(problem.seed)
    lora = LoRA.init(problem.in_features, problem.out_features, rank=problem.rank, alpha=1, rng=rng, dtype="float64")
    _, grads = lora.backward(problem.dy, lora.forward(problem.x)[1])
    assert not grads["lora_A"].any()
    assert grads["lora_B"].any()


@given(problem=problems())
def test_with_both_factors_zero_nothing_would_ever_move(problem):
    zeros = {name: np.zeros_like(p) for name, p in problem.factors.items()}
    lora = LoRA(**zeros, alpha=problem.alpha)
    _, grads = lora.backward(problem.dy, lora.forward(problem.x)[1])
    assert not any(grad.any() for grad in grads.values())


@given(problem=problems())
def test_dA_A_transposed_equals_B_transposed_dB(problem):
    lora = LoRA(**problem.factors, alpha=problem.alpha)
    _, grads = lora.backward(problem.dy, lora.forward(problem.x)[1])
    assert_close(grads["lora_A"] @ lora.lora_A.T, lora.lora_B.T @ grads["lora_B"], 1e-12)


@given(problem=problems())
def test_only_the_product_of_the_factors_is_determined(problem):
    lora = LoRA(**problem.factors, alpha=problem.alpha)
    q, _ = np.linalg.qr(problem.randn("gauge", problem.rank, problem.rank))
    gauge = q * np.linspace(0.5, 2, problem.rank)  # invertible, and not orthogonal
    turned = LoRA(gauge @ lora.lora_A, lora.lora_B @ np.linalg.inv(gauge), problem.alpha)
    assert_close(turned(problem.x), lora(problem.x), 1e-12)
    assert_close(turned.delta(), lora.delta(), 1e-12)


@given(problem=problems())
def test_rank_of_delta_is_at_most_the_adapters_rank(problem):
    values = np.linalg.svd(LoRA(**problem.factors, alpha=problem.alpha).delta(), compute_uv=False)
    assert (values[problem.rank :] <= 1e-13 * values[0]).all()


@given(problem=problems(), dtype=st.sampled_from(["float32", "float64"]))
@example(problem=RANK_ABOVE_WIDTHS, dtype="float32")
def test_merged_layer_gives_the_same_output(problem, dtype):
    layer, x = layer_of(problem, dtype), problem.x.astype(dtype)
    # Rounding adds up over the sums of in_features and rank terms, on numbers of this size.
    size = abs(x) @ (abs(layer.base.weight) + layer.scaling * abs(layer.adapter.lora_B) @ abs(layer.adapter.lora_A)).T
    bound = 4 * (problem.in_features + problem.rank) * np.finfo(dtype).eps * (size.max() + 1)
    merged = layer.merge()
    assert isinstance(merged, Linear)
    assert merged.weight.dtype == dtype
    assert np.abs(merged(x) - layer(x)).max() <= bound


def test_frozen_weights_are_the_same_bits_after_training():
    problem = Problem(n=20, in_features=5, out_features=4, rank=3)
    layer = layer_of(problem)
    before = {name: p.copy() for name, p in layer.base.trainable().items()}
    adapter_before = {name: p.copy() for name, p in layer.trainable().items()}
    train(layer, problem.x, problem.target, epochs=5, batch_size=6, rng=np.random.default_rng(0))
    for name, p in layer.base.trainable().items():
        np.testing.assert_array_equal(p, before[name])
    assert not any(np.array_equal(p, adapter_before[name]) for name, p in layer.trainable().items())


@given(problem=problems())
def test_the_articles_convention_is_ours_transposed(problem):
    """The article computes x A B with A (in, r) and B (r, out), and keeps the scaling."""
    lora = LoRA(**problem.factors, alpha=problem.alpha)
    article_A, article_B = lora.lora_A.T, lora.lora_B.T
    assert article_A.shape == (problem.in_features, problem.rank)
    assert_close(problem.x @ (article_A @ article_B * (problem.alpha / problem.rank)), lora(problem.x), 1e-13)
    assert_close(lora.delta().T, article_A @ article_B * lora.scaling, 1e-13)


def test_an_alpha_is_set_at_the_adapter():
    linear = Linear(np.ones((3, 5)))
    dora = adapt(linear, "", rank=2, alpha=4, rng=np.random.default_rng(0), use_dora=True)
    for each in (LoRALinear.from_linear(linear, rank=2, alpha=4, rng=np.random.default_rng(0)), dora):
        with pytest.raises(AttributeError, match="alpha"):
            each.alpha = 8
        with pytest.raises(ValueError, match=r"^alpha must be above 0 and finite, got -3"):
            each.adapter.alpha = -3
        assert (each.alpha, each.scaling) == (4, 2)
        each.adapter.alpha = 8
        assert (each.alpha, each.scaling) == (8, 4)
