"""What a linear layer and its adapter are made with: their start, their names, their widths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear

from .support.cases import PRODUCTS
from .support.problems import Problem, problems


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_layer_knows_its_widths(case):
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    layer = case.build(problem, case.params(problem))
    assert (layer.in_features, layer.out_features) == (5, 4)


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_trainable_arrays_are_the_layers_own(case):
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    for lay in (np.array, np.asfortranarray, lambda p: np.repeat(p, 2, axis=-1)[..., ::2]):
        arrays = {name: lay(p) for name, p in case.arrays(problem).items()}
        trainable = case.build(problem, arrays).trainable()
        assert trainable.keys() == arrays.keys()
        assert all(trainable[name] is arrays[name] for name in arrays)


def test_layers_print_their_shapes_and_not_their_numbers():
    rng = np.random.default_rng(0)
    linear = Linear.init(5, 4, rng=rng)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=0.5, rng=rng)
    assert repr(linear) == "Linear(weight=(4, 5), bias=(4,))"
    assert repr(layer.adapter) == "LoRA(lora_A=(2, 5), lora_B=(4, 2), alpha=0.5)"
    assert repr(layer) == f"LoRALinear(base={linear!r}, adapter={layer.adapter!r})"


@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_one_takes_every_shape_of_input(lead, rank):
    """Its products are outer products, in code of their own."""
    rng = np.random.default_rng(0)
    A, B, x = rng.standard_normal((rank, 4)), rng.standard_normal((3, rank)), rng.standard_normal((*lead, 4))
    layer = LoRA(A, B, alpha=0.7)
    y, cache = layer.forward(x)
    dx, _ = layer.backward(y, cache)
    s = 0.7 / rank
    np.testing.assert_allclose(y, s * (x @ A.T @ B.T), rtol=1e-14, strict=True)
    np.testing.assert_allclose(dx, s * (y @ B @ A), rtol=1e-13, atol=1e-14, strict=True)
    np.testing.assert_allclose(layer.delta(), s * (B @ A), rtol=1e-14, strict=True)


# --- the start ------------------------------------------------------------------------------------


@given(problem=problems())
def test_a_new_linear_layer_stays_within_its_bound(problem):
    layer = Linear.init(problem.in_features, problem.out_features, rng=np.random.default_rng(problem.seed))
    bound = 1 / np.sqrt(problem.in_features)
    assert layer.weight.shape == (problem.out_features, problem.in_features)
    assert layer.bias.shape == (problem.out_features,)
    assert layer.weight.dtype == layer.bias.dtype == np.float32
    assert max(abs(layer.weight).max(), abs(layer.bias).max()) <= np.float32(bound)


def test_a_new_start_fills_its_bounds_evenly():
    rng = np.random.default_rng(0)
    linear = Linear.init(400, 300, rng=rng, dtype="float64")
    lora = LoRA.init(400, 300, rank=200, alpha=1, rng=rng, dtype="float64")
    for values in (linear.weight, linear.bias, lora.lora_A):
        scaled = np.sort(values.ravel()) * np.sqrt(400)  # uniform in (-1, 1)
        even = np.linspace(-1, 1, values.size)
        assert np.abs(scaled - even).max() < 4 / np.sqrt(values.size)
        assert not np.array_equal(np.sort(values.ravel()), values.ravel())
        assert len(np.unique(values)) == values.size


def test_layers_drawn_one_after_another_differ_and_share_nothing():
    rng = np.random.default_rng(0)
    for make in (
        lambda: Linear.init(5, 4, rng=rng),
        lambda: LoRA.init(5, 4, rank=2, alpha=1, rng=rng),
        lambda: LoRALinear.from_linear(Linear.init(5, 4, rng=rng), rank=2, alpha=1, rng=rng),
    ):
        one, two = make().trainable(), make().trainable()
        assert not any(np.shares_memory(one[name], two[name]) for name in one)
        assert not any(np.array_equal(one[name], two[name]) for name in one if name != "lora_B")


@given(alpha=st.floats(1e-30, 1e30), rank=st.integers(1, 200))
def test_scaling_is_alpha_over_the_rank_whatever_they_are(alpha, rank):
    rng = np.random.default_rng(0)
    lora = LoRA.init(3, 2, rank=rank, alpha=alpha, rng=rng)
    layer = LoRALinear.from_linear(Linear.init(3, 2, rng=rng), rank=rank, alpha=alpha, rng=rng)
    assert (lora.rank, lora.scaling) == (layer.rank, layer.scaling) == (rank, alpha / rank)
    lora.alpha *= 2
    assert lora.scaling == 2 * alpha / rank


@given(problem=problems())
def test_a_new_adapter_has_random_A_and_zero_B(problem):
    rng = np.random.default_rng(problem.seed)
    lora = LoRA.init(problem.in_features, problem.out_features, rank=problem.rank, alpha=problem.alpha, rng=rng)
    assert lora.lora_A.shape == (problem.rank, problem.in_features)
    assert lora.lora_B.shape == (problem.out_features, problem.rank)
    assert lora.lora_A.dtype == lora.lora_B.dtype == np.float32
    assert 0 < abs(lora.lora_A).max() <= np.float32(1 / np.sqrt(problem.in_features))
    assert not lora.lora_B.any()
    assert (lora.rank, lora.alpha, lora.scaling) == (problem.rank, problem.alpha, problem.alpha / problem.rank)


def test_one_seed_gives_one_start_in_every_precision():
    for make in (
        lambda dtype: Linear.init(5, 4, rng=np.random.default_rng(3), dtype=dtype).trainable(),
        lambda dtype: LoRA.init(5, 4, rank=2, alpha=1, rng=np.random.default_rng(3), dtype=dtype).trainable(),
    ):
        single, double = make(np.float32), make("float64")
        for name, array in double.items():
            assert array.dtype == np.float64
            assert name == "lora_B" or (array != array.astype(np.float32)).all()  # it is drawn to the last digit
            np.testing.assert_array_equal(single[name], array.astype(np.float32))


def test_a_layer_without_bias_draws_the_same_weight():
    with_bias, without = (Linear.init(5, 4, bias=b, rng=np.random.default_rng(3)) for b in (True, False))
    assert without.bias is None
    assert list(without.trainable()) == ["weight"]
    np.testing.assert_array_equal(without.weight, with_bias.weight)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_adapter_takes_dtype_and_widths_from_its_base(dtype):
    linear = Linear.init(5, 4, rng=np.random.default_rng(0), dtype=dtype)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=8, rng=np.random.default_rng(1))
    assert layer.base is linear
    assert (layer.in_features, layer.out_features, layer.rank, layer.scaling) == (5, 4, 2, 4.0)
    assert layer.adapter.lora_A.dtype == layer.adapter.lora_B.dtype == dtype
    same = LoRA.init(5, 4, rank=2, alpha=8, rng=np.random.default_rng(1), dtype=dtype)
    np.testing.assert_array_equal(layer.adapter.lora_A, same.lora_A)


def test_alpha_of_a_numpy_type_does_not_promote():
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    factors = {name: p.astype(np.float32) for name, p in problem.factors.items()}
    lora = LoRA(**factors, alpha=np.float64(3))
    assert lora(problem.x.astype(np.float32)).dtype == np.float32
    assert lora.delta().dtype == np.float32


def test_no_complex_rows_give_no_rows():
    assert Linear(np.ones((2, 3)))(np.ones((0, 3), complex)).shape == (0, 2)
