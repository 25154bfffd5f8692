"""The real PEFT reads what we write, of every kind of layer and adapter, we read what it writes, and merges agree."""

import contextlib
import copy
import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import (
    Conv1d,
    Conv2d,
    Embedding,
    FileRefused,
    Linear,
    LoRA,
    adapt,
    adapters,
    attach,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from minilora.files.peft import CONFIG_KEYS, UNSET
from minilora.layer import rebuild

from ..support.disk import Killed, cut_at
from ..support.peers import PEERS, often, peft, torch

pytestmark = [*PEERS, pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")]

from safetensors.torch import load_file, save_file  # noqa: E402

MODULES = ["enc.fc", "enc.emb", "enc.seq", "img", "one", "fc"]


class Encoder(torch.nn.Module):
    def __init__(self, fc, emb, seq):
        super().__init__()
        self.fc, self.emb, self.seq = fc, emb, seq


class Model(torch.nn.Module):
    """A layer of each kind, a convolution of one entry, and a name that is the end of another; each layer's output."""

    def __init__(self, rng):
        super().__init__()
        size = [int(n) for n in rng.integers(1, 7, 12)]
        steps = {
            axes: {
                name: tuple(int(n) for n in rng.integers(low, high, axes))
                for name, low, high in (("stride", 1, 3), ("padding", 0, 3))  # PEFT's adapters know no dilation
            }
            for axes in (1, 2)
        }
        kernel = [int(n) for n in rng.integers(1, 4, 3)]
        torch.manual_seed(int(rng.integers(2**31)))
        nn = torch.nn
        seq = nn.Conv1d(size[4], size[5], kernel[0], **steps[1])
        self.enc = Encoder(nn.Linear(size[0], size[1]), nn.Embedding(size[2], size[3]), seq)
        self.img = nn.Conv2d(size[6], size[7], kernel[1:], bias=bool(rng.integers(2)), **steps[2])
        self.one = nn.Conv2d(size[8], size[9], 1)
        self.fc = nn.Linear(size[10], size[11])
        self.inputs = [
            torch.tensor(rng.standard_normal((5, size[0]))),
            torch.tensor(rng.integers(0, size[2], (3, 4))),
            torch.tensor(rng.standard_normal((2, size[4], 9))),
            torch.tensor(rng.standard_normal((2, size[6], 8, 7))),
            torch.tensor(rng.standard_normal((2, size[8], 3, 2))),
            torch.tensor(rng.standard_normal((5, size[10]))),
        ]
        self.double()

    def forward(self, inputs):
        return [self.get_submodule(name)(x) for name, x in zip(MODULES, inputs, strict=True)]


def our_layer(layer, dtype=None):
    """A torch layer as ours, with its own weights, or those in another type."""
    weight, bias = (None if p is None else p.detach().numpy() for p in (layer.weight, getattr(layer, "bias", None)))
    weight, bias = (None if p is None else p.astype(dtype or p.dtype) for p in (weight, bias))
    if isinstance(layer, torch.nn.Embedding):
        return Embedding(weight)
    if isinstance(layer, torch.nn.Linear):
        return Linear(weight, bias)
    cls = Conv1d if isinstance(layer, torch.nn.Conv1d) else Conv2d
    return cls(weight, bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


def our_outputs(model, found):
    outputs = []
    for module, x in zip(MODULES, model.inputs, strict=True):
        layer = our_layer(model.get_submodule(module))
        outputs.append((attach(layer, {"": found[module]}) if module in found else layer)(x.numpy()))
    return outputs


def assert_same(theirs, ours, tolerance=1e-12):
    for a, b in zip(theirs, ours, strict=True):
        a = a.detach().numpy()
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1, np.abs(a).max())


def move(adapter, rng):
    """Move every array, as if the adapter had been trained."""
    for array in adapter.trainable().values():
        array += (0.5 * rng.standard_normal(array.shape)).astype(array.dtype)
    return adapter


def loaded_by_peft(model, folder, found):
    """PEFT's model; to it the name "fc" means "enc.fc" too, which gets an adapter of zeros, and it says so."""
    with warnings.catch_warnings():
        more = "fc" in found and "enc.fc" not in found
        warnings.filterwarnings("ignore" if more else "error", message=".*(missing adapter keys|unexpected).*")
        return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def some_of(rng, names):
    return [str(name) for name in rng.permutation(names)[: int(rng.integers(1, len(names) + 1))]]


SEEDS = st.integers(0, 2**32 - 1)
TYPES = ["float64", "float32", "float16", "bfloat16"]


@given(SEEDS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(TYPES[:3]))
@example(0, True, True, True, "float64")
@example(1, False, True, True, "float64")
@often
def test_peft_loads_every_kind_of_ours(tmp_path_factory, seed, dora, rslora, pissa, dtype):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("ours")
    model, dtype = Model(rng), "float64" if pissa else dtype
    found, expected = {}, {}
    for module in some_of(rng, MODULES):
        layer = our_layer(model.get_submodule(module), "float32" if dtype == "float16" else dtype)  # none trains in it
        matrix = layer if isinstance(layer, Linear) else layer.as_linear()
        rank = int(rng.integers(1, 1 + (min(matrix.shape) if pissa else 4)))
        options = {"use_dora": dora, "use_rslora": rslora, "init": "pissa" if pissa else "lora"}
        one = adapt(layer, "", rank=rank, alpha=float(rng.choice([1, 2.5, 16])), rng=rng, **options)
        found[module] = move(rebuild(adapters(one)[""], array=lambda array: array.astype(dtype, copy=False)), rng)
        if dtype == "float64":
            expected[module] = one(model.inputs[MODULES.index(module)].numpy())
    save_adapter(folder, found)
    read = load_adapter(folder, dtype="float64")
    expected = expected or dict(zip(MODULES, our_outputs(model, read), strict=True))
    theirs = loaded_by_peft(model, folder, found)
    outputs = dict(zip(MODULES, theirs(model.inputs), strict=True))
    pairs = [(outputs[module], expected[module]) for module in found]
    assert_same(*zip(*pairs, strict=True), 1e-10 if pissa else 1e-12)
    config = theirs.peft_config["default"]
    assert (config.use_dora, config.use_rslora) == (dora, rslora)
    for module, adapter in read.items():
        assert theirs.base_model.model.get_submodule(module).scaling["default"] == adapter.scaling


TARGETS = [
    ["fc", "emb", "seq", "img", "one"], r"enc\..*|img", ["enc.emb", "img"], ["enc.fc", "one"], ["fc"], r".*(fc|seq)",
    "all-linear",
]  # fmt: skip
RANKS = [{}, {"emb": 3}, {"^img": 2, r"enc\.seq": 5}, {r".*e.*": 4}, {"^fc": 2}]
ALPHAS = [{}, {"emb": 3}, {"enc.seq": 7, "img": 2}, {r".*[cg]": 0.5}, {"enc.fc": 7}]


def drawn_config(rng, dora, rslora):
    def one_of(values):
        return values[int(rng.integers(len(values)))]

    return peft.LoraConfig(
        r=int(rng.integers(1, 5)),
        lora_alpha=float(rng.choice([1, 2.5, 16])),
        use_rslora=rslora,
        use_dora=dora,
        target_modules=one_of(TARGETS),
        rank_pattern=one_of(RANKS),
        alpha_pattern=one_of(ALPHAS),
        lora_dropout=float(rng.choice([0, 0.1])),
    )


def moved_peft(model, config, rng, dtype=torch.float64):
    """PEFT's model with its adapters as if trained, each number one of the given type."""
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            moved = p.data.double() + torch.tensor(0.5 * rng.standard_normal(tuple(p.shape)))
            p.data = moved.to(dtype).to(p.dtype)
    return theirs


@given(SEEDS, st.booleans(), st.booleans(), st.sampled_from([*TYPES, "float64", "float64"]))
@example(0, True, True, "float64")
@often
def test_we_load_every_kind_of_pefts_and_save_it_again(tmp_path_factory, seed, dora, rslora, dtype):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("theirs")
    model, stored = Model(rng), getattr(torch, dtype)
    theirs = moved_peft(model, drawn_config(rng, dora, rslora), rng, stored)
    starts = [False, "gaussian", True, "orthogonal"]
    theirs.peft_config["default"].init_lora_weights = starts[int(rng.integers(4))]
    state = {name: array.to(stored) for name, array in peft.get_peft_model_state_dict(theirs).items()}
    theirs.save_pretrained(folder / "theirs", state_dict=state)
    expected, found = theirs(model.inputs), load_adapter(folder / "theirs", dtype="float64")
    assert all((hasattr(a, "magnitude"), a.use_rslora) == (dora, rslora) for a in found.values())
    for module, adapter in found.items():
        layer = theirs.base_model.model.get_submodule(module)
        assert adapter.scaling == pytest.approx(layer.scaling["default"], rel=1e-15)
    base = theirs.unload()
    assert_same(expected, our_outputs(base, found))
    if dtype == "float64":
        again = load_adapter(folder / "theirs")
        assert {adapter.lora_A.dtype for adapter in again.values()} == {np.dtype("float64")}
        save_adapter(folder / "ours", again)
        one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
        assert one.keys() == two.keys()
        assert all(one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one)
        outputs = loaded_by_peft(base, folder / "ours", MODULES)(model.inputs)
        assert_same(expected, [y.detach().numpy() for y in outputs])


EPS = {"float64": 2**-52, "float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@given(
    seed=SEEDS,
    dtype=st.sampled_from(list(EPS)),
    dora=st.booleans(),
    rslora=st.booleans(),
)
@example(0, "float64", True, True)
@example(0, "bfloat16", True, False)
@often
def test_merges_equal_pefts_merge_and_unload(tmp_path_factory, seed, dtype, dora, rslora):
    """PEFT merges in the wide type too where the adapter has it, as from_pretrained gives it: float32 for halves."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("merge")
    model = Model(rng).to(getattr(torch, dtype))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    before = load_file(folder / "base.safetensors")
    theirs = moved_peft(model, drawn_config(rng, dora, rslora), rng)
    theirs.save_pretrained(folder / "adapter")
    base = theirs.unload()
    again = peft.PeftModel.from_pretrained(base, folder / "adapter")  # casts half factors to float32
    changes = merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    ours, merged = load_file(folder / "out.safetensors"), again.merge_and_unload().state_dict()
    assert ours.keys() == merged.keys() == before.keys()
    changed = {change.name for change in changes}
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (before[name].dtype, before[name].shape)
        if name not in changed:
            assert torch.equal(array, before[name])
            continue
        got, want = array.double(), merged[name].double()
        largest = max(1.0, float(want.abs().max()), float(before[name].double().abs().max()))
        assert (got - want).abs().max() <= 40 * EPS[dtype if dtype == "float64" else "float32"] * largest + (
            EPS[dtype] * largest
        )


# --- what is refused ------------------------------------------------------------------------------


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["fc"], **options)


def other(kind, **options):
    return getattr(peft, kind)(target_modules=["fc"], **options)


@pytest.mark.parametrize(
    ("layer", "config", "said"),
    [
        (torch.nn.Linear(6, 6), lora(lora_bias=True), "lora_bias"),
        (torch.nn.Linear(6, 6), lora(bias="all"), "bias"),
        (torch.nn.Linear(6, 6), lora(bias="lora_only"), "bias"),
        (torch.nn.Linear(6, 6), lora(modules_to_save=["head"]), "modules_to_save"),
        (torch.nn.Linear(6, 6), lora(init_lora_weights="pissa"), "init_lora_weights"),
        (torch.nn.Linear(6, 6), lora(init_lora_weights="olora"), "init_lora_weights"),
        (torch.nn.Conv2d(4, 6, 3, groups=2), lora(), r"has shape \[6, 1, 1, 1\], expected \[6, 2, 1, 1\]"),
        (torch.nn.Conv3d(2, 3, 3), lora(), "expected 2 axes, or 3 or 4 for a convolution"),
        (torch.nn.Linear(6, 6), other("LoHaConfig"), "peft_type"),
        (torch.nn.Linear(6, 6), other("IA3Config", feedforward_modules=[]), "peft_type"),
        (torch.nn.Linear(6, 6), other("AdaLoraConfig", total_step=10), "peft_type"),
        (torch.nn.Linear(6, 6), other("VeraConfig"), "peft_type"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, layer, config, said):
    model = torch.nn.ModuleDict({"fc": copy.deepcopy(layer), "head": torch.nn.Linear(6, 6)})
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    with pytest.raises(FileRefused, match=said):
        load_adapter(tmp_path)


def test_what_a_killed_save_leaves_is_no_adapter_to_peft(tmp_path):
    """With the old factors, and with the new ones; before and after, it is one."""
    rng, taken = np.random.default_rng(0), []
    for at in range(1, 10):
        folder = tmp_path / str(at)
        save_adapter(folder, {"fc": LoRA.init(6, 5, rank=2, alpha=3, rng=rng)})
        with cut_at(at) as calls, contextlib.suppress(Killed):
            save_adapter(folder, {"fc": LoRA.init(6, 5, rank=4, alpha=3, rng=rng)}, overwrite=True)
        try:
            model = peft.PeftModel.from_pretrained(torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 5)}), folder)
            config = model.peft_config["default"]
            assert model.base_model.model.fc.lora_A["default"].weight.shape == (config.r, 6)
            taken.append(config.r)
        except ValueError as error:
            assert "Can't find 'adapter_config.json'" in str(error)  # noqa: PT017  # of the others it takes both
            taken.append(None)
        if len(calls) < at:
            break
    assert [*dict.fromkeys(taken)] == [2, None, 4]


def test_every_key_of_pefts_configuration_has_its_default():
    defaults = {field.name: getattr(peft.LoraConfig(), field.name) for field in dataclasses.fields(peft.LoraConfig)}
    assert defaults.keys() <= CONFIG_KEYS.keys() | {"peft_type"}
    for key, value in defaults.items():
        entry = CONFIG_KEYS[key]
        if entry["x-changes-numbers"] and key not in ("peft_type", "peft_version"):
            assert value == entry.get("default", value if value in UNSET else "missing"), key
