"""The training loop: draw a batch, forward, backward, step, and sometimes report.

    rows = batches(t)                                   draw      from all rows, or the next of a pass
    prediction, cache = model.forward(X[rows])          forward
    L, dy = loss(prediction, Y[rows])
    dx, grads = model.backward(dy, cache)               backward
    adam.step(grads)                                    step
    evaluate(model, X, Y, loss)                         report    every few epochs

The loop knows only the protocol `Layer`: anything with ``forward``, ``backward`` and ``trainable`` trains.
`minilora.batches` chooses the rows of a step, `minilora.state` has the state between epochs, `minilora.fitting` refuses
bad input before anything changes, and `minilora.watching` reports on the way.

The report is the loss over a data set, which may be larger than memory. A loss is a mean over targets. Cut the rows
into parts; let M be the number of all targets, M_p a part's number, and L_p its loss:

    L = sum_p (M_p / M) L_p
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .backend import backend_of, check_finite
from .batches import Passes, check_batches, draw_batches, rows_of_steps, take_rows
from .checks import Array, check_integer, check_rng
from .extras import requiring
from .fast.threads import check_workers, on_threads
from .fitting import check_data, check_functions, pair_of, trainable, try_out
from .gradients import Gradients, backpropagate
from .layer import Layer
from .losses import Loss, count, mse
from .optim import Adam, Rate
from .state import History, Keeper, TrainingState
from .texts import named
from .watching import LossGrew, TrainingDiverged, check_loss, check_parameters, first_loss, progress_bar, warn_of_growth

__all__ = [
    "History",
    "LossGrew",
    "Passes",
    "TrainingDiverged",
    "TrainingState",
    "backpropagate",
    "draw_batches",
    "evaluate",
    "train",
]

EVALUATION_ROWS = 512  # at the article's widths the temporaries stay in the CPU cache: 14 ms instead of 22


def train(
    model: Layer, X: Array, Y: Array, *, epochs: int = 100, batch_size: int | None = None, lr: Rate = 1e-3,
    rng: np.random.Generator, log_every: int = 10, progress: bool = False,
    checkpoint: str | Path | Keeper | None = None, loss: Loss = mse, gradients: Gradients | None = backpropagate,
    steps: int | None = None, held_out: tuple[Array, Array] | None = None,
    report: Callable[[TrainingState], object] | None = None, schedule: Callable[[int], float] | None = None,
    batches: Callable[[int], np.ndarray] | None = None,
    weight_decay: float = 0.0, max_grad_norm: float | None = None, max_steps: int | None = None,
) -> History:  # fmt: skip
    """Train a model in place to predict Y from X, with Adam.

    Each step draws its own batch without replacement from all rows. A row can therefore occur twice in an epoch, or not
    at all, as in the article. With ``batches=Passes(len(X), batch_size, seed)`` an epoch visits each row once.

    Parameters
    ----------
    model : Layer
        Only the arrays in ``model.trainable()`` are updated, in place.
    X : array, shape (n, ...)
        Inputs in the model's dtype and library, or token ids.
    Y : array, shape (n, ...)
        Targets for the loss.
    epochs : int
        The number of epochs, at least 1, unless `max_steps` is given.
    batch_size : int, optional
        The rows of a step, from 1 to n; by default 128, or n if there are fewer rows.
    lr : float, or mapping of str to float
        The learning rate, or one for each suffix of a parameter's name, as in `Adam`.
    rng : numpy.random.Generator
        Draws the batches, unless `batches` is given. It draws on the host, so one seed gives one order on every device.
    log_every : int
        Epochs, or with `max_steps` steps, between measured losses. A measurement takes as long as some steps.
    progress : bool
        Whether to show tqdm's progress bar, in a notebook or on stderr if it is a terminal.
    checkpoint : path or minilora.files.checkpoint.Checkpoint, optional
        A file for the training's state after every epoch. If it exists, the training resumes from it, and ends with the
        same bits as one that was never stopped; `rng` must come from the same seed. A completed training can be
        extended by more epochs.
    loss : callable
        ``loss(prediction, target) -> (loss, d_prediction)``, a mean over the targets: `mse` or `cross_entropy`.
    gradients : callable
        ``gradients(model, x, y, loss) -> grads``: another way to compute the gradients of the same loss, such as
        `minilora.fast.residual_form` for `mse`. None means `backpropagate`. If it has `workers`, like
        `minilora.fast.accumulate`, the loss is measured with as many; if it has a method
        ``evaluate(model, X, Y, loss)``, that measures the loss.
    steps : int, optional
        The steps of an epoch of at most 2^31 - 1 rows; by default ``n // batch_size``, or those of a pass.
    held_out : (array, array), optional
        Inputs and targets, like X and Y, to measure the loss on; by default X and Y themselves.
    report : callable, optional
        ``report(state)`` is called at the end of each epoch, after the checkpoint is written. The `TrainingState` has
        the number of completed epochs and the history. An exception that it raises stops the training.
    schedule : callable, optional
        ``schedule(t)``, the factor of lr in step t of all epochs, counted from 1, such as a
        `minilora.schedule.Schedule`. A checkpoint records its name or `repr`.
    batches : callable, optional
        ``batches(t)`` returns the row indices of step t over all epochs, counted from 1, at most `batch_size` of them,
        such as `minilora.training.Passes`, which has its own `batch_size`. A checkpoint records it too.
    weight_decay : float
        The decoupled weight decay, as in `Adam`.
    max_grad_norm : float, optional
        The largest norm of a step's gradient over all arrays; a larger one is clipped, as in `Adam`.
    max_steps : int, optional
        The number of steps, at least 1, instead of `epochs`. Then everything that is done after an epoch is done after
        each step, and the history counts steps.

    Returns
    -------
    History
        The loss over all of X and Y, or over the held-out data, every `log_every` epochs and after the last.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit. Nothing has changed then. `gradients` itself can only refuse in
        the first step, after `rng` has been used.
    CheckpointError
        If the checkpoint is damaged, or has another configuration. Nothing has changed then.
    TrainingDiverged
        If a parameter at the end of an epoch, or a reported loss, is NaN or infinite. The model keeps this epoch's
        arrays, the checkpoint those of the epoch before. The exception has the epoch, and the step after which the
        numbers were checked.

    Warns
    -----
    LossGrew
        If the loss exceeds its initial value ten times after the first epoch, or a thousand times at the end, and also
        that of a model that outputs 0.
    """
    epochs, log_every = check_integer("epochs", epochs, at_least=1), check_integer("log_every", log_every, at_least=1)
    max_steps = None if max_steps is None else check_integer("max_steps", max_steps, at_least=1)
    check_rng(rng)
    check_functions({"gradients(model, x, y, loss)": gradients, "report(state)": report, "batches(t)": batches})
    params, measured, name = trainable(model), (X, Y), "X and Y"
    try_out(model, X, Y, loss, params)
    if held_out is not None:
        measured, name = pair_of(held_out), "held_out"
        with named("held_out"):
            try_out(model, *measured, loss, params)
    batch_size, steps = check_batches(batch_size, steps, len(X), batches)
    if not params:
        raise ValueError("model has nothing to train: it is frozen; put adapters beside its layers with minilora.adapt")

    adam = Adam(params, lr=lr, schedule=schedule, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    # A round ends when the numbers are checked: after an epoch, or after each step if steps are counted.
    rounds, each, unit = (epochs, steps, "epoch") if max_steps is None else (max_steps, 1, "step")
    state, keeper = TrainingState(model, adam, rng, steps_of_epoch=steps, unit=unit), keeper_of(checkpoint)
    gradients = gradients or backpropagate
    few = rows_at_a_time(measured[1])
    some = measured[0][:few], measured[1][:few]
    before, last = first_loss(model, *some, loss), math.nan  # the initial loss, also of a resumed training
    if keeper is not None:
        settings = settings_of(adam, loss, batches, batch_size=batch_size, steps=each, log_every=log_every)
        keeper.resume(state, rounds, settings, {"X": X, "Y": Y, "held_out": held_out})
    backend = backend_of(X)
    measure = getattr(gradients, "evaluate", partial(loss_over, workers=getattr(gradients, "workers", None)))
    x, y = (backend.zeros((batch_size, *data.shape[1:]), data.dtype) for data in (X, Y))
    tokens = each * batch_size * math.prod(X.shape[1:]) if X.dtype.kind in "iu" else None  # the ids in a round

    def rows_of(number: int) -> Iterable[Array]:
        if batches is None:
            return backend.asarray(draw_batches(rng, len(X), batch_size, each))  # type: ignore[no-any-return]
        return rows_of_steps(batches, range((number - 1) * each + 1, number * each + 1), len(X), x, backend)

    bar: Any = progress_bar(state.epoch, rounds, tokens, unit) if progress else nullcontext()
    # NumPy's warnings about overflow would only repeat TrainingDiverged less clearly.
    with np.errstate(over="ignore", invalid="ignore"), bar:
        for number in range(state.epoch + 1, rounds + 1):
            for rows in rows_of(number):  # draw
                x_t, y_t = take_rows(X, rows, out=x[: len(rows)]), take_rows(Y, rows, out=y[: len(rows)])
                # No variable holds the gradients; they would overlap in memory with the next step's.
                adam.step(gradients(model, x_t, y_t, loss))  # forward, backward, step
            check_parameters(state, number)
            if number == 1 and 0 < before < (now := first_loss(model, *some, loss)) < math.inf:
                warn_of_growth(before, now, state, times=10)
            logged = number % log_every == 0
            if logged or number == rounds:  # report, before anything is stored, since the loss may not be finite
                last = check_loss(measure(model, *measured, loss), number, state, name)
            state.epoch = number
            if logged:
                state.history.add(number, last)
                if progress:
                    bar.set_postfix(loss=f"{last:.4g}", refresh=False)
            if progress:
                bar.update(tokens or 1)
            if keeper is not None:
                keeper.keep(state)
            if report is not None:
                report(state)
        if rounds % log_every:  # not in a checkpoint, since a training that is extended does not log this loss
            if math.isnan(last):  # all epochs were done before
                last = check_loss(measure(model, *measured, loss), rounds, state, name)
            state.history.add(rounds, last)
    warn_of_growth(before, last, state)
    return state.history


def settings_of(adam: Adam, loss: Loss, batches: Any, **settings: Any) -> dict[str, Any]:
    """Return the settings that must be equal to resume, in addition to the state and the data."""
    for name, function in {"loss": loss, "schedule": adam.schedule, "batches": batches}.items():
        if function is not None:
            other = type(function).__qualname__ if name == "loss" else repr(function)
            settings[name] = getattr(function, "__qualname__", other)
    return settings | {name: value for name in ("weight_decay", "max_grad_norm") if (value := getattr(adam, name))}


def keeper_of(checkpoint: str | Path | Keeper | None, settings: Mapping[str, Any] | None = None) -> Keeper | None:
    """Return the checkpoint of a training; for a path, a file whose settings must be equal to resume."""
    if checkpoint is None or isinstance(checkpoint, Keeper):
        return checkpoint
    with requiring("a checkpoint"):
        from .files.checkpoint import Checkpoint  # imported here, since a training without a checkpoint needs no files

    return Checkpoint(checkpoint, settings)


def evaluate(model: Layer, X: Array, Y: Array, loss: Loss = mse, workers: int | None = None) -> float:
    """Return the loss of a model over all of X and Y, computed `EVALUATION_ROWS` targets at a time in their dtype.

    X, Y and `loss` are as in `train`. `workers` parts are computed in parallel, each with one
    BLAS thread, as in `minilora.fast.accumulate`; the result has the same bits for any number. Data that do not fit the
    model or each other are a ValueError or a TypeError.
    """
    check_data(model, X, Y, loss, trainable(model))
    return loss_over(model, X, Y, loss, workers)


def loss_over(model: Layer, X: Array, Y: Array, loss: Loss, workers: int | None) -> float:
    """Return the loss over data that have been checked."""
    targets, height = count(Y), rows_at_a_time(Y)

    def share(start: int) -> Any:
        x, y = X[start : start + height], Y[start : start + height]
        return loss(model(x), y)[0] * (count(y) / targets)

    value = sum_of(share, range(0, len(X), height), workers, X)
    if not math.isfinite(value):  # the data's or the model's
        check_finite(**{name: a for name, a in {"X": X, "Y": Y}.items() if a.dtype.kind == "f"})
    return value


def rows_at_a_time(Y: Array) -> int:
    """Return how many rows of Y have `EVALUATION_ROWS` targets: each id is one, and so is each row of numbers."""
    return max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))


def sum_of(share: Callable[[Any], Any], parts: Iterable[Any], workers: int | None, x: Array) -> float:
    """Return the sum of ``share(part)`` in the parts' order, computing `workers` parts in parallel (NumPy only)."""
    running: Any = nullcontext(map(share, parts))
    if workers is not None:
        check_workers(workers, x)
        running = on_threads(share, parts, workers)
    total = 0.0
    with running as shares:
        for value in shares:
            total = total + value
    return float(total)
