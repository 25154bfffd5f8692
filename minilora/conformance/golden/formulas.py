"""What an adapter's files make of a base's weights: the right formulas, each part of which can be replaced.

    delta = s B A                                  a linear layer's W (out, in); an embedding's W (V, dim) gets A^T B^T
    s = alpha / r, or alpha / sqrt(r)              use_rslora; r and alpha by rank_pattern and alpha_pattern
    W' = W + sum_i w_i delta_i                     several adapters with weights w
    W' = (m / |V|) V,  V = W + delta               use_dora; |V| is the length of each row
    b' = s b                                       lora_bias
    W' = the weight in the file                    modules_to_save
    b' = the bias in the file                      bias="lora_only", of a module that has an adapter
    W'[t] = the row in the file                    trainable_token_indices, of each such token t

A reader's bug is these formulas with some parts replaced: see `minilora.conformance.golden.misreadings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .bases import EMBEDDING, HEAD
from .exact import product, sums

Arrays = dict[str, np.ndarray]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Module:
    """What an adapter has for one module, in float64."""

    lora_A: np.ndarray  # (r, in)
    lora_B: np.ndarray  # (out, r)
    bias: np.ndarray | None = None  # (out,), of lora_bias
    magnitude: np.ndarray | None = None  # (out,), of DoRA
    trained_bias: np.ndarray | None = None  # (out,), the base's own bias as it was trained, of bias="lora_only"


@dataclass(frozen=True)
class Given:
    """An adapter's two files: adapter_config.json, and the arrays by module path."""

    config: Config
    modules: Mapping[str, Module]
    starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of PiSSA's own files the product B A before training, (out, in), which such a file leaves to its reader."""
    saved: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The weights of modules that were trained in full, by module path."""
    tokens: Mapping[str, tuple[Sequence[int], np.ndarray]] = field(default_factory=dict)
    """Of an embedding's rows that were trained, which they are and the rows, by module path."""
    stored: str = ""  # the type of the factors in the file, where it is not float32


PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def matching(config: Config, key: str, path: str) -> list[Any]:
    """Return what the patterns say that match a module's path as PEFT matches them, in their order."""
    patterns = config.get(PATTERNS[key], {})
    return [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)]


def setting(config: Config, key: str, path: str) -> Any:
    """Return r or lora_alpha of a module: of the patterns that match, the first decides."""
    return next(iter(matching(config, key, path)), config[key])


def scaled(config: Config, alpha: float, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r)."""
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def scale(config: Config, path: str) -> float:
    """Return the scaling of a module."""
    return scaled(config, setting(config, "lora_alpha", path), setting(config, "r", path))


def lengths(V: np.ndarray) -> np.ndarray:  # (out, in) -> (out, 1)
    """Return the length of each row."""
    return np.asarray(np.sqrt(sums(V * V)))


@dataclass(frozen=True)
class Formulas:
    """The parts of the formulas; by default the right ones."""

    scale: Callable[[Config, str], float] = scale
    times: float = 1.0  # what the update is multiplied by besides
    applied: Callable[[str], bool] = lambda path: True  # whether a module's adapter is
    place: Callable[[str], str] = lambda path: path  # the module that gets the adapter of a path
    factors: Callable[[str, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda path, A, B: (A, B)
    update: Callable[[str, np.ndarray], np.ndarray] = lambda path, BA: BA
    length: Callable[[np.ndarray, np.ndarray, float], np.ndarray] = lambda W, BA, s: lengths(W + s * BA)
    magnitude: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, W: m[:, None]
    gain: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda m, n: m / n
    bias: Callable[[np.ndarray, float], np.ndarray] = lambda b, s: s * b
    trained_bias: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda b, trained: trained
    saved: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda W, trained: trained  # of modules_to_save
    tokens: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda rows, trained: trained
    read: Callable[[str, np.ndarray], np.ndarray] = lambda stored, x: x  # the numbers of a factor in a file's type
    previous: str = ""  # what is left of the previous case's adapters: "instead", "beside", or "cached"
    weights: Callable[[Sequence[float]], Sequence[float]] = lambda weights: weights  # of several adapters
    config_of: Callable[[int], int] = lambda i: i  # the adapter whose configuration the adapter i is read with
    start: float = 1.0  # how much of PiSSA's start is taken off
    ties: bool = False  # whether the tied head, or embedding, is changed with the other
    base: str = ""  # how its 4-bit weights are read, see `Base.misread`
    product: Callable[[np.ndarray, np.ndarray], np.ndarray] = product  # x W^T: the same bits everywhere, or fast

    def changed(
        self, arrays: Arrays, adapters: Sequence[tuple[Given, float]], misread: Mapping[str, Arrays] | None = None,
        previous: Sequence[tuple[Given, float]] = (),
    ) -> Arrays:  # fmt: skip
        """Return all arrays of the base that are not as they were, and new biases; `misread` is the base's.

        `previous` are the adapters of the case before, of which a program may leave something.
        """
        if previous and self.previous in ("instead", "beside"):
            adapters = [*previous, *(adapters if self.previous == "beside" else ())]
        read = (misread or {}).get(self.base, arrays)
        arrays_after = {name: array for name, array in read.items() if array is not arrays[name]}
        weights = self.weights([weight for _, weight in adapters])
        for i, ((adapter, _), weight) in enumerate(zip(adapters, weights, strict=True)):
            config = adapters[self.config_of(i)][0].config
            for path, module in adapter.modules.items():
                A, B = (self.read(adapter.stored, factor) for factor in (module.lora_A, module.lora_B))
                module = replace(module, lora_A=A, lora_B=B)
                if self.applied(path):
                    self._add(
                        arrays_after, read, config, self.place(path), path, module, weight, adapter.starts.get(path)
                    )
            for path, trained in adapter.saved.items():
                arrays_after[f"{path}.weight"] = self.saved(read[f"{path}.weight"], trained)
            for path, (which, trained) in adapter.tokens.items():
                rows = arrays_after.get(f"{path}.weight", read[f"{path}.weight"]).copy()
                rows[which] = self.tokens(rows[which], trained)
                arrays_after[f"{path}.weight"] = rows
        if self.ties:
            for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
                if name in arrays_after:
                    arrays_after.setdefault(other, arrays_after[name])
        return arrays_after

    def _add(
        self, arrays_after: Arrays, read: Arrays, config: Config, place: str, path: str, module: Module, weight: float,
        start: np.ndarray | None,
    ) -> None:  # fmt: skip
        place = place if f"{place}.weight" in read else path
        name, s = f"{place}.weight", self.scale(config, path) * self.times
        W = arrays_after.get(name, read[name])
        A, B = self.factors(path, module.lora_A, module.lora_B)
        BA = self.update(path, self.product(B, A.T))
        if start is not None:
            BA = BA - self.start * start
        if name == EMBEDDING:
            W = W.T
        if module.magnitude is None:
            W = W + weight * s * BA
        else:
            m = self.magnitude(module.magnitude, W)
            W = self.gain(m, self.length(W, BA, s)) * (W + s * BA)
        arrays_after[name] = W.T if name == EMBEDDING else W
        if module.bias is not None:
            arrays_after[f"{place}.bias"] = self.bias(module.bias, s)
        if module.trained_bias is not None:
            arrays_after[f"{place}.bias"] = self.trained_bias(read[f"{place}.bias"], module.trained_bias)
