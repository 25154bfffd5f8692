"""Training takes the way of `forward`, `backward` and `adam_update`; a shorter way is asked for by name."""

from pathlib import Path

import numpy as np
import pytest

from minilora import Linear, LoRA, LoRALinear, article, cross_entropy, evaluate, mse, train
from minilora.fast import accumulate, residual_form
from minilora.training import backpropagate

from ..support.compare import assert_close

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(11)
X, Y = RNG.standard_normal((40, 5)), RNG.standard_normal((40, 4))


def adapter():
    rng = np.random.default_rng(0)
    return LoRA(rng.standard_normal((2, 5)), rng.standard_normal((4, 2)), 1.0)


def counting(monkeypatch, cls, method):
    calls = []
    right = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *a, **k: calls.append(type(self).__name__) or right(self, *a, **k))
    return calls


def test_the_article_asks_for_the_shorter_way_by_name(monkeypatch):
    full, backwards = counting(monkeypatch, Linear, "backward"), counting(monkeypatch, LoRALinear, "backward")
    size, short = {"n": 64, "in_features": 6, "out_features": 5, "batch_size": 8, "epochs": 3}, []
    monkeypatch.setattr(article, "residual_form", lambda *a: short.append(type(a[0])) or residual_form(*a))
    article.run(**size)
    assert (len(full), backwards, short) == (3 * 8, [], 3 * 8 * [LoRALinear])
    monkeypatch.setattr(article, "residual_form", None)  # the plain line
    article.run(**size)
    assert (len(full), len(backwards), len(short)) == (2 * 3 * 8, 3 * 8, 3 * 8)


def test_the_given_gradients_are_what_a_step_takes(monkeypatch):
    backwards, seen = counting(monkeypatch, LoRA, "backward"), []

    def gradients(model, x, y, loss):
        seen.append((x.copy(), y.copy(), loss))
        return residual_form(model, x, y, loss)

    model = adapter()
    train(model, X, Y, epochs=2, batch_size=8, rng=RNG, gradients=gradients)
    assert not backwards
    assert len(seen) == 2 * 5
    assert all(x.shape == (8, 5) and y.shape == (8, 4) and loss is mse for x, y, loss in seen)


def test_gradients_of_none_are_those_of_the_page():
    ends = []
    for ways in ({}, {"gradients": None}, {"gradients": backpropagate}):
        model = adapter()
        train(model, X, Y, epochs=2, batch_size=8, rng=np.random.default_rng(0), **ways)
        ends.append([p.tobytes() for p in model.trainable().values()])
    assert ends[0] == ends[1] == ends[2]


# --- no training minimises another loss than it reports -------------------------------------------


def fourth_powers(p, t):
    return ((p - t) ** 4).mean(), 4 / p.size * (p - t) ** 3


LOSSES = {"mse": mse, "fourth powers": fourth_powers, "cross-entropy": cross_entropy}


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_in_parts_are_those_of_the_reported_loss(loss, rows):
    target = RNG.integers(0, 4, 40) if loss == "cross-entropy" else Y
    histories = []
    for ways in ({}, {"gradients": accumulate(rows)}):
        options = {"epochs": 4, "batch_size": 20, "lr": 0.02, "log_every": 2, "loss": LOSSES[loss], **ways}
        histories.append(train(adapter(), X, target, rng=np.random.default_rng(0), **options))
    assert_close(np.array(histories[1].losses), np.array(histories[0].losses), 1e-12)
    assert histories[0].losses[-1] < histories[0].losses[0]


class Halved:
    """Gradients that measure the loss in a way of their own."""

    def __call__(self, model, x, y, loss):
        return backpropagate(model, x, y, loss)

    def evaluate(self, model, X, Y, loss):
        return evaluate(model, X, Y, loss) / 2


def test_gradients_with_an_evaluate_measure_the_loss():
    rng, ids = np.random.default_rng(4), np.random.default_rng(5).integers(0, 4, (40, 3))
    X, options = rng.standard_normal((40, 3, 5)), {"epochs": 3, "batch_size": 20, "loss": cross_entropy, "log_every": 1}
    whole = train(adapter(), X, ids, rng=np.random.default_rng(0), **options)
    halved = train(adapter(), X, ids, rng=np.random.default_rng(0), gradients=Halved(), **options)
    assert halved.losses == [loss / 2 for loss in whole.losses]


@pytest.mark.parametrize("loss", [fourth_powers, lambda p, t: mse(p, t)])
def test_the_residual_form_refuses_every_loss_but_mse(loss):
    model = adapter()
    before = {name: p.copy() for name, p in model.trainable().items()}
    with pytest.raises(ValueError, match=r"residual_form has the gradients of minilora.mse alone, got the loss <func"):
        train(model, X, Y, epochs=1, batch_size=8, rng=RNG, loss=loss, gradients=residual_form)
    with pytest.raises(ValueError, match="got the loss <function"):
        residual_form(model, X, Y, loss)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])
    assert residual_form(model, X, Y).keys() == residual_form(model, X, Y, loss=mse).keys() == {"lora_A", "lora_B"}
