"""The table of a decoder's settings is true: what it binds is bound, and what it says does nothing does nothing."""

import json
import re
from collections import Counter

import pytest
from minilora.language.modelfiles.supportedsettings import (
    FOLDER,
    FOLDER_TOKENIZER,
    GGUF,
    GGUF_TOKENIZER,
    MIXTURE,
    QUANTIZATION,
    ROPE,
    check_settings,
    gguf_settings,
    rows,
)

from minilora.checks import FileRefused
from minilora.language.config import from_json

from ...support.language import tiny_llama, write_folder

TABLES = {
    "folder": FOLDER,
    "its mixtures": MIXTURE,
    "its quantisation": QUANTIZATION,
    "tokenizer": FOLDER_TOKENIZER,
    "rope": ROPE,
    "gguf": GGUF,
    "its tokenizer": GGUF_TOKENIZER,
}
OTHER = {"something": "else"}
"""A value that no setting supports."""


@pytest.fixture
def config(tmp_path):
    return json.loads((write_folder(tmp_path / "m", tiny_llama()) / "config.json").read_text())


def named(settings):
    return pytest.mark.parametrize("setting", settings, ids=lambda setting: setting.name)


KINDS = ("model_type", "architectures")
"""Settings whose values are kinds of model, each with a decoder of its own."""


@named([setting for setting in FOLDER if setting.only and setting.name not in KINDS])
def test_a_bound_setting_has_its_values_and_no_other(tmp_path, config, setting):
    expected = from_json(tmp_path, config)
    for value in setting.only:
        if not setting.every or value in (None, []):
            assert from_json(tmp_path, config | {setting.name: value}) == expected
        else:
            assert from_json(tmp_path, config | {setting.name: [value]}) == expected
    with pytest.raises(FileRefused, match=rf"{setting.name} is {OTHER}, supported: "):
        from_json(tmp_path, config | {setting.name: OTHER})


def test_each_kind_of_model_and_its_class_is_one(tmp_path, config):
    kind, classes = (next(s for s in FOLDER if s.name == name) for name in KINDS)
    config |= {"max_position_embeddings": 9}
    names = classes.only[: len(kind.only)]
    for value, its_class in zip(kind.only, names, strict=True):
        for named in ([its_class], [], None):
            assert from_json(tmp_path, config | {"model_type": value, "architectures": named}).model_type == value
        others = [name for name in (*names, "GemmaForCausalLM") if name != its_class]
        for other in others:
            with pytest.raises(FileRefused, match=r"architectures is \["):
                from_json(tmp_path, config | {"model_type": value, "architectures": [other]})


def test_other_kinds_are_refused_with_those_that_are_read(tmp_path, config):
    for kind in ("gemma", "gemma2", "phi3", "gpt2", "mistral3", "llama4", "deepseek_v3", "gpt_oss", "olmoe", None, []):
        read = "'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral', 'qwen2_moe', 'qwen3_moe'"
        said = re.escape(f"model_type is {kind!r}, supported: {read}")
        with pytest.raises(FileRefused, match=said):
            from_json(tmp_path, config | {"model_type": kind})


@named([setting for setting in FOLDER if setting.does.startswith("nothing")])
def test_a_setting_that_does_nothing_may_be_anything(tmp_path, config, setting):
    assert from_json(tmp_path, config | {setting.name: OTHER}) == parse_config(tmp_path, config)


READ = [s for s in FOLDER if not s.only and "read" in s.does and s.name != "eos_token_id"]


@named(READ)
def test_a_setting_that_is_read_is_looked_at(tmp_path, config, setting):
    llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
    if setting.name == "original_max_position_embeddings":
        config |= {"rope_parameters": llama3}
    if setting.does.endswith("of qwen2"):
        config |= {"model_type": "qwen2", "architectures": None}
    with pytest.raises(FileRefused, match=f"{setting.name} "):
        from_json(tmp_path, config | {setting.name: ["something"]})


KINDS_OF_MIXTURE = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7}


def of_mixture(config, kind, **changes):
    return config | {"model_type": kind, "architectures": None, KINDS_OF_MIXTURE[kind]: 4} | SIZES | changes


@named([setting for setting in MIXTURE if "read" in setting.does])
def test_a_mixtures_setting_that_is_read_is_looked_at(tmp_path, config, setting):
    kind = "qwen2_moe" if "qwen2_moe" in setting.does.partition(";")[0] else "qwen3_moe"
    with pytest.raises(FileRefused, match=f"{setting.name} "):
        from_json(tmp_path, of_mixture(config, kind, **{setting.name: {"something": "else"}}))


@pytest.mark.parametrize("kind", KINDS_OF_MIXTURE)
@named([setting for setting in MIXTURE if setting.does.startswith("nothing")])
def test_a_mixtures_setting_that_does_nothing_may_be_anything(tmp_path, config, kind, setting):
    sound = of_mixture(config, kind)
    assert from_json(tmp_path, sound | {setting.name: OTHER}) == parse_config(tmp_path, sound)


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


@named([setting for setting in GGUF if setting.only])
def test_a_bound_field_has_its_values_and_no_other(tmp_path, setting):
    sound = {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    for value in setting.only:
        check_settings(tmp_path, gguf_settings("llama"), sound | {setting.name: value})
    with pytest.raises(FileRefused, match=rf"{setting.name} is {OTHER}, supported: "):
        check_settings(tmp_path, GGUF, sound | {setting.name: OTHER})


def test_the_fields_of_a_qwen2_are_named_after_it():
    names = {setting.name for setting in gguf_settings("qwen2")}
    assert {"qwen2.block_count", "general.architecture"} < names
    assert not any(name.startswith("llama.") for name in names)


@pytest.mark.parametrize("setting", [s for s in (*FOLDER, *GGUF) if s.needed], ids=lambda setting: setting.name)
def test_a_setting_that_is_needed_is_missed(tmp_path, setting):
    with pytest.raises(FileRefused, match=f"{setting.name} is None|there is no {setting.name}"):
        check_settings(tmp_path, [setting], {})


@pytest.mark.parametrize("table", TABLES)
def test_a_table_names_each_setting_once(table):
    assert max(Counter(setting.name for setting in TABLES[table]).values()) == 1
    for name, values, does in rows(TABLES[table]):
        assert all((name, values, does))
