"""Each warning points at the line that called: at the user's own, and not at one of ours."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import (
    Linear,
    LoRA,
    LoRALinear,
    Sequential,
    adapt,
    get_backend,
    load_adapter,
    merge,
    merge_adapter,
    quantize,
    train,
)
from minilora.language.finetune import finetune, warn_beyond_context
from minilora.language.losstable import LossTable
from minilora.language.memory import Memory
from minilora.language.recipe import ADAPTER_DEFAULTS, Recipe
from minilora.language.resume import TuningCheckpoint
from minilora.optim import Adam
from minilora.state import TrainingState

from .support.adapter_folder import WEIGHTS, merged

RNG = np.random.default_rng(0)
LAYER, X, Y = Linear(RNG.standard_normal((3, 5))), RNG.standard_normal((9, 5)), RNG.standard_normal((9, 3))


def folded():
    model = adapt(quantize(LAYER), "", rank=2, alpha=3, rng=RNG)
    model.adapter.lora_B += 1
    merge(model, requantize=True)


def of_little_memory():
    few = {"length": 8, "batch_size": 4, "steps": 1, "anyway": True, **ADAPTER_DEFAULTS}
    finetune(Recipe(text=Path("text"), model=Path("model"), save=Path("b"), **few), get_backend("numpy"))


WARNED = {
    "is above the smaller width of 1 ": lambda: adapt(Sequential(fc=LAYER), ["fc"], rank=4, alpha=1, rng=RNG),
    "is above the smaller width 3 of the layer": lambda: LoRALinear.from_linear(LAYER, rank=4, alpha=1, rng=RNG),
    "quantising the merged weights again loses": folded,
    "in the first epoch: lr = 1000.0 is too large": lambda: train(LAYER, X, Y, rng=RNG, lr=1e3, epochs=2),
    "computing with NumPy: CuPy is not installed": lambda: get_backend("auto"),
    "the base weight of 'lm_head'": lambda: load_adapter("a"),
    "ties head and embedding": lambda: merge_adapter("base.safetensors", "a", "out"),
    "the model's context is 7": lambda: warn_beyond_context(
        SimpleNamespace(config=SimpleNamespace(max_position_embeddings=7)), 8, "it has"
    ),
    "the log ends before step 0": lambda: LossTable(1, 0, 8, log=Path("no/log")).write_log(0),
    "no checkpoint after step 2": lambda: TuningCheckpoint(Path("no/c"), {}, each=False).keep(
        TrainingState(LAYER, Adam({"weight": LAYER.weight}), RNG, epoch=2)
    ),
    "MB that are free": of_little_memory,
}


@pytest.mark.parametrize("said", WARNED)
def test_a_warning_points_at_who_called(said, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("minilora.language.finetune.machine_memory", lambda backend: Memory(10**9, 10**5))
    monkeypatch.setattr("minilora.files.checkpoint.Checkpoint.keep", Mock(side_effect=OSError))
    merged(folder, {"lm_head.weight": np.zeros((3, 5))}, {"lm_head": LoRA(np.ones((1, 5)), np.ones((3, 1)), 1)})
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    base = {"base_model.model.lm_head.base_layer.weight": np.zeros((3, 5))}
    save_file(load_file(folder / "a" / WEIGHTS) | base, folder / "a" / WEIGHTS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        WARNED[said]()
    assert [warning.filename for warning in told if said in str(warning.message)] == [__file__]
