"""The gradients of a step with dropout: a model with masks of the step, made for it and forgotten after it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...checks import Array
from ...evaluation import Gradients
from ...layer import Layer
from ...losses import Loss
from ...variants.dropout import with_dropout


@dataclass(frozen=True)
class WithDropout:
    """The gradients that other gradients return of the model with masks, in a step.

    Parameters
    ----------
    gradients : callable
        ``gradients(model, x, y, loss)``, such as `minilora.training.backpropagate` or what `minilora.fast.accumulate`
        returns.
    dropout : float
        The probability with which an entry of an adapter's input is dropped.
    rng : numpy.random.Generator
        Draws a key for each row of a batch. Where it is the one that draws the batches, a checkpoint has its state.
    """

    gradients: Gradients
    dropout: float
    rng: np.random.Generator

    def __call__(self, model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of a step, with new masks."""
        keys = self.rng.integers(1 << 64, size=len(x), dtype=np.uint64).tolist()
        return self.gradients(with_dropout(model, self.dropout, keys), x, y, loss)
