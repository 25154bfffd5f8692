"""Adapters of a mixture's arrays as files: names that nest, what is packed otherwise is refused."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import LoRA, adapt, adapters, attach, load_adapter, save_adapter
from minilora.files.expert_adapters import layer_paths
from minilora.files.inspection import inspect_adapter
from minilora.layers.experts import Experts
from minilora.layers.mixture import MixtureOfExperts
from minilora.layers.router import Router
from minilora.layers.stacked import StackedLinear
from minilora.texts import FileRefused
from minilora.variants.stackedlora import StackedLoRA

from ..support.adapter_folder import CONFIG, WEIGHTS, change_json
from ..support.compare import refused

E, R = 4, 3
NAMES = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]


def mixture(d=6, m=5):
    rng = np.random.default_rng(0)
    router, gate_up, down = (StackedLinear(rng.standard_normal(s)) for s in ((E, d), (E, 2 * m, d), (E, d, m)))
    return MixtureOfExperts(Router(router, 2), Experts(gate_up, down))


def trained(base, names=NAMES, **options):
    rng = np.random.default_rng(1)
    model = adapt(base, [], rank=R, alpha=5, rng=rng, target_parameters=names, **options)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    return model


def rewritten(folder, change=None, **config):
    """Write the folder's files again as another program might have: tensors changed, and keys of the configuration."""
    change_json(folder / CONFIG, **config)
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors) if change else tensors, folder / WEIGHTS)


def same(folder, model):
    """Whether what is read has the same factors as the model's adapters."""
    expected, found = adapters(model), load_adapter(folder)
    assert found.keys() == expected.keys()
    for path, adapter in found.items():
        assert (adapter.alpha, adapter.experts) == (expected[path].alpha, expected[path].experts)
        assert np.isclose(adapter.scaling, expected[path].scaling)
        np.testing.assert_array_equal(adapter.lora_A, expected[path].lora_A)
        np.testing.assert_array_equal(adapter.lora_B, expected[path].lora_B)


def turned(tensors):
    """The factors as versions up to 0.19.0 have them: A (E r, out), B (in, r E)."""
    other = dict(tensors)
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        A_e = A.reshape(E, R, -1)  # (E, r, in)
        B_e = B.reshape(len(B), R, E).transpose(2, 0, 1)  # (E, out, r)
        other[key] = np.ascontiguousarray(B_e.swapaxes(1, 2).reshape(E * R, -1))
        other[key.replace("lora_A", "lora_B")] = np.ascontiguousarray(A_e.transpose(2, 1, 0).reshape(A.shape[1], -1))
    return other


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[1::-1]])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_saved_is_loaded(tmp_path, names, rslora):
    model = trained(mixture(), names, use_rslora=rslora)
    save_adapter(tmp_path, adapters(model))
    same(tmp_path, model)
    x = np.random.default_rng(2).standard_normal((7, 6))
    assert (attach(mixture(), load_adapter(tmp_path))(x) == model(x)).all()


