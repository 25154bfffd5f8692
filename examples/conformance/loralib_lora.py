"""loralib's Linear, and MergedLinear, whose slots are of one width. minilora conformance loralib_lora.py"""

from functools import partial
from types import SimpleNamespace

import loralib
import plain_torch
import torch_slots


def module(weight, bias, lora_A, lora_B, alpha):
    layer = loralib.Linear(weight.shape[1], weight.shape[0], r=len(lora_A), lora_alpha=alpha, bias=bias is not None)
    layer.to(weight.dtype)
    layer.weight.data, layer.lora_A.data, layer.lora_B.data = weight, lora_A, lora_B
    if bias is not None:
        layer.bias.data = bias
    return layer, layer.lora_A, layer.lora_B


def merge(weight, lora_A, lora_B, alpha):
    layer, _, _ = module(*plain_torch.tensors([weight, None, lora_A, lora_B, alpha]))
    layer.eval()  # merges
    return layer.weight.detach().numpy()


def init(in_features, out_features, rank, rng):
    layer = loralib.Linear(in_features, out_features, r=rank)
    return layer.lora_A.detach().numpy(), layer.lora_B.detach().numpy()


forward = partial(plain_torch.forward, module=module)
backward = partial(plain_torch.backward, module=module)


def merged_linear(weight, bias, lora_A, lora_B, alpha, widths):
    A, B = torch_slots.stacked(lora_A), torch_slots.stacked(lora_B)
    options = {"r": B.shape[1], "lora_alpha": next(one for one in alpha if one is not None), "bias": bias is not None}
    enabled = [one is not None for one in lora_A]
    layer = loralib.MergedLinear(weight.shape[1], len(weight), enable_lora=enabled, **options)
    layer.weight.data, layer.lora_A.data, layer.lora_B.data = weight, A, B
    if bias is not None:
        layer.bias.data = bias
    return layer, layer.lora_A, layer.lora_B


def merged(layer):
    layer.eval()  # merges
    return layer.weight


kinds = {
    "fused": SimpleNamespace(
        **vars(torch_slots.functions(merged_linear)),
        merge=partial(torch_slots.merge, module=merged_linear, merged=merged),
        one_width=True,
    )
}
