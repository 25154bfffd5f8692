"""A command that computes on several cores: ``--workers``, and the BLAS's one thread."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...backend import Backend

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Where the libraries that NumPy may have for products of matrices look, once, when they are loaded."""


def add_workers(parser: Any) -> None:
    """Add ``--workers``, which `workers` reads, and let the command begin with one BLAS thread."""
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="parts of a batch (see --micro-batch) that are computed at once, each on a core: 2 by default where there "
        "are two cores, 1 on a GPU. The result is the same to the last bit",
    )
    parser.set_defaults(before_numpy=one_blas_thread)


def one_blas_thread() -> None:
    """Give this process one BLAS thread, where NumPy is not loaded yet. Otherwise `accumulate` alone sees to that."""
    if "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))


def workers(options: argparse.Namespace, where: Backend) -> int:
    """Return how many parts of a batch are computed at once."""
    from ...checks import check_integer

    if options.workers is None:
        return min(2, cores()) if where.name == "numpy" else 1
    count = check_integer("workers", options.workers, at_least=1)
    if count > 1 and where.name != "numpy":
        raise ValueError(f"workers = {count} is for NumPy, expected 1 with --backend {where.name}")
    return count


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
