"""A fine-tuning that was stopped: what is said, what goes on to the same bits, and which other is refused."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Adam, Linear, Llama, adapt, cli, load_adapter, save_adapter, train
from minilora.backend import get_backend
from minilora.files import checkpoint as checkpoints
from minilora.files.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from minilora.language import finetune as finetuning
from minilora.language import resume
from minilora.language.finetune import Step
from minilora.language.losstable import LossTable
from minilora.language.recipe import SIZE_DEFAULTS, Recipe
from minilora.language.resume import (
    StoppedRun,
    TuningCheckpoint,
    digest_of_adapter,
    digest_of_contents,
    exclusive_lock,
    file_digest,
    identity_of,
)

from ..audit.adapters import model
from ..support.adapter_folder import change_json
from ..support.command_line import FINETUNE, QUICK, rows, run, weights
from ..support.disk import contents
from ..support.sample import one_in

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")

ROOT = Path(__file__).parents[2]
TYPED = QUICK.replace("--overwrite", "")


@contextlib.contextmanager
def interrupted(step):
    """Let Ctrl-C come in a step."""
    right = Adam.step

    def pressed(self, grads):
        if self.t == step - 1:
            raise KeyboardInterrupt
        right(self, grads)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Adam, "step", pressed)
        yield


def stop(*given, **options):
    raise KeyboardInterrupt


@pytest.fixture
def often(folder, monkeypatch):
    """A training is kept after each step, however long that took."""
    monkeypatch.setattr("minilora.language.resume.CHECKPOINT_SHARE", 1e9)


# --- what is said, and where it is kept ---


@pytest.mark.parametrize(("asked", "kept"), [("--checkpoint c --backend cupy", "c"), ("", "it's.checkpoint")])
def test_ctrl_c_says_what_is_kept_and_what_goes_on(often, shell, standin, monkeypatch, asked, kept):
    """Without a checkpoint it is kept beside the adapter, until that is written."""
    os.rename("text", "my text")
    typed = TYPED.replace("text --save a", "'my text' --save \"it's\"") + asked
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora", *shlex.split(typed)])
    with interrupted(3):
        assert cli.main() == 130
    out, shell.err = shell.capsys.readouterr()
    first = rows(out)
    said = f"\nminilora: interrupted\nminilora: step 2 of 3 is saved in {kept}; resume with this command:"
    assert shell.err.startswith(said)
    program, *again = shlex.split(shell.err.splitlines()[-1])
    assert (program, again) == ("minilora", shlex.split(typed))
    assert not Path("it's").exists()
    resumed = shell(*again)
    assert f"resume   from step 2 of 3 ({kept})\n" in resumed
    assert sorted(os.listdir()) == ["c"] * bool(asked) + ["it's", "model", "my text"]
    assert rows(resumed) == rows(shell(typed, "--save", "whole", "--checkpoint", "new"))
    assert rows(resumed)[: len(first)] == first
    assert weights("it's") == weights("whole")


PRESSED = {  # what is called when Ctrl-C comes in step 3, and how often it was called until then
    "in the step": (Adam, "step", 3),
    "in the measurement": (finetuning, "evaluate_where_it_counts", 4),
    "after the step": (LossTable, "on_step", 3),
    "while it is written": (checkpoints, "write_tensors", 4),
}


@pytest.fixture(autouse=True)
def usual_interrupts():
    """A job in the background ignores SIGINT, and so do its tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def signalled(owner, name, *calls):
    """Send SIGINT to this process in these calls of a function, before it does anything."""
    right, count = getattr(owner, name), itertools.count(1)

    def called(*given, **options):
        if next(count) in calls:
            os.kill(os.getpid(), signal.SIGINT)
        return right(*given, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, called)
        yield


@pytest.mark.parametrize(
    ("place", "steps"),
    [(place, steps) for steps in (3, 5) for place in PRESSED if steps == 5 or "written" not in place],
)
def test_ctrl_c_keeps_the_step_it_comes_in(folder, shell, monkeypatch, place, steps):
    """Whichever was written last; the same command ends with the same bits, and no handler is left behind."""
    typed = f"{TYPED} --steps {steps} --dropout 0.2 --eval-every 1"
    shell(typed, "--save", "whole", "--log", "all")
    monkeypatch.setattr(resume, "CHECKPOINT_SHARE", 1e9 if "written" in place else 0)
    with signalled(*PRESSED[place]):
        out = shell(typed, "--log", "log", code=130)
    assert "      stopping after this step; Ctrl-C again stops at once\n" in out
    assert f"minilora: step 3 of {steps} is saved in a.checkpoint; resume" in shell.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("a").exists()
    shell(typed, "--log", "log")
    assert weights("a") == weights("whole")
    assert Path("log").read_bytes() == Path("all").read_bytes()