def test_keys_nest_in_the_order_of_the_module(tmp_path):
    save_adapter(tmp_path, adapters(trained(mixture())))
    shapes = {key: array.shape for key, array in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.gate.lora_A.weight": (3, 6),
        "base_model.model.gate.lora_B.weight": (4, 3),
        "base_model.model.experts.base_layer.lora_A.weight": (12, 6),
        "base_model.model.experts.base_layer.lora_B.weight": (10, 12),
        "base_model.model.experts.lora_A.weight": (12, 5),
        "base_model.model.experts.lora_B.weight": (6, 12),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert sorted(config["target_parameters"]) == sorted(NAMES)
    assert (config["r"], config["lora_alpha"], config["peft_version"]) == (R, 5, "0.19.1")
    save_adapter(tmp_path, adapters(trained(mixture(), NAMES[1:2])), overwrite=True)
    assert "base_model.model.experts.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_arrays_named_without_their_module_are_those_of_the_experts(tmp_path):
    model = trained(mixture())
    save_adapter(tmp_path, adapters(model))
    rewritten(tmp_path, target_parameters=["down_proj", "gate.weight", "gate_up_proj"])
    same(tmp_path, model)


def test_places_do_not_depend_on_the_order_of_names():
    for paths in (["a.down_proj", "a.gate_up_proj", "b.w"], ["b.w", "a.gate_up_proj", "a.down_proj"]):
        assert layer_paths(paths) == {"a.down_proj": "a", "a.gate_up_proj": "a.base_layer", "b.w": "b"}


def test_other_ranks_and_alphas_are_exceptions_by_path(tmp_path):
    rng = np.random.default_rng(3)
    found = adapters(trained(mixture(), NAMES[:2]))
    A, B = rng.standard_normal((E * 2, 5)), rng.standard_normal((6, 2 * E))
    found["experts.down_proj"] = StackedLoRA(A, B, 7.0, experts=E)
    found["up_proj"] = LoRA(rng.standard_normal((4, 6)), rng.standard_normal((5, 4)), 5.0)
    save_adapter(tmp_path, found)
    again = load_adapter(tmp_path)
    assert {path: (a.rank, a.alpha) for path, a in again.items()} == {
        "experts.gate_up_proj": (R, 5),
        "experts.down_proj": (2, 7),
        "up_proj": (4, 5),
    }
    np.testing.assert_array_equal(again["experts.down_proj"].delta(), found["experts.down_proj"].delta())


EXCHANGED = (
    ": the factors of {!r} are exchanged, as PEFT packed them up to 0.19.0, which is not supported. Merge the adapter "
    "with the version of PEFT that wrote it, or train it again"
)
NOBODY_KNOWS = (
    ", and nothing else shows which factor of {!r} reads the input: PEFT exchanged the two after 0.19.0. Add "
    '"peft_version": "0.19.1" if lora_A is as wide as the input; if it is as wide as the output, merge the '
    "adapter with the version of PEFT that wrote it, or train it again"
)
NEWER = ", but the shapes of gate_up_proj's and down_proj's factors are those of versions up to 0.19.0"
DOWN = EXCHANGED.format("experts.down_proj")
UNDECIDED = [({"d": 10, "m": 5}, NAMES[:1]), ({"d": 6, "m": 6}, NAMES[1:2]), ({"d": 6, "m": 5}, NAMES[:1])]
VERSIONS = [  # the mixture's sizes, the adapted arrays, what is done to the factors, peft_version; what is said of it
    *(({}, NAMES, None, version, None) for version in ("0.19.1", "0.20.0", "0.21.2", "1.0.0")),
    *((sizes, NAMES[:2], None, "absent", None) for sizes in ({"d": 6, "m": 5}, {"d": 6, "m": 6})),  # the shapes decide
    *(({}, NAMES[:2], turned, version, DOWN) for version in ("0.18.1", "0.19.0", "absent")),
    ({}, NAMES[:2], None, "0.19.0", DOWN),
    ({}, NAMES[:2], turned, "0.21.2", NEWER),
    ({}, NAMES[2:], None, "0.19.0", EXCHANGED.format("gate.weight")),
    ({}, NAMES[2:], None, "absent", NOBODY_KNOWS.format("gate.weight")),
    *(
        (*one, None, version, NOBODY_KNOWS.format(*one[1]))
        for one in UNDECIDED
        for version in ("absent", "0.19.1.dev0", "0.19", "v0.19.1", "0.19.1rc1", "")
    ),
]


@pytest.mark.parametrize(("sizes", "names", "change", "version", "said"), VERSIONS)
def test_which_factor_reads_the_input_follows_from_the_version(tmp_path, sizes, names, change, version, said):
    """Or from the shapes of both arrays; older ones wrote the two exchanged."""
    model = trained(mixture(**sizes), names)
    save_adapter(tmp_path, adapters(model))
    rewritten(tmp_path, change, peft_version=version)
    if said is None:
        same(tmp_path, model)
    else:
        version = "there is no peft_version" if version == "absent" else f"peft_version is {version!r}"
        with pytest.raises(FileRefused, match=f": {re.escape(version + said)}$"):
            load_adapter(tmp_path)


@pytest.mark.parametrize("layout", ["grouped_by_expert", "by_moonlight"])
def test_another_layout_of_b_is_refused(tmp_path, layout):
    model = trained(mixture(), NAMES[:2])
    save_adapter(tmp_path, adapters(model))
    rewritten(tmp_path, lora_B_layout="rank_major")
    same(tmp_path, model)
    rewritten(tmp_path, lora_B_layout=layout)
    said = (
        f"lora_B_layout is '{layout}': only PEFT's packing is supported, with the expert as lora_B's fast index: "
        "move lora_B's columns from e r + k to k E + e"
    )
    with pytest.raises(FileRefused, match=f": {re.escape(said)}$"):
        load_adapter(tmp_path)


PAIRS = "there are 2 pairs of factors for arrays of 'experts', but target_parameters names {} there"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_parameters": ["experts.down_proj"]}, PAIRS.format(["down_proj"])),
        ({"target_parameters": ["other.w"]}, PAIRS.format([])),
        ({"target_parameters": ["experts.up", "experts.down"]},
         "target_parameters names ['down', 'up'] of 'experts': their order is unknown"),
        ({"target_parameters": "experts.down_proj"}, "Expected `array`, got `str` - at `$.target_parameters`"),
        ({"target_parameters": [1]}, "Expected `str`, got `int` - at `$.target_parameters[0]`"),
        ({"target_parameters": []}, "target_modules is [], expected names or a regular expression"),
        ({"r": 5},
         "'base_model.model.experts.lora_A.weight' has shape [12, 5], expected rows in a multiple of the rank "
         "5"),
        ({"use_dora": True}, "use_dora is True for all modules, but 'experts' has no lora_magnitude_vector"),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, config, message):
    save_adapter(tmp_path, adapters(trained(mixture(), NAMES[:2])))
    rewritten(tmp_path, **config)
    with pytest.raises(FileRefused, match=f": {re.escape(message)}$"):
        load_adapter(tmp_path)


