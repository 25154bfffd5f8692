"""PEFT and an adapter of experts with the names of before: rank_pattern and alpha_pattern keep these names.

    pip install torch transformers peft safetensors; python peft_old_patterns_of_experts.py

PEFT turns the names in target_modules into those of the experts' arrays, and the keys of the patterns not.

peft 0.21.2, transformers 5.24.0: an alpha_pattern of w2, or of w1 and w3, is passed over, and the logits are off; a
rank_pattern ends in a size mismatch.
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
SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 8}
CONFIG = transformers.MixtralConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
)


def base():
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(CONFIG).eval()
    for p in (p for p in model.parameters() if p.ndim > 1):
        p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def weights(model):
    """Each expert's weights, under their names of before; the views are the model's own."""
    experts = model.model.layers[0].mlp.experts
    for e in range(4):
        gate, up = experts.gate_up_proj[e].chunk(2)
        for name, W in (("w1", gate), ("w3", up), ("w2", experts.down_proj[e])):
            yield f"model.layers.0.block_sparse_moe.experts.{e}.{name}", W


def attempt(rank_pattern=None, alpha_pattern=None):
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    right, tensors = base(), {}
    for name, W in weights(right):
        r, alpha = ranks.get(name[-2:], R), alphas.get(name[-2:], ALPHA)
        A, B = torch.randn(r, W.shape[1]) * 0.3, torch.randn(W.shape[0], r) * 0.3
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        W += alpha / r * B @ A
    said = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["w1", "w2", "w3"]}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        more = {"rank_pattern": ranks, "alpha_pattern": alphas}
        Path(folder, "adapter_config.json").write_text(json.dumps(said | more))
        try:
            z = PeftModel.from_pretrained(base(), folder).eval()(ids).logits
        except RuntimeError as error:
            return f"RuntimeError: {' '.join(str(error).split())[:150]}"
    return f"off by {(z - right(ids).logits).abs().max():.2g}"


print(f"peft {peft.__version__}, transformers {transformers.__version__}; expected each time: off by 0")
ids = torch.arange(3, 11)[None]
with torch.no_grad():
    print("no pattern:", attempt())
    print("alpha_pattern of w2:", attempt(alpha_pattern={"w2": 9}))
    print("alpha_pattern of w1 and w3:", attempt(alpha_pattern={"w1": 9, "w3": 9}))
    print("rank_pattern of w2:", attempt(rank_pattern={"w2": 5}))
    print("rank_pattern of w1 and w3:", attempt(rank_pattern={"w1": 5, "w3": 5}))
