"""Merges that PEFT itself made, of every kind and in three types, are right; five that it made wrongly get their names.

PEFT keeps adapters in float32 or, with autocast_adapter_dtype=False, in the base's type, and rounds otherwise in each.
"""

import contextlib
import copy
import io
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from minilora.audit.auditing import audit

from ..support.peers import peft, torch, transformers
from ..support.tiny_peers import EXPERTS, QV, SIZES, classifier, gpt2, gpt_oss, llama, mixtral, qwen3_moe

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


ROOT = Path(__file__).parents[2]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))


PATTERNS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 3}}
KINDS = {
    "plain": (llama, {"target_modules": ALL}),
    "rslora": (llama, {"target_modules": QV, "use_rslora": True}),
    "patterns": (llama, {"target_modules": ALL, **PATTERNS}),
    "dora": (llama, {"target_modules": ALL, "use_dora": True}),
    "dora of an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, embedding": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "q_proj"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2, dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "lora_only": (lambda: llama(attention_bias=True), {"target_modules": QV, "bias": "lora_only"}),
    "lora_bias": (lambda: llama(attention_bias=True), {"target_modules": QV, "lora_bias": True}),
    "modules_to_save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "classifier": (classifier, {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "rows of an embedding": (llama, {"target_modules": QV, "trainable_token_indices": [3, 5, 7]}),
    "mixtral": (mixtral, {"target_modules": QV, "target_parameters": EXPERTS}),
    "qwen3_moe": (qwen3_moe, {"target_modules": QV, "target_parameters": EXPERTS}),
    "gpt_oss": (gpt_oss, {"target_modules": QV, "target_parameters": EXPERTS}),
    "convolution": (resnet, {"target_modules": ["convolution"]}),
    "convolution, dora": (resnet, {"target_modules": ["convolution"], "use_dora": True}),
    "pissa, converted": (llama, {"target_modules": QV, "init_lora_weights": "pissa"}),
}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def trained(model, folder, config, size=0.05):
    """Write an adapter whose factors have moved."""
    model = peft.get_peft_model(model, config)
    model.save_pretrained(folder / "start")
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn_like(p)
    start = config.init_lora_weights == "pissa"
    how = {"path_initial_model_for_weight_conversion": str(folder / "start")} if start else {}
    model.save_pretrained(folder / "adapter", **how)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_pefts_is_right(tmp_path, kind, dtype):
    make, settings = KINDS[kind]
    torch.manual_seed(0)
    model = make().to(TYPES[dtype])
    model.save_pretrained(tmp_path / "base")
    wide = model.float() if kind.startswith("pissa") else model  # whose start PEFT computes in float32 alone
    trained(copy.deepcopy(wide), tmp_path, peft.LoraConfig(r=4, lora_alpha=12, **settings))
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
    from ..support.peers import write_gguf

    torch.manual_seed(0)
    model = llama()
    trained(copy.deepcopy(model), tmp_path, peft.LoraConfig(r=4, target_modules=ALL))
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
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"hidden_size": 64})).to(TYPES[dtype])
    model.save_pretrained(tmp_path / "float")
    trained(copy.deepcopy(model), tmp_path, peft.LoraConfig(r=4, target_modules=ALL))
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=TYPES[dtype],
    )
    load = transformers.LlamaForCausalLM.from_pretrained
    load(tmp_path / "float", dtype=TYPES[dtype], quantization_config=how, device_map="cpu").save_pretrained(
        tmp_path / "base"
    )
    base = load(tmp_path / "base", device_map="cpu").train().dequantize()
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    assert audit(tmp_path / "adapter", tmp_path / "base", merged=tmp_path / "merged").word == "RIGHT"
    report = audit(tmp_path / "adapter", tmp_path / "float", merged=tmp_path / "merged")
    assert any("over the base in NF4" in text for text in report.diagnoses), str(report)


def test_the_page_has_what_the_example_of_broken_merges_prints():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "examples" / "broken_merges.py"))["run"]()
    page = (ROOT / "docs" / "library" / "is-my-adapter-applied.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(# merge_and_unload.*?)^```$", page, re.MULTILINE | re.DOTALL)
    of_kernel = r"at most [\d.]+ ulp"  # the last bits of sums
    assert re.sub(of_kernel, "", printed.getvalue().strip()) == re.sub(of_kernel, "", block.strip())
    assert np.size(re.findall(r"exit code 1", block)) == 5
