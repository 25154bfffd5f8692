"""The gradients of a large batch with the memory of a small one, on as many cores as you name.

The loss is a mean over the targets of a batch. Cut the batch into parts; let M be its number of targets, M_p a part's:

    L = sum_p (M_p / M) L_p        so        g = sum_p (M_p / M) g_p

The caches of a part are gone when its gradients are there. The sums differ from the whole batch's by rounding alone.

No part needs another's result, so several can run at once, one a thread. NumPy gives up Python's lock while it
computes, so threads are enough. The BLAS would cut each product of matrices instead, wait for all pieces, and let its
threads spin until the next product, while all that is no product runs on one core. The parts of a batch share the cores
from their forward to their backward, and meet once a step.

The parts follow from the batch and `rows`, the sum is taken in their order, and each product is computed by one thread
of the BLAS, since its results depend on how many it has. So the bits do not depend on the number of workers.

Texts of many lengths are filled up to the longest. A target that does not count is -100:

    Y    [-100 -100 i_3  i_4  -100 -100]     reaches to 4, its last target that counts
         [-100 i_2  -100 -100 -100 -100]     reaches to 2

No target of a decoder depends on what stands behind it. So a part is computed only as far as its widest row reaches,
and `by_width` puts rows of like widths into one part.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, TypeAlias, TypeVar

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_integer, kind_of, needed
from ..layer import Layer
from ..losses import IGNORED, Loss, count, mse
from ..training import Gradients, backpropagate, evaluate
from ..variants.dropout import of_sequences

Item = TypeVar("Item")
Result = TypeVar("Result")
Part: TypeAlias = slice | np.ndarray
"""Rows of a batch: some in a line, or their numbers."""
Cut: TypeAlias = Callable[[Array, int], Sequence[Part]]
"""``cut(y, rows)``: the parts of a batch with these targets."""


def accumulate(rows: int, workers: int = 1, gradients: Gradients | None = None) -> Accumulated:
    """Return what computes the gradients of a batch so many rows at a time.

    While it computes, the BLAS of the whole process has one thread, through the package threadpoolctl; afterwards as
    many as before. Other threads of your program notice that. In a process that has one BLAS thread from its start
    (``OPENBLAS_NUM_THREADS=1``, set before NumPy is imported), as ``minilora finetune`` has, a step is faster still:
    OpenBLAS has no second thread then that goes on spinning for a while.

    Parameters
    ----------
    rows : int
        At least 1. A batch's last part may have fewer. The parts follow from `rows` alone, and a part in which no
        target counts is passed over.
    workers : int
        How many parts are computed at once, each on a thread of its own; at least 1. The memory that a step needs
        grows with it, and the gradients are the same to the last bit. The model and the loss are called from these
        threads, with the `np.errstate` of the caller. None of the threads outlives the call.
    gradients : callable, optional
        ``gradients(model, x, y, loss)``, which computes those of a part; by default forward, loss and backward. Another
        way is `minilora.language.text.where_it_counts`.

    Returns
    -------
    Accumulated
        ``gradients(model, x, y, loss)``, for ``train(..., loss=cross_entropy, gradients=minilora.fast.accumulate(4))``.
        An exception in one part is raised when the others have ended. It measures losses on as many workers.

    Raises
    ------
    ValueError, TypeError
        If `rows` or `workers` is not an integer of at least 1; from `gradients`, before it computes anything, if more
        than one worker meets a CuPy array.
    """
    rows, workers = check_integer("rows", rows, at_least=1), check_integer("workers", workers, at_least=1)
    return Accumulated(rows, workers, gradients or backpropagate)


def of_rows(y: Array, rows: int) -> list[slice]:
    """Return parts of so many rows, those with a target, or the first. A GPU would be waited for: there all count."""
    parts = [slice(start, start + rows) for start in range(0, len(y), rows)]
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu":
        return parts
    return [part for part in parts if (y[part] != IGNORED).any()] or parts[:1]


@dataclass(frozen=True)
class Accumulated:
    """The gradients of a batch, the sum of those of its parts; what `accumulate` returns."""

    rows: int  # of a part, as `cut` takes it
    workers: int  # parts at once
    gradients: Gradients = backpropagate  # of a part
    cut: Cut = of_rows

    def __call__(self, model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of ``loss(model(x), y)`` at what trains."""
        check_workers(self.workers, x)
        if len(x) != len(y):
            raise ValueError(f"y has {len(y)} rows, expected {len(x)} as x has")
        M = count(y)

        @wraps(loss)
        def share(prediction: Array, target: Array) -> tuple[Array, Array]:
            value, d_prediction = loss(prediction, target)
            d_prediction *= count(target) / M
            return value, d_prediction

        def of_part(part: Part) -> dict[str, Array]:
            rows = part if isinstance(part, slice) else backend_of(x).asarray(part)
            return self.gradients(of_sequences(model, part), x[rows], y[rows], share)

        total: dict[str, Array] = {}
        with on_threads(of_part, self.cut(y, self.rows), self.workers) as of_parts:
            for grads in of_parts:
                total = {name: total[name] + g if total else g for name, g in grads.items()}
        return total

    def evaluate(self, model: Layer, X: Array, Y: Array, loss: Loss = mse) -> float:
        """Return the loss over all of X and Y, as `minilora.evaluate` does, on as many workers."""
        return evaluate(model, X, Y, loss, self.workers)


