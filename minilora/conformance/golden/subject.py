"""Read a user's own adapter and model for `minilora.conformance.golden.reading`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...audit.formats import TRAINABLE_TOKENS, open_adapter
from ...audit.headers import AdapterFile, open_model
from ...audit.landing import ARCHITECTURE, land
from ...files.peft import KEYS
from ...language.config import LlamaConfig
from ...language.files.weights import open_llama
from ...layers.quantized import FrozenQuantizedLinear
from ...layers.rotary import halves_from_interleaved
from ...texts import FileRefused, short
from .bases import EMBEDDING_TENSOR, HEAD_TENSOR
from .reading import AdapterData, AdapterModule, Arrays

OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
PERMUTED = (".q_proj", ".k_proj")
"""Modules whose rows are permuted in a Llama's .gguf file."""
LARGE = 40_000_000
"""Models with more parameters than this are computed in float32 instead of float64."""


@dataclass(frozen=True)
class Subject:
    """The model and the adapter that an engine was given."""

    config: LlamaConfig  # the decoder's, always with an untied head
    arrays: Arrays  # the base's arrays by transformers' names, always with a head
    given: AdapterData

    @property
    def dtype(self) -> Any:
        """The dtype to compute in."""
        return self.arrays[EMBEDDING_TENSOR].dtype

    @property
    def layers(self) -> int:
        """The number of the decoder's blocks."""
        return self.config.num_hidden_layers


def read_subject(model: Path, adapter: Path) -> Subject:
    """Read a model and an adapter completely.

    Raises
    ------
    FileRefused
        If one of them is damaged, the model is not a supported decoder, or the adapter does not fit it. `minilora
        audit` says more about an adapter.
    """
    file = open_adapter(adapter)
    landing = land(file, open_model(model))
    for module in file.modules.values():
        if module.rank_in_file is None or module.scaling is None or module.path not in landing.places:
            raise FileRefused(adapter, f"{short(module.path)} is incomplete or not in this model: see `minilora audit`")
    if not file.modules and not file.saved:
        raise FileRefused(adapter, "there is no adapter in it: see `minilora audit`")
    start = (file.config or {}).get("init_lora_weights")
    if start not in KEYS["init_lora_weights"]["x-supported"]:
        raise FileRefused(adapter, f"init_lora_weights is {short(start)}: convert it to one over the original base")
    if strange := [path for path in file.saved if TRAINABLE_TOKENS in path]:
        raise FileRefused(adapter, f"{short(strange[0])} is not supported by `minilora diagnose`")
    config, arrays = _base(model)
    _check_kinds(file, mixture=config.mixture is not None)
    given = _given(file, landing.places, arrays, config.head_dim)
    for path in [*given.modules, *given.saved]:
        if path not in arrays and f"{path}.weight" not in arrays and not OF_ONE_EXPERT.search(path):
            raise FileRefused(adapter, f"{short(path)} is not a layer of this decoder: see `minilora audit`")
    return Subject(replace(config, tie_word_embeddings=False), arrays, given)


def _check_kinds(file: AdapterFile, *, mixture: bool) -> None:
    """Raise FileRefused for kinds of modules that the formulas do not cover, with or without mixtures."""
    kinds = ("linear", "experts") if mixture else ("linear", "embedding")
    for path, module in file.modules.items():
        of_experts = module.kind == "experts" and any(len(file.tensors.shapes[module.parts[p]]) != 2 for p in "AB")
        if module.kind not in kinds or of_experts or (mixture and {*module.parts} - {*"AB"}):
            what = f"{module.kind}, with {', '.join(module.parts)}"
            raise FileRefused(file.path, f"{short(path)} ({what}) is not supported by `minilora diagnose`")
    if mixture and file.saved:
        raise FileRefused(file.path, f"{short(next(iter(file.saved)))} is not supported with a mixture of experts")


def _base(model: Path) -> tuple[LlamaConfig, Arrays]:
    """Read the decoder's configuration and arrays, with 4-bit weights dequantized."""
    config, read = open_llama(model)
    shapes = config.shapes()
    dtype = compute_dtype(shapes.values())
    arrays: Arrays = {}
    for name in shapes:
        array = read(name)
        arrays[name] = np.asarray(array.weight if isinstance(array, FrozenQuantizedLinear) else array).astype(dtype)
        if not np.isfinite(arrays[name]).all():
            raise FileRefused(model, f"{short(name)} holds NaN or infinity")
    arrays.setdefault(HEAD_TENSOR, arrays[EMBEDDING_TENSOR])
    return config, arrays


def compute_dtype(shapes: Iterable[tuple[int, ...]]) -> type[np.floating[Any]]:
    """Return the dtype to compute in for a model whose arrays have these shapes."""
    return np.float32 if sum(map(math.prod, shapes)) > LARGE else np.float64


def _given(file: AdapterFile, places: dict[str, str], arrays: Arrays, head_dim: int) -> AdapterData:
    """Return the adapter with PEFT's configuration and layout, whichever program wrote it."""
    dtype = arrays[EMBEDDING_TENSOR].dtype

    def read(name: str | None) -> np.ndarray | None:
        return None if name is None else file.tensors.read(name).astype(dtype)

    llamas = "GGUF" in file.format and file.tensors.metadata.get(ARCHITECTURE) == "llama"
    modules, own = {}, {}  # own: for each path in the file, the module's path in the model
    for path, module in file.modules.items():
        A, B = (np.asarray(read(module.parts[part])) for part in "AB")
        if module.kind != "experts":  # the formulas for experts take packed factors
            ((A, B),) = module.pairs(A, B)
        if llamas and path.endswith(PERMUTED) and len(B) % head_dim == 0:
            B = halves_from_interleaved(B, head_dim)
        magnitude, bias = read(module.parts.get("magnitude")), read(module.parts.get("bias"))
        known = path in arrays or f"{path}.weight" in arrays or OF_ONE_EXPERT.search(path) is not None
        own[path] = path if known else places[path]
        trained = read(file.saved.get(f"{path}.bias"))
        modules[own[path]] = AdapterModule(A, B, bias, None if magnitude is None else magnitude.ravel(), trained)
        for part in (A, B):
            if not np.isfinite(part).all():
                raise FileRefused(file.path, f"{short(path)} holds NaN or infinity: see `minilora audit`")
    saved = {
        path.removesuffix(".weight"): array
        for path, name in file.saved.items()
        if path.endswith(".weight") and path in arrays and (array := read(name)) is not None
    }
    for path, array in saved.items():
        if array.shape != (shape := arrays[f"{path}.weight"].shape):
            raise FileRefused(file.path, f"{short(path)} has shape {array.shape}, expected the model's {shape}")
    types = {file.tensors.dtypes[module.parts["A"]] for module in file.modules.values()}
    return AdapterData(_config(file, own), modules, {}, saved, stored=types.pop() if len(types) == 1 else "")


def _config(file: AdapterFile, own: dict[str, str]) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter; for another format, one that gives the same scalings."""
    if file.config is not None and file.is_peft:
        usual = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # replaces null; an alpha can be 0
        return {**file.config, **{key: file.get(key, value) for key, value in usual.items()}}
    ranks = {own[path]: module.rank_in_file or 1 for path, module in file.modules.items()}
    alphas = {own[path]: (module.scaling or 0.0) * ranks[own[path]] for path, module in file.modules.items()}
    rank, alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1.0)
    return {
        "r": rank, "lora_alpha": alpha, "use_rslora": False,
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if a != alpha},
    }  # fmt: skip