def test_a_second_ctrl_c_leaves_what_was_written_before(folder, shell, monkeypatch):
    typed = f"{TYPED} --steps 5"
    monkeypatch.setattr(resume, "CHECKPOINT_SHARE", 0)
    with signalled(Adam, "step", 2), signalled(checkpoints, "write_tensors", 2):  # the second time it is written
        shell(typed, code=130)
    assert "step 0 of 5 is saved in a.checkpoint" in shell.err
    assert sorted(os.listdir()) == ["a.checkpoint", "model", "text"]
    with signalled(Adam, "step", 2), signalled(LossTable, "on_step", 2):  # before it is written
        shell(typed, code=130)
    assert "step 1 of 5 is saved in a.checkpoint" in shell.err


def test_ctrl_c_while_the_adapter_is_saved_ends_no_command(folder, shell, monkeypatch):
    monkeypatch.setattr(resume, "CHECKPOINT_SHARE", 0)
    with signalled(checkpoints, "write_tensors", 2):
        assert "adapter written to a" in shell(TYPED)
    assert sorted(os.listdir()) == ["a", "model", "text"]


def test_out_of_the_main_thread_ctrl_c_is_as_usual(folder):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(TYPED)))
    thread.start()
    thread.join()
    assert done == [0]


def test_of_epochs_the_steps_to_come_are_not_told(often, shell, monkeypatch):
    few = "finetune text --model model --save a --batch-size 4 --length 8 --epochs 0.05 --target-modules q_proj"
    with interrupted(3):
        shell(few, code=130)
    assert "minilora: step 2 is saved in a.checkpoint; resume with this command:\n" in shell.err
    monkeypatch.setitem(SIZE_DEFAULTS, "steps", (1, 1))  # which are those of no epoch: more may be done
    assert "resume   from step 2 (a.checkpoint)\n" in shell(few)


def test_it_is_kept_beside_the_folder_whatever_its_name():
    for name in (".", "../a/", "../model/.."):
        beside = Recipe(text=Path("text"), save=Path(name)).checkpoint_path
        assert os.path.abspath(beside) == f"{os.path.abspath(name)}.checkpoint"


def test_a_stopped_training_gives_way_when_asked(folder, shell, monkeypatch):
    with interrupted(2):
        shell(TYPED, code=130)
    said = (
        "--seed is 0 there and 5 here. Use the same configuration, or choose another checkpoint, or start afresh with "
        "--overwrite"
    )
    assert said in shell.refused(TYPED, "--seed", "5")
    kept = Path("a.checkpoint").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Llama, "load", stop)
        shell(TYPED, "--seed", "5", "--overwrite", code=130)
    assert "nothing is saved in a.checkpoint yet" in shell.err
    assert Path("a.checkpoint").read_bytes() == kept  # until the other begins
    shell(TYPED, "--seed", "5", "--overwrite")
    assert not Path("a.checkpoint").exists()


def test_two_trainings_cannot_write_one_file(folder, capsys, monkeypatch):
    others = {"--checkpoint c --save b": "c", "--checkpoint d": "a", "": "a"}
    said, right = [], Adam.step

    def step(self, grads):
        for other in others if not said else ():
            said.append((run(f"{QUICK} {other}"), capsys.readouterr().err))
        right(self, grads)

    monkeypatch.setattr(Adam, "step", step)
    assert run(f"{QUICK} --checkpoint c") == 0
    end = "wait for it to end, or use another path\n"
    assert said == [(2, f"minilora: another run is writing {held!r}: {end}") for held in others.values()]
    assert run(f"{QUICK} --checkpoint c") == 0


def test_two_names_of_one_folder_are_held_as_one(tmp_path):
    """Of a folder that is there, and of one that is not there yet."""
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "to_come").symlink_to("new")
    for name, other in (("a", "link"), ("link", "a"), ("new", "to_come")):
        with exclusive_lock(tmp_path / name), exclusive_lock(tmp_path / "beside"):
            said = f"another run is writing {str(tmp_path / other)!r}: wait for it to end, or use another path"
            said = re.escape(said)
            with pytest.raises(ValueError, match=f"^{said}$"), exclusive_lock(tmp_path / other):
                pass


# --- the files beside ---


