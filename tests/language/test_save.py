"""A decoder is written as a folder that says what it is."""

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama
from minilora.language import save_llama

from ..support.language import tiny_llama, write_folder

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture
def folder(tmp_path, model):
    return write_folder(tmp_path / "model", model)


def weights(folder):
    return load_file(folder / "model.safetensors")


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


def test_config_json_names_no_begin_and_no_end_token(tmp_path, model):
    """Without a word of them, transformers takes the ids 1 and 2 for those."""
    save_llama(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert {name: config[name] for name in ("bos_token_id", "eos_token_id")} == {
        "bos_token_id": None,
        "eos_token_id": None,
    }


def test_files_are_on_the_disk_before_their_names_are(tmp_path, model, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    )
    save_llama(model, tmp_path / "m")
    assert {"config.json", "model.safetensors"} <= set(synced)


@pytest.mark.parametrize("by", [1e-9, 1e-3])
def test_frequencies_that_no_setting_says_are_refused(tmp_path, by):
    model = tiny_llama()
    first, *rest = model.config.frequencies
    model.config = dataclasses.replace(model.config, frequencies=(first * (1 + by), *rest), rope=None)
    with pytest.raises(ValueError, match=r"^the model's rotary frequencies are none that config\.json can say"):
        save_llama(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
