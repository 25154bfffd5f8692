"""The rows that fine-tuning prints: training loss, held-out loss, speed and time left."""

import io
import json
import re
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Adam, Llama, adapt, cross_entropy
from minilora.language import next_token_loss
from minilora.language.finetune import Step
from minilora.language.losstable import LossTable, duration, shown_parts
from minilora.language.text import windows
from minilora.optim import gradient_norm
from minilora.training import Passes, backpropagate

from ..support.command_line import finetune, rows
from ..support.language import TEXT, ids_of, tiny_llama
from ..support.streams import File, Terminal

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
IDS = ids_of(TEXT)


def test_the_training_loss_is_the_mean_since_the_last_row(folder, capsys):
    """The expected value comes from a written-out loop that computes each batch's loss before its step."""
    assert finetune("--seed 5 --micro-batch 3 --steps 14 --log-every 6 --eval-every 6 --dtype float64") == 0
    X, Y, *_ = windows(IDS, 8)
    rng = np.random.default_rng(5)
    model = adapt(Llama.load("model", dtype="float64"), "all-linear", rank=2, alpha=16, rng=rng)
    optimizer, losses = Adam(model.trainable(), lr=0.02), []
    passes = Passes(len(X), 4, 5)
    for step in range(1, 15):
        batch = passes(step)
        losses.append(float(cross_entropy(model(X[batch]), Y[batch])[0]))
        optimizer.step(backpropagate(model, X[batch], Y[batch], cross_entropy))
    means = [np.mean(losses[start:stop]) for start, stop in ((0, 6), (6, 12), (12, 14))]
    shown = rows(capsys.readouterr().out)
    assert [step for step, *_ in shown] == [0, 6, 12, 14]
    assert shown[0][1] is None
    np.testing.assert_allclose([training for _, training, _ in shown[1:]], means, atol=6e-4)


def test_a_row_is_in_the_file_when_it_is_measured(folder, monkeypatch):
    file, right, steps = File(), Adam.step, []

    def step(self, grads):
        steps.append(file.seen)
        right(self, grads)

    monkeypatch.setattr(Adam, "step", step)
    monkeypatch.setattr(sys, "stdout", file)
    assert finetune("--steps 7 --log-every 5 --eval-every 5") == 0
    assert [len(rows(seen)) for seen in steps] == [1] * 5 + [2] * 2
    assert re.search("judging by step 1, about .* for the remaining 6\n", steps[1])


def test_between_slow_rows_a_line_says_where_it_is(folder, capsys, monkeypatch):
    """On a terminal the progress bar shows it, but a reader of redirected output sees no bar."""
    monkeypatch.setattr("minilora.language.losstable.QUIET", -1.0)
    assert finetune("--steps 9 --log-every 6 --eval-every 6") == 0
    out = capsys.readouterr().out
    said = re.findall(r"^      after step (\d+), the training loss is (\d\.\d{3}), with about \d+ s left$", out, re.M)
    assert [int(step) for step, _ in said] == [2, 3, 4, 5, 7, 8]
    assert [step for step, *_ in rows(out)] == [0, 6, 9]
    assert out.count("\n      measured 26 of 26\n") == 3
    assert float(said[3][1]) == pytest.approx(rows(out)[1][1], abs=0.1)  # of 5 steps, and of 6
    for streams in ((File, Terminal), (Terminal, File), (Terminal, Terminal)):
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream())
        assert finetune("--steps 3") == 0
        assert ("after step 2" in sys.stdout.getvalue()) == (File in streams)
    assert re.search(r"100%\|#+\| 96\.0/96\.0 \[.*token/s", sys.stderr.getvalue())


