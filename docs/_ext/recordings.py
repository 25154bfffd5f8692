"""What the laboratory's trainings say together: the loss at each rate, over the seeds that were tried."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean
from typing import Any

SEEDS = (0, 1, 2)


class Recordings:
    """The trainings of docs/recordings/laboratory.json, asked by way, rank and length of the text."""

    def __init__(self, laboratory: dict[str, Any]) -> None:
        self.before, self.points = laboratory["before"], laboratory["trainings"]
        shares = sorted({point["run"]["share"] for point in self.points})
        self.share_of = {round(share * laboratory["windows"]): share for share in shares}
        self.windows = list(self.share_of)

    def seeds(
        self, way: str, rank: int | None = None, *, windows: int = 956, what: str = "new", **settings: Any
    ) -> dict[float, list]:
        """Return the held-out losses at each rate, one for each seed; of trainings that stayed finite.

        `what` names another loss: "seen", of windows that were trained on, or "old", of the untouched model's own text.
        """
        wanted = {"way": way, "rank": rank, "share": self.share_of[windows], "scaling": 2.0, "batch": 16} | settings
        losses: dict[float, list] = {}
        for point in self.points:
            of, loss = point["run"], point["result"][what]
            if wanted.items() <= of.items() and of["seed"] in SEEDS and loss is not None:
                losses.setdefault(of["lr"], []).append(loss)
        return dict(sorted(losses.items()))

    def losses(self, way: str, rank: int | None = None, **settings: Any) -> dict[float, float]:
        """Return the mean held-out loss at each rate."""
        return {lr: fmean(of) for lr, of in self.seeds(way, rank, **settings).items()}

    def best(self, way: str, rank: int | None = None, **settings: Any) -> float:
        """Return the rate with the least mean loss."""
        losses = self.losses(way, rank, **settings)
        return min(losses, key=losses.__getitem__)

    def gain(self, rank: int, *, windows: int = 956) -> float:
        """Return LoRA's gain as a part of full fine-tuning's: how far the loss falls, each at its own best rate."""
        ends = [min(self.losses(*way, windows=windows).values()) for way in (("LoRA", rank), ("full",))]
        return (self.before["new"] - ends[0]) / (self.before["new"] - ends[1])

    def forgotten(self, way: str, rank: int | None = None, *, windows: int = 956) -> float:
        """Return what is forgotten at the best rate: the divergence from the untouched model, nats a token."""
        old = self.losses(way, rank, windows=windows, what="old")
        return old[self.best(way, rank, windows=windows)] - self.before["old"]

    def forgotten_in_full(self, loss: float, *, windows: int = 956) -> float:
        """Return what full fine-tuning has forgotten where it reaches a held-out loss, at a rate up to its best.

        Between two rates it lies on the line through them. Where the smallest rate ends lower, it is that rate's.
        """
        new, old = (self.losses("full", windows=windows, what=what) for what in ("new", "old"))
        points = [(new[lr], old[lr] - self.before["old"]) for lr in new if lr <= self.best("full", windows=windows)]
        for (high, less), (low, more) in pairwise(points):
            if low <= loss <= high:
                return less + (high - loss) / (high - low) * (more - less)
        return points[0][1]

    def near(self, way: str, rank: int | None = None, **settings: Any) -> list[float]:
        """Return the rates that the seeds cannot tell from the best: within two standard errors of a difference."""
        losses = self.losses(way, rank, **settings)
        counts = {lr: len(of) for lr, of in self.seeds(way, rank, **settings).items()}
        best = self.best(way, rank, **settings)
        return [
            lr
            for lr, loss in losses.items()
            if loss - losses[best] <= 2 * self.spread * math.sqrt(1 / counts[lr] + 1 / counts[best])
        ]

    @property
    def spread(self) -> float:
        """How far one training's loss lies from the mean over seeds: the standard deviation, pooled over settings."""
        groups: dict[str, list] = {}
        for point in self.points:
            if point["run"]["seed"] in SEEDS and point["result"]["new"] is not None:
                key = str({name: value for name, value in point["run"].items() if name != "seed"})
                groups.setdefault(key, []).append(point["result"]["new"])
        squares = [(loss - fmean(of)) ** 2 for of in groups.values() for loss in of]
        return math.sqrt(sum(squares) / sum(len(of) - 1 for of in groups.values()))
