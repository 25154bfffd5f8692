"""The benchmark times what it says: our training step, and the same work in the benchmark_layer."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from minilora import Linear, LoRA, LoRALinear, train

ROOT = Path(__file__).parents[2]
MEASURE = ROOT / "examples" / "measure"
sys.path.insert(0, str(MEASURE))

import benchmark_model  # noqa: E402
import timing  # noqa: E402


def loaded(**instead):
    """Import benchmark_layer, with what is to stand there in the place of modules."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delitem(sys.modules, "benchmark_layer", raising=False)
        for name, module in instead.items():
            patched.setitem(sys.modules, name, module)
        return import_module("benchmark_layer")


benchmark_layer = loaded(torch=None)  # to import torch takes longer than all tests here; one asks for it

SIZES = {"n": 64, "in_features": 6, "out_features": 5, "batch": 16, "rank": 2}
KINDS = ["full", "lora", "residual"]
STEPS = 8


def our_model(task, kind):
    adapter = LoRA(*(benchmark_layer.adapter(task).trainable().values()), alpha=1)
    adapter.lora_B += 0.1  # at B = 0 the peers would have little to agree on
    return {"full": Linear(task.W.copy()), "lora": LoRALinear(Linear(task.W), adapter), "residual": adapter}[kind]


def run_steps(task, step):
    task.rng, task.drawn = np.random.default_rng(5), []
    for _ in range(STEPS):
        step()


