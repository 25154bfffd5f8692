"""The benchmark of a language model gives both sides the same work, and its floor is that work's products."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from minilora.layer import walk

from ..support.language import tiny_llama
from ..support.peers import PEERS

pytestmark = PEERS
psutil = pytest.importorskip("psutil")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "measure"))

import benchmark_model  # noqa: E402
from benchmark_model import ALL, ALL_HALF, DEFAULT, DTYPES, FLOOR, OURS, PEER, Setting  # noqa: E402

needs_models = pytest.mark.skipif(bool(benchmark_model.missing()), reason=benchmark_model.missing() or "all there")
SETTINGS = [Setting("tiny", 1, 5, ["q_proj", "v_proj"], 1.0), Setting("tiny", 2, 7, ALL, 1.0)]


@pytest.fixture(params=SETTINGS, ids=str)
def task(request):
    return benchmark_model.Task(tiny_llama(dtype="float32"), request.param)


def test_both_sides_compute_the_same_loss_and_gradients(task):
    assert benchmark_model.same_work(task, benchmark_model.with_peft(task)) < 1e-4


def test_sides_that_differ_are_not_timed(task):
    other = benchmark_model.with_peft(task)
    task.model.lm_head.weight[...] *= 1.1
    for p in other.parameters():  # the weights are shared: take them apart
        p.data = p.data / 1.1 if p.shape == task.model.lm_head.weight.shape else p.data
    with pytest.raises(AssertionError, match="different work"):
        benchmark_model.same_work(task, other)


def test_the_floor_is_two_products_of_each_weight(task):
    """Below the lowest adapters no dx is asked for, so their weights, and those beside them, are read once."""
    loss, grads = benchmark_model.whole_step(task)
    pairs = benchmark_model.products(task)
    layers = {path: layer for path, layer in walk(task.model) if path.endswith(("_proj", "_proj.base", "lm_head"))}
    for path, layer in layers.items():
        weight = layer.base.weight if hasattr(layer, "base") else layer.weight
        uses = sum(np.shares_memory(weight, b) for _, b in pairs)
        lowest = path.removesuffix(".base").removeprefix("model.layers.0.self_attn.") in ("q_proj", "k_proj", "v_proj")
        assert uses == (1 if lowest else 2), path
    benchmark_model.multiply(pairs)
    again, same = benchmark_model.whole_step(task)
    assert loss == again
    for name, g in grads.items():
        np.testing.assert_array_equal(g, same[name])


def test_the_parts_of_the_floor_are_the_batch(task):
    parts = benchmark_model.parts_of(task)
    assert len(parts) == min(2, task.setting.batch)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), task.ids)
    np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), task.targets)
    pairs = [benchmark_model.products(part) for part in parts]
    assert sum(a.shape[0] for part in pairs for a, _ in part if a.ndim == 2) > 0
    benchmark_model.multiply_parts(pairs)


@pytest.mark.parametrize("side", DTYPES)
def test_whole_steps_of_each_dtype_start_from_one_checkpoint(task, side):
    """In float32 both libraries' losses are the same; in bfloat16 they are near."""
    losses = {}
    for one in (OURS, side):
        fresh = benchmark_model.Task(benchmark_model.of_bfloat16(task.base), task.setting)
        step, loss = benchmark_model.whole_steps(fresh, one, lr=1e-2)
        losses[one] = [loss(fresh.ids, fresh.targets)]
        for _ in range(5):
            step(fresh.ids, fresh.targets)
        losses[one].append(loss(fresh.ids, fresh.targets))
    assert losses[OURS][1] < losses[OURS][0] - 0.1
    np.testing.assert_allclose(losses[side], losses[OURS], rtol=1e-5 if side in (OURS, PEER) else 2e-2)


