"""A decoder in glassllm's format."""

import json
import re
import zipfile

import numpy as np
import pytest

from minilora import Llama


def interleaved(weight, D):
    """Return rows in the order of a rotary embedding that pairs neighbours."""
    heads = weight.reshape(-1, D, *weight.shape[1:])
    order = np.arange(D).reshape(2, D // 2).T.ravel()
    return heads[:, order].reshape(weight.shape)


def write_npz(path, **changes):
    """Write a decoder in glassllm's layout, and return its arrays under our names."""
    rng = np.random.default_rng(0)
    d, kv, m, V = 8, 4, 5, 20  # two heads of 4 over one key
    sizes = {"vocab_size": V, "d_model": d, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
    sizes |= {"rope_base": 100.0, "eps": 1e-5}
    ours = {"model.embed_tokens.weight": rng.standard_normal((V, d)), "model.norm.weight": rng.standard_normal(d)}
    theirs = {"E": ours["model.embed_tokens.weight"], "norm_f.gamma": ours["model.norm.weight"]}
    names = {
        **{"self_attn.q_proj": ("attn.W_Q", (d, d)), "self_attn.k_proj": ("attn.W_K", (kv, d))},
        **{"self_attn.v_proj": ("attn.W_V", (kv, d)), "self_attn.o_proj": ("attn.W_O", (d, d))},
        **{"mlp.gate_proj": ("ffn.W1", (m, d)), "mlp.up_proj": ("ffn.W3", (m, d)), "mlp.down_proj": ("ffn.W2", (d, m))},
        **{"input_layernorm": ("norm1.gamma", (d,)), "post_attention_layernorm": ("norm2.gamma", (d,))},
    }
    for i in range(2):
        for name, (their_name, shape) in names.items():
            W = ours[f"model.layers.{i}.{name}.weight"] = rng.standard_normal(shape)
            theirs[f"blocks.{i}.{their_name}"] = (interleaved(W, 4) if name[-6:] in ("q_proj", "k_proj") else W).T
    arrays = theirs | {"__config__": np.array(json.dumps(sizes))} | changes
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})
    return ours


def test_glassllms_matrices_are_transposed_and_reordered(tmp_path):
    ours = write_npz(tmp_path / "en.npz")
    found = Llama.load(tmp_path / "en.npz", dtype="float64")
    for name, array in ours.items():
        np.testing.assert_array_equal(found.trainable()[name], array)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert (found.config.frequencies, found.config.rms_norm_eps) == ((1.0, 0.1), 1e-5)


def test_missing_sizes_in_an_npz_are_glassllms_defaults(tmp_path):
    sizes = {"vocab_size": 20, "d_model": 8, "n_layers": 2, "n_heads": 2}
    keys = {f"blocks.{i}.attn.W_{name}": np.ones((8, 8)) for i in range(2) for name in "KV"}
    write_npz(tmp_path / "en.npz", __config__=np.array(json.dumps(sizes)), **keys)
    config = Llama.load(tmp_path / "en.npz").config
    assert (config.num_key_value_heads, config.rms_norm_eps, config.frequencies) == (2, 1e-6, (1.0, 0.01))
    assert config.max_position_embeddings is None


NPZ_DAMAGE = [
    ({"model.embed_tokens.weight": np.ones((20, 8))},  # glassllm's and transformers': nothing says which is meant
     "two of its arrays have the same name in a Llama decoder"),
    ({"__config__": None}, "there is no '__config__'"),
    ({"__config__": np.array("{")}, "__config__: Input data was truncated"),
    ({"__config__": np.array("{}")}, "__config__: Object missing required field `vocab_size`"),
    ({"blocks.1.attn.W_O": None}, "missing arrays: 1, the first is 'model.layers.1.self_attn.o_proj.weight'"),
    ({"blocks.1.attn.W_X": np.ones(3)},
     "'blocks.1.attn.W_X' is unexpected: a Llama decoder with this config does not have it"),
    ({"blocks.1.attn.W_O": np.ones((8, 7))},
     "'model.layers.1.self_attn.o_proj.weight' has shape [7, 8], expected [8, 8]"),
    ({"E": np.array([{}, []], dtype=object)}, "Object arrays cannot be loaded when allow_pickle=False"),
    ({"norm_f.gamma": np.array(["x"] * 8)}, "'model.norm.weight' has dtype <U1, expected a floating-point type"),
    ({"norm_f.gamma": np.ones(8, int)}, "'model.norm.weight' has dtype int64, expected a floating-point type"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), NPZ_DAMAGE)
def test_a_damaged_npz_is_one_clear_error(tmp_path, changes, message):
    write_npz(tmp_path / "en.npz", **changes)
    with pytest.raises(ValueError, match=f": {re.escape(message)}$"):
        Llama.load(tmp_path / "en.npz")


def test_a_cut_npz_is_refused(tmp_path):
    """So is a file with a member that is not an array."""
    path = tmp_path / "en.npz"
    write_npz(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("README.txt", b"read me")
    with pytest.raises(ValueError, match=r"en\.npz': 'bytes' object has no attribute 'shape'"):
        Llama.load(path)
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"en.npz': File is not a zip file"):
            Llama.load(path)


def test_an_npz_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "en.npz"
    write_npz(path)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("it was read"))
    size = path.stat().st_size
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        for name in "abc":
            file.writestr(f"{name}.npy", bytes(10 * size))
    with pytest.raises(ValueError, match=r"its \d+ bytes unpack to \d+, expected at most 20 times as many"):
        Llama.load(path)
