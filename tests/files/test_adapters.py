"""Adapters as files: what is written is read again, what cannot be read is refused by name."""

import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.files.adapters import system_message
from minilora.files.inspection import inspect_adapter
from minilora.files.tensors import TensorFile
from minilora.variants.dora import DoRAAdapter
from minilora.variants.stackedlora import StackedLoRA

from ..support.adapter_folder import CONFIG, WEIGHTS, assert_same_adapters, variant
from ..support.disk import contents


def draw_lora(rng, dtype="float32"):
    in_features, out_features, rank = (int(n) for n in rng.integers(1, 7, 3))
    A, B = rng.standard_normal((rank, in_features)), rng.standard_normal((out_features, rank))
    return LoRA(A.astype(dtype), B.astype(dtype), float(rng.choice([1, 1.5, 16, 0.1])))


NAMES = ["fc", "enc.fc", "enc.layer.0.fc", "encXlayer.0.fc", "a+b", "0", "10"]
NAMES += [".".join(["a"] * 3000), "a" * 1200 + ".fc", "[" + "," * 900 + '"' * 900 + "\\" * 900, "é\U0001f600" * 500]


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "float32", "float64"]))
@settings(max_examples=12, deadline=None)
def test_an_adapter_comes_back_as_it_was_saved(tmp_path_factory, seed, dtype):
    """Names are chosen so that each is the end of another: their patterns must not catch one another. Some are long."""
    rng = np.random.default_rng(seed)
    layers = {str(n): draw_lora(rng, dtype) for n in rng.permutation(NAMES)[: int(rng.integers(1, 8))]}
    folder = tmp_path_factory.mktemp("a")
    for place in ("new/folder", "again"):
        save_adapter(folder / place, layers)
        assert_same_adapters(load_adapter(folder / place), layers)
    assert contents(folder / "new/folder") == contents(folder / "again")


@given(system=st.text('a{}"\\ \n\r\0\u2028é\U0001f600', min_size=1))
@settings(deadline=None)
def test_a_system_message_comes_back_with_the_adapter(tmp_path_factory, system):
    folder, layers = tmp_path_factory.mktemp("a"), {"fc": draw_lora(np.random.default_rng(0))}
    save_adapter(folder, layers, system=system)
    assert system_message(folder) == system
    assert_same_adapters(load_adapter(folder), layers)
    save_adapter(folder, layers, overwrite=True)  # the next one does not inherit it
    assert system_message(folder) is None


def test_factors_in_any_memory_order_are_saved_as_they_read(tmp_path):
    A, B = np.arange(6.0).reshape(3, 2).T, np.arange(12.0).reshape(4, 3)[:, ::2]
    save_adapter(tmp_path / "a", {"fc": LoRA(A, B, 1.0)})
    np.testing.assert_array_equal(load_adapter(tmp_path / "a")["fc"].lora_A, A)
    np.testing.assert_array_equal(load_adapter(tmp_path / "a")["fc"].lora_B, B)


@pytest.mark.parametrize("dtype", ["float16", np.float64, np.dtype("float32")])
def test_a_dtype_can_be_asked_for(saved, dtype):
    asked = {
        name: LoRA(a.lora_A.astype(dtype), a.lora_B.astype(dtype), a.alpha) for name, a in load_adapter(saved).items()
    }
    assert_same_adapters(load_adapter(saved, dtype=dtype), asked)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "complex64", bool, "f4,f4", 3])
def test_a_dtype_that_holds_no_factors_is_refused(saved, dtype):
    with pytest.raises(TypeError, match=r"^dtype must be one of float16, float32, float64, got"):
        load_adapter(saved, dtype=dtype)


