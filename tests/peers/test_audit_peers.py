"""Adapters that PEFT wrote, and merges that it made, of every kind: audited, they are sound and right.

PEFT keeps adapters in float32 or, with autocast_adapter_dtype=False, in the base's type, and rounds a merge otherwise
in each.
"""

import contextlib
import copy
import io
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.audit.auditing import audit
from minilora.audit.contents import are_targets

from ..support.peers import LINEARS, load_file, peft, save_file, torch, transformers, write_gguf
from ..support.tiny_peers import ADAPTERS, QV, SIZES, llama, tuned

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[2]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def saved(folder, what, dtype=None):
    """An adapter of a kind, as PEFT saves it, and its base."""
    make, settings = ADAPTERS[what]
    torch.manual_seed(0)
    model, base = make(), folder / "m"
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(base)
    else:
        base = folder / "m.safetensors"
        save_file(model.state_dict(), base)
    tuned(model, folder / "a", dtype=dtype, **settings)
    return folder / "a", base


@pytest.mark.parametrize("what", ADAPTERS)
def test_what_peft_saves_is_sound(what, tmp_path):
    adapter, base = saved(tmp_path, what)
    report = audit(adapter, base, merge=True)
    assert report.status == 0, str(report)
    assert not report.landing.lost, str(report)
    assert audit(adapter).status == 0, str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_sound(dtype, tmp_path):
    assert audit(*saved(tmp_path, "all-linear", TYPES[dtype])).status == 0


def test_the_size_of_the_change_is_that_of_pefts_delta(tmp_path):
    adapter, base = saved(tmp_path, "rsLoRA")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    for path, numbers in audit(adapter, base).numbers.items():
        layer = model.base_model.model.get_submodule(path)
        assert np.isclose(numbers.norm, float(layer.get_delta_weight("default").norm()), rtol=1e-5)


def test_an_adapter_that_was_never_trained_is_suspicious(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "m")
    tuned(model, tmp_path / "a", size=0, target_modules=QV)
    report = audit(tmp_path / "a", tmp_path / "m")
    assert [finding.code for finding in report.of("suspicious")] == ["all-zero"]


# --- merges ---------------------------------------------------------------------------------------

MERGED = [
    "all-linear", "rsLoRA", "patterns", "DoRA", "DoRA of an embedding", "an embedding", "a head", "a tied embedding",
    "a tied head", "GPT-2", "GPT-2, DoRA", "biases of the adapted", "lora_bias", "the embedding saved too",
    "a classifier", "trained tokens", "experts", "experts of Qwen3", "experts stored the other way round", "ResNet",
    "ResNet, DoRA", "PiSSA, converted",
]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("what", MERGED)
def test_a_merge_of_pefts_is_right(tmp_path, what, dtype):
    make, settings = ADAPTERS[what]
    torch.manual_seed(0)
    model = make().to(TYPES[dtype])
    model.save_pretrained(tmp_path / "base")
    wide = model.float() if what.startswith("PiSSA") else model  # whose start PEFT computes in float32 alone
    tuned(copy.deepcopy(wide), tmp_path / "adapter", **settings)
    for i, options in enumerate([{}, {"autocast_adapter_dtype": False}]):
        base = type(model).from_pretrained(tmp_path / "base", dtype=TYPES[dtype])
        merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", **options)
        merged.merge_and_unload(safe_merge=i == 0).save_pretrained(tmp_path / f"merged{i}")
        report = audit(tmp_path / "adapter", tmp_path / "base", merged=tmp_path / f"merged{i}")
        assert (report.word, report.status) == ("RIGHT", 0), str(report)
        assert dtype in report.first_line
        assert audit(tmp_path / "adapter", tmp_path / "base", merged=tmp_path / "base").word == "WRONG"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0"])
def test_a_merge_into_what_a_gguf_file_holds_is_right(tmp_path, kind, dtype):
    torch.manual_seed(0)
    model = llama()
    tuned(copy.deepcopy(model), tmp_path / "adapter", target_modules=LINEARS)
    config = model.config
    config.head_dim = 8
    arrays = {name: array.numpy() for name, array in model.state_dict().items()}
    path = write_gguf(tmp_path / "base.gguf", config, arrays, kind)
    how = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": TYPES[dtype]}
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf", **how)
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert audit(tmp_path / "adapter", path, merged=tmp_path / "merged").word == "RIGHT"


