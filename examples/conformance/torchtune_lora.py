"""torchtune's LoRALinear and DoRALinear. minilora conformance torchtune_lora.py"""

from functools import partial
from types import SimpleNamespace

import plain_torch
import torch
from torchtune.modules.peft import DoRALinear, LoRALinear


def module(weight, bias, A, B, alpha, *magnitude, cls=LoRALinear):
    layer = cls(weight.shape[1], len(weight), len(A), alpha, use_bias=bias is not None).to(weight.dtype)
    parts = [layer.lora_a.weight, layer.lora_b.weight, *([layer.magnitude] if magnitude else [])]
    for part, numbers in zip([layer.weight, layer.bias, *parts], [weight, bias, A, B, *magnitude], strict=True):
        if part is not None:
            part.data = numbers
    return layer, *parts


def init(in_features, out_features, rank, rng, *weight, cls=LoRALinear):
    layer = cls(in_features, out_features, rank, 1)
    parts = [layer.lora_a.weight, layer.lora_b.weight]
    if weight:
        layer.weight.data = torch.from_numpy(weight[0]).float()
        layer.initialize_dora_magnitude()
        parts.append(layer.magnitude)
    return [part.detach().numpy() for part in parts]


def functions(cls):
    made = partial(module, cls=cls)
    both = {name: partial(getattr(plain_torch, name), module=made) for name in ("forward", "backward")}
    return {**both, "init": partial(init, cls=cls)}


globals().update(functions(LoRALinear))
kinds = {"dora": SimpleNamespace(**functions(DoRALinear))}
