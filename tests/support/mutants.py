"""Code that is wrong on purpose. Each bug is one that has been made, here or elsewhere.

`tests/test_mutants.py` hands each mutant to the claims that the library's own code passes. The bugs that the
conformance suite knows stand in `minilora.conformance.problems.bugs` alone: the last section plants those of a linear
layer, of a start and of Adam by the suite's formulas. The other sections have what no row can say: bugs of base layers,
losses and the residual form, and what no replaced part expresses, as a dtype, a changed argument, or something kept.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from minilora import Conv2d, DoRA, Embedding, Linear, LoRA, LoRALinear, QuantizedLinear, best_of_rank
from minilora.backend import add_at
from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.formulas import StartFormulas
from minilora.layer import rows
from minilora.layers.embedding import OneHot
from minilora.variants.adapter import Rewritten

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
    MSE_CLAIMS,
    a_frozen_layer_only_passes_dx,
    backward_is_the_slope_of_forward,
    backward_without_dx_is_the_same,
    delta_is_the_matrix_of_forward,
    forward_is_the_reference,
    require_close,
)
from .compare import gradients_are_the_slope_of_mse
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
    """LoRA.backward cut into its four products, for a subclass to spoil one."""

    def dB(self, dy, x, h):
        return rows(dy).T @ rows(h) * self.scaling

    def dh(self, dy, x, h):
        return dy @ self.lora_B * self.scaling

    def dA(self, dh, x):
        return rows(dh).T @ rows(x)

    def dx(self, dh):
        return dh @ self.lora_A

    def backward(self, dy, cache, *, need_dx=True):
        *_, x, h = cache
        dh = self.dh(dy, x, h)
        grads = {} if self.frozen else {"lora_A": self.dA(dh, x), "lora_B": self.dB(dy, x, h)}
        return (self.dx(dh) if need_dx else None), grads


@lora_mutant("alpha/r forgotten in the forward", *MUTANT_CLAIMS)
class NoScalingInForward(LoRA):
    def forward(self, x):
        h = x @ self.lora_A.T
        y = h @ self.lora_B.T
        return y, (self, y.shape, x, h)


@lora_mutant("dA and dB swapped", *MUTANT_CLAIMS)
class Swapped(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"lora_A": grads["lora_B"], "lora_B": grads["lora_A"]}


@lora_mutant("dB transposed", *MUTANT_CLAIMS)
class TransposedB(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h).T


@lora_mutant("dA transposed and put back into its shape", *MUTANT_CLAIMS)
class ReshapedA(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).T.reshape(self.lora_A.shape)


@lora_mutant("dA from the factor B of one output only", *MUTANT_CLAIMS)
class OneOutput(Wrong):
    def dh(self, dy, x, h):
        return dy[..., :1] @ self.lora_B[:1] * self.scaling


@lora_mutant("dA from the sum of dy over outputs", *MUTANT_CLAIMS)
class SummedOutputs(Wrong):
    def dh(self, dy, x, h):
        return dy.sum(axis=-1, keepdims=True) * self.lora_B.mean(axis=0) * self.scaling


@lora_mutant("dA of the first row only", *MUTANT_CLAIMS)
class FirstRow(Wrong):
    def dA(self, dh, x):
        return rows(dh)[:1].T @ rows(x)[:1]


@lora_mutant("mean over rows in place of the sum, in dB", *MUTANT_CLAIMS)
class MeanOverRows(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) / len(rows(dy))


@lora_mutant("the cached h taken again through A", *MUTANT_CLAIMS)
class HTwice(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ (rows(h) @ self.lora_A @ self.lora_A.T) * self.scaling


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
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) * np.float64(1)


@lora_mutant("only the last of the leading axes summed", *MUTANT_CLAIMS)
class OneAxis(Wrong):
    def dB(self, dy, x, h):
        return np.swapaxes(np.atleast_2d(dy), -1, -2) @ np.atleast_2d(h) * self.scaling


@mutant("delta as A^T B^T", delta_is_the_matrix_of_forward)
class TransposedDelta(LoRA):
    def delta(self):
        return self.scaling * (self.lora_B @ self.lora_A).T


@mutant("delta without alpha/r", delta_is_the_matrix_of_forward)
class UnscaledDelta(LoRA):
    def delta(self):
        return self.lora_B @ self.lora_A


# --- the residual form ----------------------------------------------------------------------------


def written_out(model, x, y, *, c=None, dB=None, dH=None):
    """`minilora.fast.residual_form`, for a wrong part to take the place of one of its own."""
    lora, R = (model.adapter, y - model.base(x)) if isinstance(model, LoRALinear) else (model, y)
    A, B, s = lora.lora_A, lora.lora_B, lora.scaling
    c = 2 * s / R.size if c is None else c(s, R)
    H = x @ A.T
    dH = c * (s * H @ (B.T @ B) - R @ B) if dH is None else dH(c, s, H, B, R)
    return {"lora_A": dH.T @ x, "lora_B": c * (s * B @ (H.T @ H) - R.T @ H) if dB is None else dB(c, s, H, B, R)}


def residual_mutant(name: str, **wrong: Callable) -> None:
    mutant(name, gradients_are_the_slope_of_mse)(partial(written_out, **wrong))


residual_mutant("residual form: mean over rows only", c=lambda s, R: 2 * s / len(R))
residual_mutant("residual form: 2 forgotten", c=lambda s, R: s / R.size)
residual_mutant("residual form: alpha/r forgotten in front", c=lambda s, R: 2 / R.size)
residual_mutant("residual form: alpha/r forgotten inside dB", dB=lambda c, s, H, B, R: c * (B @ (H.T @ H) - R.T @ H))
residual_mutant("residual form: sign of the residual", dB=lambda c, s, H, B, R: c * (s * B @ (H.T @ H) + R.T @ H))
residual_mutant("residual form: residual left out of dH", dH=lambda c, s, H, B, R: c * s * H @ (B.T @ B))
residual_mutant("residual form: alpha/r forgotten inside dH", dH=lambda c, s, H, B, R: c * (H @ (B.T @ B) - R @ B))


# --- Linear and LoRALinear ------------------------------------------------------------------------


class WrongLinear(Linear):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return self.spoil(dx, grads, dy, cache[2])


@linear_mutant("bias gradient is a mean", *MUTANT_CLAIMS)
class MeanBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {**grads, "bias": rows(dy).mean(axis=0)} if self.bias is not None else grads


@linear_mutant("bias gradient forgotten", *MUTANT_CLAIMS)
class NoBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {"weight": grads["weight"]}


@linear_mutant("bias left out of the forward", *MUTANT_CLAIMS)
class BiaslessForward(Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y, (self, y.shape, x)


@linear_mutant("dx with the transposed weight", *MUTANT_CLAIMS)
class TransposedDx(Linear):
    def input_gradient(self, dy):
        return dy @ self.weight.T.reshape(self.weight.shape)


@linear_mutant("the input handed back as its own gradient", *MUTANT_CLAIMS)
class InputForDx(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return x if dx is not None else None, grads


# --- the loss -------------------------------------------------------------------------------------


@mutant("mse: gradient as of a mean over rows only", *MSE_CLAIMS)
def mean_over_rows(p, t):
    return ((p - t) ** 2).mean(), 2 / len(p) * (p - t)


@mutant("mse: 2 forgotten", *MSE_CLAIMS)
def no_two(p, t):
    return ((p - t) ** 2).mean(), (p - t) / p.size


@mutant("mse: target less prediction", *MSE_CLAIMS)
def wrong_sign(p, t):
    return ((p - t) ** 2).mean(), 2 / p.size * (t - p)


@mutant("mse: sum in loss and gradient alike", *MSE_CLAIMS)
def summed(p, t):
    return ((p - t) ** 2).sum(), 2 * (p - t)


@mutant("mse: half of it in loss and gradient alike", *MSE_CLAIMS)
def halved(p, t):
    return ((p - t) ** 2).mean() / 2, (p - t) / p.size


# --- Adam -----------------------------------------------------------------------------------------

STEPS_WRONG = {
    "m = b1 m + (1 - b1 g)": {"m": lambda m, g, beta: beta * m + (1 - beta * g)},
    "m = b1 + (1 - b1) g": {"m": lambda m, g, beta: beta + (1 - beta) * g},
    "bias correction with the step before": {
        "m_hat": lambda m, beta, t: m / (1 - beta ** max(1, t - 1)),
        "v_hat": lambda v, beta, t: v / (1 - beta ** max(1, t - 1)),
    },
    "v from g in place of its square": {"v": lambda v, g, beta: beta * v + (1 - beta) * np.abs(g)},
    "gradient added twice": {"m": lambda m, g, beta: beta * m + 2 * (1 - beta) * g},
}
for name, parts in STEPS_WRONG.items():
    mutant(f"Adam: {name}", *ADAM_CLAIMS)(adam_by_formulas(**parts))


@mutant("Adam: t counted once for each array", *ADAM_CLAIMS)
class CountsArrays(AdamByFormulas):
    def move(self, name, g):
        self.t += 1
        super().move(name, g)


# --- and those that the start of LoRA hides -------------------------------------------------------


@lora_mutant("dh doubled, and with it dA and dx", *MUTANT_CLAIMS)
class DoubledDh(Wrong):
    def dh(self, dy, x, h):
        return dy @ self.lora_B * self.scaling * 2


# --- embeddings -----------------------------------------------------------------------------------

TWO_CLAIMS = (forward_is_the_reference, backward_is_the_slope_of_forward, backward_without_dx_is_the_same)

embedding_mutant = partial(mutant, of=partial(plain_case, KINDS["embedding"]))
lora_embedding_mutant = partial(mutant, of=lambda base: adapted_case(KINDS["embedding"], base=base))


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


@embedding_mutant("embedding: mean over repeated ids", *TWO_CLAIMS)
class MeanOfRepeats(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy / np.bincount(ids)[ids][:, None])


@embedding_mutant("embedding: the first id's row has no gradient, as of padding", *TWO_CLAIMS)
class Padding(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy)
        dW[ids[0]] = 0


@lora_embedding_mutant("embedding with LoRA: columns of A for rows of another id", *TWO_CLAIMS)
class ShiftedIds(Embedding):
    def rewrite(self, x):
        return OneHot((x + 1) % len(self.weight), len(self.weight), self.weight)


# --- convolutions ---------------------------------------------------------------------------------

conv_mutant = partial(mutant, of=partial(plain_case, KINDS["conv2d"]))
lora_conv_mutant = partial(mutant, of=lambda cls: adapted_case(KINDS["conv2d"], rewritten=cls))


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


@conv_mutant("convolution: dx still shifted by the padding", *TWO_CLAIMS)
class ShiftedDx(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        return np.roll(super().rewrite_adjoint(dz, shape), self.padding, (2, 3))


@conv_mutant("convolution: dx of the last entry of the kernel missing", *TWO_CLAIMS)
class OneOffsetLess(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        dz = dz.reshape(-1, self.weight.shape[1], *self.kernel).copy()
        dz[:, :, -1, -1] = 0
        return super().rewrite_adjoint(dz, shape)


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


@conv_mutant("convolution: bias gradient is a mean over positions", *TWO_CLAIMS)
class MeanOverPositions(Conv2d):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, grads | ({"bias": dy.mean(axis=(2, 3)).sum(axis=0)} if "bias" in grads else {})


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


def merged_gives_the_same_output(case: Any, problem: Problem) -> None:
    params = case.params(problem)
    layer = case.build(problem, params)
    require_close("the merged output", layer.merge()(params["x"]), layer(params["x"]), 1e-11)


def merges_wrongly(change):
    """A convolution beside its adapter whose merge adds another change of the kernels (out, C, KH, KW)."""

    class Merges(Rewritten):
        def merge(self):
            base, A, B = self.base, self.adapter.lora_A, self.adapter.lora_B
            kernels = change((B @ A).reshape(base.weight.shape), self.adapter.scaling)
            steps = {name: getattr(base, name) for name in ("stride", "padding", "dilation")}
            return Conv2d(base.weight + kernels, base.bias, **steps)

    return Merges


MERGES_WRONG = {
    "alpha/r forgotten": merges_wrongly(lambda kernels, s: kernels),
    "the average over the kernel": merges_wrongly(lambda k, s: s * k.mean(axis=(2, 3), keepdims=True) + 0 * k),
}
for name, cls in MERGES_WRONG.items():
    lora_conv_mutant(f"convolution merged wrongly: {name}", merged_gives_the_same_output)(cls)


# --- DoRA -----------------------------------------------------------------------------------------


class WrongDoRA(DoRA):
    """DoRA's backward with its parts open to a subclass."""

    def du(self, dy, g):
        return dy * g

    def dV(self, dn, n):
        return (dn / n)[:, None] * self.direction()

    def through_norm(self, dV):
        A, B, s = self.adapter.lora_A, self.adapter.lora_B, self.adapter.scaling
        return {"lora_A": s * B.T @ dV, "lora_B": s * dV @ A.T}

    def backward(self, dy, cache, *, need_dx=True):
        adapter_cache, n, g, u = cache[2:]
        du = self.du(dy, g)
        dx, grads = self.adapter.backward(du, adapter_cache, need_dx=need_dx)
        dx = self.base.input_gradient(du) + dx if need_dx else None
        dm = rows(dy * u).sum(axis=0) / n
        more = self.through_norm(self.dV(-g * dm, n))
        return dx, {
            "lora_A": grads["lora_A"] + more["lora_A"],
            "lora_B": grads["lora_B"] + more["lora_B"],
            "magnitude": dm,
        }


