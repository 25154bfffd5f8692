"""Reader of Llama decoders in .gguf files, llama.cpp's format, through the package `gguf`, which also dequantises.

The names are llama.cpp's, and so is the order of the rows of a Llama's W_q and W_k, since llama.cpp's rotary embedding
pairs neighbouring entries, see `minilora.layers.rotary`. Both are converted to transformers'. A Qwen2's rows are in
transformers' order already. Its settings have a prefix of their own, as in ``qwen2.block_count``.

Weights of three quantised types can stay quantised. Each row of a weight is divided into blocks of 32 numbers. A block
consists of a scale d, in one type also a minimum m, both float16, and 32 codes q:

    type    bytes    in this order                        a weight
    Q4_0    18       d, 16 bytes of codes                 d (q - 8)      q from 0 to 15
    Q4_1    20       d, m, 16 bytes of codes              d q + m        q from 0 to 15
    Q8_0    34       d, 32 bytes of codes                 d q            q from -128 to 127

The low halves of the 16 bytes contain the first 16 codes, the high halves the last 16. Unlike in NF4, the levels are
equally spaced. Weights are computed in float32.

Source: the types are llama.cpp's; tests compare the decoded weights with those of the package `gguf`, bit for bit.
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
"""llama.cpp's names of modules, with transformers'; * stands for a block's index."""
GGUF_SIZES = {
    **{"vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"},
    **{"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"},
    **{"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"},
    **{"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"},
}
"""Sizes by their names in transformers, with llama.cpp's names, whose prefix is ``llama.`` or ``qwen2.``."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's name for each kind of model; its converter makes a Mistral a llama."""


def from_gguf(name: str) -> str:
    """Return transformers' name for llama.cpp's `name`, or `name` itself if there is no counterpart."""
    path, _, kind = name.rpartition(".")
    ours = renamed(path, MODULE_NAMES)
    return name if ours is None else f"{ours}.{kind}"


def to_gguf(path: str) -> str | None:
    """Return llama.cpp's name for the module at a path, or None if it has none."""
    return renamed(path, {ours: theirs for theirs, ours in MODULE_NAMES.items()})


def is_permuted(path: str, model_type: str) -> bool:
    """Return whether llama.cpp permutes the rows of a module's weight, as it does for a Llama's queries and keys."""
    return ARCHITECTURES[model_type] == "llama" and path.endswith((".q_proj", ".k_proj"))


def gguf_tensor(name: str, array: np.ndarray, head_dim: int, model_type: str = "llama") -> tuple[str, np.ndarray]:
    """Return llama.cpp's name for an array of a Llama decoder, and the array with its rows in llama.cpp's order."""
    path, _, kind = name.rpartition(".")
    rows = interleaved_from_halves(array, head_dim) if is_permuted(path, model_type) else array
    return f"{to_gguf(path)}.{kind}", np.ascontiguousarray(rows)


# --- settings ---

SUPPORTED_KIND: dict[str, tuple[Any, ...]] = {
    "general.architecture": ("llama", "qwen2"),
    "general.type": ("model",),
    "adapter.type": ("",),
    "split.count": (0, 1),
}
"""Settings that describe the kind of file, with their supported values."""
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
"""Settings that affect the result, with their supported values; the architecture's name is their prefix."""
ROPE_FACTORS = "rope_freqs.weight"


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """Return the configuration for a file's header and tensors."""
    check_settings(SUPPORTED_KIND, fields, needed=("general.architecture",))
    kind = fields["general.architecture"]
    check_settings({f"{kind}.{name}": values for name, values in SUPPORTED_GGUF.items()}, fields)

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
                f"{kind}.{name} is {short(width)}, supported: {config.head_dim}, the head dimension of the keys"
            )
    return config


def _divide_frequencies(config: LlamaConfig, factors: np.ndarray) -> LlamaConfig:
    """Return the configuration with each rotary frequency divided by its own factor, as for Llama 3."""
    if factors.shape != (len(config.frequencies),) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"{ROPE_FACTORS}: expected {len(config.frequencies)} finite numbers above 0")
    frequencies = tuple(f / float(factor) for f, factor in zip(config.frequencies, factors, strict=True))
    return replace(config, frequencies=frequencies, rope=None)


def _rope_factor(fields: dict[str, Any], kind: str) -> Any:
    """Return the divisor of all rotary frequencies. As in llama.cpp, 0 means 1, and type none disables scaling."""
    names = (f"{kind}.rope.scaling.factor", f"{kind}.rope.scale_linear")
    factors = [(name, fields[name]) for name in names if name in fields]
    if len(factors) == 2 and factors[0][1] != factors[1][1]:
        raise ValueError(" and ".join(f"{name} is {short(value)}" for name, value in factors) + ": expected only one")
    if not factors or fields.get(f"{kind}.rope.scaling.type") == "none":
        return 1
    return factors[0][1] or 1


