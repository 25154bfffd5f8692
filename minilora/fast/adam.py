"""Adam's update in fewer passes over memory: for large arrays on a CPU, and for a GPU.

Both take (22) to (24) of `minilora.optim` in the order that the paper gives at the end of its section 2. The factors
that depend on the step fold into two scalars, computed in double precision:

    lr_t = lr sqrt(1 - beta2^t) / (1 - beta1^t)        eps_hat = eps sqrt(1 - beta2^t)
    theta_t = theta_{t-1} - lr_t m_t / (sqrt(v_t) + eps_hat)

A CPU takes an array `BLOCK` entries at a time, so that the block, its gradient, its means and the temporaries stay in
the cache together. A GPU takes it in one kernel, which reads and writes each entry once. The kernel's statements are C,
and Python as well: a test runs them beside `minilora.optim.adam_update`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Backend
from ..checks import Array

BLOCK = 32_768


def update_in_blocks(
    theta: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, betas: tuple[float, float], eps: float
) -> None:
    """Do the same as `minilora.optim.adam_update`, some rows of the first axis at a time."""
    beta1, beta2 = betas
    lr_t, eps_hat = _folded(t, lr, betas, eps)
    length = max(1, BLOCK * len(theta) // theta.size)
    for start in range(0, len(theta), length):
        theta_b, g_b, m_b, v_b = (array[start : start + length] for array in (theta, g, m, v))
        m_b *= beta1
        m_b += (1 - beta1) * g_b
        v_b *= beta2
        v_b += (1 - beta2) * (g_b * g_b)
        theta_b -= lr_t * m_b / (v_b**0.5 + eps_hat)


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
