"""What config.json says of a decoder, and what is refused by its name."""

import json
import math
import re

import numpy as np
import pytest

from minilora import Llama
from minilora.checks import FileRefused
from minilora.files.tensors import TensorFile
from minilora.language.config import KINDS, MUST, QUANTIZATION_MUST, from_json

from ..support.language import tiny_llama, write_folder

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

    monkeypatch.setattr(TensorFile, "read", read)


def changed(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "absent"}))
    return folder


def test_what_a_configuration_leaves_out_is_as_usual(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del config[name]
    found = from_json(path, config | {"num_attention_heads": 3})
    assert (found.head_dim, found.num_key_value_heads) == (4, 3)
    assert found.frequencies == (1.0, 0.01)  # of the base 10,000
    assert found.rms_norm_eps == 1e-6
    assert not found.tie_word_embeddings


def test_a_folder_says_its_context(folder):
    assert Llama.load(folder).config.max_position_embeddings is None
    assert Llama.load(changed(folder, max_position_embeddings=7)).config.max_position_embeddings == 7


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
        np.testing.assert_allclose(from_json(folder, config).frequencies, expected, rtol=1e-12)
    assert {llama3(f) / f for f in plain} > {1.0, 1 / 8}


def test_a_base_may_stand_among_the_rotary_settings_too(folder):
    config = json.loads((folder / "config.json").read_text())
    for beside in ({}, {"rope_theta": 400.0}):
        del config["rope_theta"]
        config |= beside
        found = from_json(folder, config | {"rope_parameters": {"rope_type": "default", "rope_theta": 400.0}})
        np.testing.assert_allclose(found.frequencies, [1.0, 1 / 20], rtol=1e-12)
        config["rope_theta"] = 400.0


LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 100,
}


def test_the_length_trained_on_may_stand_beside_the_rotary_settings(folder):
    config = json.loads((folder / "config.json").read_text())
    inside = from_json(folder, config | {"rope_parameters": LLAMA3}).frequencies
    rope = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    beside = config | {"rope_parameters": rope, "original_max_position_embeddings": 100}
    assert from_json(folder, beside).frequencies == inside
    assert from_json(folder, beside | {"original_max_position_embeddings": 10}).frequencies != inside


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
        r"layer_types is \['full_attention', 'sliding_attention'\], supported: 'full_attention'",
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


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama", "model_type": "llama"}', '{"x": NaN}', "\xff"]
)
def test_a_damaged_configuration_is_one_clear_error(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        Llama.load(folder)


# --- the values that are implemented ---

OTHER = {"something": "else"}
"""A value that no setting supports."""


@pytest.fixture
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", [name for name in MUST if name != "model_type"])
def test_a_setting_has_its_values_and_no_other(tmp_path, config, name):
    expected = from_json(tmp_path, config)
    for value in MUST[name]:
        assert from_json(tmp_path, config | {name: [value] if name == "layer_types" else value}) == expected
    with pytest.raises(FileRefused, match=rf"{name} is {OTHER}, supported: "):
        from_json(tmp_path, config | {name: OTHER})


@pytest.mark.parametrize("name", QUANTIZATION_MUST)
def test_a_setting_of_quantisation_has_its_values_and_no_other(tmp_path, config, name):
    sound = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for value in QUANTIZATION_MUST[name]:
        from_json(tmp_path, config | {"quantization_config": sound | {name: value}})
    with pytest.raises(FileRefused, match=rf"quantization_config: {name} is {OTHER}, supported: "):
        from_json(tmp_path, config | {"quantization_config": sound | {name: OTHER}})


def test_each_kind_of_model_and_its_class_is_one(tmp_path, config):
    config |= {"max_position_embeddings": 9}
    names = [kind.architecture for kind in KINDS.values()]
    for value, kind in KINDS.items():
        for named in ([kind.architecture], [], None):
            assert from_json(tmp_path, config | {"model_type": value, "architectures": named}).model_type == value
        for other in {*names, "GemmaForCausalLM"} - {kind.architecture}:
            with pytest.raises(FileRefused, match=r"architectures is \["):
                from_json(tmp_path, config | {"model_type": value, "architectures": [other]})


def test_other_kinds_are_refused_with_those_that_are_read(tmp_path, config):
    for kind in ("gemma", "gemma2", "phi3", "gpt2", "mistral3", "llama4", "deepseek_v3", "gpt_oss", "olmoe", None, []):
        read = "'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen2_moe', 'qwen3_moe'"
        said = re.escape(f"model_type is {kind!r}, supported: {read}")
        with pytest.raises(FileRefused, match=said):
            from_json(tmp_path, config | {"model_type": kind})
    del config["model_type"]
    with pytest.raises(FileRefused, match="model_type is None, supported: 'llama'"):
        from_json(tmp_path, config)


KINDS_OF_MIXTURE = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7}


def of_mixture(config, kind, **changes):
    return config | {"model_type": kind, "architectures": None, KINDS_OF_MIXTURE[kind]: 4} | SIZES | changes


def test_a_quantised_mixture_is_refused(tmp_path, config):
    with pytest.raises(FileRefused, match="quantization_config is"):
        from_json(tmp_path, of_mixture(config, "mixtral", quantization_config={"quant_method": "bitsandbytes"}))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_both_spellings_of_the_number_of_experts_are_read(tmp_path, config, kind):
    sound = of_mixture(config, kind)
    del sound[KINDS_OF_MIXTURE[kind]]
    for name in ("num_experts", "num_local_experts"):
        assert from_json(tmp_path, sound | {name: 5}).mixture.num_experts == 5
    with pytest.raises(FileRefused, match="num_experts is 4 and num_local_experts 5: expected one of the two"):
        from_json(tmp_path, sound | {"num_experts": 4, "num_local_experts": 5})


def test_what_a_mixtures_file_does_not_say_is_as_in_transformers(tmp_path, config):
    bare = {name: value for name, value in config.items() if name not in ("rope_theta", "rms_norm_eps")}
    found = {}
    for kind in KINDS_OF_MIXTURE:
        found[kind] = from_json(tmp_path, bare | {"model_type": kind, "architectures": None, "rope_scaling": None})
    sizes = {kind: (c.mixture.num_experts, c.mixture.num_experts_per_tok) for kind, c in found.items()}
    assert sizes == {"mixtral": (8, 2), "qwen2_moe": (60, 4), "qwen3_moe": (128, 8)}
    assert [c.rms_norm_eps for c in found.values()] == [1e-5, 1e-6, 1e-6]
    assert [c.mixture.norm_topk_prob for c in found.values()] == [True, False, False]
    assert [c.rope["rope_theta"] for c in found.values()] == [1e6, 1e4, 1e4]
    assert found["qwen2_moe"].attention_bias is True


def test_layers_without_a_mixture_are_those_that_transformers_leaves_out(tmp_path, config):
    config |= {"num_hidden_layers": 6}
    changes = {"decoder_sparse_step": 2, "mlp_only_layers": [3, 9]}
    found = from_json(tmp_path, of_mixture(config, "qwen3_moe", **changes))
    mixed = [layer for layer in range(6) if f"model.layers.{layer}.mlp.gate.weight" in found.shapes()]
    assert mixed == [1, 5]
    assert "model.layers.0.mlp.gate_proj.weight" in found.shapes()
