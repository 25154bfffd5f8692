"""A Llama decoder in a .gguf file, llama.cpp's format, through the `gguf` package, which also undoes quantisation.

The names are llama.cpp's, and so is a Llama's order of the rows of W_q and W_k: its rotary positions pair neighbours,
see `minilora.layers.rotary`. Both are changed back to transformers'. A Qwen2's rows lie as in transformers, and its
settings are named after it: ``qwen2.block_count``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ....checks import FileRefused, needed, short
from ....layers.rotary import halves_from_interleaved
from ...llamaconfig import LlamaConfig
from ..huggingface.configjson import parse_config
from ..huggingface.folderreader import Coded
from ..supportedsettings import check_settings, gguf_settings
from .ggufblocks import BYTES, BlockLinear
from .ggufnames import SIZES, from_gguf, is_turned

ROPE_FACTORS = "rope_freqs.weight"
MOST_PARTS, MOST_KEYS = 1_500_000, 1000
"""Numbers and texts in a header, which the package keeps as an array each: Llama 3's has a million. And keys."""


def open_gguf(
    path: Path, *, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray | Coded]]:
    """Return the decoder's sizes, the shapes of the arrays in the file, and how one is read.

    With `keep_blocks`, the weight of a linear layer in a type of `ggufblocks` stays as it is.
    """
    dequantize = needed("gguf", "a .gguf file").dequantize
    in_file, fields = read_gguf(path)
    tensors = {from_gguf(tensor.name): tensor for tensor in in_file}
    if len(tensors) < len(in_file):
        raise FileRefused(path, "two of its arrays have the same name in a Llama decoder")
    config = _config(path, fields, tensors)
    factors = tensors.pop(ROPE_FACTORS, None) if config.model_type == "llama" else None  # llama.cpp's qwen2 has none
    if factors is not None:  # Llama 3's scaling, one number for each pair
        config = _divided(path, config, np.asarray(factors.data, np.float64))

    def read(name: str) -> np.ndarray | Coded:
        tensor, turned = tensors[name], is_turned(name.rpartition(".")[0], config.model_type)  # their biases too
        kind = getattr(tensor.tensor_type, "name", str(tensor.tensor_type))
        if keep_blocks and kind in BYTES and name.endswith("_proj.weight"):
            rows = np.array(tensor.data)  # a row's blocks are its own, so whole rows can change places
            blocks = halves_from_interleaved(rows, config.head_dim) if turned else rows
            return lambda dtype: BlockLinear(kind, blocks, dtype=dtype)
        try:
            array: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:
            raise FileRefused(path, f"{short(tensor.name)} of type {kind} cannot be read: {error}") from error
        if np.may_share_memory(array, tensor.data):  # numbers stored as such: the file may change, the model may not
            array = array.copy()
        return np.asarray(halves_from_interleaved(array, config.head_dim) if turned else array)

    return config, {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}, read


def gguf_tokenizer(path: Path) -> dict[str, Any]:
    """Return what a regular file's header says of the tokenizer: for that and its chat template, it is read once."""
    state = path.stat()
    return _gguf_tokenizer(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _gguf_tokenizer(path: Path, *_: int) -> dict[str, Any]:
    return read_gguf(path, tokenizer=True)[1]


def read_gguf(path: Path, *, tokenizer: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """Return a regular file's tensors, still quantised, and what its header says, of the tokenizer or of all else.

    Raises
    ------
    FileRefused
        If the file is damaged.
    ValueError
        If the `gguf` package is not installed.
    """
    GGUFReader = needed("gguf", "a .gguf file").GGUFReader
    parts = itertools.count(1)

    def bounded(self: Any, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        """Read a part of the file: by itself, the package reads on past the end, as often as some length says."""
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"what it holds would end at byte {end}, and the file has {len(self.data)}")
        if next(parts) > MOST_PARTS:
            raise ValueError(f"there are more than {MOST_PARTS:,} numbers and texts in its header")
        return GGUFReader._get(self, offset, dtype, count, **order)

    def pushed(self: Any, field: Any, skip_sum: bool = False) -> int:
        """Keep a key: the time that the package takes grows with their square."""
        if len(self.fields) >= MOST_KEYS:
            raise ValueError(f"there are more than {MOST_KEYS:,} keys in its header")
        return int(GGUFReader._push_field(self, field, skip_sum))

    try:
        reader = type("BoundedReader", (GGUFReader,), {"_get": bounded, "_push_field": pushed})(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith("tokenizer.") == tokenizer
        }
        return list(reader.tensors), fields
    except Exception as error:  # the package raises many kinds
        raise FileRefused(path, f"not a sound GGUF file: {type(error).__name__}: {error}") from error


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """Return the sizes, as if they stood in a config.json: there they are checked."""
    kind = fields.get("general.architecture")
    check_settings(path, gguf_settings(kind), fields)
    config = {name: fields[f"{kind}.{key}"] for name, key in SIZES.items() if f"{kind}.{key}" in fields}
    config.setdefault("num_key_value_heads", None)  # then H, whatever the kind
    config["max_position_embeddings"] = fields.get(f"{kind}.context_length")
    if "vocab_size" not in config and "model.embed_tokens.weight" in tensors:
        config["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[-1])
    factor = _factor(path, fields, kind)
    if factor != 1:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    for name, flag in (("attention_bias", "self_attn.q_proj.bias"), ("mlp_bias", "mlp.gate_proj.bias")):
        config[name] = f"model.layers.0.{flag}" in tensors
    config |= {"model_type": kind, "tie_word_embeddings": "lm_head.weight" not in tensors}
    sizes = parse_config(path, config)
    for name in (f"{kind}.rope.dimension_count", f"{kind}.attention.value_length"):
        if fields.get(name, sizes.head_dim) != sizes.head_dim:
            raise FileRefused(
                path, f"{name} is {short(fields[name])}, supported: {sizes.head_dim}, the width of a head's keys"
            )
    return sizes


def _factor(path: Path, fields: dict[str, Any], kind: Any) -> Any:
    """Return what the rotary frequencies are divided by; llama.cpp takes 0 for 1, and passes over it for type none."""
    names = (f"{kind}.rope.scaling.factor", f"{kind}.rope.scale_linear")
    factors = [(name, fields[name]) for name in names if name in fields]
    if len(factors) == 2 and factors[0][1] != factors[1][1]:
        raise FileRefused(path, " and ".join(f"{name} is {short(value)}" for name, value in factors) + ": expected one")
    if not factors or fields.get(f"{kind}.rope.scaling.type") == "none":
        return 1
    return factors[0][1] or 1


def _divided(path: Path, config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Return the same sizes with each rotary frequency divided by its factor."""
    if factors.shape != (len(config.frequencies),) or not (np.isfinite(factors) & (factors > 0)).all():
        raise FileRefused(path, f"{ROPE_FACTORS} is not {len(config.frequencies)} numbers above 0")
    frequencies = tuple(f / float(factor) for f, factor in zip(config.frequencies, factors, strict=True))
    return replace(config, frequencies=frequencies, rope=None)
