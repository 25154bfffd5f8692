"""The loss of a model over a data set, some rows at a time, its gradients, and whether model, data and loss fit.

A loss is a mean over targets. Cut the rows into parts; let M be the number of targets, M_p a part's, L_p its loss:

    L = sum_p (M_p / M) L_p

So one part at a time needs memory, and a data set larger than memory can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeAlias

import numpy as np

from .backend import check_finite
from .checks import (
    Array,
    check_array,
    check_features,
    check_integer,
    check_kind,
    check_library,
    check_shape,
    check_trainable,
)
from .layer import Layer, check_model, perhaps_transposed
from .losses import IGNORED, Loss, count, mse

Gradients: TypeAlias = Callable[[Any, Array, Array, Loss], dict[str, Array]]
"""Of ``(model, x, y, loss)``: the gradients at what trains, by name."""

EVALUATION_ROWS = 512  # at a time: at the article's widths their temporaries stay in the cache, 14 ms in place of 22


def backpropagate(model: Layer, x: Array, y: Array, loss: Loss = mse) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)`` at what trains: forward, the loss, backward."""
    prediction, cache = model.forward(x)
    _, d_prediction = loss(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads


def evaluate(model: Layer, X: Array, Y: Array, loss: Loss = mse, workers: int | None = None) -> float:
    """Return the loss of a model over all of X and Y, computed `EVALUATION_ROWS` targets at a time in their dtype.

    X, Y and `loss` are as in `train`. With `workers`, so many of these parts are computed at once, each with one BLAS
    thread, as `minilora.fast.accumulate` does it: the same bits with any number. Data that do not fit the model or each
    other are a ValueError or a TypeError.
    """
    n, targets = check_data(model, X, Y, loss), count(Y)
    height = max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))

    def share(start: int) -> Any:
        x, y = X[start : start + height], Y[start : start + height]
        return loss(model(x), y)[0] * (count(y) / targets)

    return sum_of(share, range(0, n, height), workers, X)


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


def start_loss(model: Layer, X: Array, Y: Array, loss: Loss) -> float:
    """Return the loss of the first rows, or that of a model that answers 0 where this is larger."""
    height = max(1, EVALUATION_ROWS // (math.prod(Y.shape[1:]) if Y.dtype.kind in "iu" else 1))
    with np.errstate(all="ignore"):
        y, target = model(X[:height]), Y[:height]
        if Y.dtype.kind in "iu" and not bool((target != IGNORED).any()):  # no target to measure
            return math.inf
        return max(float(loss(y, target)[0]), float(loss(0 * y, target)[0]))


# --- whether model, data and loss fit each other ---


def check_training_data(model: Any, X: Array, Y: Array, held_out: Any, loss: Loss) -> tuple[Array, Array]:
    """Return inputs and targets to measure the loss on, or refuse what a model cannot be trained or measured on."""
    check_data(model, X, Y, loss, every_id=True)
    check_finite(X=X, Y=Y)
    if held_out is None:
        return X, Y
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be two arrays, inputs and targets, got {type(held_out).__name__}")
    try:
        check_data(model, *held_out, loss, every_id=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"held_out: {error}") from None
    check_finite(**{"held_out[0]": held_out[0], "held_out[1]": held_out[1]})
    return held_out


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
        try:
            check_features("X", X, widths[0], "in_features", like)
        except ValueError as error:
            raise perhaps_transposed(error, model, X) from None
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


def check_batch_size(batch_size: Any, n: int, of: str = "X") -> int:
    """Return the batch size as an int, or refuse one that is not between 1 and the number of rows."""
    size = check_integer("batch_size", batch_size, at_least=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of {of}, got {size}")
    return size
