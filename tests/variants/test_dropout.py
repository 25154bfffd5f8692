"""Dropout before an adapter: a mask of its own for each layer and each row, in a step and nowhere else."""

import numpy as np
import pytest

from minilora import Linear, LoRA, LoRALinear, Sequential, adapt, adapters, train
from minilora.fast import accumulate
from minilora.language import next_token_loss
from minilora.layer import walk
from minilora.training import backpropagate
from minilora.variants.dropout import DroppingLoRALinear, check_dropped, of_sequences, with_dropout, with_rows_at

from ..support.language import adapted, tiny_llama, tiny_mixture

IDS = np.arange(24).reshape(4, 6) % 29


def dropping(model):
    return {path: layer for path, layer in walk(model) if isinstance(layer, DroppingLoRALinear)}


def drawn(share=0.3, rows=5):
    """A layer with masks for so many rows, and an input for it."""
    rng = np.random.default_rng(3)
    layer = LoRALinear.from_linear(tiny_llama().lm_head, rank=2, alpha=3, rng=rng)
    layer.adapter.lora_B[...] = rng.standard_normal(layer.adapter.lora_B.shape)
    x = rng.standard_normal((rows, layer.in_features))
    return DroppingLoRALinear(layer.base, layer.adapter, share, tuple(range(rows))), x


def test_the_share_dropped_is_p_and_the_mean_stays():
    layer, _ = drawn(share=0.25, rows=400)
    mask = layer.mask(np.zeros((400, layer.in_features)))
    assert abs(mask.mean() - 0.75) < 0.02
    assert abs(mask.mean(axis=0) - 0.75).max() < 0.1
    x = np.ones(mask.shape)
    assert abs((mask * x / 0.75).mean() - 1) < 0.03


def test_a_share_of_a_numpy_type_does_not_promote():
    base, adapter = Linear(np.ones((2, 3), "float32")), LoRA(np.ones((1, 3), "float32"), np.ones((2, 1), "float32"), 1)
    layer = DroppingLoRALinear(base, adapter, np.float64(0.5), (7,))
    assert layer(np.ones((4, 3), "float32")).dtype == np.float32


def test_no_two_layers_and_no_two_rows_have_one_mask():
    masks = {}
    for path, layer in dropping(with_dropout(adapted(), 0.5, [*range(9)])).items():  # as small as layers' numbers
        masks |= {(path, key): mask for key, mask in enumerate(layer.mask(np.zeros((9, 3, layer.in_features))))}
    bits = [mask.tobytes() for mask in masks.values()]
    assert len(masks) == 9 * 14
    assert len(set(bits)) == len(bits)


def test_the_rows_of_some_positions_are_of_named_layers_alone():
    rng = np.random.default_rng(0)
    model = Sequential(**{name: Linear(rng.standard_normal((4, 4))) for name in ("fc1", "fc10", "fc2")})
    masked = with_dropout(adapt(model, "all-linear", rank=2, alpha=1, rng=rng), 0.5, [1, 2])
    at = np.array([[True, False], [True, True]])
    places = {path: layer.at for path, layer in dropping(with_rows_at(masked, at, ["fc1"])).items()}
    assert places == {"fc1": ((True, False), (True, True)), "fc10": None, "fc2": None}


def test_a_model_with_masks_shares_all_with_the_model():
    model = adapted()
    check_dropped(adapters(model))
    np.testing.assert_array_equal(with_dropout(model, 0.0, [1, 2, 3, 4])(IDS), model(IDS))
    masked = with_dropout(model, 0.3, [1, 2, 3, 4])
    assert dropping(masked).keys() == adapters(model).keys()
    assert not dropping(model)
    assert masked.trainable().keys() == model.trainable().keys()
    assert all(masked.trainable()[name] is p for name, p in model.trainable().items())


@pytest.mark.parametrize(("rows", "workers"), [(1, 1), (1, 3), (2, 2), (3, 2), (4, 1)])
def test_parts_of_a_batch_have_the_masks_of_the_whole(rows, workers):
    model, targets = adapted(), (IDS + 1) % 29
    masked = with_dropout(model, 0.3, [11, 12, 13, 14])
    assert {layer.keys for layer in dropping(of_sequences(masked, slice(1, 3))).values()} == {(12, 13)}
    whole = backpropagate(masked, IDS, targets, next_token_loss)
    parts = accumulate(rows, workers)(masked, IDS, targets, next_token_loss)
    for name, grad in whole.items():
        np.testing.assert_allclose(parts[name], grad, rtol=1e-10, atol=1e-12)
    without = backpropagate(model, IDS, targets, next_token_loss)
    assert not np.allclose(without[name], grad)


def test_each_step_draws_new_masks_and_evaluation_none(monkeypatch):
    model, targets, seen = adapted(), (IDS + 1) % 29, []
    right = DroppingLoRALinear.forward
    monkeypatch.setattr(DroppingLoRALinear, "forward", lambda self, x: seen.append(self.keys) or right(self, x))
    rng = np.random.default_rng(0)

    def gradients(model, x, y, loss):
        keys = rng.integers(1 << 64, size=len(x), dtype=np.uint64).tolist()
        return backpropagate(with_dropout(model, 0.3, keys), x, y, loss)

    options = {"epochs": 3, "steps": 1, "batch_size": 2, "log_every": 1, "rng": rng, "loss": next_token_loss}
    train(model, IDS, targets, gradients=gradients, **options)
    assert len(seen) == 3 * 14
    assert len(set(seen)) == 3


def of_a_router():
    """A mixture whose router has an adapter."""
    rng = np.random.default_rng(0)
    return adapt(tiny_mixture(), [], rank=2, alpha=4, rng=rng, target_parameters=["mlp.gate.weight"])


BEFORE = "dropout is not before the adapter 'model.layers.0."
REFUSED = {
    "dropout must be at least 0 and below 1, got 1.0": lambda: drawn(1.0),
    "dropout must be at least 0 and below 1, got -0.1": lambda: drawn(-0.1),
    "cannot reshape array of size 36 into shape (4,12)": lambda: drawn(rows=3)[0].forward(np.ones((4, 12))),
    f"{BEFORE}self_attn.q_proj', which is a DoRA's: expected 0": lambda: check_dropped(
        adapters(adapted(use_dora=True))
    ),
    f"{BEFORE}mlp.gate.weight', which is of a mixture's array: expected 0": lambda: check_dropped(
        adapters(of_a_router())
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_dropout_is_refused(message):
    with pytest.raises(ValueError) as refused:
        REFUSED[message]()
    assert str(refused.value) == message
