"""The logits of a model with an adapter, as the formulas say or as a mistake makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...files.tensors import FLOATS
from ...language.llama import Llama
from ...layer import walk
from .mistakes import Mistake
from .reading import Arrays, Reading
from .subject import Subject


def logits(subject: Subject, ids: np.ndarray, mistake: Mistake | None = None, times: float = 1.0) -> np.ndarray:
    """Return the logits (P, T, V) of prompts (P, T), with the adapter as a mistake applies it; None for none."""
    parts: dict[str, Any] = dict(mistake.of(subject)) if mistake is not None else {"times": times}
    given = subject.given if mistake is None else mistake.reading(subject.given)
    which, dtype = ("", "") if mistake is None else (mistake.which, mistake.rounded)
    if which == "base":
        subject = replace(subject, arrays=_rounded(subject.arrays, dtype))
    formulas = Reading(**parts, product=lambda x, W: x @ W.T)
    changed = formulas.changed(subject.arrays, [(given, 1.0)])
    if subject.config.mixture is not None:
        mixture, _ = formulas.decoding(subject.config.mixture)
        subject = replace(subject, config=replace(subject.config, mixture=mixture))
    if which in ("merged", "all"):
        changed = _rounded(changed if which == "merged" else {**subject.arrays, **changed}, dtype)
    model = _model(subject, changed)
    if mistake is not None and mistake.cached:
        base = _model(subject, {})
        return _with_cache(base, model, ids) if mistake.cached == "base" else _with_cache(model, base, ids)
    return np.asarray(model(ids), np.float64)


def _model(subject: Subject, changed: Arrays) -> Llama:
    """Return the decoder with these arrays in the place of its own, and biases where it has none."""
    arrays = {name: np.ascontiguousarray(changed.get(name, array)) for name, array in subject.arrays.items()}
    arrays = {name: array.astype(subject.dtype, copy=False) for name, array in arrays.items()}
    model = Llama.build(subject.config, {name: arrays[name] for name in subject.config.shapes()})
    layers = dict(walk(model))
    for name in changed.keys() - arrays.keys():
        layer = layers[re.sub(r"\.bias$", "", name)]
        layer.bias = changed[name].astype(subject.dtype, copy=False)  # type: ignore[attr-defined]
    return model


def _with_cache(before: Llama, last: Llama, ids: np.ndarray) -> np.ndarray:
    """Return logits where one model answers up to the last token, and another the last one with its keys and values."""
    z = np.asarray(before(ids), np.float64)
    if ids.shape[1] > 1:
        _, past = before.extend(ids[:, :-1])
        z[:, -1], _ = last.extend(ids[:, -1:], past)
    return z


def _rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Return changed weights as a type holds them."""
    with np.errstate(over="ignore"):
        return {name: array.astype("f4").astype(FLOATS[dtype]).astype(array.dtype) for name, array in arrays.items()}
