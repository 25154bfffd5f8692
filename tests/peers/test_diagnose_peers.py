"""What transformers with PEFT computes is right, in each precision and merged; and what it does not, has a name."""

import pytest

from minilora.conformance.golden.diagnosing import diagnose

from ..support.peers import peft, torch, transformers

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

from safetensors.torch import save_file  # noqa: E402

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder and an adapter with DoRA and rsLoRA, as the two write them."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(folder / "model")
    settings = {"r": 4, "lora_alpha": 10, "use_rslora": True, "use_dora": True, "target_modules": "all-linear"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    return folder


def loaded(folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter")


def answer(folder, tmp_path, model, computed_in="float32"):
    """The diagnosis of what a model says of two prompts."""
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tensors = {"prompts": ids, "logits": model(ids).logits.float().contiguous()}
    save_file(tensors, tmp_path / "logits.safetensors", {"computed_in": computed_in})
    return diagnose(folder / "model", folder / "adapter", tmp_path / "logits.safetensors")


def test_beside_and_merged_it_is_right(folder, tmp_path):
    model = loaded(folder)
    assert answer(folder, tmp_path, model).status == 0
    assert answer(folder, tmp_path, model.merge_and_unload()).status == 0


def test_in_bfloat16_it_is_right_where_that_is_declared(folder, tmp_path):
    model = loaded(folder).to(torch.bfloat16)
    assert answer(folder, tmp_path, model, "bfloat16").status == 0
    assert "as if computed in bfloat16" in answer(folder, tmp_path, model).text


def test_an_adapter_that_is_switched_off_is_named(folder, tmp_path):
    model = loaded(folder)
    with model.disable_adapter():
        diagnosis = answer(folder, tmp_path, model)
    assert diagnosis.details["flags"] == ["the-adapter-is-not-applied"]


def test_a_merged_model_that_was_saved_in_bfloat16_is_named(folder, tmp_path):
    merged = loaded(folder).merge_and_unload().to(torch.bfloat16).float()
    assert answer(folder, tmp_path, merged).details["flags"] == ["all-weights-in-bfloat16"]