# --- the file ---


def open_gguf(
    path: Path, *, keep_blocks: bool = False
) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray | FrozenQuantizedLinear]]:
    """Return the configuration, the arrays' shapes, and a function that reads one array or keeps it quantised."""
    dequantize = needed("gguf", "a .gguf file").dequantize
    in_file, fields = read_gguf(path)
    tensors = {from_gguf(tensor.name): tensor for tensor in in_file}
    if len(tensors) < len(in_file):
        raise FileRefused(path, "two of its arrays have the same name in a Llama decoder")
    with reading(path):
        config = _config(fields, tensors)
        if ROPE_FACTORS in tensors and config.model_type == "llama":  # llama.cpp ignores them in a qwen2
            config = _divide_frequencies(config, np.asarray(tensors.pop(ROPE_FACTORS).data, np.float64))

    def read(name: str) -> np.ndarray | FrozenQuantizedLinear:
        tensor, permuted = tensors[name], is_permuted(name.rpartition(".")[0], config.model_type)  # biases too
        kind = tensor.tensor_type.name
        if keep_blocks and kind in BYTES and name.endswith("_proj.weight"):
            rows = np.array(tensor.data)  # a block never spans two rows, so rows can be permuted
            blocks = halves_from_interleaved(rows, config.head_dim) if permuted else rows
            return BlockLinear(kind, blocks)
        with reading(path):  # the package may not support this type
            array: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        if np.may_share_memory(array, tensor.data):  # a view of the file: the model must not change with it
            array = array.copy()
        return np.asarray(halves_from_interleaved(array, config.head_dim) if permuted else array)

    return config, {name: tuple(map(int, reversed(t.shape))) for name, t in tensors.items()}, read


def gguf_tokenizer(path: Path) -> dict[str, Any]:
    """Return the tokenizer's settings in a file's header, cached since the chat template needs them too."""
    state = path.stat()
    return _gguf_tokenizer(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _gguf_tokenizer(path: Path, *_: int) -> dict[str, Any]:
    """Return the tokenizer's settings; the file's time and size are arguments so that a changed file is read again."""
    return read_gguf(path, tokenizer=True)[1]


def read_gguf(path: Path, *, tokenizer: bool = False) -> tuple[list[Any], dict[str, Any]]:
    """Return a file's tensors, not dequantised, and its settings: only the tokenizer's, or all others."""
    GGUFReader = needed("gguf", "a .gguf file").GGUFReader

    def bounded(self: Any, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        """Read part of the file like the package's method, but refuse to read past the end of the file."""
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"its contents would end at byte {end}, but the file has only {len(self.data)} bytes")
        return GGUFReader._get(self, offset, dtype, count, **order)

    try:
        reader = type("BoundedReader", (GGUFReader,), {"_get": bounded})(path)
        fields = {
            key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.") == tokenizer
        }
        return list(reader.tensors), fields
    except Exception as error:  # the package raises many types of exceptions
        raise FileRefused(path, f"not a valid GGUF file: {type(error).__name__}: {error}") from error


# --- blocks ---

GGUF_BLOCK = 32
"""The number of weights in a block."""
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""The number of bytes in a block, by type."""


def decode(kind: str, data: Array) -> Array:  # (..., bytes) uint8 -> (..., n) float32
    """Return the weights that the blocks along the last axis encode."""
    xp, blocks = backend_of(data).xp, data.reshape(-1, BYTES[kind])

    def float16_at(start: int) -> Array:  # -> (blocks, 1) float32
        return xp.ascontiguousarray(blocks[:, start : start + 2]).view("float16").astype("float32")

    d = float16_at(0)
    if kind == "Q8_0":
        w = d * xp.ascontiguousarray(blocks[:, 2:]).view("int8").astype("float32")
    else:
        codes = blocks[:, -16:]
        q = xp.concatenate([codes % 16, codes // 16], axis=1).astype("float32")
        w = d * (q - 8) if kind == "Q4_0" else d * q + float16_at(2)
    return w.reshape(*data.shape[:-1], data.shape[-1] // BYTES[kind] * GGUF_BLOCK)


class BlockLinear(FrozenQuantizedLinear):
    """A frozen linear layer whose weight stays in the quantised blocks of a .gguf file."""

    def __init__(self, kind: str, blocks: Array, bias: Array | None = None, *, dtype: Any = "float32") -> None:
        """Keep blocks, uint8 (out, bytes), of a weight (out, in) without copying them; compute in `dtype`."""
        out, width = blocks.shape
        super().__init__(backend_of(blocks).zeros((0,), dtype), (out, width // BYTES[kind] * GGUF_BLOCK), bias)
        self.kind, self.blocks = kind, blocks

    @property
    def weight(self) -> Array:  # -> (out, in)
        """The weight in the layer's dtype, decoded at each access."""
        return decode(self.kind, self.blocks).astype(self.like.dtype, copy=False)
