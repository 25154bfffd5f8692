"""The loop: draw a batch, forward, backward, step; now and then, report.

    rows = batches(t)                                   draw      afresh from all rows, or the next of a pass
    prediction, cache = model.forward(X[rows])          forward
    L, dy = loss(prediction, Y[rows])
    dx, grads = model.backward(dy, cache)               backward
    adam.step(grads)                                    step
    evaluate(model, X, Y, loss)                         report    every so many epochs

A pass goes through all n rows, b at a time, each row once; the last step of a pass takes the rows that are left:

    S = ceil(n / b)                        steps of a pass
    p, k = divmod(t - 1, S)                step t, counted from 1, is the k-th of pass p
    order_p = permutation of 0 ... n - 1   drawn from the seed and p alone
    rows_t  = order_p[k b : (k + 1) b]

So a training that goes on after a stop needs only the seed and a step's number. The article draws each batch from all
rows, without replacement in the batch: of many rows, 1/e or 37 % do not come up in n / b steps.

The loop knows the protocol `Layer`, not the layers: whatever has ``forward``, ``backward`` and ``trainable`` trains.

The report is the loss over a data set, which may be larger than memory. A loss is a mean over targets. Cut the rows
into parts; let M be the number of all targets, M_p a part's, L_p its loss:

    L = sum_p (M_p / M) L_p
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from .backend import Backend, all_finite, backend_of, check_finite
from .checks import (
    Array,
    check_integer,
    check_kind,
    check_library,
    check_rng,
    check_shape,
    check_trainable,
    named,
    needed,
)
from .extras import requiring
from .layer import Layer, check_model, walk
from .layers.embedding import Embedding
from .losses import IGNORED, Loss, count, mse
from .optim import Adam, Rate

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

Gradients: TypeAlias = Callable[[Any, Array, Array, Loss], dict[str, Array]]
"""Of ``(model, x, y, loss)``: the gradients at what trains, by name."""

DEFAULT_ROWS = 128  # of a batch
MOST = 2**31 - 1  # rows in an epoch, whose numbers are drawn at once
EVALUATION_ROWS = 512  # at a time: at the article's widths their temporaries stay in the cache, 14 ms in place of 22
GROWTH = 1000  # times above where it began: a loss that ends there has grown


def take_rows(data: Array, rows: Array, out: Array) -> Array:
    """Return the rows with those numbers, on a CPU in the array `out`."""
    if isinstance(data, np.ndarray):
        # The system hands out new memory page by page: with new arrays for each batch, an adapter's step on 512 rows of
        # 1001 takes half as long again. Without mode="clip" NumPy copies once more; no number here is out of range.
        return np.take(data, rows, axis=0, out=out, mode="clip")
    return data[rows]  # a GPU's library keeps a pool of memory


def backpropagate(model: Layer, x: Array, y: Array, loss: Loss = mse) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)`` at what trains: forward, the loss, backward."""
    prediction, cache = model.forward(x)
    _, d_prediction = loss(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads


def train(
    model: Layer, X: Array, Y: Array, *, epochs: int = 100, batch_size: int | None = None, lr: Rate = 1e-3,
    rng: np.random.Generator, log_every: int = 10, progress: bool = False,
    checkpoint: str | Path | Keeper | None = None, loss: Loss = mse, gradients: Gradients | None = backpropagate,
    steps: int | None = None, held_out: tuple[Array, Array] | None = None,
    report: Callable[[TrainingState], object] | None = None, schedule: Callable[[int], float] | None = None,
    batches: Callable[[int], np.ndarray] | None = None,
    weight_decay: float = 0.0, max_grad_norm: float | None = None,
) -> History:  # fmt: skip
    """Train a model in place to predict Y from X, with Adam.

    Each step draws its own batch without replacement from all the rows. A row can therefore come up twice in an epoch,
    or not at all, as in the article. With ``batches=Passes(len(X), batch_size, seed)`` an epoch is a pass through all
    rows, each once.

    Parameters
    ----------
    model : Layer
        The arrays in ``model.trainable()`` are updated in place, and no other.
    X : array, shape (n, ...)
        Inputs, of the model's dtype and library; or token ids.
    Y : array, shape (n, ...)
        Targets, as the loss takes them.
    epochs : int
        How long: at least 1.
    batch_size : int, optional
        The rows of a step, from 1 to n; by default 128, or n where there are fewer rows.
    lr : float, or mapping of str to float
        Adam's step length; or one for each ending of a parameter's name, as in `Adam`.
    rng : numpy.random.Generator
        Draws the batches, unless `batches` says which, on the host: one seed, one order of batches on every device.
    log_every : int
        Epochs from one measured loss to the next: to measure it takes as long as some steps.
    progress : bool
        Whether to show tqdm's progress bar: in the notebook that runs this, or on stderr where that is a terminal.
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
        Of an epoch, of no more than 2^31 - 1 rows; by default ``n // batch_size``, or those of a pass.
    held_out : (array, array), optional
        Inputs and targets, as X and Y, to measure the loss on; by default X and Y themselves.
    report : callable, optional
        ``report(state)``, called at the end of each epoch, after the checkpoint is written: the `TrainingState` has the
        number of epochs done and the history so far. What it raises ends the training.
    schedule : callable, optional
        ``schedule(t)``, the factor of lr in step t of all epochs, counted from 1, such as a
        `minilora.schedule.Schedule`. A checkpoint knows it by its name, or its `repr`.
    batches : callable, optional
        ``batches(t)``, the row numbers of step t of all epochs, counted from 1, at most `batch_size` of them: a
        `minilora.training.Passes`, which brings its own `batch_size`. A checkpoint knows it as a schedule.
    weight_decay : float
        How much smaller each number becomes in a step, as a share of lr, as in `Adam`.
    max_grad_norm : float, optional
        How long a step's gradient may be, over all arrays; a longer one is shortened, as in `Adam`.

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
        If the loss is ten times above where it began after the first epoch, or a thousand times at the end, and above
        that of a model that answers 0.
    """
    epochs, log_every = check_integer("epochs", epochs, at_least=1), check_integer("log_every", log_every, at_least=1)
    check_rng(rng)
    check_functions({"gradients(model, x, y, loss)": gradients, "report(state)": report, "batches(t)": batches})
    params, measured = trainable(model), (X, Y)
    try_out(model, X, Y, loss, params)
    if held_out is not None:
        measured = pair_of(held_out)
        with named("held_out"):
            try_out(model, *measured, loss, params)
    batch_size, steps = check_batches(batch_size, steps, len(X), batches)
    if not params:
        raise ValueError(
            "model has nothing to train: all of it is frozen; put adapters beside its layers with minilora.adapt"
        )

    adam = Adam(params, lr=lr, schedule=schedule, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    state, last = TrainingState(model, adam, rng), math.nan
    before = first_loss(model, *measured, loss)  # of the start, also where the training goes on
    settings: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "log_every": log_every}
    settings["loss"] = getattr(loss, "__qualname__", type(loss).__qualname__)
    for name, function in {"schedule": schedule, "batches": batches}.items():
        if function is not None:
            settings[name] = getattr(function, "__qualname__", repr(function))
    settings |= {name: value for name in ("weight_decay", "max_grad_norm") if (value := getattr(adam, name))}
    keeper = keeper_of(checkpoint)
    if keeper is not None:
        keeper.resume(state, epochs, settings, {"X": X, "Y": Y, "held_out": held_out})
    gradients, backend = gradients or backpropagate, backend_of(X)
    x, y = (backend.zeros((batch_size, *data.shape[1:]), data.dtype) for data in (X, Y))
    measure, data = getattr(gradients, "evaluate", evaluate), "X and Y" if held_out is None else "held_out"
    tokens = steps * batch_size * math.prod(X.shape[1:]) if X.dtype.kind in "iu" else None  # in an epoch, of ids
    # NumPy's warnings about overflow would only repeat, less clearly, what TrainingDiverged is going to say.
    bar: Any = progress_bar(state.epoch, epochs, tokens) if progress else nullcontext()
    with np.errstate(over="ignore", invalid="ignore"), bar:
        for epoch in range(state.epoch + 1, epochs + 1):
            if batches is None:
                drawn = backend.asarray(draw_batches(rng, len(X), batch_size, steps))  # draw
            else:
                drawn = rows_of_steps(batches, range((epoch - 1) * steps + 1, epoch * steps + 1), len(X), x, backend)
            for rows in drawn:
                x_t, y_t = take_rows(X, rows, out=x[: len(rows)]), take_rows(Y, rows, out=y[: len(rows)])
                # No name holds the gradients: they would stand beside the next step's.
                state.optimizer.step(gradients(model, x_t, y_t, loss))  # forward, backward, step
            check_parameters(state, epoch)
            if epoch == 1 and 0 < before < (now := first_loss(model, *measured, loss)) < math.inf:
                warn_of_growth(before, now, state, times=10)
            logged = epoch % log_every == 0
            if logged or epoch == epochs:  # report; before anything is kept, since it may be no number
                last = check_loss(measure(model, *measured, loss), epoch, state, data)
            state.epoch = epoch
            if logged:
                state.history.add(epoch, last)
                if progress:
                    bar.set_postfix(loss=f"{last:.4g}", refresh=False)
            if progress:
                bar.update(tokens or 1)
            if keeper is not None:
                keeper.keep(state)
            if report is not None:
                report(state)
        if epochs % log_every:  # not in a checkpoint: a training that goes on to more epochs does not log this one
            if math.isnan(last):  # all epochs were done before
                last = check_loss(measure(model, *measured, loss), epochs, state, data)
            state.history.add(epochs, last)
    warn_of_growth(before, last, state)
    return state.history


def evaluate(model: Layer, X: Array, Y: Array, loss: Loss = mse, workers: int | None = None) -> float:
    """Return the loss of a model over all of X and Y, computed `EVALUATION_ROWS` targets at a time in their dtype.

    X, Y and `loss` are as in `train`. With `workers`, so many of these parts are computed at once, each with one BLAS
    thread, as `minilora.fast.accumulate` does it: the same bits with any number. Data that do not fit the model or each
    other are a ValueError or a TypeError.
    """
    check_data(model, X, Y, loss, trainable(model))
    targets, height = count(Y), rows_at_a_time(Y)

    def share(start: int) -> Any:
        x, y = X[start : start + height], Y[start : start + height]
        return loss(model(x), y)[0] * (count(y) / targets)

    value = sum_of(share, range(0, len(X), height), workers, X)
    if not math.isfinite(value):  # of the data, or of the model
        check_finite(**{name: a for name, a in {"X": X, "Y": Y}.items() if a.dtype.kind == "f"})
    return value


def rows_at_a_time(Y: Array) -> int:
    """Return how many rows of Y have `EVALUATION_ROWS` targets: of ids each is one, and of numbers each row."""
    return max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))


