"""The adapter and the model of a person's own, as `minilora.conformance.golden.reading` takes them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...audit.formats import TOKENS, open_adapter
from ...audit.headers import AdapterFile, open_model
from ...audit.landing import ARCHITECTURE, land
from ...files.peft import KEYS
from ...language.config import LlamaConfig
from ...language.weights import open_llama
from ...layers.nf4 import CodedLinear
from ...layers.rotary import halves_from_interleaved
from ...texts import FileRefused, short
from .bases import EMBEDDING, HEAD
from .reading import AdapterModule, Arrays, Given

OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
TURNED = (".q_proj", ".k_proj")
"""Modules whose rows a Llama's .gguf file has in another order."""
LARGE = 40_000_000
"""Numbers in a model from which on float32 is computed with, and not float64."""


@dataclass(frozen=True)
class Subject:
    """What an engine was given."""

    config: LlamaConfig  # the decoder's, with a head of its own
    arrays: Arrays  # of the base, by transformers' names, always with a head
    given: Given

    @property
    def dtype(self) -> Any:
        """What is computed in."""
        return self.arrays[EMBEDDING].dtype

    @property
    def layers(self) -> int:
        """How many blocks the decoder has."""
        return self.config.num_hidden_layers


def read_subject(model: Path, adapter: Path) -> Subject:
    """Read a model and an adapter whole.

    Raises
    ------
    FileRefused
        If one of them is damaged, the model is no decoder that is computed here, or the adapter does not fit it: then
        `minilora audit` says more.
    """
    file = open_adapter(adapter)
    landing = land(file, open_model(model))
    for module in file.modules.values():
        if module.rank_in_file is None or module.scaling is None or module.path not in landing.places:
            raise FileRefused(adapter, f"{short(module.path)} is not whole, or not of this model: see `minilora audit`")
    if not file.modules and not file.saved:
        raise FileRefused(adapter, "there is no adapter in it: see `minilora audit`")
    start = (file.config or {}).get("init_lora_weights")
    if start not in KEYS["init_lora_weights"]["x-supported"]:
        raise FileRefused(
            adapter, f"init_lora_weights is {short(start)}: convert it to an adapter over the original base"
        )
    if strange := [path for path in file.saved if TOKENS in path]:
        raise FileRefused(adapter, f"{short(strange[0])} is not computed here")
    config, arrays = _base(model)
    _check_kinds(file, mixture=config.mixture is not None)
    given = _given(file, landing.places, arrays, config.head_dim)
    for path in [*given.modules, *given.saved]:
        if path not in arrays and f"{path}.weight" not in arrays and not OF_ONE_EXPERT.search(path):
            raise FileRefused(adapter, f"{short(path)} is no layer of this decoder: see `minilora audit`")
    return Subject(replace(config, tie_word_embeddings=False), arrays, given)


def _check_kinds(file: AdapterFile, *, mixture: bool) -> None:
    """Refuse what the formulas have no place for: those of a decoder, or of one with mixtures."""
    kinds = ("linear", "experts") if mixture else ("linear", "embedding")
    for path, module in file.modules.items():
        of_experts = module.kind == "experts" and any(len(file.tensors.shapes[module.parts[p]]) != 2 for p in "AB")
        if module.kind not in kinds or of_experts or (mixture and {*module.parts} - {*"AB"}):
            what = f"{module.kind}, with {', '.join(module.parts)}"
            raise FileRefused(file.path, f"{short(path)} ({what}) is not computed here")
    if mixture and file.saved:
        raise FileRefused(file.path, f"{short(next(iter(file.saved)))} is not computed here beside a mixture")


def _base(model: Path) -> tuple[LlamaConfig, Arrays]:
    """Read the decoder, 4-bit weights as they are computed with."""
    config, read = open_llama(model)
    shapes = config.shapes()
    dtype = computed_in(shapes.values())
    arrays: Arrays = {}
    for name in shapes:
        array = read(name)
        arrays[name] = np.asarray(array.weight if isinstance(array, CodedLinear) else array).astype(dtype)
        if not np.isfinite(arrays[name]).all():
            raise FileRefused(model, f"{short(name)} holds NaN or infinity")
    arrays.setdefault(HEAD, arrays[EMBEDDING])
    return config, arrays


def computed_in(shapes: Iterable[tuple[int, ...]]) -> type[np.floating[Any]]:
    """Return what is computed in, beside a model of arrays with these shapes."""
    return np.float32 if sum(map(math.prod, shapes)) > LARGE else np.float64


def _given(file: AdapterFile, places: dict[str, str], arrays: Arrays, head_dim: int) -> Given:
    """Return the adapter in the words of PEFT's configuration, whichever program wrote it."""
    dtype = arrays[EMBEDDING].dtype

    def read(name: str | None) -> np.ndarray | None:
        return None if name is None else file.tensors.read(name).astype(dtype)

    llamas = "GGUF" in file.format and file.tensors.metadata.get(ARCHITECTURE) == "llama"
    modules, own = {}, {}  # by its path in the file, a module's path in the model
    for path, module in file.modules.items():
        A, B = (np.asarray(read(module.parts[part])) for part in "AB")
        if module.kind != "experts":  # whose formulas take the factors as they are packed
            ((A, B),) = module.pairs(A, B)
        if llamas and path.endswith(TURNED) and len(B) % head_dim == 0:
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
        if array.shape != arrays[f"{path}.weight"].shape:
            raise FileRefused(file.path, f"{short(path)} has another shape than the model's: see `minilora audit`")
    types = {file.tensors.dtypes[module.parts["A"]] for module in file.modules.values()}
    return Given(_config(file, own), modules, {}, saved, stored=types.pop() if len(types) == 1 else "")


def _config(file: AdapterFile, own: dict[str, str]) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter; of another format one that gives the same scalings."""
    if file.config is not None and file.is_peft:
        usual = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # of a null; an alpha can be 0
        return {**file.config, **{key: file.get(key, value) for key, value in usual.items()}}
    ranks = {own[path]: module.rank_in_file or 1 for path, module in file.modules.items()}
    alphas = {own[path]: (module.scaling or 0.0) * ranks[own[path]] for path, module in file.modules.items()}
    rank, alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1.0)
    return {
        "r": rank, "lora_alpha": alpha, "use_rslora": False,
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if a != alpha},
    }  # fmt: skip
