"""``minilora article``: what reaches the run, what is kept and saved, and what is refused before the work."""

import io
import os
import re
import sys

import numpy as np
import pytest

from minilora import article, load_adapter

from ..support.command_line import run
from ..support.disk import contents


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))


def test_article_prints_the_report_and_saves_the_adapter(small_article, adapter, shell):
    out = shell(f"article --epochs 3 --rank 2 --alpha 4 --lr 0.02 --seed 5 --save {adapter} --overwrite")
    assert shell.err == ""  # no progress bar where there is no terminal
    assert "(rank 2, alpha 4, 3 epochs, batches of 128, lr 0.02, seed 5, float32, CPU" in out
    assert "7. Merged into one layer" in out
    assert f"adapter written to {adapter}" in out
    trained = article.run(epochs=3, rank=2, alpha=4, lr=0.02, seed=5).adapter
    np.testing.assert_array_equal(load_adapter(adapter)["fc"].lora_B, trained.lora_B)


def test_options_reach_the_run(monkeypatch):
    seen = {}
    monkeypatch.setattr(article, "run", lambda **k: seen.update(k))
    assert run("article") == 0
    assert callable(seen.pop("tell"))
    assert seen.pop("backend").name == "numpy"
    assert seen == {
        "rank": 1, "alpha": 1.0, "epochs": 100, "batch_size": 128, "lr": 0.001, "seed": 0, "dtype": "float32",
        "checkpoint": None,
    }  # fmt: skip
    run("article --rank 3 --batch-size 64 --dtype float64")
    assert (seen["rank"], seen["batch_size"], seen["dtype"]) == (3, 64, "float64")


def test_plot_writes_a_figure(small_article, tmp_path, shell, pictures):
    file = tmp_path / "figure.PNG"  # the letters' case is the user's
    file.write_text("drawn by minilora")
    assert f"figure written to {file}" in shell(f"article --epochs 2 --plot {file} --overwrite")
    assert (pictures, file.read_bytes()) == (["png"], b"drawn by minilora")


def test_a_training_that_diverges_is_one_line(small_article, shell):
    assert re.fullmatch("epoch 1: .*", shell.refused("article --lr 1e38 --epochs 5"))
    assert shell.out == ""


def test_a_missing_matplotlib_is_named_before_the_work(no_work, monkeypatch, shell):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert re.match(
        r'a figure needs matplotlib \(.*\): pip install "minilora\[plot\]"', shell.refused("article --plot x.png")
    )


def test_article_goes_on_from_its_checkpoint_and_refuses_another(small_article, tmp_path, shell):
    def told(*more):
        return re.sub(r"\([\d.]+ s\)", "", shell("article --epochs 3", *more)), shell.err

    kept = ("--checkpoint", tmp_path / "c.ckpt")
    (whole, _), (first, before), (again, after) = told(), told(*kept), told(*kept)
    assert whole == first == again
    said = f"minilora: the checkpoint is at epoch 3 of 3 of the adapter ({tmp_path / 'c.ckpt'})\n"
    assert (before, after) == ("", said)
    assert sorted(os.listdir(tmp_path)) == ["c.adapter.ckpt", "c.ckpt"]
    assert "rank is 1 there and 2 here" in shell.refused("article --epochs 3 --rank 2", *kept)


def test_ctrl_c_says_which_training_is_kept(small_article, tmp_path, shell, monkeypatch):
    right, typed = article.train, f"article --epochs 2 --checkpoint {tmp_path}/c"
    monkeypatch.setattr(sys, "argv", ["minilora"])
    for trained, said in ((0, ""), (1, f"epoch 2 of 2 of the base ({tmp_path}/c) is saved")):
        left = [right] * trained

        def interrupted(*given, left=left, **options):
            if not left:
                raise KeyboardInterrupt
            return left.pop()(*given, **options)

        monkeypatch.setattr(article, "train", interrupted)
        shell(typed, code=130)
        first, second, *more = shell.err.splitlines()
        assert (first, second) == ("", "minilora: interrupted")
        assert more == ([f"minilora: {said}; resume with this command:", f"  minilora {typed}"] if said else [])


def test_an_adapter_is_refused_before_the_work(no_work, adapter, shell):
    """Unless it may be replaced, as above."""
    before = contents(adapter)
    said = f"save {str(adapter)!r} already has an adapter: choose another folder, or pass --overwrite"
    assert shell.refused(f"article --epochs 1 --save {adapter}") == said
    assert contents(adapter) == before


def test_the_adapter_is_saved_also_where_nobody_reads(small_article, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run(f"article --epochs 1 --save {tmp_path}/a") == 141
    assert load_adapter(tmp_path / "a").keys() == {"fc"}


def test_what_is_told_is_in_the_file_at_once(small_article, monkeypatch):
    """A stdout that is a file: what was flushed can be read while the article runs."""
    seen, file = [], io.StringIO()
    monkeypatch.setattr(file, "flush", lambda: seen.append(file.getvalue()))
    monkeypatch.setattr(sys, "stdout", file)
    assert run("article --epochs 11") == 0
    assert any(text.rstrip().splitlines()[-1].split()[0] == "10" for text in seen)
    assert seen[-1] == file.getvalue()
