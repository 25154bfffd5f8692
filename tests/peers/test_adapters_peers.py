"""The real PEFT reads what we write, and we read what it writes."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import FileRefused, Linear, LoRA, LoRALinear, load_adapter, save_adapter
from minilora.files.peft import KEYS, UNSET

from ..support.peers import PEERS, peft, torch

pytestmark = [*PEERS, pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")]

drawn = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


class Encoder(torch.nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(*widths[:2]), torch.nn.Linear(*widths[:2], bias=False)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(*widths[1:3]), torch.nn.Linear(*widths[1:3])])


class Model(torch.nn.Module):
    """A base with names that are ends of one another; its forward returns each layer's output."""

    def __init__(self, widths):
        super().__init__()
        self.enc, self.q_proj = Encoder(widths), torch.nn.Linear(*widths[2:])

    def forward(self, x, h, z):
        enc = self.enc
        return [enc.q_proj(x), enc.k_proj(x), enc.layers[0](h), enc.layers[1](h), self.q_proj(z)]


MODULES = ["enc.q_proj", "enc.k_proj", "enc.layers.0", "enc.layers.1", "q_proj"]


def draw_model(rng):
    widths = [int(n) for n in rng.integers(1, 9, 4)]
    torch.manual_seed(int(rng.integers(2**31)))
    model = Model(widths).double()
    inputs = [torch.tensor(rng.standard_normal((5, w))) for w in widths[:3]]
    return model, inputs


def our_outputs(model, adapters, inputs):
    """Put the adapters on the torch base's own weights, and run them through NumPy."""
    outputs = []
    for module, x in zip(MODULES, [inputs[0], inputs[0], inputs[1], inputs[1], inputs[2]], strict=True):
        layer = model.get_submodule(module)
        bias = None if layer.bias is None else layer.bias.detach().numpy()
        base = Linear(layer.weight.detach().numpy(), bias)
        full = LoRALinear(base, adapters[module]) if module in adapters else base
        outputs.append(full(x.numpy()))
    return outputs


def assert_same(theirs, ours):
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(b, a.detach().numpy(), rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "float32", "float64"]))
@drawn
def test_peft_loads_ours(tmp_path_factory, seed, dtype):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("ours")
    model, inputs = draw_model(rng)
    layers = {}
    for module in rng.permutation(MODULES)[: int(rng.integers(1, 6))]:
        layer = model.get_submodule(module)
        r = int(rng.integers(1, 5))
        A, B = rng.standard_normal((r, layer.in_features)), rng.standard_normal((layer.out_features, r))
        layers[str(module)] = LoRA(A.astype(dtype), B.astype(dtype), float(rng.choice([1, 2.5, 16])))
    save_adapter(folder, layers)
    ours = our_outputs(model, load_adapter(folder, dtype="float64"), inputs)
    with warnings.catch_warnings():
        # "q_proj" alone also names "enc.q_proj" for PEFT, which gives it an adapter of zeros and says so.
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    assert_same(theirs(*inputs), ours)
    for module, layer in layers.items():
        assert theirs.base_model.model.get_submodule(module).scaling["default"] == layer.scaling


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]))
@drawn
def test_we_load_peft_s(tmp_path_factory, seed, dtype):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("theirs")
    model, inputs = draw_model(rng)
    targets = [
        ["q_proj"],
        ["enc.q_proj", "k_proj"],
        ["0", "1", "k_proj"],
        r"enc\.layers\.\d",
        r".*(q|k)_proj",
        "all-linear",
    ][int(rng.integers(6))]
    config = peft.LoraConfig(
        r=int(rng.integers(1, 5)),
        lora_alpha=float(rng.choice([1, 2.5, 16])),
        use_rslora=bool(rng.integers(2)),
        target_modules=targets,
        rank_pattern=[{}, {"q_proj": 3}, {"^q_proj": 2, r"layers\.0": 5}, {r".*proj": 4}][int(rng.integers(4))],
        alpha_pattern=[{}, {"q_proj": 3}, {"enc.q_proj": 7}, {r"layers\.[01]": 0.5}][int(rng.integers(4))],
        init_lora_weights=[False, "gaussian", True, "orthogonal"][int(rng.integers(3))],
        lora_dropout=float(rng.choice([0, 0.1])),
    )
    theirs = peft.get_peft_model(model, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            rounded = torch.tensor(rng.standard_normal(tuple(p.shape))).to(getattr(torch, dtype))
            p.data = rounded.to(p.dtype)
    state = {k: v.to(getattr(torch, dtype)) for k, v in peft.get_peft_model_state_dict(theirs).items()}
    theirs.save_pretrained(folder, state_dict=state)
    adapters = load_adapter(folder, dtype="float64")
    base = theirs.unload()
    expected = our_outputs(base, adapters, inputs)
    again = peft.PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    assert_same(again(*inputs), expected)
    for module, lora in adapters.items():
        scaling = again.base_model.model.get_submodule(module).scaling["default"]
        assert math.isclose(lora.scaling, scaling, rel_tol=1e-15)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(tmp_path, options, named):
    model = Model([6, 6, 6, 6])
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"], **options)).save_pretrained(tmp_path)
    with pytest.raises(FileRefused, match=named):
        load_adapter(tmp_path)


def test_peft_s_convolutions_over_three_axes_are_refused_by_name(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(FileRefused, match="expected a matrix, or 3 or 4 axes of a convolution"):
        load_adapter(tmp_path)


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "AdaLoraConfig", "VeraConfig"])
def test_other_methods_of_peft_are_refused_by_peft_type(tmp_path, kind):
    options = {"IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 10}}.get(kind, {})
    config = getattr(peft, kind)(target_modules=["k_proj"], **options)
    peft.get_peft_model(Model([6, 6, 6, 6]), config).save_pretrained(tmp_path)
    with pytest.raises(FileRefused, match="peft_type"):
        load_adapter(tmp_path)


def test_every_key_of_pefts_configuration_has_its_default():
    defaults = {field.name: getattr(peft.LoraConfig(), field.name) for field in dataclasses.fields(peft.LoraConfig)}
    assert defaults.keys() <= KEYS.keys() | {"peft_type"}
    for key, value in defaults.items():
        entry = KEYS[key]
        if entry["x-changes-numbers"] and key not in ("peft_type", "peft_version"):
            assert value == entry.get("default", value if value in UNSET else "missing"), key
