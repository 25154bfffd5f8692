"""Adapters of experts with the names of before: what `minilora merge` makes of them, and what PEFT does.

    pip install -e ".[files]" torch transformers peft
    python peft_old_names.py

In transformers 4 each weight of each expert was a linear layer, with an adapter under its own name, such as
``model.layers.0.mlp.experts.3.up_proj``. In transformers 5 the experts' weights are arrays, and PEFT turns the names
into theirs. The right answer is computed with neither: s B A is added to each weight.
"""

import json
import logging
import math
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

from minilora import merge_adapter

R, ALPHA = 3, 5.0
COMMON = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DENSE = {"intermediate_size": 20, "moe_intermediate_size": 12}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MIXTRAL = transformers.MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=4, head_dim=8)
CASES = {
    "Mixtral": (MIXTRAL, False),
    "Mixtral, rsLoRA": (MIXTRAL, True),
    "Qwen2-MoE, with the shared expert": (
        transformers.Qwen2MoeConfig(**COMMON, **DENSE, num_experts=4, shared_expert_intermediate_size=10),
        False,
    ),
    "Qwen3-MoE, one layer with an MLP": (
        transformers.Qwen3MoeConfig(
            **COMMON, **DENSE, num_experts=4, head_dim=8, norm_topk_prob=True, mlp_only_layers=[1]
        ),
        False,
    ),
    "DeepSeek-V2, shared experts and one MLP": (
        transformers.DeepseekV2Config(
            **COMMON | DENSE | LATENT | {"num_key_value_heads": 2}, n_routed_experts=4, n_shared_experts=2,
            first_k_dense_replace=1, routed_scaling_factor=1.5,
        ),
        False,
    ),
}  # fmt: skip
IDS = torch.arange(3, 11)[None]


def base_of(config):
    """A model of a family with random weights, the same each time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        near_one = name.endswith("norm.weight")
        p.copy_(1 + 0.1 * torch.randn_like(p) if near_one else torch.randn_like(p) / max(p.shape[-1], 2) ** 0.5)
    return model


def weights_of(model):
    """The weights of all MLPs and of each expert by their names of before; the views are the model's own."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, p in model.named_parameters():
        old = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
        path, _, last = old.rpartition(".")
        if last == "gate_up_proj":
            for e, W in enumerate(p):
                halves = W.chunk(2)
                yield f"{path}.{e}.{gate}", halves[0]
                yield f"{path}.{e}.{up}", halves[1]
        elif last == "down_proj":
            for e, W in enumerate(p):
                yield f"{path}.{e}.{down}", W
        elif path.endswith((".gate_proj", ".up_proj", ".down_proj")):
            yield path, p


@torch.no_grad()
def measured(config, rslora):
    """By how much an adapter moves a logit, and by how much both are off."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, merged = (Path(folder, name) for name in ("base", "adapter", "merged"))
        right, tensors, rng = base_of(config), {}, torch.Generator().manual_seed(5)
        right.save_pretrained(base)
        before = right(IDS).logits
        for name, W in weights_of(right):
            A, B = (torch.randn(shape, generator=rng) * 0.3 for shape in ((R, W.shape[1]), (W.shape[0], R)))
            tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
            W += ALPHA / (math.sqrt(R) if rslora else R) * B @ A
        adapter.mkdir()
        save_file(tensors, adapter / "adapter_model.safetensors")
        names = sorted({name.rpartition(".")[2] for name, _ in weights_of(right)})
        said = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "use_rslora": rslora, "target_modules": names}
        (adapter / "adapter_config.json").write_text(json.dumps(said))
        merge_adapter(base, adapter, merged)
        expected = right(IDS).logits
        ours = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()(IDS).logits
        theirs = PeftModel.from_pretrained(base_of(config), adapter).eval()(IDS).logits
        return [
            (z - other).abs().max().item() for z, other in ((expected, before), (ours, expected), (theirs, expected))
        ]


def main():
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print("| adapter of | moves a logit by | `minilora merge` is off by | PEFT is off by |")
    print("|---|---|---|---|")
    for name, (config, rslora) in CASES.items():
        effect, ours, theirs = measured(config, rslora)
        print(f"| {name} | {effect:.2g} | {ours:.0e} | {theirs:.2g} |", flush=True)


if __name__ == "__main__":
    main()
