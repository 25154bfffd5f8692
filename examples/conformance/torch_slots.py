"""A torch module whose weight has slots, as functions of arrays: loralib_lora.py and litgpt_lora.py share it.

A stacked lora_A has the rows of all slots that have an adapter, one under the other, and so has lora_B.
"""

from functools import partial
from types import SimpleNamespace

import plain_torch
import torch


def tensors(arrays):
    return [tensors(a) if isinstance(a, list) else plain_torch.tensors([a])[0] for a in arrays]


def stacked(factors):
    return torch.cat([one for one in factors if one is not None])


def listed(grad, factors):
    """Return a stacked factor's gradient as a list, None where a slot has no adapter."""
    parts = iter(grad.split([len(one) for one in factors if one is not None]))
    return [None if one is None else next(parts).numpy() for one in factors]


def forward(x, *arrays, module):
    (x,), (layer, *_) = tensors([x]), module(*tensors(arrays))
    return layer(x).detach().numpy()


def backward(dy, x, *arrays, module):
    (dy, x), (weight, bias, lora_A, lora_B, *more) = tensors([dy, x]), tensors(arrays)
    layer, A, B = module(weight, bias, lora_A, lora_B, *more)
    layer(x.requires_grad_()).backward(dy)
    return {"x": x.grad.numpy(), "lora_A": listed(A.grad, lora_A), "lora_B": listed(B.grad, lora_B)}


def merge(weight, *arrays, module, merged):
    """Return the weight that `merged` makes a layer have."""
    layer, *_ = module(*tensors([weight, None, *arrays]))
    return merged(layer).detach().numpy()


def functions(module):
    """Return forward and backward of a module whose slots have one rank."""
    made = {name: partial(function, module=module) for name, function in (("forward", forward), ("backward", backward))}
    return SimpleNamespace(**made, one_rank=True)
