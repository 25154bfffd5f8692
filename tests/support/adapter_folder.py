"""Copies of a sound adapter's folder, each with something changed in it."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def variant(saved, tmp_path, config=None, tensors=None, drop=()):
    """Copy the sound adapter with some keys of its configuration, or its tensors, changed."""
    folder = tmp_path / "variant"
    shutil.copytree(saved, folder)
    if config is not None or drop:
        changed = {**json.loads((folder / CONFIG).read_text()), **(config or {})}
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in changed.items() if k not in drop}))
    if tensors is not None:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    return folder


def assert_same_adapters(one, other):
    """Require the same alphas, types and factors, to the bit."""
    assert one.keys() == other.keys()
    for name, adapter in one.items():
        assert (adapter.alpha, adapter.lora_A.dtype) == (other[name].alpha, other[name].lora_A.dtype)
        np.testing.assert_array_equal(adapter.lora_A, other[name].lora_A)
        np.testing.assert_array_equal(adapter.lora_B, other[name].lora_B)