def dora_case(cls: type[DoRA]) -> Any:
    return adapted_case(KINDS["linear"], "full", dora=cls)


dora_mutant = partial(mutant, of=dora_case)


@dora_mutant("DoRA: magnitude left out of what trains", *TWO_CLAIMS)
class NoMagnitude(WrongDoRA):
    def trainable(self):
        return {name: p for name, p in super().trainable().items() if name != "magnitude"}


@dora_mutant("DoRA: the magnitude scales the adapter alone", *TWO_CLAIMS)
class ScaledAdapter(WrongDoRA):
    def forward(self, x):
        y, cache = super().forward(x)
        return y + (1 - self.adapter.magnitude / self.norm()) * (x @ self.base.weight.T), cache


@dora_mutant("DoRA: du without m / n", *TWO_CLAIMS)
class UnscaledDu(WrongDoRA):
    def du(self, dy, g):
        return dy


@dora_mutant("DoRA, full: dV not divided by the norm", *TWO_CLAIMS)
class UndividedDirection(WrongDoRA):
    def dV(self, dn, n):
        return dn[:, None] * self.direction()


@dora_mutant("DoRA, full: dV along W in place of V", *TWO_CLAIMS)
class AlongBase(WrongDoRA):
    def dV(self, dn, n):
        return (dn / n)[:, None] * self.base.weight


