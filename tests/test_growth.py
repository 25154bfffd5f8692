"""What `train` tells of a loss that grew: tenfold in the first epoch, a thousandfold at the end."""

import re
import warnings

import numpy as np
import pytest

from minilora import Linear, train
from minilora.training import LossGrew, TrainingDiverged

RNG = np.random.default_rng
X, Y = RNG(0).standard_normal((100, 5)), RNG(1).standard_normal((100, 3))


def fit(x=X, y=Y, model=None, **options):
    """Train a layer, and return when it was told that the loss grew, and the messages."""
    model = model or Linear.init(5, 3, rng=RNG(2), dtype="float64")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LossGrew)
        train(model, x, y, rng=RNG(0), **options)
    said = [str(warning.message) for warning in caught if warning.category is LossGrew]
    return ["in the first epoch" in message for message in said], said


def test_a_loss_grown_a_thousandfold_is_told_at_the_end():
    when, (first, last) = fit(lr=1000.0, epochs=10)
    assert when == [True, False]
    less = r"lr = 1000\.0 is too large; start again with a smaller one, since the model is worse than before"
    for said, epoch in ((first, " in the first epoch"), (last, "")):
        assert re.fullmatch(rf"the loss grew from \S+ to [\d.e+]+{epoch}: {less}", said)
    exact = Linear(RNG(2).standard_normal((3, 5)))
    for quiet in (fit(lr=1e-2), fit(lr=1e-3, epochs=3), fit(y=exact(X) + 1e-9 * Y, model=exact, lr=1e-3, epochs=5)):
        assert quiet == ([], [])  # the last from nearly 0 upwards: still far below what an answer of 0 would lose
    with pytest.raises(TrainingDiverged):
        fit(lr=1e200)


def test_growth_in_the_first_epoch_is_told_when_it_ends():
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Linear.init(5, 3, rng=RNG(2), dtype="float64")
        report = lambda state: told.append((state.epoch, len(caught)))  # noqa: E731
        train(model, X, Y, epochs=3, lr=30.0, rng=RNG(0), report=report)
    assert told[0] == (1, 1)


def test_growth_in_the_first_step_is_said_of_a_step():
    _, (first, *_) = fit(max_steps=1, lr=30.0)
    assert " in the first step: lr = 30.0 is too large" in first


@pytest.mark.parametrize(("times", "told"), [(9.9, []), (10.1, [True]), (999, [True]), (1001, [True, False])])
def test_growth_is_tenfold_at_first_and_a_thousandfold_at_last(times, told):
    """The loss is the square of the weight, and Adam's first step has the length lr."""
    x, upwards = np.ones((1, 1)), lambda model, x, y, loss: {"weight": -np.ones((1, 1))}
    assert fit(x, 0 * x, Linear(np.ones((1, 1))), epochs=1, lr=times**0.5 - 1, gradients=upwards)[0] == told


def test_growth_is_that_of_the_loss_that_is_measured():
    far = X, 1e6 * Y  # where the loss begins a trillion times above that of X and Y
    assert fit(epochs=2, held_out=far)[0] == []
    assert fit(*far, epochs=30, lr=1e3, held_out=(X, Y))[0]


def test_a_loss_that_grew_before_a_stop_is_told(tmp_path):
    """It is held against where the training began, and not against where it goes on."""
    options = {"lr": 1000.0, "checkpoint": tmp_path / "c", "batch_size": 8}
    (_, told), (_, again) = fit(epochs=10, **options), fit(epochs=11, **options)
    assert told[0].split(" to ")[0] == again[0].split(" to ")[0]
