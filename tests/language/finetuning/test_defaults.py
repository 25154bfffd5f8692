"""The settings follow the model's size."""

from pathlib import Path

import pytest

from minilora.language.finetuning.defaults import SMALL, fitting

from ...support.command_line import run

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


ROOT = Path(__file__).parents[3]


def test_what_fits_follows_the_models_size(folder, capsys):
    assert fitting(852_608) == {"steps": 300, "batch_size": 16, "lr": 3e-3}
    assert fitting(SMALL) == fitting(852_608)
    assert fitting(134_515_008) == fitting(SMALL + 1) == {"steps": 80, "batch_size": 4, "lr": 1e-3}
    assert run("finetune", "text", "--save", "a", "--model", "model", "--length", "8", "--steps", "1") == 0
    assert "time     1 steps of 16 windows" in capsys.readouterr().out