def test_a_training_replaces_its_own_files_alone(folder, shell, pictures):
    typed, diaries = f"{TYPED} --steps 2", {"--log": "diary.jsonl", "--plot": "mine.svg"}
    both = " ".join(f"{option} {name}" for option, name in diaries.items())
    shell(f"{typed} --checkpoint c --log its.jsonl --plot its.svg")
    for option, name in diaries.items():
        Path(name).write_text("dear diary")
        for more in ("--checkpoint c", "--save b"):  # one that goes on, and one that begins
            said = f"{name!r} already exists: choose another path, or pass --overwrite"
            assert said in shell.refused(f"{typed} {more} {option} {name}")
            assert Path(name).read_text() == "dear diary"
    for option, name in diaries.items():
        said = f"{name!r} was not written by minilora, so --overwrite does not replace it: choose another path"
        assert said in shell.refused(f"{typed} --save b --overwrite {option} {name}")
        assert Path(name).read_text() == "dear diary"
        Path(name).unlink()
    shell(f"{typed} --save b {both}")
    before = Path("diary.jsonl").read_bytes()
    shell(f"{typed} --save b --overwrite --seed 5 {both}")
    assert Path("diary.jsonl").read_bytes() != before
    for name in diaries.values():
        Path(name).unlink()
    for steps in "345":
        shell(f"{typed} --checkpoint c --steps {steps} {both if steps != '4' else ''}")


def test_overwrite_replaces_nothing_of_others(folder, shell):
    """Neither a checkpoint's file nor an adapter nor skipped lines, whatever they are; a damaged checkpoint is ours."""
    shell(TYPED, "--save", "own")
    save_file(load_file("own/adapter_model.safetensors"), "foreign", metadata={"format": "pt"})
    Path("foreign_adapter").mkdir()
    shutil.copy("own/adapter_config.json", "foreign_adapter")
    shutil.copy("foreign", "foreign_adapter/adapter_model.safetensors")
    for name, text in (("a.checkpoint", b"my notes"), ("d.checkpoint", Path("foreign").read_bytes())):
        Path(name).write_bytes(text)
        said = f"the checkpoint {name!r} was not written by minilora, so --overwrite does not replace it: "
        assert said in shell.refused(TYPED, "--save", name[0], "--overwrite")
        assert Path(name).read_bytes() == text
    before = contents("foreign_adapter")
    said = "save 'foreign_adapter/adapter_model.safetensors' was not written by minilora, so --overwrite does not "
    assert said in shell.refused(TYPED, "--save", "foreign_adapter", "--overwrite")
    assert contents("foreign_adapter") == before
    Path("foreign_adapter/adapter_model.safetensors").unlink()
    shell.refused(TYPED, "--save", "foreign_adapter", "--overwrite")
    assert list(contents("foreign_adapter")) == ["adapter_config.json"]
    with interrupted(3):
        shell(TYPED, "--save", "e", code=130)
    damaged = Path("e.checkpoint").read_bytes()[:-9]
    Path("e.checkpoint").write_bytes(damaged)
    said = "Choose another checkpoint, or start afresh with --overwrite"
    assert said in shell.refused(TYPED, "--save", "e")
    shell(TYPED, "--save", "e", "--overwrite")
    assert weights("e") == weights("own")


def test_a_file_of_examples_is_no_file_of_skipped_lines(folder, shell):
    examples("e.jsonl", [1, 2, 3, 4, 5, 1, 2, 3])
    Path("mine.jsonl").write_text(before := Path("e.jsonl").read_text())
    with Path("e.jsonl").open("a") as file:
        file.write("\n{")
    said = "file of skipped lines 'mine.jsonl' was not written by minilora, so --overwrite does not replace it"
    typed = "finetune e.jsonl --model model --save a --batch-size 2 --overwrite --skip-bad mine.jsonl"
    assert said in shell.refused(typed)
    assert Path("mine.jsonl").read_text() == before


def test_another_name_of_a_log_keeps_what_it_had(folder):
    mine = '{"step": 0, "mine": 1}'
    Path("own").write_text(mine)
    Path("l.jsonl").hardlink_to("own")
    assert run(f"{QUICK} --log l.jsonl") == 0
    assert Path("own").read_text() == mine
    assert len(Path("l.jsonl").read_text().splitlines()) == 4


