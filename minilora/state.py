"""What training needs to resume: the state between two epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .layer import Layer
from .optim import Adam


@dataclass
class History:
    """The loss over the whole data set, or over what is held out, as training went on."""

    epochs: list[int] = field(default_factory=list)  # after which the loss was measured, counted from 1
    losses: list[float] = field(default_factory=list)  # the loss measured after each of them

    def add(self, epoch: int, loss: float) -> None:
        """Note the loss after an epoch."""
        self.epochs.append(epoch)
        self.losses.append(loss)


@dataclass
class TrainingState:
    """Everything that the next epoch depends on, besides the data."""

    model: Layer  # its trainable arrays are the optimizer's
    optimizer: Adam  # with its running means and its count of steps
    rng: np.random.Generator  # draws the batches
    history: History = field(default_factory=History)  # the losses so far
    epoch: int = 0  # the number of epochs done; with `max_steps`, of steps
    steps_of_epoch: int = 1  # an epoch's number of steps
    unit: str = "epoch"  # what `epoch` and the history count; "step" with `max_steps`

    @property
    def now(self) -> tuple[int, int]:
        """The epoch and the step that were the last, both counted from 1, the step over all epochs."""
        return -(-self.optimizer.t // self.steps_of_epoch), self.optimizer.t


@runtime_checkable
class Keeper(Protocol):
    """What keeps a training's state between two epochs, as `minilora.files.checkpoint.Checkpoint` does."""

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put a training of `epochs` epochs where it was left, or keep its start. What does not fit is refused."""

    def keep(self, state: TrainingState) -> None:
        """Keep where a training stands after an epoch."""
