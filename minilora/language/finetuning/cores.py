"""On how many cores a fine-tuning computes. Nothing here needs NumPy, whose BLAS counts its threads as it is loaded."""

from __future__ import annotations

import os
import sys

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Where the libraries that NumPy may have for products of matrices look, once, when they are loaded."""


def one_blas_thread() -> None:
    """Give this process one BLAS thread, where NumPy is not loaded yet. Otherwise `accumulate` alone sees to that."""
    if "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))


def worker_count(workers: int | None, backend_name: str) -> int:
    """Return how many parts of a batch are computed at once: by default two on two cores, and one on a GPU."""
    if workers is None:
        return min(2, core_count()) if backend_name == "numpy" else 1
    if workers > 1 and backend_name != "numpy":
        raise ValueError(f"workers = {workers} is for NumPy, expected 1 with --backend {backend_name}")
    return workers


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
