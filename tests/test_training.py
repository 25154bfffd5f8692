"""`train` is a loop: draw rows, forward, loss, backward, Adam. What it logs, shows and refuses."""

import io
import pickle
import re
import sys
from functools import partial
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from minilora import (
    Adam,
    Embedding,
    Linear,
    LoRA,
    Sequential,
    Tanh,
    TrainingDiverged,
    adapt,
    cross_entropy,
    evaluate,
    mse,
    train,
)
from minilora.files import checkpoint
from minilora.layer import Layer, nest
from minilora.schedule import Schedule
from minilora.training import Passes, backpropagate, draw_batches, settings_of
from minilora.watching import progress_bar

from .support.cases import PRODUCTS as CASES
from .support.compare import assert_close
from .support.memory import traced
from .support.problems import Problem
from .support.streams import Terminal

DATA = Problem(n=50, in_features=5, out_features=4, rank=3)
LINEAR, LORA, LORA_LINEAR = CASES[:3]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def make(case, problem: Problem = DATA, dtype="float64"):
    return case.build(problem, {name: p.astype(dtype) for name, p in case.arrays(problem).items()})


def fit(model, X=DATA.x, Y=DATA.target, seed=0, **options):
    """Train an epoch in batches of 8, or as the options say."""
    given = {"epochs": 1, "batch_size": 8, "rng": np.random.default_rng(seed)} | options
    return train(model, X, Y, **given)


