"""Files that nobody could have meant: an audit reports or refuses them, within its bounds."""

import json
import random
import time

import numpy as np
import pytest

from minilora.audit.auditing import audit
from minilora.checks import FileRefused
from minilora.files.peft import KEYS

from .adapters import EXPERTS, config, expert_factors, factors, mlx, model, paths, peft

JUNK = [
    None, True, 0, -1, 3.5, 1e300, 10**30, "", "q_proj", "(", "*", [], [1], ["q_proj", 1], [None], {}, {"a": 1},
    {"q_proj": 3}, {"(": 1}, {"q_proj": "x"}, {"q_proj": None}, [["q_proj"]], "all-linear", "0.19.0", "\x1b[2J",
    {"keys": ["a", 1]}, {"rank": "x", "scale": "y"}, {"rank": 0, "alpha": 3}, {"scale": True},
]  # fmt: skip
SHAPES = [
    lambda a: a.T, lambda a: a[:0], lambda a: a.astype("i4"), lambda a: np.array(1.0), lambda a: a[None],
    lambda a: a * np.nan, lambda a: a.ravel(), lambda a: np.stack([a, a]),
]  # fmt: skip
NAMES = [
    lambda n: f"{n}.x", lambda n: n.replace("weight", "bias"), lambda n: n.replace("lora_A", "lora_magnitude_vector"),
    lambda n: f".{n}", lambda n: n.replace("lora_A.weight", "base_layer.weight"), lambda n: n.replace(".weight", ""),
]  # fmt: skip


def looked_at(adapter, base, **options):
    """An audit, or None where it refuses; the report must be text and JSON whatever it holds."""
    try:
        report = audit(adapter, base, **options)
    except FileRefused:
        return None
    assert str(report).isprintable() or "\n" in str(report)
    json.dumps(report.json(), allow_nan=False)
    return report


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_junk_is_reported_or_refused(tmp_path, seed):
    rng, bases = random.Random(seed), [None, model(tmp_path / "m"), model(tmp_path / "x", experts=4, shared=True)]
    for i in range(12):
        tensors, settings = factors(paths("q_proj", "v_proj")), config("q_proj", "v_proj")
        if rng.random() < 0.4:
            tensors, settings = expert_factors(), config(target_parameters=EXPERTS)
        for _ in range(rng.randrange(4)):
            settings[rng.choice([*KEYS, "num_layers", "unknown"])] = rng.choice(JUNK)
        for _ in range(rng.randrange(3)):
            name = rng.choice(list(tensors))
            array = tensors.pop(name)
            tensors[name if rng.random() < 0.7 else rng.choice(NAMES)(name)] = rng.choice(SHAPES)(array)
        adapter = peft(tmp_path / f"a{i}", tensors, settings)
        with np.errstate(all="ignore"):
            looked_at(adapter, rng.choice(bases))
            looked_at(adapter, rng.choice(bases[1:]), merge=True)


@pytest.mark.parametrize("value", JUNK)
def test_junk_in_mlx_settings_is_reported(tmp_path, value):
    base = model(tmp_path / "m")
    for i, more in enumerate(({"lora_parameters": value}, {"num_layers": value}, {"fine_tune_type": value})):
        looked_at(mlx(tmp_path / f"a{i}", paths("q_proj"), **more), base)


@pytest.mark.long
def test_an_expression_that_runs_for_ever_is_stopped(tmp_path):
    settings = config() | {"target_modules": "(.*)*" * 8 + "x"}
    before = time.process_time()
    report = looked_at(peft(tmp_path / "a", factors(paths("q_proj")), settings), None)
    assert [finding.code for finding in report.of("wrong")] == ["targets-not-read"]
    assert time.process_time() - before < 30


@pytest.mark.long
def test_very_many_tensors_are_no_trouble(tmp_path):
    tensors = {
        f"base_model.model.m.{i}.q_proj.lora_{p}.weight": np.ones((1, 1), "f4") for i in range(9000) for p in "AB"
    }
    settings = config("q_proj", r=1, modules_to_save=["a"] * 900, rank_pattern={f"z{i}": 1 for i in range(9000)})
    assert looked_at(peft(tmp_path / "a", tensors, settings), model(tmp_path / "m")) is not None