def test_a_checkpoint_loses_nothing_and_adapters_stay_in_float32():
    """By default; where one of them does otherwise, docs/library/benchmarks.md is out of date."""
    task, found = benchmark_model.Task(benchmark_model.of_bfloat16(tiny_llama(dtype="float32")), SETTINGS[1]), {}
    types = {PEER: ("float32", "float32"), DEFAULT: ("bfloat16", "float32"), ALL_HALF: ("bfloat16", "bfloat16")}
    for side, (base, adapters) in types.items():
        found[side] = dict(benchmark_model.with_peft(task, side).named_parameters())
        for name, p in found[side].items():
            assert str(p.dtype) == f"torch.{adapters if p.requires_grad else base}", name
    for name, p in found[PEER].items():
        assert (p == found[DEFAULT][name].float()).all(), name


@needs_models
def test_dtypes_are_measured_with_and_without_newer_instructions(monkeypatch):
    monkeypatch.setattr(benchmark_model, "DTYPES", (OURS, PEER, DEFAULT))
    found = benchmark_model.measure_dtypes(2, numbers=[0])["steps"]
    assert [one["held to AVX2"] for one in found] == [False, True]
    for one in found:
        assert list(one["ms"]) == [OURS, PEER, DEFAULT]
        assert one["of float32"].keys() == {OURS, DEFAULT}
        assert all(low <= one["ms"][side] <= high for side, (low, high) in one["middle half"].items())


@needs_models
def test_a_training_says_its_losses_and_a_file_keeps_each(monkeypatch, tmp_path):
    said = {"what": "small", "side": OURS, "seed": 0, "lr": 1e-3, "losses": [2.0, 1.0]}
    monkeypatch.setattr(benchmark_model, "answer", lambda process: json.dumps(said))
    monkeypatch.setattr(benchmark_model, "alone", lambda *_: nullcontext())
    found = benchmark_model.measure_losses(tmp_path / "losses.json")
    assert len(found["trainings"]) == benchmark_model.SEEDS * 2 * len(benchmark_model.TRAINED) * len(DTYPES)
    kept = json.loads((tmp_path / "losses.json").read_text())
    assert kept.pop("script") == "examples/measure/benchmark_model.py"
    del kept["when"]
    assert kept == found


@needs_models
@pytest.mark.parametrize(("number", "threads"), [(0, None), (1, 1)])
def test_our_side_runs_as_the_command_does(number, threads, monkeypatch):
    """Where a batch has two rows or more, each half has a thread, and BLAS has none beside it."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    with benchmark_model.alone(number, OURS, "steps") as process:
        assert benchmark_model.answer(process).strip() == "ready"
        environment = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
        assert ("OPENBLAS_NUM_THREADS=1" in environment) is (threads == 1)


@needs_models
def test_sides_take_turns_in_processes_beside_neighbours():
    with benchmark_model.neighbours():
        times = benchmark_model.measure_step(0, (OURS, PEER, FLOOR), 2)
    assert not [child for child in psutil.Process().children() if "while True" in " ".join(child.cmdline())]
    assert {len(of_side) for of_side in times.values()} == {2}
    found = benchmark_model.row("small", times)
    assert list(found["ms"]) == [OURS, PEER, FLOOR]
    assert found["of peer"] > 0
    assert found["of floor"] > 1


def test_both_sides_write_the_same_text(monkeypatch):
    monkeypatch.setattr(benchmark_model, "PROMPT_IDS", [3, 1, 4])
    monkeypatch.setattr(benchmark_model, "TOKENS", 12)
    times = benchmark_model.measure_text(tiny_llama(dtype="float32"), 1)
    assert list(times) == [OURS, PEER]
    assert len(benchmark_model.our_text(tiny_llama(dtype="float32"), [3, 1, 4])) == 12


@needs_models
def test_memory_is_measured_for_each_side():
    assert 0 < benchmark_model.measure_memory(0, OURS) < benchmark_model.measure_memory(0, PEER)


def test_missing_packages_are_named_in_one_line(monkeypatch):
    monkeypatch.setattr(benchmark_model, "find_spec", lambda name: None if name == "peft" else 1)
    monkeypatch.setattr(benchmark_model, "version", lambda name: "1")
    said = benchmark_model.missing()
    assert "needs peft: pip install" in said
    assert "\n" not in said