# --- the loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_adam", "steps"), [({"lr": 0.02}, None), ({"lr": 0.02, "weight_decay": 0.5, "max_grad_norm": 0.1}, 9)]
)
@each_case
def test_training_is_the_loop_written_out(case, of_adam, steps):
    """The whole of `train`, with nothing clever in it."""
    model, plain = make(case), make(case)
    history = fit(model, epochs=4, seed=1, log_every=2, steps=steps, **of_adam)

    rng, optimizer, losses = np.random.default_rng(1), Adam(plain.trainable(), **of_adam), []
    for epoch in range(1, 5):
        for _ in range(steps or 50 // 8):
            rows = rng.choice(50, 8, replace=False, shuffle=False)
            prediction, cache = plain.forward(DATA.x[rows])
            _, d_prediction = mse(prediction, DATA.target[rows])
            _, grads = plain.backward(d_prediction, cache)
            optimizer.step(grads)
        if epoch % 2 == 0:
            losses.append(mse(plain(DATA.x), DATA.target)[0])

    assert history.epochs == [2, 4]
    assert_close(np.array(history.losses), np.array(losses), 1e-12)
    for name, p in model.trainable().items():
        assert_close(p, plain.trainable()[name], 1e-11)


@each_case
def test_training_lowers_the_loss_and_leaves_the_data_alone(case):
    model, x, target = make(case), DATA.x, DATA.target
    before = evaluate(model, x, target)
    x.flags.writeable = target.flags.writeable = False
    assert fit(model, x, target, epochs=30, batch_size=10, lr=0.02).losses[-1] < 0.6 * before


def test_training_leaves_numpys_error_state_alone():
    with np.errstate(over="warn", invalid="raise"):
        before = np.geterr()
        fit(make(LINEAR))
        assert np.geterr() == before


def test_each_batch_is_drawn_without_replacement():
    batches = draw_batches(np.random.default_rng(0), 50, 8)
    assert batches.shape == (6, 8)
    assert all(len(set(batch)) == 8 for batch in batches.tolist())
    assert 0 <= batches.min() <= batches.max() < 50
    assert len({tuple(sorted(batch)) for batch in batches.tolist()}) == 6


@pytest.mark.parametrize(("rows", "size"), [(100, 100), (128, 128), (300, 128), (1, 1)])
def test_a_batch_has_128_rows_or_all_of_fewer(rows, size):
    problem = Problem(n=rows, in_features=5, out_features=3, rank=2)
    one, other = make(LINEAR, problem), make(LINEAR, problem)
    fit(one, problem.x, problem.target, epochs=3, batch_size=None)
    fit(other, problem.x, problem.target, epochs=3, batch_size=size)
    np.testing.assert_array_equal(one.weight, other.weight)


def test_one_seed_gives_one_training():
    first, same, other = (fit(make(LORA), epochs=2, seed=seed, log_every=1) for seed in (5, 5, 6))
    assert first == same != other


@pytest.mark.parametrize("axes", [(2,), (2, 1), (1, 2, 1)])
def test_rows_may_be_sequences(axes):
    model, x, y = make(LORA), DATA.randn("x3", 12, *axes, 5), DATA.randn("y3", 12, *axes, 4)
    history = fit(model, x, y, epochs=2, batch_size=4)
    flat = evaluate(model, x.reshape(24, -1), y.reshape(24, -1))
    assert_close(np.array(history.losses), np.array([flat]), 1e-14)


@pytest.mark.parametrize(
    ("case", "unneeded"), [(LORA_LINEAR, ["backward", "input_gradient"]), (LINEAR, ["input_gradient"])]
)
def test_training_computes_no_frozen_gradient_and_no_needless_dx(monkeypatch, case, unneeded):
    for name in unneeded:
        monkeypatch.setattr(Linear, name, lambda *a, name=name, **k: pytest.fail(f"Linear.{name} was called"))
    fit(make(case))


def test_training_on_the_residual_never_touches_the_large_weight():
    layer = make(LORA_LINEAR)
    residual = DATA.target - layer.base(DATA.x)
    layer.base.weight[...] = np.nan  # whatever touches it from here on will show
    assert np.isfinite(fit(layer.adapter, Y=residual, epochs=2).losses[0])


@pytest.mark.parametrize("steps", [1, 4])
def test_a_training_keeps_no_copy_of_its_arrays(steps):
    """Beside the parameters: their gradient and Adam's two means. A copy more of any of them would show."""
    rng = np.random.default_rng(0)
    model = Linear.init(1400, 1200, bias=False, rng=rng)
    X, Y = (rng.standard_normal((16, width)).astype(np.float32) for width in (1400, 1200))
    with traced() as memory:
        fit(model, X, Y, epochs=3, steps=steps, log_every=1)
    assert 3 < memory.peak / model.weight.nbytes < 3.7


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "log_every", "logged"), [(1, 10, [1]), (20, 10, [10, 20]), (7, 3, [3, 6, 7]), (3, 1, [1, 2, 3])]
)
def test_the_loss_is_logged_sometimes_and_at_the_end(epochs, log_every, logged):
    """Of what is held out, where something is."""
    for held_out in (None, (DATA.x[:7], DATA.target[:7])):
        history = fit(model := make(LINEAR), epochs=epochs, batch_size=50, log_every=log_every, held_out=held_out)
        assert history.epochs == logged
        assert history.losses[-1] == evaluate(model, *held_out or (DATA.x, DATA.target))
        assert all(type(loss) is float for loss in history.losses)


@pytest.mark.parametrize(
    ("x_shape", "ids", "heights"),
    [
        ((1200, 5), False, [512, 512, 176]),
        ((1200, 7, 5), False, [512, 512, 176]),  # sequences of vectors go by rows as well
        ((12, 100), True, [5, 5, 2]),  # 500 ids, and not 600
        ((3, 600), True, [1, 1, 1]),
    ],
)
def test_evaluation_takes_so_many_targets_at_a_time(x_shape, ids, heights):
    seen = []

    class Passing:
        def trainable(self):
            return {}

        def __call__(self, x):
            seen.append(len(x))
            return x

    data = np.zeros(x_shape, int) if ids else np.zeros(x_shape)
    evaluate(Passing(), data, data, lambda p, t: (0.0, p))
    assert seen == [1, *heights]  # the first row is tried first


@pytest.mark.parametrize("n", [1, 2, 1500, 6000])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_evaluation_is_mse_whatever_the_rows_and_their_size(n, size):
    problem = Problem(n=n, in_features=3, out_features=4, rank=2)
    model, x, y = make(LORA, problem), size * problem.x, size * problem.target
    assert evaluate(model, x, y) == pytest.approx(float(mse(model(x), y)[0]), rel=1e-13, abs=0)


