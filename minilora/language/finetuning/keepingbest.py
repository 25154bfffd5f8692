"""A training that keeps the parameters of the step with the least held-out loss, besides those of the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...checks import Array
from ...files.checkpoint import Checkpoint
from ...layer import Layer
from ...state import History, TrainingState


class KeepingBest:
    """What `train` takes as its checkpoint: it notes the best step, and has the checkpoint keep it, if there is one.

    Only a step at which the loss is measured can be the best one, and so not the state before the first step.
    """

    def __init__(self, checkpoint: Checkpoint | None) -> None:
        self.checkpoint = checkpoint
        self.best: dict[str, Array] = {} if checkpoint is None else checkpoint.best

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put the training where it was left, with the best step so far."""
        if self.checkpoint is not None:
            self.checkpoint.resume(state, epochs, settings, data)

    def keep(self, state: TrainingState) -> None:
        """Note the parameters where their loss is below all others so far, and keep where the training stands."""
        losses = state.history.losses
        measured = state.history.epochs[-1:] == [state.epoch]
        if measured and losses[-1] < min(losses[:-1], default=math.inf):
            self.best.update({name: p.copy() for name, p in state.optimizer.params.items()})
        if self.checkpoint is not None:
            self.checkpoint.keep(state)

    def bring_back(self, model: Layer, history: History) -> int:
        """Give a model that was trained the parameters of the best step, and return which one it is."""
        place = min(range(len(history.losses)), key=history.losses.__getitem__)
        if place < len(history.losses) - 1:
            params = model.trainable()
            for name, array in self.best.items():
                params[name][...] = array
        return history.epochs[place]
