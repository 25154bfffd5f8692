"""LitGPT's LoRALinear, and LoRAQKVLinear, which has three slots. minilora conformance litgpt_lora.py"""

import math
from functools import partial
from types import SimpleNamespace

import plain_torch
import torch_slots
from litgpt.lora import LoRALinear, LoRAQKVLinear


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


def qkv(weight, bias, lora_A, lora_B, alpha, widths):
    A, B = torch_slots.stacked(lora_A), torch_slots.stacked(lora_B)
    head = math.gcd(*widths)
    layer = LoRAQKVLinear(
        weight.shape[1],
        len(weight),
        head_size=head,
        n_head=widths[0] // head,
        n_query_groups=widths[1] // head,
        r=B.shape[1],
        lora_alpha=next(one for one in alpha if one is not None),
        enable_lora=[one is not None for one in lora_A],
        bias=bias is not None,
    )
    layer.linear.weight.data, layer.lora_A.data, layer.lora_B.data = weight, A, B
    if bias is not None:
        layer.linear.bias.data = bias
    return layer, layer.lora_A, layer.lora_B


def of_batches(*arrays):
    """LitGPT's takes a batch of sequences: all rows are one here."""
    layer, *factors = qkv(*arrays)
    return lambda x: layer(x.reshape(1, -1, x.shape[-1])).reshape(*x.shape[:-1], -1), *factors


def merged(layer):
    layer.merge()
    return layer.linear.weight


kinds = {
    "fused": SimpleNamespace(
        **vars(torch_slots.functions(of_batches)), merge=partial(torch_slots.merge, module=qkv, merged=merged), slots=3
    )
}
