"""The gradients of a loss with respect to the trainable arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from .checks import Array
from .layer import Layer
from .losses import Loss, mse

Gradients: TypeAlias = Callable[[Any, Array, Array, Loss], dict[str, Array]]
"""``gradients(model, x, y, loss)`` returns the gradients of the trainable arrays by name."""


def backpropagate(model: Layer, x: Array, y: Array, loss: Loss = mse) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)`` for the trainable arrays: forward, loss, backward."""
    prediction, cache = model.forward(x)
    _, d_prediction = loss(prediction, y)
    _, grads = model.backward(d_prediction, cache, need_dx=False)
    return grads
