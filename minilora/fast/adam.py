"""Adam's update for a GPU, in one launch: each entry is read and written once, and not once for each operation.

The statements are C, and Python as well: a test runs them beside `minilora.optim.adam_update`. They take (22) to (24)
in the order that the paper gives at the end of its section 2: the factors that depend on the step fold into two
scalars, lr_t and eps_hat, computed in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Backend
from ..checks import Array

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
        root = (1 - beta2**t) ** 0.5
        lr_t, eps_hat = lr * root / (1 - beta1**t), eps * root
        kernel(g, beta1, 1 - beta1, beta2, 1 - beta2, lr_t, eps_hat, theta, m, v)

    return update
