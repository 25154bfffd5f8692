"""The first model: two linear layers with an activation between them.

    h = x W1^T + b1        (N, in)     -> (N, hidden)
    a = f(h)               (N, hidden) -> (N, hidden)
    y = a W2^T + b2        (N, hidden) -> (N, out)

Nothing new is derived: each layer knows its own backward, and `Sequential` hands dx down from layer to layer. LoRA goes
beside either linear layer, by its path: ``adapt(mlp, ["fc1"], rank=4, alpha=8, rng=rng)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Backend
from ..checks import check_choice, check_start
from ..layer import Layer
from ..linear import Linear
from .activation import ACTIVATIONS
from .sequential import Sequential


class MLP(Sequential):
    """``fc1``, ``act`` and ``fc2``, in this order."""

    fc1: Any  # a Linear, or what `adapt` puts in its place
    act: Layer
    fc2: Any

    @classmethod
    def init(
        cls,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        activation: str = "relu",
        rng: np.random.Generator,
        dtype: Any = "float32",
        backend: Backend | None = None,
    ) -> MLP:
        """Start both layers as `Linear.init` does.

        Parameters
        ----------
        in_features, hidden_features, out_features : int
            The widths.
        activation : {"relu", "tanh", "silu"}
            The function between the layers.
        rng, dtype, backend
            As in `Linear.init`.

        Returns
        -------
        MLP
            A new model.

        Raises
        ------
        ValueError, TypeError
            If the activation is unknown, a width is below 1, or an argument is of another type.
        """
        check_start(rng, dtype, in_features=in_features, hidden_features=hidden_features, out_features=out_features)
        act = ACTIVATIONS[check_choice("activation", activation, ACTIVATIONS)]()
        fc1 = Linear.init(in_features, hidden_features, rng=rng, dtype=dtype, backend=backend)
        fc2 = Linear.init(hidden_features, out_features, rng=rng, dtype=dtype, backend=backend)
        return cls(fc1=fc1, act=act, fc2=fc2)
