"""The kinds whose arrays hold several layers: fused slots of one weight, stacked experts, and combined adapters.

"fused": one weight whose outputs are split into slots, such as q, k and v or gate and up, each with its own factors:

    y = x W^T + b,   and y[slot i] += s_i x A_i^T B_i^T,   s_i = alpha_i / r_i

It is a sum of linear layers: the base with the first slot's factors, and one layer without a base for each further
slot. So every part of `Formulas` applies to each slot, and the record `FusedFormulas` describes how the slots are
combined. An implementation accepts and returns lists. The suite stores one array instead: lora_A has the rows of all
slots, (R, in), and lora_B is (out, R), zero outside the block of each slot.

"experts": the weights of E experts in one array, with one expert for each row of the input, packed as in PEFT:

    y_n = x_n W_e^T + s x_n A_e^T B_e^T,   e = expert_ids[n],   s = alpha / r,   r of one expert
    A_e = rows e r ... e r + r - 1 of lora_A (E r, in),   B_e = columns e, E + e, ... of lora_B (out, r E)

Each expert is a linear layer on its own rows, so every part of `Formulas` applies to each. The record `ExpertFormulas`
says which factors an expert uses and where they are stored. An expert without rows has gradients of zero.

"combine": several adapters of one layer, and the change of weight of the adapter that combines them. With weights w_i,
scalings s_i = alpha_i / r_i, or alpha_i / sqrt(r_i) for an adapter with rsLoRA, and c_i = w_i s_i:

    cat       sum_i c_i B_i A_i                                        exact; the rank is the sum of the r_i
    svd       the best approximation of this sum with a given rank     from its largest singular values
    linear    (sum_i sqrt|c_i| B_i) (sum_i sign(c_i) sqrt|c_i| A_i)    if all r_i are equal; has cross terms

Each is a matrix (out, in): the change that the new adapter makes, with its own scaling. The factors themselves are not
compared. An implementation accepts lists. The suite stores the rows of all adapters in lora_A, (R, in), and their
columns in lora_B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from .formulas import Formulas, OwnFormulas
from .kind import LAYER_CLAIMS, Kind
from .problem import Arrays, Problem

WAYS = ("cat", "linear", "svd")
"""The ways to combine adapters."""
NEGLIGIBLE = 1e-9
"""The share of the largest singular value below which a singular value counts as zero."""


@dataclass(frozen=True)
class FusedFormulas(OwnFormulas):
    """The parts that describe how the slots of a weight are combined, as functions of the problem and a slot i."""

    slot_rows: Callable[[Any, int], Any] = lambda fused, i: fused.rows_of(i)  # the rows of its update, or None
    slot_scale: Callable[[Any, int], Any] = lambda fused, i: (fused.alphas[i], fused.ranks[i])
    slot_of_A: Callable[[Any, int], int] = lambda fused, i: i  # the slot whose lora_A it uses
    slot_in_dx: Callable[[Any, int], float] = lambda fused, i: 1.0  # the factor of its path in dx


@dataclass(frozen=True)
class FusedProblem(Problem):
    """A linear layer whose outputs are slots. `out_features` is the sum of their widths, `rank` the first adapter's."""

    widths: tuple[int, ...] = ()  # the number of outputs of each slot
    ranks: tuple[int, ...] = ()  # the rank of each slot; 0 if it has no adapter
    one_rank: bool = False  # whether all slots share alpha; otherwise adapters have alpha, 2 alpha, 3 alpha, ...
    listed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line that has the slots' widths and ranks."""
        return super().from_line({**line, "out": sum(line["widths"]), "r": next(filter(None, line["ranks"]))})

    @property
    def adapted(self) -> list[int]:
        """The slots that have an adapter."""
        return [i for i, rank in enumerate(self.ranks) if rank]

    @property
    def alphas(self) -> list[float]:
        """The alpha of each slot; 0 if it has no adapter."""
        times = np.cumsum([rank > 0 for rank in self.ranks]) if not self.one_rank else np.ones(len(self.ranks))
        return [float(self.alpha * t) if rank else 0.0 for t, rank in zip(times, self.ranks, strict=True)]

    def span(self, i: int) -> slice:
        """Return the slice of all outputs that a slot has."""
        return slice(sum(self.widths[:i]), sum(self.widths[: i + 1]))

    def rows_of(self, i: int) -> np.ndarray:
        """Return the indices of a slot's outputs."""
        return np.arange(self.out_features)[self.span(i)]

    def columns(self, i: int) -> slice:
        """Return the slice of all ranks that a slot has."""
        return slice(sum(self.ranks[:i]), sum(self.ranks[: i + 1]))

    @property
    def factors(self) -> Arrays:
        """lora_A of all slots, (R, in), and lora_B, (out, R), which is zero outside the block of each slot."""
        A = self.randn("lora_A", sum(self.ranks), self.in_features)
        B = self.randn("lora_B", self.out_features, sum(self.ranks))
        return {"lora_A": A, "lora_B": self._blocks_of(B) * (not self.start)}

    def _blocks_of(self, B: np.ndarray) -> np.ndarray:
        """Return lora_B with zeros outside the block of each slot."""
        whole = np.zeros_like(B)
        for i in self.adapted:
            whole[self.span(i), self.columns(i)] = B[self.span(i), self.columns(i)]
        return whole

    def split(self, name: str, array: np.ndarray) -> list[np.ndarray | None]:
        """Split lora_A or lora_B into a list with one array for each slot, or None if it has no adapter."""
        every = range(len(self.widths))
        parts = [array[self.columns(i)] if name == "lora_A" else array[self.span(i), self.columns(i)] for i in every]
        return [part if i in self.adapted else None for i, part in enumerate(parts)]

    def joined(self, name: str, parts: list[np.ndarray | None]) -> np.ndarray:
        """Join a list such as `split` returns into one array.

        Raises
        ------
        ValueError
            If the list does not have one array for each slot, or if the array of a slot does not fit.
        """
        if len(parts) != len(self.widths):
            raise ValueError(f"{len(parts)} arrays for {name}, expected {len(self.widths)}, one for each slot")
        whole = np.zeros_like(self.factors[name], np.result_type(np.float16, *(p for p in parts if p is not None)))
        for i, (part, own) in enumerate(zip(parts, self.split(name, whole), strict=True)):
            if own is None and part is not None and part.any():
                raise ValueError(f"an array for {name} of slot {i}, expected None, as it has no adapter")
            if own is not None and (part is None or part.shape != own.shape):
                got = "nothing" if part is None else f"shape {part.shape}"
                raise ValueError(f"{got} for {name} of slot {i}, expected shape {own.shape}")
            if own is not None:
                own[...] = part
        return whole

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Return the slot of an answer's entry in words; empty for dx, to which all slots contribute."""
        if name == "x":
            return ""
        number = int(at[1 if name == "y" else 0])
        ends = np.cumsum(self.ranks if name == "lora_A" else self.widths)
        return f", in slot {int(np.searchsorted(ends, number, side='right'))}"

    def to_file(self, name: str, as_name: str, array: np.ndarray) -> Arrays:
        """Return the arrays that store an array in a file; factors and their gradients have one for each slot."""
        if name not in self.listed:
            return {as_name: array}
        parts = enumerate(self.split(name, array))
        return {f"{as_name}.{i}": part for i, part in parts if part is not None}

    def from_file(self, name: str, as_name: str, arrays: Arrays) -> np.ndarray | None:
        """Return the array that a file stores under a name, joining the slots of factors and their gradients."""
        if name not in self.listed:
            return arrays.get(as_name)
        parts = [arrays.get(f"{as_name}.{i}") for i in range(len(self.widths))]
        return None if all(part is None for part in parts) else self.joined(name, parts)

    def arguments_of(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return a function's arguments, with factors and alpha as lists, and the slots' widths last.

        An entry of these lists is None if the slot has no adapter.
        """
        lists = {name: self.split(name, arrays[name]) for name in self.listed}
        alphas = [alpha if rank else None for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        return {**super().arguments_of(function, {**arrays, **lists}), "alpha": alphas, "widths": list(self.widths)}

    def from_returned(self, name: str, value: Any, array: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Join a returned list of the slots' gradients into one array.

        Raises
        ------
        ValueError
            If the value is not a list with one fitting array for each slot.
        """
        if name not in self.listed:
            return array(value, name)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a {type(value).__name__} for {name}, expected a list, one for each slot")
        return self.joined(name, [None if part is None else array(part, name) for part in value])

    def with_two_row_axes(self) -> FusedProblem:
        """Return the problem with six rows."""
        return replace(self, n=6, seed=20)

    @property
    def options(self) -> dict[str, Any]:
        """The widths of the slots."""
        return {"widths": self.widths}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> FusedProblem:
        """Return the problem with the slots that are declared: 2 or 3 of them, with equal widths or equal ranks."""
        one_rank, count = bool(declared.get("one_rank")), declared.get("slots") or len(self.widths)
        widths, ranks = (*self.widths, self.widths[-1])[:count], (*self.ranks, 0)[:count]
        if declared.get("one_width"):
            widths = (max(widths),) * count
        if one_rank:
            ranks = tuple(self.rank * (rank > 0) for rank in ranks)
        first = next(filter(None, ranks))
        return replace(self, out_features=sum(widths), widths=widths, ranks=ranks, rank=first, one_rank=one_rank)

    def answer(self, formulas: Any, rows: Arrays, norms: np.ndarray | None = None) -> Arrays:
        """Return the sum of the answers for all slots."""
        total: Arrays = {"lora_A": np.zeros_like(rows["lora_A"]), "lora_B": np.zeros_like(rows["lora_B"])}
        for count, i in enumerate(self.adapted):
            to, s = formulas.own.slot_rows(self, i), formulas.scaling(*formulas.own.slot_scale(self, i))
            used, own = self.columns(formulas.own.slot_of_A(self, i)), self.columns(i)
            B = np.zeros_like(rows["lora_B"][:, own])
            if to is not None:
                B[to] = formulas.used_B(rows["lora_B"][self.span(i), own])
            base = {name: rows[name] * (count == 0) for name in ("weight", "bias") if name in rows}
            passed = formulas.dx_update * formulas.own.slot_in_dx(self, i)
            of_slot = replace(formulas, scaling=lambda alpha, r, s=s: s, used_B=lambda B: B, dx_update=passed)
            layer = rows | base | {"lora_A": rows["lora_A"][used], "lora_B": B}
            answers = {name: np.asarray(a) for name, a in of_slot.answers(layer, self.alpha, norms).items()}
            total["lora_A"][used] += answers["lora_A"]
            if to is not None:
                total["lora_B"][self.span(i), own] = answers["lora_B"][to]
            for name in ("y", "x", "merged"):
                total[name] = total[name] + answers[name] if name in total else answers[name]
        return {name: np.asarray(a) for name, a in total.items()}

    def __str__(self) -> str:
        ranks, alphas = (",".join(f"{n:g}" if n else "-" for n in numbers) for numbers in (self.ranks, self.alphas))
        slots = ",".join(map(str, self.widths))
        return f"N={self.n} in={self.in_features} out={self.out_features} slots={slots} r={ranks} alpha={alphas}"


@dataclass(frozen=True)
class ExpertFormulas(OwnFormulas):
    """The parts that say where the factors of E experts of rank r are stored, and which factors an expert e uses.

    `factors_of` returns E for an expert that has no update.
    """

    rows_of_A: Callable[[int, int], np.ndarray] = lambda E, r: np.arange(E * r).reshape(E, r)
    columns_of_B: Callable[[int, int], np.ndarray] = lambda E, r: np.arange(r * E).reshape(r, E).T
    factors_of: Callable[[int, int], int] = lambda e, E: e
    weight_of: Callable[[int, int], int] = lambda e, E: e
    scaling_of: Callable[[float, int, int], float] = lambda s, e, E: s
    gradient_scale_of: Callable[[int], float] = lambda n: 1.0  # the factor of the gradients of an expert with n rows
    exchanged: bool = False  # whether A is read as B and B as A, if in = out


@dataclass(frozen=True)
class ExpertsProblem(Problem):
    """A stack of E linear layers without bias; `rank` is the rank of one expert."""

    bias: bool = False
    experts: int = 3
    idle: int = -1  # an expert without rows; -1 if there is none
    layer: ClassVar[tuple[str, ...]] = ("weight", "lora_A", "lora_B")
    after_alpha: ClassVar[tuple[str, ...]] = ("expert_ids",)
    exact: ClassVar[tuple[str, ...]] = after_alpha
    axes: ClassVar[dict[str, tuple[str, ...]]] = Problem.axes | {"merged": ("expert", "output", "input")}

    @property
    def expert_ids(self) -> np.ndarray:
        """The expert of each row, (n,), in random order; the rows are distributed evenly over all but the idle one."""
        ids = np.resize(np.array([e for e in range(self.experts) if e != self.idle], np.int64), self.n)
        return np.asarray(np.random.default_rng([self.seed, 5]).permutation(ids))

    @property
    def full(self) -> Arrays:
        """The weights (E, out, in) and the expert of each row."""
        weight = self.randn("weight", self.experts, self.out_features, self.in_features)
        return {"weight": weight, "expert_ids": self.expert_ids}

    @property
    def factors(self) -> Arrays:
        """lora_A (E r, in) and lora_B (out, r E)."""
        R = self.experts * self.rank
        return self.pair((R, self.in_features), (self.out_features, R))

    def answer(self, formulas: Any, rows: Arrays, norms: np.ndarray | None = None) -> Arrays:
        """Return the combined answers of all experts, each for its own rows."""
        E, own, ids = self.experts, formulas.own, self.expert_ids
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
        """Return the formulas of expert e, which has `count` rows."""
        own = formulas.own
        return replace(
            formulas,
            scaling=lambda alpha, r: own.scaling_of(formulas.scaling(alpha, r), e, self.experts),
            gradient_scale=lambda n: formulas.gradient_scale(self.n) * own.gradient_scale_of(count),
        )

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Return the expert of an answer's entry in words."""
        if name in ("y", "x"):
            ids = self.expert_ids.reshape(-1)
            return f", of expert {ids[at[0]]}" if len(at) == 2 else ""
        place = {"lora_A": at[0] // self.rank, "lora_B": at[1] % self.experts, "merged": at[0]}[name]
        return f", of expert {place}"

    def with_two_row_axes(self) -> ExpertsProblem:
        """Return the problem with six rows."""
        return replace(self, n=6, seed=20)

    def __str__(self) -> str:
        idle = f", none for expert {self.idle}" if self.idle >= 0 else ""
        return f"{super().__str__()} experts={self.experts}{idle}"


def signed_roots(c: float) -> tuple[float, float]:
    """Return two numbers of absolute value sqrt|c| whose product is c; the second one has the sign."""
    root = abs(c) ** 0.5
    return root, float(np.sign(c)) * root


@dataclass(frozen=True)
class CombineFormulas(OwnFormulas):
    """The parts that describe how adapters are combined: functions of the problem and adapter i, or of w_i and s_i."""

    sum_scaling: Callable[[Any, int, float], float] = lambda sums, i, s: s  # the scaling used for adapter i
    sum_weight: Callable[[Any, int], float] = lambda sums, i: sums.weights[i]
    sum_pairs: Callable[[Any, int, int], int] = lambda sums, i, count: i  # the adapter whose A is multiplied by B_i
    in_cat: Callable[[float, float], float] = lambda w, s: w * s  # the factor of B_i A_i
    in_svd: Callable[[float, float], float] = lambda w, s: w * s
    in_linear: Callable[[float, float], tuple[float, float]] = lambda w, s: signed_roots(w * s)  # of B_i and A_i
    sum_values: Callable[[np.ndarray, int], np.ndarray] = lambda S, r: S * (np.arange(len(S)) < r)
    sum_new: Callable[[Any, list[float], int], float] = lambda sums, s, r: 1.0  # the scaling of the new adapter

    def counted(self) -> CombineFormulas:
        """Return the record that computes the number of terms when all arrays are ones."""
        return CombineFormulas(sum_weight=lambda sums, i: 1.0, sum_scaling=lambda sums, i, s: 1.0)


@dataclass(frozen=True)
class CombineProblem(Problem):
    """Adapters to be combined. `rank` is the new rank for "svd"; the alphas are alpha, 2 alpha, 3 alpha, ..."""

    bias: bool = False
    ranks: tuple[int, ...] = ()  # the rank of each adapter
    weights: tuple[float, ...] = ()  # the weight of each adapter
    stabilised: tuple[bool, ...] = ()  # whether each adapter has rsLoRA's scaling
    axes: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(WAYS, ("output", "input"))

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line, with one row because the line has no N."""
        return super().from_line({"N": 1, **line})

    @property
    def alphas(self) -> list[float]:
        """The alpha of each adapter."""
        return [self.alpha * (i + 1) for i in range(len(self.ranks))]

    @property
    def full(self) -> Arrays:
        """An empty dict: adapters are combined without a base."""
        return {}

    @property
    def factors(self) -> Arrays:
        """lora_A (R, in) and lora_B (out, R), where R is the sum of the ranks."""
        R = sum(self.ranks)
        return self.pair((R, self.in_features), (self.out_features, R))

    def split(self, arrays: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each adapter's A (r, in) and B (out, r)."""
        ends = np.cumsum([0, *self.ranks])
        return [(arrays["lora_A"][i:j], arrays["lora_B"][:, i:j]) for i, j in pairwise(ends)]

    def arguments_of(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return factors, alphas, the use_rslora flags and weights as lists; svd has the rank as well."""
        As, Bs = map(list, zip(*self.split(arrays), strict=True))
        own = {"alpha": self.alphas, "use_rslora": list(self.stabilised), "weights": list(self.weights)}
        return {"lora_A": As, "lora_B": Bs, **own, **({"rank": self.rank} if function == "svd" else {})}

    def scalings(self, formulas: Any) -> list[float]:
        """Return each adapter's own scaling."""
        triples = zip(self.alphas, self.ranks, self.stabilised, strict=True)
        return [alpha / r**0.5 if root else formulas.scaling(alpha, r) for alpha, r, root in triples]

    def answer(self, formulas: Any, rows: Arrays, norms: np.ndarray | None = None) -> Arrays:
        """Return the change of weight for each way to combine the adapters."""
        own, pairs, count = formulas.own, self.split(rows), len(self.ranks)
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
        return {name: np.asarray(own.sum_new(self, scalings, self.new_rank(name)) * dW) for name, dW in D.items()}

    def new_rank(self, name: str) -> int:
        """Return the rank of the new adapter when combined in the given way."""
        return {"cat": sum(self.ranks), "linear": self.ranks[0], "svd": self.rank}[name]

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes; that of "svd" accounts for how a truncated SVD propagates an error in the sum.

        An error E in a matrix D changes its best approximation of rank r by at most |E| (1 + 2 S_1 / (S_r - S_{r+1})),
        up to terms of E^2, and by |E| if D itself has rank r. The entries of E are rounding errors of sums, as in
        "cat". A factor on the singular values multiplies the error, too.
        """
        S = np.linalg.svd(self.answer(formulas.with_parts(sum_values=lambda S, r: S), rows)["svd"], compute_uv=False)
        above, below = S[self.rank - 1], S[self.rank] if self.rank < len(S) else 0.0
        times = 1 + 2 * S[0] / (above - below) if below > NEGLIGIBLE * S[0] and above > below else 1.0
        kept = NEGLIGIBLE * S[0] < S
        gain = (formulas.own.sum_values(S, self.rank)[kept] / S[kept]).max(initial=1.0)
        return {**sizes, "svd": np.full_like(sizes["cat"], gain * times * np.linalg.norm(sizes["cat"]))}

    def __str__(self) -> str:
        ranks = ",".join(f"{r}{' rsLoRA' if root else ''}" for r, root in zip(self.ranks, self.stabilised, strict=True))
        alphas, weights = (",".join(f"{number:g}" for number in numbers) for numbers in (self.alphas, self.weights))
        sizes = f"in={self.in_features} out={self.out_features} r={ranks} alpha={alphas}"
        return f"{sizes} weights={weights} rank={self.rank}"


WITHOUT_A_START = tuple(claim for claim in LAYER_CLAIMS if claim not in ("start", "adam"))
"""The claims of kinds whose initialisation and optimiser are those of a linear layer and are not tested again."""
FUSED_KIND = Kind(
    "fused",
    FusedProblem,
    Formulas(own=FusedFormulas()),
    functions=("forward", "backward", "merge"),
    claims=WITHOUT_A_START,
    declares={"slots": (2, 3), "one_rank": (True, False), "one_width": (True, False)},
)
EXPERTS_KIND = Kind(
    "experts",
    ExpertsProblem,
    Formulas(own=ExpertFormulas()),
    functions=("forward", "backward", "merge"),
    claims=WITHOUT_A_START,
    transposed={"weight": 3, "merged": 3, "lora_A": 2, "lora_B": 2},
)
COMBINE_KIND = Kind(
    "combine",
    CombineProblem,
    Formulas(own=CombineFormulas()),
    functions=WAYS,
    needed=WAYS,
    answers={way: (way, (way,)) for way in WAYS},
    claims=(*WAYS, "nothing is changed", "memory order", "alpha of 0"),
    transposed=dict.fromkeys(("lora_A", "lora_B", *WAYS), 2),
    in_files=False,  # the bits of an SVD depend on the BLAS
)
