"""lora-pytorch's LoRA: its first factor holds alpha / r. python -m minilora.conformance lora_pytorch_lora"""

from functools import partial

import plain_torch
import torch
from lora_pytorch import LoRA


def module(weight, bias, lora_A, lora_B, alpha):
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    layer = LoRA.from_module(base, rank=len(lora_A))
    down, up = layer.lora_module.in_proj, layer.lora_module.out_proj
    down.data, up.data = alpha / len(lora_A) * lora_A.T, lora_B.T
    return layer, down, up


def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
    grads = plain_torch.backward(dy, x, weight, bias, lora_A, lora_B, alpha, module=module)
    return {"x": grads["x"], "lora_A": alpha / len(lora_A) * grads["lora_A"].T, "lora_B": grads["lora_B"].T}


def init(in_features, out_features, rank, rng):
    new = LoRA.from_module(torch.nn.Linear(in_features, out_features), rank=rank).lora_module
    return new.in_proj.detach().numpy().T, new.out_proj.detach().numpy().T


forward = partial(plain_torch.forward, module=module)