@dora_mutant("DoRA, full: alpha/r forgotten behind the norm", *TWO_CLAIMS)
class UnscaledThroughNorm(WrongDoRA):
    def through_norm(self, dV):
        return {name: grad / self.adapter.scaling for name, grad in super().through_norm(dV).items()}


# --- starts, rates, sums: functions ---------------------------------------------------------------


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


def rslora_divides_by_the_root(scaling: Callable[..., float], problem: Problem) -> None:
    found = scaling(problem.alpha, problem.rank, use_rslora=True)
    require_close("the scaling", found, problem.alpha / problem.rank**0.5, 1e-14)


mutant("rsLoRA: root forgotten", rslora_divides_by_the_root)(lambda alpha, rank, use_rslora: alpha / rank)
mutant("rsLoRA: alpha alone", rslora_divides_by_the_root)(lambda alpha, rank, use_rslora: alpha)
mutant("rsLoRA: divided by the root again", rslora_divides_by_the_root)(
    lambda alpha, rank, use_rslora: alpha / rank**1.5
)


def sums_are_exact(weighted_sum: Callable[..., LoRA], problem: Problem) -> None:
    """With weights below zero, and ranks and alphas that differ."""
    A, B = problem.factors.values()
    terms = [LoRA(A, B, problem.alpha), LoRA(2 * A[:1], B[:, :1] + 1, 2 * problem.alpha), LoRA(A + 1, B, 1.0)]
    for weights in ((1, 1, 1), (1, -1, 0.5), (-0.5, -2, 3)):
        expected = sum(w * term.delta() for w, term in zip(weights, terms, strict=True))
        require_close("the sum", weighted_sum(terms, weights).delta(), expected, 1e-12)