@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_beyond_the_dtype_asked_for_are_refused(tmp_path, factor):
    A, B = (np.full((2, 2), 1e5 if f == factor else 1.0) for f in "AB")
    save_adapter(tmp_path / "a", {"enc.fc": LoRA(A, B, 1.0)})
    said = f"'{tmp_path / 'a' / WEIGHTS}': the factors of 'enc.fc' reach 100000, which float16 cannot hold"
    with pytest.raises(FileRefused, match=f"^{said}$"):
        load_adapter(tmp_path / "a", dtype="float16")


def test_an_adapter_replaces_the_one_before_it(saved, tmp_path):
    folder = variant(saved, tmp_path)
    new = {"other": LoRA(np.ones((1, 3)), np.ones((2, 1)), 2.0)}
    before = contents(folder)
    with pytest.raises(ValueError, match=r"already has an adapter: choose another folder, or pass overwrite=True$"):
        save_adapter(folder, new)
    assert contents(folder) == before
    save_adapter(folder, new, overwrite=True)
    assert load_adapter(folder).keys() == new.keys()
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""How far a number may be off that is rounded to nearest, as a part of it."""


@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_a_file_in_half_precision_has_the_nearest_numbers(tmp_path, dtype):
    rng = np.random.default_rng(3)
    layers = {f"layer.{i}": draw_lora(rng, source) for i, source in enumerate(("float64", "float32", "float16"))}
    save_adapter(tmp_path / "a", layers, dtype=dtype)
    stored = TensorFile(tmp_path / "a" / WEIGHTS)
    assert {spec.dtype for spec in stored.tensors.values()} == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    loaded = load_adapter(tmp_path / "a", dtype="float64")
    for path, layer in layers.items():
        assert loaded[path].alpha == layer.alpha
        for ours, theirs in ((layer.lora_A, loaded[path].lora_A), (layer.lora_B, loaded[path].lora_B)):
            assert (np.abs(ours - theirs) <= HALF_UNIT[dtype] * np.abs(ours) + 2.0**-25).all()
    save_adapter(tmp_path / "b", loaded, dtype=dtype)
    for file in (CONFIG, WEIGHTS):  # its numbers are of that type already
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_number_beyond_a_files_type_is_refused_before_writing(tmp_path):
    lora = LoRA(np.full((2, 3), 1e5), np.ones((4, 2)), 1.0)
    with pytest.raises(ValueError, match=rf"^'{tmp_path}/a.*': layers\['head'\] reaches 100000, which float16 cannot"):
        save_adapter(tmp_path / "a", {"head": lora}, dtype="float16")
    with pytest.raises(ValueError, match="dtype must be 'float16', 'bfloat16', 'float32' or 'float64', got 'int8'"):
        save_adapter(tmp_path / "a", {"head": lora}, dtype="int8")
    assert not (tmp_path / "a").exists()
    save_adapter(tmp_path / "a", {"head": lora}, dtype="bfloat16")
    np.testing.assert_array_equal(load_adapter(tmp_path / "a")["head"].lora_A, 99840.0)  # the nearest, by hand


def test_the_configuration_is_what_peft_expects(tmp_path):
    """Every key and value, and in patterns only what differs from the first layer."""
    layers = {
        "a": LoRA(np.ones((2, 3)), np.ones((4, 2)), 3.0),
        "b.c": LoRA(np.ones((1, 3)), np.ones((4, 1)), 1.0005),
        "d": LoRA(np.ones((2, 3)), np.ones((4, 2)), 3.0),
    }
    save_adapter(tmp_path, layers, fan_in_fan_out=True, base_model="a/base")
    text = (tmp_path / CONFIG).read_text()
    assert json.loads(text) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "a/base",
        "target_modules": ["a", "b.c", "d"],
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {r"^b\.c": 1},
        "alpha_pattern": {r"^b\.c": 1.0005},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    assert '"lora_alpha": 3,' in text  # PEFT writes whole numbers so
    assert text == json.dumps(json.loads(text), indent=2) + "\n"


ONE = {"fc": LoRA(np.ones((1, 1)), np.ones((1, 1)), 1)}
OF_EXPERTS = StackedLoRA(np.ones((2, 1)), np.ones((1, 2)), 1, experts=2)
A_PATH = "expected a module's path such as 'enc.q_proj'"
BY_WEIGHT = "expected the weight of a linear layer in layers, without DoRA or lora_dropout"


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        ({}, {}, ValueError, "layers must have at least one adapter, got an empty dict"),
        ([], {}, TypeError,
         "layers must be a dict of adapters by module path, such as {'q_proj': adapter}, or what "
         "minilora.adapters(model) returns; got list"),
        ({"fc": 1}, {}, TypeError,
         "layers['fc'] must be a LoRA or a LoRALinear, got int, which PEFT's layout of LoRA cannot represent"),
        *[({key: ONE["fc"]}, {}, ValueError, f"layers has the key {key!r}, {A_PATH}")
          for key in ("", "a..b", "a\nb", 3)],
        *[({"fc": LoRA(*factors, 1)}, {}, ValueError, "layers['fc'] holds NaN or infinity")
          for factors in ((np.full((1, 1), np.inf), np.ones((1, 1))), (np.ones((1, 1)), np.full((1, 1), np.nan)))],
        *[({"fc": LoRA(np.ones((1, 1)), np.ones((1, 1)), alpha)}, {}, ValueError,
           f"alpha of layers['fc'] must be above 1e-30 and below 1e+30, got {alpha}") for alpha in (1e40, 1e-40)],
        ({"fc": LoRA(np.ones((1, 1), complex), np.ones((1, 1), complex), 1)}, {}, TypeError,
         "layers['fc'] has dtype complex128, expected one of ('float16', 'float32', 'float64')"),
        (ONE, {"fan_in_fan_out": "false"}, TypeError, "fan_in_fan_out must be True or False, got 'false'"),
        (ONE, {"fan_in_fan_out": 1}, TypeError, "fan_in_fan_out must be True or False, got 1"),
        (ONE, {"lora_dropout": 1}, ValueError, "lora_dropout must be at least 0 and below 1, got 1"),
        (ONE, {"overwrite": 1}, TypeError, "overwrite must be True or False, got 1"),
        (ONE, {"base_model": 3}, TypeError, "base_model must be a str, got int"),
        (ONE, {"target_modules": ["f", "xfc"]}, ValueError,
         "target_modules does not name 'fc', although there are tensors for it"),
        *[(ONE, {"target_parameters": [name], **more}, ValueError, f"target_parameters names {name!r}, {BY_WEIGHT}")
          for name, more in (("fc", {}), ("fc.bias", {}), ("gc.weight", {}), ("fc.weight", {"lora_dropout": 0.1}))],
        ({"fc": DoRAAdapter(np.ones((1, 1)), np.ones((1, 1)), 1, magnitude=np.ones(1))},
         {"target_parameters": ["fc.weight"]}, ValueError, f"target_parameters names 'fc.weight', {BY_WEIGHT}"),
        ({"a.fc": OF_EXPERTS}, {"target_parameters": ["a.fc.weight"]}, ValueError,
         f"target_parameters names 'a.fc.weight', {BY_WEIGHT}"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, layers, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        save_adapter(tmp_path / "a", layers, **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("path", "error"), [("", ValueError), ("a\0b", ValueError), (b"a", TypeError), (None, TypeError), (3, TypeError)]
)
def test_a_path_that_names_nothing_is_refused(tmp_path, monkeypatch, path, error):
    monkeypatch.chdir(tmp_path)
    for call in (load_adapter, lambda p: save_adapter(p, ONE), inspect_adapter, system_message):
        with pytest.raises(error, match=r"^path must be"):
            call(path)
    assert not list(tmp_path.iterdir())


def test_both_files_are_told_before_anything_is_written(tmp_path):
    folder, said = tmp_path / "new" / "a", []

    def full(*files):
        said.append(files)
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save_adapter(folder, ONE, before=full)
    assert not list(tmp_path.iterdir())
    for options in ({}, {"system": "sat", "dtype": "bfloat16"}):
        save_adapter(folder, ONE, **options, overwrite=True, before=lambda *files: said.append(files))
        assert said[-1] == tuple((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))
    with pytest.raises(ValueError, match="has an adapter"):
        save_adapter(folder, ONE, before=full)
    assert len(said) == 3


def mutate(raw, rng):
    """Flip, cut, lengthen, overwrite or repeat some of the bytes."""
    raw, kind = bytearray(raw), int(rng.integers(6))
    at = int(rng.integers(len(raw)))
    if kind == 0:
        raw[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        raw += rng.bytes(int(rng.integers(1, 50)))
    elif kind == 3:
        raw[at : at + 8] = rng.bytes(int(rng.integers(0, 9)))
    elif kind == 4:
        raw[at:at] = raw[at : at + int(rng.integers(1, 40))]
    else:
        for place in rng.integers(min(64, len(raw)), size=3):
            raw[place] = int(rng.integers(256))
    return bytes(raw)


JSON_VALUES = [None, True, -1, 0, 2, 1e300, 10**30, "", "x", "LORA", [], ["head"], {}, {"head": 2}, {"(a+)+": 1}]
JSON_VALUES += [[[]] * 99]


def mutate_json(text, rng):
    """Change, rename or drop a field of the configuration."""
    config = json.loads(text)
    key = str(rng.choice(sorted(config)))
    kind = int(rng.integers(3))
    value = config.pop(key)
    if kind == 0:
        config[key] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
    elif kind == 1:
        config[key + "_"] = value
    return json.dumps(config).encode()


def expected(folder):
    """Read the two files as plainly as can be, for a mutant that was accepted."""
    config, tensors = json.loads((folder / CONFIG).read_bytes()), load_file(folder / WEIGHTS)
    for module in ("enc.q_proj", "head"):
        A, B = (tensors[f"base_model.model.{module}.lora_{f}.weight"] for f in "AB")
        alpha = (config.get("alpha_pattern") or {}).get("^" + module.replace(".", "\\."))
        alpha = config.get("lora_alpha") or 8 if alpha is None else alpha
        yield module, A, B, alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))


def test_mutated_files_load_to_right_values_or_are_refused(saved, tmp_path):
    rng = np.random.default_rng(0)
    sound = {name: (saved / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    accepted = 0
    for number in range(150):
        name = (CONFIG, WEIGHTS)[number % 2]
        how = mutate_json if name == CONFIG and rng.random() < 0.5 else mutate
        for file, raw in (sound | {name: how(sound[name], rng)}).items():
            (tmp_path / file).write_bytes(raw)
        try:
            loaded = load_adapter(tmp_path)
        except FileRefused:
            continue
        accepted += 1
        if loaded.keys() == {"enc.q_proj", "head"}:
            for module, A, B, scaling in expected(tmp_path):
                np.testing.assert_array_equal(loaded[module].lora_A, A)
                np.testing.assert_array_equal(loaded[module].lora_B, B)
                assert math.isclose(loaded[module].scaling, scaling, rel_tol=1e-14)
        else:  # a name was changed, in both files' terms
            assert len(loaded) == 2
    assert 0 < accepted < 150


def test_each_tensor_begins_at_a_multiple_of_its_size(tmp_path):
    """Programs that map the file into memory need that, or copy it."""
    types = {"a": "f2", "b": "f8", "c": "f4"}
    save_adapter(tmp_path, {k: LoRA(np.ones((1, 3), t), np.ones((4, 1), t), 1.0) for k, t in types.items()})
    tensors = TensorFile(tmp_path / WEIGHTS).tensors.values()
    assert {(spec.dtype, spec.start % {"F16": 2, "F32": 4, "F64": 8}[spec.dtype]) for spec in tensors} == {
        ("F16", 0), ("F32", 0), ("F64", 0)
    }  # fmt: skip
