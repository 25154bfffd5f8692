"""PEFT and an adapter of experts with the names of before, with rsLoRA: gate and up are the root of 2 too large.

    pip install torch transformers peft safetensors; python peft_old_rslora_experts.py

In transformers 4 each expert's w1, w3 and w2 was a linear layer of its own. PEFT puts w1 and w3 into one gate_up_proj,
and doubles r and alpha. Under rsLoRA the scaling is then 2 alpha / sqrt(2 r), and was alpha / sqrt(r).

peft 0.21.2, transformers 5.24.0: the scaling is 4.0825, expected 2.8868; the logits are off by as much as the adapter
does at all. With that scaling set back to the expected one they are right.
"""

import json
import math
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


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
ids = torch.arange(3, 11)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    right, tensors = base(), {}
    for name, W in weights(right):
        A, B = torch.randn(R, W.shape[1]) * 0.3, torch.randn(W.shape[0], R) * 0.3
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        W += ALPHA / math.sqrt(R) * B @ A
    save_file(tensors, Path(folder, "adapter_model.safetensors"))
    said = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "use_rslora": True, "target_modules": ["w1", "w2", "w3"]}
    Path(folder, "adapter_config.json").write_text(json.dumps(said))
    expected, plain = right(ids).logits, base()(ids).logits
    print(f"the adapter moves a logit by up to {(expected - plain).abs().max():.2f}")
    model = PeftModel.from_pretrained(base(), folder).eval()
    print(f"PEFT: off by {(model(ids).logits - expected).abs().max():.2g}, expected 0")
    for module in model.modules():
        if getattr(module, "parameter_name", "") == "gate_up_proj":
            print(f"scaling of gate_up_proj: {module.scaling['default']:.4f}, expected {ALPHA / math.sqrt(R):.4f}")
            module.scaling["default"] = ALPHA / math.sqrt(R)
    print(f"with the expected scaling: off by {(model(ids).logits - expected).abs().max():.2g}")
