"""What a LoRA layer should give, in float64: the answers of the suite. `tolerance` says how far rounding may move them.

    y = x W^T + b + s x A^T B^T                      (N, out)
    dx = dy W + s dy B A                             (N, in)
    dA = s B^T (dy^T x),   dB = s (dy^T x) A^T       (r, in), (out, r)

and for DoRA, with V = W + s B A, the lengths n of its rows, magnitudes m, and G = m / n:

    y = x (G V)^T + b,   dx = dy (G V),   dm = sum_i (dy^T x) V / n,   dV = G (dy^T x) - c V
    c = 0 where n is taken for a constant, and sum_i G (dy^T x) V / n^2 where it is not

and with dropout, for a mask M that is 0 or 1 / (1 - p), in the adapter's path alone:

    y = x W^T + b + s (M x) A^T B^T,   dx = dy W + M (s dy B A),   dA and dB by M x

A weight with several slots is a sum of such layers, one for each slot that has an adapter; so are the weights of
experts, each on its own rows. And several adapters of one layer are put together. `several` has these.

`Formulas` holds every part of these that public implementations got wrong, under a name: a known bug is one part
replaced, and `minilora.conformance.problems.bugs` is the list of them. What only some kinds of layers have stands in
records of its own. The formulas form whole matrices, which the layers of this library never do: this is another way to
the same numbers. `StartFormulas` has how a new A is spread.

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
"""The conventions that an implementation may declare."""


def rows_length(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
    """Return the length of each row of V, (out, 1)."""
    V = W + s * BA
    return np.asarray(np.sqrt((V * V).sum(axis=1, keepdims=True)))


@dataclass(frozen=True)
class Record:
    """Parts of the formulas that only some kinds have."""

    def counted(self) -> Any:
        """Return the record that gives, on ones, the number of terms."""
        return type(self)()


@dataclass(frozen=True)
class DropoutFormulas(Record):
    """What a mask (N, in) does to x in the update, in the base's path, and in dA; and to the update's part of dx."""

    dropped: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x
    dropped_in_dA: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_dx: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda dx, mask: dx * mask

    def inputs(self, x: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x as the update, the base and dA see it."""
        return self.dropped(x, mask), self.dropped_in_base(x, mask), self.dropped_in_dA(x, mask)


@dataclass(frozen=True)
class DoRAFormulas(Record):
    """DoRA's lengths n (out, 1), its gain G = m / n, and what trains m."""

    length: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = rows_length  # (W, BA, s) -> (out, 1)
    gain: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, n: m[:, None] / (n + (n == 0))
    gain_in_base: Callable[[np.ndarray], np.ndarray] = lambda G: G
    gain_in_update: Callable[[np.ndarray], np.ndarray] = lambda G: G
    through_norm: float = 0.0  # 0 where n is a constant, 1 where the gradient passes through it
    dm: Callable[[np.ndarray, np.ndarray], np.ndarray | None] = lambda dm, n: dm  # None: it is not returned
    bias_in_dm: float = 0.0

    def counted(self) -> DoRAFormulas:
        """Return the record that gives, on ones, the number of terms: no length is divided by."""
        return DoRAFormulas(length=lambda W, BA, s: np.ones((len(W), 1)))


