"""PEFT's Linear, and its rsLoRA. python -m minilora.conformance peft_lora"""

from functools import partial
from types import SimpleNamespace

import peft
import plain_torch
import torch


def module(weight, bias, lora_A, lora_B, alpha, use_rslora=False):
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    config = peft.LoraConfig(r=len(lora_A), lora_alpha=alpha, target_modules=["0"], use_rslora=use_rslora)
    layer = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0]
    layer.to(weight.dtype)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = lora_A, lora_B
    return layer, A, B


def merge(weight, lora_A, lora_B, alpha, use_rslora=False):
    layer, _, _ = module(*plain_torch.tensors([weight, None, lora_A, lora_B, alpha]), use_rslora=use_rslora)
    layer.merge()
    return layer.base_layer.weight.detach().numpy()


def init(in_features, out_features, rank, rng):
    weight = torch.from_numpy(rng.standard_normal((out_features, in_features)))
    config = peft.LoraConfig(r=rank, target_modules=["0"])
    base = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape), bias=False))
    layer = peft.get_peft_model(base, config).base_model.model[0]
    return layer.lora_A["default"].weight.detach().numpy(), layer.lora_B["default"].weight.detach().numpy()


def functions(**options):
    made = partial(module, **options)
    return {
        "forward": partial(plain_torch.forward, module=made),
        "backward": partial(plain_torch.backward, module=made),
        "merge": partial(merge, **options),
    }


globals().update(functions())
kinds = {"rslora": SimpleNamespace(**functions(use_rslora=True))}