def test_a_run_that_fails_before_step_1_empties_no_log(folder, shell, monkeypatch):
    Path("l.jsonl").write_text('{"step": 0, "of": "the last run"}')
    monkeypatch.setattr(Step, "__call__", lambda *a: (_ for _ in ()).throw(ValueError("broken")))
    shell.refused(QUICK, "--log", "l.jsonl")
    assert Path("l.jsonl").read_text() == '{"step": 0, "of": "the last run"}'


def test_a_training_outlives_its_log(folder, shell, monkeypatch):
    right = Adam.step
    Path("logs").mkdir()

    def step(self, grads):
        right(self, grads)
        if self.t == 2:
            Path("logs/l.jsonl").unlink()
            Path("logs/l.jsonl").mkdir()  # it can be written no more

    monkeypatch.setattr(Adam, "step", step)
    shell(QUICK, "--steps", "4", "--log", "logs/l.jsonl")
    assert shell.err.count("the log ends before step 2, but training continues: ") == 1
    assert Path("a").exists()


def test_a_checkpoint_replaces_no_other_trainings_adapter(folder, shell):
    shell(TYPED, "--save", "precious", "--seed", "7")
    before = contents("precious")
    mine = f"{TYPED} --steps 3 --checkpoint c"
    shell(mine)
    said = "save 'precious' already has an adapter: choose another folder, or pass --overwrite"
    assert shell.refused(mine, "--save", "precious") == said
    assert contents("precious") == before
    for steps in "34":
        shell(mine, "--steps", steps)


SAVES = [(moment, more) for moment in ("unkept", "before", "behind") for more in ("--checkpoint c", "")]


@pytest.mark.parametrize(("moment", "checkpoint"), one_in(2, SAVES, map(" ".join, SAVES)))
def test_after_a_kill_beside_the_save_training_goes_on(often, shell, monkeypatch, moment, checkpoint):
    """Which knows the adapter that it was about to write, and the one that it wrote before."""
    typed = f"{TYPED} {checkpoint} --steps"
    shell(typed, 3, "--save", "whole", "--overwrite")
    if checkpoint:
        Path("c").unlink()
        shell(typed, 2)
    with monkeypatch.context() as patched:

        def cut_short(path, layers, *, before, **given):
            if moment == "behind":
                save_adapter(path, layers, before=before, **given)
            elif moment == "before":
                save_adapter("elsewhere", layers, before=before, **given)
            raise KeyboardInterrupt  # or the last step is not even in the checkpoint

        patched.setattr(finetuning, "save_adapter", cut_short)
        shell(typed, 3, code=130)
    assert Path("a").exists() == bool(checkpoint or moment == "behind")
    shell(typed, 3)
    assert weights() == weights("whole")
    save_adapter("a", load_adapter("whole"), overwrite=True)  # somebody else's
    shell.refused(typed, 3)


def test_the_end_writes_the_adapter_and_the_checkpoint_once(often, shell, monkeypatch):
    done, read, keep, save = [], resume.read_checkpoint, Checkpoint.keep, finetuning.save_adapter
    monkeypatch.setattr(resume, "read_checkpoint", lambda path: done.append("read") or read(path))
    monkeypatch.setattr(Checkpoint, "keep", lambda self, state: done.append(state.epoch) or keep(self, state))
    monkeypatch.setattr(finetuning, "save_adapter", lambda *a, **k: done.append("adapter") or save(*a, **k))
    typed = f"{TYPED} --checkpoint c --steps"
    for steps, expected in ((3, [0, 1, 2, 3]), (5, [4, 5]), (5, [5])):
        shell(typed, steps)
        assert done == ["read", *expected[:-1], "adapter", expected[-1]]
        kept = read(Path("c"))
        assert kept.notes["saved"][-1] == digest_of_adapter(Path("a"))
        assert (kept.epoch, kept.epochs) == (steps, [])  # the last loss is none that a longer training measures
        done.clear()
    shell(TYPED, "--save", "b")
    assert done == ["read", 0, 1, 2, "adapter", 3]
    assert not Path("b.checkpoint").exists()


