"""PEFT beside torch.nn.MultiheadAttention: the update of out_proj is added twice, in the forward and in the merge.

    pip install torch peft; python peft_multihead_attention.py

peft 0.21.2: 2 times. Reported as huggingface/peft #3774.
"""

import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0]


def product(layer):
    return layer.lora_B["default"].weight @ layer.lora_A["default"].weight


base = Model().double()
before = {name: p.detach().clone() for name, p in base.named_parameters()}
config = LoraConfig(r=2, lora_alpha=4, target_modules=["mha"], init_lora_weights=False)  # a scaling of 2
model = get_peft_model(base, config).double().eval()
x = torch.randn(1, 3, 8, dtype=torch.float64)
with torch.no_grad():
    found, adapted = model(x), model.base_model.model.mha
    for times in (1, 2):
        plain = Model().double()
        plain.load_state_dict(before)
        plain.mha.in_proj_weight += 2 * product(adapted)
        plain.mha.out_proj.weight += times * 2 * product(adapted.base_layer.out_proj)
        print(f"forward, with the update of out_proj {times} times: off by {(plain(x) - found).abs().max():.1e}")
    delta = 2 * product(adapted.base_layer.out_proj)
    merged = model.merge_and_unload().mha.out_proj.weight - before["mha.out_proj.weight"]
    print(f"merged: {(merged * delta).sum() / (delta * delta).sum():.6f} times")