@given(
    parts=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5000)), min_size=1, max_size=8),
    order=st.randoms(),
)
@example([(0.1, 1), (0.2, 1), (0.3, 1)], Random(1))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_parts_changes_no_bit(parts, order):
    """Threads add their losses in any order."""

    def mean(parts):
        table = LossTable(1, 0, 8)
        table.note(0.0, [(np.float64(value), n) for value, n in parts], 1.0)
        return table.training_loss(1)

    shuffled = parts.copy()
    order.shuffle(shuffled)
    assert mean(parts) == mean(shuffled) == mean(parts[::-1])
    assert mean(parts) == pytest.approx(sum(v * n for v, n in parts) / sum(n for _, n in parts))


def test_a_step_of_any_loss_can_be_recorded():
    """A loss of 0 or above float32's range is recorded; a step without targets has none."""
    table = LossTable(2, 0, 8)
    for targets in (5, 0):
        table.note(0.0, [(0.0, targets)], 1.0)
    assert table.each_step() == [(1, 0.0)]
    for number in (1e30, np.inf):
        table = LossTable(1, 0, 8)
        table.note(0.0, [(number, 3)], np.float64(number))
        again = json.loads(json.dumps(table.losses, allow_nan=False))
        assert again["1"] == pytest.approx([min(3 * number, sys.float_info.max), 3, min(number, sys.float_info.max)])


def test_each_row_names_the_steps_of_its_mean(folder, capsys, monkeypatch):
    """The means are computed from the log's losses, and the held-out loss is in the rows where it is measured."""
    lengths = []

    def length(grads):
        lengths.append(sum(float(np.square(g, dtype=float).sum()) for g in grads.values()) ** 0.5)
        return gradient_norm(grads)

    monkeypatch.setattr("minilora.language.finetune.gradient_norm", length)
    size = ["--steps", "13", "--log-every", "4", "--eval-every", "6", "--batch-size", "3", "--length", "7"]
    assert finetune(*size, "--log", "log") == 0
    own = {line["step"]: line for line in map(json.loads, Path("log").read_text().splitlines())}
    table = re.findall(r"^ *(\d+) +(\S+) +(.*?) +\S+ +\d+ s   of steps? (.*)$", capsys.readouterr().out, re.M)
    assert [(int(step), bool(held_out), steps) for step, _, held_out, steps in table] == [
        (4, False, "1-4"), (6, True, "5-6"), (8, False, "7-8"), (12, True, "9-12"), (13, True, "13"),
    ]  # fmt: skip
    for step, mean, held_out, steps in table:
        first, last = int(steps.partition("-")[0]), int(step)
        losses = [own[s]["training_loss"] for s in range(first, last + 1)]
        assert float(mean) == pytest.approx(np.mean(losses), abs=6e-4)  # each step has as many targets
        assert held_out == ("" if (loss := own[last].get("held_out_loss")) is None else f"{loss:.3f}")
    assert "grad_norm" not in own[0]
    assert [own[step]["grad_norm"] for step in range(1, 14)] == pytest.approx(lengths, rel=1e-5)


@pytest.mark.parametrize(("stream", "lines"), [(io.StringIO, 2), (Terminal, 0)])
def test_evaluation_prints_a_line_a_minute_or_draws_a_bar(stream, lines, monkeypatch, capsys):
    now, shown = 0.0, stream()
    monkeypatch.setattr("minilora.language.losstable.time.perf_counter", lambda: now)
    monkeypatch.setattr(sys, "stderr", shown)
    parts = [np.arange(5)] * 100
    for taken, part in zip(parts, shown_parts(parts), strict=True):
        assert part is taken
        now += 1.25
    assert capsys.readouterr().out.splitlines() == ["      measured 245 of 500", "      measured 490 of 500"][:lines]
    assert bool(re.match(r"\rmeasuring: +0%\|.*\[.*\?row/s", shown.getvalue())) == (not lines)
    assert shown.getvalue().endswith("\r" * (not lines))  # the bar is gone


