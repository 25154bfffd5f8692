"""A fine-tuning that was stopped: what is said, what goes on, and which other is refused."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import Adam, CheckpointError, Llama, adapt, get_backend, load_adapter, train
from minilora.fast import accumulate
from minilora.language import next_token_loss, text
from minilora.language.data import windows
from minilora.language.finetuning.recipe import Recipe
from minilora.language.finetuning.stopped import Stopped, check_same, signature

from ...support.command_line import FEW, finetune, rows, run
from ...support.language import LETTERS, TEXT, tiny_llama, write_folder

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


IDS = [LETTERS.index(c) for c in TEXT]


def weights(name="a"):
    return Path(name, "adapter_model.safetensors").read_bytes()


def interrupted(monkeypatch, step):
    """Let Ctrl-C come in a step."""
    right = Adam.step

    def pressed(self, grads):
        if self.t == step - 1:
            raise KeyboardInterrupt
        right(self, grads)

    monkeypatch.setattr(Adam, "step", pressed)


def test_ctrl_c_says_what_is_kept_and_what_goes_on(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora"])
    os.rename("text", "my text")
    typed = ["finetune", "my text", "--save", "it's", "--model", "model", *FEW, "--checkpoint", "c"]
    with monkeypatch.context() as patched:
        interrupted(patched, 24)
        assert run(*typed) == 130
    out, err = capsys.readouterr()
    assert err.startswith("\nminilora: interrupted\nminilora: step 23 of 30 is kept in c, and this command goes on")
    program, *again = shlex.split(err.splitlines()[-1])
    assert (program, again) == ("minilora", typed)
    assert not Path("it's").exists()
    assert run(*again) == 0
    resumed = capsys.readouterr().out
    assert "goes on from step 23 of 30 (c)\n" in resumed
    assert run(*typed[:-2], "--overwrite") == 0
    whole = capsys.readouterr().out
    assert rows(resumed) == rows(whole)
    assert rows(resumed)[: len(rows(out))] == rows(out)


def test_ctrl_c_without_a_checkpoint_says_how_to_have_one(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora"])
    interrupted(monkeypatch, 2)
    assert finetune() == 130
    assert "nothing is kept: with --checkpoint FILE" in capsys.readouterr().err
    monkeypatch.setattr(Llama, "load", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert finetune("--checkpoint", "c") == 130
    assert "nothing is kept in c yet" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(["x"], None), (None, ["x"]), (["x"], ["y"])])
def test_other_arrays_of_a_mixture_are_another_training(folder, before, after):
    """Also where one of the two names none: before a model is loaded, and in the words of the command line."""
    recipe = Recipe(
        text=Path("text"), save=Path("a"), model=Path("model"), target_modules="all-linear", target_parameters=before,
        rank=8, alpha=16.0, steps=1, batch_size=1, micro_batch=None, length=8, lr=0.1, seed=0, dtype="float32",
        quantize=None, checkpoint=None,
    )  # fmt: skip
    there = signature(recipe, get_backend("numpy"))
    here = signature(replace(recipe, target_parameters=after), get_backend("numpy"))
    with pytest.raises(CheckpointError, match="--target-parameters is"):
        check_same(Path("c"), Stopped(SimpleNamespace(epoch=0), there), here, None)


def test_the_loss_before_the_training_is_not_measured_again(folder, capsys, monkeypatch):
    assert finetune("--steps", "20", "--checkpoint", "c") == 0
    before = rows(capsys.readouterr().out)
    name = "evaluate_where_it_counts"
    measured, right = [], getattr(text, name)
    monkeypatch.setattr(text, name, lambda *a: measured.append(a) or right(*a))
    assert finetune("--steps", "40", "--checkpoint", "c") == 0
    assert len(measured) == 1
    after = rows(capsys.readouterr().out)
    assert after[:2] == before
    assert finetune("--steps", "40", "--checkpoint", "c") == 0  # one that is done
    assert rows(capsys.readouterr().out) == after
    assert len(measured) == 1


OTHERS = [
    (["--rank", "4"], "--rank is 2 there and 4 here"),
    (["--length", "9"], "--length is 8 there and 9 here"),
    (["--lr", "1e-4"], "--lr is 0.02 there and 0.0001 here"),
    (["--alpha", "8"], "--alpha is 16 there and 8 here"),
    (["--batch-size", "5"], "--batch-size is 4 there and 5 here"),
    (["--seed", "1"], "--seed is 0 there and 1 here"),
    (["--dtype", "float64"], "--dtype is float32 there and float64 here"),
    (["--target-modules", "v_proj,q_proj"], "--target-modules is all-linear there and q_proj,v_proj here"),
    (["--quantize", "nf4"], "--quantize is not given there and nf4 here"),
    (["--steps", "5"], "--steps is 5 here, and 6 are done there"),
    (["--model", "other"], "the model is another"),
    ([], "the text is another"),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A training of six steps, with its checkpoint; another model of the same sizes, and another text."""
    where = tmp_path_factory.mktemp("stopped")
    write_folder(where / "model", tiny_llama())
    write_folder(where / "other", tiny_llama(seed=1))
    (where / "text").write_text(TEXT)
    (where / "longer").write_text(TEXT + "the end.")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(where)
        assert finetune("--steps", "6", "--checkpoint", "c") == 0
    return where


