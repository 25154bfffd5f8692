"""The command line, run in this process, and what it printed."""

import re
import shlex
from pathlib import Path

import pytest

from minilora import cli

FEW = "--steps 6 --batch-size 4 --length 8 --rank 2 --lr 0.02 "
FINETUNE = f"finetune text --save a --overwrite --model model {FEW}"
"""A fine-tuning of a moment, of the model of the fixture `folder` on its text."""
QUICK = f"{FINETUNE} --steps 3 --target-modules q_proj "
"""The same in half of the time."""


def run(line: str, *more: str) -> int:
    """Run a command, some words as one types them and some more; argparse leaves by SystemExit with the exit code."""
    try:
        return cli.main([*shlex.split(line), *more])
    except SystemExit as leave:
        return int(leave.code or 0)


class Shell:
    """The command line in this process: a call returns what was printed, and what went to stderr is in `err`."""

    def __init__(self, capsys):
        self.capsys = capsys

    def __call__(self, line, *more, code=0):
        self.capsys.readouterr()
        assert run(line, *map(str, more)) == code
        out, self.err = self.capsys.readouterr()
        return out

    def refused(self, line, *more):
        """Return what the command is refused with."""
        self.out = self(line, *more, code=2)
        assert self.err.startswith("minilora: ")
        return self.err[len("minilora: ") : -1]


@pytest.fixture
def shell(capsys):
    return Shell(capsys)


def finetune(line="", *more):
    return run(FINETUNE + line, *more)


def weights(name="a"):
    """Return the bytes of the numbers of an adapter."""
    return Path(name, "adapter_model.safetensors").read_bytes()


def losses(out):
    """Return the held-out losses that were printed, by step."""
    return {row[0]: row[-1] for row in rows(out)}


def rows(out):
    """Return step, training and held-out loss of each row with the latter that was printed; of step 0 it alone."""
    texts = re.findall(r"^ *(\d+) +(?:(\d+\.\d{3}) +)?(\d+\.\d{3})(?: |$)", out, re.M)
    return [(int(step), float(training) if training else None, float(held_out)) for step, training, held_out in texts]
