"""A fine-tuning that was stopped: what is said, what goes on to the same bits, and which other is refused."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Adam, History, Linear, Llama, adapt, load_adapter, save_adapter, train
from minilora.backend import get_backend
from minilora.files.checkpoint import Checkpoint, read_checkpoint
from minilora.language import next_token_loss
from minilora.language.finetune import Step
from minilora.language.memory import Memory
from minilora.language.recipe import Recipe
from minilora.language.resume import BestStep, asked, digest, digest_of_adapter
from minilora.language.text import windows

from ..audit.adapters import model
from ..support.command_line import FEW, finetune, rows, run
from ..support.language import LETTERS, TEXT

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")

ROOT = Path(__file__).parents[2]
IDS = [LETTERS.index(c) for c in TEXT]
GO_ON = ["finetune", "text", "--save", "b", "--model", "model", "--adapter", "a"]
SIZES = ["--steps", "4", "--batch-size", "4", "--length", "8", "--lr", "0.02"]


def weights(name="a"):
    return Path(name, "adapter_model.safetensors").read_bytes()


def has_memory(monkeypatch, whole, free):
    """Let the machine have so many bytes."""
    monkeypatch.setattr("minilora.language.finetune.machine_memory", lambda backend: Memory(whole, free))


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


def test_without_a_checkpoint_it_is_kept_beside_the_adapter(folder, capsys, monkeypatch):
    typed = ["finetune", "text", "--save", "a", "--model", "model", *FEW]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora", *typed])
    monkeypatch.setattr("minilora.language.resume.SHARE", float("inf"))  # after each step, however long it took
    assert run(*typed, "--save", "whole") == 0
    with monkeypatch.context() as patched:
        interrupted(patched, 8)
        assert run(*typed) == 130
    assert "step 7 of 30 is kept in a.checkpoint, and this command goes on from there:" in capsys.readouterr().err
    assert run(*typed) == 0
    assert "resume   goes on from step 7 of 30 (a.checkpoint)\n" in capsys.readouterr().out
    assert weights("a") == weights("whole")
    assert sorted(os.listdir()) == ["a", "model", "text", "whole"]


def test_a_stopped_training_gives_way_when_asked(folder, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        interrupted(patched, 2)
        assert run("finetune", "text", "--save", "a", "--model", "model", *FEW) == 130
    capsys.readouterr()
    other = ["finetune", "text", "--save", "a", "--model", "model", *FEW, "--seed", "5"]
    assert run(*other) == 2
    assert (
        "--seed is 0 there and 5 here. Ask for the same, or name another checkpoint, or begin anew with --overwrite"
        in (capsys.readouterr().err)
    )
    kept = Path("a.checkpoint").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Llama, "load", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*other, "--overwrite") == 130
    assert "nothing is kept in a.checkpoint yet" in capsys.readouterr().err
    assert Path("a.checkpoint").read_bytes() == kept  # until the other begins
    assert run(*other, "--overwrite") == 0
    assert not Path("a.checkpoint").exists()


@pytest.mark.parametrize("name", [".", "../a/", "../model/.."])
def test_what_is_kept_lies_beside_the_folder_whatever_it_is_called(folder, capsys, monkeypatch, name):
    Path("a").mkdir()
    monkeypatch.chdir("a")
    interrupted(monkeypatch, 2)
    assert run("finetune", "../text", "--save", name, "--model", "../model", *FEW) == 130
    assert Path(f"{os.path.abspath(name)}.checkpoint").exists()


def test_what_is_stopped_while_it_loads_keeps_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert finetune("--checkpoint", "c") == 130
    assert "nothing is kept in c yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "held"), [(["--checkpoint", "c", "--save", "b"], "c"), (["--checkpoint", "d"], "a"), ([], "a")]
)
def test_two_trainings_cannot_write_one_file(folder, capsys, monkeypatch, other, held):
    said, right = [], Adam.step

    def step(self, grads):
        if not said:
            said.append(finetune(*other))
            said.append(capsys.readouterr().err)
        right(self, grads)

    monkeypatch.setattr(Adam, "step", step)
    assert finetune("--checkpoint", "c") == 0
    assert said == [2, f"minilora: another training writes {held!r}: wait for its end, or name another\n"]
    assert finetune("--checkpoint", "c") == 0


@pytest.mark.parametrize(("option", "name"), [("--log", "diary.jsonl"), ("--plot", "mine.svg")])
def test_no_file_is_replaced_without_a_word(folder, capsys, option, name):
    pytest.importorskip("matplotlib")
    few = ["finetune", "text", "--model", "model", *FEW, "--steps", "2", option, name]
    Path(name).write_text("dear diary")
    assert run(*few, "--save", "a") == 2
    assert f"{name!r} is there already: name another, or say --overwrite" in capsys.readouterr().err
    assert Path(name).read_text() == "dear diary"
    assert run(*few, "--save", "a", "--overwrite") == 0
    assert Path(name).read_text() != "dear diary"


@pytest.mark.parametrize(("option", "name"), [("--log", "diary.jsonl"), ("--plot", "mine.svg")])
def test_a_training_that_goes_on_replaces_its_own_files_alone(folder, capsys, option, name):
    pytest.importorskip("matplotlib")
    typed = ["finetune", "text", "--save", "a", "--model", "model", *FEW, "--steps", "2", "--checkpoint", "c"]
    assert run(*typed, option, f"its-{name}") == 0
    Path(name).write_text("dear diary")
    assert run(*typed, option, name) == 2
    assert f"{name!r} is there already: name another, or say --overwrite" in capsys.readouterr().err
    assert Path(name).read_text() == "dear diary"
    Path(name).unlink()
    for steps in "345":
        assert run(*typed, "--steps", steps, *([option, name] if steps != "4" else [])) == 0


def test_another_name_of_a_log_keeps_what_it_had(folder):
    Path("own").write_text("mine")
    Path("l.jsonl").hardlink_to("own")
    assert finetune("--steps", "2", "--log", "l.jsonl") == 0
    assert Path("own").read_text() == "mine"
    assert len(Path("l.jsonl").read_text().splitlines()) == 3


def test_a_run_that_fails_before_its_first_step_empties_no_log(folder, monkeypatch):
    Path("l.jsonl").write_text("the last run's")
    monkeypatch.setattr(Step, "__call__", lambda *a: (_ for _ in ()).throw(ValueError("broken")))
    assert finetune("--log", "l.jsonl") == 2
    assert Path("l.jsonl").read_text() == "the last run's"


def test_a_training_outlives_its_log(folder, capsys, monkeypatch):
    right, folder_of_log = Adam.step, Path("logs")
    folder_of_log.mkdir()

    def step(self, grads):
        right(self, grads)
        if self.t == 3:
            Path("logs/l.jsonl").unlink()
            Path("logs/l.jsonl").mkdir()  # it can be written no more

    monkeypatch.setattr(Adam, "step", step)
    assert finetune("--steps", "8", "--log", "logs/l.jsonl") == 0
    assert capsys.readouterr().err.count("the log ends before step 3, and the training goes on: ") == 1
    assert Path("a").exists()


def test_a_checkpoint_replaces_no_other_trainings_adapter(folder, capsys):
    few = ["finetune", "text", "--model", "model", *FEW]
    assert run(*few, "--save", "precious", "--seed", "7") == 0
    before = weights("precious")
    assert run(*few, "--save", "mine", "--checkpoint", "c") == 0
    assert run(*few, "--save", "precious", "--checkpoint", "c") == 2
    assert "save 'precious' holds an adapter: name another folder, or say --overwrite" in capsys.readouterr().err
    assert weights("precious") == before
    assert run(*few, "--save", "mine", "--checkpoint", "c") == 0
    assert run(*few[:-2], "--lr", "0.02", "--steps", "31", "--save", "mine", "--checkpoint", "c") == 0


@pytest.mark.parametrize("checkpoint", [[], ["--checkpoint", "c"]], ids=["unasked", "checkpoint"])
@pytest.mark.parametrize("moment", ["before", "behind"])
def test_a_kill_beside_the_save_leaves_a_training_that_goes_on(folder, monkeypatch, moment, checkpoint):
    """Which knows the adapter that it was about to write, and the one that it wrote before."""
    monkeypatch.setattr("minilora.language.resume.SHARE", 1e9)  # kept after each step
    typed = ["finetune", "text", "--save", "a", "--model", "model", *FEW[2:], *checkpoint]
    assert run(*typed, "--steps", "5", "--save", "whole", "--overwrite") == 0
    if checkpoint:
        Path("c").unlink()
        assert run(*typed, "--steps", "4") == 0
    with monkeypatch.context() as patched:

        def cut_short(path, **given):
            if Path(path) != Path("a") or moment == "behind":
                save_adapter(path, **given)
            if Path(path) == Path("a"):
                raise KeyboardInterrupt

        patched.setattr("minilora.language.finetune.save_adapter", cut_short)
        assert run(*typed, "--steps", "5") == 130
    assert Path("a").exists() == bool(checkpoint or moment == "behind")
    assert run(*typed, "--steps", "5") == 0
    assert weights() == weights("whole")
    save_adapter("a", load_adapter("whole"), overwrite=True)  # somebody else's
    assert run(*typed, "--steps", "5") == 2


def test_a_save_that_fails_says_what_is_kept_and_what_goes_on(folder, capsys, monkeypatch):
    monkeypatch.setattr("minilora.language.resume.SHARE", 1e9)
    typed = ["finetune", "text", "--save", "a", "--model", "model", *FEW]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora"])
    full = OSError(28, "No space left on device", "a")
    with monkeypatch.context() as patched:
        patched.setattr("minilora.language.finetune.save_adapter", lambda *a, **k: (_ for _ in ()).throw(full))
        assert run(*typed) == 2
    first, second, command = capsys.readouterr().err.splitlines()
    assert first == "minilora: [Errno 28] No space left on device: 'a'"
    assert second == "minilora: step 30 of 30 is kept in a.checkpoint, and this command goes on from there:"
    assert run(*shlex.split(command)[1:]) == 0


def test_a_training_that_cannot_be_kept_goes_on_unless_that_was_asked(folder, capsys, monkeypatch):
    monkeypatch.setattr("minilora.language.resume.SHARE", 1e9)
    right = Checkpoint.keep

    def full(self, state):
        if state.epoch > 1:
            raise OSError(28, "No space left on device", str(self.path))
        right(self, state)

    monkeypatch.setattr(Checkpoint, "keep", full)
    assert finetune() == 0
    assert capsys.readouterr().err == (
        "minilora: the training is not kept after step 2, and goes on: [Errno 28] No space left on device: "
        "'a.checkpoint'\n"
    )
    assert finetune("--checkpoint", "c") == 2
    assert "minilora: step 1 of 30 is kept in c, and this command" in capsys.readouterr().err


@pytest.mark.long
def test_a_finetuning_that_was_interrupted_goes_on_bit_for_bit(folder):
    arguments = ["--steps", "50", "--checkpoint", "c"]
    command = [
        sys.executable,
        "-m",
        "minilora",
        "finetune",
        "text",
        "--model",
        "model",
        "--save",
        "a",
        *FEW,
        *arguments,
    ]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where this process ignores it
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, preexec_fn=heard) as first:
        while not Path("c").exists() and first.poll() is None:
            time.sleep(0.002)
        time.sleep(0.03)  # some steps
        first.send_signal(signal.SIGINT)
        assert first.wait() == 130
    assert not Path("a").exists()
    assert finetune(*arguments) == 0
    resumed = Path("a", "adapter_model.safetensors").read_bytes()
    assert finetune(*arguments[:2]) == 0
    assert Path("a", "adapter_model.safetensors").read_bytes() == resumed


GOING_ON = ["--schedule", "cosine", "--warmup", "0.1", "--dropout", "0.2", "--keep-best", "--lr", "0.3", "--seed", "1"]
GOING_ON += ["--max-grad-norm", "0.5", "--weight-decay", "0.2"]


OTHERS = {
    "--max-grad-norm 1": "--max-grad-norm is 0.5 there and 1 here",
    "--weight-decay 0": "--weight-decay is 0.2 there and 0 here",
}


def test_a_training_with_all_of_them_goes_on_to_the_same_bits(folder, capsys, monkeypatch):
    some = ["--steps", "24", *GOING_ON]
    assert finetune(*some) == 0
    whole, shown = weights(), rows(capsys.readouterr().out)
    right = Adam.step

    def pressed(self, grads):
        if self.t == 22:
            raise KeyboardInterrupt
        right(self, grads)

    with monkeypatch.context() as patched:
        patched.setattr(Adam, "step", pressed)
        assert finetune(*some, "--checkpoint", "c") == 130
    capsys.readouterr()
    assert read_checkpoint(Path("c")).epoch == 22
    for other, said in OTHERS.items():
        assert finetune(*some, "--checkpoint", "c", *other.split()) == 2
        assert said in capsys.readouterr().err
    assert finetune(*some, "--checkpoint", "c", "--recompute") == 0  # which is no other training
    assert rows(capsys.readouterr().out) == shown
    assert weights() == whole


PASSES = ["--batch-size", "5", "--valid", "0.2", "--eval-rows", "3", "--eval-every", "3", "--log-every", "2"]


@pytest.mark.parametrize("stop", range(1, 11))
@pytest.mark.parametrize(
    "long",
    [
        ["--epochs", "2"],
        pytest.param(["--steps", "11", "--dropout", "0.2", "--keep-best"], marks=pytest.mark.long),
    ],
)
def test_a_stop_at_any_step_of_passes_changes_no_bit(folder, capsys, monkeypatch, long, stop):
    """Of 21 examples to train on: four steps of 5 and one of 1 are a pass."""
    examples("e.jsonl", [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 1])
    command = ["finetune", "e.jsonl", "--model", "model", "--save", "a", "--rank", "1", "--lr", "0.02", *PASSES, *long]
    assert run(*command) == 0
    whole, shown = weights(), held_out_and_steps(capsys.readouterr().out)
    with monkeypatch.context() as patched:
        interrupted(patched, stop)
        assert run(*command, "--overwrite", "--checkpoint", "c") == 130
    capsys.readouterr()
    assert run(*command, "--overwrite", "--checkpoint", "c") == 0
    out = capsys.readouterr().out
    assert f"goes on from step {stop - 1}" in out
    assert held_out_and_steps(out) == shown
    assert weights() == whole


def held_out_and_steps(out):
    """Return the rows that were printed, without their speed: step, losses, and the steps of the mean."""
    return re.findall(r"^ *(\d+) +(\d\.\d{3}) +(\d\.\d{3})?.*(of steps? .*)$", out, re.M)


def examples(name, words):
    """Write examples, one for each number of words."""
    lines = [{"prompt": "the cat ", "completion": " ".join(["sat on the mat"] * count)} for count in words]
    Path(name).write_text("\n".join(map(json.dumps, lines)))


DATA = {
    "held out": [],
    "another share": ["--valid", "0.3"],
    "a text beside examples": ["--valid", "text"],
    "longer examples beside": ["--valid", "long.jsonl"],
    "shorter examples beside": ["--valid", "short.jsonl"],
    "cut examples beside": ["--valid", "long.jsonl", "--length", "17"],
    "epochs": ["--epochs", "0.5"],
    "another seed": ["--seed", "3"],
    "parts": ["--batch-size", "5", "--micro-batch", "2"],
    "dropout": ["--dropout", "0.2", "--valid", "long.jsonl"],
    "some rows measured": ["--valid", "long.jsonl", "--eval-rows", "2", "--eval-every", "2", "--log-every", "1"],
}


@pytest.mark.parametrize("free", [10**10, 400_000], ids=["free memory", "little memory"])
@pytest.mark.parametrize("options", DATA.values(), ids=DATA)
def test_the_same_command_goes_on_whatever_the_data(folder, monkeypatch, capsys, options, free):
    examples("e.jsonl", [1, 2, 3, 4, 5, 1, 2, 3, 4, 9, 2, 1] * 2)
    examples("long.jsonl", [12, 1, 3])
    examples("short.jsonl", [1, 1])
    has_memory(monkeypatch, 10**10, free)
    usual = ["--batch-size", "4"] + ([] if "--epochs" in options else ["--steps", "3"])
    command = [
        "finetune",
        "e.jsonl",
        "--model",
        "model",
        "--save",
        "a",
        "--rank",
        "2",
        "--lr",
        "0.02",
        *usual,
        *options,
    ]
    assert run(*command, "--anyway") == 0
    whole, shown = weights(), rows(capsys.readouterr().out)
    with monkeypatch.context() as patched:
        interrupted(patched, 3)
        assert run(*command, "--anyway", "--overwrite", "--checkpoint", "c") == 130
    has_memory(monkeypatch, 10**10, 10**9)  # another program has ended
    capsys.readouterr()
    assert run(*command, "--overwrite", "--checkpoint", "c") == 0
    assert rows(capsys.readouterr().out) == shown
    assert weights() == whole


def test_a_length_that_was_not_asked_for_is_another_training(folder, capsys):
    examples("e.jsonl", [1, 2, 3, 4])
    few = ["finetune", "e.jsonl", "--model", "model", "--save", "a", "--batch-size", "2", "--steps", "1"]
    assert run(*few, "--checkpoint", "c") == 0
    assert run(*few, "--checkpoint", "c", "--length", "9") == 2
    assert "--length is not given there and 9 here" in capsys.readouterr().err


@pytest.mark.long
def test_it_goes_on_from_a_checkpoint_and_only_from_that_adapter(folder, capsys, monkeypatch):
    assert finetune() == 0
    assert run(*GO_ON, *SIZES[2:], "--steps", "9") == 0
    whole = weights("b")
    assert run(*GO_ON, "--overwrite", *SIZES, "--checkpoint", "c") == 0
    assert run(*GO_ON, *SIZES[2:], "--steps", "9", "--checkpoint", "c") == 0
    assert weights("b") == whole
    assert finetune("--seed", "3") == 0
    capsys.readouterr()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run(*GO_ON, *SIZES[2:], "--steps", "9", "--checkpoint", "c") == 2
    assert "the adapter to go on from is another" in capsys.readouterr().err


def test_the_loss_before_the_training_is_not_measured_again(folder, capsys, monkeypatch):
    assert finetune("--steps", "20", "--checkpoint", "c") == 0
    before = rows(capsys.readouterr().out)
    measured, right = [], Step.evaluate
    monkeypatch.setattr(Step, "evaluate", lambda *a: measured.append(a) or right(*a))
    assert finetune("--steps", "40", "--checkpoint", "c") == 0
    assert len(measured) == 1
    after = rows(capsys.readouterr().out)
    assert after[:2] == before
    assert finetune("--steps", "40", "--checkpoint", "c") == 0  # one that is done
    assert rows(capsys.readouterr().out) == after
    assert len(measured) == 1


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


NOTES = {
    "asked": {},
    "numbers": 1,
    "length": 8,
    "before": 1.0,
    "saved": [],
    "wrote": [],
    "losses": {},
}


@pytest.mark.parametrize("change", [{"asked": 1}, {"before": None}, {"losses": {"1": [0.5]}}])
def test_a_checkpoint_of_another_program_is_refused(folder, change, capsys):
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


def test_a_models_file_is_known_by_its_size_and_its_ends(tmp_path):
    found = []
    for number, content in enumerate(
        (b"abcdefgh", b"abcd-efgh", b"abcd+efgh", b"Abcdefgh", b"abcdefgH", b"ab", b"abab")
    ):
        (tmp_path / str(number)).write_bytes(content)
        found.append(digest(tmp_path / str(number), ends=4))
    assert found.index(found[2]) == 1  # alone the middle of a large file is not read
    assert len({*found}) == len(found) - 1


def test_each_shard_tells_a_model_from_another(tmp_path):
    folder, recipe = model(tmp_path / "m", shards=3), Recipe(text=tmp_path / "t", save=tmp_path / "a")
    recipe.text.write_text("text")
    seen = [asked(recipe, folder, get_backend("numpy"))["--model"]]
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as shard:
            shard.seek(-1, os.SEEK_END)
            shard.write(b"\x77")
        seen.append(asked(recipe, folder, get_backend("numpy"))["--model"])
    assert len({*seen}) == 4


def test_an_adapter_is_known_by_both_of_its_files(tmp_path):
    save_adapter(tmp_path, {"fc": adapt(Linear(np.eye(3)), [""], rank=1, alpha=1, rng=np.random.default_rng(0))})
    seen = [digest_of_adapter(tmp_path)]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b" ")
        seen.append(digest_of_adapter(tmp_path))
        os.rename(tmp_path / name, tmp_path / "away")
        assert digest_of_adapter(tmp_path) == ""
        os.rename(tmp_path / "away", tmp_path / name)
    assert len({*seen}) == 3


# --- the best step ---


X = np.random.default_rng(1).standard_normal((8, 3))


def trained(path, epochs, losses, keeper=BestStep):
    """Train with losses that are given, and return the model, its parameters after each epoch, and the history."""
    rng, weights, measured = np.random.default_rng(0), [], iter(losses)
    model = Linear.init(3, 2, rng=rng, dtype="float64")

    class Gradients:
        def __call__(self, model, x, y, loss):
            return {"weight": model.weight * 0 + 1, "bias": model.bias * 0 + 1}

        def evaluate(self, *_):
            return next(measured)

    best = keeper(Checkpoint(path))
    history = train(
        model, X, X[:, :2], epochs=epochs, steps=1, batch_size=4, log_every=1, rng=rng, gradients=Gradients(),
        checkpoint=best, report=lambda state: weights.append(state.model.weight.copy()),
    )  # fmt: skip
    return model, weights, best, history


@pytest.mark.parametrize(
    ("losses", "step"), [([3.0, 1.0, 2.0], 2), ([3.0, 2.0, 1.0], 3), ([1.0, 1.0, 1.0], 1), ([1.0, 2.0, 3.0], 1)]
)
def test_the_step_of_the_least_loss_comes_back(losses, step, tmp_path):
    model, weights, best, history = trained(tmp_path / "c", 3, losses)
    assert best.bring_back(model, history) == step
    np.testing.assert_array_equal(model.weight, weights[step - 1])


def test_a_training_that_goes_on_brings_back_a_step_from_before(tmp_path):
    _, weights, *_ = trained(tmp_path / "c", 2, [1.0, 5.0])
    model, _, best, history = trained(tmp_path / "c", 4, [4.0, 3.0])
    assert best.bring_back(model, history) == 1
    np.testing.assert_array_equal(model.weight, weights[0])
    assert history.losses == [1.0, 5.0, 4.0, 3.0]


def test_nothing_is_kept_beside_where_nobody_asks(tmp_path):
    trained(tmp_path / "c", 2, [1.0, 5.0], keeper=lambda checkpoint: checkpoint)
    assert not read_checkpoint(tmp_path / "c").arrays["best"]
    assert not any(name.startswith("best.") for name in load_file(tmp_path / "c"))


def test_what_is_noted_is_a_copy():
    model = Linear.init(3, 2, rng=np.random.default_rng(0), dtype="float64")
    optimizer = Adam(model.trainable())
    best = BestStep(SimpleNamespace(best={}, keep=lambda state: None))
    state = type("State", (), {"optimizer": optimizer, "history": History([1], [1.0]), "epoch": 1})()
    best.keep(state)
    before = model.weight.copy()
    model.weight += 1
    np.testing.assert_array_equal(best.params["weight"], before)