def sum_of(share: Callable[[Any], Any], parts: Iterable[Any], workers: int | None, x: Array) -> float:
    """Return the sum of ``share(part)``, in the parts' order. With `workers`, which are for NumPy, several at once."""
    running: Any = nullcontext(map(share, parts))
    if workers is not None:
        from .fast.parts import check_workers, on_threads  # for speed: the same parts, several at once

        check_workers(workers, x)
        running = on_threads(share, parts, workers)
    total = 0.0
    with running as shares:
        for value in shares:
            total = total + value
    return float(total)


# --- which rows a step takes ---


class Passes:
    """The row numbers of each step, for ``train(..., batches=Passes(len(X), batch_size, seed))``.

    Parameters
    ----------
    n : int
        The rows that there are.
    batch_size : int
        The rows of a step, from 1 to n; the last of a pass may have fewer.
    seed : int
        Of the orders, at least 0.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n = check_integer("n", n, at_least=1)
        self.batch_size = check_integer("batch_size", batch_size, at_least=1, at_most=n)
        self.seed = check_integer("seed", seed, at_least=0)
        self.steps = math.ceil(self.n / self.batch_size)  # of a pass
        self._latest, self._order = -1, np.empty(0, np.int64)

    def __repr__(self) -> str:
        return f"Passes(n={self.n}, batch_size={self.batch_size}, seed={self.seed})"

    def __call__(self, t: int) -> np.ndarray:
        """Return the row numbers of step t, counted from 1, (at most batch_size,) int64."""
        number, k = divmod(t - 1, self.steps)
        if number != self._latest:
            self._latest, self._order = number, self.order(number)
        return self._order[k * self.batch_size : (k + 1) * self.batch_size]

    def order(self, number: int) -> np.ndarray:
        """Return the order of all rows in a pass, (n,) int64. The passes are counted from 0."""
        # A spawned sequence: that of [seed, 0] would be the seed's own, from which the adapters start.
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,))).permutation(self.n)


def draw_batches(rng: np.random.Generator, n: int, batch_size: int, steps: int | None = None) -> np.ndarray:
    """Return the row numbers of an epoch's batches, (steps, batch_size), each batch drawn afresh, as in the article."""
    batches = np.empty((n // batch_size if steps is None else steps, batch_size), np.int64)
    for batch in batches:
        batch[...] = rng.choice(n, batch_size, replace=False, shuffle=False)
    return batches


def rows_of_steps(
    batches: Callable[[int], np.ndarray], steps: Iterable[int], n: int, x: Array, backend: Backend
) -> Iterator[Array]:
    """Yield the row numbers of each of some steps, checked: `take_rows` takes another row for a number out of range."""
    for t in steps:
        rows = np.asarray(batches(t))
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not 1 <= len(rows) <= len(x):
            raise ValueError(
                f"batches({t}) has {rows.dtype} {rows.shape}, expected row numbers, from 1 to {len(x)} of them"
            )
        if not 0 <= rows.min() <= rows.max() < n:
            raise ValueError(f"batches({t}) holds {rows.min()} to {rows.max()}, expected rows from 0 to {n - 1}")
        yield backend.asarray(rows)


# --- a training between two epochs ---


@dataclass
class History:
    """The loss over the whole data set, or over what is held out, as training went on."""

    epochs: list[int] = field(default_factory=list)  # after which the loss was measured, counted from 1
    losses: list[float] = field(default_factory=list)  # the loss measured after each of them

    def add(self, epoch: int, loss: float) -> None:
        """Note the loss after an epoch."""
        self.epochs.append(epoch)
        self.losses.append(loss)


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


def keeper_of(checkpoint: str | Path | Keeper | None, settings: Mapping[str, Any] | None = None) -> Keeper | None:
    """Return what keeps a training: for a path, a file, with settings that must be the same when it goes on."""
    if checkpoint is None or isinstance(checkpoint, Keeper):
        return checkpoint
    with requiring("a checkpoint"):
        from .files.checkpoint import Checkpoint  # a training without one needs no files

    return Checkpoint(checkpoint, settings)


# --- a training as one watches it ---


class TrainingDiverged(ArithmeticError):
    """Training met a number that is NaN or infinite. The model keeps what the epoch left."""

    epoch: int  # the epoch in which it happened, counted from 1
    step: int  # 0: the numbers are looked at when the epoch ends

    def __init__(self, message: str, epoch: int = 0, step: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


class LossGrew(UserWarning):
    """The loss is far above the one that the training began with, and finite."""


def first_loss(model: Layer, X: Array, Y: Array, loss: Loss) -> float:
    """Return the loss of the first rows, or that of a model that answers 0 where this is larger."""
    height = rows_at_a_time(Y)
    with np.errstate(all="ignore"):
        y, target = model(X[:height]), Y[:height]
        if Y.dtype.kind in "iu" and not bool((target != IGNORED).any()):  # no target to measure
            return math.inf
        return max(float(loss(y, target)[0]), float(loss(0 * y, target)[0]))


def warn_of_growth(before: float, last: float, state: TrainingState, times: float = GROWTH) -> None:
    """Warn where the loss is so many times above where it began."""
    if last > times * before:
        when = " in the first epoch" if times < GROWTH else ""
        warnings.warn(
            f"the loss grew from {before:.3g} to {last:.3g}{when}: lr = {state.optimizer.lr} is too large; start again "
            "with a smaller one, since the model is worse than before",
            LossGrew,
            stacklevel=3,
        )


def check_parameters(state: TrainingState, epoch: int) -> None:
    """Stop where a parameter holds NaN or infinity. Asked once an epoch: asking waits for the device."""
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


def check_loss(loss: float, epoch: int, state: TrainingState, data: str) -> float:
    """Return the loss that is to be reported; stop where it is NaN or infinite."""
    if not math.isfinite(loss):
        message = f"the loss over all of {data} is {loss} after epoch {epoch}, {_last_loss(state)}"
        raise TrainingDiverged(f"{message}. The model keeps what the epoch left", epoch)
    return loss


def _last_loss(state: TrainingState) -> str:
    """Say which finite loss was the last one reported."""
    history = state.history
    if not history.losses:
        return "and no loss was reported before"
    return f"and the last loss reported was {history.losses[-1]:.7g} after epoch {history.epochs[-1]}"


def progress_bar(done: int, epochs: int, tokens: int | None) -> Any:
    """Return tqdm's bar over epochs, or their tokens: in a notebook there, else on stderr if that is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    in_notebook = shell is not None and "IPKernelApp" in shell.config
    with warnings.catch_warnings():  # in a notebook without ipywidgets it is a line of text, and says so
        warnings.simplefilter("ignore")
        bar = needed("tqdm.auto" if in_notebook else "tqdm", "progress=True").tqdm
    size, unit = (tokens, "token") if tokens else (1, "epoch")
    hidden = False if in_notebook else None  # None: where stderr is no terminal
    return bar(initial=done * size, total=epochs * size, disable=hidden, unit=unit, unit_scale=bool(tokens))


# --- whether model, data and loss fit each other ---


def trainable(model: Any) -> dict[str, Array]:
    """Return what trains in a model; a class, or adapters without their model, have nothing."""
    if isinstance(model, type) or not hasattr(model, "trainable"):
        check_model(model)
    return model.trainable()  # type: ignore[no-any-return]


def try_out(model: Layer, X: Array, Y: Array, loss: Loss, params: Mapping[str, Array]) -> None:
    """Require that X and Y are finite, that model and loss take their first row, and, on a CPU, every id."""
    check_data(model, X, Y, loss, params)
    check_finite(X=X, Y=Y)
    for row in sorted({0} | rows_of_extremes(X) | rows_of_extremes(Y)):
        with named(f"row {row} of X and Y"), np.errstate(all="ignore"):
            loss(model(X[row : row + 1]), Y[row : row + 1])


def pair_of(held_out: Any) -> tuple[Array, Array]:
    """Return inputs and targets to measure the loss on."""
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be two arrays, inputs and targets, got {type(held_out).__name__}")
    return held_out


def check_data(
    model: Any, X: Array, Y: Array, loss: Any, params: Mapping[str, Array], classes: int | None = None
) -> None:
    """Require rows, type, library and width that fit; targets are below `classes`, by default the output's width."""
    if not callable(loss):
        raise TypeError(f"loss must be a function such as minilora.mse, got {loss!r}")
    like = next(iter(params.values()), None)
    for name, data in {"X": X, "Y": Y}.items():
        check_kind(name, data)
        if data.dtype.kind not in "iu":
            check_trainable(name, data, like)
        elif like is not None:
            check_library(name, data, like, "the layer")
    if X.shape == () or X.shape[0] == 0 or (X.dtype.kind == "f" and len(X.shape) < 2):
        raise ValueError(f"X has shape {tuple(X.shape)}, expected (n, ..., in) with at least one row")
    if Y.shape[:1] != X.shape[:1]:
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected {X.shape[0]} rows as X has")
    if isinstance(Y, np.ndarray) and Y.dtype.kind in "iu" and not bool((Y != IGNORED).any()):
        raise ValueError(f"Y has no target that counts: all of them are {IGNORED}")
    with np.errstate(all="ignore"):
        first = model(X[:1])  # which refuses inputs that it cannot take
    if not isinstance(Y, np.ndarray):
        tokens = max((layer.weight.shape[0] for _, layer in walk(model) if isinstance(layer, Embedding)), default=None)
        check_on_device(X, Y, {"X": tokens, "Y": classes or first.shape[-1]})
    width = getattr(model, "out_features", None)
    if X.dtype.kind == Y.dtype.kind == "f" and width is not None:  # a loss might broadcast them
        check_shape("Y", Y, (*X.shape[:-1], width))


def check_on_device(X: Array, Y: Array, sizes: Mapping[str, int | None]) -> None:
    """Require ids and targets below a size, and a target that counts: a GPU takes any number for another. One wait."""
    backend, ends = backend_of(Y), {name: a for name, a in {"X": X, "Y": Y}.items() if a.dtype.kind in "iu"}
    if not ends:
        return
    if "Y" in ends:  # what does not count stands for the largest that does, if any does
        ends["Y"] = backend.xp.where(Y != IGNORED, Y, Y.max())
    found = [end.astype("int64") for a in ends.values() for end in (a.min(), a.max())]
    extremes = iter(backend.to_numpy(backend.xp.stack(found)).tolist())
    for name, least, most in zip(ends, extremes, extremes, strict=True):
        if name == "Y" and least == most == IGNORED:
            raise ValueError(f"Y has no target that counts: all of them are {IGNORED}")
        size = sizes[name]
        if size is not None and not 0 <= least <= most < size:
            raise ValueError(f"{name} holds {least if least < 0 else most}, expected 0 to {size - 1}")


def rows_of_extremes(ids: Array) -> set[int]:
    """Return the rows that hold the smallest and the largest id; no rows where the data are no ids, or on a GPU."""
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or not ids.size:
        return set()
    counted = np.where(ids == IGNORED, ids.max(), ids)
    return {int(place) // (ids.size // len(ids)) for place in (counted.argmin(), ids.argmax())}


def check_functions(functions: Mapping[str, Any]) -> None:
    """Require functions, or None, under the way in which they are called."""
    for call, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{call.partition('(')[0]} must be a function, {call}, got {function!r}")


def check_batches(batch_size: Any, steps: Any, n: int, batches: Any) -> tuple[int, int]:
    """Return the rows of a batch and the batches of an epoch, by default as many as n rows allow, or as a pass has."""
    usual = getattr(batches, "batch_size", min(DEFAULT_ROWS, n))
    size = check_integer("batch_size", usual if batch_size is None else batch_size, at_least=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of X, got {size}")
    steps = getattr(batches, "steps", n // size) if steps is None else steps
    return size, check_integer("steps", steps, at_least=1, at_most=MOST // size)
