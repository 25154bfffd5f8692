"""A Llama decoder in Hugging Face's layout: config.json beside one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ....checks import FileRefused, short
from ....files.base.shards import MAX_MODEL_CONFIG, MODEL_CONFIG, Base, open_base
from ....files.base.tiedhead import EMBEDDING, HEAD_WEIGHT
from ....files.peft.adapterconfig import CONFIG_NAME
from ....guards.inputfiles import read_json
from ....guards.tensorfile import FLOATS, same_bytes
from ....layers.quantized import CodedLinear
from ...llamaconfig import LlamaConfig
from .configjson import parse_config
from .experttensors import stacked
from .nf4tensors import NF4Weights

EMBEDDING_WEIGHT = f"model.{EMBEDDING}.weight"
Coded = Callable[[Any], CodedLinear]
"""Of a weight that stays quantised: given the type to compute in, it returns a layer without a bias."""


def open_folder(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray | Coded]]:
    """Return the decoder's sizes, the shapes of the arrays in the folder, and how one is read."""
    settings = read_json(path / MODEL_CONFIG, MAX_MODEL_CONFIG)
    config = parse_config(path / MODEL_CONFIG, settings)
    if (path / CONFIG_NAME).exists():  # transformers would put it beside the model
        raise FileRefused(path / CONFIG_NAME, "an adapter in the folder of a model: move it to a folder of its own")
    base = open_base(path)
    linears = [name.removesuffix(".weight") for name in base.holder if name.endswith(("_proj.weight", HEAD_WEIGHT))]
    quantised = NF4Weights(path / MODEL_CONFIG, base, settings.get("quantization_config"), linears)
    specs = {name: base.spec(name) for name in base.holder if name not in quantised.parts | quantised.shapes.keys()}
    if config.tie_word_embeddings and HEAD_WEIGHT in specs:  # some files hold it a second time
        _check_tied(path, base)
        del specs[HEAD_WEIGHT]
    # Old files keep the frequencies as an array of each layer.
    specs = {name: spec for name, spec in specs.items() if not name.endswith(".rotary_emb.inv_freq")}
    for name, spec in specs.items():
        if spec.dtype not in FLOATS:
            raise FileRefused(
                base.holder[name].path, f"{short(name)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}"
            )

    shapes, made, renamed = stacked(path, config, {name: spec.shape for name, spec in specs.items()})

    def read(name: str) -> np.ndarray | Coded:
        if name in quantised.shapes:
            return partial(quantised.read, name)
        if name in made:
            return np.stack([np.concatenate([tensor(piece) for piece in pieces]) for pieces in made[name]])
        return tensor(renamed.get(name, name))

    def tensor(name: str) -> np.ndarray:
        with base.holder[name].opened() as file:
            return base.holder[name].read(name, file)

    return config, quantised.shapes | shapes, read


def _check_tied(path: Path, base: Base) -> None:
    """Refuse a head that is not the embedding: transformers 4 passes over it, version 5 computes with it."""
    if EMBEDDING_WEIGHT in base.holder and not same_bytes(
        base.holder[HEAD_WEIGHT], HEAD_WEIGHT, base.holder[EMBEDDING_WEIGHT], EMBEDDING_WEIGHT
    ):
        raise FileRefused(
            base.holder[HEAD_WEIGHT].path,
            f"{HEAD_WEIGHT} is not {EMBEDDING_WEIGHT}, and tie_word_embeddings is True in {path / MODEL_CONFIG}: "
            "expected False, or no such head",
        )
