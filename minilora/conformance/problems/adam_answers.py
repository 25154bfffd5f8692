"""Adam's right answers: Algorithm 1 of its paper, a part at a time, and ten steps to follow an implementation over.

    m_t = beta1 m_{t-1} + (1 - beta1) g           m_hat = m_t / (1 - beta1^t)
    v_t = beta2 v_{t-1} + (1 - beta2) g^2         v_hat = v_t / (1 - beta2^t)
    theta_t = theta_{t-1} - lr d,    d = m_hat / (sqrt(v_hat) + eps)

Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .problem import Arrays

Betas = tuple[float, float]


def rest(beta: float) -> float:
    """Return 1 - beta in decimals: 0.1 for 0.9, where the difference of the two floats is 0.09999999999999998."""
    return round(1 - beta, 12)


@dataclass(frozen=True)
class AdamFormulas:
    """Adam, a part at a time. A known bug is one of them replaced."""

    betas: Callable[[Betas], Betas] = lambda betas: betas
    m: Callable[[Any, Any, float], Any] = lambda m, g, beta: beta * m + rest(beta) * g
    v: Callable[[Any, Any, float], Any] = lambda v, g, beta: beta * v + rest(beta) * g**2
    m_hat: Callable[[Any, float, int], Any] = lambda m, beta, t: m / (1 - beta**t)
    v_hat: Callable[[Any, float, int], Any] = lambda v, beta, t: v / (1 - beta**t)
    eps: Callable[[float, float, int], float] = lambda eps, beta2, t: eps
    direction: Callable[[Any, Any, float], Any] = lambda m_hat, v_hat, eps: m_hat / (np.sqrt(v_hat) + eps)
    step: Callable[[Any, Any, Any], Any] = lambda d, theta, g: d  # what lr multiplies

    def after(
        self, theta: Any, m: Any, v: Any, g: Any, t: int, *,
        lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Return theta, m and v after step t, counted from 1."""
        beta1, beta2 = self.betas(betas)
        m, v = self.m(m, g, beta1), self.v(v, g, beta2)
        d = self.direction(self.m_hat(m, beta1, t), self.v_hat(v, beta2, t), self.eps(eps, beta2, t))
        return theta - lr * self.step(d, theta, g), m, v


def adam_problem() -> tuple[Arrays, list[Arrays]]:
    """Return parameters and ten gradients: of lora_A so small that the place of eps shows, of lora_B large."""
    rng = np.random.default_rng(0)
    begin = {"lora_A": rng.standard_normal((2, 5)), "lora_B": rng.standard_normal((3, 2))}
    size = {"lora_A": 1e-7, "lora_B": 30.0}
    return begin, [{name: size[name] * rng.standard_normal(p.shape) for name, p in begin.items()} for _ in range(10)]


def adam_follows(begin: Arrays, steps: list[Arrays], **parts: Any) -> Arrays:
    """Return where the steps lead, with lr 1e-3: by Algorithm 1, or with some of its parts replaced."""
    formulas, ends = AdamFormulas(**parts), {}
    for name, p in begin.items():
        theta, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
        for t, grads in enumerate(steps, start=1):
            theta, m, v = formulas.after(theta, m, v, grads[name], t)
        ends[name] = theta
    return ends
