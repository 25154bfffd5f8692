"""Parts of a batch on threads of our own, in place of the threads of NumPy's BLAS.

The BLAS cuts each product of matrices into pieces, one a core, waits for all of them, and lets its threads spin until
the next product. All that is no product runs on one core meanwhile. The parts of a batch share both cores from their
forward to their backward, and meet once a step. NumPy gives up Python's lock while it computes, so threads are enough.
"""

from __future__ import annotations

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

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def on_threads(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Iterator[Result]]:
    """Give the results of ``call(item)``, in the items' order, with one BLAS thread for each of so many workers.

    One worker is the caller's own thread. Where a call fails, no further one begins, those that run are waited for,
    and its exception is raised as it is. No thread is left when the block ends, however it ends.
    """
    with one_blas_thread(), closing(_in_order(call, items, workers)) as results:
        yield results


def _in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the results. At most `workers` of them exist that were not asked for."""
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
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def check_workers(workers: Any, x: Array) -> None:
    """Refuse more than one worker where x is on a GPU, which has cores and an order of its own."""
    if check_integer("workers", workers, at_least=1) > 1 and not isinstance(x, np.ndarray):
        raise ValueError(f"workers = {workers} is for NumPy, expected 1 where x is a {kind_of(x)} array")
