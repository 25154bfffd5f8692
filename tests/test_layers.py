"""What every layer must do, for all three of them."""

import numpy as np
import pytest
from hypothesis import example, given

from minilora import Linear, LoRA, LoRALinear

from .layers import CASES
from .problems import ALL_ONES, ONE_ROW, RANK_ABOVE_WIDTHS, SQUARE, Problem, problems
from .properties import LAYER_PROPERTIES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("claim", LAYER_PROPERTIES, ids=lambda claim: claim.__name__)
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=ONE_ROW)
@example(problem=RANK_ABOVE_WIDTHS)
@example(problem=SQUARE)
def test_layer(case, claim, problem):
    claim(case, problem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_knows_its_widths(case):
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    layer = case.build(problem, case.params(problem))
    assert (layer.in_features, layer.out_features) == (5, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trainable_arrays_are_the_layers_own(case):
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    arrays = case.arrays(problem)
    trainable = case.build(problem, arrays).trainable()
    assert trainable.keys() == arrays.keys()
    assert all(trainable[name] is arrays[name] for name in arrays)


def test_layers_print_their_widths_and_not_their_numbers():
    rng = np.random.default_rng(0)
    linear = Linear.init(5, 4, rng=rng)
    layer = LoRALinear.from_linear(linear, rank=2, alpha=0.5, rng=rng)
    assert repr(linear) == "Linear(in_features=5, out_features=4, bias=True)"
    assert repr(layer.adapter) == "LoRA(in_features=5, out_features=4, rank=2, alpha=0.5)"
    assert repr(layer) == f"LoRALinear({linear!r}, {layer.adapter!r})"


# --- the start ------------------------------------------------------------------------------------


@given(problem=problems())
def test_a_new_linear_layer_is_uniform_within_one_over_the_root_of_its_inputs(problem):
    layer = Linear.init(problem.in_features, problem.out_features, rng=np.random.default_rng(problem.seed))
    bound = 1 / np.sqrt(problem.in_features)
    assert layer.weight.shape == (problem.out_features, problem.in_features)
    assert layer.bias.shape == (problem.out_features,)
    assert layer.weight.dtype == layer.bias.dtype == np.float32
    assert max(abs(layer.weight).max(), abs(layer.bias).max()) <= np.float32(bound)


def test_a_layer_may_be_as_narrow_as_one_by_one():
    rng = np.random.default_rng(0)
    assert Linear.init(1, 1, rng=rng).weight.shape == (1, 1)
    assert LoRA.init(1, 1, rank=1, alpha=1, rng=rng).delta().shape == (1, 1)


def test_a_new_start_fills_its_bounds_evenly():
    rng = np.random.default_rng(0)
    linear = Linear.init(400, 300, rng=rng, dtype="float64")
    lora = LoRA.init(400, 300, rank=200, alpha=1, rng=rng, dtype="float64")
    for values in (linear.weight, linear.bias, lora.lora_A):
        scaled = np.sort(values.ravel()) * np.sqrt(400)  # uniform in (-1, 1)
        even = np.linspace(-1, 1, values.size)
        assert np.abs(scaled - even).max() < 4 / np.sqrt(values.size)
        assert not np.array_equal(np.sort(values.ravel()), values.ravel())


@given(problem=problems())
def test_a_new_adapter_has_a_random_A_and_a_zero_B(problem):
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
