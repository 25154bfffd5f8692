"""LoRA's dropout: in a training step, the adapter reads an input with some entries set to zero.

Each entry of the adapter's input is dropped with probability p, and what is left is scaled up, so that the mean over
all masks is x. The base reads x itself:

    x'_ni = m_ni x_ni / (1 - p)          (drop.1)    (N, in)    m_ni is 0 with probability p, and 1 otherwise
    y = x W^T + b + s x' A^T B^T         (drop.2)    (N, in) -> (N, out)

In one step the mask m is a constant. So (3) to (5) hold with x' in the place of x, and (6) gives dx'. By (drop.1),
x_ni acts on the adapter through x'_ni alone, with the factor m_ni / (1 - p):

    dx_ni = (dy W)_ni + m_ni dx'_ni / (1 - p)        (drop.3)    (N, in)

No entry can count on another one's being there, as in an ensemble of adapters that each read a part of the input. A
model that is measured, speaks or is merged has no mask: there is a layer with one only within a step, which
`with_dropout` makes of the adapted model. Its masks follow from a key for each sequence of the batch and from the
layer's number, so that a forward stays pure, and a part of a batch has the masks that it has in the whole.

As in PEFT, each adapted layer has a mask of its own, and embeddings have none.

Source: Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_number
from ..layer import Cache, Layer, Model, rebuild, walk
from ..lora import LoRALinear
from .dora import DoRAAdapter
from .stackedlora import StackedLoRA


@dataclass(eq=False, repr=False)
class DroppingLoRALinear(LoRALinear):
    """A frozen layer and its adapter in one training step with dropout: `LoRALinear` with a mask before A."""

    dropout: float  # p, from 0 to below 1
    keys: tuple[int, ...]  # one key below 2^64 for each sequence of the batch
    number: int = 0  # the layer's number, so that no two layers have the same masks
    # (B, T): whether x has the row of a position; None where it has all. An array here would be a parameter.
    at: tuple[tuple[bool, ...], ...] | None = None

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dropout = check_number("dropout", self.dropout, above=0, below=1, or_equal=True)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache."""
        m, p = self.mask(x), self.dropout
        dropped = m * x / (1 - p)  # eq. (drop.1)
        update, cache = self.adapter.forward(dropped)
        y = self.base(x) + update  # eq. (drop.2)
        return y, (m, cache)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., in), through both paths, and the gradients of the adapter's factors."""
        (m, adapter_cache), p = cache, self.dropout
        dx_dropped, grads = self.adapter.backward(dy, adapter_cache, need_dx=need_dx)
        dx = self.base.input_gradient(dy) + m * dx_dropped / (1 - p) if need_dx else None  # eq. (drop.3)
        return dx, grads

    def mask(self, x: Array) -> Array:  # (..., in) -> (..., in)
        """Return m, bool with the shape of x. It is drawn on the host, so one key gives one mask on every device.

        A sequence's mask is drawn position by position, so that a shorter one has the beginning of it.
        """
        whole = x.shape[:-1] if self.at is None else np.shape(self.at)
        positions = math.prod(whole) // len(self.keys)
        drawn = np.stack([self._draws(key).random((positions, x.shape[-1]), np.float32) for key in self.keys])
        drawn = drawn if self.at is None else drawn[np.array(self.at)]
        return backend_of(x).asarray(drawn.reshape(x.shape) >= self.dropout)

    def _draws(self, key: int) -> np.random.Generator:
        """Return the generator of a sequence's mask in this layer."""
        return np.random.Generator(np.random.Philox(key=np.array([key, self.number], np.uint64)))


def with_dropout(model: Model, dropout: float, keys: Sequence[int]) -> Model:
    """Return a model with a dropout mask for the adapter of each `LoRALinear`, for one step on a batch.

    The model stays as it is, and the new one has its arrays. `dropout` is the probability p, from 0 to below 1; `keys`
    are an integer for each sequence of the batch, drawn anew for each step.
    """
    numbers = {path: number for number, (path, _) in enumerate(walk(model))}

    def dropping(path: str, layer: Any) -> Any:
        if type(layer) is not LoRALinear:
            return layer
        return DroppingLoRALinear(layer.base, layer.adapter, dropout, tuple(keys), numbers[path])

    return rebuild(model, layer=dropping)  # type: ignore[no-any-return]


def check_dropped(adapters: Mapping[str, Any]) -> None:
    """Require adapters that support dropout: not DoRA, and not of a mixture's arrays."""
    for path, adapter in adapters.items():
        for cls, whose in ((DoRAAdapter, "a DoRA's"), (StackedLoRA, "of a mixture's array")):
            if isinstance(adapter, cls):
                raise ValueError(f"dropout is not before the adapter {path!r}, which is {whose}: expected 0")


def of_sequences(model: Model, part: slice | np.ndarray) -> Model:
    """Return the model with the masks of only a part of a batch; without masks, the model itself."""

    def of_these(path: str, layer: DroppingLoRALinear) -> DroppingLoRALinear:
        return replace(layer, keys=tuple(np.array(layer.keys, np.uint64)[part].tolist()))

    return _with_masks(model, of_these)


def with_rows_at(model: Model, at: Array, paths: Sequence[str]) -> Model:
    """Return a model whose layers at, or below, these paths process only the rows of some positions.

    They get the rows where `at`, bool (B, T), is true, and have the masks of these. Without any masks, it is the model
    itself.
    """

    def there(path: str, layer: DroppingLoRALinear) -> DroppingLoRALinear:
        if not any(f"{path}.".startswith(f"{p}.") for p in paths):
            return layer
        return replace(layer, at=tuple(map(tuple, backend_of(at).to_numpy(at).tolist())))

    return _with_masks(model, there)


def _with_masks(model: Model, change: Callable[[str, DroppingLoRALinear], Layer]) -> Model:
    """Return the model with each masked layer replaced; without masked layers, the model itself."""
    if not any(isinstance(layer, DroppingLoRALinear) for _, layer in walk(model)):
        return model

    def changed(path: str, layer: Any) -> Any:
        return change(path, layer) if isinstance(layer, DroppingLoRALinear) else layer

    return rebuild(model, layer=changed)  # type: ignore[no-any-return]
