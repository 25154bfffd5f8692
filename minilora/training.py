"""The loop: draw a batch, forward, backward, step; now and then, report.

    rows = draw_batches(rng, n, batch_size)             draw      each batch without replacement, from all rows
    prediction, cache = model.forward(X[rows])          forward
    L, dy = loss(prediction, Y[rows])
    dx, grads = model.backward(dy, cache)               backward
    adam.step(grads)                                    step
    evaluate(model, X, Y, loss)                         report    every so many epochs

It knows the protocol `Layer`, not the layers: whatever has ``forward``, ``backward`` and ``trainable`` trains.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from tqdm import tqdm

from .backend import all_finite, backend_of, check_finite
from .checks import (
    Array,
    check_array,
    check_features,
    check_flag,
    check_integer,
    check_kind,
    check_library,
    check_rng,
    check_shape,
    check_trainable,
)
from .fast.gather import Batches
from .layer import Layer, check_model
from .losses import IGNORED, Loss, count, mse
from .optim import Adam, Rate

__all__ = ["History", "TrainingDiverged", "TrainingState", "backpropagate", "draw_batches", "evaluate", "train"]

Gradients: TypeAlias = Callable[[Any, Array, Array, Loss], dict[str, Array]]

MOST = 2**31 - 1  # rows in an epoch, whose numbers are drawn at once
EVALUATION_ROWS = 512  # at a time: at the article's widths their temporaries stay in the cache, 14 ms in place of 22


@dataclass
class History:
    """The loss over the whole data set, or over what is held out, as training went on."""

    epochs: list[int] = field(default_factory=list)  # after which the loss was measured, counted from 1
    losses: list[float] = field(default_factory=list)  # the loss measured after each of them

    def add(self, epoch: int, loss: float) -> None:
        """Note the loss after an epoch."""
        self.epochs.append(epoch)
        self.losses.append(loss)


class TrainingDiverged(ArithmeticError):
    """Training met a number that is NaN or infinite. The model keeps what the epoch left."""

    epoch: int  # the epoch in which it happened, counted from 1
    step: int  # 0: the numbers are looked at when the epoch ends

    def __init__(self, message: str, epoch: int = 0, step: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


@dataclass
class TrainingState:
    """Everything that the next epoch depends on, besides the data."""

    model: Layer  # its trainable arrays are the optimizer's
    optimizer: Adam  # with its running means and its count of steps
    rng: np.random.Generator  # draws the batches
    history: History = field(default_factory=History)  # the losses so far
    epoch: int = 0  # the number of epochs done


@runtime_checkable
class Keeper(Protocol):
    """What keeps a training's state between two epochs, as `minilora.files.checkpoint.Checkpoint` does."""

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put a training of `epochs` epochs where it was left, or keep its start. What does not fit is refused."""

    def keep(self, state: TrainingState) -> None:
        """Keep where a training stands after an epoch."""


def backpropagate(model: Layer, x: Array, y: Array, loss: Loss = mse) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)`` at what trains: forward, the loss, backward."""
    prediction, cache = model.forward(x)
    _, d_prediction = loss(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads


def train(
    model: Layer, X: Array, Y: Array, *, epochs: int = 100, batch_size: int = 128, lr: Rate = 1e-3,
    rng: np.random.Generator, log_every: int = 10, progress: bool = False,
    checkpoint: str | Path | Keeper | None = None, loss: Loss = mse, gradients: Gradients | None = backpropagate,
    steps: int | None = None, held_out: tuple[Array, Array] | None = None,
    report: Callable[[TrainingState], object] | None = None,
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
        Whether to show a progress bar: in the notebook that runs this, or on stderr where that is a terminal.
    checkpoint : path or minilora.files.checkpoint.Checkpoint, optional
        A file that keeps the training's state after every epoch. Where it is there already, the training goes on from
        it and ends with the same bits as one that was never stopped; `rng` must come from the same seed. A training
        that is done can go on to more epochs.
    loss : callable
        ``loss(prediction, target) -> (loss, d_prediction)``, a mean over the targets: `mse` or `cross_entropy`.
    gradients : callable
        ``gradients(model, x, y, loss) -> grads``: another way to the gradients of the same loss, such as
        `minilora.fast.residual_form` for `mse`. None means `backpropagate`.
    steps : int, optional
        Of an epoch, of no more than 2^31 - 1 rows; ``n // batch_size`` by default.
    held_out : (array, array), optional
        Inputs and targets, as X and Y, to measure the loss on; by default X and Y themselves.
    report : callable, optional
        ``report(state)``, called at the end of each epoch, after the checkpoint is written: the `TrainingState` has the
        number of epochs done and the history so far. What it raises ends the training.

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
    """
    epochs, log_every = check_integer("epochs", epochs, at_least=1), check_integer("log_every", log_every, at_least=1)
    n, gradients = check_data(model, X, Y, loss, every_id=True), check_gradients(gradients)
    batch_size, progress = check_batch_size(batch_size, n), check_flag("progress", progress)
    steps = check_integer("steps", n // batch_size if steps is None else steps, at_least=1, at_most=MOST // batch_size)
    check_rng(rng)
    if report is not None and not callable(report):
        raise TypeError(f"report must be a function, report(state), got {report!r}")
    check_finite(X=X, Y=Y)
    measured = (X, Y) if held_out is None else check_held_out(model, held_out, loss)

    optimizer = Adam(model.trainable(), lr=lr)
    state = TrainingState(model, optimizer, rng)
    if checkpoint is not None and not isinstance(checkpoint, Keeper):
        from .files.checkpoint import Checkpoint  # above training: only a path asks for it

        checkpoint = Checkpoint(checkpoint)
    if checkpoint is not None:
        name = getattr(loss, "__qualname__", type(loss).__qualname__)
        settings = {"batch_size": batch_size, "steps": steps, "log_every": log_every, "loss": name}
        checkpoint.resume(state, epochs, settings, {"X": X, "Y": Y, "held_out": held_out})

    def measure(epoch: int) -> float:
        value = evaluate(model, *measured, loss, getattr(gradients, "workers", None))
        check_loss(value, epoch, state, "X and Y" if held_out is None else "held_out")
        return value

    batch, asarray, value = Batches(X, Y, batch_size), backend_of(X).asarray, math.nan
    tokens = steps * batch_size * math.prod(X.shape[1:]) if X.dtype.kind in "iu" else None
    bar = progress_bar(state.epoch, epochs, tokens, shown=progress)
    # NumPy's warnings about overflow would only repeat, less clearly, what TrainingDiverged is going to say.
    with np.errstate(over="ignore", invalid="ignore"), bar:
        for epoch in range(state.epoch + 1, epochs + 1):
            for rows in asarray(draw_batches(rng, n, batch_size, steps)):  # draw
                x, y = batch(rows)
                # No name holds the gradients: they would stand beside the next step's.
                optimizer.step(gradients(model, x, y, loss))  # forward, backward, step
            check_parameters(state, epoch)
            if epoch % log_every == 0 or epoch == epochs:
                value = measure(epoch)  # before anything is kept: it may be no number
            state.epoch = epoch
            if epoch % log_every == 0:
                state.history.add(epoch, value)  # report
                bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            bar.update(tokens or 1)
            if checkpoint is not None:
                checkpoint.keep(state)
            if report is not None:
                report(state)
        if epochs % log_every:  # not in a checkpoint: a training that goes on to more epochs does not log this one
            state.history.add(epochs, measure(epochs) if math.isnan(value) else value)
    return state.history


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (steps, batch_size), each batch drawn afresh."""
    batches = np.empty((n // batch_size if steps is None else steps, batch_size), np.int64)
    for batch in batches:
        batch[...] = rng.choice(n, batch_size, replace=False, shuffle=False)
    return batches


def evaluate(model: Layer, X: Array, Y: Array, loss: Loss = mse, workers: int | None = None) -> float:
    """Return the loss of a model over all of X and Y, computed `EVALUATION_ROWS` targets at a time in their dtype.

    X, Y and `loss` are as in `train`. With `workers`, so many of these parts are computed at once, each with one BLAS
    thread, as `minilora.fast.accumulate` does it: the same bits with any number. Data that do not fit the model or each
    other are a ValueError or a TypeError.
    """
    n, total, whole = check_data(model, X, Y, loss), 0.0, count(Y)
    height = max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))

    def share(start: int) -> Any:
        x, y = X[start : start + height], Y[start : start + height]
        return loss(model(x), y)[0] * (count(y) / whole)

    found: Any = nullcontext(map(share, range(0, n, height)))
    if workers is not None:
        from .fast.threads import check_workers, on_threads  # a training by the page has nothing to do with threads

        check_workers(workers, X)
        found = on_threads(share, range(0, n, height), workers)
    with found as shares:
        for part in shares:
            total = total + part
    return float(total)


def progress_bar(done: int, epochs: int, tokens: int | None, *, shown: bool) -> Any:
    """Return tqdm's bar over the epochs, of which some are done. It counts tokens, where an epoch has so many.

    In a notebook it shows itself there; elsewhere on stderr, if that is a terminal.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    bar: Any = tqdm
    if in_notebook:
        with warnings.catch_warnings():  # without ipywidgets it is a line of text, and says so
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm as bar
    size, unit = (tokens, "token") if tokens else (1, "epoch")
    hidden = None if shown and not in_notebook else not shown  # None: where stderr is no terminal
    return bar(initial=done * size, total=epochs * size, disable=hidden, unit=unit, unit_scale=bool(tokens))


def check_parameters(state: TrainingState, epoch: int) -> None:
    """Refuse to go on where a parameter holds NaN or infinity. Asked once an epoch: asking waits for the device."""
    params = state.optimizer.params
    if all_finite(list(params.values())):
        return
    bad = [name for name, p in params.items() if not all_finite([p])]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    raise TrainingDiverged(
        f"epoch {epoch}: {', '.join(bad[:3])}{more} is no longer finite, {_last_loss(state)}. The model keeps what the "
        f"epoch left. Either lr = {state.optimizer.lr} is too large, or X or Y is not finite",
        epoch,
    )


def check_loss(value: float, epoch: int, state: TrainingState, data: str) -> None:
    """Refuse to go on where the loss that is to be reported is NaN or infinite."""
    if not math.isfinite(value):
        message = f"the loss over all of {data} is {value} after epoch {epoch}, {_last_loss(state)}"
        raise TrainingDiverged(f"{message}. The model keeps what the epoch left", epoch)


def _last_loss(state: TrainingState) -> str:
    """Say which finite loss was the last one reported."""
    history = state.history
    if not history.losses:
        return "and no loss was reported before"
    return f"and the last loss reported was {history.losses[-1]:.7g} after epoch {history.epochs[-1]}"


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
        given = signature.bind("model", "x", "y", "loss").arguments
        fourth = next((name for name, value in given.items() if value == "loss"), "loss")
        if fourth != "loss" and signature.parameters[fourth].default is not inspect.Parameter.empty:
            raise TypeError(f"its {fourth!r} would be handed the loss")
    except TypeError as error:
        name = getattr(gradients, "__name__", type(gradients).__name__)
        message = f"gradients is called as gradients(model, x, y, loss), got {name}{signature}: {error}"
        raise TypeError(message) from None
    return gradients  # type: ignore[no-any-return]


def check_data(model: Any, X: Array, Y: Array, loss: Loss, *, every_id: bool = False) -> int:
    """Return the number of rows of X and Y, or refuse data that a model or a loss cannot take, or not together.

    It tries the first row; with `every_id`, also the rows that hold the smallest and the largest id. Ids on a GPU are
    not looked at.
    """
    if isinstance(model, type) or not hasattr(model, "trainable"):
        check_model(model)
    if not callable(loss):
        raise TypeError(f"loss must be a function such as minilora.mse, got {loss!r}")
    like = next(iter(model.trainable().values()), None)
    for name, data in {"X": X, "Y": Y}.items():
        check_kind(name, data)
        if data.dtype.kind not in "iu":
            check_array(name, data, like)
            check_trainable(name, data, like)
        elif like is not None:
            check_library(name, data, like, "the layer")
    widths: list[Any] = [getattr(model, width, None) for width in ("in_features", "out_features")]
    if X.dtype.kind == "f" and widths[0] is not None:
        check_features("X", X, widths[0], "in_features", like)
    if X.shape == () or X.shape[0] == 0 or (X.dtype.kind == "f" and len(X.shape) < 2):
        raise ValueError(f"X has shape {tuple(X.shape)}, expected (n, ..., in) with at least one row")
    if Y.shape[:1] != X.shape[:1]:
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected {X.shape[0]} rows as X has")
    if Y.dtype.kind in "iu" and not bool((Y != IGNORED).any()):
        raise ValueError(f"Y has no target that counts: all of them are {IGNORED}")
    if X.dtype.kind == Y.dtype.kind == "f" and None not in widths:
        check_shape("Y", Y, (*X.shape[:-1], widths[1]))
    with np.errstate(all="ignore"):
        loss(model(X[:1]), Y[:1])
        for row in _rows_of_extremes(X) | _rows_of_extremes(Y, ignored=IGNORED) if every_id else ():
            try:
                loss(model(X[row : row + 1]), Y[row : row + 1])
            except ValueError as error:
                raise ValueError(f"row {row} of X and Y: {error}") from None
    rows: int = X.shape[0]
    return rows


def _rows_of_extremes(ids: Array, ignored: int | None = None) -> set[int]:
    """Return the rows that hold the smallest and the largest id; no rows where the data are no ids, or on a GPU."""
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or not ids.size:
        return set()
    counted = ids if ignored is None else np.where(ids == ignored, ids.max(), ids)
    return {int(place) // (ids.size // len(ids)) for place in (counted.argmin(), ids.argmax())}


def check_held_out(model: Any, held_out: Any, loss: Loss) -> tuple[Array, Array]:
    """Return held-out inputs and targets, or refuse those that a model or a loss cannot take."""
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be two arrays, inputs and targets, got {type(held_out).__name__}")
    try:
        check_data(model, *held_out, loss, every_id=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"held_out: {error}") from None
    check_finite(**{"held_out[0]": held_out[0], "held_out[1]": held_out[1]})
    return held_out


def check_batch_size(batch_size: Any, n: int, of: str = "X") -> int:
    """Return the batch size as an int, or refuse one that is not between 1 and the number of rows."""
    size = check_integer("batch_size", batch_size, at_least=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of {of}, got {size}")
    return size
