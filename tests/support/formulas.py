"""The suite's formulas as a layer and as an optimizer of this library, for a known bug to be planted in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import Adam, LoRALinear
from minilora.conformance.problems import Problem
from minilora.conformance.problems.formulas import RIGHT_FORMULAS, AdamFormulas
from minilora.layer import rows


def by_formulas(parts: Any) -> type[LoRALinear]:
    """A layer beside its adapter with some parts of the formulas replaced: a dict, or a function of the problem."""

    class ByFormulas(LoRALinear):
        def answers(self, x, dy):
            layer = {"weight": self.base.weight, "lora_A": self.adapter.lora_A, "lora_B": self.adapter.lora_B}
            layer |= {} if self.base.bias is None else {"bias": self.base.bias}
            problem = Problem(len(x), self.base.in_features, self.base.out_features, self.adapter.rank)
            formulas = RIGHT_FORMULAS.with_parts(**parts(problem) if callable(parts) else parts)
            return formulas.answers({"x": x, "dy": dy, **layer}, self.adapter.alpha)

        def forward(self, x):
            y = self.answers(rows(x), np.zeros((rows(x).shape[0], self.base.out_features)))["y"]
            return y.reshape(*x.shape[:-1], y.shape[-1]), (x,)

        def backward(self, dy, cache, *, need_dx=True):
            (x,) = cache
            found = self.answers(rows(x), rows(dy))
            grads = {name: found[name] for name in self.trainable()}
            return (found["x"].reshape(x.shape) if need_dx else None), grads

        def merge(self):
            found = self.answers(np.zeros((1, self.base.in_features)), np.zeros((1, self.base.out_features)))
            bias = self.base.bias
            return type(self.base)(found["merged"], None if bias is None else bias.copy())

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
