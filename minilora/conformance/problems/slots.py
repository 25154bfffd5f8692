"""The kind "fused": one weight whose outputs are slots, as q, k and v or gate and up, each with factors of its own.

    y = x W^T + b,   and y[slot i] += s_i x A_i^T B_i^T,   s_i = alpha_i / r_i

It is a sum of linear layers: the base with the first slot's factors, and for each further slot one without a base. So
all that `Formulas` has holds for each slot, and its record `SlotFormulas` says how the slots are put together.

An implementation takes and returns lists. Inside the suite there is one array for each: lora_A has the rows of all
slots, (R, in), and lora_B is (out, R), zero beside each slot's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from .problem import Arrays, Problem


@dataclass(frozen=True)
class Fused(Problem):
    """A linear layer whose outputs are slots. `out_features` is the sum of their widths, `rank` the first adapter's."""

    widths: tuple[int, ...] = ()  # outputs of each slot
    ranks: tuple[int, ...] = ()  # of each slot; 0 where it has no adapter
    one_rank: bool = False  # whether all slots have one alpha; otherwise the second adapter's is twice the first's, ...
    listed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    @classmethod
    def of(cls, n: int, in_features: int, widths: tuple[int, ...], ranks: tuple[int, ...], **more: Any) -> Fused:
        """Return a problem of these slots."""
        return cls(n, in_features, sum(widths), next(filter(None, ranks)), widths=widths, ranks=ranks, **more)

    @property
    def adapted(self) -> list[int]:
        """The slots that have an adapter."""
        return [i for i, rank in enumerate(self.ranks) if rank]

    @property
    def alphas(self) -> list[float]:
        """The alpha of each slot; 0 where it has no adapter."""
        times = np.cumsum([rank > 0 for rank in self.ranks]) if not self.one_rank else np.ones(len(self.ranks))
        return [float(self.alpha * t) if rank else 0.0 for t, rank in zip(times, self.ranks, strict=True)]

    def span(self, i: int) -> slice:
        """Return where a slot's outputs stand among all."""
        return slice(sum(self.widths[:i]), sum(self.widths[: i + 1]))

    def rows_of(self, i: int) -> np.ndarray:
        """Return the outputs of a slot, a number each."""
        return np.arange(self.out_features)[self.span(i)]

    def columns(self, i: int) -> slice:
        """Return where a slot's ranks stand among all."""
        return slice(sum(self.ranks[:i]), sum(self.ranks[: i + 1]))

    @property
    def factors(self) -> Arrays:
        """lora_A of all slots, (R, in), and lora_B, (out, R), with zeros beside each slot's own."""
        A = self.randn("lora_A", sum(self.ranks), self.in_features)
        B = self.randn("lora_B", self.out_features, sum(self.ranks))
        return {"lora_A": A, "lora_B": self._own(B) * (not self.start)}

    def _own(self, B: np.ndarray) -> np.ndarray:
        """Return lora_B, or its gradient, with zeros beside what the slots have of their own."""
        whole = np.zeros_like(B)
        for i in self.adapted:
            whole[self.span(i), self.columns(i)] = B[self.span(i), self.columns(i)]
        return whole

    def split(self, name: str, array: np.ndarray) -> list[np.ndarray | None]:
        """Return lora_A or lora_B as a list: each slot's own, None where it has no adapter."""
        every = range(len(self.widths))
        parts = [array[self.columns(i)] if name == "lora_A" else array[self.span(i), self.columns(i)] for i in every]
        return [part if i in self.adapted else None for i, part in enumerate(parts)]

    def joined(self, name: str, parts: list[np.ndarray | None]) -> np.ndarray:
        """Return the one array of a list as `split` gives it.

        Raises
        ------
        ValueError
            If a slot's array is missing, or has another shape, or there is one where the slot has no adapter.
        """
        if len(parts) != len(self.widths):
            raise ValueError(f"{len(parts)} arrays for {name}, expected {len(self.widths)}, one for each slot")
        whole = np.zeros_like(self.factors[name], np.result_type(np.float16, *(p for p in parts if p is not None)))
        for i, (part, own) in enumerate(zip(parts, self.split(name, whole), strict=True)):
            if own is None and part is not None and part.any():
                raise ValueError(f"{name} of slot {i}, which has no adapter")
            if own is not None and (part is None or part.shape != own.shape):
                got = "nothing" if part is None else f"shape {part.shape}"
                raise ValueError(f"{got} for {name} of slot {i}, expected shape {own.shape}")
            if own is not None:
                own[...] = part
        return whole

    def place(self, name: str, at: tuple[Any, ...]) -> str:
        """Say in which slot an entry of an answer is; of dx, which all slots add to, nothing."""
        if name == "x":
            return ""
        number = int(at[1 if name == "y" else 0])
        ends = np.cumsum(self.ranks if name == "lora_A" else self.widths)
        return f", in slot {int(np.searchsorted(ends, number, side='right'))}"

    def named(self, name: str, as_name: str, array: np.ndarray) -> Arrays:
        """Return an array as it stands in a file: of the factors and their gradients each slot's own, by its number."""
        if name not in self.listed:
            return {as_name: array}
        parts = enumerate(self.split(name, array))
        return {f"{as_name}.{i}": part for i, part in parts if part is not None}

    def handed(self, layer: dict[str, Any]) -> dict[str, Any]:
        """Return the factors and alpha as lists, None where a slot has no adapter, and the slots' widths last."""
        lists = {name: self.split(name, layer[name]) for name in self.listed}
        alphas = [alpha if rank else None for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        return {**layer, **lists, "alpha": alphas, "widths": list(self.widths)}

    @property
    def options(self) -> dict[str, Any]:
        """The slots' widths."""
        return {"widths": self.widths}

    def only(self, names: frozenset[str]) -> Fused:
        """Return the same problem with the slots that are declared: of one rank and alpha, of one width, 2 or 3."""
        widths, ranks, one_rank = self.widths, self.ranks, "one_rank" in names
        count = next((n for n in (2, 3) if f"slots {n}" in names), len(widths))
        widths, ranks = (*widths, widths[-1])[:count], (*ranks, 0)[:count]
        if "one_width" in names:
            widths = (max(widths),) * count
        if one_rank:
            ranks = tuple(self.rank * (rank > 0) for rank in ranks)
        first = next(filter(None, ranks))
        return replace(self, out_features=sum(widths), widths=widths, ranks=ranks, rank=first, one_rank=one_rank)

    def answered(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return the sum of what formulas give for each slot."""
        total: Arrays = {"lora_A": np.zeros_like(rows["lora_A"]), "lora_B": np.zeros_like(rows["lora_B"])}
        for count, i in enumerate(self.adapted):
            to, s = formulas.slots.slot_rows(self, i), formulas.scaling(*formulas.slots.slot_scale(self, i))
            down, own = self.columns(formulas.slots.slot_down(self, i)), self.columns(i)
            B = np.zeros_like(rows["lora_B"][:, own])
            if to is not None:
                B[to] = formulas.hidden(rows["lora_B"][self.span(i), own])
            base = {name: rows[name] * (count == 0) for name in ("weight", "bias") if name in rows}
            passed = formulas.dx_update * formulas.slots.slot_in_dx(self, i)
            of_slot = replace(formulas, scaling=lambda alpha, r, s=s: s, hidden=lambda B: B, dx_update=passed)
            layer = rows | base | {"lora_A": rows["lora_A"][down], "lora_B": B}
            answers = {name: np.asarray(a) for name, a in of_slot.answers(layer, self.alpha, lengths).items()}
            total["lora_A"][down] += answers["lora_A"]
            if to is not None:
                total["lora_B"][self.span(i), own] = answers["lora_B"][to]
            for name in ("y", "x", "merged"):
                total[name] = total[name] + answers[name] if name in total else answers[name]
        return {name: np.asarray(a) for name, a in total.items()}

    def __str__(self) -> str:
        ranks, alphas = (",".join(f"{n:g}" if n else "-" for n in numbers) for numbers in (self.ranks, self.alphas))
        slots = ",".join(map(str, self.widths))
        return f"N={self.n} in={self.in_features} out={self.out_features} slots={slots} r={ranks} alpha={alphas}"
