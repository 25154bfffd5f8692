"""What a fine-tuning will take: its memory adds up, what fits is named, and the time counts each measurement."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Llama, adapt, get_backend
from minilora.commands.finetune import _beside_the_machine
from minilora.guards import machinememory as machine
from minilora.language.finetuning import costs
from minilora.language.text import windows
from minilora.language.trainingmemory import cache_bytes, parameter_bytes

from ...support.command_line import finetune, rows, run
from ...support.language import LETTERS, TEXT, tiny_llama
from ...support.memory import traced

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


ROOT = Path(__file__).parents[3]


IDS = [LETTERS.index(c) for c in TEXT]


@pytest.fixture
def adapted():
    return adapt(tiny_llama(dtype="float32"), "all-linear", rank=2, alpha=4, rng=np.random.default_rng(0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [8, 300])
def test_the_memory_is_that_of_the_whole_batch(adapted, length, threads):
    X, *_ = windows(IDS * 3, length)
    found = costs.costs_of(adapted, X, get_backend("numpy"), threads, 70)
    logits, cache = adapted.forward(X[:7])
    assert found.activations(7) == cache_bytes(cache)
    assert found.logits * 7 == logits.nbytes
    trained = sum(a.nbytes for a in adapted.trainable().values())
    fixed = parameter_bytes(adapted) + 3 * trained
    assert found.together(700) == fixed + 100 * logits.nbytes + found.activations(700)
    at_once = min(70, threads * max(1, 512 // length))  # so many windows at a time, when the loss is measured
    assert found.together(1) == fixed + at_once * logits.nbytes // 7 + found.activations(1)


def test_a_step_of_one_window_is_counted_on_one(adapted, monkeypatch):
    """At its length a second would be more than the training ever has."""
    seen, right = [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, x: seen.append(x.shape) or right(self, x))
    X, *_ = windows(IDS, 300)
    found = costs.costs_of(adapted, X, get_backend("numpy"), 1, 70, 1)
    assert seen == [(1, 300)]
    assert found.together(1) == costs.costs_of(adapted, X, get_backend("numpy"), 1, 70).together(1)


def test_measuring_a_loss_needs_the_memory_of_one_layer(adapted):
    """However many layers there are: what a step keeps of all of them is not kept."""
    X, *_ = windows(IDS * 3, 300)
    logits, cache = adapted.forward(X)
    with traced() as memory:
        found = adapted(X)
    np.testing.assert_array_equal(found, logits)
    with traced() as of_a_step:
        del cache, logits
        adapted.forward(X)
    assert memory.peak < 0.75 * of_a_step.peak


@given(rows=st.integers(1, 200), workers=st.integers(1, 3), free=st.integers(0, 40_000_000))
@settings(max_examples=50, deadline=None)
def test_the_micro_batch_named_is_the_largest_that_fits(rows, workers, free):
    cost = costs.Costs(weights=1000, state=500, caches=(90_000, 80_000), logits=20_000, forward=1.0, measured=4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(costs, "memory", lambda where: machine.Memory(10**9, free))
        fit = costs.fit(cost, get_backend("numpy"), rows, workers)
    line, hint = _beside_the_machine(cost, fit, rows * workers, workers)
    assert "of 1,000.0 MB are free" in line
    there = costs.ROOM * (free + cost.weights)
    assert (hint == "") == (cost.together(rows * workers) <= there)
    if "fits, and" in hint:
        (n,) = map(int, re.findall(r"--micro-batch (\d+)", hint))
        assert cost.together(n * workers) <= there < cost.together((n + 1) * workers)
        assert n < rows
    elif hint:
        assert cost.together(workers) > there or rows == 1


@pytest.mark.parametrize(
    ("batch", "what"),
    [("4", "for the backward of 2 x 2 windows"), ("60", "for the backward of 2 x 30 windows")],
)
def test_the_parts_of_the_memory_add_up(folder, capsys, batch, what):
    assert finetune("--steps", "1", "--workers", "2", "--batch-size", batch) == 0
    out = capsys.readouterr().out
    parts = r"memory +([\d.]+) MB of activations (.*) at a time\n +with weights (.*), Adam and gradients (.*), logits "
    kept, said, weights, state, logits, whole = re.search(parts + r"(.*): (.*) MB together", out).groups()
    assert said == what
    assert sum(map(float, (kept, weights, state, logits))) == pytest.approx(float(whole), abs=0.25)


def test_the_time_counts_steps_without_filling_and_each_measurement(folder, capsys, monkeypatch):
    monkeypatch.setattr(costs, "costs_of", lambda *a: costs.Costs(0, 0, (0, 0), 0, forward=1.0, measured=1))
    lines = ['{"text": "the cat"}'] * 20 + ['{"text": "the cat sat"}'] * 20
    Path("e.jsonl").write_text("\n".join(lines))
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", "--steps", "30", "--length", "20") == 0
    out = capsys.readouterr().out
    filled = np.mean([len("the cat")] * 18 + [len("the cat sat")] * 18) / len("the cat sat")
    expected = 30 * 16 * costs.STEP * filled + 3 * 4  # rows 0, 20 and 30
    (said,) = re.findall(r"very roughly (\d+) min", out)
    assert int(said) == round(expected / 60)


def test_a_batch_beyond_the_machine_is_refused_with_what_fits(folder, capsys, monkeypatch):
    monkeypatch.setattr(costs, "memory", lambda where: machine.Memory(2_400_000, 2_300_000))
    large = ["--batch-size", "200", "--checkpoint", "c"]
    assert finetune(*large) == 2
    out, err = capsys.readouterr()
    assert re.search(r"the training needs [\d.]+ MB and the machine has 2.4 MB: --micro-batch \d+ fits", err)
    assert rows(out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    (fitting,) = re.findall(r"--micro-batch \d+", err)
    assert finetune(*large, *fitting.split(), "--steps", "2") == 0
    assert capsys.readouterr().err == ""


def test_a_machine_that_is_busy_is_only_warned_of(folder, capsys, monkeypatch):
    monkeypatch.setattr(costs, "memory", lambda where: machine.Memory(10**12, 1000))
    assert finetune("--steps", "1") == 0
    assert "MB that are free: not even --micro-batch 1 fits" in capsys.readouterr().err


RSS = """
import re, sys
from pathlib import Path
from minilora.cli import main
def peak():  # of this process alone: what getrusage says begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from minilora.language.finetuning import costs
from minilora.commands import finetune
import minilora.files.adapters, minilora.language.text, tokenizers
from minilora import Llama
before = peak()
assert main(sys.argv[1:]) == 0
print("grown", peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's peak")
@pytest.mark.parametrize("more", [[], ["--micro-batch", "20"]])
def test_the_process_grows_by_the_memory_that_is_said(tmp_path, more):
    pytest.importorskip("glassllm")
    (tmp_path / "text").write_text("The cat sat on the mat. " * 6000)
    sizes = ["--steps", "2", "--batch-size", "100", "--length", "128", *more]
    command = [sys.executable, "-c", RSS, "finetune", "text", "--save", "a", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    said = float(re.search(r"([\d,.]+) MB together", done.stdout)[1].replace(",", "")) * 1e6
    grown = int(re.search(r"grown (\d+)", done.stdout)[1])
    assert 0.75 * said < grown < 1.35 * said + 60e6  # the tokenizer and libraries besides
