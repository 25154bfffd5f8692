"""Gradient accumulation: the gradients of a large batch with the memory of a small one.

The loss is a mean over the targets of a batch. Cut the batch into parts; let M be its number of targets, M_p a part's:

    L = sum_p (M_p / M) L_p        so        g = sum_p (M_p / M) g_p

A part's caches are freed when its gradients are computed. The sums differ from the whole batch's only by rounding.

The parts are independent, so several can run in parallel (`minilora.fast.threads`): each core runs whole parts from
forward to backward, and they synchronise once per step. The parts depend only on the batch and `rows`, and are summed
in order, so the bits do not depend on the number of workers.
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
"""Rows of a batch: a slice, or indices."""
Cut: TypeAlias = Callable[[Array, int], Sequence[Part]]
"""``cut(y, rows)`` returns the parts of a batch with these targets."""


def of_rows(y: Array, rows: int) -> list[slice]:
    """Return slices of `rows` rows with a target, at least one slice. On a GPU return all: looking would wait."""
    parts = [slice(start, start + rows) for start in range(0, len(y), rows)]
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu":
        return parts
    return [part for part in parts if (y[part] != IGNORE_INDEX).any()] or parts[:1]


@dataclass(frozen=True)
class accumulate:
    """Gradients of a batch, `rows` rows at a time: ``gradients(model, x, y, loss)``, for `train`.

        train(..., loss=cross_entropy, gradients=minilora.fast.accumulate(4))

    During the computation the BLAS of the whole process is limited to one thread by the package threadpoolctl, which
    also affects other threads of your program. A step is faster still in a process that starts with one BLAS thread
    (``OPENBLAS_NUM_THREADS=1``, set before NumPy is imported), like ``minilora finetune``: OpenBLAS then has no second
    thread that keeps spinning. `train` measures losses with as many workers.

    Parameters
    ----------
    rows : int
        The rows per part, at least 1. A batch's last part may have fewer. A part in which no target counts is skipped.
    workers : int
        The number of parts to compute in parallel, each on its own thread; at least 1. The memory of a step grows with
        it; the gradients are bit-identical. Model and loss are called from these threads, with the caller's
        `np.errstate`. No thread outlives the call.
    gradients : callable, optional
        ``gradients(model, x, y, loss)`` for one part; by default forward, loss and backward. An alternative is
        `minilora.language.text.gradients_at_targets`.
    cut : callable
        ``cut(y, rows)`` returns the parts of a batch with these targets; by default slices of `rows` rows.

    Raises
    ------
    ValueError, TypeError
        If `rows` or `workers` is not an integer of at least 1; in a call, before any computation, if there is
        more than one worker for CuPy arrays. An exception in one part is raised after the others have finished.
    """

    rows: int
    workers: int = 1
    gradients: Gradients | None = None
    cut: Cut = of_rows

    def __post_init__(self) -> None:
        check_integer("rows", self.rows, at_least=1)
        check_integer("workers", self.workers, at_least=1)

    def __call__(self, model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of ``loss(model(x), y)`` for the trainable arrays."""
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
