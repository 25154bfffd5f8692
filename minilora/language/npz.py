"""A Llama decoder in glassllm's format: a .npz of half-precision matrices, and its sizes in JSON.

Its matrices are (in, out), so they are transposed here, and its rotary positions pair neighbours, see
`minilora.layers.rotary`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ..checks import named, reading
from ..layers.rotary import halves_from_interleaved
from .config import LlamaConfig, from_sizes, renamed

_BLOCK = {
    **{"norm1.gamma": "input_layernorm.weight", "norm2.gamma": "post_attention_layernorm.weight"},
    **{"attn.W_Q": "self_attn.q_proj.weight", "attn.W_K": "self_attn.k_proj.weight"},
    **{"attn.W_V": "self_attn.v_proj.weight", "attn.W_O": "self_attn.o_proj.weight"},
    **{"ffn.W1": "mlp.gate_proj.weight", "ffn.W3": "mlp.up_proj.weight", "ffn.W2": "mlp.down_proj.weight"},
}
NAMES = {
    **{"E": "model.embed_tokens.weight", "norm_f.gamma": "model.norm.weight"},
    **{f"blocks.*.{theirs}": f"model.layers.*.{ours}" for theirs, ours in _BLOCK.items()},
}
"""glassllm's names of arrays, and transformers'; * is the number of a block."""
SIZES_MEMBER = "__config__"
MOST_SHRUNK = 20
"""Times the size of a file that its arrays may take in memory: weights hardly shrink, what fills the memory does."""


class Sizes(msgspec.Struct):
    """The sizes in the file's JSON, where those are left out that have a usual value."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None
    eps: float = 1e-6
    rope_base: float = 10_000.0
    max_len: int | None = None


def open_npz(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Return the decoder's sizes, the shapes of the arrays in the file, and how one is read."""
    with reading(path):
        arrays = _arrays(path)
        if SIZES_MEMBER not in arrays:
            raise ValueError(f"there is no {SIZES_MEMBER}: only glassllm's .npz files are supported")
        with named(SIZES_MEMBER):
            sizes = msgspec.json.decode(str(arrays.pop(SIZES_MEMBER)), type=Sizes)
        named_here = {renamed(name, NAMES) or name: array for name, array in arrays.items()}
        if len(named_here) < len(arrays):
            raise ValueError("two of its arrays have the same name in a Llama decoder")
        weights = {name: array.T if "_proj" in name else array for name, array in named_here.items()}
        config, shapes = _config(sizes, weights), {name: array.shape for name, array in weights.items()}

    def read(name: str) -> np.ndarray:
        turned = name.endswith(("q_proj.weight", "k_proj.weight"))
        array = halves_from_interleaved(weights[name], config.head_dim) if turned else weights[name]
        return np.ascontiguousarray(array)

    return config, shapes, read


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Return what is in the file, unless it would unpack to far more than the file."""
    with zipfile.ZipFile(path) as members:
        unpacked, size = sum(member.file_size for member in members.infolist()), path.stat().st_size
    if unpacked > MOST_SHRUNK * size:
        raise ValueError(f"its {size} bytes unpack to {unpacked}, expected at most {MOST_SHRUNK} times as many")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _config(sizes: Sizes, weights: dict[str, np.ndarray]) -> LlamaConfig:
    gate = weights.get("model.layers.0.mlp.gate_proj.weight")
    if gate is None:
        raise ValueError("there is no 'blocks.0.ffn.W1'")
    known = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "intermediate_size": gate.shape[0],
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": None,
    }
    rope = {"rope_type": "default", "rope_theta": sizes.rope_base}
    return from_sizes(
        known, rope, rms_norm_eps=sizes.eps, tie_word_embeddings=True, max_position_embeddings=sizes.max_len
    )
