"""A Llama decoder in a .gguf file, llama.cpp's format, through the `gguf` package, which also undoes quantisation.

Names are llama.cpp's, and so is a Llama's order of the rows of W_q and W_k: its rotary positions pair neighbours, see
`minilora.layers.rotary`. Both are changed back to transformers'. A Qwen2's rows lie as in transformers, and its
settings are named after it: ``qwen2.block_count``.

Three quantised types can also stay as they are. A row of a weight is cut into blocks of 32 numbers. A block of bytes
holds a scale d, in some types a smallest value m, both float16, and 32 codes q:

    type    bytes    in this order                        a weight
    Q4_0    18       d, 16 bytes of codes                 d (q - 8)      q from 0 to 15
    Q4_1    20       d, m, 16 bytes of codes              d q + m        q from 0 to 15
    Q8_0    34       d, 32 bytes of codes                 d q            q from -128 to 127

Of the 16 bytes, the low halves are the first 16 codes and the high halves the last 16. Unlike NF4's, the steps between
codes are all of one size. Sums and products are taken in float32.

Source: the types are llama.cpp's; the decoder is held against the package `gguf`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...backend import backend_of
from ...checks import Array
from ...extras import needed
from ...layers.quantized import FrozenQuantizedLinear
from ...layers.rotary import halves_from_interleaved, interleaved_from_halves
from ...texts import FileRefused, reading, short
from ..config import LlamaConfig, check_settings, from_sizes, renamed

# --- names ---

_BLOCK = {
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}
MODULE_NAMES = {
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    **{f"blk.*.{theirs}": f"model.layers.*.{ours}" for theirs, ours in _BLOCK.items()},
}
"""llama.cpp's names of modules, and transformers'; * is the number of a block."""
GGUF_SIZES = {
    **{"vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"},
    **{"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"},
    **{"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"},
    **{"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"},
}
"""What transformers calls it, and what llama.cpp does, after ``llama.`` or ``qwen2.``."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's name for each kind of model: its converter makes a Mistral a llama."""


def from_gguf(name: str) -> str:
    """Return transformers' name for one of llama.cpp's; one that has none as it is."""
    path, _, kind = name.rpartition(".")
    ours = renamed(path, MODULE_NAMES)
    return name if ours is None else f"{ours}.{kind}"


def to_gguf(path: str) -> str | None:
    """Return llama.cpp's name for the module at a path, None where it has none."""
    return renamed(path, {ours: theirs for theirs, ours in MODULE_NAMES.items()})


def is_permuted(path: str, model_type: str) -> bool:
    """Return whether the rows of a module's weight are in another order there: the two that positions turn."""
    return ARCHITECTURES[model_type] == "llama" and path.endswith((".q_proj", ".k_proj"))


def gguf_tensor(name: str, array: np.ndarray, head_dim: int, model_type: str = "llama") -> tuple[str, np.ndarray]:
    """Return llama.cpp's name and order of rows for an array of a Llama decoder."""
    path, _, kind = name.rpartition(".")
    rows = interleaved_from_halves(array, head_dim) if is_permuted(path, model_type) else array
    return f"{to_gguf(path)}.{kind}", np.ascontiguousarray(rows)


# --- settings ---

