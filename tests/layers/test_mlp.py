"""The MLP by its widths: its start and its activation."""

import numpy as np
import pytest

from minilora import MLP, Linear, ReLU, Tanh


@pytest.mark.parametrize(("activation", "cls"), [("relu", ReLU), ("tanh", Tanh)])
def test_an_mlp_starts_as_its_layers_do(activation, cls):
    model = MLP.init(2, 30, 4, activation=activation, rng=np.random.default_rng(1), dtype="float64")
    assert type(model.act) is cls
    rng = np.random.default_rng(1)
    for layer, widths in ((model.fc1, (2, 30)), (model.fc2, (30, 4))):
        same = Linear.init(*widths, rng=rng, dtype="float64")
        np.testing.assert_array_equal(layer.weight, same.weight)
        np.testing.assert_array_equal(layer.bias, same.bias)


def test_an_mlp_is_single_precision_with_relu_unless_told(standin):
    model = MLP.init(2, 3, 4, rng=np.random.default_rng(0))
    assert type(model.act) is ReLU
    assert {p.dtype.name for p in model.trainable().values()} == {"float32"}
    there = MLP.init(2, 3, 4, rng=np.random.default_rng(0), dtype="float64", backend=standin)
    for p in there.trainable().values():
        assert isinstance(p, standin.xp.ndarray)
        assert str(p.dtype) == "float64"
