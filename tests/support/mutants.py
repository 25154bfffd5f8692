"""Code that is wrong on purpose, in a way that `algebra.py` does not make. Each bug was made once, here or elsewhere.

`tests/test_mutants.py` hands each mutant to the claims that the library's own code passes: what adds up over calls,
writes into what it was handed, changes the precision, or moves entries. The bugs that the conformance suite knows stand
in `minilora.conformance.problems.bugs` alone: the last section plants those of a linear layer, of a start and of Adam.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from minilora import Conv2d, DoRA, Embedding, Linear, LoRA, QuantizedLinear
from minilora.backend import add_at
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.formulas import StartFormulas
from minilora.layer import rows

from .cases import (
    KINDS,
    LAYER_CLAIMS,
    adapted_case,
    linear_case,
    lora_case,
    lora_linear_case,
    plain_case,
    quantized_case,
)
from .claims import (
    ADAM_CLAIMS,
    a_frozen_layer_only_passes_dx,
    backward_is_the_slope_of_forward,
    backward_without_dx_is_the_same,
    forward_is_the_reference,
    merging_changes_no_output,
)
from .formulas import AdamByFormulas, adam_by_formulas, by_formulas
from .problems import Problem


@dataclass(frozen=True)
class Mutant:
    """What is wrong, and the properties that must reject it."""

    name: str
    claims: tuple[Callable[[Problem], None], ...]


MUTANTS: list[Mutant] = []

# That a frozen layer has no gradients is left out: most mutants below ignore it, and would be caught by that alone.
MUTANT_CLAIMS = tuple(claim for claim in LAYER_CLAIMS if claim is not a_frozen_layer_only_passes_dx)


def mutant(name: str, *claims: Callable[[Any, Problem], None], of: Callable[[Any], Any] = lambda subject: subject):
    """Register the class or function below as a mutant, to be judged by these claims."""

    def register(subject: Any) -> Any:
        MUTANTS.append(Mutant(name, tuple(partial(claim, of(subject)) for claim in claims)))
        return subject

    return register


lora_mutant = partial(mutant, of=lora_case)
linear_mutant = partial(mutant, of=linear_case)


# --- LoRA -----------------------------------------------------------------------------------------


class Wrong(LoRA):
    """LoRA with products of its backward open to a subclass."""

    def dB(self, dy, h):
        return rows(dy).T @ rows(h) * self.scaling

    def dh(self, dy):
        return dy @ self.lora_B * self.scaling

    def dA(self, dh, x):
        return rows(dh).T @ rows(x)

    def backward(self, dy, cache, *, need_dx=True):
        *_, x, h = cache
        dh = self.dh(dy)
        grads = {} if self.frozen else {"lora_A": self.dA(dh, x), "lora_B": self.dB(dy, h)}
        return (dh @ self.lora_A if need_dx else None), grads


@lora_mutant("dA of the first row only", *MUTANT_CLAIMS)
class FirstRow(Wrong):
    def dA(self, dh, x):
        return rows(dh)[:1].T @ rows(x)[:1]


@lora_mutant("one entry of dA off by a millionth", *MUTANT_CLAIMS)
class Millionth(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[-1, -1] += 1e-6
        return dA


@lora_mutant("an entry of dA missing, as behind a mask", *MUTANT_CLAIMS)
class Masked(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[0, 0] = 0
        return dA


@lora_mutant("gradients added up over calls", *MUTANT_CLAIMS)
class Accumulated(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        self.total = {name: getattr(self, "total", {}).get(name, 0) + grad for name, grad in grads.items()}
        return dx, self.total


@lora_mutant("gradient written into the caller's dy", *MUTANT_CLAIMS)
class ScalesDyInPlace(LoRA):
    def backward(self, dy, cache, *, need_dx=True):
        dy *= self.scaling
        *_, x, h = cache
        dh = dy @ self.lora_B
        dx = dh @ self.lora_A if need_dx else None
        return dx, {"lora_A": rows(dh).T @ rows(x), "lora_B": rows(dy).T @ rows(h)}


@lora_mutant("dA rounded to float32", *MUTANT_CLAIMS)
class Single(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).astype(np.float32).astype(dh.dtype)


@lora_mutant("float64 returned for float32", *MUTANT_CLAIMS)
class Promoted(Wrong):
    def dB(self, dy, h):
        return super().dB(dy, h) * np.float64(1)


@lora_mutant("only the last of the leading axes summed", *MUTANT_CLAIMS)
class OneAxis(Wrong):
    def dB(self, dy, h):
        return np.swapaxes(np.atleast_2d(dy), -1, -2) @ np.atleast_2d(h) * self.scaling


# --- Linear ---------------------------------------------------------------------------------------


@linear_mutant("bias gradient forgotten", *MUTANT_CLAIMS)
class NoBias(Linear):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"weight": grads["weight"]}


@linear_mutant("the input handed back as its own gradient", *MUTANT_CLAIMS)
class InputForDx(Linear):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return None if dx is None else cache[2], grads


@lora_mutant("dh doubled, and with it dA and dx", *MUTANT_CLAIMS)
class DoubledDh(Wrong):
    def dh(self, dy):
        return 2 * super().dh(dy)


# --- Adam -----------------------------------------------------------------------------------------


@mutant("Adam: t counted once for each array", *ADAM_CLAIMS)
class CountsArrays(AdamByFormulas):
    def move(self, name, g):
        self.t += 1
        super().move(name, g)


# --- embeddings -----------------------------------------------------------------------------------

TWO_CLAIMS = (forward_is_the_reference, backward_is_the_slope_of_forward, backward_without_dx_is_the_same)

embedding_mutant = partial(mutant, of=partial(plain_case, KINDS["embedding"]))


class WrongEmbedding(Embedding):
    """Embedding with the scatter open to a subclass."""

    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy)

    def backward(self, dy, cache, *, need_dx=True):
        dW = np.zeros_like(self.weight)
        self.scatter(dW, cache[2].ids.reshape(-1), rows(dy))
        return None, {} if self.frozen else {"weight": dW}


@embedding_mutant("embedding: scatter that overwrites", *TWO_CLAIMS)
class Overwrites(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        dW[ids] = dy


@embedding_mutant("embedding: += with an index, which adds repeated ids once", *TWO_CLAIMS)
class Buffered(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        dW[ids] += dy


# --- convolutions ---------------------------------------------------------------------------------

conv_mutant = partial(mutant, of=partial(plain_case, KINDS["conv2d"]))


@conv_mutant("convolution: overlapping patches overwrite each other in dx", *TWO_CLAIMS)
class OverwritesInDx(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        n, c, *sizes = shape
        dz = dz.T.reshape(c, *self.kernel, n, *self.positions(shape))
        dx = np.zeros((c, n, *(s + 2 * p for s, p in zip(sizes, self.padding, strict=True))), dz.dtype)
        for offset, window in self.windows(self.positions(shape)):
            dx[(..., *window)] = dz[(slice(None), *offset)]
        inner = (slice(p, p + s) for s, p in zip(sizes, self.padding, strict=True))
        return dx[(..., *inner)].swapaxes(0, 1)


@conv_mutant("convolution: stride and dilation swapped", *TWO_CLAIMS)
class Exchanged(Conv2d):
    def __init__(self, weight, bias=None, *, stride, padding, dilation):
        super().__init__(weight, bias, stride=dilation, padding=padding, dilation=stride)


@conv_mutant("convolution: patches with the channel last, the weight with it first", *TWO_CLAIMS)
class ChannelLast(Conv2d):
    def rewrite(self, x):
        z = super().rewrite(x)
        return z.reshape(len(z), x.shape[1], -1).swapaxes(1, 2).reshape(z.shape)

    def rewrite_adjoint(self, dz, shape):
        return super().rewrite_adjoint(dz.reshape(len(dz), -1, shape[1]).swapaxes(1, 2).reshape(dz.shape), shape)


@conv_mutant("convolution: padded with the border in place of zeros", *TWO_CLAIMS)
class Border(Conv2d):
    def rewrite(self, x):
        pads = [(p, p) for p in self.padding]
        inner = Conv2d(self.weight, stride=self.stride, dilation=self.dilation)
        return inner.rewrite(np.pad(x.real, ((0, 0), (0, 0), *pads), mode="edge"))


@conv_mutant("convolution: rows reshaped into images without moving the axis", *TWO_CLAIMS)
class NotMoved(Conv2d):
    def arrange(self, y, shape):
        return y.reshape(shape[0], y.shape[-1], *self.positions(shape))


# --- DoRA -----------------------------------------------------------------------------------------


@mutant(
    "DoRA: magnitude left out of what trains",
    *TWO_CLAIMS,
    of=lambda cls: adapted_case(KINDS["linear"], "full", dora=cls),
)
class NoMagnitude(DoRA):
    def trainable(self):
        return {name: p for name, p in super().trainable().items() if name != "magnitude"}


# --- starts ---------------------------------------------------------------------------------------


def a_start_has_the_fan_of_the_input(start: Callable[..., np.ndarray], problem: Problem) -> None:
    """A (r, in) is uniform in +-1/sqrt(in): its spread says so at widths that are large and differ."""
    n_in, rank = 40 * problem.in_features, 10 * problem.rank
    A = start(np.random.default_rng(problem.seed), n_in, 13 * problem.out_features, rank)
    assert A.shape == (rank, n_in)
    assert abs(A.std() * (3 * n_in) ** 0.5 - 1) < 0.15


def start_of_library(rng, n_in, n_out, rank):
    return LoRA.init(n_in, n_out, rank=rank, alpha=1, rng=rng, dtype=float).lora_A


STARTS_WRONG = {
    "he_uniform, sqrt 6 too large": lambda rng, n_in, n_out, r: rng.uniform(-1, 1, (r, n_in)) * (6 / n_in) ** 0.5,
    "A zero, as B is": lambda rng, n_in, n_out, r: np.zeros((r, n_in)),
}
for name, start in STARTS_WRONG.items():
    mutant(f"start: {name}", a_start_has_the_fan_of_the_input)(start)


# --- the suite's known bugs -----------------------------------------------------------------------

NOT_SHOWN = {
    *("ranks-above-32-are-left-out", "rows-from-128-on-lack-the-update"),  # no problem that is drawn is as large
    "outputs-from-128-on-lack-the-update",
    *("an-alpha-of-0-is-taken-for-1", "an-alpha-of-0-is-taken-for-the-rank"),  # nor has an alpha of 0
}
"""Rows that the drawn problems cannot show."""


def with_parts(parts: Any = None) -> Any:
    """The case of a layer that computes by the suite's formulas, with some parts replaced."""
    return lora_linear_case(by_formulas(parts or {}))


