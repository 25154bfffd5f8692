"""What ``minilora finetune`` shows while it learns, and how one that was stopped goes on."""

import io
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from minilora import Adam, Llama, adapt, cross_entropy, get_backend, load_adapter, train
from minilora.cli import _parser
from minilora.commands.finetune import _beside_the_machine, _best
from minilora.fast import accumulate
from minilora.files.checkpoint import read
from minilora.guards import machinememory as machine
from minilora.language.finetuning import costs
from minilora.language.finetuning.defaults import SMALL, fitting
from minilora.language.finetuning.losstable import LOG_EVERY, Table, TrainingLoss, duration
from minilora.language.text import next_token_loss, windows
from minilora.language.trainingmemory import cache_bytes, parameter_bytes
from minilora.training import backpropagate, draw_batches

from ..support.language import LETTERS, TEXT, tiny_llama, write_folder
from .test_cli import run
from .test_cli_language import SMALL as FEW
from .test_cli_language import finetune, rows

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
ROOT = Path(__file__).parents[2]
IDS = [LETTERS.index(c) for c in TEXT]


def weights(name="a"):
    return Path(name, "adapter_model.safetensors").read_bytes()


# --- the rows -----------------------------------------------------------------------------------------------------


def test_the_training_loss_is_the_mean_since_the_last_row(folder, capsys):
    """The loop written out: the loss of each batch, before its step."""
    assert finetune("--seed", "5", "--micro-batch", "3", "--steps", "45", "--dtype", "float64") == 0
    X, Y, *_ = windows(IDS, 8)
    rng = np.random.default_rng(5)
    model = adapt(Llama.load("model", dtype="float64"), "all-linear", rank=2, alpha=16, rng=rng)
    optimizer, losses = Adam(model.trainable(), lr=0.02), []
    for _ in range(45):
        (batch,) = draw_batches(rng, len(X), 4, 1)
        losses.append(float(cross_entropy(model(X[batch]), Y[batch])[0]))
        optimizer.step(backpropagate(model, X[batch], Y[batch], cross_entropy))
    means = [np.mean(losses[start:stop]) for start, stop in ((0, 20), (20, 40), (40, 45))]
    shown = rows(capsys.readouterr().out)
    assert [step for step, *_ in shown] == [0, 20, 40, 45]
    assert shown[0][1] is None
    np.testing.assert_allclose([training for _, training, _ in shown[1:]], means, atol=6e-4)