@dataclass(frozen=True)
class Formulas:
    """LoRA, a part at a time. All arrays are float64; x (N, in), W and BA (out, in), A (r, in), B (out, r)."""

    scaling: Callable[[float, int], float] = lambda alpha, r: alpha / r
    weight: Callable[[np.ndarray], np.ndarray] = lambda W: W  # what codes stand for, where W is kept in four bits
    base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, W: x @ W.T
    bias: Callable[[np.ndarray, Any], np.ndarray] = lambda b, G: b
    s_in_base: Callable[[float], float] = lambda s: 1.0
    s_in_bias: Callable[[float], float] = lambda s: 1.0
    update: Any = 1.0  # a number, or (N, 1): one for each row
    dx_base: float = 1.0
    dx_update: float = 1.0
    s_in_dA: Callable[[float], float] = lambda s: s
    s_in_dB: Callable[[float], Any] = lambda s: s  # a number, or (r,) or (out, 1)
    s_in_dx: Callable[[float], float] = lambda s: s
    rows: Callable[[int], float] = lambda n: 1.0  # what the gradients of the factors are multiplied with
    merged: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = lambda W, BA, s: W + s * BA
    turned: Callable[[np.ndarray], np.ndarray] = lambda z: z  # on the columns of x, and of dx
    seen_by_dA: Callable[[np.ndarray], np.ndarray] = lambda x: x
    down: Callable[[np.ndarray], np.ndarray] = lambda A: A  # how A is read, and how B takes the r hidden numbers
    hidden: Callable[[np.ndarray], np.ndarray] = lambda B: B
    # what becomes of the update, of its path in dx, and of the factors' gradients, where these are rounded
    updated: Callable[..., np.ndarray] = lambda update, x, A, B, s: update
    passed: Callable[..., np.ndarray] = lambda path, dy, A, B, s: path
    trained: Callable[..., tuple[np.ndarray, np.ndarray]] = lambda dA, dB, dy, x, A, B, s: (dA, dB)
    dropout: DropoutFormulas | None = None
    dora: DoRAFormulas | None = None
    own: Any = None  # the record of a kind's own, by which its problems put such formulas together

    def answers(self, p: Arrays, alpha: float, lengths: np.ndarray | None = None) -> Arrays:
        """Return y, the gradients and the merged weight for one problem's rows.

        `lengths` are the true ones, where p has absolute values: an error in V moves n by as much, relative to n.
        """
        dy, W, A, B = (p[name] for name in ("dy", "weight", "lora_A", "lora_B"))
        W = self.weight(W)
        x, A, B_used = self.turned(p["x"]), self.down(A), self.hidden(B)
        s, b = self.scaling(alpha, len(A)), p.get("bias")
        BA, G, n = B_used @ A, np.ones((len(W), 1), W.dtype), None
        if self.dora is not None and "magnitude" in p:
            n = self.dora.length(W, BA, s)
            n = n if lengths is None else lengths**2 / n
            G = self.dora.gain(p["magnitude"], n)
        in_update, in_base, in_dA, through = x, x, x, dy @ (G * BA)
        if self.dropout is not None and "mask" in p:
            in_update, in_base, in_dA = self.dropout.inputs(x, p["mask"])
            through = self.dropout.dropped_in_dx(through, p["mask"])
        G_base, G_update = (G, G) if self.dora is None else (self.dora.gain_in_base(G), self.dora.gain_in_update(G))
        update = self.updated(self.update * s * (in_update @ (G_update * BA).T), in_update, A, B_used, s)
        y = self.s_in_base(s) * self.base(in_base, G_base * W) + update
        path = self.passed(self.dx_update * self.s_in_dx(s) * through, dy, A, B_used, s)
        dx = self.dx_base * (dy @ (G * W)) + path
        dV_A, dV_B = (G * (dy.T @ rows) for rows in (self.seen_by_dA(in_dA), in_update))
        y = y if b is None else y + self.s_in_bias(s) * self.bias(b, G)
        answers: dict[str, Any] = {"y": y, "x": self.turned(dx), "merged": G * self.merged(W, BA, s)}
        if self.dora is not None and n is not None:
            V = W + s * BA
            along = 1 if n.shape[1] == 1 else 0  # the axis that the length is taken along
            passed = self.dora.through_norm * ((G * (dy.T @ x) * V).sum(axis=along, keepdims=True) / n**2) * V
            sign = 1 if lengths is None else -1  # absolute values are never subtracted
            dV_A, dV_B = dV_A - sign * passed, dV_B - sign * passed
            dm = self.dora.dm(((dy.T @ x) * V / n).sum(axis=1), n)
            if dm is not None and b is not None:
                dm = dm + self.dora.bias_in_dm * b * (dy / n[:, 0]).sum(axis=0)
            answers["magnitude"] = dm
        share = self.rows(len(x))
        dA, dB = share * self.s_in_dA(s) * (B_used.T @ dV_A), share * self.s_in_dB(s) * (dV_B @ A.T)
        answers["lora_A"], answers["lora_B"] = self.trained(dA, dB, dy, in_update, A, B_used, s)
        return {name: answers[name] for name in QUANTITIES if answers.get(name) is not None}

    @property
    def records(self) -> dict[str, Any]:
        """The records that it has."""
        named = {name: getattr(self, name) for name in ("dropout", "dora", "own")}
        return {name: record for name, record in named.items() if record is not None}

    def with_parts(self, **parts: Any) -> Formulas:
        """Return the formulas with some parts replaced, also of their records."""
        changed = {}
        for name, record in self.records.items():
            of_record = {field.name for field in fields(record)}.intersection(parts)
            changed[name] = replace(record, **{part: parts.pop(part) for part in of_record})
        return replace(self, **changed, **parts)

    def counted(self) -> Formulas:
        """Return the formulas that give, on ones, the number of terms in each answer."""
        records: dict[str, Any] = {name: record.counted() for name, record in self.records.items()}
        return Formulas(scaling=SCALINGS["1"], **records)


@dataclass(frozen=True)
class StartFormulas:
    """How far the entries of a new A are spread, by the variance 1 / (3 fan) of a uniform start in +-1/sqrt(fan)."""

    fan: Callable[[int, int, int, int], int] = lambda r, n_in, n_out, kernel: n_in * kernel  # kernel: its entries

    def spread(self, r: int, n_in: int, n_out: int, kernel: int) -> float:
        """Return the standard deviation of A's entries."""
        return float((3 * self.fan(r, n_in, n_out, kernel)) ** -0.5)


RIGHT = Formulas()


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
