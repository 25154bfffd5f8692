"""A sound adapter, and one of a whole model, as files."""

import numpy as np
import pytest

from minilora import Conv2d, Embedding, LoRA, adapt, save_adapter

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


@pytest.fixture
def saved_dora(tmp_path):
    """A sound DoRA of a convolution and an embedding."""
    rng = np.random.default_rng(5)
    img = adapt(Conv2d(rng.standard_normal((5, 2, 3, 4))), "", rank=2, alpha=3, rng=rng, use_dora=True)
    emb = adapt(Embedding(rng.standard_normal((7, 3))), "", rank=3, alpha=3, rng=rng, use_dora=True)
    save_adapter(tmp_path / "saved_dora", {"img": img, "emb": emb})
    return tmp_path / "saved_dora"