# --- threads ----------------------------------------------------------------------------------------------------------


@contextmanager
def on_threads(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Iterator[Result]]:
    """Give the results of ``call(item)``, in the items' order, with one BLAS thread for each of so many workers.

    One worker is the caller's own thread. Where a call fails, no further one begins, those that run are waited for,
    and its exception is raised as it is. No thread is left when the block ends, however it ends.
    """
    with one_blas_thread(), closing(_in_order(call, items, workers)) as results:
        yield results


def _in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the results; at most `workers` of them are computed ahead."""
    if workers == 1:
        yield from map(call, items)
        return
    ahead: deque[Future[Result]] = deque()
    one_thread = partial(_blas().limit, limits=1)  # again in each thread: a BLAS over OpenMP has a setting for each
    with ThreadPoolExecutor(workers, initializer=one_thread) as pool:  # left, it waits for every thread
        for item in items:
            if len(ahead) == workers:
                yield ahead.popleft().result()
            ahead.append(pool.submit(copy_context().run, call, item))  # with the caller's np.errstate
        while ahead:
            yield ahead.popleft().result()


_lock = threading.RLock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold the BLAS to one thread, and put back what there was. The setting is the process's: one caller at a time."""
    with _lock, _blas().limit(limits=1):
        yield


@cache
def _blas() -> Any:
    """Return what sets the threads of NumPy's BLAS. It is kept: a search among the loaded libraries takes a while."""
    return needed("threadpoolctl", "a computation in parts").ThreadpoolController().select(user_api="blas")


def check_workers(workers: Any, x: Array) -> None:
    """Require one worker where x is on a GPU, which has cores and an order of its own."""
    if check_integer("workers", workers, at_least=1) > 1 and not isinstance(x, np.ndarray):
        raise ValueError(f"workers = {workers} is for NumPy, expected 1 where x is a {kind_of(x)} array")


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- how far rows reach, and parts of like widths ---------------------------------------------------------------------


def widths(y: Array) -> np.ndarray:  # (n, T) -> (n,)
    """Return how far each row reaches; 0 where no target counts."""
    counts = backend_of(y).to_numpy(y != IGNORED)
    return np.where(counts.any(axis=1), counts.shape[1] - counts[:, ::-1].argmax(axis=1), 0)


def by_width(y: Array, rows: int) -> list[np.ndarray]:
    """Return the numbers of the rows in each part of a batch, the widest first. Rows without a target are in none.

    There are at most as many parts as if each had so many rows. A part's area is its number of rows times the width of
    its widest. The largest area is as small as it can be, so that the parts take like times. None is larger than the
    area of so many of the widest rows.
    """
    order, wide = _widest_first(y)
    if not len(order):
        return [np.arange(min(rows, len(y)))]
    most, low, high = math.ceil(len(order) / rows), int(wide[0]), int(wide[0]) * rows
    while low < high:  # between them lies the smallest area that needs no more parts
        area = (low + high) // 2
        low, high = (low, area) if len(_pieces(wide, area)) <= most else (area + 1, high)
    return [order[piece] for piece in _pieces(wide, low)]


def of_area(y: Array, area: int) -> list[np.ndarray]:
    """Return the numbers of the rows in each part, the widest first. A part has at most this area, or is one row."""
    order, wide = _widest_first(y)
    return [order[piece] for piece in _pieces(wide, area)]


def _widest_first(y: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows in which a target counts, the widest first, and their widths."""
    wide = widths(y)
    order = np.argsort(-wide, kind="stable")[: np.count_nonzero(wide)]
    return order, wide[order]


def _pieces(wide: np.ndarray, area: int) -> list[slice]:
    """Cut rows of these widths, the widest first, so that no piece has a larger area, unless it is one row."""
    pieces, start = [], 0
    while start < len(wide):
        pieces.append(slice(start, start + max(1, area // int(wide[start]))))
        start = pieces[-1].stop
    return pieces


# --- the memory of one step, kept for the next ------------------------------------------------------------------------

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # their numbers in glibc's malloc.h


def keep_pages() -> bool:
    """Let this process keep the memory that its arrays leave free, for the next step's, which are as large.

    glibc gives the memory of large arrays back to the system when they are gone, and asks for it again in the next
    step. Linux then hands it out in pages of 4 kB and fills each with zeros first.

    ``minilora finetune`` and ``minilora article`` call it. In your own program, call it before the model is loaded.
    From then on the process gives no memory back until it ends, and its threads share what it has. A step of the
    fine-tuning in the README asks for some 30,000 pages without it, and for some ten with it. The bits are the same.

    Returns
    -------
    bool
        Whether it could be done: only Linux with glibc has the setting. Elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # no large array in a mapping of its own, no free memory returned, and none kept for one thread alone
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())
