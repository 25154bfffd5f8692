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
from minilora.linear import rows

from .cases import linear_case, lora_case, lora_linear_case
from .problems import Problem
from .properties import (
    ADAM_PROPERTIES,
    LAYER_PROPERTIES,
    MSE_PROPERTIES,
    delta_is_the_matrix_of_forward,
    residual_form_is_the_gradient_of_mse,
)


@dataclass(frozen=True)
class Bug:
    """What is wrong, and the properties that must reject it."""

    name: str
    claims: tuple[Callable[[Problem], None], ...]


BUGS: list[Bug] = []


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
        _, x, h = cache
        dh = self.dh(dy, x, h)
        return (self.dx(dh) if need_dx else None), {"lora_A": self.dA(dh, x), "lora_B": self.dB(dy, x, h)}


@lora_bug("alpha/r forgotten in dA", *LAYER_PROPERTIES)
class NoScalingInA(Wrong):
    def dA(self, dh, x):
        return rows(dh).T @ rows(x) / self.scaling


@lora_bug("alpha/r forgotten in dB", *LAYER_PROPERTIES)
class NoScalingInB(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ rows(h)


@lora_bug("alpha/r forgotten in dx", *LAYER_PROPERTIES)
class NoScalingInX(Wrong):
    def dx(self, dh):
        return dh @ self.lora_A / self.scaling


@lora_bug("alpha/r forgotten in the whole backward", *LAYER_PROPERTIES)
class NoScalingInBackward(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ rows(h)

    def dh(self, dy, x, h):
        return dy @ self.lora_B


@lora_bug("alpha/r forgotten in the forward", *LAYER_PROPERTIES)
class NoScalingInForward(LoRA):
    def forward(self, x):
        h = x @ self.lora_A.T
        return h @ self.lora_B.T, (self, x, h)


@lora_bug("alpha/r forgotten in forward and backward alike", *LAYER_PROPERTIES)
class NoScalingAtAll(NoScalingInBackward):
    def forward(self, x):
        h = x @ self.lora_A.T
        return h @ self.lora_B.T, (self, x, h)


@lora_bug("alpha/r squared in dA", *LAYER_PROPERTIES)
class ScalingTwice(Wrong):
    def dA(self, dh, x):
        return rows(dh).T @ rows(x) * self.scaling


@lora_bug("alpha in place of alpha/r", *LAYER_PROPERTIES)
class AlphaForScaling(LoRA):
    @property
    def scaling(self):
        return self.alpha


@lora_bug("alpha divided by the root of r", *LAYER_PROPERTIES)
class RootForScaling(LoRA):
    @property
    def scaling(self):
        return self.alpha / self.rank**0.5


@lora_bug("dA and dB swapped", *LAYER_PROPERTIES)
class Swapped(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"lora_A": grads["lora_B"], "lora_B": grads["lora_A"]}


@lora_bug("dB transposed", *LAYER_PROPERTIES)
class TransposedB(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h).T


@lora_bug("dA transposed and put back into its shape", *LAYER_PROPERTIES)
class ReshapedA(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).T.reshape(self.lora_A.shape)


@lora_bug("dA with the opposite sign", *LAYER_PROPERTIES)
class MinusA(Wrong):
    def dA(self, dh, x):
        return -super().dA(dh, x)


@lora_bug("dA from the factor B of one output only", *LAYER_PROPERTIES)
class OneOutput(Wrong):
    def dh(self, dy, x, h):
        return dy[..., :1] @ self.lora_B[:1] * self.scaling


@lora_bug("dA from the sum of dy over outputs", *LAYER_PROPERTIES)
class SummedOutputs(Wrong):
    def dh(self, dy, x, h):
        return dy.sum(axis=-1, keepdims=True) * self.lora_B.mean(axis=0) * self.scaling


@lora_bug("dA of the first row only", *LAYER_PROPERTIES)
class FirstRow(Wrong):
    def dA(self, dh, x):
        return rows(dh)[:1].T @ rows(x)[:1]


@lora_bug("mean over rows in place of the sum, in dB", *LAYER_PROPERTIES)
class MeanOverRows(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) / len(rows(dy))


@lora_bug("the cached h taken again through A", *LAYER_PROPERTIES)
class HTwice(Wrong):
    def dB(self, dy, x, h):
        return rows(dy).T @ (rows(h) @ self.lora_A @ self.lora_A.T) * self.scaling


@lora_bug("one entry of dA off by a millionth", *LAYER_PROPERTIES)
class Millionth(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[-1, -1] += 1e-6
        return dA


@lora_bug("an entry of dA missing, as behind a mask", *LAYER_PROPERTIES)
class Masked(Wrong):
    def dA(self, dh, x):
        dA = super().dA(dh, x)
        dA[0, 0] = 0
        return dA


@lora_bug("gradients added up over calls", *LAYER_PROPERTIES)
class Accumulated(Wrong):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        self.total = {name: getattr(self, "total", {}).get(name, 0) + grad for name, grad in grads.items()}
        return dx, self.total


@lora_bug("gradient written into the caller's dy", *LAYER_PROPERTIES)
class ScalesDyInPlace(LoRA):
    def backward(self, dy, cache, *, need_dx=True):
        dy *= self.scaling
        _, x, h = cache
        dh = dy @ self.lora_B
        dx = dh @ self.lora_A if need_dx else None
        return dx, {"lora_A": rows(dh).T @ rows(x), "lora_B": rows(dy).T @ rows(h)}


@lora_bug("dA rounded to float32", *LAYER_PROPERTIES)
class Single(Wrong):
    def dA(self, dh, x):
        return super().dA(dh, x).astype(np.float32).astype(dh.dtype)


@lora_bug("float64 returned for float32", *LAYER_PROPERTIES)
class Promoted(Wrong):
    def dB(self, dy, x, h):
        return super().dB(dy, x, h) * np.float64(1)


@lora_bug("only the last of the leading axes summed", *LAYER_PROPERTIES)
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


def residual_form(self, x, R, *, c=None, dB=None, dH=None):
    A, B, s = self.lora_A, self.lora_B, self.scaling
    c = 2 * s / R.size if c is None else c(self, R)
    H = x @ A.T
    dH = c * (s * H @ (B.T @ B) - R @ B) if dH is None else dH(c, s, H, B, R)
    return {"lora_A": dH.T @ x, "lora_B": c * (s * B @ (H.T @ H) - R.T @ H) if dB is None else dB(c, s, H, B, R)}


def residual_bug(name: str, **wrong: Callable) -> None:
    def mse_gradients(self, x, R):
        return residual_form(self, x, R, **wrong)

    bug(name, residual_form_is_the_gradient_of_mse)(type("WrongResidual", (LoRA,), {"mse_gradients": mse_gradients}))


residual_bug("residual form: mean over rows only", c=lambda self, R: 2 * self.scaling / len(R))
residual_bug("residual form: 2 forgotten", c=lambda self, R: self.scaling / R.size)
residual_bug("residual form: alpha/r forgotten in front", c=lambda self, R: 2 / R.size)
residual_bug("residual form: alpha/r forgotten inside dB", dB=lambda c, s, H, B, R: c * (B @ (H.T @ H) - R.T @ H))
residual_bug("residual form: sign of the residual", dB=lambda c, s, H, B, R: c * (s * B @ (H.T @ H) + R.T @ H))
residual_bug("residual form: residual left out of dH", dH=lambda c, s, H, B, R: c * s * H @ (B.T @ B))
residual_bug("residual form: alpha/r forgotten inside dH", dH=lambda c, s, H, B, R: c * (H @ (B.T @ B) - R @ B))


# --- Linear and LoRALinear ------------------------------------------------------------------------


class WrongLinear(Linear):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return self.spoil(dx, grads, dy, cache[1])


@linear_bug("bias gradient is a mean", *LAYER_PROPERTIES)
class MeanBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {**grads, "bias": rows(dy).mean(axis=0)} if self.bias is not None else grads


@linear_bug("bias gradient forgotten", *LAYER_PROPERTIES)
class NoBias(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return dx, {"weight": grads["weight"]}


@linear_bug("bias left out of the forward", *LAYER_PROPERTIES)
class BiaslessForward(Linear):
    def forward(self, x):
        return x @ self.weight.T, (self, x)


@linear_bug("dx with the transposed weight", *LAYER_PROPERTIES)
class TransposedDx(Linear):
    def input_gradient(self, dy):
        return dy @ self.weight.T.reshape(self.weight.shape)


@linear_bug("the input handed back as its own gradient", *LAYER_PROPERTIES)
class InputForDx(WrongLinear):
    def spoil(self, dx, grads, dy, x):
        return x if dx is not None else None, grads


@lora_linear_bug("dx without the LoRA path", *LAYER_PROPERTIES)
class NoLoRAPath(LoRALinear):
    def backward(self, dy, cache, *, need_dx=True):
        _, grads = super().backward(dy, cache, need_dx=need_dx)
        return (self.base.input_gradient(dy) if need_dx else None), grads


@lora_linear_bug("dx without the base's path", *LAYER_PROPERTIES)
class NoBasePath(LoRALinear):
    def backward(self, dy, cache, *, need_dx=True):
        return self.adapter.backward(dy, cache[-1], need_dx=need_dx)


@lora_linear_bug("the adapter's output added twice", *LAYER_PROPERTIES)
class AdapterTwice(LoRALinear):
    def forward(self, x):
        update, cache = self.adapter.forward(x)
        return self.base(x) + 2 * update, (self, x, cache)


# --- the loss -------------------------------------------------------------------------------------


@bug("mse: gradient as of a mean over rows only", *MSE_PROPERTIES)
def mean_over_rows(p, t):
    return ((p - t) ** 2).mean(), 2 / len(p) * (p - t)


@bug("mse: 2 forgotten", *MSE_PROPERTIES)
def no_two(p, t):
    return ((p - t) ** 2).mean(), (p - t) / p.size


@bug("mse: target less prediction", *MSE_PROPERTIES)
def wrong_sign(p, t):
    return ((p - t) ** 2).mean(), 2 / p.size * (t - p)


@bug("mse: sum in loss and gradient alike", *MSE_PROPERTIES)
def summed(p, t):
    return ((p - t) ** 2).sum(), 2 * (p - t)


@bug("mse: half of it in loss and gradient alike", *MSE_PROPERTIES)
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


@bug("Adam: eps inside the root", *ADAM_PROPERTIES)
class EpsInside(WrongAdam):
    def move(self, m_hat, v_hat):
        return self.lr * m_hat / np.sqrt(v_hat + self.eps)


@bug("Adam: eps before the correction", *ADAM_PROPERTIES)
class EpsBeforeCorrection(WrongAdam):
    def corrected(self, m, v):
        m_hat, v_hat = super().corrected(m, v)
        return m_hat, (np.sqrt(v_hat) + self.eps / np.sqrt(1 - self.betas[1] ** self.t) - self.eps) ** 2


@bug("Adam: m = b1 m + (1 - b1 g)", *ADAM_PROPERTIES)
class Misplaced(WrongAdam):
    def moments(self, m, v, g):
        return self.betas[0] * m + (1 - self.betas[0] * g), super().moments(m, v, g)[1]


@bug("Adam: m = b1 + (1 - b1) g", *ADAM_PROPERTIES)
class ForgottenMean(WrongAdam):
    def moments(self, m, v, g):
        return self.betas[0] + (1 - self.betas[0]) * g, super().moments(m, v, g)[1]


@bug("Adam: no bias correction", *ADAM_PROPERTIES)
class Uncorrected(WrongAdam):
    def corrected(self, m, v):
        return m, v


@bug("Adam: no bias correction of v", *ADAM_PROPERTIES)
class HalfCorrected(WrongAdam):
    def corrected(self, m, v):
        return super().corrected(m, v)[0], v


@bug("Adam: bias correction with the step before", *ADAM_PROPERTIES)
class OneStepLate(WrongAdam):
    def corrected(self, m, v):
        t = max(1, self.t - 1)
        return m / (1 - self.betas[0] ** t), v / (1 - self.betas[1] ** t)


@bug("Adam: betas swapped", *ADAM_PROPERTIES)
class SwappedBetas(WrongAdam):
    def moments(self, m, v, g):
        beta2, beta1 = self.betas
        return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g


@bug("Adam: v from g in place of its square", *ADAM_PROPERTIES)
class NoSquare(WrongAdam):
    def moments(self, m, v, g):
        return super().moments(m, v, g)[0], self.betas[1] * v + (1 - self.betas[1]) * np.abs(g)


@bug("Adam: v in place of its root", *ADAM_PROPERTIES)
class NoRoot(WrongAdam):
    def move(self, m_hat, v_hat):
        return self.lr * m_hat / (v_hat + self.eps)


@bug("Adam: uphill", *ADAM_PROPERTIES)
class Uphill(WrongAdam):
    def move(self, m_hat, v_hat):
        return -super().move(m_hat, v_hat)


@bug("Adam: gradient added twice", *ADAM_PROPERTIES)
class Twice(WrongAdam):
    def moments(self, m, v, g):
        m, v = super().moments(m, v, g)
        return m + (1 - self.betas[0]) * g, v


@bug("Adam: t counted once for each array", *ADAM_PROPERTIES)
class CountsArrays(WrongAdam):
    def corrected(self, m, v):
        self.t += 1
        return super().corrected(m, v)


@bug("Adam: weight decay where none was asked for", *ADAM_PROPERTIES)
class Decay(WrongAdam):
    def step(self, grads):
        for p in self.params.values():
            p *= 1 - 0.01 * self.lr
        super().step(grads)


# --- and those that the start of LoRA hides -------------------------------------------------------


@lora_bug("dh doubled, and with it dA and dx", *LAYER_PROPERTIES)
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
