"""A Llama decoder in glassllm's format: a .npz of half-precision matrices, and its sizes in JSON.

Its matrices are (in, out), so they are transposed here, and its rotary positions pair neighbours, see
`minilora.layers.rotary`.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import FileRefused, short
from ...guards.inputfiles import parse_json
from ...layers.rotary import halves_from_interleaved
from ..llamaconfig import LlamaConfig
from .huggingface.configjson import parse_config

NAMES = {
    **{"E": "model.embed_tokens.weight", "norm_f.gamma": "model.norm.weight"},
    **{"norm1.gamma": "input_layernorm.weight", "norm2.gamma": "post_attention_layernorm.weight"},
    **{"attn.W_Q": "self_attn.q_proj.weight", "attn.W_K": "self_attn.k_proj.weight"},
    **{"attn.W_V": "self_attn.v_proj.weight", "attn.W_O": "self_attn.o_proj.weight"},
    **{"ffn.W1": "mlp.gate_proj.weight", "ffn.W3": "mlp.up_proj.weight", "ffn.W2": "mlp.down_proj.weight"},
}
SIZES = {
    **{"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers"},
    **{"num_attention_heads": "n_heads", "num_key_value_heads": "n_kv_heads", "rms_norm_eps": "eps"},
    **{"rope_theta": "rope_base", "max_position_embeddings": "max_len"},
}
SIZES_MEMBER = "__config__"
MOST_SHRUNK = 20
"""Times the size of a file that its arrays may take in memory: weights hardly shrink, what fills the memory does."""


def open_npz(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Return the decoder's sizes, the shapes of the arrays in the file, and how one is read."""
    try:
        with zipfile.ZipFile(path) as members:
            _check_members(members.infolist(), path.stat().st_size)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: _array(name, file[name]) for name in file.files}
    except Exception as error:  # NumPy and zipfile raise many kinds
        raise FileRefused(path, f"not a sound .npz file: {type(error).__name__}: {error}") from error
    if SIZES_MEMBER not in arrays:
        raise FileRefused(path, f"there is no {SIZES_MEMBER}: only glassllm's .npz files are supported")
    config = _config(path, str(arrays.pop(SIZES_MEMBER)), arrays)
    named = {_name(name): array for name, array in arrays.items()}
    if len(named) < len(arrays):
        raise FileRefused(path, "two of its arrays have the same name in a Llama decoder")
    weights = {name: array.T if "_proj" in name else array for name, array in named.items()}

    def read(name: str) -> np.ndarray:
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        array = halves_from_interleaved(weights[name], config.head_dim) if turned else weights[name]
        return np.ascontiguousarray(array)

    return config, {name: array.shape for name, array in weights.items()}, read


def _array(name: str, member: Any) -> np.ndarray:
    """Return a member that is an array; NumPy gives the bytes of one that does not begin as an array does."""
    if not isinstance(member, np.ndarray):
        raise ValueError(f"{short(name)} is no array")
    return member


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse what is no array, a name that stands twice, and what would unpack to far more than the file."""
    others = [member.filename for member in members if not member.filename.endswith(".npy")]
    if others:
        raise ValueError(f"{short(others[0])} is no array, expected names that end in .npy")
    names = Counter(member.filename for member in members)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"{short(twice[0])} stands twice")
    unpacked = sum(member.file_size for member in members)
    if unpacked > MOST_SHRUNK * size:
        raise ValueError(f"its {size} bytes unpack to {unpacked}, expected at most {MOST_SHRUNK} times as many")


def _config(path: Path, text: str, arrays: dict[str, np.ndarray]) -> LlamaConfig:
    """Return the sizes, as if they stood in a config.json: there they are checked."""
    sizes = parse_json(path, text.encode(), SIZES_MEMBER)
    config: dict[str, Any] = {name: sizes[key] for name, key in SIZES.items() if key in sizes}
    first = arrays.get("blocks.0.ffn.W1")
    if first is not None and first.ndim == 2:
        config["intermediate_size"] = first.shape[1]
    return parse_config(path, config | {"model_type": "llama", "tie_word_embeddings": True})


def _name(name: str) -> str:
    """Return transformers' name for one of glassllm's; one that has none as it is."""
    block, _, inside = name.removeprefix("blocks.").partition(".")
    return f"model.layers.{block}.{NAMES[inside]}" if inside in NAMES else NAMES.get(name, name)
