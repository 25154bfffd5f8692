"""The formulas of LoRA in float64, which compute the right answers of the suite; `tolerance` bounds their rounding.

    y = x W^T + b + s x A^T B^T                      (N, out)
    dx = dy W + s dy B A                             (N, in)
    dA = s B^T (dy^T x),   dB = s (dy^T x) A^T       (r, in), (out, r)

For DoRA, with V = W + s B A, the norms n of its rows, magnitudes m, and G = m / n:

    y = x (G V)^T + b,   dx = dy (G V),   dm = sum_i (dy^T x) V / n,   dV = G (dy^T x) - c V
    c = 0 if n is held constant, and sum_i G (dy^T x) V / n^2 if it is not

With dropout, which applies a mask M with entries 0 or 1 / (1 - p) only in the adapter's path:

    y = x W^T + b + s (M x) A^T B^T,   dx = dy W + M (s dy B A),   dA and dB with M x instead of x

A weight with several slots is a sum of such layers, one for each slot that has an adapter. Experts are such layers too,
each on its own rows. `several` has these, and the formulas that combine several adapters of one layer.

`Formulas` has a name for every part that a public implementation got wrong. A known bug is one part replaced; the list
of bugs is `minilora.conformance.problems.bugs`. Parts that only some kinds of layers have are in separate records. The
formulas build whole matrices, which the layers of this library never do, so the two are independent of each other.
`StartFormulas` has the spread of a new A.

Adam is Algorithm 1 of its paper (Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980):

    m_t = beta1 m_{t-1} + (1 - beta1) g           m_hat = m_t / (1 - beta1^t)
    v_t = beta2 v_{t-1} + (1 - beta2) g^2         v_hat = v_t / (1 - beta2^t)
    theta_t = theta_{t-1} - lr d,    d = m_hat / (sqrt(v_hat) + eps)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .problem import Arrays

Betas = tuple[float, float]
QUANTITIES = {
    "y": "the output",
    "x": "dx, the gradient at the input",
    "lora_A": "lora_A's gradient",
    "lora_B": "lora_B's gradient",
    "magnitude": "magnitude's gradient",
    "merged": "the merged weight",
    "cat": "the sum by cat",
    "linear": "the sum by linear",
    "svd": "the sum by svd",
}
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha / r": lambda alpha, r: alpha / r,
    "alpha / sqrt(r)": lambda alpha, r: alpha / r**0.5,
    "alpha": lambda alpha, r: alpha,
    "1": lambda alpha, r: 1.0,
}
"""The scaling conventions that an implementation may declare."""


def row_norms(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
    """Return the norm of each row of V = W + s B A, (out, 1)."""
    V = W + s * BA
    return np.asarray(np.sqrt((V * V).sum(axis=1, keepdims=True)))


@dataclass(frozen=True)
class OwnFormulas:
    """A record of formulas that only some kinds have."""

    def counted(self) -> Any:
        """Return the record that computes the number of terms when all arrays are ones."""
        return type(self)()


@dataclass(frozen=True)
class DropoutFormulas(OwnFormulas):
    """The effect of a mask (N, in) on x in the update, in the base's path and in dA, and on the update's path in dx."""

    dropped: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x
    dropped_in_dA: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_dx: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda dx, mask: dx * mask

    def inputs(self, x: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the inputs of the update, of the base and of dA."""
        return self.dropped(x, mask), self.dropped_in_base(x, mask), self.dropped_in_dA(x, mask)


@dataclass(frozen=True)
class DoRAFormulas(OwnFormulas):
    """DoRA's norms n (out, 1), its gain G = m / n, and the gradient of m."""

    norm: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = row_norms  # (W, BA, s) -> (out, 1)
    gain: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, n: m[:, None] / (n + (n == 0))
    gain_in_base: Callable[[np.ndarray], np.ndarray] = lambda G: G
    gain_in_update: Callable[[np.ndarray], np.ndarray] = lambda G: G
    through_norm: float = 0.0  # 0 if n is held constant, 1 if the gradient passes through it
    dm: Callable[[np.ndarray, np.ndarray], np.ndarray | None] = lambda dm, n: dm  # None if it is not returned
    bias_in_dm: float = 0.0

    def counted(self) -> DoRAFormulas:
        """Return the record that computes the number of terms when all arrays are ones, without dividing by norms."""
        return DoRAFormulas(norm=lambda W, BA, s: np.ones((len(W), 1)))


