"""A sound adapter, and one of a whole model, as files."""

import numpy as np
import pytest

from minilora import LoRA, save_adapter

from ..support.model_folder import drawn, of_kind


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sound adapter of two layers, one an exception to rank and alpha."""
    folder = tmp_path_factory.mktemp("adapter")
    rng = np.random.default_rng(0)
    layers = {
        "enc.q_proj": LoRA(*(rng.standard_normal(s).astype("float32") for s in ((2, 5), (4, 2))), 4.0),
        "head": LoRA(*(rng.standard_normal(s).astype("float32") for s in ((3, 4), (6, 3))), 1.5),
    }
    save_adapter(folder, layers)
    return folder


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter", drawn(of_kind(), "all-linear"))
    return tmp_path / "adapter"
