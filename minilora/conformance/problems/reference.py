"""What a LoRA layer should give, in float64, and how far rounding may move it: the answers of the suite.

    y = x W^T + b + s x A^T B^T                      (N, out)
    dx = dy W + s dy B A                             (N, in)
    dA = s B^T (dy^T x),   dB = s (dy^T x) A^T       (r, in), (out, r)

and for DoRA, with V = W + s B A, the lengths n of its rows, magnitudes m, and G = m / n:

    y = x (G V)^T + b,   dx = dy (G V),   dm = sum_i (dy^T x) V / n,   dV = G (dy^T x) - c V
    c = 0 where n is taken for a constant, and sum_i G (dy^T x) V / n^2 where it is not

and with dropout, for a mask M that is 0 or 1 / (1 - p), in the adapter's path alone:

    y = x W^T + b + s (M x) A^T B^T,   dx = dy W + M (s dy B A),   dA and dB by M x

A weight with several slots is a sum of such layers, one for each slot that has an adapter: `kinds.Fused`.

`Formulas` holds every part of these that public implementations got wrong, under a name: a known bug is one part
replaced, and `minilora.conformance.bugs.table` is the list of them. They form whole matrices, which the layers of this
library never do: this is another way to the same numbers. `StartFormulas` has how a new A is spread.

ROUNDING. A sum of K terms t_k, in a precision of unit roundoff u, is off by sum_j e_j p_j: p_j are its partial sums,
and e_j is the rounding of one addition, |e_j| <= u, with a root mean square of 0.43 u. Let S = sum_k |t_k|.

    any terms, any order     |p_j| <= S, so the error is at most K u S
    Gaussian terms           half of S has either sign, so |p_j| <= S / 2 in any order, also with all positive terms
                             first: the standard deviation of the error is at most 0.43 sqrt(K) u S / 2, a fifth of
                             sqrt(K) u S

The problems are Gaussian. So max(16, sqrt(K)) u S is allowed: the bound itself for up to 16 terms, and almost five
standard deviations of the worst order for more. S is the same formula on absolute values, and K the same formula on
ones. An answer's *size* is S, times sqrt(K) / 16 where K is above 256, and `TOLERANCE` u times the size is allowed.

Sources: Wilkinson, "Rounding Errors in Algebraic Processes" (1963), for the bound; Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019), for sqrt(K). In half precision the worst orders
stop growing (1 + 256 = 256 in bfloat16), which no root of K covers: there, sums as they are in use are allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .problem import Arrays, Problem

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number of each precision."""
TOLERANCE = 16
TINY = 1e-300
"""Added to a size of zero: an answer without a term must be zero."""


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
    # with dropout: what the mask does to x in the output, in the base's path, and in dA; and to dx
    masked: bool = False
    dropped: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_base: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x
    dropped_in_dA: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda x, mask: x * mask
    dropped_in_dx: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda dx, mask: dx * mask
    # what becomes of the update and of its path in dx before they are added, and of the factors' gradients, where they
    # are rounded on the way
    updated: Callable[..., np.ndarray] = lambda update, x, A, B, s: update
    passed: Callable[..., np.ndarray] = lambda path, dy, A, B, s: path
    trained: Callable[..., tuple[np.ndarray, np.ndarray]] = lambda dA, dB, dy, x, A, B, s: (dA, dB)
    # and where a weight has slots: the rows that slot i's update is added to, or None; its alpha and its rank; the slot
    # whose lora_A it uses; and how often its path is in dx
    slot_rows: Callable[[Any, int], Any] = lambda fused, i: fused.rows_of(i)
    slot_scale: Callable[[Any, int], Any] = lambda fused, i: (fused.alphas[i], fused.ranks[i])
    slot_down: Callable[[Any, int], int] = lambda fused, i: i
    slot_in_dx: Callable[[Any, int], float] = lambda fused, i: 1.0
    # and for DoRA
    length: Callable[[np.ndarray, np.ndarray, float], np.ndarray] | None = None  # (W, BA, s) -> (out, 1)
    gain: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, n: m[:, None] / (n + (n == 0))
    gain_in_base: Callable[[np.ndarray], np.ndarray] = lambda G: G
    gain_in_update: Callable[[np.ndarray], np.ndarray] = lambda G: G
    through_norm: float = 0.0  # 0 where n is a constant, 1 where the gradient passes through it
    dm: Callable[[np.ndarray, np.ndarray], np.ndarray | None] = lambda dm, n: dm  # None: it is not returned
    bias_in_dm: float = 0.0

    def answers(self, p: Arrays, alpha: float, lengths: np.ndarray | None = None) -> Arrays:
        """Return y, the gradients and the merged weight for one problem's rows.

        `lengths` are the true ones, where p has absolute values: an error in V moves n by as much, relative to n.
        """
        dy, W, A, B = (p[name] for name in ("dy", "weight", "lora_A", "lora_B"))
        W = self.weight(W)
        x, A, B_used = self.turned(p["x"]), self.down(A), self.hidden(B)
        s, b = self.scaling(alpha, len(A)), p.get("bias")
        BA, G, n = B_used @ A, np.ones((len(W), 1), W.dtype), None
        if self.length is not None and "magnitude" in p:
            n = self.length(W, BA, s)
            n = n if lengths is None else lengths**2 / n
            G = self.gain(p["magnitude"], n)
        kept, in_base, in_dA, through = x, x, x, dy @ (G * BA)
        if (mask := p.get("mask")) is not None:
            kept, in_base, in_dA = (f(x, mask) for f in (self.dropped, self.dropped_in_base, self.dropped_in_dA))
            through = self.dropped_in_dx(through, mask)
        G_base, G_update = self.gain_in_base(G), self.gain_in_update(G)
        update = self.updated(self.update * s * (kept @ (G_update * BA).T), kept, A, B_used, s)
        y = self.s_in_base(s) * self.base(in_base, G_base * W) + update
        path = self.passed(self.dx_update * self.s_in_dx(s) * through, dy, A, B_used, s)
        dx = self.dx_base * (dy @ (G * W)) + path
        dV_A, dV_B = (G * (dy.T @ rows) for rows in (self.seen_by_dA(in_dA), kept))
        y = y if b is None else y + self.s_in_bias(s) * self.bias(b, G)
        found: dict[str, Any] = {"y": y, "x": self.turned(dx), "merged": G * self.merged(W, BA, s)}
        if n is not None:
            V = W + s * BA
            along = 1 if n.shape[1] == 1 else 0  # the axis that the length is taken along
            passed = self.through_norm * ((G * (dy.T @ x) * V).sum(axis=along, keepdims=True) / n**2) * V
            sign = 1 if lengths is None else -1  # absolute values are never subtracted
            dV_A, dV_B = dV_A - sign * passed, dV_B - sign * passed
            dm = self.dm(((dy.T @ x) * V / n).sum(axis=1), n)
            if dm is not None and b is not None:
                dm = dm + self.bias_in_dm * b * (dy / n[:, 0]).sum(axis=0)
            found["magnitude"] = dm
        share = self.rows(len(x))
        dA, dB = share * self.s_in_dA(s) * (B_used.T @ dV_A), share * self.s_in_dB(s) * (dV_B @ A.T)
        found["lora_A"], found["lora_B"] = self.trained(dA, dB, dy, kept, A, B_used, s)
        return {name: found[name] for name in QUANTITIES if found.get(name) is not None}


