"""What a fine-tuning will take: its memory adds up, what fits is named, and the time counts each measurement."""

import json
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
from minilora.cli.finetune import _beside_the_machine
from minilora.fast.blockwise import CPU
from minilora.guards import machinememory as machine
from minilora.language.data import load_data, windows
from minilora.language.finetuning import costs
from minilora.language.finetuning.losstable import duration
from minilora.language.trainingmemory import cache_bytes, parameter_bytes

from ...support.command_line import finetune, rows, run
from ...support.language import LETTERS, TEXT, tiny_llama, tiny_mixture
from ...support.memory import traced

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


ROOT = Path(__file__).parents[3]


IDS = [LETTERS.index(c) for c in TEXT]


@pytest.fixture
def adapted():
    return adapt(tiny_llama(dtype="float32"), "all-linear", rank=2, alpha=4, rng=np.random.default_rng(0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 8, 131, 300])
def test_the_memory_is_that_of_the_whole_batch(adapted, length, threads):
    X, *_ = windows(IDS * max(3, length // 80), length)
    found = costs.measure(adapted, X, get_backend("numpy")).at(length, threads, 70)
    logits, cache = adapted.forward(X[:7])
    assert found.activations(7) == cache_bytes(cache)
    assert found.logits * 7 == logits.nbytes
    trained = sum(a.nbytes for a in adapted.trainable().values())
    fixed = parameter_bytes(adapted) + 3 * trained
    assert found.together(700) == fixed + 100 * logits.nbytes + found.activations(700)
    at_once = min(70, threads * max(1, 512 // length))  # so many windows at a time, when the loss is measured
    assert found.together(1) == fixed + at_once * logits.nbytes // 7 + found.activations(1)


def test_the_costs_of_long_windows_are_measured_on_short_ones(adapted, monkeypatch):
    """A forward of long ones would take the memory that it is to foretell, and the process would keep it."""
    seen, right = [], Llama.forward
    monkeypatch.setattr(Llama, "forward", lambda self, x: seen.append(x.shape) or right(self, x))
    X, *_ = windows(IDS, 300)
    costs.measure(adapted, X, get_backend("numpy"))
    assert max(length for _, length in seen) == 1.5 * CPU.page_up_to


def test_the_costs_of_a_single_window_are_known(adapted):
    X, *_ = windows(IDS, 300)
    one, more = (costs.measure(adapted, rows, get_backend("numpy")).at(300, 1, 70) for rows in (X[:1], X))
    assert one.together(1) == more.together(1)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_memory_of_a_mixture_is_foretold_from_short_windows(kind):
    """Which experts a position goes to depends on it: so does what is kept, a little."""
    model = adapt(tiny_mixture(kind), "all-linear", rank=1, alpha=4, rng=np.random.default_rng(0))
    X, *_ = windows(IDS, 400)
    found = costs.measure(model, X, get_backend("numpy")).at(400, 1, 70)
    assert found.activations(3) == pytest.approx(cache_bytes(model.forward(X[:3])[1]), rel=0.02)


@given(free=st.integers(0, 40_000_000), longest=st.integers(1, 3000), threads=st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_the_length_that_fits_is_the_largest(free, longest, threads):
    measured = costs.Measured(
        1000,
        500,
        32,
        (8, 16, 32, 33, 48),
        ((8000, 17000, 40000, 34000, 50000), (16000, 34000, 80000, 68000, 100000)),
        100,
        1.0,
    )
    length = costs.longest_that_fits(measured, machine.Memory(10**9, free), longest, threads, 7)
    needed = [measured.at(n, threads, 7).together(threads) for n in (length, length + 1)]
    assert 1 <= length <= longest
    assert needed[0] <= costs.ROOM * free or length == 1
    assert needed[1] > costs.ROOM * free or length == longest
    assert costs.longest_that_fits(measured, None, longest, threads, 7) == longest


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
    fit = costs.fit(cost, machine.Memory(10**9, free), rows, workers)
    line, hint = _beside_the_machine(cost, fit, rows * workers, workers)
    assert "of 1,000.0 MB are free" in line
    there = costs.ROOM * free
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
    monkeypatch.setattr(costs.Measured, "at", lambda *a: costs.Costs(0, 0, (0, 0), 0, forward=1.0, measured=1))
    lines = ['{"text": "the cat"}'] * 20 + ['{"text": "the cat sat"}'] * 20
    Path("e.jsonl").write_text("\n".join(lines))
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", "--steps", "30", "--length", "20") == 0
    out = capsys.readouterr().out
    filled = np.mean([len("the cat")] * 18 + [len("the cat sat")] * 18) / len("the cat sat")
    expected = 30 * 16 * costs.STEP * filled + 3 * 4  # rows 0, 20 and 30
    (said,) = re.findall(r"very roughly (\d+) min", out)
    assert int(said) == round(expected / 60)


def test_rows_to_measure_may_be_longer_than_those_to_train_on(adapted):
    """As of another file: their logits, and the time for them, are counted by their own length."""
    X, *_ = windows(IDS * 4, 20)
    measured = costs.measure(adapted, X, get_backend("numpy"))
    short, long = measured.at(20, 1, 6), measured.at(20, 1, 6, 300)
    logits = adapted.forward(np.tile(X[:1], (1, 15)))[0].nbytes  # of a row of 300
    assert long.all_logits(1) == logits  # one at a time
    assert short.all_logits(1) == 6 * logits // 15
    assert long.activations(3) == short.activations(3)


def test_a_longer_file_to_measure_on_is_said_and_counted(folder, capsys):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    Path("e.jsonl").write_text('{"text": "the cat"}\n' * 8)
    Path("held.jsonl").write_text('{"text": "the cat sat on the mat and the dog"}\n' * 3)
    few = ["--model", "model", "--steps", "1", "--batch-size", "2", "--rank", "1"]
    assert run("finetune", "e.jsonl", "--save", "a", *few) == 0
    assert capsys.readouterr().err == ""
    assert run("finetune", "e.jsonl", "--save", "b", *few, "--valid", "held.jsonl") == 0
    assert "an example has 34 tokens, and the model's context is 20" in capsys.readouterr().err


def test_a_batch_beyond_the_machine_is_refused_with_what_fits(folder, capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda where: machine.Memory(2_400_000, 2_300_000))
    large = ["--batch-size", "200", "--checkpoint", "c"]
    assert finetune(*large) == 2
    out, err = capsys.readouterr()
    assert re.search(r"the training needs [\d.]+ MB and the machine has 2.4 MB: --micro-batch \d+ fits", err)
    assert rows(out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    (fitting,) = re.findall(r"--micro-batch \d+", err)
    assert finetune(*large, *fitting.split(), "--steps", "2") == 0
    assert capsys.readouterr().err == ""


def test_a_training_that_a_busy_machine_cannot_hold_is_refused_unless_it_is_to_begin_anyway(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(machine, "memory", lambda where: machine.Memory(10**12, 1000))
    assert finetune("--steps", "1") == 2
    out, err = capsys.readouterr()
    assert re.search(
        r"MB that are free: not even --micro-batch 1 fits; .* needs less; --anyway begins all the same", err
    )
    assert rows(out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    assert finetune("--steps", "1", "--anyway") == 0
    assert "MB that are free: not even --micro-batch 1 fits" in capsys.readouterr().err


def test_what_is_free_is_read_before_the_process_takes_any(folder, capsys, monkeypatch):
    order, load, forward = [], Llama.load, Llama.forward
    monkeypatch.setattr(machine, "memory", lambda where: order.append("memory") or machine.Memory(10**10, 10**10))
    monkeypatch.setattr(Llama, "load", lambda *a, **k: order.append("load") or load(*a, **k))
    monkeypatch.setattr(Llama, "forward", lambda self, *a: order.append("forward") or forward(self, *a))
    assert finetune("--steps", "1") == 0
    assert order[:3] == ["memory", "load", "forward"]
    assert order.count("memory") == 1


def test_the_longest_example_is_cut_to_what_memory_allows(folder, capsys, monkeypatch):
    """Only where no length is named; the line says what is lost, and the length that keeps it."""
    lines = ['{"prompt": "the ", "completion": "cat"}'] * 8 + [
        json.dumps({"prompt": "the ", "completion": "log" * 400})
    ]
    Path("e.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(machine, "memory", lambda where: machine.Memory(10**10, 5_000_000))
    few = ["--model", "model", "--steps", "1", "--batch-size", "2"]
    assert run("finetune", "e.jsonl", "--save", "a", *few) == 0
    out, err = capsys.readouterr()
    length, lost = map(
        int, re.search(r"1 are cut after (\d+) tokens: (\d+) more .* --length 1204 keeps all", out).groups()
    )
    assert 100 < length == 1204 - lost
    assert err == ""
    assert run("finetune", "e.jsonl", "--save", "b", *few, "--length", "1204") == 2
    assert "MB that are free" in capsys.readouterr().err


RSS = """
import re, sys
from pathlib import Path
from minilora.cli import main
def peak():  # of this process alone: what getrusage says begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from minilora.language.finetuning import costs
from minilora.cli import finetune
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


def test_the_time_of_a_training_that_goes_on_is_that_of_the_steps_to_come(folder, capsys, monkeypatch):
    assert finetune("--steps", "20", "--checkpoint", "c") == 0
    capsys.readouterr()
    monkeypatch.setattr(costs.Measured, "at", lambda *a: costs.Costs(0, 0, (0, 0), 0, forward=30.0, measured=1))
    assert finetune("--steps", "24", "--checkpoint", "c") == 0
    (said,) = re.findall(r"very roughly (\d+ h \d+ min|\d+ min)", capsys.readouterr().out)
    held_out = len(load_data(Path("text"), Path("model"), 8).X_held)
    assert said == duration(4 * 30.0 * costs.STEP * 4 + 30.0 * held_out)  # four steps, and row 24
