"""What the page about models' files says of a setting is so: what is read is looked at, and nothing is nothing."""

import json
import sys
from pathlib import Path

import pytest

from minilora.checks import FileRefused
from minilora.language.config import from_json

from ..support.language import tiny_llama, write_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import modelsettings

OTHER = {"something": "else"}
KINDS_OF_MIXTURE = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7}


@pytest.fixture
def config(tmp_path):
    return json.loads((write_folder(tmp_path / "m", tiny_llama()) / "config.json").read_text())


def of_mixture(config, kind, **changes):
    return config | {"model_type": kind, "architectures": None, KINDS_OF_MIXTURE[kind]: 4} | SIZES | changes


def that(table, says):
    does, must = modelsettings.TABLES[table]
    return pytest.mark.parametrize("name", [name for name, text in does.items() if says(text) and name not in must])


@that("config.json", lambda text: text.startswith("nothing"))
def test_a_setting_that_does_nothing_may_be_anything(tmp_path, config, name):
    assert from_json(tmp_path, config | {name: OTHER}) == from_json(tmp_path, config)


@that("config.json", lambda text: "read" in text and not text.startswith("the tokens"))
def test_a_setting_that_is_read_is_looked_at(tmp_path, config, name):
    if name == "original_max_position_embeddings":
        llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
        config |= {"rope_parameters": llama3}
    if name == "use_sliding_window":
        config |= {"model_type": "qwen2", "architectures": None, "sliding_window": 4}
    with pytest.raises(FileRefused, match=f"{name} "):
        from_json(tmp_path, config | {name: ["something"]})


@pytest.mark.parametrize("kind", KINDS_OF_MIXTURE)
@that("config.json, of a mixture", lambda text: text.startswith("nothing"))
def test_a_mixtures_setting_that_does_nothing_may_be_anything(tmp_path, config, kind, name):
    sound = of_mixture(config, kind)
    assert from_json(tmp_path, sound | {name: OTHER}) == from_json(tmp_path, sound)


@that("config.json, of a mixture", lambda text: "read" in text)
def test_a_mixtures_setting_that_is_read_is_looked_at(tmp_path, config, name):
    kind = "qwen3_moe" if name == "num_local_experts" else "qwen2_moe"
    said = {"qkv_bias": "attention_bias", "mlp_only_layers": r"mlp_only_layers\[0\]"}.get(name, name)
    with pytest.raises(FileRefused, match=f"{said} "):
        from_json(tmp_path, of_mixture(config, kind, **{name: OTHER}))


@pytest.mark.parametrize("file", modelsettings.TABLES)
def test_each_setting_that_is_bound_has_its_words(file):
    does, must = modelsettings.TABLES[file]
    assert must.keys() <= does.keys()
    assert all(name and values and text for name, values, text in modelsettings.rows(file))
