"""The factor of each step's length."""

import math

import numpy as np
import pytest

from minilora import Adam, CheckpointError, Linear, train
from minilora.schedule import DECAYS, Schedule


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule("constant", 10, 4), [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule("linear", 6, 2), [0.5, 1, 1, 0.75, 0.5, 0.25]),  # which leaves the last step one
        (Schedule("cosine", 8), [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),  # half a wave
    ],
)
def test_a_warmup_grows_and_a_decay_falls_by_its_rule(schedule, factors):
    np.testing.assert_allclose([schedule(t) for t in range(1, schedule.steps + 1)], factors, rtol=1e-15)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (7, 0), (7, 1), (7, 6)])
def test_every_step_has_a_rate_and_one_the_whole(decay, steps, warmup):
    factors = [Schedule(decay, steps, warmup)(t) for t in range(1, steps + 1)]
    assert max(factors) == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert factors == [*sorted(factors[:warmup]), *sorted(factors[warmup:], reverse=True)]


@pytest.mark.parametrize("decay", DECAYS)
def test_a_step_behind_the_last_has_its_factor(decay):
    assert Schedule(decay, 6, 2)(60) == Schedule(decay, 6, 2)(6) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("linear", 4, 4), "warmup is 4 of 4 steps, expected fewer: none has the full rate"),
        (("linear", 4, 5), "warmup is 5 of 4 steps, expected fewer: none has the full rate"),
        (("linear", 0, 0), "steps must be at least 1, got 0"),
        (("linear", 4, -1), "warmup must be at least 0, got -1"),
        (("exponential", 4), "decay must be 'constant', 'linear' or 'cosine', got 'exponential'"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError) as refused:
        Schedule(*given)
    assert str(refused.value) == said


def moved(lr, **options):
    p = np.ones(2)
    optimizer = Adam({"p": p}, lr=lr, **options)
    places = []
    for grad in ([1.0, -2.0], [0.5, 0.3], [-1.0, 4.0]):
        optimizer.step({"p": np.array(grad)})
        places.append(p.copy())
    return np.diff([np.ones(2), *places], axis=0)


def test_adam_takes_each_step_with_its_factor():
    factors = {1: 0.5, 2: 1.0, 3: 0.25}
    steps = moved(0.1, schedule=factors.__getitem__)
    np.testing.assert_allclose(steps, moved(0.1) * [[0.5], [1.0], [0.25]], rtol=1e-12)
    np.testing.assert_array_equal(moved(0.1, schedule=lambda t: 1.0), moved(0.1))


def test_a_factor_of_numpys_leaves_single_precision_as_it_is():
    ends = [np.zeros(100, "float32"), np.zeros(100, "float32")]
    for p, number in zip(ends, (float, np.float64), strict=True):
        Adam({"p": p}, schedule=number).step({"p": np.arange(1, 101, dtype="float32")})
    np.testing.assert_array_equal(*ends)


def fitted(path, epochs, schedule):
    rng = np.random.default_rng(0)
    layer, X = Linear.init(3, 2, rng=rng, dtype="float64"), np.random.default_rng(1).standard_normal((8, 3))
    options = {"batch_size": 4, "steps": 2, "log_every": 1, "rng": rng, "checkpoint": path}
    train(layer, X, X[:, :2], epochs=epochs, schedule=schedule, **options)
    return layer.weight


def test_a_training_takes_its_steps_with_their_factors():
    ends = []
    for lr, schedule in ((0.25, None), (0.5, lambda t: 0.5)):
        layer, rng = Linear(np.ones((2, 3))), np.random.default_rng(0)
        X = np.random.default_rng(1).standard_normal((8, 3))
        train(layer, X, X[:, :2], epochs=2, batch_size=4, lr=lr, schedule=schedule, rng=rng)
        ends.append(layer.weight)
    np.testing.assert_array_equal(*ends)


def test_training_goes_on_with_its_schedule_to_the_same_bits(tmp_path):
    schedule = Schedule("cosine", 12, 3)
    whole = fitted(tmp_path / "one", 6, schedule)
    fitted(tmp_path / "two", 2, schedule)
    np.testing.assert_array_equal(fitted(tmp_path / "two", 6, schedule), whole)


@pytest.mark.parametrize("other", [None, Schedule("cosine", 10, 3), Schedule("linear", 12, 3)])
def test_a_training_does_not_go_on_with_another_schedule(tmp_path, other):
    fitted(tmp_path / "c", 2, Schedule("cosine", 12, 3))
    with pytest.raises(CheckpointError, match="schedule is"):
        fitted(tmp_path / "c", 6, other)
