"""Parallel computations on threads, each with one BLAS thread.

NumPy releases Python's lock while it computes, so threads are enough. The BLAS would instead split each matrix product,
wait for all pieces, and let its threads spin until the next product, while everything else runs on one core. A
product's bits depend on the number of BLAS threads: with one, they are the same for any number of workers.
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
    """Yield the results of ``call(item)`` in order, from `workers` threads with one BLAS thread each.

    A single worker is the caller's own thread. If a call fails, no further one starts, running ones are awaited, and
    its exception is raised. No thread outlives the block, however it ends.
    """
    with one_blas_thread(), closing(_in_order(call, items, workers)) as results:
        yield results


def _in_order(call: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """Yield the results; at most `workers` of them are computed ahead."""
    if workers == 1:
        yield from map(call, items)
        return
    ahead: deque[Future[Result]] = deque()
    one_thread = partial(_blas().limit, limits=1)  # also here: a BLAS with OpenMP has a setting per thread
    with ThreadPoolExecutor(workers, initializer=one_thread) as pool:  # leaving it waits for every thread
        for item in items:
            if len(ahead) == workers:
                yield ahead.popleft().result()
            ahead.append(pool.submit(copy_context().run, call, item))  # with the caller's np.errstate
        while ahead:
            yield ahead.popleft().result()


_lock = threading.RLock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit the BLAS to one thread in the body. The setting is global to the process: one caller at a time."""
    with _lock, _blas().limit(limits=1):
        yield


@cache
def _blas() -> Any:
    """Return the controller of NumPy's BLAS threads, cached because searching the loaded libraries takes a while."""
    return needed("threadpoolctl", "a computation in parts").ThreadpoolController().select(user_api="blas")


def check_workers(workers: Any, x: Array) -> None:
    """Require one worker if x is on a GPU, which parallelises by itself."""
    if check_integer("workers", workers, at_least=1) > 1 and not isinstance(x, np.ndarray):
        raise ValueError(f"workers = {workers} is for NumPy, expected 1 where x is a {kind_of(x)} array")


def core_count() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
