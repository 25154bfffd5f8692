"""Code that is wrong on purpose. Each bug is one that has been made, here or elsewhere; the real ones come first.

The test beside this file hands each of them to the very properties that the library's own code passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora import Adam, Conv2d, DoRA, Embedding, Linear, LoRA, LoRALinear, best_of_rank
from minilora.backend import add_at
from minilora.conformance.claims import (
    ADAM_CLAIMS,
    MSE_CLAIMS,
    a_frozen_layer_only_passes_dx,
    backward_is_the_slope_of_forward,
    backward_without_dx_is_the_same,
    delta_is_the_matrix_of_forward,
    forward_is_the_reference,
    require_close,
)
from minilora.layer import rows
from minilora.layers.embedding import OneHot
from minilora.variants.rewritten import Rewritten

from .cases import KINDS, LAYER_CLAIMS, adapted_case, linear_case, lora_case, lora_linear_case, plain_case
from .compare import gradients_are_the_slope_of_mse
from .problems import Problem


@dataclass(frozen=True)
class Bug:
    """What is wrong, and the properties that must reject it."""

    name: str
    claims: tuple[Callable[[Problem], None], ...]


BUGS: list[Bug] = []

# That a frozen layer has no gradients is left out: most bugs below ignore it, and would be caught by that alone.
BUG_CLAIMS = tuple(claim for claim in LAYER_CLAIMS if claim is not a_frozen_layer_only_passes_dx)


def bug(name: str, *claims: Callable[[Any, Problem], None], of: Callable[[Any], Any] = lambda subject: subject):
    """Register the class or function below as a bug, to be judged by these claims."""

    def register(subject: Any) -> Any:
        BUGS.append(Bug(name, tuple(partial(claim, of(subject)) for claim in claims)))
        return subject

    return register


lora_bug = partial(bug, of=lora_case)
linear_bug = partial(bug, of=linear_case)
lora_linear_bug = partial(bug, of=lora_linear_case)


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


@lora_bug("alpha/r forgotten in dA", *BUG_CLAIMS)
class NoScalingInA(Wrong):
    def dA(self, dh, x):
        return rows(dh).T @ rows(x) / self.scaling


@lora_bug("alpha/r forgotten in dB", *BUG_CLAIMS)
class NoScalingInB(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ rows(h)


@lora_bug("alpha/r forgotten in dx", *BUG_CLAIMS)
class NoScalingInX(Wrong):
    def dx(self, dh):
        return dh @ self.lora_A / self.scaling


@lora_bug("alpha/r forgotten in the whole backward", *BUG_CLAIMS)
class NoScalingInBackward(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ rows(h)

    def dh(self, dy, x, h):
        return dy @ self.lora_B


@lora_bug("alpha/r forgotten in the forward", *BUG_CLAIMS)
class NoScalingInForward(LoRA):
    def forward(self, x):
        h = x @ self.lora_A.T
        y = h @ self.lora_B.T
        return y, (self, y.shape, x, h)


@lora_bug("alpha/r forgotten in forward and backward alike", *BUG_CLAIMS)
class NoScalingAtAll(NoScalingInBackward):
    def forward(self, x):
        h = x @ self.lora_A.T
        y = h @ self.lora_B.T
        return y, (self, y.shape, x, h)


@lora_bug("alpha/r squared in dA", *BUG_CLAIMS)
class ScalingTwice(Wrong):
    def dA(self, dh, x):
        return rows(dh).T @ rows(x) * self.scaling


@lora_bug("alpha in place of alpha/r", *BUG_CLAIMS)
class AlphaForScaling(LoRA):
    @property
    def scaling(self):
        return self.alpha


@lora_bug("alpha divided by the root of r", *BUG_CLAIMS)
class RootForScaling(LoRA):
    @property
    def scaling(self):
        return self.alpha / self.rank**0.5


@lora_bug("dA and dB swapped", *BUG_CLAIMS)
class Swapped(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"lora_A": grads["lora_B"], "lora_B": grads["lora_A"]}


@lora_bug("dB transposed", *BUG_CLAIMS)
class TransposedB(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h).T


@lora_bug("dA transposed and put back into its shape", *BUG_CLAIMS)
class ReshapedA(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).T.reshape(self.lora_A.shape)


@lora_bug("dA with the opposite sign", *BUG_CLAIMS)
class MinusA(Wrong):
    def dA(self, dh, x):
        return -super().dA(dh, x)


@lora_bug("dA from the factor B of one output only", *BUG_CLAIMS)
class OneOutput(Wrong):
    def dh(self, dy, x, h):
        return dy[..., :1] @ self.lora_B[:1] * self.scaling


@lora_bug("dA from the sum of dy over outputs", *BUG_CLAIMS)
class SummedOutputs(Wrong):
    def dh(self, dy, x, h):
        return dy.sum(axis=-1, keepdims=True) * self.lora_B.mean(axis=0) * self.scaling


@lora_bug("dA of the first row only", *BUG_CLAIMS)
class FirstRow(Wrong):
    def dA(self, dh, x):
        return rows(dh)[:1].T @ rows(x)[:1]


@lora_bug("mean over rows in place of the sum, in dB", *BUG_CLAIMS)
class MeanOverRows(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) / len(rows(dy))


@lora_bug("the cached h taken again through A", *BUG_CLAIMS)
class HTwice(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ (rows(h) @ self.lora_A @ self.lora_A.T) * self.scaling


@lora_bug("one entry of dA off by a millionth", *BUG_CLAIMS)
class Millionth(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[-1, -1] += 1e-6
        return dA


@lora_bug("an entry of dA missing, as behind a mask", *BUG_CLAIMS)
class Masked(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[0, 0] = 0
        return dA


@lora_bug("gradients added up over calls", *BUG_CLAIMS)
class Accumulated(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        self.total = {name: getattr(self, "total", {}).get(name, 0) + grad for name, grad in grads.items()}
        return dx, self.total


@lora_bug("gradient written into the caller's dy", *BUG_CLAIMS)
class ScalesDyInPlace(LoRA):
    def backward(self, dy, cache, *, need_dx=True):
        dy *= self.scaling
        *_, x, h = cache
        dh = dy @ self.lora_B
        dx = dh @ self.lora_A if need_dx else None
        return dx, {"lora_A": rows(dh).T @ rows(x), "lora_B": rows(dy).T @ rows(h)}


@lora_bug("dA rounded to float32", *BUG_CLAIMS)
class Single(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).astype(np.float32).astype(dh.dtype)


@lora_bug("float64 returned for float32", *BUG_CLAIMS)
class Promoted(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) * np.float64(1)


@lora_bug("only the last of the leading axes summed", *BUG_CLAIMS)
class OneAxis(Wrong):
    def dB(self, dy, x, h):
        return np.swapaxes(np.atleast_2d(dy), -1, -2) @ np.atleast_2d(h) * self.scaling


@bug("delta as A^T B^T", delta_is_the_matrix_of_forward)
class TransposedDelta(LoRA):
    def delta(self):
        return self.scaling * (self.lora_B @ self.lora_A).T


@bug("delta without alpha/r", delta_is_the_matrix_of_forward)
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


def residual_bug(name: str, **wrong: Callable) -> None:
    bug(name, gradients_are_the_slope_of_mse)(partial(written_out, **wrong))


residual_bug("residual form: mean over rows only", c=lambda s, R: 2 * s / len(R))
residual_bug("residual form: 2 forgotten", c=lambda s, R: s / R.size)
residual_bug("residual form: alpha/r forgotten in front", c=lambda s, R: 2 / R.size)
residual_bug("residual form: alpha/r forgotten inside dB", dB=lambda c, s, H, B, R: c * (B @ (H.T @ H) - R.T @ H))
residual_bug("residual form: sign of the residual", dB=lambda c, s, H, B, R: c * (s * B @ (H.T @ H) + R.T @ H))
residual_bug("residual form: residual left out of dH", dH=lambda c, s, H, B, R: c * s * H @ (B.T @ B))
residual_bug("residual form: alpha/r forgotten inside dH", dH=lambda c, s, H, B, R: c * (H @ (B.T @ B) - R @ B))


# --- Linear and LoRALinear ------------------------------------------------------------------------


class WrongLinear(Linear):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return self.spoil(dx, grads, dy, cache[2])


@linear_bug("bias gradient is a mean", *BUG_CLAIMS)
class MeanBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {**grads, "bias": rows(dy).mean(axis=0)} if self.bias is not None else grads


@linear_bug("bias gradient forgotten", *BUG_CLAIMS)
class NoBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {"weight": grads["weight"]}


@linear_bug("bias left out of the forward", *BUG_CLAIMS)
class BiaslessForward(Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y, (self, y.shape, x)


@linear_bug("dx with the transposed weight", *BUG_CLAIMS)
class TransposedDx(Linear):
    def input_gradient(self, dy):
        return dy @ self.weight.T.reshape(self.weight.shape)


@linear_bug("the input handed back as its own gradient", *BUG_CLAIMS)
class InputForDx(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return x if dx is not None else None, grads


@lora_linear_bug("dx without the LoRA path", *BUG_CLAIMS)
class NoLoRAPath(LoRALinear):
    def backward(self, dy, cache, *, need_dx=True):
        _, grads = super().backward(dy, cache, need_dx=need_dx)
        return (self.base.input_gradient(dy) if need_dx else None), grads


@lora_linear_bug("dx without the base's path", *BUG_CLAIMS)
class NoBasePath(LoRALinear):
    def backward(self, dy, cache, *, need_dx=True):
        return self.adapter.backward(dy, cache[-1], need_dx=need_dx)


@lora_linear_bug("the adapter's output added twice", *BUG_CLAIMS)
class AdapterTwice(LoRALinear):
    def forward(self, x):
        update, cache = self.adapter.forward(x)
        return self.base(x) + 2 * update, (self, update.shape, cache)


# --- the loss -------------------------------------------------------------------------------------


@bug("mse: gradient as of a mean over rows only", *MSE_CLAIMS)
def mean_over_rows(p, t):
    return ((p - t) ** 2).mean(), 2 / len(p) * (p - t)


@bug("mse: 2 forgotten", *MSE_CLAIMS)
def no_two(p, t):
    return ((p - t) ** 2).mean(), (p - t) / p.size


@bug("mse: target less prediction", *MSE_CLAIMS)
def wrong_sign(p, t):
    return ((p - t) ** 2).mean(), 2 / p.size * (t - p)


@bug("mse: sum in loss and gradient alike", *MSE_CLAIMS)
def summed(p, t):
    return ((p - t) ** 2).sum(), 2 * (p - t)


@bug("mse: half of it in loss and gradient alike", *MSE_CLAIMS)
def halved(p, t):
    return ((p - t) ** 2).mean() / 2, (p - t) / p.size


# --- Adam -----------------------------------------------------------------------------------------


class WrongAdam(Adam):
    """Adam written out once more, with every ingredient open to a subclass."""

    def moments(self, m, v, g):
        beta1, beta2 = self.betas
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g

    def corrected(self, m, v):
        return m / (1 - self.betas[0] ** self.t), v / (1 - self.betas[1] ** self.t)

    def move(self, m_hat, v_hat):
        return self.lr * m_hat / (np.sqrt(v_hat) + self.eps)

    def step(self, grads):
        self.t += 1
        for name, p in self.params.items():
            self.m[name], self.v[name] = self.moments(self.m[name], self.v[name], grads[name])
            p -= self.move(*self.corrected(self.m[name], self.v[name]))


@bug("Adam: eps inside the root", *ADAM_CLAIMS)
class EpsInside(WrongAdam):
    def move(self, m_hat, v_hat):
        return self.lr * m_hat / np.sqrt(v_hat + self.eps)


@bug("Adam: eps before the correction", *ADAM_CLAIMS)
class EpsBeforeCorrection(WrongAdam):
    def corrected(self, m, v):
        m_hat, v_hat = super().corrected(m, v)
        return m_hat, (np.sqrt(v_hat) + self.eps / np.sqrt(1 - self.betas[1] ** self.t) - self.eps) ** 2


@bug("Adam: m = b1 m + (1 - b1 g)", *ADAM_CLAIMS)
class Misplaced(WrongAdam):
    def moments(self, m, v, g):
        return self.betas[0] * m + (1 - self.betas[0] * g), super().moments(m, v, g)[1]


@bug("Adam: m = b1 + (1 - b1) g", *ADAM_CLAIMS)
class ForgottenMean(WrongAdam):
    def moments(self, m, v, g):
        return self.betas[0] + (1 - self.betas[0]) * g, super().moments(m, v, g)[1]


@bug("Adam: no bias correction", *ADAM_CLAIMS)
class Uncorrected(WrongAdam):
    def corrected(self, m, v):
        return m, v


@bug("Adam: no bias correction of v", *ADAM_CLAIMS)
class HalfCorrected(WrongAdam):
    def corrected(self, m, v):
        return super().corrected(m, v)[0], v


@bug("Adam: bias correction with the step before", *ADAM_CLAIMS)
class OneStepLate(WrongAdam):
    def corrected(self, m, v):
        t = max(1, self.t - 1)
        return m / (1 - self.betas[0] ** t), v / (1 - self.betas[1] ** t)


@bug("Adam: betas swapped", *ADAM_CLAIMS)
class SwappedBetas(WrongAdam):
    def moments(self, m, v, g):
        beta2, beta1 = self.betas
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g


@bug("Adam: v from g in place of its square", *ADAM_CLAIMS)
class NoSquare(WrongAdam):
    def moments(self, m, v, g):
        return super().moments(m, v, g)[0], self.betas[1] * v + (1 - self.betas[1]) * np.abs(g)


@bug("Adam: v in place of its root", *ADAM_CLAIMS)
class NoRoot(WrongAdam):
    def move(self, m_hat, v_hat):
        return self.lr * m_hat / (v_hat + self.eps)


@bug("Adam: uphill", *ADAM_CLAIMS)
class Uphill(WrongAdam):
    def move(self, m_hat, v_hat):
        return -super().move(m_hat, v_hat)


@bug("Adam: gradient added twice", *ADAM_CLAIMS)
class Twice(WrongAdam):
    def moments(self, m, v, g):
        m, v = super().moments(m, v, g)
        return m + (1 - self.betas[0]) * g, v


@bug("Adam: t counted once for each array", *ADAM_CLAIMS)
class CountsArrays(WrongAdam):
    def corrected(self, m, v):
        self.t += 1
        return super().corrected(m, v)


@bug("Adam: weight decay where none was asked for", *ADAM_CLAIMS)
class Decay(WrongAdam):
    def step(self, grads):
        for p in self.params.values():
            p *= 1 - 0.01 * self.lr
        super().step(grads)


# --- and those that the start of LoRA hides -------------------------------------------------------


@lora_bug("dh doubled, and with it dA and dx", *BUG_CLAIMS)
class DoubledDh(Wrong):
    def dh(self, dy, x, h):
        return dy @ self.lora_B * self.scaling * 2


HIDDEN_AT_THE_START = {
    "alpha/r forgotten in dA": NoScalingInA,
    "alpha/r squared in dA": ScalingTwice,
    "dA with the opposite sign": MinusA,
    "dA of the first row only": FirstRow,
    "dh doubled, and with it dA and dx": DoubledDh,
}
"""At B = 0, dh is zero whatever it is multiplied with, and so are dA and dx: right by accident."""


# --- embeddings -----------------------------------------------------------------------------------

TWO_CLAIMS = (forward_is_the_reference, backward_is_the_slope_of_forward, backward_without_dx_is_the_same)

embedding_bug = partial(bug, of=partial(plain_case, KINDS["embedding"]))
lora_embedding_bug = partial(bug, of=lambda base: adapted_case(KINDS["embedding"], base=base))


class WrongEmbedding(Embedding):
    """Embedding with the scatter open to a subclass."""

    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy)

    def backward(self, dy, cache, *, need_dx=True):
        dW = np.zeros_like(self.weight)
        self.scatter(dW, cache[2].ids.reshape(-1), rows(dy))
        return None, {} if self.frozen else {"weight": dW}


@embedding_bug("embedding: scatter that overwrites", *TWO_CLAIMS)
class Overwrites(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        dW[ids] = dy


@embedding_bug("embedding: += with an index, which adds repeated ids once", *TWO_CLAIMS)
class Buffered(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        dW[ids] += dy


@embedding_bug("embedding: mean over repeated ids", *TWO_CLAIMS)
class MeanOfRepeats(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy / np.bincount(ids)[ids][:, None])


@embedding_bug("embedding: the first id's row has no gradient, as of padding", *TWO_CLAIMS)
class Padding(WrongEmbedding):
    def scatter(self, dW, ids, dy):
        add_at(dW, ids, dy)
        dW[ids[0]] = 0


@lora_embedding_bug("embedding with LoRA: scatter that overwrites", *TWO_CLAIMS)
class OverwritesInA(Embedding):
    def rewrite(self, x):
        class Wrong(OneHot):
            def reshape(self, *shape):
                return Wrong(self.ids.reshape(shape[:-1]), shape[-1], self.like)

            def __rmatmul__(self, left):
                out = np.zeros((len(left), self.shape[-1]), left.dtype)
                out[:, self.ids] = left
                return out

        return Wrong(x, len(self.weight), self.weight)


@lora_embedding_bug("embedding with LoRA: columns of A for rows of another id", *TWO_CLAIMS)
class ShiftedIds(Embedding):
    def rewrite(self, x):
        return OneHot((x + 1) % len(self.weight), len(self.weight), self.weight)


# --- convolutions ---------------------------------------------------------------------------------

conv_bug = partial(bug, of=partial(plain_case, KINDS["conv2d"]))
lora_conv_bug = partial(bug, of=lambda cls: adapted_case(KINDS["conv2d"], rewritten=cls))


@conv_bug("convolution: overlapping patches overwrite each other in dx", *TWO_CLAIMS)
class OverwritesInDx(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        n, c, *sizes = shape
        dz = dz.T.reshape(c, *self.kernel, n, *self.positions(shape))
        dx = np.zeros((c, n, *(s + 2 * p for s, p in zip(sizes, self.padding, strict=True))), dz.dtype)
        for offset, window in self.windows(self.positions(shape)):
            dx[(..., *window)] = dz[(slice(None), *offset)]
        inner = (slice(p, p + s) for s, p in zip(sizes, self.padding, strict=True))
        return dx[(..., *inner)].swapaxes(0, 1)


@conv_bug("convolution: dx still shifted by the padding", *TWO_CLAIMS)
class ShiftedDx(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        return np.roll(super().rewrite_adjoint(dz, shape), self.padding, (2, 3))


@conv_bug("convolution: dx of the last entry of the kernel missing", *TWO_CLAIMS)
class OneOffsetLess(Conv2d):
    def rewrite_adjoint(self, dz, shape):
        dz = dz.reshape(-1, self.weight.shape[1], *self.kernel).copy()
        dz[:, :, -1, -1] = 0
        return super().rewrite_adjoint(dz, shape)


@conv_bug("convolution: stride and dilation swapped", *TWO_CLAIMS)
class Exchanged(Conv2d):
    def __init__(self, weight, bias=None, *, stride, padding, dilation):
        super().__init__(weight, bias, stride=dilation, padding=padding, dilation=stride)


@conv_bug("convolution: the kernel turned round, as the textbook's is", *TWO_CLAIMS)
class Flipped(Conv2d):
    def windows(self, positions):
        for offset, window in super().windows(positions):
            yield tuple(k - 1 - o for k, o in zip(self.kernel, offset, strict=True)), window


@conv_bug("convolution: patches with the channel last, the weight with it first", *TWO_CLAIMS)
class ChannelLast(Conv2d):
    def rewrite(self, x):
        z = super().rewrite(x)
        return z.reshape(len(z), x.shape[1], -1).swapaxes(1, 2).reshape(z.shape)

    def rewrite_adjoint(self, dz, shape):
        return super().rewrite_adjoint(dz.reshape(len(dz), -1, shape[1]).swapaxes(1, 2).reshape(dz.shape), shape)


@conv_bug("convolution: bias gradient is a mean over positions", *TWO_CLAIMS)
class MeanOverPositions(Conv2d):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, grads | ({"bias": dy.mean(axis=(2, 3)).sum(axis=0)} if "bias" in grads else {})


@conv_bug("convolution: padded with the border in place of zeros", *TWO_CLAIMS)
class Border(Conv2d):
    def rewrite(self, x):
        pads = [(p, p) for p in self.padding]
        inner = Conv2d(self.weight, stride=self.stride, dilation=self.dilation)
        return inner.rewrite(np.pad(x.real, ((0, 0), (0, 0), *pads), mode="edge"))


@conv_bug("convolution: rows reshaped into images without moving the axis", *TWO_CLAIMS)
class NotMoved(Conv2d):
    def arrange(self, y, shape):
        return y.reshape(shape[0], y.shape[-1], *self.positions(shape))


@lora_conv_bug("convolution with LoRA: dx without the base's path", *TWO_CLAIMS)
class NoBaseInConv(Rewritten):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        base = self.base.rewrite_adjoint(self.base.arrange_adjoint(dy) @ self.base.as_linear().weight, cache[2])
        return None if dx is None else dx - base, grads


@lora_conv_bug("convolution with LoRA: dx without the adapter's path", *TWO_CLAIMS)
class NoAdapterInConv(Rewritten):
    def backward(self, dy, cache, *, need_dx=True):
        _, grads = super().backward(dy, cache, need_dx=need_dx)
        dz = self.base.arrange_adjoint(dy) @ self.base.as_linear().weight
        return self.base.rewrite_adjoint(dz, cache[2]) if need_dx else None, grads


def merged_gives_the_same_output(case: Any, problem: Problem) -> None:
    params = case.params(problem)
    layer = case.build(problem, params)
    require_close("the merged output", layer.merge()(params["x"]), layer(params["x"]), 1e-11)


def merges_to(spoil: Callable[[Any, np.ndarray], np.ndarray]) -> type:
    """A convolution with LoRA whose change of weight is spoiled on the way to being merged."""

    class WrongMerge(Rewritten):
        def merge(self):
            linear = self.base.as_linear()
            weight = linear.weight + spoil(self, self.adapter.delta())
            return self.base.from_linear(Linear(weight, linear.bias))

    return WrongMerge


MERGES_RIGHT = merges_to(lambda layer, delta: delta)
MERGES_WRONG = {
    "channels and kernel exchanged": lambda layer, delta: (
        delta.reshape(len(delta), -1, layer.base.weight.shape[1]).swapaxes(1, 2).reshape(delta.shape)
    ),
    "kernel turned round": lambda layer, delta: delta.reshape(layer.base.weight.shape)[..., ::-1, ::-1].reshape(
        delta.shape
    ),
    "alpha/r forgotten": lambda layer, delta: delta / layer.scaling,
    "merged twice": lambda layer, delta: 2 * delta,
    "the average over the kernel": lambda layer, delta: (
        delta.reshape(*layer.base.weight.shape).mean(axis=(2, 3), keepdims=True) + 0 * layer.base.weight
    ).reshape(delta.shape),
}
for name, spoil in MERGES_WRONG.items():
    lora_conv_bug(f"convolution merged wrongly: {name}", merged_gives_the_same_output)(merges_to(spoil))


# --- DoRA -----------------------------------------------------------------------------------------


class WrongDoRA(DoRA):
    """DoRA with its parts open to a subclass."""

    def scale(self, u):
        g = self.adapter.magnitude / self.norm()
        return g * u if self.base.bias is None else g * u + self.base.bias

    def forward(self, x):
        _, (_, shape, *kept) = super().forward(x)
        u = x @ self.base.weight.T + self.adapter(x)
        return self.scale(u), (self, shape, *kept[:3], u)

    def du(self, dy, g):
        return dy * g

    def dm(self, dy, u, n):
        return rows(dy * u).sum(axis=0) / n

    def dn(self, g, dm):
        return -g * dm

    def dV(self, dn, n):
        return (dn / n)[:, None] * self.direction()

    def through_norm(self, dV):
        A, B, s = self.adapter.lora_A, self.adapter.lora_B, self.adapter.scaling
        return {"lora_A": s * B.T @ dV, "lora_B": s * dV @ A.T}

    def backward(self, dy, cache, *, need_dx=True):
        path_cache, n, g, u = cache[2:]
        dx, grads = path_cache[0].backward(self.du(dy, g), path_cache, need_dx=need_dx)
        dm = self.dm(dy, u, n)
        more = self.through_norm(self.dV(self.dn(g, dm), n))
        return dx, {
            "lora_A": grads["lora_A"] + more["lora_A"],
            "lora_B": grads["lora_B"] + more["lora_B"],
            "magnitude": dm,
        }


def dora_case(cls: type[DoRA]) -> Any:
    return adapted_case(KINDS["linear"], "full", dora=cls)


dora_bug = partial(bug, of=dora_case)


@dora_bug("DoRA: norm along the wrong axis", *TWO_CLAIMS)
class WrongAxis(WrongDoRA):
    def norm(self):
        return np.resize(np.linalg.norm(self.direction().real, axis=0), len(self.base.weight))


@dora_bug("DoRA: one norm for the whole matrix", *TWO_CLAIMS)
class WholeNorm(WrongDoRA):
    def norm(self):
        return np.full(len(self.base.weight), np.sqrt((self.direction() ** 2).sum()))


@dora_bug("DoRA: norm of the base alone", *TWO_CLAIMS)
class NormOfBase(WrongDoRA):
    def norm(self):
        return np.sqrt((self.base.weight**2).sum(axis=1))


@dora_bug("DoRA: alpha/r forgotten in the norm", *TWO_CLAIMS)
class UnscaledNorm(WrongDoRA):
    def norm(self):
        return np.sqrt(((self.base.weight + self.adapter.lora_B @ self.adapter.lora_A) ** 2).sum(axis=1))


@dora_bug("DoRA: the norm's square", *TWO_CLAIMS)
class SquaredNorm(WrongDoRA):
    def norm(self):
        return (self.direction() ** 2).sum(axis=1)


@dora_bug("DoRA: magnitude not trained", *TWO_CLAIMS)
class StillMagnitude(WrongDoRA):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {**grads, "magnitude": 0 * grads["magnitude"]}


@dora_bug("DoRA: magnitude left out of what trains", *TWO_CLAIMS)
class NoMagnitude(WrongDoRA):
    def trainable(self):
        return {name: p for name, p in super().trainable().items() if name != "magnitude"}


@dora_bug("DoRA: the bias scaled too", *TWO_CLAIMS)
class ScaledBias(WrongDoRA):
    def scale(self, u):
        return self.adapter.magnitude / self.norm() * (u if self.base.bias is None else u + self.base.bias)


@dora_bug("DoRA: the magnitude scales the adapter alone", *TWO_CLAIMS)
class ScaledAdapter(WrongDoRA):
    def forward(self, x):
        y, cache = super().forward(x)
        return y + (1 - self.adapter.magnitude / self.norm()) * (x @ self.base.weight.T), cache


@dora_bug("DoRA: dm not divided by the norm", *TWO_CLAIMS)
class UndividedMagnitude(WrongDoRA):
    def dm(self, dy, u, n):
        return rows(dy * u).sum(axis=0)

    def dn(self, g, dm):
        return super().dn(g, dm / self.norm())


@dora_bug("DoRA: du without m / n", *TWO_CLAIMS)
class UnscaledDu(WrongDoRA):
    def du(self, dy, g):
        return dy


@dora_bug("DoRA: the constant norm's gradient where the full one was asked for", *TWO_CLAIMS)
class ConstantNorm(WrongDoRA):
    def dn(self, g, dm):
        return 0 * dm


@dora_bug("DoRA, full: sign of dn", *TWO_CLAIMS)
class PlusNorm(WrongDoRA):
    def dn(self, g, dm):
        return g * dm


@dora_bug("DoRA, full: dV not divided by the norm", *TWO_CLAIMS)
class UndividedDirection(WrongDoRA):
    def dV(self, dn, n):
        return dn[:, None] * self.direction()


@dora_bug("DoRA, full: dV along W in place of V", *TWO_CLAIMS)
class AlongBase(WrongDoRA):
    def dV(self, dn, n):
        return (dn / n)[:, None] * self.base.weight


@dora_bug("DoRA, full: alpha/r forgotten behind the norm", *TWO_CLAIMS)
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
    "fan of the rank's side": lambda rng, n_in, n_out, r: rng.uniform(-1, 1, (r, n_in)) / r**0.5,
    "fan of the output": lambda rng, n_in, n_out, r: rng.uniform(-1, 1, (r, n_in)) / n_out**0.5,
    "he_uniform, sqrt 6 too large": lambda rng, n_in, n_out, r: rng.uniform(-1, 1, (r, n_in)) * (6 / n_in) ** 0.5,
    "A zero, as B is": lambda rng, n_in, n_out, r: np.zeros((r, n_in)),
}
for name, start in STARTS_WRONG.items():
    bug(f"start: {name}", a_start_has_the_fan_of_the_input)(start)


def rslora_divides_by_the_root(scaling: Callable[..., float], problem: Problem) -> None:
    found = scaling(problem.alpha, problem.rank, use_rslora=True)
    require_close("the scaling", found, problem.alpha / problem.rank**0.5, 1e-14)


bug("rsLoRA: root forgotten", rslora_divides_by_the_root)(lambda alpha, rank, use_rslora: alpha / rank)
bug("rsLoRA: alpha alone", rslora_divides_by_the_root)(lambda alpha, rank, use_rslora: alpha)
bug("rsLoRA: divided by the root again", rslora_divides_by_the_root)(lambda alpha, rank, use_rslora: alpha / rank**1.5)


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
    bug(f"sum of adapters: {name}", sums_are_exact)(wrong)


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


bug("best of a rank: the first columns", the_best_rank_leaves_the_discarded_values)(first_columns)
bug("best of a rank: by one factor's singular values", the_best_rank_leaves_the_discarded_values)(by_svd_of_b_alone)
bug("best of a rank: alpha/r forgotten", the_best_rank_leaves_the_discarded_values)(
    lambda lora, r: best_of_rank(LoRA(lora.lora_A, lora.lora_B, lora.rank), r)
)
