"""The loss of a language model, and its gradients, computed where targets count.

Of a chat most targets do not, and the head is the largest product of a small model. So logits are computed where a
target counts, and nothing behind the last of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_ids, check_kind, check_shape
from ..fast.parts import of_area, widths
from ..losses import IGNORED, Loss, count, cross_entropy
from ..training import EVALUATION_ROWS, backpropagate, check_data, sum_of
from ..variants.dropout import with_rows_at
from .llama import Llama


def next_token_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the cross-entropy and its gradient, which takes the place of the logits.

    They are the largest array of a language model. This way it exists once.
    """
    return cross_entropy(logits, targets, out=logits)


def where_it_counts(model: Llama, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)``, and compute the less the fewer targets count.

    Logits, and the last block's MLP, are computed where a target counts; all else up to the last column that has one.
    The same as `minilora.training.backpropagate` gives, up to rounding; the same bits where every target counts.
    """
    check_rows(x, y)
    x, y = without_filling(x, y)
    at = y != IGNORED
    if at.all() or not at.any():
        return backpropagate(model, x, y, loss)
    last = len(model.model.layers) - 1
    model = with_rows_at(model, at, (f"model.layers.{last}.mlp", "lm_head"))  # what reads no other position
    logits, cache = model.forward(x, at)
    _, d_logits = loss(logits, y[at])
    return model.backward(d_logits, cache, need_dx=False)[1]


def evaluate_where_it_counts(model: Llama, X: Array, Y: Array, loss: Loss, workers: int | None = None) -> float:
    """Return the loss over all of X and Y, as `minilora.evaluate` does, and compute the less the fewer targets count.

    Logits are computed where a target counts, all else up to the last column of a part that has one.
    """
    check_rows(X, Y)
    check_ids("Y", Y, model.lm_head.out_features, ignored=IGNORED)

    def of_hidden(h: Array, y: Array) -> tuple[Array, Array]:
        at = y != IGNORED
        if not at.any():  # in the first row, which is tried: its loss is 0, of whichever positions
            at = ~at
        return loss(model.lm_head(h[at]), y[at])

    check_data(model.model, X, Y, of_hidden, model.model.trainable())
    targets = count(Y)

    def share(part: np.ndarray) -> Any:
        rows = backend_of(X).asarray(part)
        x, y = without_filling(X[rows], Y[rows])
        return of_hidden(model.model(x), y)[0] * (count(y) / targets)

    parts = of_area(Y, max(1, EVALUATION_ROWS // Y.shape[1]) * Y.shape[1])
    return sum_of(share, parts, workers, X)


def without_filling(x: Array, y: Array) -> tuple[Array, Array]:
    """Return ids and targets up to the last column in which a target counts; without one, all of them."""
    width = int(widths(y).max()) or y.shape[1]
    return x[:, :width], y[:, :width]


def check_rows(x: Array, y: Array) -> None:
    """Require ids and targets that are two arrays (n, T) of one shape."""
    for name, value in {"ids": x, "targets": y}.items():
        check_kind(name, value, "an array of integers")
    check_shape("targets", y, tuple(x.shape))
    if len(y.shape) != 2 or 0 in y.shape:
        raise ValueError(f"targets has shape {tuple(y.shape)}, expected (n, T) with at least one row and one position")