@pytest.mark.parametrize("dtype", TYPES)
def test_a_merge_into_what_four_bits_hold_is_right(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = llama(hidden_size=64).to(TYPES[dtype])
    model.save_pretrained(tmp_path / "float")
    tuned(copy.deepcopy(model), tmp_path / "adapter", target_modules=LINEARS)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": TYPES[dtype]}
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    load = transformers.LlamaForCausalLM.from_pretrained
    quantized = load(tmp_path / "float", dtype=TYPES[dtype], quantization_config=how, device_map="cpu")
    quantized.save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", device_map="cpu").train().dequantize()
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert audit(tmp_path / "adapter", tmp_path / "base", merged=tmp_path / "merged").word == "RIGHT"
    report = audit(tmp_path / "adapter", tmp_path / "float", merged=tmp_path / "merged")
    assert any("into the base in NF4" in text for text in report.diagnoses), str(report)


def test_the_page_has_what_the_example_of_broken_merges_prints():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / "broken_merges.py"))["run"]()
    page = (ROOT / "docs" / "library" / "is-my-adapter-applied.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(# Merge with merge_and_unload.*?)^```$", page, re.MULTILINE | re.DOTALL)
    of_kernel = r"at most [\d.]+ ulp"  # the last bits of sums
    assert re.sub(of_kernel, "", printed.getvalue().strip()) == re.sub(of_kernel, "", block.strip())
    assert np.size(re.findall(r"exit code 1", block)) == 5


# --- the whole folder: a merge is right where transformers computes the same from it ---

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXTENDED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXTENDED |= {"original_max_position_embeddings": 16}


def named(one, other):
    return lambda arrays: {re.sub(one, other, name): array for name, array in arrays.items()}


def changed(end, change):
    return lambda arrays: {name: change(a) if name.endswith(end) else a for name, a in arrays.items()}


def numbered(what, new):
    return named(rf"{what}\.(\d+)\.", lambda match: f"{what}.{new(int(match[1]))}.")


def copied(one, other):
    return lambda arrays: arrays | {other: arrays[one]}


def lost(name):
    return lambda arrays: {n: a for n, a in arrays.items() if n != name}


