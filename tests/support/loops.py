"""A layer's forward once more, one number at a time; and how an instance of it and such a forward make a `Case`.

`minilora.verify.instances` has the layers. `case_of` takes one of its rows by name, draws it for a problem, and builds
it again with other arrays in place of its own, of whatever precision a claim asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from minilora import Layer
from minilora.cli.check import all_instances
from minilora.conformance.problems import Problem
from minilora.layer import rebuild
from minilora.verify.instances import Drawing

from .claims import CLAIMS, Arrays, Case

ByLoops = Callable[[Any, Arrays, np.ndarray], np.ndarray]
"""by_loops(layer, arrays, x) returns the output. Of the layer it reads settings, such as a stride, and no array."""


@lru_cache(maxsize=64)  # each claim asks for the same instance several times
def drawn(row: str, problem: Problem) -> tuple[Layer, np.ndarray]:
    """Return a row of `all_instances` at a problem's sizes, and its input."""
    numbers = count()
    drawing = Drawing(
        *(problem.n, problem.in_features, problem.out_features, problem.rank, problem.alpha),
        randn=lambda *shape: problem.randn(f"{row} {next(numbers)}", *shape),
        rng=np.random.default_rng([problem.seed, 7]),
        bias=problem.bias,
    )
    return all_instances()[row](drawing)


def case_of(row: str, by_loops: ByLoops, claims: tuple = CLAIMS, *, x: Callable | None = None) -> Case:
    """Return the case of a row: what it is claimed to give is what `by_loops` gives; with `x`, for another input."""

    def arrays(problem: Problem) -> Arrays:
        return {name: array.copy() for name, array in drawn(row, problem)[0].trainable().items()}

    def build(problem: Problem, given: Arrays) -> Layer:
        layer, precision = drawn(row, problem)[0], np.result_type(*given.values()).type(0).real.dtype
        theirs = {id(array): given[name] for name, array in layer.trainable().items()}
        return rebuild(layer, array=lambda a: theirs[id(a)] if id(a) in theirs else a.astype(precision))

    def reference(problem: Problem, given: Arrays, x: np.ndarray) -> np.ndarray:
        return by_loops(drawn(row, problem)[0], given, x)

    return Case(row, arrays, build, reference, x or (lambda problem: drawn(row, problem)[1].copy()), claims)


class Beside(Layer):
    """x plus what a layer makes of ids: it has a dx, so that the claims, which move x, hold for layers of ids too."""

    def __init__(self, layer: Layer, ids: np.ndarray) -> None:
        self.layer, self.ids = layer, (ids,)

    def forward(self, x):
        update, cache = self.layer.forward(self.ids[0][: len(x)])
        y = x + update
        return y, (cache,)

    def backward(self, dy, cache, *, need_dx=True):
        none, grads = self.layer.backward(dy, *cache, need_dx=need_dx)
        assert none is None, "ids have a derivative"
        return (dy.copy() if need_dx else None), grads

    def trainable(self):
        return self.layer.trainable()


def linear_by_loops(p: Arrays, x: np.ndarray) -> np.ndarray:
    y = np.zeros((len(x), len(p["weight"])), x.dtype)
    for n, o in np.ndindex(y.shape):
        y[n, o] = p["bias"][o] if "bias" in p else 0.0
        for i in range(x.shape[1]):
            y[n, o] += x[n, i] * p["weight"][o, i]
    return y


def each(function):
    """A function of one Python number, for every entry of an array."""
    return np.vectorize(function, otypes=[float])


FUNCTIONS = {
    "relu": each(lambda x: max(x, 0.0)),
    "tanh": each(math.tanh),
    "silu": each(lambda x: x / (1 + math.exp(-x))),
}


def named(path: str, arrays: Arrays) -> Arrays:
    return {f"{path}.{name}": array for name, array in arrays.items()}


def child(path: str, arrays: Arrays) -> Arrays:
    start = f"{path}."
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
