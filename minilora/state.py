"""The state of a training between two epochs, which is all that it needs to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .layer import Layer
from .optim import Adam


@dataclass
class History:
    """The losses over the whole data set, or over the held-out data, during training."""

    epochs: list[int] = field(default_factory=list)  # the epochs after which the loss was measured, counted from 1
    losses: list[float] = field(default_factory=list)  # the losses after these epochs

    def add(self, epoch: int, loss: float) -> None:
        """Record the loss after an epoch."""
        self.epochs.append(epoch)
        self.losses.append(loss)


@dataclass
class TrainingState:
    """Everything that the next epoch depends on, except the data."""

    model: Layer  # its trainable arrays are the optimizer's
    optimizer: Adam  # with its moments and its step count
    rng: np.random.Generator  # draws the batches
    history: History = field(default_factory=History)  # the losses so far
    epoch: int = 0  # the number of completed epochs, or with `max_steps` of steps
    steps_of_epoch: int = 1  # the number of steps in an epoch
    unit: str = "epoch"  # what `epoch` and the history count; "step" with `max_steps`

    @property
    def now(self) -> tuple[int, int]:
        """The last epoch and the last step, both counted from 1, the step over all epochs."""
        return -(-self.optimizer.t // self.steps_of_epoch), self.optimizer.t


@runtime_checkable
class Keeper(Protocol):
    """The protocol of a checkpoint, such as `minilora.files.checkpoint.Checkpoint`."""

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Restore a training of `epochs` epochs, or store its start. A state that does not fit is refused."""

    def keep(self, state: TrainingState) -> None:
        """Store a training's state after an epoch."""
