"""Adapters that PEFT itself wrote, of every kind, beside the models that transformers wrote: all are sound."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.audit.auditing import audit
from minilora.audit.contents import are_targets

from ..support.peers import peft, torch, transformers
from ..support.tiny_peers import EXPERTS, QV, SIZES, classifier, gpt2, gpt_oss, llama, mixtral, qwen3_moe

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def qwen_moe():
    config = transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=20
    )
    return transformers.Qwen2MoeForCausalLM(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    return transformers.BertForSequenceClassification(config)


def headless():
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES))


VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def llava():
    parts = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(vision_config=parts[0], text_config=parts[1], image_token_index=31)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": SIZES["hidden_size"], "patch_size": 4}
    text = SIZES | {"rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(vocab_size=32, d_model=16, d_ff=24, num_layers=2, num_heads=4, d_kv=4)
    return transformers.T5ForConditionalGeneration(config)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 8, 3, groups=2)
        self.line, self.fc = torch.nn.Conv1d(4, 5, 3), torch.nn.Linear(7, 3)


LORA = {
    "defaults": (llama, {"target_modules": QV}),
    "PEFT's own targets": (llama, {}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "rsLoRA": (llama, {"target_modules": QV, "use_rslora": True}),
    "DoRA": (llama, {"target_modules": QV, "use_dora": True}),
    "rank patterns": (llama, {"target_modules": QV, "rank_pattern": {"layers.0.self_attn.q_proj": 3}}),
    "alpha patterns": (llama, {"target_modules": QV, "alpha_pattern": {"v_proj": 3, r".*\.1\..*q_proj": 5}}),
    "modules_to_save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "the embedding saved too": (llama, {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "an embedding": (llama, {"target_modules": [*QV, "embed_tokens"]}),
    "a head": (llama, {"target_modules": [*QV, "lm_head"]}),
    "a tied embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": [*QV, "embed_tokens"]}),
    "a tied head": (lambda: llama(tie_word_embeddings=True), {"target_modules": [*QV, "lm_head"]}),
    "a tied model": (lambda: llama(tie_word_embeddings=True), {"target_modules": QV}),
    "biases of all": (lambda: llama(attention_bias=True), {"target_modules": QV, "bias": "all"}),
    "biases of the adapted": (lambda: llama(attention_bias=True), {"target_modules": QV, "bias": "lora_only"}),
    "biases where there are none": (llama, {"target_modules": QV, "bias": "all"}),
    "lora_bias": (lambda: llama(attention_bias=True), {"target_modules": QV, "lora_bias": True}),
    "one layer": (llama, {"target_modules": QV, "layers_to_transform": 1}),
    "some layers": (llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "an expression": (llama, {"target_modules": r".*\.self_attn\.[qk]_proj"}),
    "excluded modules": (llama, {"target_modules": QV, "exclude_modules": r".*\.0\..*"}),
    "Gaussian start": (llama, {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "trained tokens": (llama, {"target_modules": QV, "trainable_token_indices": [0, 3]}),
    "a rank above the width": (llama, {"target_modules": QV, "r": 64}),
    "experts": (mixtral, {"target_parameters": EXPERTS}),
    "experts and attention": (
        qwen_moe, {"target_modules": QV, "target_parameters": EXPERTS},
    ),
    "one array of experts": (mixtral, {"target_parameters": ["mlp.experts.down_proj"]}),
    "a router": (mixtral, {"target_parameters": ["mlp.gate.weight"]}),
    "a shared expert": (qwen_moe, {"target_modules": ["up_proj", "down_proj"]}),
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "GPT-2, by default": (gpt2, {}),
    "GPT-2's head": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
    "BERT": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "a classifier": (classifier, {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "a model without a head": (headless, {"target_modules": QV, "task_type": None}),
    "features": (headless, {"target_modules": QV, "task_type": "FEATURE_EXTRACTION"}),
    "all-linear beside experts": (lambda: qwen3_moe(mlp_only_layers=[0]), {"target_modules": "all-linear"}),
    "experts under old names": (mixtral, {"target_modules": ["w1", "w2", "w3"]}),
    "experts stored the other way round": (gpt_oss, {"target_parameters": EXPERTS}),
    "a model that sees": (llava, {"target_modules": QV, "task_type": None}),
    "its language part": (llava, {"target_modules": r".*language_model.*\.(q_proj|up_proj)", "task_type": None}),
    "all of another that sees": (qwen2_vl, {"target_modules": "all-linear", "task_type": None}),
    "an encoder and a decoder": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "convolutions": (Convolutions, {"target_modules": ["conv1", "line", "fc"], "task_type": None}),
    "a convolution in groups": (Convolutions, {"target_modules": ["conv2"], "task_type": None}),
}  # fmt: skip


def saved(tmp_path, make, settings, dtype=None):
    """An adapter whose every number moved, as PEFT saves it, and its base."""
    torch.manual_seed(0)
    model = make()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(tmp_path / "m")
        base = tmp_path / "m"
    else:
        from safetensors.torch import save_file

        base = tmp_path / "m.safetensors"
        save_file(model.state_dict(), base)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    (adapted.to(dtype) if dtype else adapted).save_pretrained(tmp_path / "a")
    return tmp_path / "a", base


@pytest.mark.parametrize("what", LORA)
def test_what_peft_saves_is_sound(what, tmp_path):
    adapter, base = saved(tmp_path, *LORA[what])
    report = audit(adapter, base, merge=True)
    assert report.status == 0, str(report)
    assert not report.landing.lost, str(report)
    assert audit(adapter).status == 0, str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_sound(dtype, tmp_path):
    assert audit(*saved(tmp_path, *LORA["all-linear"], dtype=getattr(torch, dtype))).status == 0


def test_the_size_of_the_change_is_that_of_pefts_delta(tmp_path):
    adapter, base = saved(tmp_path, *LORA["rsLoRA"])
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
    for path, numbers in audit(adapter, base).numbers.items():
        layer = model.base_model.model.get_submodule(path)
        assert np.isclose(numbers.norm, float(layer.get_delta_weight("default").norm()), rtol=1e-5)


def test_an_adapter_that_was_never_trained_is_suspicious(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "m")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=QV, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    report = audit(tmp_path / "a", tmp_path / "m")
    assert [finding.code for finding in report.of("suspicious")] == ["all-zero"]


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
    from safetensors.torch import save_file

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
    dense = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.endswith(
        tuple(f".{last}.weight" for last in MLP)) and ".experts." not in name}  # fmt: skip
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

ASKED = json.loads((Path(__file__).parents[1] / "audit" / "peft_targets.json").read_text())
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
