"""What a fine-tuning will take: memory, held against what the machine has, and time.

Both are measured on one window and on two. What a step keeps grows by the same number of bytes with each window.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from ..backend import Backend
from ..checks import Array
from ..evaluation import EVALUATION_ROWS
from ..guards.machine import memory
from ..layer import cache_bytes, parameter_bytes

STEP = 2.5
"""A step's time as a multiple of its forward's: backward finds dx where the forward finds y, and dA, dB besides."""
ROOM = 0.9
"""Of the free memory, what a training may fill: arrays that live shortly come on top."""


@dataclass(frozen=True)
class Costs:
    """Of training a model on windows of one length: bytes, and seconds."""

    weights: int
    state: int  # Adam's two means of what trains, and the gradients
    kept: tuple[int, int]  # for the backward, of one window and of each further one
    logits: int  # of a window: the largest array besides
    forward: float  # seconds, of a window
    measured: int  # windows at a time of which the held-out loss is computed

    def activations(self, windows: int) -> int:
        """Return the bytes that the backward of so many windows needs."""
        first, further = self.kept
        return first + (windows - 1) * further

    def step(self, windows: int) -> float:
        """Return the seconds that a step of so many windows takes, very roughly."""
        return STEP * self.forward * windows

    def measuring(self, windows: int) -> float:
        """Return the seconds that measuring the loss of so many windows takes, very roughly."""
        return self.forward * windows

    def at_once(self, windows: int) -> int:
        """Return the most windows that exist at a time, where a step has so many: measuring the loss has more, maybe.

        A forward makes its caches whether a backward follows or not.
        """
        return max(windows, self.measured)

    def together(self, windows: int) -> int:
        """Return the bytes of all there is, where a step has so many windows at a time."""
        most = self.at_once(windows)
        return self.weights + self.state + self.activations(most) + most * self.logits


def costs_of(model: Any, X: Array, where: Backend, threads: int, held_out: int) -> Costs:
    """Return what training on windows such as those of X costs, from a forward of one and a forward of two.

    `held_out` is the number of windows that the loss is measured on, on so many threads.
    """
    kept, seconds = [], math.inf
    for windows in (1, 2):
        x = X[:windows]
        start = time.perf_counter()
        logits, cache = model.forward(x)
        where.synchronize()
        seconds = min(seconds, (time.perf_counter() - start) / len(x))
        kept.append(cache_bytes(cache))
        del cache
    return Costs(
        weights=parameter_bytes(model),
        state=3 * sum(array.nbytes for array in model.trainable().values()),
        kept=(kept[0], kept[1] - kept[0]),
        logits=logits.nbytes // len(x),
        forward=seconds,
        measured=min(held_out, threads * max(1, EVALUATION_ROWS // X.shape[1])),
    )


def held_against(costs: Costs, where: Backend, rows: int, workers: int) -> tuple[str, str]:
    """Return the line that holds the memory against the machine's; and where it does not fit, what would.

    `rows` is the number of windows of a part of the batch, and `workers` how many parts are computed at a time.

    Raises
    ------
    ValueError
        If the machine has less in all: the system would end the process in the first step.
    """
    windows = costs.at_once(rows * workers)
    needed, there = costs.together(rows * workers), memory(where)
    line = (
        f"with weights {number(costs.weights)}, Adam and gradients {number(costs.state)}, "
        f"logits {number(windows * costs.logits)}: {megabytes(needed)} together"
    )
    if there is None:
        return line, ""
    free = there.free + costs.weights  # which are taken already
    line += f"; {number(free)} of {megabytes(there.whole)} are free"
    room = ROOM * free
    if needed <= room:
        return line, ""
    fitting = [n for n in range(1, rows) if costs.together(n * workers) <= room]
    hint = (
        f"--micro-batch {fitting[-1]} fits, and takes the same steps"
        if fitting
        else f"not even --micro-batch 1 fits; {'--workers 1' if workers > 1 else 'a smaller --length'} needs less"
    )
    if needed > there.whole:
        raise ValueError(f"the training needs {megabytes(needed)} and the machine has {megabytes(there.whole)}: {hint}")
    return line, f"the training needs {megabytes(needed)} of the {megabytes(free)} that are free: {hint}"


def megabytes(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{number(count)} MB"


def number(count: int) -> str:
    """Return bytes in MB."""
    return f"{count / 1e6:,.1f}"