def side_by_side(left, right):
    """A weighted sum, with what goes into each factor."""

    def weighted_sum(terms, weights):
        pairs = list(zip(terms, weights, strict=True))
        A = np.concatenate([right(t, w) * t.lora_A for t, w in pairs])
        B = np.concatenate([left(t, w) * t.lora_B for t, w in pairs], axis=1)
        return LoRA(A, B, len(A))

    return weighted_sum


RIGHT_SUM = side_by_side(lambda t, w: w * t.scaling, lambda t, w: 1)
SUMS_WRONG = {
    "root of |w| in both factors, which forgets the sign": side_by_side(
        lambda t, w: abs(w * t.scaling) ** 0.5, lambda t, w: abs(w * t.scaling) ** 0.5
    ),
    "weight in both factors": side_by_side(lambda t, w: w * t.scaling, lambda t, w: w),
    "alpha/r forgotten": side_by_side(lambda t, w: w, lambda t, w: 1),
    "negative weights cut off": side_by_side(lambda t, w: max(w, 0) * t.scaling, lambda t, w: 1),
    "weights normalised": lambda terms, weights: RIGHT_SUM(terms, [w / sum(map(abs, weights)) for w in weights]),
}
for name, wrong in SUMS_WRONG.items():
    mutant(f"sum of adapters: {name}", sums_are_exact)(wrong)