@dataclass(frozen=True)
class Formulas:
    """The parts of LoRA. All arrays are float64: x (N, in), W and BA (out, in), A (r, in), B (out, r)."""

    scaling: Callable[[float, int], float] = lambda alpha, r: alpha / r
    weight: Callable[[np.ndarray], np.ndarray] = lambda W: W  # decodes W if it is stored in four bits
    base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, W: x @ W.T
    bias: Callable[[np.ndarray, Any], np.ndarray] = lambda b, G: b
    s_in_base: Callable[[float], float] = lambda s: 1.0
    s_in_bias: Callable[[float], float] = lambda s: 1.0
    update: Any = 1.0  # the factor of the update: a number, or one for each row, (N, 1)
    dx_base: float = 1.0
    dx_update: float = 1.0
    s_in_dA: Callable[[float], float] = lambda s: s
    s_in_dB: Callable[[float], Any] = lambda s: s  # a number, or (r,) or (out, 1)
    s_in_dx: Callable[[float], float] = lambda s: s
    gradient_scale: Callable[[int], float] = lambda n: 1.0  # the factor of the gradients of A and B, for n rows
    merged: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = lambda W, BA, s: W + s * BA
    flipped: Callable[[np.ndarray], np.ndarray] = lambda z: z  # reorders the columns of x and dx, as to flip kernels
    dA_input: Callable[[np.ndarray], np.ndarray] = lambda x: x
    used_A: Callable[[np.ndarray], np.ndarray] = lambda A: A  # the factors as the layer reads them
    used_B: Callable[[np.ndarray], np.ndarray] = lambda B: B
    # Changes to the computed update, to its path in dx, and to the factors' gradients, such as rounding.
    final_update: Callable[..., np.ndarray] = lambda update, x, A, B, s: update
    final_path: Callable[..., np.ndarray] = lambda path, dy, A, B, s: path
    final_gradients: Callable[..., tuple[np.ndarray, np.ndarray]] = lambda dA, dB, dy, x, A, B, s: (dA, dB)
    dropout: DropoutFormulas | None = None
    dora: DoRAFormulas | None = None
    own: Any = None  # the record by which a kind in `several` combines such formulas

    def answers(self, p: Arrays, alpha: float, norms: np.ndarray | None = None) -> Arrays:
        """Return y, the gradients and the merged weight for the rows of one problem.

        If p has absolute values, `norms` are the true norms: the relative error of n is the error of V over n.
        """
        dy, W, A, B = (p[name] for name in ("dy", "weight", "lora_A", "lora_B"))
        W = self.weight(W)
        x, A, B_used = self.flipped(p["x"]), self.used_A(A), self.used_B(B)
        s, b = self.scaling(alpha, len(A)), p.get("bias")
        BA, G, n = B_used @ A, np.ones((len(W), 1), W.dtype), None
        if self.dora is not None and "magnitude" in p:
            n = self.dora.norm(W, BA, s)
            n = n if norms is None else norms**2 / n
            G = self.dora.gain(p["magnitude"], n)
        in_update, in_base, in_dA, through = x, x, x, dy @ (G * BA)
        if self.dropout is not None and "mask" in p:
            in_update, in_base, in_dA = self.dropout.inputs(x, p["mask"])
            through = self.dropout.dropped_in_dx(through, p["mask"])
        G_base, G_update = (G, G) if self.dora is None else (self.dora.gain_in_base(G), self.dora.gain_in_update(G))
        update = self.final_update(self.update * s * (in_update @ (G_update * BA).T), in_update, A, B_used, s)
        y = self.s_in_base(s) * self.base(in_base, G_base * W) + update
        path = self.final_path(self.dx_update * self.s_in_dx(s) * through, dy, A, B_used, s)
        dx = self.dx_base * (dy @ (G * W)) + path
        dV_A, dV_B = (G * (dy.T @ rows) for rows in (self.dA_input(in_dA), in_update))
        y = y if b is None else y + self.s_in_bias(s) * self.bias(b, G)
        answers: dict[str, Any] = {"y": y, "x": self.flipped(dx), "merged": G * self.merged(W, BA, s)}
        if self.dora is not None and n is not None:
            V = W + s * BA
            along = 1 if n.shape[1] == 1 else 0  # the axis of the norm
            passed = self.dora.through_norm * ((G * (dy.T @ x) * V).sum(axis=along, keepdims=True) / n**2) * V
            sign = 1 if norms is None else -1  # absolute values are never subtracted
            dV_A, dV_B = dV_A - sign * passed, dV_B - sign * passed
            dm = self.dora.dm(((dy.T @ x) * V / n).sum(axis=1), n)
            if dm is not None and b is not None:
                dm = dm + self.dora.bias_in_dm * b * (dy / n[:, 0]).sum(axis=0)
            answers["magnitude"] = dm
        share = self.gradient_scale(len(x))
        dA, dB = share * self.s_in_dA(s) * (B_used.T @ dV_A), share * self.s_in_dB(s) * (dV_B @ A.T)
        answers["lora_A"], answers["lora_B"] = self.final_gradients(dA, dB, dy, in_update, A, B_used, s)
        return {name: answers[name] for name in QUANTITIES if answers.get(name) is not None}

    @property
    def records(self) -> dict[str, Any]:
        """The records of these formulas, by name."""
        named = {name: getattr(self, name) for name in ("dropout", "dora", "own")}
        return {name: record for name, record in named.items() if record is not None}

    def with_parts(self, **parts: Any) -> Formulas:
        """Return the formulas with some of their parts, or of their records' parts, replaced."""
        changed = {}
        for name, record in self.records.items():
            of_record = {field.name for field in fields(record)}.intersection(parts)
            changed[name] = replace(record, **{part: parts.pop(part) for part in of_record})
        return replace(self, **changed, **parts)

    def counted(self) -> Formulas:
        """Return the formulas that compute the number of terms of each answer when all arrays are ones."""
        records: dict[str, Any] = {name: record.counted() for name, record in self.records.items()}
        return Formulas(scaling=SCALINGS["1"], **records)


