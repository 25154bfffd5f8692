"""What is no adapter, or none that can be looked at, is refused with its reason; a configuration may be anywhere."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.audit.auditing import audit
from minilora.texts import FileRefused, short

from .adapters import EXPERTS, PREFIX, config, expert_factors, factors, gguf, kohya, mlx, paths, peft

Q = paths("q_proj")
NO_PICKLE = "a pickle, which can run code when it is loaded: save it as safetensors"
NO_PLACE = "expected adapter_model.safetensors, adapters.safetensors, or one .safetensors or .gguf file: it has"
OTHERS = {
    "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "oft_blocks": "OFT", "oft_diag": "OFT", "boft_R": "BOFT",
    "lora_mid.weight": "LoCon in three factors", "a1.weight": "GLoRA", "glora_a1": "GLoRA", "on_input": "IA3",
}  # fmt: skip


def empty(t, *names):
    """A folder of empty files, which are not opened."""
    for name in names:
        (t / name).parent.mkdir(exist_ok=True, parents=True)
        (t / name).touch()
    return t


def listed(name, count):
    """A folder whose configuration has so many entries."""
    return lambda t: peft(t / "a", factors(Q), config(**{name: [1 if "layers" in name else "a"] * count}))


def keyed(count):
    return lambda t: mlx(t / "a", Q, lora_parameters={"rank": 2, "scale": 2.0, "keys": ["a"] * count})


def lettered(count):
    """A folder one of whose tensors has a name of so many letters."""
    return lambda t: peft(t / "a", factors(Q) | {"x" * count: np.ones(1, "f4")}, config("q_proj"))


def trained_in_full(tensors):
    return {name.replace("lora_a", "weight"): array for name, array in tensors.items() if "lora_a" in name}


REFUSED = [
    *((lambda t, end=end: empty(t, f"a.{end}") / f"a.{end}", f"'~/a.{end}': {NO_PICKLE}")
      for end in ("bin", "pt", "pth", "ckpt", "pkl")),
    *((lambda t, name=name: empty(t, name), f"'~/{name}': {NO_PICKLE}")
      for name in ("adapter_model.bin", "pytorch_lora_weights.bin")),
    (empty, f"'~': {NO_PLACE} none of these"),
    (lambda t: empty(t, *(f"{i}.safetensors" for i in range(6)), "0.gguf"),
     f"'~': {NO_PLACE} '0.gguf', '0.safetensors', '1.safetensors', '2.safetensors', '3.safetensors'"),
    (lambda t: empty(t, *(f"{i}/adapter_config.json" for i in range(6)), "a.txt"),
     f"'~': {NO_PLACE} none of these, but there is one in its folder '0', '1', '2', '3', '4'"),
    (lambda t: peft(t / "a", factors(Q), config("q_proj", peft_type="IA3")),
     "'~/a/adapter_config.json': peft_type is 'IA3', expected 'LORA'"),
    *((lambda t, n=name: peft(t / "a", {f"lora_unet_x.{n}": np.ones((2, 8))}, None),
       f"'~/a/adapter_model.safetensors': 'lora_unet_x.{name}' belongs to {kind}, expected a LoRA of two "
       "factors") for name, kind in OTHERS.items()),
    *((lambda t, change=change: mlx(t / "a", Q, change=change, fine_tune_type="full"),
       "'~/a/adapter_config.json': fine_tune_type is 'full', expected 'lora' or 'dora'")
      for change in (dict, trained_in_full)),
    (lambda t: gguf(t / "a.gguf", Q, kind="model"),
     "'~/a.gguf': general.type is 'model', expected 'adapter': the file is not an adapter"),
    (lambda t: gguf(t / "a.gguf", Q, how="control"), "'~/a.gguf': adapter.type is 'control', expected 'lora'"),
    *((listed(name, 1001), f"'~/a/adapter_config.json': {name} has 1,001 entries, expected at most 1,000")
      for name in ("modules_to_save", "target_parameters", "layers_to_transform")),
    (keyed(1001), "'~/a/adapter_config.json': lora_parameters.keys has 1,001 entries, expected at most 1,000"),
    (lettered(1001),
     f"'~/a/adapter_model.safetensors': {short('x' * 1001)} has 1,001 characters, expected at most 1,000"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_looked_at_is_refused(tmp_path, make, message):
    with pytest.raises(FileRefused) as refused:
        audit(make(tmp_path))
    assert str(refused.value).replace(str(tmp_path), "~") == message


@pytest.mark.parametrize("make", [listed("layers_to_transform", 1000), keyed(1000), lettered(1000)])
def test_as_much_as_is_allowed_is_looked_at(tmp_path, make):
    assert audit(make(tmp_path)).adapter.modules


# --- the configuration ---


STRANGE = {
    "target_modules": (1, "a list or a string"), "exclude_modules": (2.5, "a list or a string"),
    "layers_pattern": (True, "a list or a string"), "target_parameters": ("a", "a list"),
    "modules_to_save": ({}, "a list"), "layers_to_transform": ("3", "a list or a number"),
    "rank_pattern": ([1], "an object"), "alpha_pattern": ("b", "an object"), "lora_parameters": (4, "an object"),
}  # fmt: skip


LISTS = {"target_modules": ["q_proj", 1, 2], "layers_to_transform": [0, "1"], "target_parameters": ["a"]}
TYPES = [
    ({name: value for name, (value, _) in STRANGE.items()},
     [f"{name} is {value!r}, expected {kinds}" for name, (value, kinds) in STRANGE.items()]),
    (LISTS, ["target_modules has the entry 1", "layers_to_transform has the entry '1'"]),  # the first of each
]  # fmt: skip


@pytest.mark.parametrize(("settings", "told"), TYPES, ids=["values", "entries"])
def test_what_is_of_another_type_is_told(tmp_path, settings, told):
    report = audit(peft(tmp_path / "a", factors(Q), config(**settings)))
    assert [finding.text for finding in report.of("wrong") if finding.code == "config-type"] == told


def in_header(text, name="lora_adapter_metadata"):
    """A file with a text in its header."""

    def make(t):
        save_file(factors(Q), t / "a.safetensors", {name: text})
        return t / "a.safetensors"

    return make


def test_a_configuration_in_the_header_is_read(tmp_path):
    report = audit(in_header(json.dumps(config("q_proj", lora_alpha=6, rank_pattern=3)))(tmp_path))
    assert {module.scaling for module in report.adapter.modules.values()} == {3.0}
    assert report.adapter.config_path == tmp_path / "a.safetensors"
    assert [finding.text for finding in report.findings] == ["rank_pattern is 3, expected an object"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_header_without_a_configuration_has_none(tmp_path, text):
    report = audit(in_header(text)(tmp_path))
    assert report.adapter.config is None
    assert [finding.code for finding in report.findings] == ["config-missing"]


# --- the files ---


@pytest.mark.parametrize("write", [kohya, gguf])
def test_the_one_file_of_a_folder_is_read(tmp_path, write):
    write(tmp_path / ("a.gguf" if write is gguf else "a.safetensors"), Q)
    assert len(audit(tmp_path).adapter.modules) == len(Q)


def test_pefts_names_in_a_file_named_as_mlxs_are_pefts(tmp_path):
    folder = peft(tmp_path / "a", factors(Q), config("q_proj"))
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    assert audit(folder).adapter.format == "a PEFT folder"


def test_an_adapter_in_shards_is_read_whole(tmp_path):
    tensors = factors(Q)
    folder = peft(tmp_path / "a", {}, config("q_proj"))
    (folder / "adapter_model.safetensors").unlink()
    files = {name: f"adapter_model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in {*files.values()}:
        save_file({name: array for name, array in tensors.items() if files[name] == file}, folder / file)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    report = audit(folder)
    assert (report.word, len(report.adapter.modules)) == ("SOUND", len(Q))


@pytest.mark.parametrize("write", [peft, mlx, kohya, gguf])
def test_modules_stand_in_the_order_of_layers(tmp_path, write):
    modules, file = paths("q_proj", layers=(10, 2)), tmp_path / ("a.safetensors" if write is kohya else "a")
    made = peft(file, factors(modules), config("q_proj")) if write is peft else write(file, modules)
    assert ["2" in path for path in audit(made).adapter.modules] == [True, False]


@pytest.mark.parametrize(("layout", "grouped"), [("grouped_by_expert", True), ("rank_major", False), (None, False)])
def test_the_packing_of_experts_is_said_by_a_key(tmp_path, layout, grouped):
    tensors = expert_factors()
    report = audit(peft(tmp_path / "a", tensors, config(target_parameters=EXPERTS, lora_B_layout=layout)))
    for path, module in report.adapter.modules.items():
        inside = "base_layer." if "gate_up" in path else ""
        place = f"{PREFIX}{path.rpartition('.')[0]}.{inside}lora_"
        A, B = (tensors[f"{place}{part}.weight"].astype("f8") for part in "AB")
        of = [B[:, 2 * e : 2 * e + 2] if grouped else B[:, e::4] for e in range(4)]
        size = np.sqrt(sum(np.square(2 * of[e] @ A[2 * e : 2 * e + 2]).sum() for e in range(4)))
        assert (module.experts, module.grouped) == (4, grouped)
        assert report.numbers[path].norm == pytest.approx(size)
