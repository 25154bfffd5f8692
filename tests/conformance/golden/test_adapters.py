"""What the files of a golden adapter hold: PEFT's names, and its version where the layout hangs on that."""

from pathlib import Path

import numpy as np
import pytest

from minilora.conformance.golden.adapters import adapter_files, damaged, drawn_adapter
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.sessions import LIVING_ADAPTERS, session_adapters

LAYERS = {
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    *("lora_B.bias", "lora_magnitude_vector", "base_layer.weight", "base_layer.bias", "lm_head.weight"),
    "trainable_tokens_delta",
}
SOUND = [case for case in CASES if not case.damage]


def test_tensors_have_the_names_that_peft_writes():
    names = [name for case in SOUND for _, tensors in case.files() for name in tensors]
    known = {end for end in LAYERS if any(name.endswith(f".{end}") for name in names)}
    assert known >= {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "base_layer.bias"}
    assert [name for name in names if not any(name.endswith(f".{end}") for end in LAYERS)] == []


@pytest.mark.parametrize("case", SOUND, ids=[case.id for case in SOUND])
def test_the_version_stands_beside_parameters(case):
    for adapter in case.adapters:
        given = drawn_adapter(np.random.default_rng(0), adapter, case.base)  # a case keeps its own
        config, _ = adapter_files(adapter, given, case.base)
        assert ("peft_version" in given.config) == ("peft_version" in config) == ("target_parameters" in config)


def test_a_damaged_file_has_both_factors_turned():
    tensors = {"x.lora_A.weight": np.zeros((2, 5)), "x.lora_B.weight": np.zeros((4, 2)), "other": np.zeros(3)}
    _, turned = damaged({}, dict(tensors), "transposed")
    assert {name: array.shape for name, array in turned.items()} == {
        "x.lora_A.weight": (5, 2), "x.lora_B.weight": (2, 4), "other": (3,),
    }  # fmt: skip


def test_each_adapter_of_a_session_has_its_folder():
    assert [folder for folder, _ in session_adapters()] == [Path("adapters", name) for name in LIVING_ADAPTERS]
