"""The suite's formulas as a layer and as an optimizer of this library, for a known bug to be planted in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import Adam, Layer
from minilora.conformance.problems import Problem
from minilora.conformance.problems.formulas import AdamFormulas
from minilora.conformance.problems.images import Ids, Images
from minilora.conformance.problems.kinds import SETS
from minilora.conformance.problems.lowprecision import FourBits
from minilora.conformance.problems.several import Fused, Stacks
from minilora.layer import rows


def problem_of(kind, arrays, alpha, **steps):
    """The sizes of arrays that were handed over."""
    if kind == "nf4":
        return four_bits_of(arrays, alpha)
    if kind == "fused":
        return fused_of(arrays, alpha, **steps)
    if kind == "experts":
        return experts_of(arrays, alpha, **steps)
    weight, A = arrays["weight"], arrays["lora_A"]
    sizes = {"n": len(arrays["x"]), "rank": len(A), "alpha": alpha, "bias": "bias" in arrays}
    if kind == "embedding":
        return Ids(in_features=weight.shape[0], out_features=weight.shape[1], **sizes)
    if kind.startswith("conv"):
        plain = {"stride": 1, "padding": 0, "dilation": 1}
        steps = {"groups": 1} | {name: (value,) * (A.ndim - 2) for name, value in plain.items()} | steps
        place = {"kernel": A.shape[2:], "sizes": arrays["x"].shape[2:]}
        return Images(in_features=A.shape[1], out_features=len(weight), **sizes, **place, **steps)
    return Problem(in_features=weight.shape[1], out_features=weight.shape[0], **sizes)


def fused_of(arrays, alpha, widths, ranks):
    """The slots of arrays that were handed over: alpha is that of each slot."""
    first = next(a for a in alpha if a)
    one = len({a for a in alpha if a}) == 1
    sizes = {"bias": "bias" in arrays, "alpha": first, "one_rank": one}
    return Fused.of(len(arrays["x"]), arrays["x"].shape[1], tuple(widths), tuple(ranks), **sizes)


def experts_of(arrays, alpha, expert_ids):
    """The experts of arrays that were handed over."""

    class Given(Stacks):
        expert_ids = None  # those of the arrays

    Given.expert_ids = expert_ids
    E, out, width = arrays["weight"].shape
    return Given(len(arrays["x"]), width, out, len(arrays["lora_A"]) // E, alpha, experts=E)


def four_bits_of(arrays, alpha):
    """The problem of the suite whose codes were handed over: a bug of the weight asks for its codes again."""
    A, B = arrays["lora_A"], arrays["lora_B"]
    sizes = {"in_features": A.shape[1], "out_features": len(B), "n": len(arrays["x"]), "rank": len(A), "alpha": alpha}
    tried = (
        FourBits(**sizes, bias="bias" in arrays, seed=seed, double="nested_absmax" in arrays) for seed in range(40)
    )
    return next(one for one in tried if np.array_equal(one.full["packed"], arrays["packed"]))


def answers_of(kind, parts, alpha, arrays, **steps):
    """What a kind's formulas give with some parts replaced; parts are a dict, or a function of the problem."""
    problem = problem_of(kind, arrays, alpha, **steps)
    arrays = {"dy": np.zeros_like(problem.dy), **arrays}
    parts = parts(problem) if callable(parts) else parts
    return problem.answer(SETS[kind].formulas.with_parts(**parts), problem.flatten(arrays))


def by_formulas(kind: str, parts: Any = None) -> type[Layer]:
    """A layer beside its adapter, as `LoRALinear`, `DoRA` and `Rewritten` are, that computes by a kind's formulas."""

    on_rows = kind not in ("embedding", "conv1d", "conv2d")
    flat = rows if on_rows else lambda array: array

    class ByFormulas(Layer):
        norm = None  # DoRA's, in a subclass that holds it

        def __init__(self, base, adapter):
            self.base, self.adapter = base, adapter

        def answers(self, x, **dy):
            weight, A, B = self.base.weight, self.adapter.lora_A, self.adapter.lora_B
            arrays = {"x": x, "weight": weight, "lora_A": A, "lora_B": B, **dy}
            found, alpha, steps = parts or {}, self.adapter.alpha, {}
            if getattr(self.base, "bias", None) is not None:
                arrays["bias"] = self.base.bias
            if kind.startswith("conv"):
                arrays["lora_A"] = A.reshape(len(A), *weight.shape[1:])
                arrays["lora_B"] = B.reshape(*B.shape, *(1 for _ in weight.shape[2:]))
                steps = self.steps()
            if kind.startswith("dora"):
                arrays["magnitude"] = self.adapter.magnitude
            if kind == "rslora":  # the adapter's alpha is that of alpha / r
                alpha = alpha / len(A) ** 0.5
            if self.norm:
                found = {"length": lambda W, BA, s: self.norm()[:, None], **found}
            return answers_of(kind, found, alpha, arrays, **steps)

        def steps(self):
            return {name: getattr(self.base, name) for name in ("stride", "padding", "dilation")}

        def forward(self, x):
            y = self.answers(flat(x))["y"]
            y = y.reshape(*x.shape[:-1], y.shape[-1]) if on_rows else y
            return y, (self, y.shape, x)

        def backward(self, dy, cache, *, need_dx=True):
            *_, x = cache
            found = self.answers(flat(x), dy=flat(dy))
            dx = found["x"].reshape(x.shape) if need_dx and "x" in found else None
            return dx, {name: found[name].reshape(p.shape) for name, p in self.trainable().items() if name in found}

        def merge(self):
            weight, steps = self.base.weight, self.steps() if kind.startswith("conv") else {}
            sizes = (d * k for d, k in zip(steps.get("dilation", ()), weight.shape[2:], strict=True))
            merged = self.answers(np.zeros((1, weight.shape[1], *sizes)))["merged"]
            return type(self.base)(merged, self.base.bias, **steps)

        def trainable(self):
            return self.adapter.trainable()

    return ByFormulas


class AdamByFormulas(Adam):
    """Adam, step by step through the suite's formulas."""

    formulas = AdamFormulas()

    def step(self, grads):
        self.t += 1
        for name in self.params:
            self.move(name, grads[name])

    def move(self, name, g):
        p, m, v = self.params[name], self.m[name], self.v[name]
        settings = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        p[...], self.m[name], self.v[name] = self.formulas.after(p, m, v, g, self.t, **settings)


def adam_by_formulas(**parts: Any) -> type[AdamByFormulas]:
    """Adam with some parts replaced."""
    return type("WrongAdam", (AdamByFormulas,), {"formulas": AdamFormulas(**parts)})
