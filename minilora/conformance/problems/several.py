"""The kinds of which one array holds several layers: slots of one weight, a stack of experts, adapters put together.

"fused": one weight whose outputs are slots, as q, k and v or gate and up, each with factors of its own:

    y = x W^T + b,   and y[slot i] += s_i x A_i^T B_i^T,   s_i = alpha_i / r_i

It is a sum of linear layers: the base with the first slot's factors, and for each further slot one without a base. So
all that `Formulas` has holds for each slot, and its record `FusedFormulas` says how the slots are put together. An
implementation takes and returns lists. Inside the suite there is one array for each: lora_A has the rows of all slots,
(R, in), and lora_B is (out, R), zero beside each slot's own.

"experts": a weight for each of E experts in one array, rows that each go through one, and PEFT's packing:

    y_n = x_n W_e^T + s x_n A_e^T B_e^T,   e = expert_ids[n],   s = alpha / r,   r of one expert
    A_e = rows e r ... e r + r - 1 of lora_A (E r, in),   B_e = columns e, E + e, ... of lora_B (out, r E)

Each expert is a linear layer on its own rows, and all that `Formulas` has holds for each. Its record `ExpertFormulas`
says which factors an expert takes, and from where. An expert without a row has gradients of zero.

"combine": several adapters of one layer, and the one change of weight that is put together from them. With weights w_i,
scalings s_i = alpha_i / r_i, or alpha_i / sqrt(r_i) of an adapter with rsLoRA, and c_i = w_i s_i:

    cat       sum_i c_i B_i A_i                                                    exact; the rank is the sum of the r_i
    svd       the nearest matrix of a given rank to it, in the sum of squares      from its largest singular values
    linear    (sum_i sqrt|c_i| B_i) (sum_i sign(c_i) sqrt|c_i| A_i)                where all r_i are one; cross terms

Each is a matrix (out, in), the change that the new adapter makes with its own scaling. Its factors are free. An
implementation takes lists. Inside the suite lora_A has the rows of all adapters, (R, in), and lora_B their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from .formulas import Formulas, Record
from .kind import LAYER_CLAIMS, Kind
from .problem import Arrays, Problem

WAYS = ("cat", "linear", "svd")
"""How adapters are put together."""
KEPT = 1e-9
"""Singular values below this part of the largest are zero up to rounding."""


@dataclass(frozen=True)
class FusedFormulas(Record):
    """How the slots of a weight are put together, by the problem and a slot's number i."""

    slot_rows: Callable[[Any, int], Any] = lambda fused, i: fused.rows_of(i)  # that its update is added to, or None
    slot_scale: Callable[[Any, int], Any] = lambda fused, i: (fused.alphas[i], fused.ranks[i])
    slot_down: Callable[[Any, int], int] = lambda fused, i: i  # the slot whose lora_A it uses
    slot_in_dx: Callable[[Any, int], float] = lambda fused, i: 1.0  # how often its path is in dx


