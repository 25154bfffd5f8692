"""Models in llama.cpp's format, written by its own library; the arrays' names and rows by hand."""

import dataclasses

import numpy as np
import pytest

from minilora import Llama

from .language import tiny_llama

gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")

THEIRS = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
}


def theirs(name, array, kind="llama", pairs=2):
    """Return llama.cpp's name for an array, and its rows in llama.cpp's order."""
    stem, _, last = name.rpartition(".")
    if kind == "llama" and stem.endswith(("q_proj", "k_proj")):  # a head's pairs are neighbours there, halves here
        array = array.reshape(-1, 2, pairs, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if stem.startswith("model.layers."):
        _, _, number, inside = stem.split(".", 3)
        return f"blk.{number}.{THEIRS[inside]}.{last}", np.ascontiguousarray(array)
    return f"{THEIRS[stem]}.{last}", np.ascontiguousarray(array)


def write(path, model=None, *, tied=False, changes=None, arrays=None, tokenizer=None, coded=None):
    """Write a model; of `changes`, a field instead of its own or beside them, None for none. Without one, a tokenizer.

    `coded` is a function of an array and its name that gives what the file has of it, and llama.cpp's type of that.
    """
    kind = "qwen2" if model and model.config.model_type == "qwen2" else "llama"
    fields = {**(fields_of(model.config) if model else {}), **(changes or {})}
    fields |= {f"tokenizer.{name}": value for name, value in (tokenizer or {}).items()}
    writer = gguf.GGUFWriter(path, kind)
    kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float64, bool: writer.add_bool}
    kinds[list] = writer.add_array
    for name, value in fields.items():
        if value is not None:
            kinds[type(value)](name.replace("llama.", f"{kind}."), value)
    own = dict(
        theirs(name, a, kind, model.config.head_dim // 2)
        for name, a in (model.trainable().items() if model else ())
        if not (tied and name == "lm_head.weight")
    )
    for name, array in {**own, **(arrays or {})}.items():
        if array is not None:
            data, of_type = coded(name, array) if coded else (array, None)
            writer.add_tensor(name, data, raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if model:
        writer.write_tensors_to_file()
    writer.close()
    return path


def fields_of(c):
    """Return what a file says of a decoder."""
    return {
        "llama.embedding_length": c.hidden_size, "llama.feed_forward_length": c.intermediate_size,
        "llama.block_count": c.num_hidden_layers, "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads, "llama.attention.key_length": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps, "llama.rope.freq_base": (1 / 0.3) ** 2,
        "llama.vocab_size": c.vocab_size,
    }  # fmt: skip


def llama_of_kind(kind):
    """A tiny model of another kind, no bias of it zero."""
    config = dataclasses.replace(tiny_llama().config, model_type=kind, attention_bias=kind in ("qwen2", "qwen3"))
    rng = np.random.default_rng(3)
    return Llama.build(config, {name: rng.standard_normal(s).astype("f4") for name, s in config.shapes().items()})
