"""adapter_config.json is understood whole or refused by its key."""

import json
import re
from itertools import product
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from minilora import FileRefused, load_adapter
from minilora.audit.keys import READERS
from minilora.files.peft import CHANGES_NUMBERS, CONFIG_KEYS, CONFIG_SCHEMA, read_config, refusals

from ..support.adapter_folder import CONFIG, assert_same_adapters, variant


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_alone_is_taken(saved, tmp_path, start):
    assert_same_adapters(load_adapter(variant(saved, tmp_path, {"init_lora_weights": start})), load_adapter(saved))


@pytest.mark.parametrize("alpha", [1.1e-30, 9e29, 1, 10**20])
def test_alphas_within_their_range_are_taken(saved, tmp_path, alpha):
    assert load_adapter(variant(saved, tmp_path, {"lora_alpha": alpha}))["enc.q_proj"].alpha == alpha


def test_keys_that_change_nothing_once_it_is_trained_are_taken(saved, tmp_path):
    """As a configuration of PEFT's has them; and keys of next year that are empty or false."""
    harmless = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "revision": "main",
        "auto_mapping": {"base_model_class": "X"},
        "peft_version": "0.21.2",
        "inference_mode": True,
        "lora_dropout": 0.05,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2},
        "corda_config": {"corda_method": "ipm"},
        "lora_ga_config": {"direction": "x"},
        "runtime_config": {"ephemeral_gpu_offload": False},
    }
    assert harmless.keys() - {"peft_version"} == CONFIG_KEYS.keys() - CHANGES_NUMBERS - {"velora_config"}
    empty = {f"new_{i}": value for i, value in enumerate((None, False, [], {}, ""))}
    assert_same_adapters(load_adapter(variant(saved, tmp_path, harmless | empty)), load_adapter(saved))


PARTLY = [key for key, entry in CONFIG_KEYS.items() if "x-supported" in entry]
DEFAULTS = ["use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"]


@pytest.mark.parametrize("key", PARTLY)
def test_what_is_not_supported_is_said(saved, tmp_path, key):
    folder = variant(saved, tmp_path, {key: [1]})
    with pytest.raises(FileRefused) as error:
        load_adapter(folder)
    assert str(error.value) == f"'{folder / CONFIG}': {key} is [1]: {CONFIG_KEYS[key]['x-refusal']}"
    sound = json.loads((saved / CONFIG).read_text())
    assert all(taken(tmp_path, sound | {key: value}) for value in CONFIG_KEYS[key]["x-supported"])


VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 0.5, 1e-30, 10**400, "", "x", "1", "LORA", "none", "all", "gaussian"),
    *("pissa", "rank_major", [], [1], [True], ["q", "v"], [""], [[0, 2]], {}),
    *({"q": 1}, {"q": 0}, {"q": 0.5}, {"q": "1"}, {"q": None}, {"q": True}),
]


def test_reader_and_schema_take_the_same_values(tmp_path):
    """But for 2.0, which is an integer to a schema; and the schema takes what PEFT can do and we cannot."""
    for key, value in product([*CONFIG_KEYS, "a_key_of_next_year"], VALUES):
        config = {"peft_type": "LORA", "target_modules": ["q"], key: value}
        assert taken(tmp_path, config) == in_schema(config), config


def test_reader_and_schema_want_a_module_or_a_parameter(tmp_path):
    targets = [{}, *({"target_modules": names} for names in (None, [], "", "q", ["q"]))]
    parameters = [{}, *({"target_parameters": names} for names in (None, [], "q", ["q"]))]
    for some, others in product(targets, parameters):
        config = {"peft_type": "LORA", **some, **others}
        assert taken(tmp_path, config) == in_schema(config), config


def taken(folder, config):
    try:
        read_config(folder / CONFIG, json.dumps(config).encode())
    except FileRefused:
        return False
    return True


def in_schema(config):
    """Return whether the schema takes a configuration, and none of its keys has a value that is not supported."""
    return VALIDATOR.is_valid(config) and not list(refusals(config))


VALIDATOR = jsonschema.Draft202012Validator(CONFIG_SCHEMA)


def test_the_schema_is_one_and_takes_what_we_write(saved):
    jsonschema.Draft202012Validator.check_schema(CONFIG_SCHEMA)
    VALIDATOR.validate(json.loads((saved / CONFIG).read_text()))


