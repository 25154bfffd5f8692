"""Quantisation of a model's linear layers to four bits, for QLoRA and LoftQ.

    base = quantize(model)                                           its linear layers in NF4
    adapted = adapt(base, "all-linear", rank=8, alpha=16, rng=rng)   adapters for them, as for any layer
    base, start = loftq(model, rank=8, alpha=16)                     another base, and adapters that start at its error
    adapted = attach(base, start)

QLORA quantises once. The quantisation error E = W - Q is there from the first step on, and the adapters learn to
compensate for it.

LOFTQ initialises the adapters with the error (`minilora.variants.loftq`). Its base differs from that of `quantize`, and
its adapters only work with it: save both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .adaptation import ALL_LINEAR, is_adapted, named_layers
from .checks import check_integer
from .layer import Layer, Model, arrays_of, check_model, rebuild, walk
from .layers.quantized import FrozenQuantizedLinear, QuantizedLinear
from .texts import named
from .variants.adapter import Adapter
from .variants.loftq import loftq_layer


def quantize(
    model: Model, target_modules: str | Sequence[str] = ALL_LINEAR, *, block_size: int = 64, double_quant: bool = True
) -> Model:
    """Return a copy of the model with its linear layers in NF4; everything else is shared with the original.

    Parameters
    ----------
    model : Layer
        A model without adapters, or a single `Linear`. It does not change.
    target_modules : list of str, or str
        As in `minilora.adapt`: by default every `Linear` except ``lm_head``.
    block_size : int
        The number of weights that share a scale: a power of two, at least 32.
    double_quant : bool
        Whether the scales are quantised too, to 8 bits.

    Returns
    -------
    Layer
        A model of the same class, with a frozen `QuantizedLinear` in place of each target.

    Raises
    ------
    ValueError, TypeError
        If the model has adapters, `target_modules` names no layer or one that cannot be quantised, a weight holds NaN
        or infinity, or an argument is out of range.
    """
    options: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
    return _quantized(model, target_modules, lambda _, layer: QuantizedLinear.from_linear(layer, **options))


def loftq(
    model: Layer, target_modules: str | Sequence[str] = ALL_LINEAR, *, rank: int, alpha: float, rounds: int = 1,
    block_size: int = 64, double_quant: bool = True,
) -> tuple[Any, dict[str, Adapter]]:  # fmt: skip
    """Return the model in NF4, and adapters that start with the quantisation error, for ``attach(base, adapters)``.

    Parameters
    ----------
    model, target_modules, block_size, double_quant
        As in `quantize`.
    rank, alpha
        The rank and alpha of each adapter. A rank above the smaller width of a layer is a ValueError.
    rounds : int
        The number of rounds that alternate between base and adapter. Each layer keeps its best round.

    Returns
    -------
    base : Layer
        The quantised model, like that of `quantize` but with other codes.
    adapters : dict of str to Adapter
        The adapters by module path, in the base's dtype. They fit only this base, not the original.

    Raises
    ------
    ValueError, TypeError
        As in `quantize`.
    """
    rounds = check_integer("rounds", rounds, at_least=1)
    options: dict[str, Any] = {"block_size": block_size, "double_quant": double_quant}
    adapters: dict[str, Adapter] = {}

    def started(path: str, layer: Any) -> QuantizedLinear:
        base, adapters[path] = loftq_layer(layer, rank=rank, alpha=alpha, rounds=rounds, **options)
        return base

    return _quantized(model, target_modules, started), adapters


def _quantized(model: Model, target_modules: str | Sequence[str], of: Callable[[str, Any], QuantizedLinear]) -> Model:
    """Replace each target by what `of` returns for it. No layer may be adapted, and no target quantised or tied."""
    check_model(model)
    if adapted := [path for path, layer in walk(model) if is_adapted(layer)]:
        raise ValueError(f"model has an adapter on {adapted[0]!r}: quantise it before adapt, or after merge")
    places = Counter(map(id, arrays_of(model)))
    targets: dict[str, Any] = named_layers(model, target_modules)
    for path, layer in targets.items():
        if isinstance(layer, FrozenQuantizedLinear):
            raise ValueError(f"the layer {path!r} is already quantised, a {type(layer).__name__}")
        if places[id(layer.weight)] > 1:
            raise ValueError(
                f"the layer {path!r} shares its weight with another layer: quantised, the two would no longer share it"
            )

    def put(path: str, layer: Any) -> Any:
        if path not in targets:
            return layer
        with named(f"the layer {path!r}"):
            return of(path, layer)

    return rebuild(model, layer=put)  # type: ignore[no-any-return]
