"""The loop: draw a batch, forward, backward, step; now and then, report.

It knows the protocol `Layer`, not the layers: whatever has ``forward``, ``backward`` and ``trainable`` trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from .backend import backend_of, check_finite
from .checks import Array, Rate, check_batch_size, check_data, check_flag, check_held_out, check_integer, check_rng
from .fast.gather import Batches
from .files.checkpoint import describe, keep, resume
from .files.state import History, TrainingDiverged, TrainingState
from .layer import Layer
from .losses import count, mse
from .optim import Adam

__all__ = ["History", "TrainingDiverged", "backpropagate", "draw_batches", "evaluate", "train"]

Loss: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]
Gradients: TypeAlias = Callable[[Any, Array, Array], dict[str, Array]]

EVALUATION_ROWS = 512  # at a time: at the article's widths their temporaries stay in the cache, 14 ms in place of 22


def backpropagate(model: Layer, x: Array, y: Array, loss: Loss = mse) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)`` at what trains: forward, the loss, backward."""
    prediction, cache = model.forward(x)
    _, d_prediction = loss(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads


def train(
    model: Layer, X: Array, Y: Array, *, epochs: int = 100, batch_size: int = 128, lr: Rate = 1e-3,
    rng: np.random.Generator, log_every: int = 10, progress: bool = False, checkpoint: str | Path | None = None,
    loss: Loss = mse, gradients: Gradients | None = None, steps: int | None = None,
    held_out: tuple[Array, Array] | None = None,
) -> History:  # fmt: skip
    """Train a model in place to predict Y from X, with Adam.

    Each step draws its own batch without replacement from all the rows. A row can therefore come up twice in an epoch,
    or not at all, as in the article.

    Parameters
    ----------
    model : Layer
        The arrays in ``model.trainable()`` are updated in place, and no other.
    X : array, shape (n, ...)
        Inputs, of the model's dtype and library; or token ids.
    Y : array, shape (n, ...)
        Targets, as the loss takes them.
    epochs, batch_size, log_every : int
        At least 1, batch_size at most n.
    lr : float, or mapping of str to float
        Adam's step length; or one for each ending of a parameter's name, as in `Adam`.
    rng : numpy.random.Generator
        Draws the batches, on the host: one seed, one order of batches on every device.
    progress : bool
        Whether to show a progress bar on stderr, where that is a terminal.
    checkpoint : path, optional
        A file that keeps the training's state after every epoch. Where it is there already, the training goes on from
        it and ends with the same bits as one that was never stopped; `rng` must come from the same seed. A training
        that is done can go on to more epochs.
    loss : callable
        ``loss(prediction, target) -> (loss, d_prediction)``, a mean over the targets: `mse` or `cross_entropy`.
    gradients : callable, optional
        ``gradients(model, x, y) -> grads``, a shorter way to the gradients of the loss, such as
        `minilora.fast.residual_form` for `mse`; by default `backpropagate`.
    steps : int, optional
        Of an epoch; ``n // batch_size`` by default.
    held_out : (array, array), optional
        Inputs and targets, as X and Y, to measure the loss on; by default X and Y themselves.

    Returns
    -------
    History
        The loss over all of X and Y, or of what is held out, every `log_every` epochs, and after the last.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit. Nothing has changed then.
    CheckpointError
        If the checkpoint is damaged, or of another configuration. Nothing has changed then.
    TrainingDiverged
        If a number became NaN or infinite. The model is left at its last finite parameters.
    """
    epochs, log_every = (check_integer(k, v, at_least=1) for k, v in {"epochs": epochs, "log_every": log_every}.items())
    n = check_data(model, X, Y, loss, every_id=True)
    batch_size, progress = check_batch_size(batch_size, n), check_flag("progress", progress)
    steps = check_integer("steps", n // batch_size if steps is None else steps, at_least=1)
    check_rng(rng)
    check_finite(X=X, Y=Y)
    measured = (X, Y)
    if held_out is not None:
        measured = check_held_out(model, held_out, loss)
        check_finite(**{"held_out[0]": held_out[0], "held_out[1]": held_out[1]})

    optimizer = Adam(model.trainable(), lr=lr)
    state = TrainingState(model, optimizer, rng)
    where, batch = backend_of(X), Batches(X, Y, batch_size)
    if checkpoint is not None:
        configuration = describe(state, X, Y, batch_size, log_every, steps, held_out)
        resume(checkpoint, state, X, configuration, epochs)

    def step(rows: Array) -> None:
        x, y = batch(rows)
        grads = gradients(model, x, y) if gradients else backpropagate(model, x, y, loss)
        optimizer.step(grads)

    def report(epoch: int) -> float:
        value = evaluate(model, *measured, loss)
        if not math.isfinite(value):
            what = "X and Y" if held_out is None else "held_out"
            raise TrainingDiverged(f"the loss over all of {what} is {value} after epoch {epoch}", epoch, 0)
        state.history.epochs.append(epoch)
        state.history.losses.append(value)
        return value

    left, silent = range(state.epoch + 1, epochs + 1), None if progress else True
    tokens = steps * batch_size * math.prod(X.shape[1:]) if X.dtype.kind in "iu" else None  # of an epoch
    unit: Any = {"unit": "epoch"} if tokens is None else {"unit": "token", "unit_scale": tokens}
    bar = tqdm(left, initial=state.epoch, total=epochs, disable=silent, **unit)
    # NumPy's warnings about overflow would only repeat, less clearly, what TrainingDiverged is going to say.
    with np.errstate(over="ignore", invalid="ignore"), bar:
        for epoch in bar:
            start = state.copy_arrays()
            batches = where.asarray(draw_batches(rng, n, batch_size, steps))
            for rows in batches:
                step(rows)
            if not state.is_finite():  # asked once an epoch, since asking waits for the device
                state.find_divergence(start, step, batches, epoch)
            state.epoch = epoch
            if epoch % log_every == 0:
                bar.set_postfix(loss=f"{report(epoch):.4g}")
            if checkpoint is not None:
                keep(checkpoint, state, X, configuration)
        if epochs % log_every:  # not in a checkpoint: a training that goes on to more epochs does not log this one
            report(epochs)
    return state.history


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (steps, batch_size), each batch drawn afresh."""
    count = n // batch_size if steps is None else steps
    return np.stack([rng.choice(n, batch_size, replace=False, shuffle=False) for _ in range(count)])


def evaluate(model: Layer, X: Array, Y: Array, loss: Loss = mse) -> float:
    """Return the loss of a model over all of X and Y, computed `EVALUATION_ROWS` targets at a time in their dtype.

    X, Y and `loss` are as in `train`. Data that do not fit the model or each other are a ValueError or a TypeError.
    """
    n, total, whole = check_data(model, X, Y, loss), 0.0, count(Y)
    height = max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))
    for start in range(0, n, height):
        x, y = X[start : start + height], Y[start : start + height]
        total = total + loss(model(x), y)[0] * (count(y) / whole)
    return float(total)