def test_the_loss_of_a_model_with_a_nan_is_nan():
    model = make(LINEAR)
    model.weight[1, 2] = np.nan
    assert np.isnan(evaluate(model, DATA.x, DATA.target))


# --- progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_shown_on_a_terminal_where_asked_for(monkeypatch, stream, progress, shown):
    monkeypatch.setattr("sys.stderr", stream())
    fit(make(LINEAR), epochs=3, log_every=1, progress=progress)
    text = sys.stderr.getvalue()
    assert ("3/3" in text and "loss=" in text) is ("epoch/s" in text or "s/epoch" in text) is bool(text) is shown


def test_the_bar_of_a_training_that_goes_on_is_right(monkeypatch):
    """After a stop: of 4 epochs of 48,000 tokens 3 are done, and the last takes two seconds."""
    monkeypatch.setattr("sys.stderr", Terminal())
    bar = progress_bar(3, 4, 48_000)
    bar.start_t -= 2
    bar.update(48_000)
    bar.close()
    first, last = sys.stderr.getvalue().split("\r")[1], sys.stderr.getvalue().split("\r")[-1]
    assert "144k/192k" in first
    assert "192k/192k" in last
    rate = float(re.search(r"([\d.]+)ktoken/s", last)[1])
    assert 20 < rate <= 24.1


@pytest.mark.parametrize("kernel", [True, False])
def test_a_notebook_shows_the_bar(monkeypatch, kernel):
    """A kernel's stderr is no terminal; the shell is what IPython says of itself."""
    shell = SimpleNamespace(config=MappingProxyType({"IPKernelApp": {}})) if kernel else None
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    for progress in (False, True):
        assert sys.stderr.getvalue() == ""
        fit(make(LINEAR), epochs=3, log_every=1, progress=progress)
    assert ("3/3" in sys.stderr.getvalue()) is kernel


def test_each_epoch_is_reported_when_it_is_kept(tmp_path):
    seen, file = [], tmp_path / "c"

    def report(state):
        seen.append((state.epoch, list(state.history.epochs), checkpoint.read_checkpoint(file).epoch))

    fit(make(LINEAR), epochs=3, log_every=2, checkpoint=file, report=report)
    assert seen == [(1, [], 1), (2, [2], 2), (3, [2], 3)]


# --- a training that diverges ---------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 10])
@each_case
def test_a_training_that_diverges_keeps_what_the_epoch_left(case, log_every):
    """The reference takes the same steps one by one, and looks at the parameters and the loss after each epoch."""
    x, target = DATA.x.astype(np.float32), DATA.target.astype(np.float32)
    model, plain = make(case, dtype="float32"), make(case, dtype="float32")
    with pytest.raises(TrainingDiverged) as caught:
        fit(model, x, target, epochs=9, lr=1e38, log_every=log_every)

    rng, optimizer, epoch, loss = np.random.default_rng(0), Adam(plain.trainable(), lr=1e38), 0, 0.0
    with np.errstate(all="ignore"):
        while epoch == 0 or (np.isfinite(loss) and all(np.isfinite(p).all() for p in plain.trainable().values())):
            epoch += 1
            for rows in draw_batches(rng, 50, 8):
                optimizer.step(backpropagate(plain, x[rows], target[rows]))
            loss = mse(plain(x), target)[0] if epoch % log_every == 0 else 0.0
    assert (caught.value.epoch, caught.value.step) == (epoch, 6 * epoch)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, plain.trainable()[name])
    assert "and no loss was reported before. The model keeps what the epoch left" in str(caught.value)


