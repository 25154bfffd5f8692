"""The kind "experts": a weight for each of E experts in one array, rows that each go through one, and PEFT's packing.

    y_n = x_n W_e^T + s x_n A_e^T B_e^T,   e = expert_ids[n],   s = alpha / r,   r of one expert
    A_e = rows e r ... e r + r - 1 of lora_A (E r, in),   B_e = columns e, E + e, ... of lora_B (out, r E)

Each expert is a linear layer on its own rows, and all that `Formulas` has holds for each. Its record `ExpertFormulas`
says which factors an expert takes, and from where. An expert without a row has gradients of zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from .problem import Arrays, Problem


@dataclass(frozen=True)
class Stacks(Problem):
    """E linear layers without a bias, `rank` that of one."""

    bias: bool = False
    experts: int = 3
    idle: int = -1  # an expert without a row, if there is one
    layer: ClassVar[tuple[str, ...]] = ("weight", "lora_A", "lora_B")
    exact: ClassVar[tuple[str, ...]] = ("expert_ids",)

    @property
    def expert_ids(self) -> np.ndarray:
        """The expert of each row, (n,), in no order; all but the idle one come up as long as there are rows."""
        used = [e for e in range(self.experts) if e != self.idle]
        ids = np.resize(np.array(used, np.int64), self.n)
        return np.asarray(np.random.default_rng([self.seed, 5]).permutation(ids))

    @property
    def full(self) -> Arrays:
        """The weights (E, out, in), and each row's expert."""
        weight = self.randn("weight", self.experts, self.out_features, self.in_features)
        return {"weight": weight, "expert_ids": self.expert_ids}

    @property
    def factors(self) -> Arrays:
        """lora_A (E r, in) and lora_B (out, r E)."""
        A = self.randn("lora_A", self.experts * self.rank, self.in_features)
        B = self.randn("lora_B", self.out_features, self.rank * self.experts)
        return {"lora_A": A, "lora_B": 0 * B if self.start else B}

    def answered(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return what formulas give for each expert's rows, put together."""
        E, own, ids = self.experts, formulas.experts, self.expert_ids
        A, B = rows["lora_A"], rows["lora_B"]
        rows_of, columns_of = own.rows_of_A(E, self.rank), own.columns_of_B(E, self.rank)
        exchanged = own.exchanged and self.in_features == self.out_features
        total = {name: np.zeros(rows[of].shape) for name, of in
                 {"y": "dy", "x": "x", "lora_A": "lora_A", "lora_B": "lora_B", "merged": "weight"}.items()}  # fmt: skip
        for e in range(E):
            at, taken = ids == e, int(own.factors_of(e, E))
            A_at, B_at = (places[taken % E] for places in (rows_of, columns_of))
            A_e, B_e = A[A_at], (taken < E) * B[:, B_at]
            A_e, B_e = (B_e.T, A_e.T) if exchanged else (A_e, B_e)
            weight = rows["weight"][int(own.weight_of(e, E))]
            layer = {"x": rows["x"][at], "dy": rows["dy"][at], "weight": weight, "lora_A": A_e, "lora_B": B_e}
            answers = self._of_one(formulas, e, int(at.sum())).answers(layer, self.alpha)
            total["y"][at], total["x"][at], total["merged"][e] = (answers[name] for name in ("y", "x", "merged"))
            dA, dB = (answers[name] for name in ("lora_A", "lora_B"))
            dA, dB = (dB.T, dA.T) if exchanged else (dA, dB)
            if taken < E:
                total["lora_A"][A_at] += dA
                total["lora_B"][:, B_at] += dB
        return total

    def _of_one(self, formulas: Any, e: int, count: int) -> Any:
        """Return the formulas of one expert, which has so many of the rows."""
        own = formulas.experts
        return replace(
            formulas,
            scaling=lambda alpha, r: own.scaling_of(formulas.scaling(alpha, r), e, self.experts),
            rows=lambda n: formulas.rows(self.n) * own.rows_of_one(count),
        )

    def place(self, name: str, at: tuple[Any, ...]) -> str:
        """Say of which expert an entry of an answer is."""
        if name in ("y", "x"):
            ids = self.expert_ids.reshape(-1)
            return f", of expert {ids[at[0]]}" if len(at) == 2 else ""
        place = {"lora_A": at[0] // self.rank, "lora_B": at[1] % self.experts, "merged": at[0]}[name]
        return f", of expert {place}"

    def __str__(self) -> str:
        idle = f", none for expert {self.idle}" if self.idle >= 0 else ""
        return f"{super().__str__()} experts={self.experts}{idle}"
