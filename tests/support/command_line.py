"""The command line, run in this process, and what it printed."""

import re
from pathlib import Path

import numpy as np

from minilora import cli

FEW = ["--steps", "30", "--batch-size", "4", "--length", "8", "--rank", "2", "--lr", "0.02"]
"""A fine-tuning of a second."""


def run(*arguments: str) -> int:
    """Run the command line; argparse leaves by SystemExit, whose code is the process's too."""
    try:
        return cli.main(list(arguments))
    except SystemExit as leave:
        return int(leave.code or 0)


def finetune(*more):
    """Fine-tune the model of the fixture `folder` on its text."""
    return run("finetune", "text", "--save", "a", "--overwrite", "--model", "model", *FEW, *more)


def overfitting():
    """Return options under which the held-out loss falls, then rises: the letters of the text, in no order."""
    letters = list(Path("text").read_text(encoding="utf-8")[:400])
    Path("shuffled").write_text("".join(np.random.default_rng(0).permutation(letters)), encoding="utf-8")
    return ["--valid", "shuffled", "--steps", "61", "--eval-every", "20"]


def losses(out):
    """Return the held-out losses that were printed, by step."""
    return {row[0]: row[-1] for row in rows(out)}


def rows(out):
    """Return step, training and held-out loss of each row with the latter that was printed; of step 0 it alone."""
    texts = re.findall(r"^ *(\d+) +(?:(\d+\.\d{3}) +)?(\d+\.\d{3})(?: |$)", out, re.M)
    return [(int(step), float(training) if training else None, float(held_out)) for step, training, held_out in texts]
