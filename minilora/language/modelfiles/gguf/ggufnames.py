"""llama.cpp's names for a Llama decoder's arrays and sizes, and the order of its rows of W_q and W_k.

Its rotary positions of a Llama pair neighbours, see `minilora.layers.rotary`. Transformers' pair halves, and so do
llama.cpp's of a Qwen2, whose rows keep their order.
"""

from __future__ import annotations

import numpy as np

from ....layers.rotary import interleaved_from_halves

NAMES = {
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    **{"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    **{"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"},
    **{"attn_output": "self_attn.o_proj"},
    **{"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
}
"""llama.cpp's names of arrays, and transformers'; those of a block follow its number in both."""
SIZES = {
    **{"vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"},
    **{"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"},
    **{"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"},
    **{"rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"},
}
"""What transformers calls it, and what llama.cpp does, after ``llama.`` or ``qwen2.``."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""llama.cpp's name for each kind of model: its converter makes a Mistral a llama."""
STEMS = {theirs: ours for ours, theirs in NAMES.items()}


def from_gguf(name: str) -> str:
    """Return transformers' name for one of llama.cpp's; one that has none as it is."""
    stem, _, kind = name.rpartition(".")
    block = ""
    if stem.startswith("blk."):
        _, number, stem = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", stem)
        block = f"model.layers.{number}."
    return f"{block}{NAMES[stem]}.{kind}" if stem in NAMES else name


def to_gguf(path: str) -> str | None:
    """Return llama.cpp's name for the module at a path, None where it has none."""
    block, stem = "", path
    if path.startswith("model.layers."):
        _, _, number, stem = path.split(".", 3) if path.count(".") >= 3 else ("", "", "", path)
        block = f"blk.{number}."
    inside = stem.startswith(("self_attn.", "mlp.")) or stem.endswith("_layernorm")
    return f"{block}{STEMS[stem]}" if stem in STEMS and inside == bool(block) else None


def is_turned(path: str, model_type: str) -> bool:
    """Return whether the rows of a module's weight are in another order there: the two that positions turn."""
    return ARCHITECTURES[model_type] == "llama" and path.endswith((".q_proj", ".k_proj"))


def gguf_tensor(name: str, array: np.ndarray, head_dim: int, model_type: str = "llama") -> tuple[str, np.ndarray]:
    """Return llama.cpp's name and order of rows for an array of a Llama decoder."""
    path, _, kind = name.rpartition(".")
    rows = interleaved_from_halves(array, head_dim) if is_turned(path, model_type) else array
    return f"{to_gguf(path)}.{kind}", np.ascontiguousarray(rows)