FOLDERS = {
    **{f"all begin with {first}": ("all-linear", named("^", first), {}) for first in (
        "model.", "transformer.", "module.", "base_model.model.", "language_model.")},
    "without a prefix": ("all-linear", named("^model.", ""), {}),
    "another prefix": ("all-linear", named("^model.", "transformer."), {}),
    "half of the prefixes": ("all-linear", named(r"^model.(?=layers.1)", ""), {}),
    "GPT-2 without a prefix": ("GPT-2", named("^transformer.", ""), {}),
    "GPT-2 with a Llama's": ("GPT-2", named("^transformer.", "model."), {}),
    "layers from 1": ("all-linear", numbered("layers", lambda n: n + 1), {}),
    "layers with gaps": ("all-linear", numbered("layers", lambda n: 2 * n), {}),
    "experts from 1": ("experts", numbered("experts", lambda n: n + 1), {}),
    "experts with gaps": ("experts", numbered("experts", lambda n: 2 * n), {}),
    "an expert less": ("experts", named("experts.3.", "expert.3."), {}),
    "a bias more": ("all-linear", copied("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"), {}),
    "a bias that is read": (
        "all-linear", copied("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"), {"attention_bias": True}),
    "an axis more": ("all-linear", changed("model.norm.weight", lambda a: a[:, None]), {}),
    "rows more": ("all-linear", changed("q_proj.weight", lambda a: torch.cat([a, a[:4]])), {}),
    "a head less": ("all-linear", lost(HEAD), {}),
    "a head less, said to be tied": ("all-linear", lost(HEAD), {"tie_word_embeddings": True}),
    "tied, the head too": ("a tied embedding", copied(TABLE, HEAD), {}),
    "tied, said to be untied": ("a tied embedding", None, {"tie_word_embeddings": False}),
    "tied, under the head's name": ("a tied embedding", named(f"^{TABLE}", HEAD), {}),
    "tied, and untied": ("a tied embedding", copied(TABLE, HEAD), {"tie_word_embeddings": False}),
    "another rope": ("all-linear", None, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "a longer rope": ("all-linear", None, {"rope_parameters": EXTENDED}),
    "the older name of the rope": ("all-linear", None, {"rope_parameters": None, "rope_theta": 1e4}),
    "more heads": ("all-linear", None, {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}),
    "fewer layers": ("all-linear", None, {"num_hidden_layers": 1}),
    "another norm": ("all-linear", None, {"rms_norm_eps": 0.1}),
    "another activation": ("GPT-2", None, {"activation_function": "relu"}),
    "a shorter context": ("all-linear", None, {"max_position_embeddings": 16}),
    "dropout": ("all-linear", None, {"attention_dropout": 0.5, "use_cache": False}),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_is_right_where_transformers_computes_the_same(tmp_path, what):
    kind, change, settings = FOLDERS[what]
    adapter, base = saved(tmp_path, kind)
    load, folder = transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "merged"
    peft.PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(folder)
    ids = torch.arange(9)[None]
    expected = load(folder)(ids).logits
    arrays = (change or dict)(load_file(folder / "model.safetensors"))
    save_file(
        {name: a.contiguous().clone() for name, a in arrays.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    try:
        model, found = load(folder, output_loading_info=True)
        same = not found["missing_keys"] and torch.allclose(model(ids).logits, expected, rtol=0, atol=1e-6)
    except RuntimeError:  # a shape or a conversion that is refused
        same = False
    report = audit(adapter, base, merged=folder)
    assert report.word == ("RIGHT" if same else "WRONG"), str(report)


# --- layers that PEFT takes for experts' ---

MOE = SIZES | {"num_hidden_layers": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = MOE | {
    "num_key_value_heads": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
QWEN = MOE | {"num_experts": 4, "mlp_only_layers": [0]}
SHARED = QWEN | {"shared_expert_intermediate_size": 12}
GLM = MOE | {"head_dim": 4, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
ERNIE = MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1}
MIXTURES = {
    "qwen2_moe": SHARED, "qwen3_moe": QWEN | {"head_dim": 4}, "deepseek_v2": DEEPSEEK, "deepseek_v3": DEEPSEEK,
    "qwen3_next": SHARED | {"head_dim": 4, "layer_types": ["full_attention"] * 3}, "glm4_moe": GLM,
    "ernie4_5_moe": ERNIE, "mixtral": SIZES | {"num_local_experts": 4}, "olmoe": SIZES | {"num_experts": 4},
}  # fmt: skip
MLP = ("gate_proj", "up_proj", "down_proj")


def mixture(folder, kind):
    """A model with mixtures, whose files have an array for all experts of a layer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **MIXTURES[kind]))
    model.double().save_pretrained(folder, save_original_format=False)
    return model


def drawn(folder, weights, **settings):
    """An adapter written by hand, and the update of each module: `weights` has a matrix of each one's shape."""
    tensors, updates = {}, {}
    for path, W in weights.items():
        A, B = torch.randn(2, W.shape[1], dtype=torch.double), torch.randn(W.shape[0], 2, dtype=torch.double)
        tensors |= {f"base_model.model.{path}.lora_A.weight": A, f"base_model.model.{path}.lora_B.weight": B}
        updates[path] = 2 * B @ A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "peft_version": "0.21.2"}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return updates


def merged(model, folder):
    """What PEFT's merging adds to each weight of the model."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).merge_and_unload()
    return {name: p.detach() - before[name] for name, p in after.named_parameters()}


def is_update(change, update):
    return float((change - update).norm()) < 1e-9 * float(update.norm())


DENSE = [kind for kind in MIXTURES if kind not in ("mixtral", "olmoe")]


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_the_dense_layers_that_peft_loses_are_named(kind, by_weight, tmp_path):
    model = mixture(tmp_path / "m", kind)
    ends = tuple(f".{last}.weight" for last in MLP)
    dense = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if n.endswith(ends)}
    dense = {path: p for path, p in dense.items() if ".experts." not in path}
    heads = {f"model.layers.{i}.self_attn.o_proj": model.model.layers[i].self_attn.o_proj.weight for i in range(3)}
    said = {"target_modules": ["o_proj", *MLP]}
    if by_weight:
        said = {"target_modules": ["o_proj"], "target_parameters": [f"{path}.weight" for path in dense]}
    updates, found = drawn(tmp_path / "a", dense | heads, **said), merged(model, tmp_path / "a")
    lost = {path for path, update in updates.items() if not is_update(found[f"{path}.weight"], update)}
    assert lost == ({*dense} if kind != "qwen2_moe" and not by_weight else set())
    wrong = {finding.code: {*finding.modules} for finding in audit(tmp_path / "a", tmp_path / "m").of("wrong")}
    assert wrong == ({"dense-taken-for-experts": lost} if lost else {})


@pytest.mark.parametrize("kind", MIXTURES)
def test_old_names_of_experts_are_wrong_where_peft_loses_them(kind, tmp_path):
    model = mixture(tmp_path / "m", kind)
    first, names = ("block_sparse_moe", ("w1", "w3", "w2")) if kind == "mixtral" else ("mlp", MLP)
    arrays = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    weights = {}  # by the old name of each expert's layer
    for name, p in arrays.items():
        experts, _, last = name.replace(".mlp.", f".{first}.").rpartition(".")
        parts = [names[2]] if last == "down_proj" else names[:2]
        for e, W in enumerate(p):
            weights |= {f"{experts}.{e}.{n}": w for n, w in zip(parts, W.chunk(len(parts)), strict=True)}
    updates, found = drawn(tmp_path / "a", weights, target_modules=names), merged(model, tmp_path / "a")
    ordered, read = iter(updates.values()), True
    for name, p in arrays.items():
        parts = 1 if name.endswith("down_proj") else 2
        update = torch.stack([torch.cat([next(ordered) for _ in range(parts)]) for _ in p])
        read = read and is_update(found[name], update)
    assert read == (kind != "qwen2_moe")
    report = audit(tmp_path / "a", tmp_path / "m", merge=True)
    assert [finding.code for finding in report.of("wrong")] == ([] if read else ["module-unknown"])
    assert "old-expert-names" in [finding.code for finding in report.of("note")]


# --- targets ---

ASKED = json.loads((ROOT / "tests" / "audit" / "peft_targets.json").read_text())
PATHS = ASKED["paths"]
EXPRESSIONS = [r".*\.(q|v)_proj", r"model\.layers\.\d\..*", r".*proj", r"(?!visual).*q_proj", r".*", "lm_head|q_proj"]
NAMES = ["q_proj", "v_proj", "up_proj", "lm_head", "embed_tokens", "self_attn.q_proj", "proj", "q", *PATHS]
WHOLE = ["lm_head", "q_proj", "self_attn", "head", "layers.0", r"layers\.1\d?", "mlp|q_proj", "model", "score", "a.b"]
LAYERS = ["layers", "h", "block", "layer", "lay.*", "blocks", ""]
CONFIGS = st.fixed_dictionaries(
    {"target_modules": st.lists(st.sampled_from(NAMES), min_size=1, max_size=4) | st.sampled_from(EXPRESSIONS)},
    optional={
        "exclude_modules": st.lists(st.sampled_from(NAMES), max_size=3) | st.sampled_from(EXPRESSIONS),
        "modules_to_save": st.lists(st.sampled_from(WHOLE), max_size=3),
        "layers_to_transform": st.none() | st.integers(0, 10) | st.lists(st.sampled_from([0, 1, 2, 10]), max_size=3),
        "layers_pattern": st.none() | st.sampled_from(LAYERS) | st.lists(st.sampled_from(LAYERS), max_size=2),
    },
)


def pefts_targets(config):
    """The paths that PEFT's own function takes for targets."""
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    asked = peft.LoraConfig()
    for key, value in config.items():  # as a file's values stand there: a configuration makes sets of lists
        setattr(asked, key, value)
    found = [(path, check_target_module_exists(asked, path)) for path in PATHS]
    return [path for path, answer in found if answer and not isinstance(answer, _ExcludedModule)]


@given(CONFIGS)
@settings(max_examples=500, deadline=None)
def test_targets_are_those_of_pefts_own_function(config):
    ours = [path for path, is_target in zip(PATHS, are_targets(config, PATHS), strict=True) if is_target]
    assert ours == pefts_targets(config)


@pytest.mark.parametrize("row", ASKED["answers"], ids=str)
def test_the_recorded_answers_are_pefts(row):
    assert pefts_targets(row["config"]) == row["targets"]
