"""What the page about models' files says of a setting is so: what is read is looked at, and nothing is nothing."""

import json
import re
from pathlib import Path

import pytest

from minilora.language import config as configs
from minilora.language.files import gguf
from minilora.language.files.tokens import GGUF_SPLITS
from minilora.texts import FileRefused

from ..support.language import tiny_llama, write_folder

PAGE = Path(__file__).parents[2] / "docs" / "library" / "model-files.md"
TABLES = {
    file: {name: (values, does) for name, values, does in re.findall(r"^\| (\S+) \| (.*) \| (.*) \|$", rows, re.M)}
    for file, rows in re.findall(r"^\| in (.*) \| supported \| .*\n\| ---.*\n((?:\|.*\n)+)", PAGE.read_text(), re.M)
}
"""By file and setting: the values that are supported, and what it does."""
OF_A_KIND = (*(kind.architecture for kind in configs.MODEL_KINDS.values()), None, [])
MUST = {  # what the package supports of the settings of which it supports only some values
    "config.json": configs.SUPPORTED | {"architectures": OF_A_KIND},
    "config.json, of a mixture": {"quantization_config": (None,)},
    "rope_parameters": configs.SUPPORTED_ROPE,
    "quantization_config": configs.SUPPORTED_QUANTIZATION,
    "tokenizer.json": {"dropout": (None, 0), "split_special_tokens": (False,)},
    ".gguf": gguf.SUPPORTED_KIND
    | {f"llama.{name}": only for name, only in gguf.SUPPORTED_GGUF.items()}
    | {"tokenizer.ggml.model": ("gpt2",), "tokenizer.ggml.pre": GGUF_SPLITS},
}

OTHER = {"something": "else"}
KINDS_OF_MIXTURE = {"mixtral": "num_local_experts", "qwen2_moe": "num_experts", "qwen3_moe": "num_experts"}
SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 7}


@pytest.fixture
def config(tmp_path):
    return json.loads((write_folder(tmp_path / "m", tiny_llama()) / "config.json").read_text())


def of_mixture(config, kind, **changes):
    return config | {"model_type": kind, "architectures": None, KINDS_OF_MIXTURE[kind]: 4} | SIZES | changes


def that(file, says):
    rows = TABLES[file].items()
    return pytest.mark.parametrize("name", [name for name, (_, does) in rows if says(does) and name not in MUST[file]])


@pytest.mark.parametrize("file", MUST)
def test_the_page_has_the_values_that_are_supported(file):
    supported = {name: " or ".join(map(json.dumps, values)) for name, values in MUST[file].items()}
    told = {name: values for name, (values, _) in TABLES[file].items()}
    assert told == dict.fromkeys(told, "any") | supported


@that("config.json", lambda text: text.startswith("nothing"))
def test_a_setting_that_does_nothing_may_be_anything(tmp_path, config, name):
    assert configs.from_json(tmp_path, config | {name: OTHER}) == configs.from_json(tmp_path, config)


@that("config.json", lambda text: "read" in text and not text.startswith("the tokens"))
def test_a_setting_that_is_read_is_looked_at(tmp_path, config, name):
    if name == "original_max_position_embeddings":
        llama3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
        config |= {"rope_parameters": llama3}
    if name == "use_sliding_window":
        config |= {"model_type": "qwen2", "architectures": None, "sliding_window": 4}
    with pytest.raises(FileRefused, match=f"{name} "):
        configs.from_json(tmp_path, config | {name: ["something"]})


@pytest.mark.parametrize("kind", KINDS_OF_MIXTURE)
@that("config.json, of a mixture", lambda text: text.startswith("nothing"))
def test_a_mixtures_setting_that_does_nothing_may_be_anything(tmp_path, config, kind, name):
    sound = of_mixture(config, kind)
    assert configs.from_json(tmp_path, sound | {name: OTHER}) == configs.from_json(tmp_path, sound)


@that("config.json, of a mixture", lambda text: "read" in text)
def test_a_mixtures_setting_that_is_read_is_looked_at(tmp_path, config, name):
    kind = "qwen3_moe" if name == "num_local_experts" else "qwen2_moe"
    said = {"qkv_bias": "attention_bias", "mlp_only_layers": r"mlp_only_layers\[0\]"}.get(name, name)
    with pytest.raises(FileRefused, match=f"{said} "):
        configs.from_json(tmp_path, of_mixture(config, kind, **{name: OTHER}))
