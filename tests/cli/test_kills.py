"""A fine-tuning that is killed at any moment goes on to the same bits, and no reader finds a mixture of two adapters.

It finds the old one, the new one, or a folder without a configuration, which every reader refuses.

A moment is a step of Adam, or a change of the disk: a file that is opened to be written, synced, linked, renamed or
removed. The process is killed just before it, as nothing can catch.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import Adam, cli
from minilora.language import resume

from ..support.command_line import finetune
from ..support.language import TEXT

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")

CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}
MOMENTS = 20
FILES = ("adapter_config.json", "adapter_model.safetensors", "log", "a.checkpoint")
OPTIONS = {
    "alone": [],
    "over an adapter": ["--overwrite"],
    "a checkpoint": ["--overwrite", "--checkpoint", "c", "--log", "log"],
    "the best step": ["--overwrite", "--keep-best", "--lr", "0.3", "--checkpoint", "c"],
    "dropout": ["--dropout", "0.2", "--checkpoint", "c"],
    "a schedule": ["--overwrite", "--schedule", "cosine", "--warmup", "0.3", "--log", "log"],
    "parts": ["--micro-batch", "1", "--workers", "2", "--checkpoint", "c", "--eval-every", "2", "--eval-rows", "9"],
    "epochs": ["--epochs", "0.06", "--checkpoint", "c"],
    "DoRA": ["--overwrite", "--use-dora", "--weight-decay", "0.1", "--max-grad-norm", "0.1"],
    "PiSSA": ["--init", "pissa", "--checkpoint", "c"],
    "in four bits": ["--overwrite", "--quantize", "nf4", "--target-modules", "q_proj,v_proj"],
    "from an adapter": ["--adapter", "../first", "--valid", "../other"],
}

EACH_CHANGE = ("over an adapter", "a checkpoint", "parts")
"""The sets that every change waits for; the others are for the night."""


def tuned(place, options, count, at=0):
    """Run a fine-tuning in a folder, and be killed at that moment; or count all of them."""

    def moment():
        count.value += 1
        if count.value == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event, arguments):
        if event in CHANGES or (event == "open" and {*(arguments[1] or "")} & {*"xwa"}):
            moment()

    def step(self, grads, right=Adam.step):
        moment()
        right(self, grads)

    os.chdir(place)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
    resume.CHECKPOINT_SHARE = 1e9  # a training that nobody asked to keep is kept after each step, too
    Adam.step, os.fsync = step, lambda handle: moment()
    sys.addaudithook(heard)
    command = ["finetune", "../text", "--model", "../model", "--save", "a", "--length", "8", "--batch-size", "2"]
    command += [] if "--epochs" in options else ["--steps", "5"]
    command += [] if "--adapter" in options else ["--rank", "2"]
    sys.exit(cli.main([*command, *options]))


def ended(place, options, at=0):
    """Return how a process that fine-tunes in a folder ended, and how many moments it had."""
    processes = multiprocessing.get_context("forkserver")
    # This module is not among them: the server has no path of its own, and takes any installed `tests` for ours.
    processes.set_forkserver_preload(["minilora.language.finetune"])
    count = processes.Value("i", 0)
    process = processes.Process(target=tuned, args=(place, options, count, at))
    process.start()
    process.join()
    return process.exitcode, count.value


def found(place):
    """Return what lies in a folder for any reader: an adapter's two files, the log, and what is kept unasked."""
    files = {name: place / name for name in FILES} | {name: place / "a" / name for name in FILES[:2]}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


SETS = [
    pytest.param(options, id=name, marks=pytest.mark.long if name in EACH_CHANGE else pytest.mark.full)
    for name, options in OPTIONS.items()
]


@pytest.mark.parametrize("options", SETS)
def test_killed_at_twenty_moments_it_ends_with_the_same_bits(folder, options):
    assert finetune("--save", "first", "--steps", "2", "--rank", "1") == 0
    Path("other").write_text(TEXT[7:300])

    def new_place(name):
        (folder / name).mkdir()
        if "--overwrite" in options:
            (folder / name / "a").mkdir()
            for file in FILES[:2]:
                (folder / name / "a" / file).write_bytes((folder / "first" / file).read_bytes())
        return folder / name

    old = found(unbroken := new_place("unbroken"))
    code, moments = ended(unbroken, options)
    assert code == 0
    whole = found(unbroken)
    assert {*whole} == {*FILES[:2], *(["log"] if "--log" in options else [])}
    assert whole != old
    adapters = [{name: state.get(name) for name in FILES[:2]} for state in (old, whole)]
    for at in np.linspace(1, moments, MOMENTS).astype(int).tolist():
        place = new_place(str(at))
        assert ended(place, options, at)[0] == -signal.SIGKILL
        left = found(place)
        assert FILES[0] not in left or {name: left.get(name) for name in FILES[:2]} in adapters
        if left != whole:  # it was not done
            assert ended(place, options)[0] == 0
        assert found(place) == whole
