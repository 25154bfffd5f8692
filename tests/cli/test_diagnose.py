"""``minilora diagnose``."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import adapt, adapters, save_adapter
from tests.support.command_line import run
from tests.support.language import tiny_llama, write_folder

IDS = np.random.default_rng(0).integers(0, 29, (2, 5))


@pytest.fixture
def folders(tmp_path):
    model = tiny_llama()
    write_folder(tmp_path / "model", model)
    adapted = adapt(model, ["q_proj", "up_proj"], rank=2, alpha=5, rng=np.random.default_rng(0))
    for array in adapted.trainable().values():
        array += np.random.default_rng(1).standard_normal(array.shape) / 4
    save_adapter(tmp_path / "adapter", adapters(adapted))
    save_file({"prompts": IDS, "logits": adapted(IDS)}, tmp_path / "right.safetensors")
    save_file({"prompts": IDS, "logits": model(IDS)}, tmp_path / "base.safetensors")
    return tmp_path


def command(folders, answers, *more):
    named = ["--model", str(folders / "model"), "--adapter", str(folders / "adapter")]
    return run("diagnose", str(folders / answers), *named, *more)


def test_right_logits_end_with_0_and_wrong_ones_with_1(folders, capsys):
    assert command(folders, "right.safetensors") == 0
    assert ": RIGHT: the adapter is applied as its files say" in capsys.readouterr().out.splitlines()[0]
    assert command(folders, "base.safetensors", "--json", str(folders / "d.json")) == 1
    assert ": WRONG: the adapter is not applied: this is the base" in capsys.readouterr().out.splitlines()[0]
    diagnosis = json.loads((folders / "d.json").read_text())
    assert (diagnosis["status"], diagnosis["flags"][0]) == (1, "the-adapter-is-not-applied")


def test_what_cannot_be_judged_ends_with_2(folders, capsys):
    assert command(folders, "nothing.safetensors") == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert command(folders, "right.safetensors", "--json", str(folders / "model" / "config.json")) == 2
    assert "a file that is read" in capsys.readouterr().err
