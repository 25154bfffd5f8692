import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import LoRA, save_adapter
from minilora.language.memory import Memory

from ..support.adapter_folder import change_json


@pytest.fixture
def adapter(tmp_path):
    """An adapter and its base: two layers that differ in shape, rank, alpha and type, rank-stabilised."""
    rng = np.random.default_rng(0)
    layers = {
        "enc.fc": LoRA(rng.standard_normal((2, 5)), rng.standard_normal((3, 2)), 1.0),
        "head": LoRA(rng.standard_normal((4, 3)).astype("f4"), rng.standard_normal((7, 4)).astype("f4"), 6.0),
    }
    save_adapter(tmp_path / "adapter", layers)
    change_json(tmp_path / "adapter" / "adapter_config.json", use_rslora=True)
    base = {
        "enc.fc.weight": rng.standard_normal((3, 5)),
        "enc.fc.bias": np.ones(3),
        "head.weight": rng.standard_normal((7, 3)).astype("f4"),
    }
    save_file(base, tmp_path / "base.safetensors")
    return tmp_path / "adapter"


@pytest.fixture
def pictures(monkeypatch):
    """The formats that figures were written in, in no time."""
    figure, formats = pytest.importorskip("matplotlib.figure"), []
    written = lambda self, file, format, **mark: formats.append(format) or file.write(b"drawn by minilora")  # noqa: E731
    monkeypatch.setattr(figure.Figure, "savefig", written)
    return formats


@pytest.fixture
def machine(monkeypatch):
    """A function that lets the machine have so many bytes, and so many that are free."""
    name = "minilora.language.finetune.machine_memory"
    return lambda whole, free: monkeypatch.setattr(name, lambda backend: Memory(whole, free))
