"""Merging on the disk gives what PEFT's merge_and_unload gives in memory, and transformers computes with it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Llama, load_adapter, merge_adapter
from minilora.cli import main

from ..support.peers import PEERS, load_file, often, peft, save_file, torch, transformers
from ..support.tiny_peers import tuned

pytestmark = PEERS
tokenizers = pytest.importorskip("tokenizers")


def unit_in_the_last_place(tensor):
    """Return the distance to the next number of the tensor's own type."""
    mantissa = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}[tensor.dtype]
    least = torch.finfo(tensor.dtype).smallest_normal
    return torch.exp2(torch.floor(torch.log2(tensor.abs().double().clamp(min=least))) - mantissa)


def test_the_unit_in_the_last_place_is_numpys_spacing():
    numbers = torch.randn(1000, dtype=torch.float64)
    for kind in (torch.float16, torch.float32, torch.float64):
        rounded = numbers.to(kind)
        np.testing.assert_array_equal(unit_in_the_last_place(rounded), np.spacing(rounded.abs().numpy()).astype(float))


def within_one_unit(ours, theirs, before):
    """Whether two sums differ by one unit at most, where the largest of base, change and sum has its last place."""
    size = torch.maximum(torch.maximum(before.abs(), (theirs - before).abs()), theirs.abs())
    return ((ours.double() - theirs.double()).abs() <= unit_in_the_last_place(size)).all()


def of_one_layer(n_in, n_out, conv1d, dtype):
    """A model with a layer to adapt, of which Conv1D has its weight as (in, out), and one beside."""
    layer = transformers.pytorch_utils.Conv1D(n_out, n_in) if conv1d else torch.nn.Linear(n_in, n_out)
    model = torch.nn.ModuleDict({"fc": layer, "head": torch.nn.Linear(n_out, 3)})
    model.forward = lambda x: x
    return model.to(getattr(torch, dtype))


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    adapter_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    conv1d=st.booleans(),
)
@often
def test_a_merge_equals_pefts_merge_and_unload(tmp_path_factory, seed, dtype, adapter_dtype, conv1d):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("merge")
    torch.manual_seed(seed % 2**31)
    n_in, n_out = (int(n) for n in rng.integers(1, 40, 2))
    model = of_one_layer(n_in, n_out, conv1d, dtype)
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
    model = of_one_layer(320, 256, conv1d, dtype)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    options = {"target_modules": ["fc"], "init_lora_weights": False, "fan_in_fan_out": conv1d}
    config = peft.LoraConfig(r=16, lora_alpha=32, **options)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    ours, merged = load_file(tmp_path / "out.safetensors"), theirs.merge_and_unload().state_dict()
    before = load_file(tmp_path / "base.safetensors")
    assert within_one_unit(*(tensors["fc.weight"] for tensors in (ours, merged, before)))


# --- folders of models ----------------------------------------------------------------------------

SIZES = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
OF_GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 16}
KINDS = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "headless llama": transformers.LlamaModel,
    "headless gpt2": transformers.GPT2Model,
}
LLAMAS = ["llama", "mistral", "qwen2"]
ADAPTERS = {
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"q_proj": 9},
    },
    "rsLoRA": {"target_modules": ["v_proj", "down_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["o_proj", "gate_proj"], "use_dora": True},
}
PATTERN = {"down_proj": 3, r"layers\.1\..*q_proj": 5}
EXPRESSION = r".*layers\.[02]\.mlp\.(up|down)_proj"
OTHERS = [
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    ("headless gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": PATTERN}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]}),
    ("headless llama", {"target_modules": EXPRESSION, "alpha_pattern": {"up_proj": 3.5}}),
]
MERGES = [*((kind, options) for kind in LLAMAS for options in ADAPTERS.values()), *OTHERS]
BASES = [("float32", "1GB"), ("float32", "20KB"), ("float16", "20KB"), ("bfloat16", "20KB")]
"""The types of bases, and the most that one of their shards holds."""
ROUNDED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
"""How far rounded weights put the logits from those of the adapter beside its base."""
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
IDS = np.random.default_rng(0).integers(0, 40, (2, 12))