@pytest.mark.parametrize(("asked", "said"), OTHERS)
def test_another_training_is_refused_before_the_model_is_loaded(stopped, asked, said, capsys, monkeypatch):
    monkeypatch.chdir(stopped)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    given = ["--save", "a", "--model", "model", *FEW, "--steps", "6", "--checkpoint", "c", *asked]
    assert run("finetune", "longer" if "text" in said else "text", *given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"minilora: 'c' is a checkpoint of another configuration: {said}. "
        "Ask for the same, or name another checkpoint\n"
    )
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_checkpoint_may_lie_in_the_models_folder(folder):
    """It is no weight of the model, even by its name."""
    assert finetune("--steps", "2", "--checkpoint", "model/kept.safetensors") == 0
    assert finetune("--steps", "3", "--checkpoint", "model/kept.safetensors") == 0


@pytest.mark.long
def test_what_need_not_be_the_same_may_change(folder, capsys):
    wide = ["--dtype", "float64"]  # other parts of a batch: the sums are rounded otherwise
    assert finetune("--steps", "40", *wide) == 0
    whole = load_adapter("a")
    assert finetune("--steps", "6", "--checkpoint", "c", "--target-modules", "all-linear", *wide) == 0
    os.rename("model", "moved")
    os.rename("text", "renamed")
    more = ["--steps", "40", "--checkpoint", "c", "--micro-batch", "4", "--plot", "p.svg", *wide]
    assert run("finetune", "renamed", "--save", "a", "--model", "moved", *FEW, *more) == 0
    for path, adapter in load_adapter("a").items():
        np.testing.assert_allclose(adapter.delta(), whole[path].delta(), atol=1e-6)


@pytest.mark.long
def test_a_checkpoint_of_an_earlier_version_goes_on(folder, capsys):
    """It has what `train` keeps, and no notes."""
    X, Y, *held_out = windows(IDS, 8)
    rng = np.random.default_rng(0)
    model = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=rng)
    given = {"batch_size": 4, "lr": 0.02, "log_every": 20, "loss": next_token_loss, "held_out": tuple(held_out)}
    train(model, X, Y, epochs=25, steps=1, rng=rng, checkpoint="c", gradients=accumulate(2), **given)
    old = Path("c").read_bytes()
    assert finetune("--steps", "50", "--checkpoint", "c", "--rank", "4") == 2
    err = capsys.readouterr().err
    assert "; and " in err
    assert len(err) < 800
    assert Path("c").read_bytes() == old
    assert finetune("--steps", "50", "--checkpoint", "c") == 0
    out, resumed = capsys.readouterr().out, weights()
    assert finetune("--steps", "50") == 0
    assert weights() == resumed
    whole = rows(capsys.readouterr().out)
    assert [(step, held_out) for step, _, held_out in rows(out)] == [(step, held_out) for step, _, held_out in whole]
    assert [training for _, training, _ in rows(out)][:2] == [None, None]
    assert load_adapter("a").keys()


NOTES = {"asked": {}, "numbers": 1, "before": 1.0, "learned": {"rows": {}, "sum": 0.0, "targets": 0}}


@pytest.mark.parametrize(
    "change", [{"asked": 1}, {"before": None}, {"learned": {"rows": [], "sum": 0.0, "targets": 0}}]
)
def test_a_checkpoint_of_another_program_is_refused(folder, change, capsys):
    from minilora.files.checkpoint import Checkpoint

    model, X = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=np.random.default_rng(0)), windows(IDS, 8)
    given = {"loss": next_token_loss, "rng": np.random.default_rng(0), "batch_size": 4, "steps": 1}
    train(model, X[0], X[1], epochs=1, checkpoint=Checkpoint("c", notes=NOTES | change), **given)
    before = Path("c").read_bytes()
    assert finetune("--checkpoint", "c") == 2
    assert "'c' is a checkpoint of something else than minilora finetune" in capsys.readouterr().err
    assert Path("c").read_bytes() == before


def test_a_model_whose_config_alone_differs_is_another_before_it_is_loaded(folder, capsys, monkeypatch):
    assert finetune("--steps", "2", "--checkpoint", "c") == 0
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    capsys.readouterr()
    assert finetune("--steps", "3", "--checkpoint", "c") == 2
    assert "the model is another" in capsys.readouterr().err