def also_squared(claims: tuple[Callable[[Any, Problem], None], ...]) -> tuple[Callable[[Any, Problem], None], ...]:
    """The claims, and the first two on equal widths, which no drawn problem has: there a transposed matrix fits."""

    def squared(claim):
        return lambda subject, problem: claim(subject, replace(problem, in_features=problem.out_features))

    return (*claims, *map(squared, claims[:2]))


def uniform_start(**parts: Any) -> Callable[..., np.ndarray]:
    """A uniform start by the suite's formulas, with some parts replaced; for an input of four entries a channel."""

    def start(rng, n_in, n_out, rank):
        return rng.uniform(-1, 1, (rank, n_in)) * 3**0.5 * StartFormulas(**parts).spread(rank, n_in // 4, n_out, 4)

    return start


for row in BUGS:
    if row.breaks == "adam":
        mutant(row.flag, *ADAM_CLAIMS)(adam_by_formulas(**row.parts))
    elif row.breaks == "start":
        mutant(row.flag, a_start_has_the_fan_of_the_input)(uniform_start(**row.parts))
    elif row.kinds[0] == "linear" and row.flag not in NOT_SHOWN:
        claims = (merging_changes_no_output,) if row.breaks == "merge" else MUTANT_CLAIMS
        mutant(row.flag, *also_squared(claims))(with_parts(row.parts))


def in_four_bits(title: str, **change: Callable[[Any], Any]) -> None:
    """Plant a layer in NF4 that reads one of its own attributes otherwise."""

    class Wrong(QuantizedLinear):
        @property
        def weight(self):
            other = copy(self)
            vars(other).update({name: read(getattr(self, name)) for name, read in change.items()})
            return QuantizedLinear.weight.fget(other)

    case = quantized_case(adapted=True, double_quant=True, cls=Wrong)
    mutant(f"NF4: {title}", forward_is_the_reference)(case)


in_four_bits("the halves of a byte are exchanged", packed=lambda packed: packed // 16 + packed % 16 * 16)
in_four_bits("the mean of the scales is not added", mean=lambda mean: 0.0)

HIDDEN_AT_THE_START = {
    "dA of the first row only": lora_case(FirstRow),
    "dh doubled, and with it dA and dx": lora_case(DoubledDh),
} | {
    row.flag: with_parts(row.parts)
    for row in BUGS
    if row.flag.startswith("lora-a-gradient-has-the-") or row.flag == "lora-a-gradient-lacks-the-scaling-alpha-r"
}
"""At B = 0, dh is zero whatever it is multiplied with, and so are dA and dx: right by accident."""