def test_of_the_number_of_experts_the_model_decides(tmp_path):
    """Of twelve rows, six experts of rank 2 are as good."""
    save_adapter(tmp_path, adapters(trained(mixture(), NAMES[:2])))
    rewritten(tmp_path, r=2)
    with pytest.raises(ValueError, match=r"adapter is of 6 experts, and base has 4$"):
        attach(mixture(), load_adapter(tmp_path))


def test_two_adapters_of_one_key_are_not_written(tmp_path):
    found = adapters(trained(mixture(), NAMES[2:])) | {"gate": LoRA(np.ones((1, 6)), np.ones((4, 1)), 1)}
    key = "base_model.model.gate.lora_A.weight"
    with refused(f"layers['gate'] and another layer have the same key, {key!r}", ValueError):
        save_adapter(tmp_path / "new", found)
    assert not (tmp_path / "new").exists()


def test_inspecting_shows_all_experts_changes(tmp_path):
    model = trained(mixture(), NAMES[1:2])
    save_adapter(tmp_path, adapters(model))
    (summary,) = inspect_adapter(tmp_path)
    delta = adapters(model)["experts.down_proj"].delta()
    assert (summary.path, summary.module.rank, str(summary.module.form)) == ("experts.down_proj", R, "4 experts")
    assert summary.module.shape == (6, 5)
    assert np.isclose(summary.norm, np.linalg.norm(delta))
    values = np.linalg.svd(delta, compute_uv=False)[:, :R].ravel()
    np.testing.assert_allclose(summary.singular_values, -np.sort(-values), rtol=1e-10)


def test_dora_of_an_array_is_refused(tmp_path):
    """PEFT has no such thing, and the magnitude would be lost."""
    save_adapter(tmp_path, adapters(trained(mixture(), NAMES[1:2])))
    magnitude = {"base_model.model.experts.lora_magnitude_vector": np.ones(6)}
    rewritten(tmp_path, lambda tensors: tensors | magnitude, use_dora=True)
    said = "use_dora is True, but target_parameters has adapters: PEFT refuses both"
    with refused(f"'{tmp_path / CONFIG}': {said}"):
        load_adapter(tmp_path)


def test_dropout_of_an_array_is_refused(tmp_path):
    """It is when saved, and in a file; PEFT loads no such adapter."""
    saved = adapters(trained(mixture(), NAMES[1:2]))
    said = "lora_dropout is 0.1, but '.*' is a mixture's array: expected 0, as in PEFT"
    with pytest.raises(ValueError, match=said):
        save_adapter(tmp_path, saved, lora_dropout=0.1)
    save_adapter(tmp_path, saved)
    for dropout in (0, 0.0, None, 0.1):
        rewritten(tmp_path, lambda tensors: tensors, lora_dropout=dropout)
        if not dropout:
            assert load_adapter(tmp_path).keys() == saved.keys()
    said = "lora_dropout is 0.1, but target_parameters has adapters: PEFT refuses both"
    with refused(f"'{tmp_path / CONFIG}': {said}"):
        load_adapter(tmp_path)