FILE_MUST: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama", "qwen2"),
    "general.type": ("model",),
    "adapter.type": ("",),
    "split.count": (0, 1),
}
"""Settings that say what a file is, and the values that are implemented."""
SUPPORTED_GGUF: dict[str, tuple[Any, ...]] = {
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "rope.scaling.type": ("linear", "none"),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (0,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attention.scale": (0,),
    "embedding_scale": (0,),
    "residual_scale": (0,),
    "logit_scale": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
}
"""The same of those that change what is computed: their names follow that of the architecture."""
ROPE_FACTORS = "rope_freqs.weight"


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """Return the sizes that a header states, of the arrays that the file has."""
    check_settings(FILE_MUST, fields, needed=("general.architecture",))
    kind = fields["general.architecture"]
    check_settings({f"{kind}.{name}": only for name, only in SUPPORTED_GGUF.items()}, fields)

    found = {ours: fields.get(f"{kind}.{theirs}") for ours, theirs in GGUF_SIZES.items()}
    if found["vocab_size"] is None and "model.embed_tokens.weight" in tensors:
        found["vocab_size"] = int(tensors["model.embed_tokens.weight"].shape[-1])
    factor, base = _rope_factor(fields, kind), found.pop("rope_theta")
    scaled = {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}
    config = from_sizes(
        found, scaled | {"rope_theta": 10_000.0 if base is None else base}, model_type=kind,
        tie_word_embeddings="lm_head.weight" not in tensors,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in tensors or kind == "qwen2",
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in tensors and kind == "llama",
        max_position_embeddings=fields.get(f"{kind}.context_length"),
    )  # fmt: skip
    for name in ("rope.dimension_count", "attention.value_length"):
        if (width := fields.get(f"{kind}.{name}", config.head_dim)) != config.head_dim:
            raise ValueError(
                f"{kind}.{name} is {short(width)}, supported: {config.head_dim}, the width of a head's keys"
            )
    return config


def _divided(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Return the same sizes with each rotary frequency divided by its factor: Llama 3's scaling."""
    if factors.shape != (len(config.frequencies),) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"{ROPE_FACTORS} is not {len(config.frequencies)} numbers above 0")
    frequencies = tuple(f / float(factor) for f, factor in zip(config.frequencies, factors, strict=True))
    return replace(config, frequencies=frequencies, rope=None)


def _rope_factor(fields: dict[str, Any], kind: str) -> Any:
    """Return what the rotary frequencies are divided by; llama.cpp takes 0 for 1, and passes over it for type none."""
    names = (f"{kind}.rope.scaling.factor", f"{kind}.rope.scale_linear")
    factors = [(name, fields[name]) for name in names if name in fields]
    if len(factors) == 2 and factors[0][1] != factors[1][1]:
        raise ValueError(" and ".join(f"{name} is {short(value)}" for name, value in factors) + ": expected one")
    if not factors or fields.get(f"{kind}.rope.scaling.type") == "none":
        return 1
    return factors[0][1] or 1


# --- the file ---


def open_gguf(
    path: Path, *, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray | FrozenQuantizedLinear]]:
    """Return the decoder's sizes, the shapes of the arrays, and how one is read, with `keep_blocks` as its blocks."""
    dequantize = needed("gguf", "a .gguf file").dequantize
    in_file, fields = read_gguf(path)
    tensors = {from_gguf(tensor.name): tensor for tensor in in_file}
    if len(tensors) < len(in_file):
        raise FileRefused(path, "two of its arrays have the same name in a Llama decoder")
    with reading(path):
        config = _config(fields, tensors)
        if ROPE_FACTORS in tensors and config.model_type == "llama":  # llama.cpp's qwen2 has none
            config = _divided(config, np.asarray(tensors.pop(ROPE_FACTORS).data, np.float64))

    def read(name: str) -> np.ndarray | FrozenQuantizedLinear:
        tensor, turned = tensors[name], is_permuted(name.rpartition(".")[0], config.model_type)  # their biases too
        kind = tensor.tensor_type.name
        if keep_blocks and kind in BYTES and name.endswith("_proj.weight"):
            rows = np.array(tensor.data)  # a row's blocks are its own, so whole rows can change places
            blocks = halves_from_interleaved(rows, config.head_dim) if turned else rows
            return BlockLinear(kind, blocks)
        with reading(path):  # a type that the package cannot decode
            array: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
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
    """Return a regular file's tensors, still quantised, and what its header says, of the tokenizer or of all else."""
    GGUFReader = needed("gguf", "a .gguf file").GGUFReader

    def bounded(self: Any, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        """Read a part of the file: by itself, the package reads on past the end, as often as some length says."""
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"what it holds would end at byte {end}, and the file has {len(self.data)}")
        return GGUFReader._get(self, offset, dtype, count, **order)

    try:
        reader = type("BoundedReader", (GGUFReader,), {"_get": bounded})(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.startswith("tokenizer.") == tokenizer
        }
        return list(reader.tensors), fields
    except Exception as error:  # the package raises many kinds
        raise FileRefused(path, f"not a sound GGUF file: {type(error).__name__}: {error}") from error


# --- blocks ---

GGUF_BLOCK = 32
"""Numbers in a block."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block, by type."""


def decode(kind: str, data: Array) -> Array:  # (..., bytes) uint8 -> (..., n) float32
    """Return the numbers that blocks stand for: whole blocks of one type along the last axis."""
    xp, blocks = backend_of(data).xp, data.reshape(-1, BYTES[kind])

    def halves(start: int) -> Array:  # -> (blocks, 1) float32
        return xp.ascontiguousarray(blocks[:, start : start + 2]).view("float16").astype("float32")

    d = halves(0)
    if kind == "Q8_0":
        w = d * xp.ascontiguousarray(blocks[:, 2:]).view("int8").astype("float32")
    else:
        codes = blocks[:, -16:]
        q = xp.concatenate([codes % 16, codes // 16], axis=1).astype("float32")
        w = d * (q - 8) if kind == "Q4_0" else d * q + halves(2)
    return w.reshape(*data.shape[:-1], data.shape[-1] // BYTES[kind] * GGUF_BLOCK)


class BlockLinear(FrozenQuantizedLinear):
    """A frozen linear layer that keeps the blocks of a .gguf file. It keeps the array that it is given."""

    def __init__(self, kind: str, blocks: Array, bias: Array | None = None, *, dtype: Any = "float32") -> None:
        """Keep the blocks (out, bytes) of a weight (out, in), uint8; the layer computes in `dtype`."""
        out, width = blocks.shape
        super().__init__(backend_of(blocks).zeros((0,), dtype), (out, width // BYTES[kind] * GGUF_BLOCK), bias)
        self.kind, self.blocks = kind, blocks

    @property
    def weight(self) -> Array:  # -> (out, in)
        """The weight, made anew each time it is asked for."""
        return decode(self.kind, self.blocks).astype(self.like.dtype, copy=False)
