"""README's fine-tuning of a language model, word for word: two to three minutes (pytest -m full)."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .test_readme import BLOCKS, README

pytestmark = pytest.mark.full


def test_readmes_finetuning_reaches_the_losses_it_shows(tmp_path):
    """Machines round differently, so the same steps end with losses that differ a little, and with other words."""
    pytest.importorskip("glassllm")
    (lines,) = [code.splitlines() for language, code in BLOCKS if language == "sh" and "finetune kjv.txt" in code]
    (shown,) = [text for language, text in BLOCKS if language == "text" and "held-out loss" in text]
    commands = [shlex.split(line, comments=True) for line in lines]
    example = str(README.parent / "examples" / "05_language_model.py")
    write, finetune = (next(c for c in commands if word in c) for word in ("--write", "finetune"))
    subprocess.run([sys.executable, example, *write[2:]], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "minilora", *finetune[1:]], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    ours, theirs = (dict(re.findall(r"^ *(\d+)  (\d\.\d+)$", text, re.M)) for text in (done.stdout, shown))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 16
    for step, loss in ours.items():
        assert float(loss) == pytest.approx(float(theirs[step]), abs=0.03)
    assert done.stdout.splitlines()[:3] == shown.splitlines()[:3]
    assert Path(tmp_path, "king-james", "adapter_model.safetensors").exists()


def test_the_page_shows_readmes_run():
    page = (README.parent / "docs" / "language-model.md").read_text(encoding="utf-8")
    (shown,) = [text for language, text in BLOCKS if language == "text" and "held-out loss" in text]
    assert shown in page