def base_of(kind, dtype="float32", **changes):
    torch.manual_seed(1)
    cls = KINDS[kind]
    model = cls(cls.config_class(**(OF_GPT2 if "gpt2" in kind else SIZES) | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 1.0)
    return model.to(getattr(torch, dtype)).eval()


def saved(folder, model, shard="1GB"):
    """The model's folder as transformers writes it, with a tokenizer and its chat template."""
    model.save_pretrained(folder, max_shard_size=shard)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    transformers.GenerationConfig(max_new_tokens=7).save_pretrained(folder)
    return folder


def outputs(model):
    """The logits, or what a model without a head ends with."""
    with torch.no_grad():
        return model(torch.tensor(IDS), use_cache=False)[0].float().numpy()


def loaded(kind, folder):
    return KINDS[kind].from_pretrained(folder, dtype="auto").eval()


def with_adapter(kind, base, folder, **options):
    return tuned(loaded(kind, base), folder, size=0.2, task_type=None, **options)


@pytest.mark.parametrize(("dtype", "shard"), BASES)
@pytest.mark.parametrize(("kind", "options"), MERGES, ids=str)
def test_a_merged_folder_is_what_merge_and_unload_gives(tmp_path, kind, options, shard, dtype):
    base = saved(tmp_path / "base", base_of(kind, dtype), shard)
    before = {name: weight.clone() for name, weight in loaded(kind, base).state_dict().items()}
    theirs = with_adapter(kind, base, tmp_path / "adapter", **options)
    changed = {change.name for change in merge_adapter(base, tmp_path / "adapter", tmp_path / "out")}
    assert changed
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))
    merged = loaded(kind, tmp_path / "out")
    assert merged.dtype == getattr(torch, dtype)
    beside, unloaded = outputs(theirs), theirs.merge_and_unload()
    expected = unloaded.state_dict()
    for name, ours in merged.state_dict().items():
        want, start = expected[name], before[name]
        assert torch.equal(want, start) == (name not in changed)
        if options.get("use_dora"):  # half types: at most one rounding of a sum apart
            eps = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, want, rtol=2 * eps, atol=2 * eps)
        else:
            assert within_one_unit(ours, want, start)
    found, size = outputs(merged.float()), np.abs(beside).max()
    np.testing.assert_allclose(found, outputs(unloaded.float()), rtol=0, atol=1e-4 * size)
    np.testing.assert_allclose(found, beside, rtol=0, atol=ROUNDED[dtype] * size)
    if kind in LLAMAS:
        np.testing.assert_allclose(Llama.load(tmp_path / "out")(IDS), found, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    ],
)
def test_an_embedding_is_merged_as_by_peft(tmp_path, kind, options, dora):
    """GPT-2's Conv1D is stored (in, out); of Llama's embedding PEFT saves the base's weight beside the factors."""
    base = saved(tmp_path / "base", base_of(kind))
    theirs = with_adapter(kind, base, tmp_path / "adapter", use_dora=dora, **options)
    if kind == "llama":
        with pytest.warns(UserWarning, match="base weight of 'lm_head'"):
            load_adapter(tmp_path / "adapter")
    changes = merge_adapter(base, tmp_path / "adapter", tmp_path / "out.safetensors")
    assert len(changes) == {"gpt2": 1 + OF_GPT2["n_layer"], "llama": 2 + SIZES["num_hidden_layers"]}[kind]
    merged = theirs.merge_and_unload().state_dict()
    for name, array in load_file(tmp_path / "out.safetensors").items():
        assert torch.allclose(array, merged[name], rtol=1e-5, atol=1e-6), name


def assert_close(model, other):
    expected = outputs(other)
    np.testing.assert_allclose(outputs(model), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("shard", ["1GB", "6KB"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", LLAMAS)
def test_a_tied_base_is_untied_as_peft_advises(tmp_path, kind, targets, shard):
    """Beside the base the adapter changes one of the two; merge_and_unload of an untied copy does too."""
    base = saved(tmp_path / "base", base_of(kind, tie_word_embeddings=True), shard)
    theirs = with_adapter(kind, base, tmp_path / "adapter", target_modules=targets)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(kind, tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    assert_close(merged, theirs)
    copy = transformers.AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    copy.lm_head.weight.data = copy.model.embed_tokens.weight.data.clone()
    again = peft.PeftModel.from_pretrained(copy.eval(), tmp_path / "adapter").merge_and_unload()
    assert_close(merged, again)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (shard != "1GB")
    if index.exists():
        theirs_index = saved(tmp_path / "theirs", again, shard) / index.name
        total = json.loads(theirs_index.read_text())["metadata"]
        assert json.loads(index.read_text())["metadata"] == total


def test_the_tokenizer_and_the_generation_go_with_it(tmp_path):
    base = saved(tmp_path / "base", base_of("llama"))
    with_adapter("llama", base, tmp_path / "adapter", target_modules=["q_proj"])
    assert main(["merge", str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>a b"
    assert tokenizer("a b")["input_ids"] == [1, 2]
    assert loaded("llama", tmp_path / "out").generation_config.max_new_tokens == 7
