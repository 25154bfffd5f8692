"""The page's fine-tuning of a language model, word for word, and its recorded trainings: minutes (pytest -m full)."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minilora import Llama, attach, cross_entropy, evaluate, load_adapter
from minilora.language.source import ModelSource
from minilora.language.text import token_ids, windows

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("king_james")]

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "05_language_model.py")
DOCS = ROOT / "docs"
LESSON = (DOCS / "learn" / "language-model.md").read_text(encoding="utf-8")
PAGE = re.findall(r"^```(\w+)\n(.*?)^```", LESSON, re.DOTALL | re.M)
RECORDED = json.loads((DOCS / "recordings" / "language-model.json").read_text(encoding="utf-8"))["glassllm"]
APART = 0.03  # nats: machines round differently, and the same steps end a little apart


def finetuning():
    """Return the block that shows what `minilora finetune` prints."""
    (shown,) = [text for language, text in PAGE if language == "text" and "held-out loss" in text]
    return shown


def losses(text):
    return {
        int(step): float(loss) for step, loss in re.findall(r"^ *(\d+) +(?:\d\.\d{3} +)?(\d\.\d{3})(?: |$)", text, re.M)
    }


def test_the_pages_finetuning_reaches_the_losses_it_shows(tmp_path):
    command = "finetune kjv.txt --save king-james\n"
    (lines,) = [code.splitlines() for language, code in PAGE if language == "sh" and command in code]
    write, finetune = (shlex.split(line)[1:] for line in lines)
    assert write[0] == "examples/05_language_model.py"
    subprocess.run([sys.executable, EXAMPLE, *write[1:]], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "minilora", *finetune]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    ours, shown = losses(done.stdout), losses(finetuning())
    assert list(ours) == [*range(0, 301, 20)]
    assert ours == pytest.approx(shown, abs=APART)
    assert done.stdout.splitlines()[:4] == finetuning().splitlines()[:4]  # model, text, adapter, memory
    assert ours[300] <= 3.1
    learned = load_adapter(tmp_path / "king-james")
    assert len(learned) == 28
    # The recorded trainings are measured on 32 of the windows.
    source = ModelSource(None)
    base, encode = Llama.load(source.path), source.tokenizer.encode
    held_out = windows(token_ids((tmp_path / "kjv.txt").read_text(encoding="utf-8"), encode), 128)[2:]
    before, after = (evaluate(model, *held_out, cross_entropy) for model in (base, attach(base, learned)))
    assert before == pytest.approx(RECORDED["before"], abs=APART)
    r4, r16 = (RECORDED["runs"][f"LoRA, r = {rank}"]["losses"][-1] for rank in (4, 16))
    assert r16 < after < r4


def test_the_recorded_trainings_begin_as_fresh_ones_do(tmp_path):
    """Each of them logs a loss every 30 steps. A fresh run of 30 steps ends at the first."""
    subprocess.run([sys.executable, EXAMPLE, "--steps", "30", "--json", "fresh.json"], cwd=tmp_path, check=True)
    fresh = json.loads((tmp_path / "fresh.json").read_text())["glassllm"]
    assert fresh["before"] == pytest.approx(RECORDED["before"], abs=APART)
    assert fresh["runs"].keys() == RECORDED["runs"].keys()
    for name, run in RECORDED["runs"].items():
        new = fresh["runs"][name]
        assert (run["steps"][0], run["parameters"], run["lr"]) == (new["steps"][-1], new["parameters"], new["lr"])
        assert run["losses"][0] == pytest.approx(new["losses"][-1], abs=APART)
