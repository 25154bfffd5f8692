"""Adam's update in fewer passes over memory: for large arrays on a CPU, and for a GPU.

A CPU takes an array `BLOCK` entries at a time, and (20) to (24) in place: two arrays that are used again for every
block hold what the page makes seven new arrays for. A block, its gradient, its means and those two stay in the cache
together. The operations and their order are the page's, and no entry depends on another, so the bits are the page's.

A GPU takes it in one kernel, which reads and writes each entry once, with (22) to (24) in the order that the paper
gives at the end of its section 2. The factors that depend on the step fold into two scalars, computed in double
precision:

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)        eps_hat = eps sqrt(1 - beta2^t)
    theta_t = theta_{t-1} - lr_t m_t / (sqrt(v_t) + eps_hat)

The kernel's statements are C, and Python as well: a test runs them beside `minilora.optim.adam_update`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from ..backend import Backend, backend_of
from ..checks import Array

Update: TypeAlias = Callable[..., None]
"""What takes the arguments of `minilora.optim.adam_update`, and does the same."""

BLOCK = 32_768
"""Entries in a block: six arrays of so many float32 numbers take 0.8 MB, less than most cores' own cache."""


def fast_update(theta: Array) -> Update | None:
    """Return the update for an array such as this; None for one that the page's own serves as well, a small one."""
    if isinstance(theta, np.ndarray):
        return update_by_blocks if theta.size > BLOCK else None
    return gpu_update(backend_of(theta))


def update_by_blocks(
    theta: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int,
    *, lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Do what `minilora.optim.adam_update` does, some rows at a time and in place: the same bits."""
    beta1, beta2 = betas
    rests = theta.dtype.type(1 - beta1**t) == 1  # after some 160 steps of float32: (22) divides by one
    height = max(1, BLOCK * len(theta) // theta.size)
    first, second = np.empty_like(theta[:height]), np.empty_like(theta[:height])
    for start in range(0, len(theta), height):
        block = slice(start, start + height)
        theta_b, g_b, m_b, v_b = theta[block], g[block], m[block], v[block]
        a, b = first[: len(theta_b)], second[: len(theta_b)]
        m_b *= beta1  # (20)
        m_b += np.multiply(1 - beta1, g_b, out=a)
        v_b *= beta2  # (21)
        np.square(g_b, out=a)
        v_b += np.multiply(1 - beta2, a, out=a)
        m_hat = m_b if rests else np.divide(m_b, 1 - beta1**t, out=a)  # (22)
        np.divide(v_b, 1 - beta2**t, out=b)  # (23)
        np.multiply(lr, m_hat, out=a)  # (24)
        np.sqrt(b, out=b)
        b += eps
        theta_b -= np.divide(a, b, out=a)


KERNEL_INPUTS = "T g, T beta1, T rest1, T beta2, T rest2, T lr_t, T eps_hat"
KERNEL_OUTPUTS = "T theta, T m, T v"
KERNEL = """
m = beta1 * m + rest1 * g;
v = beta2 * v + rest2 * (g * g);
theta = theta - lr_t * m / (sqrt(v) + eps_hat);
"""


@cache
def gpu_update(backend: Backend) -> Update | None:
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
