"""Training on windows of a text: gradients in parts, steps, held-out loss and checkpoints."""

import re
import sys

import numpy as np
import pytest

from minilora import (
    Adam,
    CheckpointError,
    Linear,
    TrainingDiverged,
    adapt,
    cross_entropy,
    evaluate,
    mse,
    train,
)
from minilora.fast import accumulate
from minilora.language import next_token_loss
from minilora.language.text import windows
from minilora.training import backpropagate

from ..support.compare import assert_close, refused
from ..support.language import LETTERS, TEXT, ids_of, tiny_llama
from ..support.streams import Terminal

IDS = ids_of(TEXT)


def test_gradients_in_parts_ask_for_no_dx(monkeypatch):
    rng, asked, right = np.random.default_rng(0), [], Linear.backward

    def backward(self, dy, cache, *, need_dx=True):
        asked.append((len(dy), need_dx))
        return right(self, dy, cache, need_dx=need_dx)

    monkeypatch.setattr(Linear, "backward", backward)
    accumulate(3)(Linear(rng.random((2, 4))), rng.random((8, 4)), rng.random((8, 2)), mse)
    assert asked == [(3, False), (3, False), (2, False)]
    for rows, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="rows must be"):
            accumulate(rows)


@pytest.mark.parametrize("height", [13, 10**9])
def test_evaluation_in_blocks_is_the_loss_of_all_targets(monkeypatch, height):
    X, Y, _, _ = windows(IDS[:500], 11)
    Y = Y.copy()
    Y[:7] = Y[9, 3] = -100  # blocks without a target, and with fewer
    monkeypatch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", height)
    model = tiny_llama()
    assert_close(np.array(evaluate(model, X, Y, next_token_loss)), cross_entropy(model(X), Y)[0], 1e-13)


def start(dtype="float64"):
    """Return a model with adapters and the data, the same ones in each call."""
    model = adapt(tiny_llama(dtype=dtype), ["q_proj", "up_proj"], rank=2, alpha=4, rng=np.random.default_rng(3))
    X, Y, *held_out = windows(IDS, 8)
    return model, X, Y, tuple(held_out)


def fit(steps_of_all, *, checkpoint=None, rng=None, **options):
    model, X, Y, held_out = start()
    settings = {"steps": 1, "batch_size": 6, "lr": 0.02, "log_every": 3, "held_out": held_out}
    rng = np.random.default_rng(1) if rng is None else rng
    settings |= {"loss": cross_entropy, "rng": rng, "checkpoint": checkpoint, **options}
    return model, train(model, X, Y, epochs=steps_of_all, **settings)


def test_training_by_steps_is_the_loop_written_out():
    model, history = fit(7)
    plain, X, Y, held_out = start()
    rng, optimizer, losses = np.random.default_rng(1), Adam(plain.trainable(), lr=0.02), []
    for step in range(1, 8):
        rows = rng.choice(len(X), 6, replace=False, shuffle=False)
        optimizer.step(backpropagate(plain, X[rows], Y[rows], cross_entropy))
        if step in (3, 6, 7):
            losses.append(cross_entropy(plain(held_out[0]), held_out[1])[0])
    assert history.epochs == [3, 6, 7]
    assert_close(np.array(history.losses), np.array(losses), 1e-13)
    one, other = fit(6)[0], fit(2, steps=3, log_every=1)[0]
    for found, expected in ((model, plain), (one, other)):  # an epoch of more steps draws the same batches
        for name, p in found.trainable().items():
            np.testing.assert_array_equal(p, expected.trainable()[name])


def test_an_id_out_of_range_is_refused_before_training():
    V, rng = len(LETTERS), np.random.default_rng(1)
    for wrong, name, held_out in (
        *((-1, "x", False), (V, "x", True), (-1, "targets", False), (-101, "targets", False), (V, "targets", True)),
    ):
        model, *data, held = start()
        before = {name: p.copy() for name, p in model.trainable().items()}
        pair = [d.copy() for d in (held if held_out else data)]
        pair[1][0, 0] = -100  # a target that does not count is no id
        pair[name == "targets"][-1, 3] = wrong
        place = f"{'held_out: ' if held_out else ''}row {len(pair[0]) - 1} of X and Y: {name} holds {wrong} at (0, 3)"
        X, Y, held = (*data, tuple(pair)) if held_out else (*pair, held)
        with pytest.raises(ValueError, match=f"^{re.escape(place)}, expected 0 to"):
            train(model, X, Y, rng=rng, batch_size=6, loss=cross_entropy, held_out=held)
        for path, p in model.trainable().items():
            np.testing.assert_array_equal(p, before[path])


def test_a_checkpoint_with_other_steps_or_data_is_refused(tmp_path):
    fit(1, checkpoint=tmp_path / "c")
    before, (X, Y) = (tmp_path / "c").read_bytes(), start()[3]
    for change, named in (
        ({"steps": 2}, "steps is 1 there and 2 here"),
        ({"held_out": None}, "held_out is .* there and None here"),
        *(({"held_out": other}, "held_out") for other in ((X[:1], Y[:1]), (X, X), (Y, Y))),
    ):
        with pytest.raises(CheckpointError, match=named):
            fit(1, checkpoint=tmp_path / "c", **change)
    assert (tmp_path / "c").read_bytes() == before


X_HELD, Y_HELD = start()[3]


def test_bad_steps_and_held_out_data_are_refused_first():
    for change, error, message in (
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, got 1.0"),
        ({"held_out": (X_HELD,)}, TypeError, "held_out must be two arrays, inputs and targets, got tuple"),
        ({"held_out": (X_HELD, Y_HELD[:1])}, ValueError, "held_out: Y has shape (1, 8), expected 26 rows as X has"),
        ({"held_out": (X_HELD + 99, Y_HELD)}, ValueError, "held_out: x holds 112 at (0, 0), expected 0 to 28"),
        ({"held_out": (X_HELD, Y_HELD * 0 - 100)}, ValueError,
         "held_out: Y has no target that counts: all of them are -100"),
        ({"held_out": (X_HELD, Y_HELD.astype(float))}, TypeError,
         "held_out: row 0 of X and Y: targets has dtype float64, expected integers"),
    ):  # fmt: skip
        model, X, Y, _ = start()
        rng, before = np.random.default_rng(0), {name: p.copy() for name, p in model.trainable().items()}
        with refused(message, error):
            train(model, X, Y, epochs=1, batch_size=4, rng=rng, **{"loss": cross_entropy, **change})
        assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
        for name, p in model.trainable().items():
            np.testing.assert_array_equal(p, before[name])


def test_held_out_data_that_is_not_finite_is_named():
    rng = np.random.default_rng(0)
    model, x, y = Linear.init(3, 2, rng=rng, dtype="float64"), rng.random((9, 3)), rng.random((9, 2))
    with pytest.raises(ValueError, match=r"^held_out: Y holds NaN or infinity: entry \(1, 0\) is nan"):
        train(model, x, y, batch_size=3, rng=rng, held_out=(x[:2], np.array([[0.0, 1.0], [np.nan, 1.0]])))
    with pytest.raises(TrainingDiverged, match=r"held_out .*after epoch 1"):
        train(model, x, y, epochs=1, log_every=1, batch_size=3, rng=rng, held_out=(x[:2], np.full((2, 2), 1e300)))


def test_progress_counts_tokens(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    fit(4, progress=True, log_every=1)
    assert "192/192" in sys.stderr.getvalue()  # 4 steps of 6 windows of 8
    assert "token/s" in sys.stderr.getvalue()
    assert "loss=" in sys.stderr.getvalue()
