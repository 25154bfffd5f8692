"""``minilora article``."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minilora import article, load_adapter
from minilora.cli import main

from ..support.command_line import run


def test_article_prints_the_report(small_article, capsys):
    assert run("article", "--epochs", "3", "--rank", "2", "--alpha", "4", "--lr", "0.02", "--seed", "5") == 0
    out, err = capsys.readouterr()
    assert "(rank 2, alpha 4, 3 epochs, batches of 128, lr 0.02, seed 5, float32, CPU" in out
    assert "7. Merged into one layer" in out
    assert err == ""  # no progress bar where there is no terminal


def test_options_reach_the_run(monkeypatch):
    seen = {}
    monkeypatch.setattr(article, "run", lambda **k: seen.update(k))
    assert run("article") == 0
    assert callable(seen.pop("tell"))
    backend = seen.pop("backend")
    assert backend.name == "numpy"
    assert seen == {
        "rank": 1, "alpha": 1.0, "epochs": 100, "batch_size": 128, "lr": 0.001, "seed": 0, "dtype": "float32",
        "progress": True, "checkpoint": None,
    }  # fmt: skip
    run("article", "--rank", "3", "--batch-size", "64", "--dtype", "float64")
    assert (seen["rank"], seen["batch_size"], seen["dtype"]) == (3, 64, "float64")


def test_plot_writes_a_figure(small_article, tmp_path, capsys):
    file = tmp_path / "figure.PNG"  # the letters' case is the user's
    assert run("article", "--epochs", "2", "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert f"figure written to {file}" in capsys.readouterr().out


def test_a_training_that_diverges_is_one_line(small_article, capsys):
    assert run("article", "--lr", "1e38", "--epochs", "5") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "epoch 1" in err
    assert err.count("\n") == 1


def test_a_rank_that_no_machine_holds_is_one_line(small_article, capsys, monkeypatch):
    monkeypatch.setattr(article, "train", lambda *a, **k: pytest.fail("training began"))
    assert run("article", "--epochs", "1", "--rank", str(10**14)) == 2
    err = capsys.readouterr().err
    assert err == f"minilora: rank must be at most {2**31 - 1}, got {10**14}\n"


def test_a_missing_matplotlib_is_named_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))
    assert run("article", "--plot", "x.png") == 2
    assert "pip install matplotlib" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]


def test_article_saves_the_adapter_it_trained(small_article, tmp_path, capsys):
    assert main(["article", "--epochs", "3", "--rank", "2", "--save", str(tmp_path / "a")]) == 0
    assert f"adapter written to {tmp_path / 'a'}" in capsys.readouterr().out
    trained = article.run(epochs=3, rank=2).adapter
    np.testing.assert_array_equal(load_adapter(tmp_path / "a")["fc"].lora_B, trained.lora_B)


def test_article_replaces_no_adapter_without_a_word(adapter, small_article, capsys):
    file = adapter / "adapter_model.safetensors"
    before = file.read_bytes()
    assert main(["article", "--save", str(adapter)]) == 2
    assert capsys.readouterr() == ("", f"minilora: save '{adapter}' holds an adapter: name another folder, or say "
                                       "--overwrite\n")  # fmt: skip
    assert file.read_bytes() == before
    assert main(["article", "--save", str(adapter), "--overwrite"]) == 0
    assert file.read_bytes() != before


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
        out, err = capsys.readouterr()
        stands.append(err)
        return re.sub(r"\([\d.]+ s\)", "", out)

    stands, checkpoint = [], ("--checkpoint", str(tmp_path / "c.ckpt"))
    assert losses() == losses(*checkpoint) == losses(*checkpoint)
    said = f"minilora: the checkpoint stands at epoch 3 of 3 of the adapter ({tmp_path / 'c.ckpt'})\n"
    assert stands == ["", "", said]
    assert sorted(os.listdir(tmp_path)) == ["c.adapter.ckpt", "c.ckpt"]
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


@pytest.mark.long
def test_article_killed_in_each_training_ends_with_the_same_bits(small_article, tmp_path):
    def start(*args):
        return subprocess.Popen([sys.executable, "-c", ARTICLE, *map(str, args)], stdout=subprocess.DEVNULL)

    file = tmp_path / "c"
    args = ["--checkpoint", file, "--save", tmp_path / "resumed"]
    for kept in article.checkpoint_files(file).values():
        process = start(*args)
        while not kept.exists() and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(*args).wait() == 0
    assert main(["article", "--epochs", "40", "--save", str(tmp_path / "whole")]) == 0
    one, other = (tmp_path / n / "adapter_model.safetensors" for n in ("resumed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_the_adapter_is_saved_also_where_nobody_reads(small_article, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["article", "--epochs", "1", "--save", str(tmp_path / "a")]) == 141
    assert load_adapter(tmp_path / "a").keys() == {"fc"}


def test_what_is_told_is_in_the_file_at_once(small_article, monkeypatch):
    """A stdout that is a file: what was flushed can be read while the article runs."""
    seen, file = [], io.StringIO()
    monkeypatch.setattr(file, "flush", lambda: seen.append(file.getvalue()))
    monkeypatch.setattr(sys, "stdout", file)
    assert run("article", "--epochs", "20") == 0
    assert any(text.rstrip().splitlines()[-1].split()[0] == "10" for text in seen)
    assert seen[-1] == file.getvalue()
