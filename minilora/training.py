"""The loop: draw a batch, forward, backward, step; now and then, report.

The loop knows the protocol `Layer`, not the layers: whatever has `forward`, `backward` and `trainable` trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from .backend import all_finite, backend_of, take_rows
from .checks import Array, check_array, check_features, check_integer, check_rng, check_shape, check_trainable
from .files.checkpoint import describe, keep, resume
from .losses import mse
from .optim import Adam

EVALUATION_ROWS = 512
"""Rows whose loss is computed at a time, so that data larger than memory can be evaluated.

At the article's widths a block's temporaries stay in the cache: an adapter's loss over 10,000 rows takes 14 ms, and
22 ms in blocks of 1024 or 4096. A full-rank layer's takes as long either way."""


class Layer(Protocol):
    """What `train` asks of a model.

    A layer may also have ``mse_gradients(x, target) -> grads``, a shorter way to the gradients that
    ``backward`` would give for the mean squared error; `train` takes it where it is offered.
    """

    @property
    def in_features(self) -> int:
        """Width of the input."""

    @property
    def out_features(self) -> int:
        """Width of the output."""

    def trainable(self) -> dict[str, Array]:
        """Return the arrays to update, by name."""

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the output, and what `backward` needs."""

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return the gradients at the input and, under the names of `trainable`, at the weights."""

    def __call__(self, x: Array) -> Array:
        """Return the output alone."""


@dataclass
class History:
    """The loss over the whole data set, as training went on.

    Attributes
    ----------
    epochs : list of int
        The epochs after which the loss was measured, counted from 1.
    losses : list of float
        The loss measured after each of them.
    """

    epochs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class TrainingDiverged(ArithmeticError):
    """Training met a number that is NaN or infinite; the model has been left at its last finite parameters.

    Attributes
    ----------
    epoch, step : int
        Where it happened, counted from 1; step 0 is the loss measured at the end of an epoch.
    """

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


def evaluate(model: Layer, X: Array, Y: Array) -> float:
    """Return the mean squared error of the model over all of X and Y.

    Parameters
    ----------
    model : Layer
        Any layer.
    X : array, shape (n, ..., in)
        Inputs.
    Y : array, shape (n, ..., out)
        Targets.

    Returns
    -------
    float
        Computed a block of rows at a time, in the dtype of the arrays.

    Raises
    ------
    ValueError, TypeError
        If X or Y does not fit the model or each other.
    """
    _check_data(model, X, Y)
    n, total = X.shape[0], 0.0
    for start in range(0, n, EVALUATION_ROWS):
        block = slice(start, start + EVALUATION_ROWS)
        loss, _ = mse(model(X[block]), Y[block])
        total = total + loss * (X[block].shape[0] / n)
    return float(total)


def train(
    model: Layer,
    X: Array,
    Y: Array,
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    rng: np.random.Generator,
    log_every: int = 10,
    progress: bool = False,
    checkpoint: str | Path | None = None,
) -> History:
    """Train a model in place to predict Y from X, with Adam on the mean squared error.

    Each step draws its own batch without replacement from all the rows; an epoch is ``n // batch_size`` steps. A row
    can therefore come up twice in an epoch, or not at all, as in the article.

    Parameters
    ----------
    model : Layer
        The arrays in ``model.trainable()`` are updated in place, and no other.
    X : array, shape (n, ..., in)
        Inputs, of the model's dtype and library.
    Y : array, shape (n, ..., out)
        Targets.
    epochs, batch_size, log_every : int
        At least 1, batch_size at most n.
    lr : float
        Adam's step length.
    rng : numpy.random.Generator
        Draws the batches, on the host: one seed, one order of batches on every device.
    progress : bool
        Whether to show a progress bar on stderr, where that is a terminal.
    checkpoint : path, optional
        A file that keeps the training's state after every epoch. Where it is there already the training goes on from
        it, and ends with the same bits as one that was never stopped; `rng` must come from the same seed. A training
        that is done can go on to more epochs.

    Returns
    -------
    History
        The loss over all of X and Y every `log_every` epochs, and after the last.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit. Nothing has changed then.
    CheckpointError
        If the checkpoint is damaged, or of another configuration. Nothing has changed then.
    TrainingDiverged
        If a number became NaN or infinite. The model is left at its last finite parameters.
    """
    _check_data(model, X, Y)
    epochs = check_integer("epochs", epochs, at_least=1)
    log_every = check_integer("log_every", log_every, at_least=1)
    batch_size = check_integer("batch_size", batch_size, at_least=1)
    n = X.shape[0]
    if batch_size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of X, got {batch_size}")
    check_rng(rng)
    _check_finite({"X": X, "Y": Y})

    optimizer = Adam(model.trainable(), lr=lr)
    loop = _Loop(model, optimizer, X, Y, batch_size)
    history, done = History(), 0
    if checkpoint is not None:
        configuration = describe(loop, rng, batch_size, log_every)
        done = resume(checkpoint, loop, rng, history, configuration, epochs)
        if done == 0:
            keep(checkpoint, loop, rng, 0, history, configuration)  # better that it fails now than after an epoch
    bar = tqdm(
        range(done + 1, epochs + 1), initial=done, total=epochs, unit="epoch", disable=None if progress else True
    )
    # NumPy's warnings about overflow would only repeat, less clearly, what TrainingDiverged is going to say.
    with np.errstate(over="ignore", invalid="ignore"), bar:
        for epoch in bar:
            batches = draw_batches(rng, n, batch_size)
            loop.run(batches, epoch)
            if epoch % log_every == 0:
                bar.set_postfix(loss=f"{loop.record(history, epoch):.4g}")
            if checkpoint is not None:
                keep(checkpoint, loop, rng, epoch, history, configuration)
        # Not in a checkpoint: a training that goes on to more epochs does not log this one.
        if epochs % log_every:
            loop.record(history, epochs)
    return history