@dataclass(frozen=True)
class FusedProblem(Problem):
    """A linear layer whose outputs are slots. `out_features` is the sum of their widths, `rank` the first adapter's."""

    widths: tuple[int, ...] = ()  # outputs of each slot
    ranks: tuple[int, ...] = ()  # of each slot; 0 where it has no adapter
    one_rank: bool = False  # whether all slots have one alpha; otherwise the second adapter's is twice the first's, ...
    listed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line with the slots' widths and ranks."""
        return super().of_line({**line, "out": sum(line["widths"]), "r": next(filter(None, line["ranks"]))})

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
        """Return the one array of a list as `split` gives it; a ValueError says which slot's array does not fit."""
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

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Say in which slot an entry of an answer is; of dx, which all slots add to, nothing."""
        if name == "x":
            return ""
        number = int(at[1 if name == "y" else 0])
        ends = np.cumsum(self.ranks if name == "lora_A" else self.widths)
        return f", in slot {int(np.searchsorted(ends, number, side='right'))}"

    def to_file(self, name: str, as_name: str, array: np.ndarray) -> Arrays:
        """Return an array as it stands in a file: of the factors and their gradients each slot's own, by its number."""
        if name not in self.listed:
            return {as_name: array}
        parts = enumerate(self.split(name, array))
        return {f"{as_name}.{i}": part for i, part in parts if part is not None}

    def from_file(self, name: str, as_name: str, arrays: Arrays) -> np.ndarray | None:
        """Return the array that stands in a file under a name; of the factors and their gradients, of each slot."""
        if name not in self.listed:
            return arrays.get(as_name)
        parts = [arrays.get(f"{as_name}.{i}") for i in range(len(self.widths))]
        return None if all(part is None for part in parts) else self.joined(name, parts)

    def hand_over(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the factors and alpha as lists, None where a slot has no adapter, and the slots' widths last."""
        lists = {name: self.split(name, arrays[name]) for name in self.listed}
        alphas = [alpha if rank else None for alpha, rank in zip(self.alphas, self.ranks, strict=True)]
        return {**super().hand_over(function, {**arrays, **lists}), "alpha": alphas, "widths": list(self.widths)}

    def take_back(self, name: str, value: Any, array: Callable[[Any, str], np.ndarray]) -> np.ndarray:
        """Return a list of the slots' gradients as one array; a ValueError says what is wrong with it."""
        if name not in self.listed:
            return array(value, name)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"a {type(value).__name__} for {name}, expected a list, one for each slot")
        return self.joined(name, [None if part is None else array(part, name) for part in value])

    def two_axes(self) -> FusedProblem:
        """Return the same slots with six rows."""
        return replace(self, n=6, seed=20)

    @property
    def options(self) -> dict[str, Any]:
        """The slots' widths."""
        return {"widths": self.widths}

    def restrict(self, takes: Set[str], declared: Mapping[str, Any]) -> FusedProblem:
        """Return the same problem with the slots that are declared: of one rank and alpha, of one width, 2 or 3."""
        one_rank, count = bool(declared.get("one_rank")), declared.get("slots") or len(self.widths)
        widths, ranks = (*self.widths, self.widths[-1])[:count], (*self.ranks, 0)[:count]
        if declared.get("one_width"):
            widths = (max(widths),) * count
        if one_rank:
            ranks = tuple(self.rank * (rank > 0) for rank in ranks)
        first = next(filter(None, ranks))
        return replace(self, out_features=sum(widths), widths=widths, ranks=ranks, rank=first, one_rank=one_rank)

    def answer(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return the sum of what formulas give for each slot."""
        total: Arrays = {"lora_A": np.zeros_like(rows["lora_A"]), "lora_B": np.zeros_like(rows["lora_B"])}
        for count, i in enumerate(self.adapted):
            to, s = formulas.own.slot_rows(self, i), formulas.scaling(*formulas.own.slot_scale(self, i))
            down, own = self.columns(formulas.own.slot_down(self, i)), self.columns(i)
            B = np.zeros_like(rows["lora_B"][:, own])
            if to is not None:
                B[to] = formulas.hidden(rows["lora_B"][self.span(i), own])
            base = {name: rows[name] * (count == 0) for name in ("weight", "bias") if name in rows}
            passed = formulas.dx_update * formulas.own.slot_in_dx(self, i)
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


@dataclass(frozen=True)
class ExpertFormulas(Record):
    """Where the factors of E experts of rank r lie, and which an expert e takes; E stands for none."""

    rows_of_A: Callable[[int, int], np.ndarray] = lambda E, r: np.arange(E * r).reshape(E, r)
    columns_of_B: Callable[[int, int], np.ndarray] = lambda E, r: np.arange(r * E).reshape(r, E).T
    factors_of: Callable[[int, int], int] = lambda e, E: e
    weight_of: Callable[[int, int], int] = lambda e, E: e
    scaling_of: Callable[[float, int, int], float] = lambda s, e, E: s
    rows_of_one: Callable[[int], float] = lambda n: 1.0  # what an expert's gradients are multiplied with, of n rows
    exchanged: bool = False  # whether A is read as B, and B as A, where in = out


@dataclass(frozen=True)
class ExpertsProblem(Problem):
    """E linear layers without a bias, `rank` that of one."""

    bias: bool = False
    experts: int = 3
    idle: int = -1  # an expert without a row, if there is one
    layer: ClassVar[tuple[str, ...]] = ("weight", "lora_A", "lora_B")
    last: ClassVar[tuple[str, ...]] = ("expert_ids",)
    exact: ClassVar[tuple[str, ...]] = last
    axes: ClassVar[dict[str, tuple[str, ...]]] = Problem.axes | {"merged": ("expert", "output", "input")}

    @property
    def expert_ids(self) -> np.ndarray:
        """The expert of each row, (n,), in no order; all but the idle one come up as long as there are rows."""
        ids = np.resize(np.array([e for e in range(self.experts) if e != self.idle], np.int64), self.n)
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

    def answer(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return what formulas give for each expert's rows, put together."""
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
        """Return the formulas of one expert, which has so many of the rows."""
        own = formulas.own
        return replace(
            formulas,
            scaling=lambda alpha, r: own.scaling_of(formulas.scaling(alpha, r), e, self.experts),
            rows=lambda n: formulas.rows(self.n) * own.rows_of_one(count),
        )

    def locate(self, name: str, at: tuple[Any, ...]) -> str:
        """Say of which expert an entry of an answer is."""
        if name in ("y", "x"):
            ids = self.expert_ids.reshape(-1)
            return f", of expert {ids[at[0]]}" if len(at) == 2 else ""
        place = {"lora_A": at[0] // self.rank, "lora_B": at[1] % self.experts, "merged": at[0]}[name]
        return f", of expert {place}"

    def two_axes(self) -> ExpertsProblem:
        """Return the same experts with six rows."""
        return replace(self, n=6, seed=20)

    def __str__(self) -> str:
        idle = f", none for expert {self.idle}" if self.idle >= 0 else ""
        return f"{super().__str__()} experts={self.experts}{idle}"


def rooted(c: float) -> tuple[float, float]:
    """Return two numbers whose product is c, the roots of |c|, with the sign on the second."""
    root = abs(c) ** 0.5
    return root, float(np.sign(c)) * root


@dataclass(frozen=True)
class CombineFormulas(Record):
    """How adapters are put together, by the problem, an adapter's number i, its weight w and scaling s."""

    sum_scaling: Callable[[Any, int, float], float] = lambda sums, i, s: s  # of adapter i, whose own is s
    sum_weight: Callable[[Any, int], float] = lambda sums, i: sums.weights[i]
    sum_pairs: Callable[[Any, int, int], int] = lambda sums, i, count: i  # the adapter whose A stands beside B_i in cat
    in_cat: Callable[[float, float], float] = lambda w, s: w * s  # how often B_i A_i counts
    in_svd: Callable[[float, float], float] = lambda w, s: w * s
    in_linear: Callable[[float, float], tuple[float, float]] = lambda w, s: rooted(w * s)  # what B_i counts, and A_i
    sum_values: Callable[[np.ndarray, int], np.ndarray] = lambda S, r: S * (np.arange(len(S)) < r)
    sum_new: Callable[[Any, list[float], int], float] = lambda sums, s, r: 1.0  # the new adapter's scaling, of rank r

    def counted(self) -> CombineFormulas:
        """Return the record that gives, on ones, the number of terms."""
        return CombineFormulas(sum_weight=lambda sums, i: 1.0, sum_scaling=lambda sums, i, s: 1.0)


@dataclass(frozen=True)
class CombineProblem(Problem):
    """Adapters to be put together. `rank` is that of "svd"; the alphas are alpha, 2 alpha, 3 alpha, ..."""

    bias: bool = False
    ranks: tuple[int, ...] = ()  # of each adapter
    weights: tuple[float, ...] = ()  # of each adapter
    stabilised: tuple[bool, ...] = ()  # whether each has rsLoRA's scaling
    axes: ClassVar[dict[str, tuple[str, ...]]] = dict.fromkeys(WAYS, ("output", "input"))

    @classmethod
    def of_line(cls, line: dict[str, Any]) -> Problem:
        """Return the problem of a line; it has no rows."""
        return super().of_line({"N": 1, **line})

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

    def split(self, arrays: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return each adapter's A (r, in) and B (out, r)."""
        ends = np.cumsum([0, *self.ranks])
        return [(arrays["lora_A"][i:j], arrays["lora_B"][:, i:j]) for i, j in pairwise(ends)]

    def hand_over(self, function: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return factors, alphas, rsLoRA's flags and weights as lists; of svd the rank as well."""
        As, Bs = map(list, zip(*self.split(arrays), strict=True))
        own = {"alpha": self.alphas, "use_rslora": list(self.stabilised), "weights": list(self.weights)}
        return {"lora_A": As, "lora_B": Bs, **own, **({"rank": self.rank} if function == "svd" else {})}

    def scalings(self, formulas: Any) -> list[float]:
        """Return each adapter's own scaling."""
        triples = zip(self.alphas, self.ranks, self.stabilised, strict=True)
        return [alpha / r**0.5 if root else formulas.scaling(alpha, r) for alpha, r, root in triples]

    def answer(self, formulas: Any, rows: Arrays, lengths: np.ndarray | None = None) -> Arrays:
        """Return the changes of weight that formulas give, one for each way to put adapters together."""
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
        return {
            name: np.asarray(own.sum_new(self, scalings, self.new_rank(name)) * change) for name, change in D.items()
        }

    def new_rank(self, name: str) -> int:
        """Return the rank of the new adapter."""
        return {"cat": sum(self.ranks), "linear": self.ranks[0], "svd": self.rank}[name]

    def widen(self, sizes: Arrays, formulas: Any, rows: Arrays) -> Arrays:
        """Return the sizes, that of "svd" by what becomes of an error in the sum.

        An error E of a matrix D moves its nearest of rank r by |E| (1 + 2 S_1 / (S_r - S_{r+1})) at most, up to terms
        of E^2, and by |E| where D is of rank r itself. Entries of E are errors of sums: of the size of "cat". What
        multiplies singular values, multiplies the error.
        """
        S = np.linalg.svd(self.answer(formulas.with_parts(sum_values=lambda S, r: S), rows)["svd"], compute_uv=False)
        above, below = S[self.rank - 1], S[self.rank] if self.rank < len(S) else 0.0
        times = 1 + 2 * S[0] / (above - below) if below > KEPT * S[0] and above > below else 1.0
        kept = KEPT * S[0] < S
        gain = (formulas.own.sum_values(S, self.rank)[kept] / S[kept]).max(initial=1.0)
        return {**sizes, "svd": np.full_like(sizes["cat"], gain * times * np.linalg.norm(sizes["cat"]))}

    def __str__(self) -> str:
        ranks = ",".join(f"{r}{' rsLoRA' if root else ''}" for r, root in zip(self.ranks, self.stabilised, strict=True))
        alphas, weights = (",".join(f"{number:g}" for number in numbers) for numbers in (self.alphas, self.weights))
        sizes = f"in={self.in_features} out={self.out_features} r={ranks} alpha={alphas}"
        return f"{sizes} weights={weights} rank={self.rank}"


WITHOUT_A_START = tuple(claim for claim in LAYER_CLAIMS if claim not in ("start", "adam"))
"""The claims of what starts as so many linear layers do."""
FUSED = Kind(
    "fused",
    FusedProblem,
    Formulas(own=FusedFormulas()),
    functions=("forward", "backward", "merge"),
    claims=WITHOUT_A_START,
    declares={"slots": (2, 3), "one_rank": (True, False), "one_width": (True, False)},
)
EXPERTS = Kind(
    "experts",
    ExpertsProblem,
    Formulas(own=ExpertFormulas()),
    functions=("forward", "backward", "merge"),
    claims=WITHOUT_A_START,
    turned={"weight": 3, "merged": 3, "lora_A": 2, "lora_B": 2},
)
COMBINE = Kind(
    "combine",
    CombineProblem,
    Formulas(own=CombineFormulas()),
    functions=WAYS,
    needed=WAYS,
    answers={way: (way, (way,)) for way in WAYS},
    claims=(*WAYS, "nothing is changed", "memory order", "alpha of 0"),
    turned=dict.fromkeys(("lora_A", "lora_B", *WAYS), 2),
    in_files=False,  # singular vectors have other bits with another BLAS
)
