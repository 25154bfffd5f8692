"""A model is loaded from whichever file it comes in; what is no model, and no number, is refused."""

import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama
from minilora.files.tensors import FLOATS, TensorFile, write_tensors

from ..support.adapter_folder import change_json
from ..support.language import tiny_llama, write_folder
from ..support.model_folder import shard

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture
def model_dir(tmp_path, model):
    return write_folder(tmp_path / "model", model)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A weight that is read fails the test."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFile, "read", read)


def changed(model_dir, **settings):
    change_json(model_dir / "config.json", **settings)
    return model_dir


def weights(model_dir):
    return load_file(model_dir / "model.safetensors")


def with_weights(model_dir, arrays):
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, model_dir / "model.safetensors")
    return model_dir


def test_a_folder_is_the_model_it_came_from(model_dir, model):
    for dtype in ("float32", np.float64):
        found = Llama.load(model_dir, dtype=dtype)
        for name, array in model.trainable().items():
            assert found.trainable()[name].dtype == np.dtype(dtype)
            np.testing.assert_array_equal(found.trainable()[name], array)
        np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-5)
    shard(model_dir, 2)
    np.testing.assert_array_equal(Llama.load(model_dir)(IDS), model(IDS))


def test_a_tied_head_needs_no_array_or_equal_bits(model_dir):
    arrays = weights(model_dir)
    del arrays["lm_head.weight"]
    changed(model_dir, tie_word_embeddings=True)
    tied = Llama.load(with_weights(model_dir, arrays))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    same = {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    np.testing.assert_array_equal(Llama.load(with_weights(model_dir, arrays | same))(IDS), tied(IDS))


def test_a_tied_head_of_other_bits_is_refused(model_dir, nothing_is_read):
    changed(model_dir, tie_word_embeddings=True)
    arrays = weights(model_dir)
    one_bit = arrays["model.embed_tokens.weight"].copy()
    one_bit[-1, -1] = np.nextafter(one_bit[-1, -1], np.float32(9))
    for head in (arrays["lm_head.weight"], one_bit, one_bit.astype("f8"), one_bit[:-1]):
        with_weights(model_dir, arrays | {"lm_head.weight": head})
        with pytest.raises(
            ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, and tie_word_embeddings"
        ):
            Llama.load(model_dir)


def test_old_files_frequencies_are_passed_over(model_dir, model):
    arrays = weights(model_dir) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f4")}
    np.testing.assert_array_equal(Llama.load(with_weights(model_dir, arrays))(IDS), model(IDS))


def spoiled(name, array):
    return lambda model_dir: with_weights(model_dir, weights(model_dir) | {name: array})


def without(name):
    return lambda model_dir: with_weights(model_dir, {k: a for k, a in weights(model_dir).items() if k != name})


def cut(length):
    def cut_file(model_dir):
        path = model_dir / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        return model_dir

    return cut_file


def no_config(model_dir):
    (model_dir / "config.json").unlink()
    return model_dir


def an_adapter(model_dir):
    (model_dir / "adapter_config.json").write_text("{}")
    return model_dir


DAMAGE = [
    (an_adapter, "adapter_config.json': an adapter in the folder of a model: move it to a folder of its own"),
    (lambda model_dir: changed(model_dir, num_hidden_layers=10**8), "100000000 layers, and 21 arrays in all"),
    (lambda model_dir: changed(model_dir, mlp_bias=True),
     "there is no 'model.layers.0.mlp.gate_proj.bias'; 6 arrays are missing in all"),
    (lambda model_dir: changed(model_dir, vocab_size=30),
     "'model.embed_tokens.weight' has shape [29, 12], expected [30, 12]"),
    (without("model.layers.1.mlp.up_proj.weight"),
     "there is no 'model.layers.1.mlp.up_proj.weight'; 1 arrays are missing in all"),
    (without("lm_head.weight"), "there is no 'lm_head.weight'; 1 arrays are missing in all"),
    (spoiled("model.layers.0.self_attn.q_proj.bias", np.ones(16, "f4")),
     "there is 'model.layers.0.self_attn.q_proj.bias', which a Llama decoder of these settings has not"),
    (spoiled("model.layers.2.input_layernorm.weight", np.ones(12, "f4")),
     "there is 'model.layers.2.input_layernorm.weight', which a Llama decoder of these settings has not"),
    (spoiled("model.norm.weight", np.ones(13, "f4")), "'model.norm.weight' has shape [13], expected [12]"),
    (cut(1000), "model.safetensors': Error while deserializing header: "),
    (cut(0), "model.safetensors': Error while deserializing header: "),
    (no_config, "config.json': No such file or directory"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_folder_is_one_clear_error(model_dir, nothing_is_read, damage, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Llama.load(damage(model_dir))


def test_arrays_live_where_they_are_asked_to(model_dir, standin):
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
def test_weights_that_are_no_numbers_are_refused(model_dir, value):
    broken = weights(model_dir)["model.norm.weight"]
    broken[3] = value
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds NaN or infinity"):
        Llama.load(spoiled("model.norm.weight", broken)(model_dir))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has dtype I8, expected one of"):
        Llama.load(spoiled("model.norm.weight", np.ones(12, "i1"))(model_dir))


def test_weights_beyond_the_type_are_refused(model_dir):
    """Finite in the file, and infinite in the type that was asked for; as large as it holds is not."""
    large = weights(model_dir)["model.norm.weight"].astype("f8")
    for sign in (1, -1):
        large[3] = sign * 1e300
        spoiled("model.norm.weight", large)(model_dir)
        with pytest.raises(ValueError, match=r"'model\.norm\.weight' reaches 1e\+300, which float32 cannot hold"):
            Llama.load(model_dir)
        assert Llama.load(model_dir, dtype="float64").model.norm.weight[3] == large[3]
        large[3] = sign * float(np.finfo("f4").max)
        spoiled("model.norm.weight", large)(model_dir)
        assert Llama.load(model_dir).model.norm.weight[3] == large[3]


def test_other_arguments_are_refused_by_name(model_dir, tmp_path):
    for dtype in ("float16", "int8", 3, None):
        with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got"):
            Llama.load(model_dir, dtype=dtype)
    with pytest.raises(TypeError, match="backend must be a Backend"):
        Llama.load(model_dir, backend="numpy")
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
    with pytest.raises(ValueError, match=r"needs gguf .*: pip install gguf tokenizers$"):
        Llama.load(tmp_path / "model.gguf")


def test_a_damaged_configuration_is_one_clear_error(model_dir):
    for text in ("", "[]", "{", '{"x": NaN}', "\xff"):
        (model_dir / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config\.json"):
            Llama.load(model_dir)