def test_a_failed_save_says_what_is_kept_and_goes_on(often, shell, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/minilora"])
    full = OSError(28, "No space left on device", "a")
    with monkeypatch.context() as patched:
        patched.setattr("minilora.files.adapters._write", lambda *a, **k: (_ for _ in ()).throw(full))
        first, second, command = shell.refused(TYPED).splitlines()
    assert first == "[Errno 28] No space left on device: 'a'"
    assert second == "minilora: step 3 of 3 is saved in a.checkpoint; resume with this command:"
    shell(*shlex.split(command)[1:])


def test_training_goes_on_unkept_unless_keeping_was_asked(often, shell, monkeypatch):
    right = Checkpoint.keep

    def full(self, state):
        if state.epoch > 1:
            raise OSError(28, "No space left on device", str(self.path))
        right(self, state)

    monkeypatch.setattr(Checkpoint, "keep", full)
    shell(QUICK, "--steps", "4")
    said = "no checkpoint after step 2, the training continues: [Errno 28] No space left on device: 'a.checkpoint'"
    assert shell.err == f"minilora: {said}\n"
    assert "minilora: step 1 of 3 is saved in c; resume with this command" in shell.refused(QUICK, "--checkpoint", "c")
    saved = contents("a")
    assert "minilora: step 1 of 2 is saved" in shell.refused(QUICK, "--steps", "2", "--checkpoint", "d", "--seed", "7")
    assert contents("a") == saved  # nor is an adapter written whose last step is not kept


# --- it goes on to the same bits ---


def examples(name, words):
    """Write examples, one for each number of words."""
    lines = [{"prompt": "the cat ", "completion": " ".join(["sat on the mat"] * count)} for count in words]
    Path(name).write_text("\n".join(map(json.dumps, lines)))


MEASURED = "--batch-size 5 --valid 0.2 --eval-rows 3 --eval-every 3 --log-every 2"
GOING_ON = "--schedule cosine --warmup 0.1 --dropout 0.2 --keep-best --lr 0.3 --seed 1"
GOING_ON += " --max-grad-norm 0.5 --weight-decay 0.2"
LITTLE, MUCH = 400_000, 10**10
STOPPED = [  # of 24 examples to train on; the step that is stopped, and the bytes that are free
    (f"--epochs 2 {MEASURED}", 4, MUCH),
    (f"--steps 10 --eval-every 3 {GOING_ON}", 9, MUCH),
    ("--steps 3 --valid 0.3", 3, LITTLE),
]
STOPPED_ELSEWHERE = [
    *((f"--epochs 2 {MEASURED}", step, MUCH) for step in (1, 2, 3, 5, 6, 7, 8, 9, 10)),
    (f"--steps 24 {GOING_ON} --target-modules all-linear", 23, MUCH),
    (f"--steps 11 {MEASURED} --dropout 0.2 --keep-best", 7, MUCH),
    ("--steps 3", 3, LITTLE),
    ("--steps 3 --valid text", 3, LITTLE),  # a text beside examples
    ("--steps 3 --valid long.jsonl", 3, LITTLE),
    ("--steps 3 --valid long.jsonl", 3, MUCH),
    ("--steps 3 --valid short.jsonl", 3, LITTLE),
    ("--steps 3 --valid long.jsonl --length 17", 3, LITTLE),  # cut
    ("--epochs 0.5 --seed 3", 3, LITTLE),
    ("--steps 3 --batch-size 5 --micro-batch 2", 3, LITTLE),
    ("--steps 3 --dropout 0.2 --valid long.jsonl", 3, LITTLE),
    ("--steps 3 --valid long.jsonl --eval-rows 2 --eval-every 2 --log-every 1", 3, LITTLE),
]
LONG = [pytest.param(*row, marks=pytest.mark.long) for row in STOPPED_ELSEWHERE]


@pytest.mark.parametrize(("options", "step", "free"), STOPPED + LONG)
def test_the_same_command_goes_on_to_the_same_bits(folder, machine, shell, options, step, free):
    examples("e.jsonl", [1, 2, 3, 4, 5, 1, 2, 3, 4, 9, 2, 1] * 2 + [6, 2, 1])
    examples("long.jsonl", [12, 1, 3])
    examples("short.jsonl", [1, 1])
    machine(10**10, free)
    few = "finetune e.jsonl --model model --save a --rank 2 --lr 0.02 --batch-size 4 --target-modules q_proj,v_proj"
    command = f"{few} {options}"
    shown = measured(shell(command, "--anyway"))
    whole = weights()
    with interrupted(step):
        shell(command, "--anyway", "--overwrite", "--checkpoint", "c", code=130)
    assert read_checkpoint(Path("c")).epoch == step - 1
    machine(10**10, 10**9)  # another program has ended
    out = shell(command, "--overwrite", "--checkpoint", "c", "--recompute")  # which is no other training
    assert f"from step {step - 1}" in out or step == 1
    assert measured(out) == shown
    assert weights() == whole


def measured(out):
    """Return the rows that were printed, without their speed: step, losses, and the steps of the mean."""
    return rows(out), re.findall(r"^ *(\d+) +(\d\.\d{3}) +(\d\.\d{3})?.*(of steps? .*)$", out, re.M)


def test_it_goes_on_from_a_checkpoint_of_that_adapter_alone(folder, shell, monkeypatch):
    go_on = "finetune text --save b --model model --adapter a --batch-size 4 --length 8 --lr 0.02 --steps"
    shell(QUICK)
    shell(go_on, 3)
    whole = weights("b")
    shell(go_on, 2, "--overwrite", "--checkpoint", "c")
    shell(go_on, 3, "--checkpoint", "c")
    assert weights("b") == whole
    shell(QUICK, "--seed", "3")
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert "the adapter to continue differs" in shell.refused(go_on, 3, "--checkpoint", "c")


def test_the_loss_before_the_training_is_not_measured_again(folder, shell, monkeypatch):
    typed = f"{QUICK.rstrip()},v_proj --eval-every 2 --log-every 2 --checkpoint model/kept.safetensors --steps"
    before = rows(shell(typed, 2))
    measured, right = [], finetuning.evaluate_where_it_counts
    monkeypatch.setattr(finetuning, "evaluate_where_it_counts", lambda *a, **k: measured.append(a) or right(*a, **k))
    after = rows(shell(typed, 4))  # what is kept is no weight of the model, even by its place and name
    assert len(measured) == 1
    assert after[:2] == before
    done = shell(typed.replace("q_proj,v_proj", "v_proj,q_proj"), 4)  # one that is done, of the same layers
    assert rows(done) == after
    assert len(measured) == 1


@pytest.mark.parametrize(("log_every", "steps"), [(3, 3), (2, 3), (9, 4)])
def test_a_training_that_is_done_prints_its_rows_again(folder, shell, log_every, steps):
    """With the held-out loss of the last step, whether or not a training loss would be printed there."""
    typed = f"{QUICK} --steps {steps} --log-every {log_every} --eval-every 2 --checkpoint c"
    before = rows(shell(typed))
    assert [step for step, *_ in before] == [0, 2, steps]
    assert rows(shell(typed)) == before


def test_a_training_that_goes_on_tells_how_long_it_takes(folder, shell):
    """The rest of it, from its own first step."""
    typed = f"{QUICK} --log-every 9 --eval-every 9 --checkpoint c --steps"
    assert re.search("      judging by step 1, about .* for the remaining 2\n", shell(typed, 3))
    assert re.search("      judging by step 4, about .* for the remaining 3\n", shell(typed, 7))


def test_measuring_may_change_before_it_goes_on(often, shell):
    """How often a loss is measured, and which step is saved, change no step."""
    typed = f"{TYPED} --steps 6 --lr 0.3"
    best = f"{typed} --eval-every 1 --keep-best"
    shown = rows(shell(best, "--save", "whole"))
    with interrupted(4):
        shell(typed, "--eval-every", "1", code=130)
    assert rows(shell(best)) == shown
    assert weights("a") == weights("whole")
    with interrupted(4):
        shell(best, "--save", "b", code=130)
    shell(typed, "--save", "b", "--eval-every", "4")
    shell(typed, "--save", "last")
    assert weights("b") == weights("last")
    assert weights("last") != weights("whole")


@pytest.mark.long
def test_what_need_not_be_the_same_may_change(folder):
    wide = "--dtype float64"  # other parts of a batch: the sums are rounded otherwise
    assert run(f"{FINETUNE} --steps 40 {wide}") == 0
    whole = load_adapter("a")
    assert run(f"{FINETUNE} --checkpoint c --target-modules all-linear {wide}") == 0
    os.rename("model", "moved")
    os.rename("text", "renamed")
    again = FINETUNE.replace("text", "renamed").replace("--model model", "--model moved")
    assert run(f"{again} --steps 40 --checkpoint c --micro-batch 4 --plot p.svg {wide}") == 0
    for path, adapter in load_adapter("a").items():
        np.testing.assert_allclose(adapter.delta(), whole[path].delta(), atol=1e-6)


# --- which other is refused ---


def test_another_training_is_refused_by_the_option_that_differs(folder, shell, standin, monkeypatch):
    typed = f"{QUICK} {GOING_ON} --steps 2 --warmup 1 --checkpoint c"
    shell(typed)
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    for other, said in {
        "--max-grad-norm 1": "--max-grad-norm is 0.5 there and 1 here",
        "--weight-decay 0": "--weight-decay is 0.2 there and 0 here",
        "--length 9": "--length is 8 there and 9 here",
        "--backend cupy": "--backend is numpy there and cupy here",
        f"--target-modules {'q' * 101}": f"--target-modules is q_proj there and {'q' * 47} ... {'q' * 47} here",
    }.items():
        assert said in shell.refused(f"{typed} {other}")
    change_json(Path("model/config.json"), rms_norm_eps=1e-3)
    assert "the model differs" in shell.refused(typed, "--steps", 3)


@pytest.mark.parametrize(
    ("rates", "fixed"),
    [
        ({"warmup": 0.5}, True),
        ({"schedule": "linear"}, True),
        ({"schedule": "cosine", "warmup": 2}, True),
        ({"warmup": 2}, False),
        ({}, False),
    ],
)
def test_more_steps_are_other_rates_unless_these_stay(tmp_path, rates, fixed):
    """Of a constant rate only a warmup that is a share of all steps depends on their number."""
    (tmp_path / "t").write_text("text")
    recipe = Recipe(text=tmp_path / "t", save=tmp_path / "a", **rates)
    for name in ("steps", "epochs"):
        few, more = (identity_of(replace(recipe, **{name: n}), recipe.text, get_backend("numpy")) for n in (3, 4))
        differs = {key for key in few if few[key] != more[key]}
        assert differs == ({f"--{name}, on which the rates depend,"} if fixed else set())


def test_a_length_that_was_not_asked_for_is_another_training(folder, shell):
    examples("e.jsonl", [1, 2, 3, 4])
    few = "finetune e.jsonl --model model --save a --batch-size 2 --steps 1 --checkpoint c"
    shell(few)
    assert "--length is not given there and 9 here" in shell.refused(few, "--length", "9")


def test_what_no_option_names_is_compared_by_the_arrays(folder, shell, monkeypatch):
    """A model that differs in its middle only, and a tokenizer that gives other ids."""
    monkeypatch.setattr(resume, "HASHED_BYTES", 8)
    typed = f"{TYPED} --overwrite --checkpoint c --steps"
    shell(typed, 1)
    kept, said = Path("c").read_bytes(), "'c' is a checkpoint with a different configuration: {} differs. Use"
    swapped = {b'"a"': b'"!"', b'"b"': b'"a"', b'"!"': b'"b"'}
    for name, what in (("model.safetensors", "the model"), ("tokenizer.json", "the tokenised text")):
        file = Path("model", name)
        right = changed = file.read_bytes()
        if name == "tokenizer.json":
            for one, other in swapped.items():
                changed = changed.replace(one, other)
        else:
            changed = changed[:-100] + bytes([changed[-100] ^ 1]) + changed[-99:]
        file.write_bytes(changed)
        assert shell.refused(typed, 2) == f"{said.format(what)} the same configuration, or choose another checkpoint"
        assert Path("c").read_bytes() == kept
        file.write_bytes(right)
    shell(typed, 2)


def test_a_checkpoint_of_another_program_is_refused(folder, shell):
    shell(QUICK, "--steps", 1, "--checkpoint", "c")
    notes = read_checkpoint(Path("c")).notes
    for change in ({"asked": 1}, {"before": None}, {"losses": {"1": [0.5]}}):
        Path("c").unlink()
        trained("c", 1, [1.0], Checkpoint(Path("c"), notes=notes | change))
        before = Path("c").read_bytes()
        said = "'c' is not a checkpoint of minilora finetune, or is from another version of it. Choose another "
        said += "checkpoint, or delete this one to start afresh"
        assert shell.refused(QUICK, "--checkpoint", "c") == said
        assert Path("c").read_bytes() == before


@pytest.mark.parametrize("where", ["there", "here"])
def test_what_only_one_side_has_is_a_difference(folder, where):
    kept = StoppedRun(Path("c"), SimpleNamespace(epoch=3), {})
    one = {"there": {}, "here": {}} | {where: {"--new": 1, "frozen['w']": "3 numbers"}}
    kept.check_same({"--old": None}, {"--other": None}, 3)
    said = f"--new is {'1 there and not given here' if where == 'there' else 'not given there and 1 here'}"
    with pytest.raises(CheckpointError, match=f"a different configuration: {said}; the model differs. Use"):
        kept.check_same(**one)
    with pytest.raises(CheckpointError, match=r"configuration: --steps is 2 here, but 3 are done there\. Use the same"):
        kept.check_same({}, {}, 2)


def test_a_tenth_held_out_is_what_nobody_asked_for(tmp_path):
    (tmp_path / "t").write_text("text")
    shares = (None, 0.1, 0.2)
    each = [Recipe(text=tmp_path / "t", save=tmp_path / "a", valid=share) for share in shares]
    usual, same, other = (identity_of(recipe, recipe.text, get_backend("numpy")) for recipe in each)
    assert usual == same
    assert {name for name in usual if usual[name] != other[name]} == {"--valid"}


def test_a_models_file_is_known_by_size_and_ends(tmp_path):
    found = []
    files = (b"abcdefgh", b"abcd-efgh", b"abcd+efgh", b"Abcdefgh", b"abcdefgH", b"ab", b"abab")
    for number, content in enumerate(files):
        (tmp_path / str(number)).write_bytes(content)
        found.append(file_digest(tmp_path / str(number), ends=4))
    assert found.index(found[2]) == 1  # alone the middle of a large file is not read
    assert len({*found}) == len(found) - 1


def test_each_shard_tells_a_model_from_another(tmp_path):
    folder, recipe = model(tmp_path / "m", shards=3), Recipe(text=tmp_path / "t", save=tmp_path / "a")
    recipe.text.write_text("text")
    seen = [identity_of(recipe, folder, get_backend("numpy"))["--model"]]
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as shard:
            shard.seek(-1, os.SEEK_END)
            shard.write(b"\x77")
        seen.append(identity_of(recipe, folder, get_backend("numpy"))["--model"])
    assert len({*seen}) == 4


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
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


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
def test_an_adapter_is_known_before_it_is_written(tmp_path):
    layers, said = {"fc": adapt(Linear(np.eye(3)), [""], rank=1, alpha=1, rng=np.random.default_rng(0))}, []
    save_adapter(tmp_path, layers, before=lambda *files: said.append(digest_of_contents(*files)))
    assert said == [digest_of_adapter(tmp_path)]


# --- the best step ---


X = np.random.default_rng(1).standard_normal((8, 3))


def trained(path, epochs, losses, checkpoint=None):
    """Train with losses that are given, and return the model, its parameters after each epoch, and the history."""
    rng, weights, measured = np.random.default_rng(0), [], iter(losses)
    model = Linear.init(3, 2, rng=rng, dtype="float64")

    class Gradients:
        def __call__(self, model, x, y, loss):
            return {"weight": model.weight * 0 + 1, "bias": model.bias * 0 + 1}

        def evaluate(self, *_):
            return next(measured)

    checkpoint = checkpoint or TuningCheckpoint(path, {"saved": []}, stopped_run(path), each=True)
    history = train(
        model, X, X[:, :2], epochs=epochs, steps=1, batch_size=4, log_every=1, rng=rng, gradients=Gradients(),
        checkpoint=checkpoint, report=lambda state: weights.append(state.model.weight.copy()),
    )  # fmt: skip
    if isinstance(checkpoint, TuningCheckpoint):
        checkpoint.finish()
    return model, weights, checkpoint, history


def stopped_run(path):
    """Return the training in a file, where there is one."""
    return StoppedRun(path, saved, saved.notes) if (saved := read_checkpoint(path)) else None


def test_the_step_of_the_least_loss_is_found(tmp_path):
    for best_at, losses in ((2, [3.0, 1.0, 2.0]), (3, [3.0, 2.0, 1.0]), (1, [1.0, 1.0, 1.0]), (1, [1.0, 2.0, 3.0])):
        model, weights, checkpoint, history = trained(tmp_path / str(losses), 3, losses)
        best, step = checkpoint.best_of(model, history)
        assert step == best_at
        np.testing.assert_array_equal(best.weight, weights[best_at - 1])
        np.testing.assert_array_equal(model.weight, weights[-1])  # which stays as it was


def test_after_a_stop_an_earlier_best_step_is_found(tmp_path):
    _, weights, *_ = trained(tmp_path / "c", 2, [1.0, 5.0])
    model, _, checkpoint, history = trained(tmp_path / "c", 4, [4.0, 3.0])
    best, step = checkpoint.best_of(model, history)
    assert step == 1
    np.testing.assert_array_equal(best.weight, weights[0])
    assert history.losses == [1.0, 5.0, 4.0, 3.0]


def test_the_best_step_is_kept_before_anybody_asks(tmp_path):
    for each in (True, False):
        path = tmp_path / str(each)
        trained(path, 2, [1.0, 5.0], TuningCheckpoint(path, {"saved": []}, each=each))
        assert read_checkpoint(path).arrays["best"].keys() == {"weight", "bias"}