def draw_batches(rng: np.random.Generator, n: int, batch_size: int) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (n // batch_size, batch_size), each batch drawn afresh."""
    return np.stack([rng.choice(n, batch_size, replace=False, shuffle=False) for _ in range(n // batch_size)])


def gradients(model: Layer, x: Array, y: Array) -> dict[str, Array]:
    """Return the gradients of ``mse(model(x), y)`` at the model's trainable arrays."""
    shortcut = getattr(model, "mse_gradients", None)
    if shortcut is not None:
        # A step of an adapter takes 0.19 ms with it and 0.32 ms without, one of a `LoRALinear` 0.29 ms and 2.0 ms.
        return shortcut(x, y)  # type: ignore[no-any-return]
    prediction, cache = model.forward(x)
    _, d_prediction = mse(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads


class _Loop:
    """The steps of an epoch, and the way back from one that went wrong."""

    def __init__(self, model: Layer, optimizer: Adam, X: Array, Y: Array, batch_size: int) -> None:
        self.model, self.optimizer, self.X, self.Y = model, optimizer, X, Y
        self.backend = backend_of(X)
        self.x = self.backend.zeros((batch_size, *X.shape[1:]), X.dtype)
        self.y = self.backend.zeros((batch_size, *Y.shape[1:]), Y.dtype)

    def step(self, rows: Array) -> None:
        x = take_rows(self.X, rows, out=self.x)
        y = take_rows(self.Y, rows, out=self.y)
        self.optimizer.step(gradients(self.model, x, y))

    def run(self, batches: np.ndarray, epoch: int) -> None:
        """Take an epoch's steps. Whether all stayed finite is asked once, at its end: asking waits for the device."""
        start = self.copy_state()
        on_device = self.backend.asarray(batches)
        for rows in on_device:
            self.step(rows)
        if not self.is_finite():
            self.restore_state(start)
            self.replay(on_device, epoch)

    def replay(self, batches: Array, epoch: int) -> None:
        """Take the same steps again, each one checked, up to the one that went wrong."""
        for step, rows in enumerate(batches, start=1):
            before = self.copy_state()
            self.step(rows)
            if not self.is_finite():
                bad = ", ".join(name for name, p in self.optimizer.params.items() if not all_finite([p]))
                self.restore_state(before)
                raise TrainingDiverged(
                    f"epoch {epoch}, step {step} of {len(batches)}: {bad} is no longer finite. The model is left as it "
                    f"was before that step. Either lr = {self.optimizer.lr:g} is too large, or X or Y is not finite",
                    epoch,
                    step,
                )

    def record(self, history: History, epoch: int) -> float:
        """Measure the loss over all of the data, and write it down."""
        loss = evaluate(self.model, self.X, self.Y)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss over all of X and Y is {loss} after epoch {epoch}", epoch, 0)
        history.epochs.append(epoch)
        history.losses.append(loss)
        return loss

    def is_finite(self) -> bool:
        return all_finite(list(self.optimizer.params.values()))

    def copy_state(self) -> tuple[dict[str, Array], dict[str, Any]]:
        return {name: p.copy() for name, p in self.optimizer.params.items()}, self.optimizer.state_dict()

    def restore_state(self, state: tuple[Mapping[str, Array], Mapping[str, Any]]) -> None:
        params, moments = state
        for name, p in self.optimizer.params.items():
            p[...] = params[name]
        self.optimizer.load_state_dict(moments)


def _check_data(model: Layer, X: Array, Y: Array) -> None:
    """Refuse data that the model cannot take, before the first step is taken."""
    if not hasattr(model, "trainable"):
        raise TypeError(f"model must be a layer such as LoRALinear, got {type(model).__name__}")
    like = next(iter(model.trainable().values()), None)
    check_features("X", X, model.in_features, "in_features", like)
    check_array("Y", Y, like)
    if X.ndim < 2 or X.shape[0] == 0:
        raise ValueError(f"X has shape {tuple(X.shape)}, expected (n, ..., in) with at least one row")
    check_shape("Y", Y, (*X.shape[:-1], model.out_features))


def _check_finite(data: Mapping[str, Array]) -> None:
    """Refuse data that is not of real numbers, or not finite. A file is not read twice for this."""
    for name, d in data.items():
        check_trainable(name, d)
    ends = {name: [d.min(), d.max()] for name, d in data.items() if not isinstance(d, np.memmap)}
    if all_finite([end for pair in ends.values() for end in pair]):  # the usual case waits for the device once
        return
    name = next(name for name, pair in ends.items() if not all_finite(pair))
    raise ValueError(f"{name} holds NaN or infinity: {_first_bad(data[name])}")


def _first_bad(data: Array) -> str:
    """Say where the first NaN or infinity stands."""
    host = backend_of(data).to_numpy(data)
    at = np.argwhere(~np.isfinite(host))[0]
    return f"entry {tuple(int(i) for i in at)} is {host[tuple(at)]}"
