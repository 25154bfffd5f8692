"""PEFT and an adapter of a Qwen2-MoE's experts with the names of before: it is dropped without a word.

    pip install torch transformers peft safetensors; python peft_old_qwen2_moe.py

The table by which PEFT puts each expert's gate_proj, up_proj and down_proj into one array has no entry for qwen2_moe.

peft 0.21.2, transformers 5.24.0: of an adapter of the experts and of the shared expert only the latter's part is
applied, without an error or a warning. A fresh adapter of gate_proj, up_proj and down_proj trains the shared expert
alone.
"""

import json
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

R, ALPHA = 3, 5.0
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
CONFIG = transformers.Qwen2MoeConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=12, shared_expert_intermediate_size=10,
)  # fmt: skip
NAMES = ["gate_proj", "up_proj", "down_proj"]


def base():
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(CONFIG).eval()
    for p in (p for p in model.parameters() if p.ndim > 1):
        p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def weights(model):
    """The shared expert's weights, and each expert's under their names of before; the views are the model's own."""
    experts, shared = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.shared_expert
    for name in NAMES:
        yield f"model.layers.0.mlp.shared_expert.{name}", getattr(shared, name).weight
    for e in range(4):
        gate, up = experts.gate_up_proj[e].chunk(2)
        for name, W in zip(NAMES, (gate, up, experts.down_proj[e]), strict=True):
            yield f"model.layers.0.mlp.experts.{e}.{name}", W


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
ids = torch.arange(3, 11)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    right, without, tensors = base(), base(), {}
    for (name, W), (_, other) in zip(weights(right), weights(without), strict=True):
        A, B = torch.randn(R, W.shape[1]) * 0.3, torch.randn(W.shape[0], R) * 0.3
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        W += ALPHA / R * B @ A
        other += 0 if ".experts." in name else ALPHA / R * B @ A
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    said = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": NAMES}
    Path(folder, "adapter_config.json").write_text(json.dumps(said))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(), folder).eval()
    z, expected, alone = model(ids).logits, right(ids).logits, without(ids).logits
    about = sum("adapter" in str(note.message) for note in notes)
    print(f"PEFT: off by {(z - expected).abs().max():.2g}, expected 0; warnings about the adapter: {about}")
    print(f"from the model whose experts have no adapter it is off by {(z - alone).abs().max():.2g}")
    fresh = get_peft_model(base(), LoraConfig(r=R, target_modules=NAMES))
    trained = sorted({name.partition(".lora_")[0] for name, p in fresh.named_parameters() if p.requires_grad})
    print(f"a fresh adapter of {', '.join(NAMES)} trains:")
    for name in trained:
        print("   ", name.removeprefix("base_model.model."))
