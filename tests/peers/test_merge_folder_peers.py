"""A merged folder in transformers computes what PEFT computes: beside the base, and merged by merge_and_unload."""

import json

import numpy as np
import pytest

from minilora import Llama, merge_adapter
from minilora.cli import main

from ..support.peers import PEERS, peft, torch, transformers

pytestmark = PEERS
tokenizers = pytest.importorskip("tokenizers")


SIZES = {
    **{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}
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
BASES = [("float32", "1GB"), ("float32", "20KB"), ("float16", "20KB"), ("bfloat16", "20KB")]
"""The types of bases, and the most that one of their shards holds."""
ROUNDED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}
"""How far rounded weights put the logits from those of the adapter beside its base."""
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def base_of(kind, dtype="float32", **changes):
    torch.manual_seed(1)
    config, cls = KINDS[kind]
    model = cls(config(**SIZES | changes))
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


def tuned(model, folder, **options):
    """Adapters of PEFT that have moved, saved, beside their base."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=6, **options)
    theirs = peft.get_peft_model(model, config)
    for name, p in theirs.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(folder)
    return theirs.eval()


def logits(model):
    ids = torch.tensor(np.random.default_rng(0).integers(0, 40, (2, 12)))
    with torch.no_grad():
        return model(ids, use_cache=False).logits.float().numpy()


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize(("dtype", "shard"), BASES)
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_is_what_merge_and_unload_gives(tmp_path, kind, name, shard, dtype):
    base = saved(tmp_path / "base", base_of(kind, dtype), shard)
    theirs = tuned(loaded(base), tmp_path / "adapter", **ADAPTERS[name])
    assert main(["merge", str(base), str(tmp_path / "adapter"), "-o", str(tmp_path / "out")]) == 0
    merged = loaded(tmp_path / "out")
    assert merged.dtype == getattr(torch, dtype)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(list(base.glob("*.safetensors")))
    beside = logits(theirs)
    unloaded = theirs.merge_and_unload()
    expected = unloaded.state_dict()
    for weight, ours in merged.state_dict().items():  # half types: at most one rounding of a sum apart
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, expected[weight], rtol=2 * eps, atol=2 * eps)
    size = np.abs(beside).max()
    found = logits(merged.float())
    np.testing.assert_allclose(found, logits(unloaded.float()), rtol=0, atol=1e-4 * size)
    np.testing.assert_allclose(found, beside, rtol=0, atol=ROUNDED[dtype] * size)
    ids = np.random.default_rng(0).integers(0, 40, (2, 12))
    np.testing.assert_allclose(Llama.load(tmp_path / "out")(ids), found, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("shard", ["1GB", "6KB"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_base_is_untied_as_peft_advises(tmp_path, kind, targets, shard):
    """Beside the base the adapter changes one of the two; merge_and_unload of an untied copy does too."""
    base = saved(tmp_path / "base", base_of(kind, tie_word_embeddings=True), shard)
    theirs = tuned(loaded(base), tmp_path / "adapter", target_modules=targets)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    np.testing.assert_allclose(logits(merged), logits(theirs), rtol=0, atol=1e-4 * np.abs(logits(theirs)).max())
    copy = transformers.AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    copy.lm_head.weight.data = copy.model.embed_tokens.weight.data.clone()
    again = peft.PeftModel.from_pretrained(copy.eval(), tmp_path / "adapter").merge_and_unload()
    np.testing.assert_allclose(logits(merged), logits(again), rtol=0, atol=1e-4 * np.abs(logits(again)).max())
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (shard != "1GB")
    if index.exists():
        theirs_index = saved(tmp_path / "theirs", again, shard) / index.name
        total = json.loads(theirs_index.read_text())["metadata"]
        assert json.loads(index.read_text())["metadata"] == total


def test_the_tokenizer_and_the_generation_go_with_it(tmp_path):
    base = saved(tmp_path / "base", base_of("llama"))
    tuned(loaded(base), tmp_path / "adapter", target_modules=["q_proj"])
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "a b"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>a b"
    assert tokenizer("a b")["input_ids"] == [1, 2]
    assert loaded(tmp_path / "out").generation_config.max_new_tokens == 7
