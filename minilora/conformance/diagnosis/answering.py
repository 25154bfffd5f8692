"""The logits of a model with an adapter, as the formulas say or as a mistake makes them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from ...language.llama import Llama
from ...layer import walk
from ..golden.formulas import Arrays, Formulas, Given
from ..golden.misreadings import Misreading
from .given import Subject
from .mistakes import LAYER, ROUNDED, rounded


def logits(subject: Subject, ids: np.ndarray, mistake: Misreading | None = None, times: float = 1.0) -> np.ndarray:
    """Return the logits (P, T, V) of prompts (P, T), with the adapter as a mistake applies it; None for none."""
    parts: dict[str, Any] = dict(mistake.parts) if mistake is not None else {"times": times}
    dtype, layer = parts.pop(ROUNDED, None), parts.pop("from_layer", None)
    given = subject.given if layer is None else _from_layer(subject.given, layer)
    formulas = Formulas(**parts, product=lambda x, W: x @ W.T)
    changed = formulas.changed(subject.arrays, [(given, 1.0)])
    if dtype is not None:
        changed = rounded(changed, dtype)
    return _forward(subject, changed, ids)


def _from_layer(given: Given, layer: int) -> Given:
    """Return the adapter where each layer has that of one layer."""
    modules = {}
    for path, module in given.modules.items():
        other = LAYER.sub(str(layer), path)
        modules[path] = given.modules.get(other, module)
    return replace(given, modules=modules)


def _forward(subject: Subject, changed: Arrays, ids: np.ndarray) -> np.ndarray:
    arrays = {name: np.ascontiguousarray(changed.get(name, array)) for name, array in subject.arrays.items()}
    arrays = {name: array.astype(subject.dtype, copy=False) for name, array in arrays.items()}
    model = Llama.build(subject.config, {name: arrays[name] for name in subject.config.shapes()})
    layers = dict(walk(model))
    for name in changed.keys() - arrays.keys():  # a bias where the model has none
        layer = layers[re.sub(r"\.bias$", "", name)]
        layer.bias = changed[name].astype(subject.dtype, copy=False)  # type: ignore[attr-defined]
    return np.asarray(model(ids), np.float64)
