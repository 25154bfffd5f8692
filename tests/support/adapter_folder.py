"""Copies of a sound adapter's folder, each with something changed in it."""

import json
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from minilora import merge_adapter, save_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def variant(saved, tmp_path, config=None, tensors=None):
    """Copy the sound adapter with some keys of its configuration, or its tensors, changed."""
    folder = tmp_path / "variant"
    shutil.copytree(saved, folder)
    if config is not None:
        change_json(folder / CONFIG, **config)
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


def merged(folder, tensors, layers, **options):
    """Save a base and an adapter, merge them on the disk, and return the tensors of the merged file."""
    save_file(tensors, folder / "base.safetensors")
    save_adapter(folder / "a", layers, **options)
    merge_adapter(folder / "base.safetensors", folder / "a", folder / "out.safetensors")
    return load_file(folder / "out.safetensors")


def change_json(file, **settings):
    """Set keys of a file of JSON, or, by the value "absent", leave them out."""
    changed = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in changed.items() if value != "absent"}))
