"""Code that is wrong on purpose. Each bug is one that has been made, here or elsewhere; the real ones come first.

The test beside this file hands each of them to the very properties that the library's own code passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora import Adam, Linear, LoRA, LoRALinear
from minilora.conformance.claims import (
    ADAM_CLAIMS,
    MSE_CLAIMS,
    a_frozen_layer_only_passes_dx,
    delta_is_the_matrix_of_forward,
)
from minilora.layer import rows

from .cases import LAYER_CLAIMS, linear_case, lora_case, lora_linear_case
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
