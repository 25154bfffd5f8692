"""Llama decoders from files: what is read, and one clear error for what is damaged or not supported."""

import dataclasses
import json
import math
import sys
import warnings
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama
from minilora.files import save_llama
from minilora.guards import tensorfile
from minilora.guards.tensorfile import encode, tensor_header
from minilora.language.modelfiles.huggingface.configjson import parse_config

from ...support.language import tiny_llama, write_folder

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture
def folder(tmp_path, model):
    return write_folder(tmp_path / "model", model)


@pytest.fixture
def nothing_is_read(monkeypatch):
    """A weight that is read fails the test."""

    def read(self, name, file):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(tensorfile.TensorFile, "read", read)


def changed(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def with_weights(folder, arrays):
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
    return folder


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64, np.dtype("float32")])
def test_a_folder_is_the_model_it_came_from(folder, model, dtype):
    found = Llama.load(folder, dtype=dtype)
    for name, array in model.trainable().items():
        assert found.trainable()[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found.trainable()[name], array)
    np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-5)


def test_arrays_live_where_they_are_asked_to(folder, standin):
    model = Llama.load(folder, backend=standin)
    assert all(isinstance(a, standin.xp.ndarray) for a in model.trainable().values())


def test_shards_are_one_checkpoint(folder, model):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: arrays[name] for name in inside}, folder / shard)
    index = {name: shard for shard, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    np.testing.assert_array_equal(Llama.load(folder)(IDS), model(IDS))


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_half_types_are_widened_exactly(folder, kind):
    arrays = weights(folder)
    halves = {name: encode(a.astype("float16" if kind == "F16" else a.dtype), kind) for name, a in arrays.items()}
    typed = {
        name: raw.view("uint16" if kind == "BF16" else "float16").reshape(arrays[name].shape)
        for name, raw in halves.items()
    }
    data = tensor_header(typed, {}) + b"".join(raw.tobytes() for raw in halves.values())
    (folder / "model.safetensors").write_bytes(data)
    found = Llama.load(folder).trainable()
    for name, a in arrays.items():
        bits = a.astype("float16").astype("float32") if kind == "F16" else tensorfile.decode(encode(a, "BF16"), "BF16")
        np.testing.assert_array_equal(found[name], bits.reshape(a.shape))


def test_a_tied_head_needs_no_array_or_equal_bits(folder):
    arrays = weights(folder)
    del arrays["lm_head.weight"]
    changed(folder, tie_word_embeddings=True)
    tied = Llama.load(with_weights(folder, arrays))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    same = {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    np.testing.assert_array_equal(Llama.load(with_weights(folder, arrays | same))(IDS), tied(IDS))


def test_a_tied_head_of_other_bits_is_refused(folder, nothing_is_read):
    changed(folder, tie_word_embeddings=True)
    arrays = weights(folder)
    one_bit = arrays["model.embed_tokens.weight"].copy()
    one_bit[-1, -1] = np.nextafter(one_bit[-1, -1], np.float32(9))
    for head in (arrays["lm_head.weight"], one_bit, one_bit.astype("f8"), one_bit[:-1]):
        with_weights(folder, arrays | {"lm_head.weight": head})
        with pytest.raises(
            ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, and tie_word_embeddings"
        ):
            Llama.load(folder)


def sharded(folder, shards, index):
    """Write shards, each with some arrays, and an index."""
    for shard, inside in shards.items():
        save_file(inside, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_an_index_beside_a_single_file_is_refused(folder, nothing_is_read):
    """transformers takes the single file, vLLM the shards."""
    others = {name: 2 * a for name, a in weights(folder).items()}
    sharded(folder, {"other.safetensors": others}, dict.fromkeys(others, "other.safetensors"))
    with pytest.raises(ValueError, match=r"model.safetensors': beside model.safetensors.index.json, which names other"):
        Llama.load(folder)


def test_an_index_of_the_single_file_is_read(folder, model):
    sharded(folder, {}, dict.fromkeys(weights(folder), "model.safetensors"))
    np.testing.assert_array_equal(Llama.load(folder)(IDS), model(IDS))


def test_an_array_in_two_shards_is_refused(folder, nothing_is_read):
    """The index names one of them, and transformers takes the last that it reads."""
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    norm = {"model.norm.weight": 2 * arrays["model.norm.weight"]}
    index = dict.fromkeys(arrays, "a.safetensors") | {"other": "b.safetensors"}
    sharded(folder, {"a.safetensors": arrays, "b.safetensors": norm | {"other": np.ones(2, "f4")}}, index)
    with pytest.raises(ValueError, match=r"b.safetensors': 'model.norm.weight' stands here and in a.safetensors"):
        Llama.load(folder)


def test_an_array_that_the_index_leaves_out_counts(folder, model):
    arrays = weights(folder)
    (folder / "model.safetensors").unlink()
    index = {name: "a.safetensors" for name in arrays if name != "model.norm.weight"}
    sharded(folder, {"a.safetensors": arrays}, index)
    np.testing.assert_array_equal(Llama.load(folder)(IDS), model(IDS))


def test_an_adapter_among_a_models_files_is_refused(folder, nothing_is_read):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json': an adapter in the folder of a model"):
        Llama.load(folder)


def test_old_files_frequencies_are_passed_over(folder, model):
    arrays = weights(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, "f4")}
    np.testing.assert_array_equal(Llama.load(with_weights(folder, arrays))(IDS), model(IDS))


def test_what_a_configuration_leaves_out_is_as_usual(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del config[name]
    found = parse_config(path, config | {"num_attention_heads": 3})
    assert (found.head_dim, found.num_key_value_heads) == (4, 3)
    assert found.frequencies == (1.0, 0.01)  # of the base 10,000
    assert found.rms_norm_eps == 1e-6
    assert not found.tie_word_embeddings


def test_a_folder_says_its_context(folder):
    assert Llama.load(folder).config.max_position_embeddings is None
    assert Llama.load(changed(folder, max_position_embeddings=7)).config.max_position_embeddings == 7


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_mistral_and_a_qwen2_are_written_as_they_were(tmp_path, kind):
    """With Mistral's none, and Qwen2's biases of q, k and v alone."""
    config = dataclasses.replace(
        tiny_llama().config, model_type=kind, attention_bias=kind == "qwen2", max_position_embeddings=9
    )
    rng = np.random.default_rng(1)
    model = Llama.build(config, {name: rng.standard_normal(s).astype("f4") for name, s in config.shapes().items()})
    save_llama(model, tmp_path / "m")
    again = Llama.load(tmp_path / "m")
    assert again.config == config
    biases = {name.split(".")[-2] for name in weights(tmp_path / "m") if name.endswith("bias")}
    assert biases == ({"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set())
    np.testing.assert_array_equal(again(IDS), model(IDS))


def llama3(f, factor=8.0, low=1.5, high=4.0, trained=100):
    """Llama 3's rule by the length of a turn, 2 pi / f, as its authors wrote it."""
    turn = 2 * math.pi / f
    if turn < trained / high:
        return f
    if turn > trained / low:
        return f / factor
    smooth = (trained / turn - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rotary_frequencies_are_scaled_as_they_say(folder, place):
    """The 16 pairs turn from 0.3 to 16 times over the length that was trained on."""
    sizes = {"head_dim": 32, "rope_theta": 100.0}
    plain = [100.0 ** (-i / 16) for i in range(16)]
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 100
    for rope, expected in (
        ({"rope_type": "linear", "factor": 4.0}, [f / 4 for f in plain]),
        ({"type": "linear", "factor": 4.0}, [f / 4 for f in plain]),
        ({"rope_type": "default"}, plain),
        (scaled, [llama3(f) for f in plain]),
    ):
        config = json.loads((changed(folder, **sizes) / "config.json").read_text()) | {place: rope}
        np.testing.assert_allclose(parse_config(folder, config).frequencies, expected, rtol=1e-12)
    assert {llama3(f) / f for f in plain} > {1.0, 1 / 8}


def test_a_base_may_stand_among_the_rotary_settings_too(folder):
    config = json.loads((folder / "config.json").read_text())
    for beside in ({}, {"rope_theta": 400.0}):
        del config["rope_theta"]
        config |= beside
        found = parse_config(folder, config | {"rope_parameters": {"rope_type": "default", "rope_theta": 400.0}})
        np.testing.assert_allclose(found.frequencies, [1.0, 1 / 20], rtol=1e-12)
        config["rope_theta"] = 400.0


LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 100,
}


def test_the_length_trained_on_may_stand_beside_the_rotary_settings(folder):
    config = json.loads((folder / "config.json").read_text())
    inside = parse_config(folder, config | {"rope_parameters": LLAMA3}).frequencies
    rope = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    beside = config | {"rope_parameters": rope, "original_max_position_embeddings": 100}
    assert parse_config(folder, beside).frequencies == inside
    assert parse_config(folder, beside | {"original_max_position_embeddings": 10}).frequencies != inside


@pytest.mark.parametrize(
    "harmless",
    [
        {"attention_dropout": 0.1, "pretraining_tp": 2, "max_position_embeddings": 3, "use_cache": False},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"attention_multiplier": 3.0, "logits_scaling": 2.0, "no_program_reads": {"this": 1}},
        {"layer_types": ["full_attention"] * 2, "per_layer_config": None, "is_causal": True},
        {"rope_scaling": None, "rope_parameters": {}, "architectures": None},
        {"original_max_position_embeddings": 3},
    ],
)
def test_settings_that_change_nothing_are_passed_over(folder, model, harmless):
    np.testing.assert_array_equal(Llama.load(changed(folder, **harmless))(IDS), model(IDS))


# --- what is not ----------------------------------------------------------------------------------

SETTINGS = {
    "another model": ({"model_type": "gemma"}, "model_type is 'gemma', supported: 'llama', 'mistral', 'qwen2'"),
    "another model's class": (
        {"architectures": ["MistralForCausalLM"]},
        r"architectures is \['MistralForCausalLM'\] and model_type 'llama': expected \['LlamaForCausalLM'\]",
    ),
    "no model type": ({"model_type": "absent"}, "model_type is None"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*Classification"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
    "a scaling it does not know": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    "an old file's scaling": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
    "a scaling without its factor": ({"rope_scaling": {"rope_type": "linear"}}, "there is no 'factor'"),
    "equal ends of a scaling": (
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0},
                "original_max_position_embeddings": 100,
            }
        },
        "high_freq_factor must be above low_freq_factor = 2.0, got 2.0",
    ),
    "a scaling that is no object": ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
    "a part of each head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "the same in version 5": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "a sliding window": ({"sliding_window": 4096}, "sliding_window is 4096, supported: None"),
    "a window of Mistral's": (
        {"model_type": "mistral", "architectures": None, "sliding_window": 8, "max_position_embeddings": 9},
        "sliding_window is 8 and max_position_embeddings 9, supported: no window, or one that reaches over as many",
    ),
    "a window that Mistral has by default": (
        {"model_type": "mistral", "architectures": None, "max_position_embeddings": 4097},
        "sliding_window is 4096 and max_position_embeddings 4097",
    ),
    "a window over an unknown context": (
        {"model_type": "mistral", "architectures": None},
        "sliding_window is 4096 and max_position_embeddings None",
    ),
    "a window that Qwen2 uses": (
        {
            **{"model_type": "qwen2", "architectures": None, "use_sliding_window": True},
            **{"sliding_window": 8, "max_position_embeddings": 9},
        },
        "sliding_window is 8 and max_position_embeddings 9",
    ),
    "a context that is a text": ({"max_position_embeddings": "9"}, "max_position_embeddings must be an integer"),
    "an encoder beside it": ({"is_encoder_decoder": True}, "is_encoder_decoder is True, supported: False"),
    "attention to an encoder": ({"add_cross_attention": True}, "add_cross_attention is True, supported: False"),
    "quantisation": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another scaling beside": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_scaling is {'type': 'linear', 'factor': 4.0} and rope_parameters is .*: expected one of the two",
    ),
    "an unknown scaling beside": (
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling is {'rope_type': 'yarn', 'factor': 4.0} and rope_parameters is",
    ),
    "another base beside": (
        {"rope_theta": 10.0, "rope_parameters": {"rope_theta": 400.0}},
        "rope_theta is 400.0 in the rotary settings and 10.0 beside them",
    ),
    "another length trained on beside": (
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 50},
        "original_max_position_embeddings is 100 in the rotary settings and 50 beside them",
    ),
    "two names of a scaling": (
        {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}},
        "rope_type is 'linear' in the rotary settings and 'default' beside them",
    ),
    "a scaling for each kind of layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
        "the rotary settings hold 'full_attention', one kind of layers",
    ),
    "attention both ways": ({"is_causal": False}, "is_causal is False, supported: True"),
    "attention of null": ({"is_causal": None}, "is_causal is None, supported: True"),
    "attention in chunks": ({"attention_chunk_size": 8}, "attention_chunk_size is 8, supported: None"),
    "layers of another kind": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"layer_types is \['full_attention', 'sliding_attention'\], supported: \['full_attention'\]",
    ),
    "layers of their own": ({"per_layer_config": {"0": {"head_dim": 2}}}, "per_layer_config is {'0'.*supported: None"),
    "shared keys": ({"kv_sharing_modes": ["store", "reuse"]}, "kv_sharing_modes is .*, supported: None"),
    "a decoder inside": ({"text_config": {"vocab_size": 3}}, "text_config is .*, supported: None"),
    "other weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    "a missing size": ({"hidden_size": "absent"}, "there is no 'hidden_size'"),
    "a size of another type": ({"hidden_size": "12"}, "hidden_size must be an integer, got '12'"),
    "a size of zero": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    "more layers than arrays": ({"num_hidden_layers": 10**8}, "100000000 layers"),
    "heads without end": ({"head_dim": 10**9}, "head_dim 1000000000"),
    "an odd head": ({"head_dim": 3}, "even head_dim"),
    "keys that do not divide the queries": ({"num_key_value_heads": 3}, "3 key-value heads"),
    "an eps of zero": ({"rms_norm_eps": 0}, "rms_norm_eps must be above 0"),
    "an eps that is a text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
    "a base of one": ({"rope_theta": 1}, "rope_theta must be above 1"),
    "a flag that is a text": ({"attention_bias": "no"}, "attention_bias must be True or False, got 'no'"),
    "biases that are not there": ({"mlp_bias": True}, "there is no 'model.layers.0.mlp.gate_proj.bias'"),
    "a vocabulary of another size": (
        {"vocab_size": 30},
        r"embed_tokens.weight' has shape \[29, 12\], expected \[30, 12\]",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_refused_by_name(folder, nothing_is_read, case):
    settings, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        Llama.load(changed(folder, **settings))


def spoiled(name, array):
    return lambda folder: with_weights(folder, weights(folder) | {name: array})


def without(name):
    return lambda folder: with_weights(folder, {k: a for k, a in weights(folder).items() if k != name})


def cut(length):
    def cut_file(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:length])
        return folder

    return cut_file