@pytest.mark.parametrize("kind", KINDS)
def test_our_timed_step_is_the_step_of_train(kind):
    task = benchmark_layer.Task(**SIZES)
    timed, trained = our_model(task, kind), our_model(task, kind)
    for name, p in timed.trainable().items():
        p[...] = trained.trainable()[name]
    run_steps(task, benchmark_layer.our_step(task, timed))
    train(trained, task.X, task.Y, epochs=STEPS // 4, batch_size=16, rng=np.random.default_rng(5))
    for name, p in trained.trainable().items():
        np.testing.assert_array_equal(timed.trainable()[name], p)


def test_ratios_are_within_a_lap_of_those_that_take_turns():
    times = {"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 2.0], "slow": [9.0, 9.0, 9.0]}
    assert timing.ratio(times, "a", ["b", "slow", "absent"]) == 0.5
    seen = []
    times = timing.laps({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert {name: len(laps) for name, laps in times.items()} == {"a": 2, "b": 2}
    assert all(t > 0 for laps in times.values() for t in laps)
    turns = [name for name, previous in zip(seen, [None, *seen], strict=False) if name != previous]
    assert turns == ["a", "b"] * 3


@pytest.mark.long
def test_without_torch_it_prints_our_rows_and_the_floors(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, MEASURE / "benchmark_layer.py", "--laps", "1", "--json", tmp_path / "found.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no torch here" in done.stdout

    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["steps"] if "minilora" not in row["name"]] == list(benchmark_layer.FLOORS)
    assert [row["name"] for row in found["steps"] if "floor" not in row["name"]] == list(benchmark_layer.OURS)
    ratios = {row["name"]: row["ratio"] for row in found["steps"] if "minilora" in row["name"]}
    assert all(ratios[name] == 1 for name in ("full: minilora", "lora: minilora", "residual: minilora"))
    assert ratios["lora: minilora, residual form"] > 0
    assert found["bars"] == []  # each of them compares with torch
    # Full training keeps a gradient and two means as large as the weight, 12 MB; the adapter's are 24 kB.
    memory = {row["name"]: row["memory_mb"] for row in found["steps"] if "minilora" in row["name"]}
    if sys.platform == "linux":
        assert memory["full: minilora"] > 12 > 8 > memory["residual: minilora"]
    assert found["script"] == "examples/measure/benchmark_layer.py"


def test_growth_finds_a_known_exponent(monkeypatch):
    monkeypatch.setattr(benchmark_layer, "GROWTH", {"batch": [1, 2, 4]})
    monkeypatch.setattr(benchmark_layer, "OURS", {"full: minilora": lambda task: task.batch})
    task = benchmark_layer.Task
    monkeypatch.setattr(benchmark_layer, "Task", lambda **sizes: task(**(SIZES | sizes)))
    taken = lambda steps, count: {key: [3.0 * size**1.5] for key, size in steps.items()}  # noqa: E731
    monkeypatch.setattr(benchmark_layer, "laps", taken)
    found = benchmark_layer.growth(1)["batch"]["full: minilora"]
    assert found["exponent"] == pytest.approx(1.5)
    assert "1.50" in benchmark_layer.sizes_table({"batch": {"full: minilora": found}})


def test_ratios_beside_busy_neighbours_are_not_judged(monkeypatch):
    """Of three seconds in which all other processes together computed for four and a half, 1.5 cores were others'."""
    clock, spent = iter([10.0, 13.0]), iter([100.0, 104.5])
    with monkeypatch.context() as patched:
        patched.setattr(timing.time, "perf_counter", lambda: next(clock))
        patched.setattr(timing.Load, "_others", staticmethod(lambda: next(spent)))
        assert timing.Load().others() == pytest.approx(1.5)
    bars = [{"what": "a step", "ratio": 0.9, "bound": 1.0}, {"what": "another", "ratio": 1.2, "bound": 1.0}]
    for others, judged in ((None, True), (0.0, True), (0.25, True), (0.26, False), (3.0, False)):
        table = timing.bars_table(bars, timing.too_busy({"cpu": "x", "cores": 2, "others": others}))
        assert ("not met" in table) is judged
        assert ("not judged: other processes computed on" in table) is not judged
        assert f"{1.2:9.3f}" in table


def test_each_kind_of_step_has_a_floor():
    assert benchmark_layer.FLOOR_OF.keys() == set(KINDS)
    assert set(benchmark_layer.FLOOR_OF.values()) <= benchmark_layer.FLOORS.keys()


def test_a_models_growth_has_a_known_exponent(monkeypatch):
    monkeypatch.setattr(benchmark_model, "AXES", {"length": [3, 6, 12], "rank": [1, 2]})
    monkeypatch.setattr(benchmark_model, "USUAL", {"length": 4, "rank": 2, "rows": 1, "layers": 1})
    slow = {"ms": lambda size: 2 * size**1.5, "floor": lambda size: 1.0 * size}
    monkeypatch.setattr(timing, "laps", lambda steps, count, **_: {(n, w): [slow[w](n)] for n, w in steps})
    found = {axis: benchmark_model.growth(axis, 1) for axis in benchmark_model.AXES}
    assert found["length"]["exponents"]["ms"] == pytest.approx(1.5)
    assert found["length"]["exponents"]["floor"] == pytest.approx(1)
    assert found["length"]["of floor"] == pytest.approx([2 * size**0.5 for size in (3, 6, 12)])
    kept = np.array(found["length"]["mb"])
    assert kept[2] - kept[1] > 1.9 * (kept[1] - kept[0]) > 0
    lines = benchmark_model.growths_table(found).splitlines()
    assert lines[2].endswith("1.50")
    assert any(line.split()[:1] == ["rank"] for line in lines)


def test_the_frozen_floor_has_each_weight_forward_and_back():
    """Seven matrices in a layer, whose lowest three owe no dx, and the head: of the adapters' own products none."""
    task = benchmark_model.task_of(length=5, rank=2, rows=1, layers=2)
    pairs = benchmark_model.frozen_products(task)
    assert len(pairs) == 2 * (2 * 7 + 1) - 3
    assert all(2 not in (*a.shape, *b.shape) for a, b in pairs)


@pytest.mark.peers
@pytest.mark.parametrize("kind", KINDS)
def test_the_peers_take_the_same_steps(kind):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    with_torch = loaded()
    task = benchmark_layer.Task(**SIZES)
    ours = our_model(task, kind)
    start = {name: torch.from_numpy(p.copy()) for name, p in ours.trainable().items()}
    run_steps(task, benchmark_layer.our_step(task, ours))
    makers = {
        "full": [(with_torch.their_full, {}), (with_torch.their_full, {"fused": True})],
        "lora": [(with_torch.ArticleModule, {}), (with_torch.peft_model, {})],
        "residual": [(with_torch.TheirAdapter, {}), (with_torch.TheirAdapter, {"fused": True})],
    }
    for make, options in makers[kind]:
        model = make(task)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == len(start)
        with torch.no_grad():
            for p, value in zip(trained.values(), start.values(), strict=True):
                p.copy_(value.T if make is with_torch.ArticleModule else value)
        run_steps(task, with_torch.their_step(task, model, residual=kind == "residual", **options))
        for p, value in zip(trained.values(), ours.trainable().values(), strict=True):
            theirs = p.detach().numpy()
            np.testing.assert_allclose(
                theirs.T if make is with_torch.ArticleModule else theirs, value, rtol=0, atol=2e-6
            )


def test_what_the_readme_says_of_bfloat16_is_recorded():
    """README: with the processor's units PEFT in bfloat16 has the faster step of SmolLM2, and without them a slower."""
    found = json.loads((ROOT / "docs" / "recordings" / "benchmark-dtypes.json").read_text())
    ours, peer, default = "minilora", "torch + PEFT", "torch + PEFT, bfloat16"
    assert "avx512_bf16" in found["machine"]["units"]
    steps = [step for step in found["steps"] if step["what"].startswith("SmolLM2")]
    assert {step["held to AVX2"] for step in steps} == {False, True}
    for step in steps:
        fastest = min((ours, peer, default), key=step["ms"].get)
        assert fastest == (ours if step["held to AVX2"] else default), step["what"]
        assert step["held to AVX2"] == (step["ms"][default] > step["ms"][peer]), step["what"]