class Mined:
    """A model of some numbers, whose gradients are 1, and NaN of those that are mined when `goes_off(step, x)`."""

    in_features = out_features = 1

    def __init__(self, mined, goes_off, names=("first", "second")):
        self.mined, self.goes_off, self.steps = mined, goes_off, 0
        self.arrays = {name: np.zeros(1) for name in names}

    def trainable(self):
        return self.arrays

    def forward(self, x):
        return x + sum(self.arrays.values()), x

    def backward(self, dy, cache, *, need_dx=True):
        self.steps += 1
        off = self.goes_off(self.steps, cache)
        return None, {name: np.full(1, np.nan if off and name in self.mined else 1.0) for name in self.arrays}

    def __call__(self, x):
        return self.forward(x)[0]


@pytest.mark.parametrize("mined", ["first", "second"])
@given(seed=st.integers(0, 2**32 - 1))
@example(seed=next(s for s in range(99) if 7 in draw_batches(np.random.default_rng(s), 90, 1)[60:]))
@settings(max_examples=5)
def test_the_array_and_the_epoch_that_went_wrong_are_named(mined, seed):
    x = np.zeros((90, 1))
    x[7] = 7
    rng, model = np.random.default_rng(seed), Mined([mined], lambda step, x: (x == 7).any())
    epochs = (draw_batches(rng, 90, 1)[:, 0].tolist() for _ in range(99))
    epoch = next(epoch for epoch, rows in enumerate(epochs, start=1) if 7 in rows)
    with pytest.raises(TrainingDiverged, match=f"^epoch {epoch}: {mined} is no longer finite, and ") as caught:
        fit(model, x, np.zeros((90, 1)), seed, epochs=99, batch_size=1)
    assert (caught.value.epoch, caught.value.step) == (epoch, 90 * epoch)
    assert model.steps == 90 * epoch  # no step is left out, and none is taken again
    for name, p in model.arrays.items():  # a gradient of 1 moves by lr in each step
        np.testing.assert_allclose(p, np.nan if name == mined else -1e-3 * 90 * epoch, rtol=1e-6)


TWO, NO_LOSS = ("first", "second"), "no loss was reported before"
NINE = (*TWO, *(f"p{i}" for i in range(7)))


@pytest.mark.parametrize(
    ("names", "mined", "step", "options", "where", "loss"),
    [
        (TWO, NINE, 13, {"log_every": 2}, "4: first, second", "the last loss reported was 0.000256 after epoch 2"),
        (TWO, NINE, 1, {"log_every": 1}, "1: first, second", NO_LOSS),
        (NINE, NINE, 1, {}, "1: first, second, p0 and 6 more", NO_LOSS),
        (NINE, NINE[:4], 1, {}, "1: first, second, p0 and 1 more", NO_LOSS),
        (NINE, NINE[:3], 1, {}, "1: first, second, p0", NO_LOSS),
        (TWO, ["second"], 1, {"max_grad_norm": 1.0}, "1: first, second", NO_LOSS),
    ],
)
def test_a_divergence_is_said_in_full_with_the_last_loss(names, mined, step, options, where, loss):
    """A gradient that cannot be clipped has a length that is no number, and so is nothing that is made of it."""
    x, model = np.zeros((8, 1)), Mined(mined, lambda now, x: now >= step, names)
    with pytest.raises(TrainingDiverged) as caught:
        fit(model, x, x, epochs=9, batch_size=2, lr=1e-3, **options)
    assert str(caught.value) == (
        f"epoch {where} is no longer finite, and {loss}. The model keeps what the epoch left. Either lr = 0.001 is too "
        "large, or X or Y is not finite"
    )


def test_a_loss_that_overflows_is_reported_with_its_epoch():
    model = LoRA(np.ones((1, 2), np.float32), np.zeros((3, 1), np.float32), 1)
    x, y = np.ones((8, 2), np.float32), np.full((8, 3), 1e19, np.float32)
    y[0] = -1e25  # its square overflows float32; no batch below ever draws it
    seed = next(seed for seed in range(100) if 0 not in draw_batches(np.random.default_rng(seed), 8, 1))
    with pytest.raises(TrainingDiverged, match="after epoch 1") as caught:
        fit(model, x, y, seed, batch_size=1)
    assert (caught.value.epoch, caught.value.step) == (1, 8)
    assert all(np.isfinite(p).all() for p in model.trainable().values())


