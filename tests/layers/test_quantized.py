"""The frozen layer that keeps codes, beside the claims."""

import numpy as np
import pytest

from minilora import (
    Linear,
    QuantizedLinear,
    Sequential,
    loftq,
    quantize,
    quantize_nf4,
)
from minilora.language.memory import parameter_bytes
from minilora.layer import freeze, parameter_count
from minilora.layers.nf4 import code_book

from ..support.cases import weight_by_loops


def gaussian(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


LINEAR_7_40 = Linear(gaussian(7, 40), gaussian(7, seed=1))
PACKED, ABSMAX = quantize_nf4(LINEAR_7_40.weight)


def test_usual_settings_are_qloras():
    assert code_book(4)[0] == -1
    assert len(code_book(4)) == 4
    plain = QuantizedLinear(PACKED, ABSMAX, (7, 40))
    assert (plain.mean, plain.block_size, plain.nested_absmax) == (0.0, 64, None)
    for layer in (
        QuantizedLinear.from_linear(LINEAR_7_40),
        quantize(LINEAR_7_40),
        loftq(LINEAR_7_40, rank=1, alpha=1)[0],
    ):
        assert layer.nested_absmax is not None
        assert layer.block_size == 64


def test_numbers_are_counted_and_not_bytes():
    two = Sequential(a=LINEAR_7_40, b=Linear(gaussian(5, 7), gaussian(5)))
    assert parameter_count(quantize(two)) == parameter_count(two) == 7 * 40 + 7 + 5 * 7 + 5
    assert parameter_bytes(two) == 4 * parameter_count(two)


def test_another_bias_leaves_the_layer_as_it_was():
    layer = QuantizedLinear.from_linear(Linear(LINEAR_7_40.weight))
    other = layer.with_bias(LINEAR_7_40.bias)
    assert layer.bias is None
    assert other.bias is LINEAR_7_40.bias
    assert other.packed is layer.packed
    x = gaussian(3, 40)
    np.testing.assert_array_equal(other(x), layer(x) + LINEAR_7_40.bias)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
        layer.with_bias(gaussian(6))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_keeps_bytes_and_gives_the_same_weight(double_quant):
    linear = Linear(gaussian(33, 50), gaussian(33))
    layer = QuantizedLinear.from_linear(linear, block_size=128, double_quant=double_quant)
    np.testing.assert_array_equal(layer.weight, weight_by_loops(layer))
    assert (layer.in_features, layer.out_features, layer.shape) == (50, 33, (33, 50))
    assert layer.bias is linear.bias
    whole = layer.dequantize()
    assert type(whole) is Linear
    np.testing.assert_array_equal(whole.weight, layer.weight)
    assert not np.shares_memory(whole.bias, linear.bias)
    assert list(whole.trainable()) == ["weight", "bias"]


def test_a_layer_of_float64_computes_in_float64():
    linear = Linear(gaussian(4, 40, dtype="float64"))
    layer = QuantizedLinear.from_linear(linear)
    x = gaussian(3, 40, seed=1, dtype="float64")
    y, cache = layer.forward(x)
    dx, grads = layer.backward(y, cache)
    W = layer.weight.astype("float64")
    assert (layer.weight.dtype, y.dtype, dx.dtype, grads) == ("float64", "float64", "float64", {})
    np.testing.assert_allclose(y, x @ W.T, rtol=1e-13)
    np.testing.assert_allclose(dx, y @ W, rtol=1e-12)
    with pytest.raises(TypeError, match="float32, expected float64"):
        layer(x.astype("float32"))


def test_a_quantised_layer_cannot_be_thawed():
    layer = QuantizedLinear.from_linear(Linear(gaussian(4, 40)))
    said = r"^a QuantizedLinear cannot train: put an adapter beside it, or dequantize\(\) it$"
    with pytest.raises(ValueError, match=said):
        layer.frozen = False
    assert layer.frozen
    assert layer.trainable() == {}
    assert freeze(layer).trainable() == {}
