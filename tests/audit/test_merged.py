"""`audit --merged`: right merges by each road, and broken ones, each of which gets its name in the first line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora.audit.auditing import audit
from minilora.files.merge import merge_adapter
from minilora.files.tensors import FLOATS

from .adapters import LAYERS, PREFIX, config, factors, model, paths, peft

KINDS = ("q_proj", "v_proj")
SCALING, R = 3.0, 2


@pytest.fixture(params=["F32", "BF16", "F16"])
def dtype(request):
    """The type of the base and of the merged model."""
    return FLOATS[request.param]


@pytest.fixture
def world(tmp_path, dtype):
    """A base, an adapter beside it, and a function that writes a merged model and says what audit says of it."""
    base = model(tmp_path / "base", square=True, dtype=dtype)
    tensors = factors(paths(*KINDS))
    adapter = peft(tmp_path / "adapter", tensors, config(*KINDS, lora_alpha=6))
    arrays = load_file(base / "model.safetensors")
    changes = {path: SCALING * _product(tensors, path) for path in paths(*KINDS)}

    def judged(merged):
        (tmp_path / "merged").mkdir(exist_ok=True)
        (tmp_path / "merged" / "config.json").write_text((base / "config.json").read_text())
        save_file({name: np.ascontiguousarray(a) for name, a in merged.items()}, tmp_path / "merged/model.safetensors")
        return audit(adapter, base, merged=tmp_path / "merged")

    return base, adapter, arrays, changes, judged


def _product(tensors, path):
    A, B = (tensors[f"{PREFIX}{path}.lora_{part}.weight"].astype("f8") for part in "AB")
    return B @ A


def merged(arrays, changes, which=lambda path: True):
    """The base's arrays with changes added in float64, and rounded once."""
    return arrays | {
        f"{path}.weight": (arrays[f"{path}.weight"].astype("f8") + change).astype(arrays[f"{path}.weight"].dtype)
        for path, change in changes.items()
        if which(path)
    }


def test_a_right_merge_is_called_right(world, dtype):
    _, _, arrays, changes, judged = world
    report = judged(merged(arrays, changes))
    assert report.first_line.startswith(f"merged: RIGHT: merged rightly (6 of 6 modules, {dtype.name}, at most 0.5 ulp")
    assert report.status == 0


def test_our_own_merge_is_called_right(world, tmp_path):
    base, adapter, *_ = world
    merge_adapter(base, adapter, tmp_path / "ours")
    assert audit(adapter, base, merged=tmp_path / "ours").word == "RIGHT"


def at(arrays, name, change):
    """The arrays with one of them changed."""
    return arrays | {name: change(arrays[name])}


Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "the base": (lambda a, c: a, "not merged, equal to the base: all 6 modules"),
    "the first layer alone": (
        lambda a, c: merged(a, c, lambda path: ".0." in path),
        "not merged, equal to the base: layers 1 to 2 (4 of 6 modules); merged rightly: layer 0",
    ),
    "twice": (lambda a, c: merged(a, {p: 2 * d for p, d in c.items()}), "merged by the factor 2 (twice"),
    "subtracted": (lambda a, c: merged(a, {p: -d for p, d in c.items()}), "merged by the factor -1 (subtracted"),
    "without the scaling": (
        lambda a, c: merged(a, {p: d / SCALING for p, d in c.items()}),
        "merged by the factor 0.3333 (without the scaling",
    ),
    "a norm is another": (
        lambda a, c: at(merged(a, c), "model.norm.weight", lambda x: (x * 2).astype(x.dtype)),
        "changed, though no adapter stands there, by 100.0% of their size: 'model.norm.weight'",
    ),
    "a norm is missing": (
        lambda a, c: {name: x for name, x in merged(a, c).items() if name != "model.norm.weight"},
        "missing in the merged model: 'model.norm.weight'",
    ),
    "not a number": (lambda a, c: at(merged(a, c), Q, lambda x: (x * np.nan).astype(x.dtype)), "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_merge_is_named_in_the_first_line(world, name):
    _, _, arrays, changes, judged = world
    make, said = BROKEN[name]
    report = judged(make(arrays, changes))
    assert report.status == 1
    assert said in report.first_line


def test_a_change_below_half_a_step_is_not_called_right(tmp_path):
    base = model(tmp_path / "base", dtype=FLOATS["BF16"])
    tensors = {name: 1e-4 * array for name, array in factors(paths(*KINDS)).items()}
    adapter = peft(tmp_path / "adapter", tensors, config(*KINDS))
    report = audit(adapter, base, merged=base)
    assert report.status == 2
    assert f"in all {2 * LAYERS} modules the change is below half a step of bfloat16" in report.first_line


def test_the_json_has_what_became_of_each_module(world):
    _, _, arrays, changes, judged = world
    found = json.loads(json.dumps(judged(merged(arrays, {p: 2 * d for p, d in changes.items()})).json()))["merged"]
    assert {verdict["factor"] for verdict in found["modules"]} == {2.0}
    assert {verdict["state"] for verdict in found["modules"]} == {"wrong"}


def test_it_needs_the_base(world):
    _, adapter, *_ = world
    with pytest.raises(ValueError, match="--merged needs --model, the base"):
        audit(adapter, merged=adapter)