class File(io.StringIO):
    """A stdout that is a file: what has been flushed can be read."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_a_row_is_in_the_file_when_it_is_measured(folder, monkeypatch):
    file, right, steps = File(), Adam.step, []

    def step(self, grads):
        steps.append(file.seen)
        right(self, grads)

    monkeypatch.setattr(Adam, "step", step)
    monkeypatch.setattr(sys, "stdout", file)
    assert finetune() == 0
    assert [len(rows(seen)) for seen in steps] == [1] * LOG_EVERY + [2] * 10
    assert "going by step 1, the other 29 take about" in steps[1]


def test_between_slow_rows_a_line_says_where_it_is(folder, capsys, monkeypatch):
    monkeypatch.setattr("minilora.language.finetuning.losstable.QUIET", -1.0)
    assert finetune("--steps", "24") == 0
    out = capsys.readouterr().out
    said = re.findall(r"^      after step (\d+) the training loss is (\d\.\d{3}); about \d+ s left$", out, re.M)
    assert [int(step) for step, _ in said] == [*range(2, 20), 21, 22, 23]
    assert [step for step, *_ in rows(out)] == [0, 20, 24]
    assert float(said[17][1]) == pytest.approx(rows(out)[1][1], abs=0.1)  # of 19 steps, and of 20


def test_what_is_loaded_is_said_before_it_is(folder, monkeypatch):
    file = File()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail(file.seen))
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(pytest.fail.Exception, match=r"^model    model$"):
        finetune()


def test_a_text_is_read_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    Path("text").write_bytes(b"\xff")
    assert finetune() == 2
    assert "is not a text in UTF-8" in capsys.readouterr().err


@given(
    parts=st.lists(st.tuples(st.floats(0, 20, width=32), st.integers(1, 5000)), min_size=1, max_size=8),
    order=st.randoms(),
)
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_parts_changes_no_bit(parts, order):
    """Threads call the loss in any order."""

    def mean(parts):
        def gradients(model, x, y, loss):
            for value, n in parts:
                loss(np.float32(value), np.zeros(n, np.int64))
            return {}

        noted = TrainingLoss(gradients)
        noted(None, None, None, lambda value, targets: (value, None))
        return noted.at(1)

    shuffled = parts.copy()
    order.shuffle(shuffled)
    assert mean(parts) == mean(shuffled)
    assert mean(parts) == pytest.approx(sum(v * n for v, n in parts) / sum(n for _, n in parts))


def test_targets_that_do_not_count_are_not_averaged_over():
    model = adapt(tiny_llama(), "all-linear", rank=2, alpha=4, rng=np.random.default_rng(0))
    X, Y, *_ = windows(IDS, 8)
    y = Y[:4].copy()
    y[0], y[1, :5] = -100, -100  # the first part has none that counts
    noted = TrainingLoss(accumulate(1))
    noted(model, X[:4], y, next_token_loss)
    assert noted.at(1) == pytest.approx(float(cross_entropy(model(X[:4]), y)[0]), rel=1e-12)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [5.0, 4.0, 4.5],
            "the held-out loss was lowest at step 20: 4.000; the same command with --steps 20 ends there",
        ),
        ([5.0, 6.0, 5.5], "the held-out loss was lowest at step 0: 5.000, before the training"),
        ([5.0, 4.0, 3.0], ""),
        ([5.0, 4.0004, 4.0], ""),
        ([5.0, 4.0, 4.0004], ""),  # as printed, they are the same
    ],
)
def test_the_best_step_is_named_unless_it_is_last(losses, said):
    table = Table(40, 0, 8, TrainingLoss(backpropagate), 0.0)
    table.rows = [(20 * i, math.nan, loss) for i, loss in enumerate(losses)]
    assert _best(SimpleNamespace(checkpoint=None), table) == said


@pytest.mark.long
@pytest.mark.parametrize("kept", [[], ["--checkpoint", "c"]])
def test_the_steps_that_were_best_end_with_their_adapter(folder, capsys, kept):
    worse = ["--lr", "0.05", "--dtype", "float64"]
    assert finetune(*worse, "--steps", "61", *kept) == 0
    out = capsys.readouterr().out
    ((best, another),) = re.findall(r"lowest at step (\d+): .* with --steps \1( and another --checkpoint)? ends", out)
    assert bool(another) == bool(kept)
    assert finetune(*worse, "--steps", best, *(["--checkpoint", "another"] if kept else [])) == 0
    assert rows(capsys.readouterr().out)[-1][2] == min(held_out for *_, held_out in rows(out))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (5300, "88 min"), (5400, "1 h 30 min")]
)
def test_a_duration_is_said_in_words(seconds, said):
    assert duration(seconds) == said


def test_the_figure_draws_the_rows(folder, capsys, monkeypatch):
    drawn, right = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self) or right(self, *a, **k))
    assert finetune("--plot", "curves.png") == 0
    out = capsys.readouterr().out
    assert "figure written to curves.png" in out
    training, held_out = drawn[0].axes[0].get_lines()
    shown = rows(out)
    np.testing.assert_allclose(np.transpose(training.get_data()), [row[:2] for row in shown[1:]], atol=6e-4)
    np.testing.assert_allclose(np.transpose(held_out.get_data()), [row[::2] for row in shown], atol=6e-4)
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == ["training", "held out"]


# --- what it will take --------------------------------------------------------------------------------------------


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
    assert found.together(1) == fixed + at_once * logits.nbytes // 7 + found.activations(at_once)


@given(rows=st.integers(1, 200), workers=st.integers(1, 3), free=st.integers(0, 40_000_000))
@settings(max_examples=50, deadline=None)
def test_the_micro_batch_named_is_the_largest_that_fits(rows, workers, free):
    cost = costs.Costs(weights=1000, state=500, kept=(90_000, 80_000), logits=20_000, forward=1.0, measured=4)
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
    [("4", "to measure the loss of 26 windows"), ("60", "for the backward of 2 x 30 windows")],
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


def test_on_a_gpu_the_memory_is_the_devices():
    def backend(**runtime):
        return SimpleNamespace(
            name="cupy", xp=SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(**runtime)))
        )

    assert machine.memory(backend(memGetInfo=lambda: (3, 10))) == machine.Memory(whole=10, free=3)
    assert machine.memory(backend()) is None


def test_the_machines_memory_is_less_than_it_has():
    found = machine.memory(get_backend("numpy"))
    assert 0 < found.free <= found.whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("version", ["", "memory"])
def test_the_limit_of_a_container_is_the_machines(tmp_path, monkeypatch, version):
    """Of both versions of control groups; the limit stands at a folder above, or at the root in a container."""
    limit, use, stat = machine.FILES[version]
    group = tmp_path / version
    group.mkdir(exist_ok=True)
    (group / limit).write_text("3000000\n")
    (group / use).write_text("2000000\n")
    (group / "memory.stat").write_text(f"anon 7\n{stat} 500000\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    for line, of in (("0::/a/b\n", ""), ("4:cpu,memory:/x/y\n", "memory"), ("5:pids:/\n", None)):
        (tmp_path / "own").write_text(line)
        here = of == version
        found = machine.memory(get_backend("numpy"))
        assert (found == machine.Memory(3_000_000, 1_500_000)) == here


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


def test_what_fits_follows_the_models_size(folder, capsys):
    assert fitting(852_608) == {"steps": 300, "batch_size": 16, "lr": 3e-3}
    assert fitting(SMALL) == fitting(852_608)
    assert fitting(134_515_008) == fitting(SMALL + 1) == {"steps": 80, "batch_size": 4, "lr": 1e-3}
    assert run("finetune", "text", "--save", "a", "--model", "model", "--length", "8", "--steps", "1") == 0
    assert "time     1 steps of 16 windows" in capsys.readouterr().out


def test_a_training_that_breaks_down_names_step_and_rate(folder, capsys):
    assert finetune("--lr", "1e30", "--checkpoint", "c") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"minilora: step (\d) left numbers that are not finite: --lr 1e\+30 is too large for this training. "
        r"No adapter is written; c keeps step (\d), and another --lr needs another file",
        said,
    )
    bad, kept = map(int, re.findall(r"step (\d)", said))
    assert read(Path("c")).epoch == kept == bad - 1
    assert not Path("a").exists()


# --- one that was stopped -----------------------------------------------------------------------------------------


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
    assert run(*typed[:-2]) == 0
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


def test_the_loss_before_the_training_is_not_measured_again(folder, capsys, monkeypatch):
    assert finetune("--steps", "20", "--checkpoint", "c") == 0
    before = rows(capsys.readouterr().out)
    measured, right = [], sys.modules["minilora.training"].evaluate
    for module in ("training", "language.finetuning.session", "fast.accumulation"):
        monkeypatch.setattr(f"minilora.{module}.evaluate", lambda *a: measured.append(a) or right(*a))
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


@pytest.mark.parametrize("command", ["finetune", "generate", "merge"])
def test_the_help_has_an_example_that_the_parser_takes(command, capsys):
    assert run(command, "--help") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example: ")]
    program, *words = shlex.split(line.removeprefix("example: "))
    assert program == "minilora"
    assert _parser().parse_args(words).command