@dataclass(frozen=True)
class StartFormulas:
    """How far the entries of a new A are spread, by the variance 1 / (3 fan) of a uniform start in +-1/sqrt(fan)."""

    fan: Callable[[int, int, int, int], int] = lambda r, n_in, n_out, kernel: n_in * kernel  # kernel: its entries

    def spread(self, r: int, n_in: int, n_out: int, kernel: int) -> float:
        """Return the standard deviation of A's entries."""
        return float((3 * self.fan(r, n_in, n_out, kernel)) ** -0.5)


def rows_length(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
    """Return the length of each row of V, (out, 1)."""
    V = W + s * BA
    return np.asarray(np.sqrt((V * V).sum(axis=1, keepdims=True)))


QUANTITIES = {
    "y": "the output",
    "x": "dx, the gradient at the input",
    "lora_A": "lora_A's gradient",
    "lora_B": "lora_B's gradient",
    "magnitude": "magnitude's gradient",
    "merged": "the merged weight",
}
SCALINGS: dict[str, Callable[[float, int], float]] = {
    "alpha / r": lambda alpha, r: alpha / r,
    "alpha / sqrt(r)": lambda alpha, r: alpha / r**0.5,
    "alpha": lambda alpha, r: alpha,
    "1": lambda alpha, r: 1.0,
}
"""The conventions that an implementation may declare."""
RIGHT = Formulas()
RSLORA = Formulas(scaling=SCALINGS["alpha / sqrt(r)"])
DORA = Formulas(length=rows_length)
"""With the norm a constant, as PEFT has it; ``through_norm=1`` is the full gradient."""
DROPOUT = Formulas(masked=True)


@dataclass(frozen=True, eq=False)  # a trial is itself alone: what is computed for it can be kept
class Trial:
    """One problem in one precision: arrays as they are handed over, the right answers, and their sizes."""

    problem: Problem
    arrays: Arrays  # x, dy, weight, bias or not, lora_A, lora_B, magnitude, mask: rounded, and as the kind has them
    right: Arrays  # the answers in float64
    sizes: Arrays  # what rounding is measured in: the same formulas on absolute values, larger for long sums
    unit: float  # unit roundoff of the precision
    formulas: Formulas
    growth: Arrays  # of the sizes: the root of the number of terms over 16, where that is above 1

    @classmethod
    def draw(cls, problem: Problem, dtype: str, formulas: Formulas, view: type[np.ndarray] = np.ndarray) -> Trial:
        """Draw a problem's values, round them, and answer them; by the arithmetic of a subclass of arrays, if asked."""
        full = {"x": problem.x, "dy": problem.dy, **problem.full, **problem.factors}
        if formulas.length is not None:
            full["magnitude"] = problem.magnitude
        if formulas.masked:
            full["mask"] = problem.mask
        arrays = {name: a if name in problem.exact else round_to(a, dtype) for name, a in full.items()}
        rows = {name: a.view(view) for name, a in _rows(problem, arrays).items()}
        right, growth = problem.answered(formulas, rows), _growth(problem, rows)
        return cls(problem, arrays, right, _sizes(problem, rows, formulas, growth), UNIT[dtype], formulas, growth)

    def by(self, **parts: Any) -> Arrays:
        """Return the answers with some parts of the formulas replaced: what a known bug would give."""
        formulas = replace(self.formulas, **parts)
        return self.problem.answered(formulas, _rows(self.problem, self.arrays))

    def sizes_by(self, **parts: Any) -> Arrays:
        """Return the sizes with some parts of the formulas replaced, and nowhere less than those of the right answers.

        A bug's answers may be much larger than the right ones, and their rounding with them.
        """
        if not parts:
            return self.sizes
        formulas = replace(self.formulas, **parts)
        found = _sizes(self.problem, _rows(self.problem, self.arrays), formulas, self.growth)
        return {name: np.maximum(size, found.get(name, 0.0)) for name, size in self.sizes.items()}

    def distance(
        self, name: str, found: np.ndarray, expected: np.ndarray | None = None, sizes: Arrays | None = None
    ) -> float:
        """Return how far an answer is from the expected one in units of rounding; by default, from the right one."""
        expected = self.right[name] if expected is None else expected
        if not np.shape(found) == np.shape(expected) == np.shape(self.sizes[name]):
            return float("inf")
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(np.asarray(found, np.float64) - expected)
            size = self.unit * np.maximum((sizes or self.sizes)[name], np.abs(expected))
            furthest = (error / (size + TINY)).max(initial=0.0)
        return float("inf" if np.isnan(furthest) else furthest)

    def agrees(self, name: str, found: np.ndarray, expected: np.ndarray | None = None, looser: float = 1.0) -> bool:
        """Return whether an answer is the expected one up to rounding; the right one by default."""
        return self.distance(name, found, expected) <= looser * TOLERANCE


@lru_cache(maxsize=256)  # all problems of all kinds in four precisions
def drawn(problem: Problem, dtype: str, formulas: Formulas) -> Trial:
    """Return a problem's trial, drawn once for all checks; its arrays are read only."""
    trial = Trial.draw(problem, dtype, formulas)
    for arrays in (trial.arrays, trial.right, trial.sizes, trial.growth):
        for array in arrays.values():
            array.flags.writeable = False
    return trial


def _sizes(problem: Problem, rows: Arrays, formulas: Formulas, growth: Arrays) -> Arrays:
    """Return what the rounding of each answer is measured in: S, times its growth."""
    lengths = None
    if formulas.length is not None:
        BA = rows["lora_B"] @ rows["lora_A"]
        lengths = formulas.length(rows["weight"], BA, formulas.scaling(problem.alpha, problem.rank))
    absolute = {name: np.abs(a) for name, a in rows.items()}
    sizes = problem.answered(_absolute(formulas), absolute, lengths)
    return problem.sized({name: size * growth[name] for name, size in sizes.items()}, formulas, rows)


def _growth(problem: Problem, rows: Arrays) -> Arrays:
    """Return sqrt(K) / 16, and at least 1, for the K terms of each answer."""
    ones = {name: (a != 0).astype(np.float64) for name, a in rows.items()}
    terms = problem.answered(COUNTED, ones)
    return {name: np.maximum(1.0, np.sqrt(count) / TOLERANCE) for name, count in terms.items()}


COUNTED = Formulas(scaling=SCALINGS["1"], length=lambda W, BA, s: np.ones((len(W), 1)))
"""On ones, these give the number of terms in each answer."""


def _absolute(formulas: Formulas) -> Formulas:
    """Return formulas with the absolute value of each part: then no term is subtracted from another."""
    return replace(formulas, **{one.name: _absolute_part(getattr(formulas, one.name)) for one in fields(formulas)})


def _absolute_part(part: Any) -> Any:
    if not callable(part):
        return part if part is None else abs(part)

    def absolute(*given: Any) -> Any:
        found = part(*given)
        if isinstance(found, tuple):
            return tuple(map(np.abs, found))
        return found if found is None else np.abs(found)

    return absolute


def _rows(problem: Problem, arrays: Arrays) -> Arrays:
    """Return a problem's arrays on rows, in float64."""
    exact = {name: a if a.dtype.kind in "iu" else a.astype(np.float64) for name, a in arrays.items()}
    return problem.rows(exact)


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a precision. NumPy has no bfloat16: its numbers are float32 with the lower half of the bits zero."""
    if array.dtype.kind in "iu":
        return array
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