@pytest.mark.parametrize("log_every", [1, 10])
def test_an_epoch_whose_loss_is_no_number_is_not_kept(tmp_path, log_every):
    rng = np.random.default_rng(0)
    model = Linear(rng.standard_normal((3, 4)).astype(np.float32))
    X, Y = (rng.standard_normal((8, n)).astype(np.float32) for n in (4, 3))
    with pytest.raises(TrainingDiverged, match="after epoch 1"):
        fit(model, X, Y, lr=1e20, log_every=log_every, checkpoint=tmp_path / "c")
    saved = load_file(tmp_path / "c")
    assert all(np.abs(saved[name]).max() < 10 for name in saved)


def test_a_weight_that_is_not_finite_is_named_before_training():
    """Whether or not it trains; nothing has changed then."""
    for path, train_it in (("fc1.weight", False), ("fc2.bias", True)):
        model, X, Y = tanh_net(path)
        model = model if train_it else adapt(model, ["fc2"], rank=1, alpha=1, rng=np.random.default_rng(0))
        before = {name: p.copy() for name, p in model.trainable().items()}
        with pytest.raises(ValueError, match=f"^model cannot be trained: its {path} holds NaN or infinity$"):
            fit(model, X, Y)
        for name, p in model.trainable().items():
            np.testing.assert_array_equal(p, before[name])


def tanh_net(path):
    """Return a model with a NaN in one array, and data."""
    rng = np.random.default_rng(0)
    model = Sequential(fc1=Linear.init(4, 5, rng=rng), act=Tanh(), fc2=Linear.init(5, 3, rng=rng))
    model.trainable()[path][...] = np.nan
    return model, *(rng.standard_normal((8, n)).astype(np.float32) for n in (4, 3))


def test_a_frozen_weight_that_spoils_a_later_step_is_named():
    """It is the row of an id that no first row has; the learning rate is not blamed."""
    rng = np.random.default_rng(0)
    model = Sequential(emb=Embedding(rng.standard_normal((7, 3))), fc=Linear(rng.standard_normal((5, 3))))
    model.emb.weight[6] = np.inf
    ids = np.arange(600) % 6
    ids[-1] = 6
    model = adapt(model, ["fc"], rank=1, alpha=1, rng=rng)
    cause = r"The cause is emb\.weight, which does not train: it holds NaN or infinity$"
    with pytest.raises(TrainingDiverged, match=cause):
        train(model, ids, ids % 5, loss=cross_entropy, rng=rng, epochs=3, batch_size=600)


def test_a_divergence_survives_a_process_boundary():
    before = TrainingDiverged("the loss is nan", 7, 70)
    after = pickle.loads(pickle.dumps(before))
    assert (str(after), after.epoch) == ("the loss is nan", 7)
    assert (TrainingDiverged("the loss is nan").step, vars(after)) == (0, {"epoch": 7, "step": 70})


# --- steps instead of epochs ----------------------------------------------------------------------


def test_a_training_of_steps_is_one_of_as_short_epochs(tmp_path):
    """The same bits in the model, the history and the checkpoint, and a stop after any step."""
    one, other, resumed = make(LORA), make(LORA), make(LORA)
    seen = []
    by_steps = fit(
        one, max_steps=7, log_every=3, checkpoint=tmp_path / "a",
        report=lambda state: seen.append((state.epoch, state.now, state.unit)),
    )  # fmt: skip
    by_epochs = fit(other, epochs=7, steps=1, log_every=3, checkpoint=tmp_path / "b")
    assert by_steps == by_epochs
    assert by_steps.epochs == [3, 6, 7]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert seen == [(step, (1 if step <= 6 else 2, step), "step") for step in range(1, 8)]  # 50 rows, 8 a step
    fit(resumed, epochs=4, steps=1, log_every=3, checkpoint=tmp_path / "c")
    fit(resumed := make(LORA), max_steps=7, log_every=3, checkpoint=tmp_path / "c")
    for name, p in one.trainable().items():
        np.testing.assert_array_equal(p, other.trainable()[name])
        np.testing.assert_array_equal(p, resumed.trainable()[name])


