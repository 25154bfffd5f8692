"""The commands that read and write files: article --save --checkpoint, inspect, merge."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from minilora import Adapter, LoRA, article, load_adapter, save_adapter
from minilora.cli import main
from minilora.files.checkpoint import CheckpointError, read

ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(tmp_path):
    """An adapter and its base: two layers that differ in shape, rank, alpha and type, rank-stabilised."""
    rng = np.random.default_rng(0)
    layers = {
        "enc.fc": LoRA(rng.standard_normal((2, 5)), rng.standard_normal((3, 2)), 1.0),
        "head": LoRA(rng.standard_normal((4, 3)).astype("f4"), rng.standard_normal((7, 4)).astype("f4"), 6.0),
    }
    save_adapter(tmp_path / "adapter", layers)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    base = {
        "enc.fc.weight": rng.standard_normal((3, 5)),
        "enc.fc.bias": np.ones(3),
        "head.weight": rng.standard_normal((7, 3)).astype("f4"),
    }
    save_file(base, tmp_path / "base.safetensors")
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
    assert os.listdir(tmp_path) == ["c"]
    assert (tmp_path / "c").is_file()
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


def keeps(file, name):
    """Return whether a file has a training. The file may be replaced while it is read."""
    try:
        return read(file, name) is not None
    except CheckpointError:
        return False


@pytest.mark.long
def test_article_killed_in_each_training_ends_with_the_same_bits(small_article, tmp_path):
    def start(*args):
        return subprocess.Popen([sys.executable, "-c", ARTICLE, *map(str, args)], stdout=subprocess.DEVNULL)

    file = tmp_path / "c"
    args = ["--checkpoint", file, "--save", tmp_path / "resumed"]
    for name in ("base", "adapter"):
        process = start(*args)
        while not keeps(file, name) and process.poll() is None:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(*args).wait() == 0
    assert main(["article", "--epochs", "40", "--save", str(tmp_path / "whole")]) == 0
    one, other = (tmp_path / n / "adapter_model.safetensors" for n in ("resumed", "whole"))
    assert one.read_bytes() == other.read_bytes()


def drawn(monkeypatch):
    """Let figures be remembered when they are saved."""
    figures, real = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or real(self, *a, **k))
    return figures


def test_inspect_prints_the_table_and_draws_it(adapter, tmp_path, capsys, monkeypatch):
    figures = drawn(monkeypatch)
    assert main(["inspect", str(adapter), "--plot", str(tmp_path / "p.png")]) == 0
    head, enc, top, total, _, written = capsys.readouterr().out.splitlines()
    loras = load_adapter(adapter)
    norms = {name: np.linalg.norm(lora.delta().astype(float)) for name, lora in loras.items()}
    assert head.split()[:4] == ["module", "out", "x", "in"]
    assert enc.split()[:9] == ["enc.fc", *["3", "x", "5", "2", "1", "0.7071", "16"], f"{norms['enc.fc']:.4g}"]
    assert top.split()[:9] == ["head", *["7", "x", "3", "4", "6", "3", "40"], f"{norms['head']:.4g}"]
    assert total.split() == ["total", "56"]
    assert written == f"figure written to {tmp_path / 'p.png'}"
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    bars = figures[0].axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], list(norms.values()), rtol=1e-6)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["enc.fc", "head"]


def test_merge_writes_the_checkpoint_and_a_dry_run_does_not(adapter, tmp_path, capsys):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    command = ["merge", str(base), str(adapter), "-o", str(out)]
    assert main([*command, "--dry-run"]) == 0
    planned = capsys.readouterr().out.splitlines()
    assert planned[0].split() == ["tensor", "file", "dtype", "shape", "layout", "rank", "scaling"]
    assert planned[1].split() == ["enc.fc.weight", "base.safetensors", "F64", *["3", "x", "5", "out-in", "2", "0.7071"]]
    assert planned[2].split() == ["head.weight", "base.safetensors", "F32", *["7", "x", "3", "out-in", "4", "3"]]
    assert planned[3:] == ["2 tensors would change; nothing was written"]
    assert not out.exists()
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [*planned[:3], f"2 tensors merged into {out}"]
    before, after = load_file(base), load_file(out)
    for name, lora in load_adapter(adapter).items():
        np.testing.assert_allclose(after[f"{name}.weight"], before[f"{name}.weight"] + lora.delta(), rtol=1e-5)
    assert after["enc.fc.bias"].tobytes() == before["enc.fc.bias"].tobytes()


def test_merge_takes_the_layout_of_each_module(tmp_path, capsys):
    rng = np.random.default_rng(1)
    layers = {name: LoRA(rng.standard_normal((1, 4)), rng.standard_normal((4, 1)), 2.0) for name in ("c", "s")}
    save_adapter(tmp_path / "a", layers, fan_in_fan_out=True)
    save_file({f"{name}.weight": np.zeros((4, 4)) for name in layers}, tmp_path / "base.safetensors")
    command = ["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "a"), "-o", str(tmp_path / "o")]
    assert main(command) == 2
    assert "--layout c=out-in" in capsys.readouterr().err
    assert main([*command, "--layout", "c=in-out", "--layout", "s=out-in"]) == 0
    assert [line.split()[6] for line in capsys.readouterr().out.splitlines()[1:3]] == ["in-out", "out-in"]
    merged = load_file(tmp_path / "o")
    np.testing.assert_allclose(merged["c.weight"], layers["c"].delta().T)
    np.testing.assert_allclose(merged["s.weight"], layers["s"].delta())


@pytest.mark.parametrize("layout", ["c", "c=", "=in-out", "c=transposed"])
def test_merge_refuses_a_layout_that_says_nothing(layout, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "base", "adapter", "-o", "out", "--layout", layout])
    assert "expected NAME=out-in or NAME=in-out" in capsys.readouterr().err


def test_one_changed_tensor_is_not_plural(tmp_path, capsys):
    save_adapter(tmp_path / "a", {"fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    save_file({"fc.weight": np.ones((3, 2))}, tmp_path / "b.safetensors")
    assert main(["merge", str(tmp_path / "b.safetensors"), str(tmp_path / "a"), "-o", str(tmp_path / "o")]) == 0
    assert f"\n1 tensor merged into {tmp_path / 'o'}\n" in capsys.readouterr().out


EMPTY = [
    ["article", "--save", ""],
    ["article", "--checkpoint", ""],
    ["article", "--plot", ""],
    ["inspect", ""],
    ["inspect", "a", "--plot", ""],
    ["merge", "", "a", "-o", "o"],
    ["merge", "b", "", "-o", "o"],
    ["merge", "b", "a", "-o", ""],
]


@pytest.mark.parametrize("command", EMPTY)
def test_an_empty_name_is_refused_and_nothing_written(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "the name is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
@pytest.mark.parametrize("command", [["article"], ["inspect", "adapter"]])
def test_a_plot_that_cannot_be_written_is_refused_first(command, kind, adapter, tmp_path, capsys, monkeypatch):
    place = tmp_path / "p.png"
    {"folder": place.mkdir, "pipe": lambda: os.mkfifo(place), "link": lambda: place.symlink_to("x")}[kind]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))
    assert main([*command, "--plot", str(place)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected a regular file or a new name" in err


@pytest.mark.parametrize("command", [["article"], ["inspect", "adapter"]])
def test_a_plot_in_an_unwritable_folder_is_refused_first(command, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.setattr(article, "run", lambda **k: pytest.fail("the work began"))
    assert main([*command, "--plot", "p.png"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "plot file 'p.png': the folder '.' cannot be written" in err


def test_the_adapter_is_saved_before_the_report_is_printed(small_article, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(article, "report", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["article", "--epochs", "1", "--save", str(tmp_path / "a")])
    assert load_adapter(tmp_path / "a").keys() == {"fc"}


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path, capsys):
    evil = "\x1b[2J\x07\n\u202e\r" + "x" * 2_000_000
    save_file({evil: np.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": "all-linear"}))
    texts = []
    assert main(["inspect", str(tmp_path)]) == 2
    texts.append(capsys.readouterr().err)
    for config in ({"peft_type": evil}, {evil: 1}, {"alpha_pattern": {evil: 1}}, {"target_modules": [evil, evil]}):
        text = json.dumps({"peft_type": "LORA", "target_modules": "all-linear"} | config)
        (tmp_path / "adapter_config.json").write_text(text)
        assert main(["inspect", str(tmp_path)]) == 2
        texts.append(capsys.readouterr().err)
    for text in texts:
        assert text.startswith("minilora: ")
        assert text.endswith("\n")
        assert text[:-1].isprintable()
        assert len(text) < 1500


def test_names_that_the_user_gives_cannot_steer_the_terminal(small_article, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.conformance.vectors.write", lambda folder: 3)
    evil = "\x1b[2J\u202e"
    save_file({"fc.weight": np.ones((10, 20), "f4")}, f"{evil}.safetensors")
    for command in (
        ["article", "--epochs", "1", "--save", f"{evil}a", "--plot", f"{evil}.png"],
        ["inspect", f"{evil}a", "--plot", f"{evil}.png"],
        ["merge", f"{evil}.safetensors", f"{evil}a", "-o", f"{evil}o"],
        ["vectors", f"{evil}v"],
    ):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert "\\x1b[2J" in out
        assert out.replace("\n", "").isprintable()


def test_what_an_error_says_cannot_steer_the_terminal(monkeypatch, capsys):
    def refused(**options):
        raise ValueError("\x1b[2Jred\nand more\u202e")

    monkeypatch.setattr(article, "run", refused)
    assert main(["article"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("minilora: \\x1b[2Jred")
    assert err[:-1].isprintable()


def test_what_a_merge_warns_of_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(
        "minilora.files.merge.merge_adapter", lambda *a, **k: warnings.warn("mind this", stacklevel=1) or []
    )
    assert main(["merge", "b", "a", "-o", "o"]) == 0
    assert capsys.readouterr().err == "minilora: mind this\n"


def test_a_merged_convolution_has_a_kind_and_no_layout(tmp_path, capsys):
    conv = Adapter(np.ones((1, 12)), np.ones((4, 1)), 1, kind="conv2d", kernel=(2, 3))
    save_adapter(tmp_path / "a", {"conv": conv})
    save_file({"conv.weight": np.ones((4, 2, 2, 3))}, tmp_path / "b.safetensors")
    assert main(["merge", str(tmp_path / "b.safetensors"), str(tmp_path / "a"), "-o", str(tmp_path / "o")]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert " ".join(row.split()) == "conv.weight b.safetensors F64 4 x 2 x 2 x 3 conv2d 2x3 1 1"


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    save_adapter(tmp_path / "a", {"é.fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 2.0)})
    command = [sys.executable, "-m", "minilora", "inspect", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xe9.fc" in done.stdout


@pytest.mark.parametrize("command", [["inspect", "nowhere"], ["merge", "b", "nowhere", "-o", "x"]])
def test_what_cannot_be_read_is_one_line_and_status_2(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("minilora: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
