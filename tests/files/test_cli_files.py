"""The commands that read and write files: article --save --checkpoint, inspect, merge."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import LoRA, article, load_adapter, save_adapter
from minilora.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(tmp_path):
    rng = np.random.default_rng(0)
    save_adapter(tmp_path / "adapter", {"fc": LoRA(rng.standard_normal((2, 5)), rng.standard_normal((3, 2)), 1.0)})
    save_file({"fc.weight": rng.standard_normal((3, 5)), "fc.bias": np.ones(3)}, tmp_path / "base.safetensors")
    return tmp_path / "adapter"


def test_article_saves_the_adapter_it_trained(small_article, tmp_path, capsys):
    assert main(["article", "--epochs", "3", "--rank", "2", "--save", str(tmp_path / "a")]) == 0
    assert f"adapter written to {tmp_path / 'a'}" in capsys.readouterr().out
    trained = article.run(epochs=3, rank=2).adapter
    np.testing.assert_array_equal(load_adapter(tmp_path / "a")["fc"].lora_B, trained.lora_B)


def test_article_refuses_to_save_to_a_file_before_it_trains(tmp_path, capsys):
    (tmp_path / "a").write_text("")
    for place in (tmp_path / "a", tmp_path / "a" / "b"):
        assert main(["article", "--save", str(place)]) == 2
        assert f"{str(tmp_path / 'a')!r} is a file, expected a folder" in capsys.readouterr().err


def test_article_refuses_an_unwritable_place_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert main(["article", "--save", str(tmp_path / "a")]) == 2
    assert f"the folder {str(tmp_path)!r} cannot be written" in capsys.readouterr().err


def test_article_goes_on_from_its_checkpoint_and_refuses_another_configuration(small_article, tmp_path, capsys):
    def losses(*more):
        assert main(["article", "--epochs", "3", *more]) == 0
        return re.sub(r"\([\d.]+ s\)", "", capsys.readouterr().out)

    checkpoint = ("--checkpoint", str(tmp_path / "c"))
    assert losses() == losses(*checkpoint) == losses(*checkpoint)
    assert sorted(os.listdir(tmp_path / "c")) == ["adapter.safetensors", "base.safetensors", "settings.json"]
    assert main(["article", "--epochs", "3", "--rank", "2", *checkpoint]) == 2
    assert "rank is 1 there and 2 here" in capsys.readouterr().err


ARTICLE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from minilora import article
run = article.run
article.run = lambda **options: run(**options, n=400, in_features=20, out_features=10)
from minilora.cli import main
sys.exit(main(["article", "--epochs", "40", *sys.argv[1:]]))
"""


def test_article_killed_in_each_training_ends_with_the_same_bits(tmp_path):
    def start(*args):
        return subprocess.Popen([sys.executable, "-c", ARTICLE, *map(str, args)], stdout=subprocess.DEVNULL)

    args = ["--checkpoint", tmp_path / "c", "--save", tmp_path / "resumed"]
    for name in ("base", "adapter"):
        file, process = tmp_path / "c" / f"{name}.safetensors", start(*args)
        while not file.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(*args).wait() == 0
    assert start("--save", tmp_path / "whole").wait() == 0
    one, other = (tmp_path / n / "adapter_model.safetensors" for n in ("resumed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_inspect_prints_the_table_and_draws_it(adapter, tmp_path, capsys):
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "3 x 5" in out
    assert "figure written" in out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_merge_writes_the_checkpoint_and_a_dry_run_does_not(adapter, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    command = ["merge", str(tmp_path / "base.safetensors"), str(adapter), "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0
    assert "1 tensor would change; nothing was written" in capsys.readouterr().out
    assert not out.exists()
    assert main(command) == 0
    assert "fc.weight" in capsys.readouterr().out
    lora, base = load_adapter(adapter)["fc"], load_file(tmp_path / "base.safetensors")
    np.testing.assert_allclose(load_file(out)["fc.weight"], base["fc.weight"] + lora.delta(), rtol=1e-15)


@pytest.mark.parametrize("command", [["inspect", "nowhere"], ["merge", "b", "nowhere", "-o", "x"]])
def test_what_cannot_be_read_is_one_line_and_status_2(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilora: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