@pytest.mark.parametrize(
    ("options", "step", "epoch"),
    [({}, 13, 4), ({}, 4, 1), ({"steps": 3}, 7, 3), ({"batches": Passes(8, 2, 0)}, 9, 3)],
)
def test_a_divergence_has_its_step_and_its_epoch(options, step, epoch):
    """Eight rows, two a step: an epoch has four steps, unless `steps` says how many."""
    x, model = np.zeros((8, 1)), Mined(["first"], lambda now, x: now == step)
    with pytest.raises(TrainingDiverged) as caught:
        fit(model, x, x, batch_size=2, max_steps=20, log_every=2, lr=1e-3, **options)
    assert (caught.value.epoch, caught.value.step, model.steps) == (epoch, step, step)
    assert str(caught.value).startswith(f"step {step}: first is no longer finite, and the last loss reported was ")
    last = (step - 1) // 2 * 2
    assert f" after step {last}. The model keeps what the step left. Either lr = 0.001 is" in str(caught.value)
    with pytest.raises(TrainingDiverged) as caught:
        fit(Mined(["first"], lambda now, x: now == step), x, x, batch_size=2, epochs=9, **options)
    steps = options.get("steps", 4)
    epoch = -(-step // steps)
    assert (caught.value.epoch, caught.value.step) == (epoch, epoch * steps)


def test_a_loss_that_is_no_number_has_its_step():
    x, told = np.zeros((8, 1)), []

    def loss(prediction, target):  # of all rows: at the start and after the first step twice, then after 3, then 6
        told.append(len(prediction))
        return np.inf if told.count(8) == 6 else 1.0, prediction

    with pytest.raises(
        TrainingDiverged, match=r"over all of X and Y is inf after step 6, and .* 1 after step 3"
    ) as caught:
        fit(Mined([], lambda *_: False), x, x, batch_size=2, max_steps=9, log_every=3, loss=loss)
    assert (caught.value.epoch, caught.value.step) == (2, 6)
    assert str(caught.value).endswith(". The model keeps what the step left")


def test_the_bar_of_a_training_of_steps_counts_steps(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    fit(make(LINEAR), max_steps=3, log_every=1, progress=True)
    text = sys.stderr.getvalue()
    assert "3/3" in text
    assert "step/s" in text or "s/step" in text
    monkeypatch.setattr("sys.stderr", Terminal())
    ids = np.random.default_rng(1).integers(0, 11, (50, 25))
    fit(Embedding(np.eye(11)), ids, ids, max_steps=10, loss=cross_entropy, progress=True)
    assert "2.00k/2.00k" in sys.stderr.getvalue()  # 10 steps of 8 rows of 25 tokens


# --- what is refused ------------------------------------------------------------------------------


def spoilt(array, number):
    array = array.copy()
    array[[17, 30], 2] = number
    return array


X, Y = DATA.x, DATA.target
V, T = ValueError, TypeError
REFUSED = [
    (V, {"epochs": 0}, "epochs must be at least 1, got 0"),
    (T, {"epochs": 2.5}, "epochs must be an integer, got 2.5"),
    (T, {"epochs": True}, "epochs must be an integer, got True"),
    (V, {"max_steps": 0}, "max_steps must be at least 1, got 0"),
    (T, {"max_steps": 1.5}, "max_steps must be an integer, got 1.5"),
    (V, {"steps": 2**31}, "steps must be at most 268435455, got 2147483648"),
    (V, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    (V, {"batch_size": 51}, "batch_size must be at most the 50 rows of X, got 51"),
    (V, {"log_every": 0}, "log_every must be at least 1, got 0"),
    (V, {"lr": 0}, "lr must be above 0 and finite, got 0"),
    (T, {"lr": "fast"}, "lr must be a number, got 'fast'"),
    (T, {"rng": 0}, "rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got 0"),
    (V, {"X": X[:, :3]}, "x has 3 entries on its last axis (shape (1, 3)), expected in_features = 5"),
    (V, {"X": X[:49]}, "Y has shape (50, 4), expected 49 rows as X has"),
    (V, {"X": X[0], "Y": Y[0]}, "X has shape (5,), expected (n, ..., in) with at least one row"),
    (V, {"X": X[:0], "Y": Y[:0]}, "X has shape (0, 5), expected (n, ..., in) with at least one row"),
    (V, {"Y": Y[:, :3]}, "Y has shape (50, 3), expected (50, 4)"),
    (T, {"X": X.astype(int)}, "x has dtype int64, expected a floating-point dtype such as float32"),
    (T, {"X": X.astype(object)}, "X has dtype object, expected a floating-point dtype such as float32"),
    (
        T,
        {"X": X.astype(np.float32)},
        "X has dtype float32, expected float64 as in the layer: convert it with X.astype('float64')",
    ),
    (
        T,
        {"Y": Y.astype(np.float32)},
        "Y has dtype float32, expected float64 as in the layer: convert it with Y.astype('float64')",
    ),
    (T, {"X": X.astype(complex)}, "X has dtype complex128, expected float32 or float64: others cannot be trained"),
    (T, {"Y": Y.astype(complex)}, "Y has dtype complex128, expected float32 or float64: others cannot be trained"),
    (T, {"X": X.tolist()}, "X must be an array, got list; convert it with numpy.asarray(X)"),
    (T, {"loss": "mse"}, "loss must be a function such as minilora.mse, got 'mse'"),
    (T, {"report": "loud"}, "report must be a function, report(state), got 'loud'"),
    (T, {"gradients": "mse"}, "gradients must be a function, gradients(model, x, y, loss), got 'mse'"),
    (V, {"X": spoilt(X, np.nan)}, "X holds NaN or infinity: entry (17, 2) is nan"),
    (V, {"Y": spoilt(Y, -np.inf)}, "Y holds NaN or infinity: entry (17, 2) is -inf"),
    (T, {"held_out": X}, "held_out must be two arrays, inputs and targets, got ndarray"),
    (V, {"held_out": (X, Y[:, :1])}, "held_out: Y has shape (50, 1), expected (50, 4)"),
    (V, {"held_out": (spoilt(X, np.inf), Y)}, "held_out: X holds NaN or infinity: entry (17, 2) is inf"),
]


@pytest.mark.parametrize(("error", "change", "said"), REFUSED)
def test_bad_input_is_refused_before_anything_changes(error, change, said):
    model, rng = make(LORA), np.random.default_rng(0)
    before = {name: p.copy() for name, p in model.trainable().items()}
    with pytest.raises(error) as refused:
        fit(model, **{"rng": rng} | change)
    assert str(refused.value) == said
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])


def test_what_is_no_layer_is_refused():
    for call in (evaluate, partial(train, rng=np.random.default_rng(0))):
        with pytest.raises(TypeError, match=r"^model must be a Layer, got ndarray$"):
            call(np.ones((4, 5)), DATA.x, DATA.target)


@pytest.mark.parametrize(
    ("name", "id_", "said"),
    [("X", 11, "x"), ("X", -1, "x"), ("X", -100, "x"), ("Y", 11, "targets"), ("Y", -1, "targets")],
)
def test_an_id_out_of_range_anywhere_is_refused_first(name, id_, said):
    model, rng = Embedding(np.random.default_rng(0).standard_normal((11, 11))), np.random.default_rng(0)
    data = {key: np.random.default_rng(1).integers(0, 11, (600, 2)) for key in "XY"}
    data["Y"][0, 0] = -100  # which does not count, and is none of the extremes
    data[name][599, 1] = id_
    with pytest.raises(ValueError, match=rf"row 599 of X and Y: {said} holds {id_} at \(0, 1\), expected 0 to 10"):
        fit(model, **data, rng=rng, loss=cross_entropy)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def smoothed(logits, targets):
    """A loss of a user's: some of the cross-entropy, and its own refusals."""
    value, d_logits = cross_entropy(logits, targets)
    return 0.9 * value, 0.9 * d_logits


def counted_from_minus_one(logits, targets):
    return cross_entropy(logits, np.where(targets == -1, -100, targets % 11))


class Halves(Layer):
    """Two tables of other heights: ids up to 10 for the first half of a row, and up to 3 for the second."""

    def __init__(self):
        self.wide, self.low = (Embedding(np.random.default_rng(0).standard_normal((n, 11))) for n in (11, 4))

    def forward(self, x):
        (a, of_a), (b, of_b) = self.wide.forward(x[:, :1]), self.low.forward(x[:, 1:])
        return np.concatenate([a, b], axis=1), (of_a, of_b)

    def backward(self, dy, cache, *, need_dx=True):
        of_wide = self.wide.backward(dy[:, :1], cache[0])[1]
        return None, nest("wide", of_wide) | nest("low", self.low.backward(dy[:, 1:], cache[1])[1])


def test_model_and_loss_judge_the_ids_on_a_cpu():
    """So a loss may have targets that are no classes, and a table of the user's refuses its ids before a step."""
    ids, model = np.random.default_rng(1).integers(0, 4, (60, 2)), Halves()
    targets = ids.copy()
    targets[40, 1], targets[41, 0] = -1, 30
    fit(model, ids, targets, loss=counted_from_minus_one)
    rng, before = np.random.default_rng(0), model.wide.weight.copy()
    with pytest.raises(ValueError, match=r"^row 41 of X and Y: targets holds 30 at \(0, 0\), expected 0 to 10$"):
        fit(model, ids, np.maximum(targets, 0), rng=rng, loss=smoothed)
    ids[50, 1] = 4  # which the other table has
    with pytest.raises(ValueError, match=r"^row 50 of X and Y: x holds 4 at \(0, 0\), expected 0 to 3$"):
        fit(model, ids, ids, rng=rng, loss=cross_entropy)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    np.testing.assert_array_equal(model.wide.weight, before)


@pytest.mark.parametrize("held_out", [None, (DATA.x[:7], DATA.target[:7])])
def test_data_are_judged_once(monkeypatch, held_out):
    """However often the loss is measured, the first row is computed once, and the model says once what trains."""
    model, heights, asked = make(LORA), [], []
    forward, trainable = type(model).forward, type(model).trainable
    monkeypatch.setattr(type(model), "forward", lambda self, x: (heights.append(len(x)), forward(self, x))[1])
    monkeypatch.setattr(type(model), "trainable", lambda self: (asked.append(1), trainable(self))[1])
    fit(model, epochs=5, log_every=1, held_out=held_out)
    assert (heights.count(1), len(asked)) == (1 if held_out is None else 2, 1)


def test_targets_that_a_loss_would_broadcast_are_refused():
    def broadcasting(prediction, target):
        error = prediction - target
        return (error**2).mean(), error

    model, x = Linear.init(3, 1, rng=np.random.default_rng(0), dtype="float64"), np.ones((5, 3))
    for shape in ((5,), (5, 5)):
        with pytest.raises(ValueError, match=r"^Y has shape \(5,.*\), expected \(5, 1\)$"):
            fit(model, x, np.ones(shape), loss=broadcasting)


def test_targets_of_which_none_counts_are_refused():
    with pytest.raises(ValueError, match=r"^Y has no target that counts: all of them are -100$"):
        evaluate(make(LINEAR), DATA.x, np.full(50, -100), cross_entropy)


def test_a_schedule_without_a_name_is_recorded_by_its_repr():
    params = {"w": np.ones(2)}
    for schedule in (Schedule("linear", steps=5), Schedule("cosine", steps=7, warmup=2)):
        assert settings_of(Adam(params, schedule=schedule), mse, None)["schedule"] == repr(schedule)
