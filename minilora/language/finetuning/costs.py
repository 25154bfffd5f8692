"""What a fine-tuning will take: memory, held against what the machine has, and time.

Both are measured on one window and on two, and on short ones alone: a forward of long windows would take as long, and
as much memory, as what it is to foretell. What a step keeps grows by the same number of bytes with each window. With
the length T of a window it grows as a + b T + c T^2 where attention keeps its T x T matrix, so that three lengths tell
it for all up to a page (`minilora.fast.blockwise`). Beyond, it grows as a + b T, which two lengths tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ...backend import Backend
from ...checks import Array
from ...evaluation import EVALUATION_ROWS
from ...fast.blockwise import CPU, GPU
from ...guards.machinememory import Memory
from ..trainingmemory import cache_bytes, parameter_bytes

STEP = 2.5
"""A step's time as a multiple of its forward's: backward finds dx where the forward finds y, and dA, dB besides."""
WHOLE = (16, 48)
"""Tokens of windows that are measured, besides a page and longer ones."""
ROOM = 0.9
"""Of the free memory, what a training may fill: arrays that live shortly come on top."""


@dataclass(frozen=True)
class Costs:
    """Of training a model on windows of one length: bytes, and seconds."""

    weights: int
    state: int  # Adam's two means of what trains, and the gradients
    caches: tuple[int, int]  # for the backward, of one window and of each further one
    logits: int  # of a window: the largest array besides
    forward: float  # seconds, of a window
    measured: float  # windows at a time of which the held-out loss is computed; of another length, as many as long

    def activations(self, windows: int) -> int:
        """Return the bytes that the backward of so many windows needs."""
        first, further = self.caches
        return first + (windows - 1) * further

    def step(self, windows: int) -> float:
        """Return the seconds that a step of so many windows takes, very roughly."""
        return STEP * self.forward * windows

    def measuring(self, windows: float) -> float:
        """Return the seconds that measuring the loss of so many windows takes, very roughly."""
        return self.forward * windows

    def all_logits(self, windows: int) -> int:
        """Return the bytes of the most logits there are, where a step has so many windows at a time.

        Measuring the loss may have more windows than a step. It needs nothing else: no layer's cache outlives it.
        """
        return math.ceil(max(windows, self.measured) * self.logits)

    def together(self, windows: int) -> int:
        """Return the bytes of all there is, where a step has so many windows at a time."""
        return self.weights + self.state + self.activations(windows) + self.all_logits(windows)


@dataclass(frozen=True)
class Measured:
    """What a model keeps of short windows, from which follows what it keeps of longer ones."""

    weights: int
    state: int
    page: int  # tokens up to which attention keeps all of its matrix
    lengths: Sequence[int]  # of the windows
    caches: Sequence[Sequence[int]]  # bytes of one window of each length; and of two, where there are so many
    logits: int  # bytes of a position
    forward: float  # seconds of a position

    def at(self, length: int, threads: int, held_out: int, held_length: int | None = None) -> Costs:
        """Return the costs of windows of a length, where so many are held out and measured on so many threads.

        `held_length` is the length of these, where it is another one.
        """
        width = length if held_length is None else held_length
        points = [i for i, measured in enumerate(self.lengths) if (measured > self.page) == (length > self.page)]
        lengths = [self.lengths[i] for i in points]
        first, *both = (through(lengths, [sizes[i] for i in points], length) for sizes in self.caches)
        return Costs(
            weights=self.weights,
            state=self.state,
            caches=(first, both[0] - first if both else first),
            logits=self.logits * length,
            forward=self.forward * length,
            measured=min(held_out, threads * max(1, EVALUATION_ROWS // width)) * width / length,
        )


def measure(model: Any, X: Array, where: Backend) -> Measured:
    """Measure a forward of one and of two windows such as those of X, no longer than 1.5 pages of attention."""
    longest, page = X.shape[1], (CPU if where.name == "numpy" else GPU).page_up_to
    lengths = sorted({min(longest, length) for length in (*WHOLE, page, page + 1, page + page // 2)})
    caches, seconds = [], math.inf
    for count in (1, 2)[: len(X)]:
        sizes = []
        for length in lengths:
            x = X[:count, :length]
            start = time.perf_counter()
            logits, cache = model.forward(x)
            where.synchronize()
            took = (time.perf_counter() - start) / x.size
            sizes.append(cache_bytes(cache))
            del cache
        seconds = min(seconds, took)  # of the longest
        caches.append(sizes)
    state = 3 * sum(array.nbytes for array in model.trainable().values())
    return Measured(parameter_bytes(model), state, page, lengths, caches, logits.nbytes // x.size, seconds)


def through(points: Sequence[int], values: Sequence[int], at: int) -> int:
    """Return the value at a point of the polynomial through some values, by Lagrange's formula, without rounding."""
    total = Fraction(0)
    for i, value in enumerate(values):
        others = [point for j, point in enumerate(points) if j != i]
        total += value * math.prod((Fraction(at - point, points[i] - point) for point in others), start=Fraction(1))
    return math.ceil(total)


@dataclass(frozen=True)
class Fit:
    """A fine-tuning's memory beside the machine's, in bytes."""

    needed: int  # weights, state, activations and logits together
    machine: Memory | None  # before the model was loaded; None where the system does not say
    micro_batch: int  # the largest part of a batch that fits, where the one asked for does not; 0 where none does

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.machine is None or self.needed <= ROOM * self.machine.free


def fit(costs: Costs, machine: Memory | None, rows: int, workers: int) -> Fit:
    """Hold the memory against the machine's: of parts of `rows` windows, `workers` of them at a time.

    The machine's memory is that before the model was loaded: a process keeps memory that it has used and will use
    again, which would count as taken later.
    """
    needed = costs.together(rows * workers)
    if machine is None:
        return Fit(needed, None, 0)
    smaller = [n for n in range(1, rows) if costs.together(n * workers) <= ROOM * machine.free]
    return Fit(needed, machine, smaller[-1] if smaller else 0)


def longest_that_fits(measured: Measured, machine: Memory | None, longest: int, threads: int, held_out: int) -> int:
    """Return the largest length up to `longest` of which a window fits on each thread, or 1 where none does."""
    low, high = 1, longest  # the answer lies between them
    while machine is not None and low < high:
        middle = (low + high + 1) // 2
        if measured.at(middle, threads, held_out).together(threads) <= ROOM * machine.free:
            low = middle
        else:
            high = middle - 1
    return high
