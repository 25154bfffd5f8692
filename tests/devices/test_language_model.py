"""A language model and its fine-tuning, wherever the arrays live."""

import numpy as np
import pytest

from minilora import adapt, evaluate, train
from minilora.fast import accumulate
from minilora.language import next_token_loss
from minilora.language.generation import generate
from minilora.language.llama import recomputed
from minilora.language.text import windows
from minilora.layer import rebuild

from ..support.cupy_standin import traffic
from ..support.language import LETTERS, TEXT, tiny_llama

TARGETS = ["q_proj", "down_proj"]


def fine_tune(put, *, rows=4, epochs=4, steps=8, model_of=lambda adapted: adapted):
    """Return the adapted model after some steps, and the losses: of the same start and batches everywhere."""
    model = rebuild(tiny_llama(dtype="float32"), array=put)
    adapted = adapt(model, TARGETS, rank=2, alpha=4, rng=np.random.default_rng(1))
    X, Y, X_held, Y_held = (put(array) for array in windows([LETTERS.index(c) for c in TEXT], 8))
    traffic.reset()
    gradients = accumulate(rows)
    history = train(
        model_of(adapted), X, Y, epochs=epochs, steps=steps, batch_size=4, lr=1e-2, rng=np.random.default_rng(2),
        log_every=1, loss=next_token_loss, gradients=gradients, held_out=(X_held, Y_held),
    )  # fmt: skip
    return adapted, history.losses


@pytest.fixture(scope="module")
def on_numpy():
    return fine_tune(np.copy)


@pytest.mark.parametrize("model_of", [lambda adapted: adapted, recomputed], ids=["kept", "recomputed"])
def test_fine_tuning_gives_the_losses_of_numpy(place, on_numpy, model_of):
    adapted, losses = fine_tune(place.put_parameter, model_of=model_of)
    expected, expected_losses = on_numpy
    np.testing.assert_allclose(losses, expected_losses, rtol=0 if place.exact and place.exact_adam else 1e-4)
    assert losses[-1] < losses[0]
    for name, p in expected.trainable().items():
        place.assert_same(adapted.trainable()[name], p, adam=True)


@pytest.mark.long
@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (3, 5)])
def test_fine_tuning_waits_as_often_whatever_the_steps(standin, rows, epochs, steps):
    """At the start for the range of ids and for the loss, and again after the first epoch; once an epoch."""
    fine_tune(standin.asarray)  # the cosines and sines of all positions go over once
    _, losses = fine_tune(standin.asarray, rows=rows, epochs=epochs, steps=steps)
    assert traffic.waits == 2 + 3 + 3 + epochs + 2 * len(losses)
    assert (traffic.to_device, traffic.to_host) == (epochs, 2 + len(losses))


@pytest.mark.parametrize(("name", "wrong"), [("X", -1), ("X", 29), ("Y", -1), ("Y", 29), ("Y", -99)])
def test_an_id_that_a_gpu_would_replace_is_refused(standin, name, wrong):
    model = rebuild(tiny_llama(dtype="float32"), array=standin.asarray)
    adapted = adapt(model, TARGETS, rank=2, alpha=4, rng=np.random.default_rng(1))
    X, Y, *held = windows([LETTERS.index(c) for c in TEXT], 8)
    data = {"X": X.copy(), "Y": Y.copy()}
    data["Y"][0, 0] = -100  # which does not count
    data[name][-1, 3] = wrong
    X, Y = (standin.asarray(array) for array in data.values())
    given = {"batch_size": 4, "loss": next_token_loss, "rng": np.random.default_rng(2), "steps": 1, "epochs": 1}
    with pytest.raises(ValueError, match=rf"^{name} holds {wrong}, expected 0 to 28$"):
        train(adapted, X, Y, **given)
    with pytest.raises(ValueError, match=rf"^held_out: {name} holds {wrong}, expected 0 to 28$"):
        train(adapted, *map(standin.asarray, held[:2]), held_out=(X, Y), **given)
    Y[...] = -100
    with pytest.raises(ValueError, match=r"^Y has no target that counts: all of them are -100$"):
        evaluate(adapted, *map(standin.asarray, held[:1]), Y[: len(held[0])], next_token_loss)


def test_threads_are_refused_where_a_gpu_computes(standin):
    model = rebuild(tiny_llama(dtype="float32"), array=standin.asarray)
    adapted = adapt(model, TARGETS, rank=2, alpha=4, rng=np.random.default_rng(1))
    before = {name: standin.to_numpy(p).tobytes() for name, p in adapted.trainable().items()}
    X, Y, *_ = (standin.asarray(array) for array in windows([LETTERS.index(c) for c in TEXT], 8))
    ways = {"batch_size": 4, "loss": next_token_loss, "gradients": accumulate(2, workers=2)}
    with pytest.raises(ValueError, match="workers = 2 is for NumPy, expected 1 where x is a cupy"):
        train(adapted, X, Y, epochs=1, steps=1, rng=np.random.default_rng(2), **ways)
    with pytest.raises(ValueError, match="workers = 2 is for NumPy"):
        evaluate(adapted, X, Y, next_token_loss, 2)
    assert {name: standin.to_numpy(p).tobytes() for name, p in adapted.trainable().items()} == before


def test_generation_fetches_one_row_of_scores_a_token(standin):
    """The token goes back, and the cosines and sines of its position."""
    model = rebuild(tiny_llama(dtype="float32"), array=standin.asarray)
    expected = list(generate(tiny_llama(dtype="float32"), [3, 1, 4], 6))
    traffic.reset()
    assert list(generate(model, [3, 1, 4], 6)) == expected
    assert (traffic.to_device, traffic.to_host) == (3 * 6, 6)
