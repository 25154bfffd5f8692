"""Where a training stands between two epochs: what the loop changes, and what a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..backend import all_finite
from ..checks import Array
from ..layer import Layer
from ..optim import Adam


@dataclass
class History:
    """The loss over the whole data set, as training went on.

    Attributes
    ----------
    epochs : list of int
        The epochs after which the loss was measured, counted from 1.
    losses : list of float
        The loss measured after each of them.
    """

    epochs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class TrainingDiverged(ArithmeticError):
    """Training met a number that is NaN or infinite. The model has its last finite parameters.

    Attributes
    ----------
    epoch, step : int
        Where it happened, counted from 1. Step 0 is the loss measured at the end of an epoch.
    """

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


@dataclass
class TrainingState:
    """Everything that the next epoch depends on, besides the data.

    Attributes
    ----------
    model : Layer
        Its trainable arrays are the optimizer's.
    optimizer : Adam
        With its running means and its count of steps.
    rng : numpy.random.Generator
        Draws the batches.
    history : History
        The losses so far.
    epoch : int
        The number of epochs done.
    """

    model: Layer
    optimizer: Adam
    rng: np.random.Generator
    history: History = field(default_factory=History)
    epoch: int = 0

    def copy_arrays(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return copies of the parameters and of the optimizer's state."""
        return {name: p.copy() for name, p in self.optimizer.params.items()}, self.optimizer.state_dict()

    def restore_arrays(self, saved: tuple[Mapping[str, Array], Mapping[str, Any]]) -> None:
        """Put the parameters, in place, and the optimizer back to where `copy_arrays` found them."""
        params, moments = saved
        for name, p in self.optimizer.params.items():
            p[...] = params[name]
        self.optimizer.load_state_dict(moments)

    def is_finite(self) -> bool:
        """Return whether no parameter holds NaN or infinity. Asking waits for the device."""
        return all_finite(list(self.optimizer.params.values()))

    def find_divergence(
        self, start: tuple[Any, Any], step: Callable[[Array], None], batches: Array, epoch: int
    ) -> NoReturn:
        """Take an epoch's steps again from its start, each one checked, and raise at the one that went wrong."""
        self.restore_arrays(start)
        for number, rows in enumerate(batches, start=1):
            before = self.copy_arrays()
            step(rows)
            if not self.is_finite():
                bad = ", ".join(name for name, p in self.optimizer.params.items() if not all_finite([p]))
                self.restore_arrays(before)
                raise TrainingDiverged(
                    f"epoch {epoch}, step {number} of {len(batches)}: {bad} is no longer finite. The model is left as "
                    f"it was before that step. Either lr = {self.optimizer.lr} is too large, or X or Y is not finite",
                    epoch,
                    number,
                )
        raise TrainingDiverged(
            f"epoch {epoch} ended with a parameter that is not finite, and did not when it was repeated: the model's "
            "forward or backward does not give the same numbers twice",
            epoch,
            len(batches),
        )