def no_config(folder):
    (folder / "config.json").unlink()
    return folder


DAMAGE = {
    "an array missing": (
        without("model.layers.1.mlp.up_proj.weight"),
        "there is no 'model.layers.1.mlp.up_proj.weight'",
    ),
    "the head missing": (without("lm_head.weight"), "there is no 'lm_head.weight'"),
    "an array too many": (
        spoiled("model.layers.0.self_attn.q_proj.bias", np.ones(16, "f4")),
        "there is 'model.layers.0.self_attn.q_proj.bias', which",
    ),
    "a layer too many": (
        spoiled("model.layers.2.input_layernorm.weight", np.ones(12, "f4")),
        "there is 'model.layers.2",
    ),
    "an array of another shape": (
        spoiled("model.norm.weight", np.ones(13, "f4")),
        r"has shape \[13\], expected \[12\]",
    ),
    "a quantised array": (spoiled("model.norm.weight", np.ones(12, "i1")), "has dtype I8, expected one of"),
    "a file cut short": (cut(1000), "safetensors"),
    "an empty file": (cut(0), "safetensors"),
    "no configuration": (no_config, "there is no such file"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(folder, nothing_is_read, case):
    damage, message = DAMAGE[case]
    with pytest.raises(ValueError, match=message):
        Llama.load(damage(folder))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    broken = weights(folder)["model.norm.weight"]
    broken[3] = value
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds NaN or infinity"):
        Llama.load(spoiled("model.norm.weight", broken)(folder))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_the_type_are_refused(folder, sign):
    """Finite in the file, and infinite in the type that was asked for; as large as it holds is not."""
    large = weights(folder)["model.norm.weight"].astype("f8")
    large[3] = sign * 1e300
    with_weights(folder, weights(folder) | {"model.norm.weight": large})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' reaches 1e\+300, which float32 cannot hold"):
        Llama.load(folder)
    assert Llama.load(folder, dtype="float64").model.norm.weight[3] == sign * 1e300
    large[3] = sign * float(np.finfo("f4").max)
    with_weights(folder, weights(folder) | {"model.norm.weight": large})
    assert Llama.load(folder).model.norm.weight[3] == large[3]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama", "model_type": "llama"}', '{"x": NaN}', "\xff"]
)
def test_a_damaged_configuration_is_one_clear_error(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        Llama.load(folder)


def test_other_arguments_are_refused_by_name(folder, tmp_path):
    for dtype in ("float16", "int8", 3, None):
        with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got"):
            Llama.load(folder, dtype=dtype)
    with pytest.raises(TypeError, match="backend must be a Backend"):
        Llama.load(folder, backend="numpy")
    for nowhere in ("model.bin", "model.gguf", "model.npz", "folder"):
        with pytest.raises(ValueError, match=rf"{nowhere}': there is no such file"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "4 attention heads, 3 key-value heads, head_dim 4: expected groups of one size"),
        ({"head_dim": 3}, "head_dim 3: expected groups of one size and an even head_dim"),
        ({"head_dim": 6}, "there are 2 frequencies, expected 3: head_dim is 6"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model.config, **change)


# --- glassllm's format ----------------------------------------------------------------------------


def interleaved(weight, D):
    """Rows in the order of a model that pairs neighbours."""
    heads = weight.reshape(-1, D, *weight.shape[1:])
    order = np.arange(D).reshape(2, D // 2).T.ravel()
    return heads[:, order].reshape(weight.shape)


def write_npz(path, **changes):
    """A decoder in glassllm's layout; returned as the arrays of ours."""
    rng = np.random.default_rng(0)
    d, kv, m, V = 8, 4, 5, 20  # two heads of 4 over one key
    sizes = {
        "vocab_size": V,
        "d_model": d,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "rope_base": 100.0,
        "eps": 1e-5,
    }
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


def test_glassllms_matrices_are_turned_and_reordered(tmp_path):
    ours = write_npz(tmp_path / "en.npz")
    found = Llama.load(tmp_path / "en.npz", dtype="float64")
    for name, array in ours.items():
        np.testing.assert_array_equal(found.trainable()[name], array)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.config.frequencies == (1.0, 0.1)


NPZ_DAMAGE = {
    "no configuration": ({"__config__": None}, "there is no __config__"),
    "a configuration that is no JSON": ({"__config__": np.array("{")}, "__config__ is not sound JSON"),
    "a configuration without sizes": ({"__config__": np.array("{}")}, "there is no 'vocab_size'"),
    "an array missing": ({"blocks.1.attn.W_O": None}, "there is no 'model.layers.1.self_attn.o_proj.weight'"),
    "an array too many": ({"blocks.1.attn.W_X": np.ones(3)}, "there is 'blocks.1.attn.W_X', which"),
    "an array of another shape": ({"blocks.1.attn.W_O": np.ones((8, 7))}, r"has shape \[7, 8\], expected \[8, 8\]"),
    "objects": ({"E": np.array([{}, []], dtype=object)}, "not a sound .npz file: .*pickle"),
    "texts": ({"norm_f.gamma": np.array(["x"] * 8)}, "norm.weight"),
}


@pytest.mark.parametrize("case", NPZ_DAMAGE)
def test_a_damaged_npz_is_one_clear_error(tmp_path, case):
    changes, message = NPZ_DAMAGE[case]
    path = tmp_path / "en.npz"
    write_npz(path, **changes)
    with pytest.raises(ValueError, match=message):
        Llama.load(path)


def test_a_cut_npz_is_refused(tmp_path):
    path = tmp_path / "en.npz"
    write_npz(path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"not a sound \.npz file"):
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


@pytest.mark.parametrize("name", ["README.txt", "E2.npy", "folder/"])
def test_a_member_of_an_npz_must_be_an_array(tmp_path, name):
    write_npz(tmp_path / "en.npz")
    with zipfile.ZipFile(tmp_path / "en.npz", "a") as file:
        file.writestr(name, b"" if name.endswith("/") else b"read me")
    with pytest.raises(
        ValueError, match=rf"en.npz': not a sound .npz file: ValueError: '{name.split('.npy')[0]}.*no array"
    ):
        Llama.load(tmp_path / "en.npz")


@pytest.mark.parametrize("name", ["E", "model.embed_tokens.weight"])
def test_an_array_that_stands_twice_is_refused(tmp_path, name):
    """Under one name, or under glassllm's and transformers': nothing says which is meant."""
    path = tmp_path / "en.npz"
    write_npz(path)
    embedding = np.load(path)["E"]
    with zipfile.ZipFile(path, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with file.open(f"{name}.npy", "w") as member:
            np.save(member, 2 * embedding)
    with pytest.raises(ValueError, match="'E.npy' stands twice" if name == "E" else "have the same name"):
        Llama.load(path)