def the_best_rank_leaves_the_discarded_values(best: Callable[[LoRA, int], LoRA], problem: Problem) -> None:
    lora = LoRA(**problem.factors, alpha=problem.alpha)
    values = np.linalg.svd(lora.delta(), compute_uv=False)
    r = max(1, min(lora.rank, *lora.shape) - 1)
    error = np.linalg.norm(lora.delta() - best(lora, r).delta())
    require_close("the error", error, np.linalg.norm(values[r:]), 1e-11)


def first_columns(lora, r):
    return LoRA(lora.lora_A[:r], lora.lora_B[:, :r], lora.scaling * r)


def by_svd_of_b_alone(lora, r):
    U, S, Vt = np.linalg.svd(lora.lora_B, full_matrices=False)
    return LoRA(Vt[:r] @ lora.lora_A, U[:, :r] * S[:r], lora.scaling * r)


mutant("best of a rank: the first columns", the_best_rank_leaves_the_discarded_values)(first_columns)
mutant("best of a rank: by one factor's singular values", the_best_rank_leaves_the_discarded_values)(by_svd_of_b_alone)
mutant("best of a rank: alpha/r forgotten", the_best_rank_leaves_the_discarded_values)(
    lambda lora, r: best_of_rank(LoRA(lora.lora_A, lora.lora_B, lora.rank), r)
)


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
        claims = (merged_gives_the_same_output,) if row.breaks == "merge" else MUTANT_CLAIMS
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