def test_the_schema_takes_what_peft_can_do_and_we_cannot():
    least = {"peft_type": "LORA", "target_modules": ["q"]}
    for key in PARTLY:
        value = {"bias": "all", "init_lora_weights": "pissa", "lora_B_layout": "grouped_by_expert"}.get(key, [1])
        assert VALIDATOR.is_valid(least | {key: value})
        assert not in_schema(least | {key: value})


def test_the_page_about_the_format_says_what_each_key_changes():
    page = (Path(__file__).parents[2] / "docs" / "library" / "adapter-format.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == CHANGES_NUMBERS


def test_the_audits_reader_keys_are_keys_that_change_numbers():
    assert {key.name for key in READERS} <= CHANGES_NUMBERS


@pytest.mark.parametrize("key", DEFAULTS)
def test_an_empty_object_asks_for_all_defaults(saved, tmp_path, key):
    """PEFT makes an adapter with kasa_config {} one of KaSA."""
    with pytest.raises(FileRefused, match=f"{key} is {{}}: "):
        load_adapter(variant(saved, tmp_path, {key: {}}))


def test_targets_that_match_nothing_are_taken_as_in_peft(saved, tmp_path):
    folder = variant(saved, tmp_path, {"target_modules": ["k_proj", "q_proj", "head"], "exclude_modules": ["k_proj"]})
    assert_same_adapters(load_adapter(folder), load_adapter(saved))


@pytest.mark.parametrize("more", [{}, {"r": None}, {"lora_alpha": None}])
def test_the_least_configuration_implies_rank_and_alpha_8(saved, tmp_path, more):
    sound = {"peft_type": "LORA", "target_modules": ["q_proj"]} | more
    key = "base_model.model.enc.q_proj.lora_"
    factors = {key + "A.weight": np.ones((8, 3), "f4"), key + "B.weight": np.ones((2, 8), "f4")}
    folder = variant(saved, tmp_path, tensors=lambda _: factors)
    (folder / CONFIG).write_text(json.dumps(sound))
    assert load_adapter(folder)["enc.q_proj"].scaling == 1


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA', the only kind supported"),
        ({"peft_type": None}, "peft_type is None, expected 'LORA', the only kind supported"),
        ({"peft_version": 3}, "Expected `str | null`, got `int` - at `$.peft_version`"),
        ({"bias": "all"}, "bias is 'all': trained biases are not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": 1}, "init_lora_weights"),
        ({"a_key_of_next_year": True}, "'a_key_of_next_year' is True: this key is unknown"),
        ({"a_key_of_next_year": "x"}, "'a_key_of_next_year' is 'x': this key is unknown"),
        ({"a_key_of_next_year": 0.5}, "a_key_of_next_year"),
        ({"a_key_of_next_year": [0]}, "a_key_of_next_year"),
        ({"r": 3}, "shape"),
        ({"r": True}, "Expected `int`, got `bool` - at `$.r`"),
        ({"r": 2.5}, "Expected `int`, got `float` - at `$.r`"),
        *(({"r": number}, "Expected `int` >= 1 - at `$.r`") for number in (0, -1)),
        ({"r": 2**31}, "Expected `int` <= 2147483647 - at `$.r`"),
        ({"lora_alpha": 0}, "Expected `float` > 1e-30 - at `$.lora_alpha`"),
        ({"lora_alpha": -4}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": "4"}, "lora_alpha"),
        ({"lora_alpha": 1e-30}, "Expected `float` > 1e-30 - at `$.lora_alpha`"),
        ({"lora_alpha": 1e30}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "JSON is malformed"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out"),
        ({"rank_pattern": {}}, "shape"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"head": "3"}}, "Expected `int`, got `str` - at `$.rank_pattern[...]`"),
        ({"exclude_modules": ["head"]}, "exclude_modules names 'head'"),
        ({"exclude_modules": ".*q_proj"}, "exclude_modules names 'enc.q_proj'"),
        ({"exclude_modules": 1}, "exclude_modules"),
        ({"target_modules": None}, "target_modules is '', expected names or a regular expression"),
        ({"target_modules": [1]}, "target_modules"),
    ],
)
def test_an_unsupported_configuration_is_refused_by_its_key(saved, tmp_path, config, named):
    folder = variant(saved, tmp_path, config)
    with pytest.raises(FileRefused) as error:
        load_adapter(folder)
    assert named in str(error.value)
    assert str(folder) in str(error.value)
