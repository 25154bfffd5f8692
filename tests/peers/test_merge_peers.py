"""Merging on the disk gives what PEFT's merge_and_unload gives in memory, to one unit in the last place."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import merge_adapter

from ..support.peers import PEERS, peft, torch

pytestmark = PEERS

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

drawn = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def unit_in_the_last_place(tensor):
    """Return the distance to the next number of the tensor's own type."""
    mantissa = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[tensor.dtype]
    least = torch.finfo(tensor.dtype).smallest_normal
    return torch.exp2(torch.floor(torch.log2(tensor.abs().double().clamp(min=least))) - mantissa)


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    adapter_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    conv1d=st.booleans(),
)
@drawn
def test_a_merge_equals_peft_s_merge_and_unload(tmp_path_factory, seed, dtype, adapter_dtype, conv1d):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("merge")
    torch.manual_seed(seed % 2**31)
    n_in, n_out = (int(n) for n in rng.integers(1, 40, 2))
    layer = Conv1D(n_out, n_in) if conv1d else torch.nn.Linear(n_in, n_out)
    model = torch.nn.ModuleDict({"fc": layer, "head": torch.nn.Linear(n_out, 3)})
    model.forward = lambda x: x
    model = model.to(getattr(torch, dtype))
    save_file(model.state_dict(), folder / "base.safetensors", {"format": "pt"})
    base = load_file(folder / "base.safetensors")
    config = peft.LoraConfig(
        r=int(rng.integers(1, 9)),
        lora_alpha=float(rng.choice([1, 2.5, 16])),
        use_rslora=bool(rng.integers(2)),
        target_modules=["fc"],
        fan_in_fan_out=conv1d,
    )
    theirs = peft.get_peft_model(model, config)
    adapter_type = getattr(torch, adapter_dtype)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = (torch.randn(p.shape, dtype=torch.float64) * 0.3).to(adapter_type).to(p.dtype)
    state = {k: v.to(adapter_type) for k, v in peft.get_peft_model_state_dict(theirs).items()}
    theirs.save_pretrained(folder / "adapter", state_dict=state)

    merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    ours, merged = load_file(folder / "out.safetensors"), theirs.merge_and_unload().state_dict()
    assert ours.keys() == merged.keys() == base.keys()
    for name in base:
        assert ours[name].dtype == merged[name].dtype == base[name].dtype
        if name != "fc.weight":
            assert torch.equal(ours[name], base[name])
    # A sum is as exact as its largest terms: where they cancel, less is left than they had.
    A, B = (state[f"base_model.model.fc.lora_{factor}.weight"].double().abs() for factor in "AB")
    terms = B @ A * config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    size = base["fc.weight"].double().abs() + (terms.T if conv1d else terms)
    got, want = ours["fc.weight"], merged["fc.weight"]
    if dtype in ("float16", "bfloat16"):
        allowed = unit_in_the_last_place(size.to(want.dtype))
    else:  # in small matrices torch sums r products in another order than NumPy, each rounded to this very type
        allowed = (config.r + 2) * torch.finfo(want.dtype).eps * size
    assert ((got.double() - want.double()).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_usual_merge_equals_that_of_peft_to_one_unit(tmp_path, dtype, conv1d):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"fc": Conv1D(256, 320) if conv1d else torch.nn.Linear(320, 256)})
    model.forward = lambda x: x
    model = model.to(getattr(torch, dtype))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    options = {"target_modules": ["fc"], "init_lora_weights": False, "fan_in_fan_out": conv1d}
    config = peft.LoraConfig(r=16, lora_alpha=32, **options)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    ours, merged = load_file(tmp_path / "out.safetensors"), theirs.merge_and_unload().state_dict()
    got, want, start = (tensors["fc.weight"] for tensors in (ours, merged, load_file(tmp_path / "base.safetensors")))
    size = torch.maximum(torch.maximum(start.abs(), (want - start).abs()), want.abs())
    assert ((got.double() - want.double()).abs() <= unit_in_the_last_place(size)).all()


def test_the_unit_in_the_last_place_is_numpy_s_spacing():
    numbers = torch.randn(1000, dtype=torch.float64)
    for kind in (torch.float16, torch.float32, torch.float64):
        rounded = numbers.to(kind)
        np.testing.assert_array_equal(unit_in_the_last_place(rounded), np.spacing(rounded.abs().numpy()).astype(float))


def tiny_transformer(kind, head):
    """A transformer of a few thousand weights, its layout that of the real ones, and no download."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

    torch.manual_seed(0)
    if kind == "gpt2":  # Conv1D, weights stored (in, out)
        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
        return (GPT2LMHeadModel if head else GPT2Model)(config)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    return (LlamaForCausalLM if head else LlamaModel)(LlamaConfig(vocab_size=50, max_position_embeddings=16, **sizes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("gpt2", True, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("gpt2", False, {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
        ("llama", True, {"target_modules": "all-linear", "rank_pattern": {"down_proj": 3, r"layers\.1\..*q_proj": 5}}),
        ("llama", True, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
        ("llama", True, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]}),
        ("llama", False, {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj", "alpha_pattern": {"up_proj": 3.5}}),
    ],
)
def test_a_sharded_transformer_is_merged_as_peft_does(tmp_path, kind, head, options, dtype):
    model = tiny_transformer(kind, head).to(getattr(torch, dtype))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **options))
    theirs.save_pretrained(tmp_path / "adapter")
    changes = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = theirs.merge_and_unload().state_dict()
    shards = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        shards |= load_file(file)
    changed = {change.name for change in changes}
    assert changed
    for name, ours in shards.items():
        want, before = merged[name], start[name]
        assert torch.equal(want, before) == (name not in changed)
        size = torch.maximum(torch.maximum(before.abs(), (want - before).abs()), want.abs())
        assert ((ours.double() - want.double()).abs() <= unit_in_the_last_place(size)).all()
