"""An adapter beside each layer that you name: adapt, attach, merge.

    adapted = adapt(model, ["q_proj", "v_proj"], rank=8, alpha=16, rng=rng)     everything frozen but new adapters
    train(adapted, X, Y, rng=rng)
    save_adapter("folder", adapters(adapted))                                   the adapters by module path
    same = attach(model, load_adapter("folder"))                                adapters that exist already
    plain = merge(adapted)                                                      the adapters folded into the weights

None of them changes the model it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .checks import check_instance, check_rng
from .layer import Layer, freeze, rebuild, walk
from .linear import Linear
from .lora import LoRA, LoRALinear

ALL_LINEAR = "all-linear"


def adapt(
    model: Layer, target_modules: str | Sequence[str], *, rank: int, alpha: float, rng: np.random.Generator
) -> Any:
    """Return the model frozen, with a new adapter beside each layer that `target_modules` names.

    Parameters
    ----------
    model : Layer
        A model, or a single `Linear`. It stays as it is; the frozen arrays are shared with it, not copied.
    target_modules : list of str, or str
        As PEFT reads it. A list has module paths or their ends: ``"q_proj"`` names ``layers.0.self_attn.q_proj`` too. A
        string is one regular expression that must match the whole path; ``"all-linear"`` names every `Linear` but
        ``lm_head``.
    rank, alpha
        Of each adapter, as in `LoRA.init`.
    rng : numpy.random.Generator
        Draws the adapters' starts, in the order of the model's layers.

    Returns
    -------
    Layer
        A model of the same class. Its output is the same until the first training step.

    Raises
    ------
    ValueError
        If `target_modules` names no layer, or one that has an adapter already, or `rank` or `alpha` is out of range.
    TypeError
        If an argument is of another type.
    """
    check_instance("model", model, Layer)
    check_rng(rng)
    targets = [path for path in _linears(model) if _named(path, target_modules)]
    if not targets:
        raise ValueError(f"target_modules={target_modules!r} names no linear layer; there are {_linears(model)}")

    def beside(path: str, layer: Any) -> Layer:
        return LoRALinear.from_linear(layer, rank=rank, alpha=alpha, rng=rng) if path in targets else layer

    return rebuild(freeze(model), layer=beside)


def attach(model: Layer, adapters: Mapping[str, LoRA]) -> Any:
    """Return the model frozen, with the given adapters beside the layers at their paths.

    Parameters
    ----------
    model : Layer
        A model, or a single `Linear` with the path ``""``. It stays as it is.
    adapters : mapping of str to LoRA
        By module path, as `load_adapter` and `minilora.adapters` return them. They are shared, not copied.

    Returns
    -------
    Layer
        A model of the same class.

    Raises
    ------
    ValueError
        If a path is not that of a `Linear` without an adapter, or an adapter's widths do not fit.
    TypeError
        If an argument is of another type.
    """
    check_instance("model", model, Layer)
    check_instance("adapters", adapters, Mapping)
    there = _linears(model)
    if unknown := [path for path in adapters if path not in there]:
        raise ValueError(f"adapters names {unknown}, which are no linear layers of the model; there are {there}")

    def beside(path: str, layer: Layer) -> Layer:
        return LoRALinear(layer, adapters[path]) if path in adapters else layer  # type: ignore[arg-type]

    return rebuild(freeze(model), layer=beside)


def merge(model: Layer) -> Any:
    """Return the model with its adapters folded into the weights: as fast as before adapting.

    The output is the same up to rounding. Every array is new, and every layer trains again.
    """
    check_instance("model", model, Layer)

    def fold(path: str, layer: Layer) -> Layer:
        vars(layer).pop("frozen", None)
        return layer.merge() if isinstance(layer, LoRALinear) else layer

    return rebuild(model, array=lambda a: a.copy(), layer=fold)


def adapters(model: Layer) -> dict[str, LoRA]:
    """Return the adapters of a model by the path of the module that each stands beside: what `save_adapter` takes."""
    check_instance("model", model, Layer)
    return {path: layer.adapter for path, layer in walk(model) if isinstance(layer, LoRALinear)}


def _linears(model: Layer) -> list[str]:
    """Return the paths of the linear layers that have no adapter yet."""
    taken = [path for path, layer in walk(model) if isinstance(layer, LoRALinear)]
    bases = {f"{path}.base".removeprefix(".") for path in taken}
    return [path for path, layer in walk(model) if isinstance(layer, Linear) and path not in bases]


def _named(path: str, target_modules: str | Sequence[str]) -> bool:
    """Return whether `target_modules` names the module at a path, as PEFT decides it."""
    if target_modules == ALL_LINEAR:
        return path.rpartition(".")[2] != "lm_head"
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in target_modules)