def test_targets_that_do_not_count_are_not_averaged_over():
    model = adapt(tiny_llama(), "all-linear", rank=2, alpha=4, rng=np.random.default_rng(0))
    X, Y, *_ = windows(IDS, 8)
    y = Y[:4].copy()
    y[0], y[1, :5] = -100, -100  # the first part has none that counts
    table = LossTable(1, 0, 8)
    recipe = SimpleNamespace(dropout=0.0, recompute=False, part_rows=1, workers=1)
    Step(recipe, np.random.default_rng(0), table)(model, X[:4], y, next_token_loss)
    assert table.training_loss(1) == pytest.approx(float(cross_entropy(model(X[:4]), y)[0]), rel=1e-12)
    assert table.row_tokens == 4 * 8  # all are computed


def test_a_step_with_zero_gradients_has_its_norm_logged(tmp_path):
    """A gradient norm of zero is logged; before the first step there is none."""
    table = LossTable(2, 0, 8, log=tmp_path / "log")
    for norm in (0.0, 2.0):
        table.note(0.0, [(1.0, 3)], norm)
    table.write_log(2)
    lines = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert [line.get("grad_norm") for line in lines] == [None, 0.0, 2.0]


def test_a_log_that_cannot_be_written_is_warned_of_once(tmp_path):
    table = LossTable(1, 0, 8, log=tmp_path / "no" / "log")
    said = re.escape("the log ends before step 0, but training continues: ")
    with pytest.warns(UserWarning, match=f"^{said}"):
        table.write_log(0)
    table.write_log(1)


def test_a_duration_is_written_in_words():
    words = {0.4: "0 s", 89: "89 s", 91: "2 min", 5300: "88 min", 5400: "1 h 30 min", 7500: "2 h 05 min"}
    assert {seconds: duration(seconds) for seconds in words} == words


def test_the_evaluation_time_is_that_of_the_last_evaluation(monkeypatch, capsys):
    """Each of 12 steps takes 1 s; an evaluation takes 30 s before the first and 50 s at step 6."""
    now = 0.0
    monkeypatch.setattr("minilora.language.losstable.time.perf_counter", lambda: now)
    table = LossTable(12, 0, 100, log_every=2, eval_every=6)
    table.print_known_rows(1.0, 30.0, None)
    history = SimpleNamespace(epochs=[], losses=[])
    for step in range(1, 13):
        began, now = now, now + 1.0
        table.note(began, [(1.0, 100)], 1.0)
        if step % 6 == 0:
            history.epochs.append(step)
            history.losses.append(1.0)
            now += 50.0
        table.on_step(SimpleNamespace(epoch=step, history=history))
    left = re.findall(r"^ *(\d+) +1.000 .*? (\d+) s   of steps .*$", capsys.readouterr().out, re.M)
    assert {int(step): int(seconds) for step, seconds in left} == {
        2: 10 + 2 * 30, 4: 8 + 2 * 30, 6: 6 + 50, 8: 4 + 50, 10: 2 + 50, 12: 0,
    }  # fmt: skip


@pytest.mark.parametrize("done", [0, 40])
def test_each_row_has_the_speed_of_its_own_steps(monkeypatch, capsys, done):
    """Steps of 100 tokens take 1 s (20 steps), then 2 s (24 steps); evaluation and earlier runs do not count."""
    now = 0.0
    monkeypatch.setattr("minilora.language.losstable.time.perf_counter", lambda: now)
    table = LossTable(done + 44, done, 100)
    table.print_known_rows(1.0, 0.0, None)
    history = SimpleNamespace(epochs=[], losses=[])
    for step in range(done + 1, done + 45):
        began, now = now, now + (1.0 if step <= done + 20 else 2.0)
        table.note(began, [(1.0, 100)], 1.0)
        if step % 20 == 0 or step == done + 44:
            history.epochs.append(step)
            history.losses.append(1.0)
            now += 5.0
        table.on_step(SimpleNamespace(epoch=step, history=history))
    rows = re.findall(r"^ *(\d+) +1.000 +1.000 +(\d+) +(.*?)   of steps .*$", capsys.readouterr().out, re.M)
    assert rows == [(f"{done + 20}", "100", "34 s"), (f"{done + 40}", "50", "11 s"), (f"{done + 44}", "50", "0 s")]
