"""The best step is kept beside the last one, in memory and in a checkpoint."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Adam, History, Linear
from minilora.files.checkpoint import Checkpoint, read
from minilora.language.finetuning.keepingbest import KeepingBest
from minilora.training import train

X = np.random.default_rng(1).standard_normal((8, 3))


def trained(path, epochs, losses, keeper=KeepingBest):
    """Train with losses that are given, and return the model, its parameters after each epoch, and the history."""
    rng, weights, measured = np.random.default_rng(0), [], iter(losses)
    model = Linear.init(3, 2, rng=rng, dtype="float64")

    class Gradients:
        def __call__(self, model, x, y, loss):
            return {"weight": model.weight * 0 + 1, "bias": model.bias * 0 + 1}

        def evaluate(self, *_):
            return next(measured)

    best = keeper(None if path is None else Checkpoint(path))
    history = train(
        model, X, X[:, :2], epochs=epochs, steps=1, batch_size=4, log_every=1, rng=rng, gradients=Gradients(),
        checkpoint=best, report=lambda state: weights.append(state.model.weight.copy()),
    )  # fmt: skip
    return model, weights, best, history


@pytest.mark.parametrize(
    ("losses", "step"), [([3.0, 1.0, 2.0], 2), ([3.0, 2.0, 1.0], 3), ([1.0, 1.0, 1.0], 1), ([1.0, 2.0, 3.0], 1)]
)
def test_the_step_of_the_least_loss_comes_back(losses, step):
    model, weights, best, history = trained(None, 3, losses)
    assert best.bring_back(model, history) == step
    np.testing.assert_array_equal(model.weight, weights[step - 1])


def test_a_training_that_goes_on_brings_back_a_step_from_before(tmp_path):
    _, weights, *_ = trained(tmp_path / "c", 2, [1.0, 5.0])
    model, _, best, history = trained(tmp_path / "c", 4, [4.0, 3.0])
    assert best.bring_back(model, history) == 1
    np.testing.assert_array_equal(model.weight, weights[0])
    assert history.losses == [1.0, 5.0, 4.0, 3.0]


def test_nothing_is_kept_beside_where_nobody_asks(tmp_path):
    trained(tmp_path / "c", 2, [1.0, 5.0], keeper=lambda checkpoint: checkpoint)
    assert not read(tmp_path / "c").arrays["best"]
    assert not any(name.startswith("best.") for name in load_file(tmp_path / "c"))


def test_what_is_noted_is_a_copy():
    model = Linear.init(3, 2, rng=np.random.default_rng(0), dtype="float64")
    optimizer, best = Adam(model.trainable()), KeepingBest(None)
    state = type("State", (), {"optimizer": optimizer, "history": History([1], [1.0]), "epoch": 1})()
    best.keep(state)
    before = model.weight.copy()
    model.weight += 1
    np.testing.assert_array_equal(best.best["weight"], before)
