"""LitGPT's LoRALinear. minilora conformance litgpt_lora.py"""

from functools import partial

import plain_torch
from litgpt.lora import LoRALinear


def module(weight, bias, A, B, alpha):
    layer = LoRALinear(weight.shape[1], len(weight), r=len(A), lora_alpha=alpha, bias=bias is not None)
    layer.linear.weight.data, layer.lora_A.data, layer.lora_B.data = weight, A, B
    if bias is not None:
        layer.linear.bias.data = bias
    return layer, layer.lora_A, layer.lora_B


def merge(weight, A, B, alpha):
    layer, *_ = module(*plain_torch.tensors([weight, None, A, B, alpha]))
    layer.merge()
    return layer.linear.weight.detach().numpy()


def init(in_features, out_features, rank, rng):
    layer = LoRALinear(in_features, out_features, r=rank)
    return layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy()


forward = partial(plain_torch.forward, module=module)
backward = partial(plain_torch.backward, module=module)
