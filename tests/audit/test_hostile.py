"""Files that nobody could have meant, and very large ones: an audit reports or refuses them, within its bounds."""

import json
import random
import time
import tracemalloc
from itertools import product

import numpy as np
import pytest

from minilora.audit.auditing import audit
from minilora.files.peft import CONFIG_KEYS
from minilora.texts import FileRefused

from .adapters import EXPERTS, PREFIX, config, expert_factors, factors, mlx, model, paths, peft, sparse, written

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
    lambda n: n.replace("proj", "{names}"), lambda n: n.replace("lora_A", "{").replace("lora_B", "}"),
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
            settings[rng.choice([*CONFIG_KEYS, "num_layers", "unknown"])] = rng.choice(JUNK)
        for _ in range(rng.randrange(3)):
            name = rng.choice(list(tensors))
            array = tensors.pop(name)
            tensors[name if rng.random() < 0.7 else rng.choice(NAMES)(name)] = rng.choice(SHAPES)(array)
        adapter = peft(tmp_path / f"a{i}", tensors, settings)
        with np.errstate(all="ignore"):
            looked_at(adapter, rng.choice(bases))
            looked_at(adapter, rng.choice(bases[1:]), merge=True)


@pytest.mark.parametrize("shape", [(0, 3, 3), (12, 0, 3), (0, 8), (12, 0)])
def test_a_model_with_an_axis_of_0_does_not_fit(tmp_path, shape):
    base = written(tmp_path / "m", {f"{path}.weight": np.ones(shape, "f4") for path in paths("q_proj")})
    report = looked_at(peft(tmp_path / "a", factors(paths("q_proj")), config("q_proj")), base, merge=True)
    assert [finding.code for finding in report.of("wrong")] == ["shape-differs"]


def test_names_with_braces_are_named_as_they_are(tmp_path):
    tensors = {name.replace("q_proj", "{names}{0}"): array for name, array in factors(paths("q_proj")).items()}
    report = looked_at(peft(tmp_path / "a", tensors, config("q_{x}")), model(tmp_path / "m"))
    assert "['q_{x}']) does not name: 'model.layers.0.self_attn.{names}{0}'" in str(report)


def test_junk_in_mlx_settings_is_reported(tmp_path):
    base, adapter = model(tmp_path / "m"), mlx(tmp_path / "a", paths("q_proj"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in product(("lora_parameters", "num_layers", "fine_tune_type"), JUNK):
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {key: value}))
        looked_at(adapter, base)


@pytest.mark.long
def test_an_expression_that_runs_for_ever_is_stopped(tmp_path):
    settings = config() | {"target_modules": "(.*)*" * 8 + "x"}
    before = time.process_time()
    report = looked_at(peft(tmp_path / "a", factors(paths("q_proj")), settings), None)
    assert [finding.code for finding in report.of("wrong")] == ["targets-not-read"]
    assert time.process_time() - before < 30


@pytest.mark.full
def test_very_many_tensors_are_audited(tmp_path):
    tensors = {
        f"base_model.model.m.{i}.q_proj.lora_{p}.weight": np.ones((1, 1), "f4") for i in range(9000) for p in "AB"
    }
    settings = config("q_proj", r=1, modules_to_save=["a"] * 900, rank_pattern={f"z{i}": 1 for i in range(9000)})
    assert looked_at(peft(tmp_path / "a", tensors, settings), model(tmp_path / "m")) is not None


@pytest.mark.long
def test_the_headers_of_a_model_of_70b_are_enough(tmp_path):
    d, kv, m, depth = 8192, 1024, 28672, 80
    sizes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(depth) for name, shape in sizes.items()}
    sparse(tmp_path / "m", shapes, shards=30)
    rng, tensors = np.random.default_rng(0), {}
    for i in range(depth):
        name, (out, width) = f"{PREFIX}model.layers.{i}.self_attn.k_proj", (kv, d)
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, width)).astype("f2")
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((out, 2)).astype("f2")
    tracemalloc.start()
    report = audit(peft(tmp_path / "a", tensors, config("k_proj")), tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.word == "SOUND"
    assert {kind.name: (kind.adapted, kind.total) for kind in report.kinds}["k_proj"] == (depth, depth)
    assert peak < 100e6
