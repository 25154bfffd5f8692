"""A recipe is refused by the name of what is wrong in it, and filled up by the model's size."""

from dataclasses import replace
from pathlib import Path

import pytest

from minilora.language.finetuning.recipe import Recipe

RECIPE = Recipe(
    text=Path("text"), save=Path("a"), model=Path("model"), target_modules="all-linear", target_parameters=None,
    rank=8, alpha=16.0, steps=None, batch_size=None, micro_batch=None, length=128, lr=None, seed=0, dtype="float32",
    quantize=None, checkpoint=None,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with a model's, of which nothing is read, and a text."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("text").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"lr": 0.0}, r"lr must be above 0 and finite, got 0\.0"),
        ({"alpha": 1e300}, r"alpha must be above 1e-30 and below 1e\+30, got 1e\+300"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"save": "text"}, "'text': .*/text' is a file, expected a folder"),
        ({"save": "model/../model"}, "save 'model/../model' is the model's folder, expected one of the adapter's own"),
        ({"checkpoint": "a"}, "/a' would lie where the adapter goes: name another file"),
        ({"checkpoint": "a", "save": "a/b/c"}, "/a' would lie where the adapter goes: name another file"),
        ({"checkpoint": "a/adapter_config.json"}, "/a/adapter_config.json' would lie where the adapter goes"),
        ({"checkpoint": "a/adapter_model.safetensors"}, "/a/adapter_model.safetensors' would lie where the adapter"),
        ({"checkpoint": "model/../a"}, "/a' would lie where the adapter goes: name another file"),
        ({"checkpoint": "model"}, "the checkpoint 'model' is a folder, expected a file or a new name"),
        ({"checkpoint": "text/c"}, "checkpoints cannot be kept in 'text'"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(folder, change, message):
    recipe = replace(RECIPE, **{k: Path(v) if isinstance(v, str) else v for k, v in change.items()})
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=message):
        recipe.check()
    assert sorted(folder.rglob("*")) == before


def test_a_sound_recipe_is_taken_and_what_it_leaves_open_settled():
    RECIPE.check()
    small, larger = RECIPE.settled(1_000_000), replace(RECIPE, lr=0.5).settled(100_000_000)
    assert (small.steps, small.batch_size, small.lr) == (300, 16, 3e-3)
    assert (larger.steps, larger.batch_size, larger.lr) == (80, 4, 0.5)
    assert replace(small, steps=None, batch_size=None, lr=None) == replace(larger, steps=None, batch_size=None, lr=None)
