"""Decoders' configurations from config.json, and settings that are refused by name."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import LlamaConfig
from minilora.language.config import MODEL_KINDS, SUPPORTED, SUPPORTED_QUANTIZATION, MixtureConfig, from_json
from minilora.texts import FileRefused

from ..support.compare import refused
from ..support.language import tiny_llama, tiny_mixture

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 29, "hidden_size": 12,
    "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 100,
}
OTHER = {"something": "else"}
"""A value that no setting supports."""


def parsed(**changes) -> LlamaConfig:
    """Return the configuration in a config.json with these changes; "absent" removes a setting."""
    settings = CONFIG | changes
    return from_json(Path("config.json"), {name: value for name, value in settings.items() if value != "absent"})


def test_a_window_over_the_whole_context_changes_nothing():
    """The token at the last of W positions sees itself and the W - 1 before it, which is all of them."""
    for kind in ("mistral", "qwen2"):
        asked = {"model_type": kind, "architectures": None, "use_sliding_window": True, "sliding_window": 8}
        assert parsed(**asked, max_position_embeddings=8).max_position_embeddings == 8


def test_missing_settings_have_transformers_defaults():
    names = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    found = parsed(**dict.fromkeys(names, "absent"), num_attention_heads=3)
    assert (found.head_dim, found.num_key_value_heads, found.rms_norm_eps) == (4, 3, 1e-6)
    assert found.frequencies == (1.0, 0.01)  # of the base 10,000
    assert not found.tie_word_embeddings
    assert found.max_position_embeddings is None
    assert parsed(max_position_embeddings=7).max_position_embeddings == 7
    assert len(parsed(head_dim=1 << 16).frequencies) == 1 << 15


def test_missing_numbers_of_heads_are_those_of_the_kind():
    keys = {"llama": 32, "mistral": 8, "qwen2": 32, "qwen3": 32, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4}
    bare = {"architectures": None, "num_key_value_heads": "absent", "head_dim": "absent", "sliding_window": None}
    for kind, count in keys.items():
        found = parsed(model_type=kind, hidden_size=64, num_attention_heads=32, **bare)
        assert (found.num_key_value_heads, found.head_dim) == (count, 128 if kind == "qwen3" else 2)


def test_rotary_settings_may_be_in_two_places():
    for beside in ("absent", 400.0):
        found = parsed(rope_parameters={"rope_type": "default", "rope_theta": 400.0}, rope_theta=beside)
        np.testing.assert_allclose(found.frequencies, [1.0, 1 / 20], rtol=1e-12)
    inside = parsed(rope_parameters=LLAMA3).frequencies
    rope = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    assert parsed(rope_parameters=rope, original_max_position_embeddings=100).frequencies == inside
    assert parsed(rope_parameters=rope, original_max_position_embeddings=10).frequencies != inside


def llama3(f, factor=8.0, low=1.5, high=4.0, trained=100):
    """Return Llama 3's frequencies by its authors' formula, which uses the wavelength 2 pi / f."""
    turn = 2 * math.pi / f
    if turn < trained / high:
        return f
    if turn > trained / low:
        return f / factor
    smooth = (trained / turn - low) / (high - low)
    return (1 - smooth) * f / factor + smooth * f


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_rotary_frequencies_are_scaled_as_the_settings_say(place):
    """The 16 pairs rotate 0.3 to 16 times over the original context."""
    plain = [100.0 ** (-i / 16) for i in range(16)]
    for rope, expected in (
        ({"rope_type": "linear", "factor": 4.0}, [f / 4 for f in plain]),
        ({"type": "linear", "factor": 4.0}, [f / 4 for f in plain]),
        ({"rope_type": "default"}, plain),
        (LLAMA3 | {"low_freq_factor": 1.5}, [llama3(f) for f in plain]),
    ):
        np.testing.assert_allclose(parsed(head_dim=32, **{place: rope}).frequencies, expected, rtol=1e-12)
    assert {llama3(f) / f for f in plain} > {1.0, 1 / 8}


HARMLESS = [
    {"attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False},
    {"use_sliding_window": True, "max_window_layers": 1},
    {"attention_multiplier": 3.0, "logits_scaling": 2.0, "no_program_reads": {"this": 1}},
    {"layer_types": ["full_attention"] * 2, "per_layer_config": None, "is_causal": True},
    {"per_layer_config": {}},
    {"rope_scaling": None, "rope_parameters": {}, "architectures": None},
    {"original_max_position_embeddings": 3},
]


def test_settings_that_change_nothing_are_ignored():
    for harmless in HARMLESS:
        assert parsed(**harmless) == parsed()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_window_over_the_whole_context_may_have_its_layers(kind):
    """transformers 5 writes the kind of each layer."""
    whole = {"model_type": kind, "architectures": None, "max_position_embeddings": 9}
    types = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 9}
    assert parsed(**whole, **types, max_window_layers=1) == parsed(**whole)


MISTRAL = {"model_type": "mistral", "architectures": None}
WINDOW = {"sliding_window": 8, "max_position_embeddings": 9}
READ = "'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen2_moe', 'qwen3_moe'"
NO_WINDOW = "supported: no window, or one that is at least as long"
GROUPS = "expected key-value heads that divide the attention heads, and an even head_dim"
ONE_OF_TWO = "expected only one of them, since it depends on the version of transformers which one is used"
SETTINGS = [
    ({"architectures": ["MistralForCausalLM"]},
     "architectures is ['MistralForCausalLM'], expected ['LlamaForCausalLM'] for model_type 'llama'"),
    ({"model_type": "absent"}, f"model_type is None, supported: {READ}"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu', 'swish'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     "rope_type is 'yarn', supported: 'default', 'linear', 'llama3'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}},
     "rope_type is 'dynamic', supported: 'default', 'linear', 'llama3'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "there is no 'factor'"),
    ({"rope_scaling": [1]}, "rope_scaling is [1], expected an object"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
     "high_freq_factor must be above low_freq_factor = 4.0, got 4.0"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, supported: 1"),
    ({"sliding_window": 4096}, "sliding_window is 4096, supported: None"),
    (MISTRAL | WINDOW, f"sliding_window is 8 and max_position_embeddings 9, {NO_WINDOW}"),
    (MISTRAL | {"max_position_embeddings": 4097},
     f"sliding_window is 4096 and max_position_embeddings 4097, {NO_WINDOW}"),
    (MISTRAL, f"sliding_window is 4096 and max_position_embeddings None, {NO_WINDOW}"),
    (WINDOW | {"model_type": "qwen2", "architectures": None, "use_sliding_window": True},
     f"sliding_window is 8 and max_position_embeddings 9, {NO_WINDOW}"),
    (MISTRAL | {"sliding_window": "8"}, "sliding_window must be an integer, got '8'"),
    (WINDOW | {"model_type": "qwen2", "architectures": None, "use_sliding_window": 1},
     "use_sliding_window must be True or False, got 1"),
    ({"max_position_embeddings": "9"}, "max_position_embeddings must be an integer, got '9'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quant_method is None, supported: 'bitsandbytes'"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope_scaling is {'type': 'linear', 'factor': 4.0} and rope_parameters is {'rope_type': 'linear', "
     f"'factor': 2.0}}: {ONE_OF_TWO}"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     "rope_scaling is {'rope_type': 'yarn', 'factor': 4.0} and rope_parameters is {'rope_type': 'default'}: "
     f"{ONE_OF_TWO}"),
    ({"rope_theta": 10.0, "rope_parameters": {"rope_theta": 400.0}},
     "rope_theta is 400.0 in the rotary settings and 10.0 outside them"),
    ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 50},
     "original_max_position_embeddings is 100 in the rotary settings and 50 outside them"),
    ({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}},
     "rope_type is 'linear' in the rotary settings and 'default' outside them"),
    ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
     "the rotary settings contain 'full_attention', a group for some layers: expected one for all layers"),
    ({"layer_types": ["full_attention", "sliding_attention"]},
     "layer_types is ['full_attention', 'sliding_attention'], supported without a sliding window: 'full_attention'"),
    ({"model_type": "qwen2", "architectures": None, "layer_types": ["sliding_attention"], "use_sliding_window": False}
     | WINDOW, "layer_types is ['sliding_attention'], supported without a sliding window: 'full_attention'"),
    ({"model_type": "qwen3", "architectures": None, "layer_types": ["sliding_attention"], "use_sliding_window": True}
     | WINDOW, f"sliding_window is 8 and max_position_embeddings 9, {NO_WINDOW}"),
    ({"hidden_size": "absent"}, "there is no 'hidden_size'"),
    ({"hidden_size": "12"}, "hidden_size must be an integer, got '12'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    ({"head_dim": 10**9}, "head_dim is 1000000000, expected at most 65536"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be above 0 and finite, got 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number, got '1e-5'"),
    ({"rope_theta": 1}, "rope_theta must be above 1 and finite, got 1"),
    ({"attention_bias": "no"}, "attention_bias must be True or False, got 'no'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_a_setting_is_refused_by_name(settings, message):
    with refused(f"'config.json': {message}"):
        parsed(**settings)


NOT_IMPLEMENTED = {
    "hidden_act": "gelu", "partial_rotary_factor": 0.5, "is_causal": False, "attention_chunk_size": 8,
    "layer_types": "chunked_attention", "kv_sharing_modes": ["store", "reuse"],
    "per_layer_config": {"0": {"head_dim": 2}}, "text_config": {"vocab_size": 3}, "decoder": {"vocab_size": 3},
    "generator": {"vocab_size": 3}, "is_encoder_decoder": True, "add_cross_attention": True,
    "compression_config": {"bits": 4}, "fusion_config": {"a": "b"}, "transformers_weights": "other.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_a_setting_accepts_only_its_supported_values(name):
    for value in SUPPORTED[name]:
        window = MISTRAL | {"sliding_window": 9, "max_position_embeddings": 9} if value == "sliding_attention" else {}
        assert parsed(**window, **{name: [value] if name == "layer_types" else value}) == parsed(**window)
    for other in (NOT_IMPLEMENTED[name], OTHER, *([] if None in SUPPORTED[name] else [None])):
        with pytest.raises(FileRefused, match=re.escape(f"{name} is {other!r}, supported: ")):
            parsed(**{name: other})


@pytest.mark.parametrize("name", SUPPORTED_QUANTIZATION)
def test_a_quantisation_setting_accepts_only_its_supported_values(name):
    sound = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for value in SUPPORTED_QUANTIZATION[name]:
        assert parsed(quantization_config=sound | {name: value}) == parsed()
    with pytest.raises(FileRefused, match=rf"quantization_config: {name} is {OTHER}, supported: "):
        parsed(quantization_config=sound | {name: OTHER})


def test_each_kind_of_model_needs_its_own_class():
    names = {kind.architecture for kind in MODEL_KINDS.values()}
    for value, kind in MODEL_KINDS.items():
        for classes in ([kind.architecture], [], None):
            found = parsed(model_type=value, architectures=classes, max_position_embeddings=9)
            assert found.model_type == value
        for other in {*names, "GemmaForCausalLM"} - {kind.architecture}:
            with pytest.raises(FileRefused, match=r"architectures is \["):
                parsed(model_type=value, architectures=[other])


def test_other_kinds_are_refused_with_the_supported_ones_named():
    for kind in ("gemma", "gemma2", "phi3", "gpt2", "mistral3", "llama4", "deepseek_v3", "gpt_oss", "olmoe", None, []):
        with pytest.raises(FileRefused, match=re.escape(f"model_type is {kind!r}, supported: {READ}")):
            parsed(model_type=kind)


# --- mixtures ---

KINDS_OF_MIXTURE = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}


def of_mixture(kind, **changes):
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7}
    return parsed(**{"model_type": kind, "architectures": None, KINDS_OF_MIXTURE[kind]: 4} | sizes | changes)


def test_a_quantised_mixture_is_refused():
    with pytest.raises(FileRefused, match="quantization_config is"):
        of_mixture("mixtral", quantization_config={"quant_method": "bitsandbytes"})


def test_both_spellings_of_the_number_of_experts_are_read():
    for kind in ("mixtral", "qwen3_moe"):
        neither = dict.fromkeys(("num_experts", "num_local_experts"), "absent")
        for name in neither:
            assert of_mixture(kind, **neither | {name: 5}).mixture.num_experts == 5
        said = "expected only one of them, since it depends on the kind of model which one is used"
        with refused(f"'config.json': num_experts is 4 and num_local_experts 5: {said}"):
            of_mixture(kind, num_experts=4, num_local_experts=5)


def test_missing_mixture_settings_have_transformers_defaults():
    bare = {"architectures": None, "rope_theta": "absent", "rms_norm_eps": "absent"}
    found = [parsed(model_type=kind, **bare) for kind in KINDS_OF_MIXTURE]
    assert [config.mixture for config in found] == [
        MixtureConfig(8, 2, CONFIG["intermediate_size"]),
        MixtureConfig(60, 4, 1408, norm_topk_prob=False, shared_expert_intermediate_size=5632),
        MixtureConfig(128, 8, 768, norm_topk_prob=False),
    ]
    assert [config.rms_norm_eps for config in found] == [1e-5, 1e-6, 1e-6]
    assert [config.rope["rope_theta"] for config in found] == [1e6, 1e4, 1e4]
    assert [config.attention_bias for config in found] == [False, True, False]


def test_layers_without_a_mixture_are_the_same_as_in_transformers():
    found = of_mixture("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3, 9])
    mixed = [layer for layer in range(6) if f"model.layers.{layer}.mlp.gate.weight" in found.shapes()]
    assert mixed == [1, 5]
    assert "model.layers.0.mlp.gate_proj.weight" in found.shapes()


# --- sizes of one's own ---

V, T = ValueError, TypeError
SIZES = [
    (V, "llama", {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
    (V, "llama", {"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    (T, "llama", {"head_dim": 2.0}, "head_dim must be an integer, got 2.0"),
    (V, "llama", {"head_dim": 3},
     "4 attention heads, 2 key-value heads, head_dim 3: " + GROUPS),
    (V, "llama", {"head_dim": 6}, "there are 2 frequencies, expected head_dim / 2 = 3"),
    (V, "llama", {"head_dim": 2}, "there are 2 frequencies, expected head_dim / 2 = 1"),
    (V, "llama", {"num_key_value_heads": 3},
     "4 attention heads, 3 key-value heads, head_dim 4: " + GROUPS),
    (V, "llama", {"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0 and finite, got 0.0"),
    (V, "llama", {"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
    (T, "llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be True or False, got 'no'"),
    (T, "llama", {"attention_bias": 1}, "attention_bias must be True or False, got 1"),
    (T, "llama", {"mlp_bias": None}, "mlp_bias must be True or False, got None"),
    (V, "llama", {"model_type": "gemma"},
     "model_type must be 'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen2_moe' or 'qwen3_moe', got 'gemma'"),
    (V, "llama", {"model_type": "qwen2"}, "attention_bias must be True for a qwen2, got False"),
    (V, "llama", {"model_type": "mistral", "mlp_bias": True}, "mlp_bias must be False for a mistral, got True"),
    (V, "llama", {"mixture": MixtureConfig(4, 2, 5)},
     "mixture must be None for a llama, got ~"),
    (T, "mixtral", {"mixture": None}, "mixture must be a MixtureConfig, got NoneType"),
    (V, "mixtral", {"mixture": MixtureConfig(4, 2, 5, norm_topk_prob=False)},
     "a mixtral has norm_topk_prob, no shared expert and mixtures in all layers, got ~"),
    (V, "mixtral", {"mixture": MixtureConfig(4, 2, 5, mlp_only_layers=(0,))},
     "a mixtral has norm_topk_prob, no shared expert and mixtures in all layers, got ~"),
    (V, "mixtral", {"attention_bias": True}, "attention_bias must be False for a mixtral, got True"),
    (V, "qwen2_moe", {"mixture": MixtureConfig(4, 2, 5)},
     "a qwen2_moe must have a shared expert, and other kinds must not, got ~ for a qwen2_moe"),
    (V, "qwen3_moe", {"mixture": MixtureConfig(4, 2, 5, shared_expert_intermediate_size=3)},
     "a qwen2_moe must have a shared expert, and other kinds must not, got ~ for a qwen3_moe"),
    (V, "mixture", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
    (V, "mixture", {"num_experts_per_tok": 5}, "num_experts_per_tok must be at most 4, got 5"),
    (V, "mixture", {"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1, got 0"),
    (T, "mixture", {"norm_topk_prob": "yes"}, "norm_topk_prob must be True or False, got 'yes'"),
    (V, "mixture", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be at least 1, got 0"),
    (V, "mixture", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1, got 0"),
    (V, "mixture", {"mlp_only_layers": (-1,)}, "mlp_only_layers[0] must be at least 0, got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind", "change", "said"), SIZES)
def test_sizes_that_do_not_fit_together_are_refused(error, kind, change, said):
    sound = {"llama": tiny_llama, "mixture": lambda: SimpleNamespace(config=MixtureConfig(4, 2, 5))}
    config = sound.get(kind, lambda: tiny_mixture(kind))().config
    with pytest.raises(error) as refused:
        dataclasses.replace(config, **change)
    mixture = str(change.get("mixture") or "~")
    assert str(refused.value).replace(mixture, "~") == said