@dataclass(frozen=True)
class StartFormulas:
    """The spread of a new A: its entries are uniform in +-1/sqrt(fan), so their variance is 1 / (3 fan)."""

    fan: Callable[[int, int, int, int], int] = lambda r, n_in, n_out, kernel: n_in * kernel  # kernel: entries of one

    def spread(self, r: int, n_in: int, n_out: int, kernel: int) -> float:
        """Return the standard deviation of A's entries."""
        return float((3 * self.fan(r, n_in, n_out, kernel)) ** -0.5)


RIGHT_FORMULAS = Formulas()


def one_minus(beta: float) -> float:
    """Return 1 - beta rounded to decimals: 0.1 for 0.9, whereas 1 - 0.9 is 0.09999999999999998 in floating point."""
    return round(1 - beta, 12)


@dataclass(frozen=True)
class AdamFormulas:
    """The parts of Adam. A known bug is one part replaced."""

    betas: Callable[[Betas], Betas] = lambda betas: betas
    m: Callable[[Any, Any, float], Any] = lambda m, g, beta: beta * m + one_minus(beta) * g
    v: Callable[[Any, Any, float], Any] = lambda v, g, beta: beta * v + one_minus(beta) * g**2
    m_hat: Callable[[Any, float, int], Any] = lambda m, beta, t: m / (1 - beta**t)
    v_hat: Callable[[Any, float, int], Any] = lambda v, beta, t: v / (1 - beta**t)
    eps: Callable[[float, float, int], float] = lambda eps, beta2, t: eps
    direction: Callable[[Any, Any, float], Any] = lambda m_hat, v_hat, eps: m_hat / (np.sqrt(v_hat) + eps)
    step: Callable[[Any, Any, Any], Any] = lambda d, theta, g: d  # what lr multiplies

    def after(
        self, theta: Any, m: Any, v: Any, g: Any, t: int, *,
        lr: float = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """Return theta, m and v after step t; the first step is 1."""
        beta1, beta2 = self.betas(betas)
        m, v = self.m(m, g, beta1), self.v(v, g, beta2)
        d = self.direction(self.m_hat(m, beta1, t), self.v_hat(v, beta2, t), self.eps(eps, beta2, t))
        return theta - lr * self.step(d, theta, g), m, v


def adam_problem() -> tuple[Arrays, list[Arrays]]:
    """Return parameters and ten gradients; those of lora_A are so small that the position of eps matters."""
    rng = np.random.default_rng(0)
    begin = {"lora_A": rng.standard_normal((2, 5)), "lora_B": rng.standard_normal((3, 2))}
    size = {"lora_A": 1e-7, "lora_B": 30.0}
    return begin, [{name: size[name] * rng.standard_normal(p.shape) for name, p in begin.items()} for _ in range(10)]


def run_adam(begin: Arrays, steps: list[Arrays], **parts: Any) -> Arrays:
    """Return the parameters after the steps with lr 1e-3, by Algorithm 1 with some of its parts replaced, if any."""
    formulas, ends = AdamFormulas(**parts), {}
    for name, p in begin.items():
        theta, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
        for t, grads in enumerate(steps, start=1):
            theta, m, v = formulas.after(theta, m, v, grads[name], t)
        ends[name] = theta
    return ends
