"""What a fine-tuning will take: memory, held against what the machine has, and time.

Both are measured on one window and on two. What a step keeps grows by the same number of bytes with each window.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from ...backend import Backend
from ...checks import Array
from ...evaluation import EVALUATION_ROWS
from ...guards.machinememory import Memory, memory
from ..trainingmemory import cache_bytes, parameter_bytes

STEP = 2.5
"""A step's time as a multiple of its forward's: backward finds dx where the forward finds y, and dA, dB besides."""
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
    measured: int  # windows at a time of which the held-out loss is computed

    def activations(self, windows: int) -> int:
        """Return the bytes that the backward of so many windows needs."""
        first, further = self.caches
        return first + (windows - 1) * further

    def step(self, windows: int) -> float:
        """Return the seconds that a step of so many windows takes, very roughly."""
        return STEP * self.forward * windows

    def measuring(self, windows: int) -> float:
        """Return the seconds that measuring the loss of so many windows takes, very roughly."""
        return self.forward * windows

    def all_logits(self, windows: int) -> int:
        """Return the bytes of the most logits there are, where a step has so many windows at a time.

        Measuring the loss may have more windows than a step. It needs nothing else: no layer's cache outlives it.
        """
        return max(windows, self.measured) * self.logits

    def together(self, windows: int) -> int:
        """Return the bytes of all there is, where a step has so many windows at a time."""
        return self.weights + self.state + self.activations(windows) + self.all_logits(windows)


def costs_of(model: Any, X: Array, where: Backend, threads: int, held_out: int, windows: int = 2) -> Costs:
    """Return what training on windows such as those of X costs, from a forward of one and a forward of two.

    `held_out` is the number of windows that the loss is measured on, on so many threads; `windows` how many a step has
    at a time. Where that is one, one is all that is ever computed.
    """
    sizes, seconds = [], math.inf
    for count in (1, 2)[:windows]:
        x = X[:count]
        start = time.perf_counter()
        logits, cache = model.forward(x)
        where.synchronize()
        seconds = min(seconds, (time.perf_counter() - start) / len(x))
        sizes.append(cache_bytes(cache))
        del cache
    return Costs(
        weights=parameter_bytes(model),
        state=3 * sum(array.nbytes for array in model.trainable().values()),
        caches=(sizes[0], sizes[1] - sizes[0] if windows > 1 else sizes[0]),
        logits=logits.nbytes // len(x),
        forward=seconds,
        measured=min(held_out, threads * max(1, EVALUATION_ROWS // X.shape[1])),
    )


@dataclass(frozen=True)
class Fit:
    """A fine-tuning's memory beside the machine's, in bytes."""

    needed: int  # weights, state, activations and logits together
    machine: Memory | None  # None where the system does not say; what is free has room for the weights again
    micro_batch: int  # the largest part of a batch that fits, where the one asked for does not; 0 where none does

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.machine is None or self.needed <= ROOM * self.machine.free


def fit(costs: Costs, where: Backend, rows: int, workers: int) -> Fit:
    """Hold the memory against the machine's: of parts of `rows` windows, `workers` of them at a time."""
    needed, machine = costs.together(rows * workers), memory(where)
    if machine is None:
        return Fit(needed, None, 0)
    machine = Memory(machine.whole, machine.free + costs.weights)  # which are taken already
    smaller = [n for n in range(1, rows) if costs.together(n * workers) <= ROOM * machine.free]
    return Fit(needed, machine, smaller[-1] if smaller else 0)
