"""Activations, beside the claims: what they refuse, the corner of ReLU, the far ends of SiLU."""

import numpy as np
import pytest

from minilora import ReLU, SiLU, Tanh


@pytest.mark.parametrize("cls", [ReLU, Tanh, SiLU])
def test_an_activation_takes_float_arrays_alone(cls):
    with pytest.raises(TypeError, match=r"^x must be an array, got list"):
        cls()([1.0])
    with pytest.raises(TypeError, match=r"^x has dtype int64, expected a floating-point dtype"):
        cls()(np.ones(2, int))


def test_the_slope_of_relu_at_zero_is_zero():
    layer = ReLU()
    y, cache = layer.forward(np.array([-1.0, -1e-9, 0.0, 1e-9, 0.5, 2.0]))
    assert y.tolist() == [0, 0, 0, 1e-9, 0.5, 2]
    assert layer.backward(np.ones(6), cache)[0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_silu_overflows_nowhere(dtype):
    """Warnings are errors here."""
    layer, x = SiLU(), np.array([-1e4, 0.0, 1e4], dtype)
    y, cache = layer.forward(x)
    assert y.tolist() == [0, 0, 1e4]
    assert layer.backward(np.ones_like(x), cache)[0].tolist() == [0, 0.5, 1]
