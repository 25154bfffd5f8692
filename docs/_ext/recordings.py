"""The laboratory's trainings, combined: the loss at each learning rate, over the seeds that were tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

SEEDS = (0, 1, 2)
RULES: dict[str, Callable[[int], float]] = {
    "alpha/r": lambda rank: 8 / rank,
    "alpha/sqrt(r)": lambda rank: round(4 / math.sqrt(rank), 6),
    "alpha = 2r": lambda rank: 2.0,
}
"""Three rules for the scaling s by the rank: alpha = 8, alpha = 4, alpha = 2r. At rank 4 each gives 2."""


class Recordings:
    """The trainings of laboratory.json, selected by method, rank, scaling and length of the text.

    By default, the scaling s is 2, as with alpha = 2r, and a batch has 16 windows.
    """

    def __init__(self, laboratory: dict[str, Any]) -> None:
        self.before, self.points = laboratory["before"], laboratory["trainings"]
        self.moments = laboratory.get("moments", [])
        """The steps at which the training with 16 windows a batch was evaluated on the windows that choose the rate."""
        self.chooses = "choice" if "choice" in self.before else "new"
        """The loss that chooses a rate: on separate windows that do not report a loss, if the recording has such."""
        shares = sorted({point["run"]["share"] for point in self.points})
        self.share_of = {round(share * laboratory["windows"]): share for share in shares}
        self.windows = list(self.share_of)

    def seeds(
        self,
        way: str,
        rank: int | None = None,
        *,
        windows: int = 956,
        what: str = "new",
        among: Sequence[int] = SEEDS,
        **settings: Any,
    ) -> dict[float, list]:
        """Return the held-out losses at each rate, one for each seed, of trainings that stayed finite.

        `what` selects another loss: "seen", on training windows, or "old", on the untouched model's own text.
        `among` restricts the seeds, for comparisons with trainings of fewer seeds.
        """
        losses: dict[float, list] = {}
        for of, result in self.trainings(way, rank, windows=windows, **settings):
            if of["seed"] in among and result[what] is not None:
                losses.setdefault(of["lr"], []).append(result[what])
        return dict(sorted(losses.items()))

    def trainings(
        self, way: str, rank: int | None = None, *, windows: int = 956, **settings: Any
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield the settings and the result of each training; nothing for a text length without trainings."""
        share = self.share_of.get(windows)
        wanted = {"way": way, "rank": rank, "share": share, "scaling": 2.0, "batch": 16} | settings
        for point in self.points:
            if wanted.items() <= point["run"].items():
                yield point["run"], point["result"]

    def losses(self, way: str, rank: int | None = None, **settings: Any) -> dict[float, float]:
        """Return the mean held-out loss at each rate."""
        return {lr: fmean(of) for lr, of in self.seeds(way, rank, **settings).items()}

    def best(self, way: str, rank: int | None = None, **settings: Any) -> float:
        """Return the rate with the lowest mean loss, on the windows that choose a rate if there are any."""
        losses = self.losses(way, rank, **settings, what=self.chooses)
        return min(losses, key=losses.__getitem__)

    def least(self, way: str, rank: int | None = None, **settings: Any) -> float:
        """Return the mean loss at the best rate."""
        return self.losses(way, rank, **settings)[self.best(way, rank, **settings)]

    def tried(self, way: str, rank: int | None = None, **settings: Any) -> int:
        """Return the smallest number of seeds at the best rate or a neighbour; 0 while the search is unfinished."""
        counts = {lr: len(of) for lr, of in self.seeds(way, rank, what=self.chooses, **settings).items()}
        best = self.best(way, rank, **settings) if counts else math.nan
        return min(counts.get(lr, 0) for lr in (best / 2, best, best * 2))

    def gain(self, rank: int, *, windows: int = 956, **settings: Any) -> float:
        """Return LoRA's gain as a share of full fine-tuning's: the fall of the loss, each at its own best rate."""
        ends = self.least("LoRA", rank, windows=windows, **settings), self.least("full", windows=windows)
        return (self.before["new"] - ends[0]) / (self.before["new"] - ends[1])

    def lost(self, way: str, rank: int | None = None, **settings: Any) -> dict[float, float]:
        """Return, by multiples of the best rate, the share of the best rate's gain that another rate loses."""
        losses, rate = self.losses(way, rank, **settings), self.best(way, rank, **settings)
        gain = self.before["new"] - losses[rate]
        return {lr / rate: (loss - losses[rate]) / gain for lr, loss in losses.items()}

    def breaks(self, way: str, rank: int | None = None, **settings: Any) -> float | None:
        """Return the lowest rate above the best that loses more than half the gain; None if there is none."""
        best = self.best(way, rank, **settings)
        lost = self.lost(way, rank, **settings)
        return min((times * best for times, part in lost.items() if times > 1 and part > 1 / 2), default=None)

    def forgotten(self, way: str, rank: int | None = None, *, windows: int = 956) -> float:
        """Return what is forgotten at the best rate: the divergence from the untouched model, in nats per token."""
        old = self.losses(way, rank, windows=windows, what="old")
        return old[self.best(way, rank, windows=windows)] - self.before["old"]

    def forgotten_in_full(self, loss: float, *, windows: int = 956) -> float:
        """Return what full fine-tuning at its best rate has forgotten once the loss that chooses it reaches `loss`.

        This interpolates linearly between two measured steps, and averages over the seeds.
        """
        found = []
        for _, of in self.trainings("full", windows=windows, lr=self.best("full", windows=windows)):
            forgotten = [0.0, *(old - self.before["old"] for old in of["olds"])]
            found.append(_reached(zip([self.before["choice"], *of["losses"]], forgotten, strict=True), loss))
        return fmean(found)

    @property
    def spread(self) -> float:
        """The deviation of one training's loss from the mean over seeds: the standard deviation, pooled over settings.

        NaN while no setting has two seeds.
        """
        groups: dict[str, list] = {}
        for point in self.points:
            loss = point["result"][self.chooses]
            if point["run"]["seed"] in SEEDS and loss is not None:
                key = str({name: value for name, value in point["run"].items() if name != "seed"})
                groups.setdefault(key, []).append(loss)
        squares = [(loss - fmean(of)) ** 2 for of in groups.values() for loss in of]
        free = sum(len(of) - 1 for of in groups.values())
        return math.sqrt(sum(squares) / free) if free else math.nan


def _reached(path: Iterable[tuple[float, float]], loss: float) -> float:
    """Return what is forgotten at the point where the loss of a path reaches `loss`, by linear interpolation."""
    for (high, less), (low, more) in pairwise(path):
        if low <= loss <= high:
            return less + (high - loss) / (high - low) * (more - less)
    raise ValueError(f"the loss never falls to {loss}")
