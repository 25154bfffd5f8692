"""The loop: draw a batch, forward, backward, step; now and then, report.

    rows = draw_batches(rng, n, batch_size)             draw      each batch without replacement, from all rows
    prediction, cache = model.forward(X[rows])          forward
    L, dy = loss(prediction, Y[rows])
    dx, grads = model.backward(dy, cache)               backward
    adam.step(grads)                                    step
    evaluate(model, X, Y, loss)                         report    every so many epochs

It knows the protocol `Layer`, not the layers: whatever has ``forward``, ``backward`` and ``trainable`` trains.

Beside the loop, `minilora.state` is a training between two epochs, `minilora.evaluation` has the three lines in the
middle as `backpropagate`, and measures the loss over a data set, and `minilora.watching` has the bar and stops where
numbers are no longer finite.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from .backend import backend_of
from .checks import Array, check_flag, check_integer, check_rng
from .evaluation import Gradients, backpropagate, check_batch_size, check_training_data, evaluate, start_loss
from .layer import Layer
from .losses import Loss, mse
from .optim import Adam, Rate
from .state import History, Keeper, TrainingState
from .watching import LossGrew, TrainingDiverged, check_loss, check_parameters, move, progress_bar, warn_of_growth

__all__ = [
    "History",
    "LossGrew",
    "TrainingDiverged",
    "TrainingState",
    "backpropagate",
    "draw_batches",
    "evaluate",
    "train",
]

Evaluate: TypeAlias = Callable[[Any, Array, Array, Loss], float]

DEFAULT_ROWS = 128  # of a batch
MOST = 2**31 - 1  # rows in an epoch, whose numbers are drawn at once


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (steps, batch_size), each batch drawn afresh."""
    batches = np.empty((n // batch_size if steps is None else steps, batch_size), np.int64)
    for batch in batches:
        batch[...] = rng.choice(n, batch_size, replace=False, shuffle=False)
    return batches


def train(
    model: Layer, X: Array, Y: Array, *, epochs: int = 100, batch_size: int | None = None, lr: Rate = 1e-3,
    rng: np.random.Generator, log_every: int = 10, progress: bool = False,
    checkpoint: str | Path | Keeper | None = None, loss: Loss = mse, gradients: Gradients | None = backpropagate,
    steps: int | None = None, held_out: tuple[Array, Array] | None = None,
    report: Callable[[TrainingState], object] | None = None, schedule: Callable[[int], float] | None = None,
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
    epochs, log_every : int
        At least 1.
    batch_size : int, optional
        From 1 to n; by default 128, or n where there are fewer rows.
    lr : float, or mapping of str to float
        Adam's step length; or one for each ending of a parameter's name, as in `Adam`.
    rng : numpy.random.Generator
        Draws the batches, on the host: one seed, one order of batches on every device.
    progress : bool
        Whether to show a progress bar: in the notebook that runs this, or on stderr where that is a terminal.
    checkpoint : path or minilora.files.checkpoint.Checkpoint, optional
        A file that keeps the training's state after every epoch. Where it is there already, the training goes on from
        it and ends with the same bits as one that was never stopped; `rng` must come from the same seed. A training
        that is done can go on to more epochs.
    loss : callable
        ``loss(prediction, target) -> (loss, d_prediction)``, a mean over the targets: `mse` or `cross_entropy`.
    gradients : callable
        ``gradients(model, x, y, loss) -> grads``: another way to the gradients of the same loss, such as
        `minilora.fast.residual_form` for `mse`. None means `backpropagate`. An object that also has a method
        ``evaluate(model, X, Y, loss)``, as `minilora.fast.accumulate` returns one, measures the loss too.
    steps : int, optional
        Of an epoch, of no more than 2^31 - 1 rows; ``n // batch_size`` by default.
    held_out : (array, array), optional
        Inputs and targets, as X and Y, to measure the loss on; by default X and Y themselves.
    report : callable, optional
        ``report(state)``, called at the end of each epoch, after the checkpoint is written: the `TrainingState` has the
        number of epochs done and the history so far. What it raises ends the training.
    schedule : callable, optional
        ``schedule(t)``, the factor of lr in step t of all epochs, counted from 1, such as a
        `minilora.optim.Schedule`. A checkpoint knows it by its name, or its `repr`.

    Returns
    -------
    History
        The loss over all of X and Y, or of what is held out, every `log_every` epochs, and after the last.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit. Nothing has changed then. What `gradients` itself refuses, it
        refuses in the first step: then `rng` has moved, and nothing else.
    CheckpointError
        If the checkpoint is damaged, or of another configuration. Nothing has changed then.
    TrainingDiverged
        If a parameter is NaN or infinite at the end of an epoch, or a loss that is reported. The model keeps what the
        epoch left, and the checkpoint what the epoch before it left.

    Warns
    -----
    LossGrew
        If the loss ends a thousand times above where it began, and above that of a model that answers 0.
    """
    epochs, log_every = check_integer("epochs", epochs, at_least=1), check_integer("log_every", log_every, at_least=1)
    progress, gradients = check_flag("progress", progress), check_gradients(gradients)
    report = check_report(report)
    check_rng(rng)
    measured = check_training_data(model, X, Y, held_out, loss)
    batch_size, steps = check_batches(min(DEFAULT_ROWS, len(X)) if batch_size is None else batch_size, steps, len(X))
    if not model.trainable():
        raise ValueError(
            "model has nothing to train: all of it is frozen; put adapters beside its layers with minilora.adapt"
        )

    state = TrainingState(model, Adam(model.trainable(), lr=lr, schedule=schedule), rng)
    settings = {"batch_size": batch_size, "steps": steps, "log_every": log_every, "loss": name_of(loss)}
    if schedule is not None:
        settings["schedule"] = getattr(schedule, "__qualname__", repr(schedule))
    before = start_loss(model, *measured, loss)  # of the start, also where the training goes on
    keep = resume(checkpoint, state, epochs, settings, {"X": X, "Y": Y, "held_out": held_out})
    evaluating, last = evaluate_of(gradients), math.nan

    def measure(epoch: int) -> float:
        value = evaluating(model, *measured, loss)
        return check_loss(value, epoch, state, "X and Y" if held_out is None else "held_out")

    from .fast.gather import Batches  # for speed: X[rows] and Y[rows], each time in the same memory

    batch, asarray = Batches(X, Y, batch_size), backend_of(X).asarray
    tokens = steps * batch_size * math.prod(X.shape[1:]) if X.dtype.kind in "iu" else None  # in an epoch, of ids
    # NumPy's warnings about overflow would only repeat, less clearly, what TrainingDiverged is going to say.
    with np.errstate(over="ignore", invalid="ignore"), progress_bar(state.epoch, epochs, tokens, shown=progress) as bar:
        for epoch in range(state.epoch + 1, epochs + 1):
            for rows in asarray(draw_batches(rng, len(X), batch_size, steps)):  # draw
                x, y = batch(rows)
                # No name holds the gradients: they would stand beside the next step's.
                state.optimizer.step(gradients(model, x, y, loss))  # forward, backward, step
            check_parameters(state, epoch)
            if epoch % log_every == 0 or epoch == epochs:
                last = measure(epoch)  # report; before anything is kept, since it may be no number
            state.end(epoch, last if epoch % log_every == 0 else None)
            move(bar, state, tokens)
            keep(state)
            report(state)
        if epochs % log_every:  # not in a checkpoint: a training that goes on to more epochs does not log this one
            state.history.add(epochs, measure(epochs) if math.isnan(last) else last)
    warn_of_growth(before, last, state)
    return state.history


def resume(
    checkpoint: str | Path | Keeper | None, state: TrainingState, epochs: int, settings: Mapping[str, Any],
    data: Mapping[str, Any],
) -> Callable[[TrainingState], object]:  # fmt: skip
    """Put a training where its checkpoint left it. Return what keeps it from there on: without one, nothing."""
    if checkpoint is None:
        return nothing
    if not isinstance(checkpoint, Keeper):
        from .files.checkpoint import Checkpoint  # where a path is given: a training without one needs no files

        checkpoint = Checkpoint(checkpoint)
    checkpoint.resume(state, epochs, settings, data)
    return checkpoint.keep


def nothing(state: TrainingState) -> None:
    """Neither keep a training nor report it."""


@runtime_checkable
class Evaluator(Protocol):
    """Gradients that measure the loss as well, as `minilora.fast.accumulate` returns them."""

    def evaluate(self, model: Layer, X: Array, Y: Array, loss: Loss) -> float:
        """Return the loss over all of X and Y, as `evaluate` does."""


def evaluate_of(gradients: Gradients) -> Evaluate:
    """Return what measures the loss: the method `evaluate` of the gradients, where they have one; else `evaluate`."""
    return gradients.evaluate if isinstance(gradients, Evaluator) else evaluate


# --- the guards of its arguments ---


def check_gradients(gradients: Any) -> Gradients:
    """Return what computes the gradients, `backpropagate` for None, or refuse what does not take four arguments."""
    if gradients is None:
        return backpropagate
    if not callable(gradients):
        raise TypeError(f"gradients must be a function, gradients(model, x, y, loss), got {gradients!r}")
    try:
        signature = inspect.signature(gradients)
    except (TypeError, ValueError):  # a function without a signature, such as one written in C
        return gradients  # type: ignore[no-any-return]
    try:
        bound = signature.bind("model", "x", "y", "loss").arguments
        fourth = next((name for name, value in bound.items() if value == "loss"), "loss")
        if fourth != "loss" and signature.parameters[fourth].default is not inspect.Parameter.empty:
            raise TypeError(f"its {fourth!r} would be handed the loss")
    except TypeError as error:
        name = getattr(gradients, "__name__", type(gradients).__name__)
        message = f"gradients is called as gradients(model, x, y, loss), got {name}{signature}: {error}"
        raise TypeError(message) from None
    return gradients  # type: ignore[no-any-return]


def check_report(report: Any) -> Callable[[TrainingState], object]:
    """Return what is called at an epoch's end, `nothing` for None, or refuse what is no function."""
    if report is not None and not callable(report):
        raise TypeError(f"report must be a function, report(state), got {report!r}")
    return nothing if report is None else report


def check_batches(batch_size: Any, steps: Any, n: int) -> tuple[int, int]:
    """Return the rows of a batch and the batches of an epoch, or refuse more than there can be."""
    size = check_batch_size(batch_size, n)
    return size, check_integer("steps", n // size if steps is None else steps, at_least=1, at_most=MOST // size)


def name_of(loss: Loss) -> str:
    """Return what a checkpoint calls a loss."""
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))
