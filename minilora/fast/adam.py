"""Adam's update in fewer passes over memory: for large arrays on a CPU, and for a GPU.

A CPU takes an array `BLOCK` entries at a time, by `minilora.optim.adam_update`: the block, its gradient, its means and
the temporaries stay in the cache together. No entry's update depends on another entry, so the bits are those of the
whole array.

A GPU takes it in one kernel, which reads and writes each entry once, with (22) to (24) in the order that the paper
gives at the end of its section 2. The factors that depend on the step fold into two scalars, computed in double
precision:

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)        eps_hat = eps sqrt(1 - beta2^t)
    theta_t = theta_{t-1} - lr_t m_t / (sqrt(v_t) + eps_hat)

The kernel's statements are C, and Python as well: a test runs them beside `minilora.optim.adam_update`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..backend import Backend
from ..checks import Array

BLOCK = 131_072
"""Entries in a block: few enough for a cache, and above the 256 kB from which NumPy writes over its own temporaries."""


def blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield views of the same rows of arrays of one shape, `BLOCK` entries at a time; a GPU's arrays as they are."""
    first = arrays[0]
    if not isinstance(first, np.ndarray) or first.size <= BLOCK:
        yield arrays
        return
    length = max(1, BLOCK * len(first) // first.size)
    for start in range(0, len(first), length):
        yield tuple(array[start : start + length] for array in arrays)


KERNEL_INPUTS = "T g, T beta1, T rest1, T beta2, T rest2, T lr_t, T eps_hat"
KERNEL_OUTPUTS = "T theta, T m, T v"
KERNEL = """
m = beta1 * m + rest1 * g;
v = beta2 * v + rest2 * (g * g);
theta = theta - lr_t * m / (sqrt(v) + eps_hat);
"""


def gpu_update(backend: Backend) -> Callable[..., None] | None:
    """Return what does the same as `minilora.optim.adam_update` in one kernel, or None where the library makes none."""
    kernel: Any = backend.elementwise_kernel(KERNEL_INPUTS, KERNEL_OUTPUTS, KERNEL, "minilora_adam")
    if kernel is None:
        return None

    def update(
        theta: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        beta1, beta2 = betas
        kernel(g, beta1, 1 - beta1, beta2, 1 - beta2, *_folded(t, lr, betas, eps), theta, m, v)

    return update


def _folded(t: int, lr: float, betas: tuple[float, float], eps: float) -> tuple[float, float]:
    """Return lr_t and eps_hat."""
    root = (1 - betas[1] ** t) ** 0.5
    return float(lr * root / (1 - betas[0] ** t)), float(eps * root)
