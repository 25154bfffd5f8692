"""LoRA on a stack of weights: each expert has its own two factors, packed into two matrices.

Expert e of a stack W (E, out, in) changes by s B_e A_e, of rank r, with r counted for one expert and s = alpha / r.
PEFT packs the E pairs, its `target_parameters`, each factor in its own way:

    A_e = A[e r ... e r + r - 1]         (moe.16)    (r, in)      of lora_A (E r, in): the expert is the slow index
    B_e = B[:, e], B[:, E + e], ...      (moe.17)    (out, r)     of lora_B (out, r E): the expert is the fast index

Row e r + k of A is the k-th row of expert e, and column k E + e of B is the k-th column of expert e. So the k-th pair
of an expert does not stand at the same place in A and in B: s B A, formed as for a single layer, pairs the factors of
different experts and means nothing. Why so? PEFT makes A and B as two linear layers of rank E r, and reshapes their
weights: A (E r, in) to (E, r, in), and B (out, r E) to (out, r, E). The other orders would be as good, but files have
these ones. With E = 1 both are the whole matrix, and all of this is LoRA.

On the rows of one expert, x_e, nothing is new: (1) to (6) of `minilora.lora`, with A_e and B_e. The gradients of the
two matrices are packed as they are. An expert without a row has the gradient zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..adapted import Adapted
from ..backend import backend_of
from ..checks import Array, check_flag
from ..layer import Cache
from ..layers.stacked import StackedLinear, check_counts, grouped_dw, grouped_matmul, grouped_matmul_dx
from ..lora import LoRA
from .scaling import scaling


@dataclass(eq=False, repr=False)
class StackedLoRA(LoRA):
    """The added path of E experts, in PEFT's packing. It stores the given arrays without copying.

    Arrays that do not fit together, or an alpha out of range, are a ValueError or a TypeError.
    """

    experts: int = 1  # E: lora_A is (E r, in), lora_B (out, r E)
    use_rslora: bool = False  # whether the scaling is alpha / sqrt(r) instead of alpha / r

    lora_A: Annotated[Array, "rE in"]
    lora_B: Annotated[Array, "out rE"]
    kind: ClassVar[str] = "parameter"  # the kind of layer, as in `Adapter`

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_rslora = check_flag("use_rslora", self.use_rslora)
        if self.lora_A.shape[0] % self.experts:
            rows = self.lora_A.shape[0]
            raise ValueError(f"lora_A has {rows} rows, expected as many for each of {self.experts} experts")

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, in) -> (R, out)
        """Return y and the cache for `counts` rows of each expert, sorted by expert."""
        counts = check_counts(x, counts, self.experts)
        A, B = self.factors()
        h = grouped_matmul(x, A, counts)  # (1) of each expert
        y = grouped_matmul(self.scaling * h, B, counts)  # (2)
        return y, (counts, *((None, None) if self.frozen else (x, h)))

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, in), and the gradients of both factors in the same packing; a frozen adapter computes none."""
        counts, x, h = cache
        A, B = self.factors()
        dh = grouped_matmul_dx(dy, B, counts) * self.scaling  # (4)
        dx = grouped_matmul_dx(dh, A, counts) if need_dx else None  # (6)
        if self.frozen:
            return dx, {}
        dA = grouped_dw(dh, x, counts)  # (5)
        dB = grouped_dw(dy, h, counts) * self.scaling  # (3)
        return dx, {"lora_A": dA.reshape(self.lora_A.shape), "lora_B": packed_B(dB)}

    def factors(self) -> tuple[Array, Array]:  # -> (E, r, in), (E, out, r)
        """Return each expert's factors."""
        return stacked_A(self.lora_A, self.experts), stacked_B(self.lora_B, self.experts)

    def delta(self) -> Array:  # -> (E, out, in), or (out, in) of one
        """Return the change of each expert's weight, s B_e A_e."""
        A, B = self.factors()
        change = self.scaling * B @ A
        return change if self.experts > 1 else change[0]

    rank = property(lambda self: int(self.lora_A.shape[0]) // self.experts, doc="The width r of one expert's factors.")
    scaling = property(
        lambda self: scaling(self.alpha, self.rank, use_rslora=self.use_rslora), doc="The factor s, of one expert's r."
    )


@dataclass(eq=False, repr=False)
class StackedLoRALinear(Adapted):
    """A frozen stack of weights with an adapter. Only the adapter trains."""

    base: Annotated[StackedLinear, "in -> out"]
    adapter: Annotated[StackedLoRA, "in -> out"]  # with the same number of experts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter.experts != self.base.experts:
            raise ValueError(f"adapter is of {self.adapter.experts} experts, and base has {self.base.experts}")

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, in) -> (R, out)
        """Return y and the cache, by (11) for each expert. The base needs no cache but its counts."""
        y, cache = self.adapter.forward(x, counts)
        counts, *_ = cache.kept
        grouped_matmul(x, self.base.stack, counts, onto=y)
        return y, (cache, counts)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, in), through both paths by (12), and the gradients of the adapter's factors."""
        adapter_cache, counts = cache
        dx, grads = self.adapter.backward(dy, adapter_cache, need_dx=need_dx)
        if dx is not None:
            grouped_matmul_dx(dy, self.base.stack, counts, onto=dx)
        return dx, grads

    def merge(self) -> StackedLinear:
        """Return one new stack, with this layer's output up to rounding. Nothing is shared."""
        return StackedLinear(self.base.weight + self.delta().reshape(self.base.weight.shape))

    experts = property(lambda self: self.base.experts, doc="How many weights there are, E.")


def stacked_A(A: Array, experts: int) -> Array:  # (E r, n) -> (E, r, n)
    """Return each expert's rows."""
    return A.reshape(experts, -1, A.shape[1])  # eq. (moe.16)


def stacked_B(B: Array, experts: int) -> Array:  # (n, r E) -> (E, n, r)
    """Return the columns of each of the E experts, in a memory order with fast products."""
    columns = B.reshape(len(B), -1, experts).transpose(2, 0, 1)  # eq. (moe.17)
    return backend_of(B).xp.ascontiguousarray(columns)


def packed_B(B: Array) -> Array:  # (E, n, r) -> (n, r E)
    """Join the columns of all experts in one matrix, with the expert as the fast index."""
    return B.transpose(1, 2, 0).reshape(B.shape[1], -1)
