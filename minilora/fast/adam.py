"""Faster versions of Adam's update: in blocks on a CPU, and in one kernel on a GPU.

On a CPU, the intermediate results of (20) to (24) for a block stay in a core's cache. The kernel reads and writes each
entry once, with (22) to (24) in the order at the end of the paper's section 2. The factors that depend on the step fold
into two scalars, computed in double precision:

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)        eps_hat = eps sqrt(1 - beta2^t)
    theta_t = theta_{t-1} - lr_t m_t / (sqrt(v_t) + eps_hat)

The kernel's statements are valid C and valid Python: a test compares them with `minilora.optim.adam_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from ..backend import Backend
from ..checks import Array

BLOCK = 65_536
"""The number of entries that are updated at a time."""

KERNEL_INPUTS, KERNEL_OUTPUTS = "T g, T beta1, T rest1, T beta2, T rest2, T lr_t, T eps_hat", "T theta, T m, T v"
KERNEL = """
m = beta1 * m + rest1 * g;
v = beta2 * v + rest2 * (g * g);
theta = theta - lr_t * m / (sqrt(v) + eps_hat);
"""


def fastest(update: Callable[..., None], backend: Backend) -> Callable[..., None]:
    """Return the fastest equivalent of `minilora.optim.adam_update` for these arrays."""
    if backend.name != "numpy":
        return gpu_update(backend) or update

    def by_blocks(theta: Array, g: Array, m: Array, v: Array, t: int, **settings: Any) -> None:
        for some in row_slices(theta):
            update(theta[some], g[some], m[some], v[some], t, **settings)

    return by_blocks


def row_slices(array: np.ndarray) -> Iterator[Any]:
    """Yield indices that cut an array into blocks of rows; a small array is one block."""
    if array.size <= BLOCK:
        yield ...
        return
    height = max(1, BLOCK * len(array) // array.size)
    yield from (slice(start, start + height) for start in range(0, len(array), height))


@cache
def gpu_update(backend: Backend) -> Callable[..., None] | None:
    """Return a kernel with the arguments of `minilora.optim.adam_update`, or None if the library has no kernels."""
    make: Any = getattr(backend.xp, "ElementwiseKernel", None)
    if make is None:
        return None
    kernel = make(KERNEL_INPUTS, KERNEL_OUTPUTS, KERNEL, "minilora_adam")

    def update(theta: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, betas: tuple, eps: float) -> None:
        (beta1, beta2), root = betas, (1 - betas[1] ** t) ** 0.5
        lr_t, eps_hat = float(lr * root / (1 - beta1**t)), float(eps * root)
        kernel(g, beta1, 1 - beta1, beta2, 1 - beta2, lr_t, eps_hat, theta, m, v)

    return update
