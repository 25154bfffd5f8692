"""A model is loaded from any supported format; anything that is not a finite model is refused."""

import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama
from minilora.files.dtypes import FLOATS
from minilora.files.tensors import TensorFile, write_tensors
from minilora.texts import FileRefused

from ...support.adapter_folder import change_json
from ...support.compare import refused
from ...support.language import tiny_llama, write_folder
from ...support.model_folder import shard

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture
def model_dir(tmp_path, model):
    return write_folder(tmp_path / "model", model)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Make the test fail if a weight is read."""
    monkeypatch.setattr(TensorFile, "read", lambda self, name: pytest.fail(f"{name} was read"))


def weights(model_dir):
    return load_file(model_dir / "model.safetensors")


def changed(model_dir, settings=None, arrays=None):
    """Set keys of config.json, and add, replace or (with None) remove arrays."""
    change_json(model_dir / "config.json", **settings or {})
    found = {**weights(model_dir), **(arrays or {})}
    kept = {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}
    save_file(kept, model_dir / "model.safetensors")
    return model_dir


def test_a_folder_is_the_model_it_came_from(model_dir, model):
    for dtype in ("float32", np.float64):
        found = Llama.load(model_dir, dtype=dtype)
        for name, array in model.trainable().items():
            assert found.trainable()[name].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found.trainable()[name], array)
        np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-5)
    changed(model_dir, arrays={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f4")})  # of old files
    shard(model_dir, 2)
    np.testing.assert_array_equal(Llama.load(model_dir)(IDS), model(IDS))


TIED = {"tie_word_embeddings": True}


def test_a_tied_head_needs_no_array_or_equal_bits(model_dir):
    tied = Llama.load(changed(model_dir, TIED, {"lm_head.weight": None}))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    same = {"lm_head.weight": weights(model_dir)["model.embed_tokens.weight"]}
    np.testing.assert_array_equal(Llama.load(changed(model_dir, TIED, same))(IDS), tied(IDS))


def test_a_tied_head_that_differs_is_refused(model_dir, nothing_is_read):
    arrays = weights(model_dir)
    one_bit = arrays["model.embed_tokens.weight"].copy()
    one_bit[-1, -1] = np.nextafter(one_bit[-1, -1], np.float32(9))
    message = r"lm_head\.weight differs from model\.embed_tokens\.weight, but tie_word_embeddings is True in "
    message += f"{model_dir}/config.json: expected False, or no such head$"
    for head in (arrays["lm_head.weight"], one_bit, one_bit.astype("f8"), one_bit[:-1]):
        with pytest.raises(ValueError, match=message):
            Llama.load(changed(model_dir, TIED, {"lm_head.weight": head}))


NOT_EXPECTED = "a Llama decoder with this config does not have it"
DAMAGE = [
    ({"num_hidden_layers": 10**8}, {}, "100000000 layers, but only 21 arrays"),
    ({"mlp_bias": True}, {}, "missing arrays: 6, the first is 'model.layers.0.mlp.gate_proj.bias'"),
    ({"vocab_size": 30}, {}, "'model.embed_tokens.weight' has shape [29, 12], expected [30, 12]"),
    ({}, {"model.layers.1.mlp.up_proj.weight": None},
     "missing arrays: 1, the first is 'model.layers.1.mlp.up_proj.weight'"),
    ({}, {"lm_head.weight": None}, "missing arrays: 1, the first is 'lm_head.weight'"),
    ({}, {"model.layers.0.self_attn.q_proj.bias": np.ones(16, "f4")},
     f"'model.layers.0.self_attn.q_proj.bias' is unexpected: {NOT_EXPECTED}"),
    ({}, {"model.layers.2.input_layernorm.weight": np.ones(12, "f4")},
     f"'model.layers.2.input_layernorm.weight' is unexpected: {NOT_EXPECTED}"),
    ({}, {"model.norm.weight": np.ones(13, "f4")}, "'model.norm.weight' has shape [13], expected [12]"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "arrays", "message"), DAMAGE)
def test_arrays_and_settings_must_fit_together(model_dir, nothing_is_read, settings, arrays, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        Llama.load(changed(model_dir, settings, arrays))


def test_a_damaged_folder_is_one_clear_error(model_dir, nothing_is_read):
    config, file, adapter = (model_dir / n for n in ("config.json", "model.safetensors", "adapter_config.json"))
    adapter.write_text("{}")
    with refused(f"'{adapter}': an adapter in a model's folder: move it to its own folder"):
        Llama.load(model_dir)
    adapter.unlink()
    for length in (1000, 0):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(FileRefused, match=r"model\.safetensors': Error while deserializing header: "):
            Llama.load(model_dir)
    for text in ("", "[]", "{", '{"x": NaN}', "\xff"):
        config.write_text(text, encoding="latin-1")
        with pytest.raises(FileRefused, match=r"config\.json"):
            Llama.load(model_dir)
    config.unlink()
    with refused(f"'{config}': No such file or directory"):
        Llama.load(model_dir)


def test_arrays_are_on_the_requested_backend(model_dir, standin):
    model = Llama.load(model_dir, backend=standin)
    assert all(isinstance(a, standin.xp.ndarray) for a in model.trainable().values())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_half_types_are_widened_exactly(model_dir, kind):
    arrays = weights(model_dir)
    halves = {name: a.astype(FLOATS[kind]) for name, a in arrays.items()}
    with open(model_dir / "model.safetensors", "wb") as file:
        write_tensors(file, halves, {})
    found = Llama.load(model_dir).trainable()
    for name, half in halves.items():
        np.testing.assert_array_equal(found[name], half.astype("float32"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(model_dir, value):
    broken = weights(model_dir)["model.norm.weight"]
    broken[3] = value
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds NaN or infinity"):
        Llama.load(changed(model_dir, arrays={"model.norm.weight": broken}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has dtype I8, expected one of"):
        Llama.load(changed(model_dir, arrays={"model.norm.weight": np.ones(12, "i1")}))


def test_weights_beyond_the_type_are_refused(model_dir):
    """They are finite in the file but overflow in the requested dtype; the dtype's largest number does not."""
    large = weights(model_dir)["model.norm.weight"].astype("f8")
    for sign in (1, -1):
        large[3] = sign * 1e300
        changed(model_dir, arrays={"model.norm.weight": large})
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' reaches 1e\+300, which float32 cannot hold"):
            Llama.load(model_dir)
        assert Llama.load(model_dir, dtype="float64").model.norm.weight[3] == large[3]
        large[3] = sign * float(np.finfo("f4").max)
        changed(model_dir, arrays={"model.norm.weight": large})
        assert Llama.load(model_dir).model.norm.weight[3] == large[3]


def test_other_arguments_are_refused_by_name(model_dir, tmp_path):
    for dtype in ("float16", "int8", 3, None):
        with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got"):
            Llama.load(model_dir, dtype=dtype)
    said = r"backend must be a Backend, as minilora\.get_backend\('cupy'\) returns it, got 'numpy'$"
    with pytest.raises(TypeError, match=said):
        Llama.load(model_dir, backend="numpy")
    with pytest.raises(TypeError, match="keep_blocks must be True or False, got 'no'"):
        Llama.load(model_dir, keep_blocks="no")
    for nowhere in ("model.bin", "model.gguf", "model.npz", "folder"):
        with pytest.raises(ValueError, match=rf"{nowhere}': No such file or directory"):
            Llama.load(tmp_path / nowhere)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a folder with config\.json, a \.gguf file or a \.npz file"):
        Llama.load(tmp_path / "model.bin")
    with pytest.raises(TypeError, match="path must be a path"):
        Llama.load(3)


def test_a_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r'needs gguf .*: pip install "minilora\[files\]"'):
        Llama.load(tmp_path / "model.gguf")
