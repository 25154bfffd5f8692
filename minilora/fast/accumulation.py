"""The gradients of a large batch with the memory of a small one.

The loss is a mean over the targets of a batch. Cut the batch into parts; let M be its number of targets, M_p a part's:

    L = sum_p (M_p / M) L_p        so        g = sum_p (M_p / M) g_p

The caches of one part are gone before the next one's forward begins. The sums differ from the whole batch's by rounding
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checks import Array, check_integer
from ..layer import Layer
from ..losses import Loss, count


def accumulate(rows: int, loss: None = None) -> Callable[[Any, Array, Array, Loss], dict[str, Array]]:
    """Return what computes the gradients of a batch so many rows at a time.

    Parameters
    ----------
    rows : int
        At least 1. A batch's last part may have fewer.
    loss : None
        Given here up to 0.2. `train` now passes on the loss that it reports, so that no other is minimised.

    Returns
    -------
    callable
        ``gradients(model, x, y, loss)``, for ``train(..., loss=cross_entropy, gradients=minilora.fast.accumulate(4))``.

    Raises
    ------
    ValueError, TypeError
        If `rows` is not an integer of at least 1, or a loss is given.
    """
    rows = check_integer("rows", rows, at_least=1)
    if loss is not None:
        raise TypeError(f"accumulate takes no loss: train(..., loss=..., gradients=accumulate({rows})) names it once")

    def gradients(model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        total: dict[str, Array] = {}
        M = count(y)
        for start in range(0, len(x), rows):
            x_p, y_p = x[start : start + rows], y[start : start + rows]
            prediction, cache = model.forward(x_p)
            d_prediction = loss(prediction, y_p)[1]
            d_prediction *= count(y_p) / M
            grads = model.backward(d_prediction, cache, need_dx=False)[1]
            total = {name: total[name] + g if total else g for name, g in grads.items()}
        return total

    return gradients
