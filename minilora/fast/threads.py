"""Several computations at once, one a thread, each with one thread of the BLAS.

NumPy gives up Python's lock while it computes, so threads are enough. The BLAS would cut each product of matrices
instead, wait for all pieces, and let its threads spin until the next product, while all that is no product runs on one
core. A product's bits depend on how many threads the BLAS has: with one, they are the same with any number of workers.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import copy_context
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from ..checks import Array, check_integer, kind_of
from ..extras import needed

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def on_threads(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Iterator[Result]]:
    """Give the results of ``call(item)``, in the items' order, from `workers` threads with one BLAS thread each.

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
