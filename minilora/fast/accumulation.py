"""The gradients of a large batch with the memory of a small one: those of its parts, added up.

The loss is a mean over the targets of a batch. Cut the batch into parts; let M be its number of targets, M_p a part's:

    L = sum_p (M_p / M) L_p        so        g = sum_p (M_p / M) g_p

The caches of a part are gone when its gradients are there. The sums differ from the whole batch's only by rounding.

No part needs another's result, so several can run at once (`minilora.fast.threads`): they share the cores from their
forward to their backward, and meet once a step. The parts follow from the batch and `rows`, and the sum is taken in
their order. So the bits do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TypeAlias

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_integer
from ..gradients import Gradients, backpropagate
from ..layer import Layer
from ..losses import IGNORE_INDEX, Loss, count
from ..variants.dropout import of_sequences
from .threads import check_workers, on_threads

Part: TypeAlias = slice | np.ndarray
"""Rows of a batch: some in a line, or their numbers."""
Cut: TypeAlias = Callable[[Array, int], Sequence[Part]]
"""``cut(y, rows)``: the parts of a batch with these targets."""


def of_rows(y: Array, rows: int) -> list[slice]:
    """Return slices of `rows` rows that contain a target, at least one. On a GPU all of them: looking would wait."""
    parts = [slice(start, start + rows) for start in range(0, len(y), rows)]
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu":
        return parts
    return [part for part in parts if (y[part] != IGNORE_INDEX).any()] or parts[:1]


@dataclass(frozen=True)
class accumulate:
    """The gradients of a batch, `rows` rows at a time: ``gradients(model, x, y, loss)``, for `train`.

        train(..., loss=cross_entropy, gradients=minilora.fast.accumulate(4))

    While it computes, the BLAS of the whole process has one thread, through the package threadpoolctl; afterwards as
    many as before. Other threads of your program notice that. In a process that has one BLAS thread from its start
    (``OPENBLAS_NUM_THREADS=1``, set before NumPy is imported), as ``minilora finetune`` has, a step is faster still:
    OpenBLAS has no second thread then that spins on for a while. `train` measures losses on as many workers.

    Parameters
    ----------
    rows : int
        At least 1. A batch's last part may have fewer. Only `rows` decides the parts, and a part in which no target
        counts is skipped.
    workers : int
        How many parts are computed at once, each on a thread of its own; at least 1. The memory that a step needs
        grows with it, and the gradients are the same to the last bit. The model and the loss are called from these
        threads, with the `np.errstate` of the caller. None of the threads outlives the call.
    gradients : callable, optional
        ``gradients(model, x, y, loss)``, which computes those of a part; by default forward, loss and backward. Another
        way is `minilora.language.text.gradients_at_targets`.
    cut : callable
        ``cut(y, rows)``, the parts of a batch with these targets; by default slices of `rows` rows.

    Raises
    ------
    ValueError, TypeError
        If `rows` or `workers` is not an integer of at least 1; from a call, before it computes anything, if more than
        one worker meets a CuPy array. An exception in one part is raised when the others have ended.
    """

    rows: int
    workers: int = 1
    gradients: Gradients | None = None
    cut: Cut = of_rows

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, at_least=1)
        check_integer("workers", self.workers, at_least=1)

    def __call__(self, model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of ``loss(model(x), y)`` at what trains."""
        check_workers(self.workers, x)
        if len(x) != len(y):
            raise ValueError(f"y has {len(y)} rows, expected {len(x)} as x has")
        M, compute = count(y), self.gradients or backpropagate

        @wraps(loss)
        def share(prediction: Array, target: Array) -> tuple[Array, Array]:
            value, d_prediction = loss(prediction, target)
            d_prediction *= count(target) / M
            return value, d_prediction

        def of_part(part: Part) -> dict[str, Array]:
            rows = part if isinstance(part, slice) else backend_of(x).asarray(part)
            return compute(of_sequences(model, part), x[rows], y[rows], share)

        total: dict[str, Array] = {}
        with on_threads(of_part, self.cut(y, self.rows), self.workers) as of_parts:
            for grads in of_parts:
                total = {name: total[name] + g if total else g for name, g in grads.items()}
        return total
