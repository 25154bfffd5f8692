"""The kind "combine": several adapters of one layer, and the one change of weight that is put together from them.

With weights w_i, scalings s_i = alpha_i / r_i, or alpha_i / sqrt(r_i) of an adapter with rsLoRA, and c_i = w_i s_i:

    cat       sum_i c_i B_i A_i                                                    exact; the rank is the sum of the r_i
    svd       the nearest matrix of a given rank to it, in the sum of squares      from its largest singular values
    linear    (sum_i sqrt|c_i| B_i) (sum_i sign(c_i) sqrt|c_i| A_i)                where all r_i are one; cross terms

Each is a matrix (out, in), the change that the new adapter makes with its own scaling. Its factors are free.

An implementation takes lists. Inside the suite there is one array for each: lora_A has the rows of all adapters,
(R, in), and lora_B their columns, (out, R).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from .problem import Arrays, Problem

KEPT = 1e-9
"""Singular values below this part of the largest are zero up to rounding."""


@dataclass(frozen=True)
class Sums(Problem):
    """Adapters to be put together. `rank` is that of "svd"; the alphas are alpha, 2 alpha, 3 alpha, ..."""

    bias: bool = False
    ranks: tuple[int, ...] = ()  # of each adapter
    weights: tuple[float, ...] = ()  # of each adapter
    stabilised: tuple[bool, ...] = ()  # whether each has rsLoRA's scaling
    layer: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    @classmethod
    def of(cls, n_in: int, n_out: int, rank: int, adapters: list[tuple[int, float, bool]], **more: Any) -> Sums:
        """Return a problem of adapters, each with its rank, its weight, and whether it has rsLoRA's scaling."""
        ranks, weights, stabilised = zip(*adapters, strict=True)
        return cls(1, n_in, n_out, rank, ranks=ranks, weights=weights, stabilised=stabilised, **more)

    @property
    def alphas(self) -> list[float]:
        """The alpha of each adapter."""
        return [self.alpha * (i + 1) for i in range(len(self.ranks))]

    @property
    def full(self) -> Arrays:
        """Nothing: a change of weight has no base."""
        return {}

    @property
    def factors(self) -> Arrays:
        """lora_A (R, in) and lora_B (out, R), R the sum of the ranks."""
        R = sum(self.ranks)
        return {
            "lora_A": self.randn("lora_A", R, self.in_features),
            "lora_B": self.randn("lora_B", self.out_features, R),
        }

    def split(self, arrays: Arrays) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each adapter's A (r, in) and B (out, r)."""
        ends = np.cumsum([0, *self.ranks])
        return [(arrays["lora_A"][i:j], arrays["lora_B"][:, i:j]) for i, j in pairwise(ends)]

    def handed(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Return factors, alphas, rsLoRA's flags and weights as lists."""
        As, Bs = map(list, zip(*self.split(layer), strict=True))
        own = {"alpha": self.alphas, "use_rslora": list(self.stabilised), "weights": list(self.weights)}
        return {"lora_A": As, "lora_B": Bs, **own}

    def scalings(self, formulas: Any) -> list[float]:
        """Return each adapter's own scaling."""
        triples = zip(self.alphas, self.ranks, self.stabilised, strict=True)
        return [alpha / r**0.5 if root else formulas.scaling(alpha, r) for alpha, r, root in triples]

    def answered(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return the changes of weight that formulas give, one for each way to put adapters together."""
        own, pairs, count = formulas.sums, self.split(rows), len(self.ranks)
        scalings = [own.sum_scaling(self, i, s) for i, s in enumerate(self.scalings(formulas))]
        terms = [(own.sum_weight(self, i), s, *pairs[i]) for i, s in enumerate(scalings)]
        others = [pairs[int(own.sum_pairs(self, i, count))][0] for i in range(count)]
        D = {"cat": sum(own.in_cat(w, s) * B @ A for (w, s, _, B), A in zip(terms, others, strict=True))}
        if len({*self.ranks}) == 1:
            factors = [own.in_linear(w, s) for w, s, *_ in terms]
            whole_B = sum(b * B for (b, _), (*_, B) in zip(factors, terms, strict=True))
            D["linear"] = whole_B @ sum(a * A for (_, a), (*_, A, _) in zip(factors, terms, strict=True))
        U, S, Vt = np.linalg.svd(sum(own.in_svd(w, s) * B @ A for w, s, A, B in terms), full_matrices=False)
        D["svd"] = U * own.sum_values(S, self.rank) @ Vt
        return {
            name: np.asarray(own.sum_new(self, scalings, self.new_rank(name)) * change) for name, change in D.items()
        }

    def new_rank(self, name: str) -> int:
        """Return the rank of the new adapter."""
        return {"cat": sum(self.ranks), "linear": self.ranks[0], "svd": self.rank}[name]

    def sized(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes, that of "svd" by what becomes of an error in the sum.

        An error E of a matrix D moves its nearest of rank r by |E| (1 + 2 S_1 / (S_r - S_{r+1})) at most, up to terms
        of E^2, and by |E| where D is of rank r itself. Entries of E are errors of sums: of the size of "cat".
        """
        S = np.linalg.svd(self.answered(formulas.with_parts(sum_values=lambda S, r: S), rows)["svd"], compute_uv=False)
        above, below = S[self.rank - 1], S[self.rank] if self.rank < len(S) else 0.0
        times = 1 + 2 * S[0] / (above - below) if below > KEPT * S[0] and above > below else 1.0
        return {**sizes, "svd": np.full_like(sizes["cat"], times * np.linalg.norm(sizes["cat"]))}

    def __str__(self) -> str:
        ranks = ",".join(f"{r}{' rsLoRA' if root else ''}" for r, root in zip(self.ranks, self.stabilised, strict=True))
        alphas, weights = (",".join(f"{number:g}" for number in numbers) for numbers in (self.alphas, self.weights))
        sizes = f"in={self.in_features} out={self.out_features} r={ranks} alpha={alphas}"
        return f"{sizes} weights={weights} rank={self.rank}"
