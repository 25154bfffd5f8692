"""PEFT and a model with mixtures in some layers, and MLPs in others: the adapters of the MLPs are dropped.

    pip install torch transformers peft safetensors; python peft_dense_layers_of_a_mixture.py

PEFT turns the names gate_proj, up_proj and down_proj into those of the experts' arrays. The MLPs of the other layers
have the same names, and keep no adapter; shared experts neither (DeepSeek).

peft 0.21.2, transformers 5.24.0: the MLP of layer 1 has none of its three adapters, and there is no error. Reported as
huggingface/peft #3711.
"""

import json
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

R, ALPHA = 3, 5.0
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8}
CONFIG = transformers.Qwen3MoeConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[1],
)  # fmt: skip
NAMES = ["gate_proj", "up_proj", "down_proj"]


def base():
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(CONFIG).eval()
    for p in (p for p in model.parameters() if p.ndim > 1):
        p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def weights(model):
    """The experts' weights under their names of before, and those of the MLP; the views are the model's own."""
    experts, mlp = (layer.mlp for layer in model.model.layers)
    for e in range(4):
        gate, up = experts.experts.gate_up_proj[e].chunk(2)
        for name, W in zip(NAMES, (gate, up, experts.experts.down_proj[e]), strict=True):
            yield f"model.layers.0.mlp.experts.{e}.{name}", W
    for name in NAMES:
        yield f"model.layers.1.mlp.{name}", getattr(mlp, name).weight


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
ids = torch.arange(3, 11)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    right, without, tensors = base(), base(), {}
    for (name, W), (_, other) in zip(weights(right), weights(without), strict=True):
        A, B = torch.randn(R, W.shape[1]) * 0.3, torch.randn(W.shape[0], R) * 0.3
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        W += ALPHA / R * B @ A
        other += ALPHA / R * B @ A if ".experts." in name else 0
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    said = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": NAMES}
    Path(folder, "adapter_config.json").write_text(json.dumps(said))
    model = PeftModel.from_pretrained(base(), folder).eval()
    z = model(ids).logits
    print(f"PEFT: off by {(z - right(ids).logits).abs().max():.2g}, expected 0")
    print(f"from the model whose MLP has no adapter it is off by {(z - without(ids).logits).abs().max():.2g}")
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A") and "layers.1" in name]
    print(f"adapters in layer 1: {len(adapted)}, expected 3")
