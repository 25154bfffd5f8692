"""How the step length changes while a training goes on: it grows at first, and falls towards the end.

Step t of T is taken with lr f_t, counted from 1. With a warmup of w steps, and u_t the part of the other steps that is
over before step t,

    u_t = max(0, t - 1 - w) / (T - w)                    (rate.1)
    f_t = min(1, t / w) d(u_t)                           (rate.2)    without a warmup, d(u_t)

    d(u) = 1                     constant
    d(u) = 1 - u                 linear                  (rate.3)
    d(u) = (1 + cos(pi u)) / 2   cosine                  (rate.4)

Why a warmup: Adam's first steps are as long as any other, and taken by a running mean of few gradients. Why a decay:
near a minimum, a step of the same length leaves it on the other side.

The functions of the same names in transformers have (t - 1) / w in the place of t / w, so that their first step has the
rate 0 and changes nothing; behind the warmup they are these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .checks import check_choice, check_integer

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The factor of each step's length, for ``train(..., schedule=Schedule("cosine", steps=100, warmup=10))``.

    An unknown decay, and a warmup that leaves no step of the whole length, are a ValueError.

    Parameters
    ----------
    decay : {"constant", "linear", "cosine"}
        What follows the warmup.
    steps : int
        Of the whole training, T: the steps of all epochs together.
    warmup : int
        Steps at the start in which the length grows, w.
    """

    decay: str
    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, DECAYS)
        check_integer("steps", self.steps, at_least=1)
        check_integer("warmup", self.warmup, at_least=0)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup} of {self.steps} steps, expected fewer: none has the whole rate")

    def __call__(self, t: int) -> float:
        """Return the factor of step t, from 1; behind the last step, of the last."""
        w, T = self.warmup, self.steps
        u = max(0, min(t, T) - 1 - w) / (T - w)  # eq. (rate.1)
        d = self.fall(u)
        return min(1.0, t / w) * d if w else d  # eq. (rate.2)

    def fall(self, u: float) -> float:
        """Return d(u): how much of the rate is left where a share u of the steps behind the warmup is over."""
        if self.decay == "linear":
            return 1 - u  # eq. (rate.3)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * u)) / 2  # eq. (rate.4)
        return 1.0
