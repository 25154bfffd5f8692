"""PEFT's layers, rsLoRA, DoRA, a bfloat16 base, adapters put together. minilora conformance peft_lora.py"""

from functools import partial
from types import SimpleNamespace

import peft
import plain_torch
import torch


def adapted(base, weight, bias, r, alpha, **options):
    """Put PEFT's layer around a base, which gets these numbers, and return it with the arrays that train."""
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], **options)
    model = peft.get_peft_model(torch.nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0].to(weight.dtype)
    if isinstance(base, torch.nn.Embedding):
        return layer, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    magnitude = [part.weight for part in layer.lora_magnitude_vector.values()]
    return layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, *magnitude


def base_of(weight, bias, channels, **steps):
    if weight.ndim == 2:
        return torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    conv = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d}[weight.ndim]
    return conv(channels, len(weight), tuple(weight.shape[2:]), bias=bias is not None, **steps)


def module(weight, bias, A, B, alpha, *magnitude, table=False, steps=None, **options):
    base = torch.nn.Embedding(*weight.shape) if table else base_of(weight, bias, A.shape[1], **(steps or {}))
    layer, *parts = adapted(base, weight, bias, len(A), alpha, **options)
    for part, numbers in zip(parts, (A, B, *magnitude), strict=True):
        part.data = numbers
    return layer, *parts


def beside_bfloat16(weight, bias, A, B, alpha):
    """Return a layer whose base is in bfloat16; PEFT makes its factors float32."""
    base = base_of(weight, bias, A.shape[1])
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    config = peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"])
    layer = peft.get_peft_model(torch.nn.Sequential(base.bfloat16()), config).base_model.model[0]
    parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for part, numbers in zip(parts, (A, B), strict=True):
        part.data.copy_(numbers)
    return layer, *parts


def on_bfloat16(*arrays):
    layer, *parts = beside_bfloat16(*arrays)
    return lambda x: layer(x.bfloat16()).float(), *parts


def merge_bfloat16(weight, *arrays):
    layer, *_ = beside_bfloat16(*plain_torch.tensors([weight, None, *arrays]))
    layer.merge()
    return layer.base_layer.weight.detach().float().numpy()


def merge(weight, *arrays, module):
    layer, *_ = module(*plain_torch.tensors([weight, None, *arrays]))
    layer.merge()
    return layer.base_layer.weight.detach().numpy()


class Merging:
    """PEFT's layer as it is: merge() and unmerge() change its weight in place."""

    def __init__(self, layer):
        self.layer, self.merge, self.unmerge = layer, layer.merge, layer.unmerge

    def forward(self, x):
        return self.layer(torch.from_numpy(x)).detach().numpy()


def merging(*arrays, module):
    return Merging(module(*plain_torch.tensors(arrays))[0])


def init(in_features, out_features, rank, rng, *more, table=False, **options):
    shape = (in_features, out_features) if table else (out_features, in_features)
    kernel = () if options or not more else more[0]
    weight = torch.from_numpy(more[0] if "use_dora" in options else rng.standard_normal(shape + kernel))
    base = torch.nn.Embedding(*shape) if table else base_of(weight, None, in_features)
    return [part.detach().numpy() for part in adapted(base, weight, None, rank, 1, **options)[1:]]


def functions(**options):
    made = partial(module, **options)
    found = {name: partial(getattr(plain_torch, name), module=made) for name in ("forward", "backward")}
    return {
        **found,
        "merge": partial(merge, module=made),
        "merging": partial(merging, module=made),
        "init": partial(init, **options),
    }


def forward_conv(x, *arrays, stride, padding, dilation, groups):
    steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return plain_torch.forward(x, *arrays, module=partial(module, steps=steps))


def backward_conv(dy, x, *arrays, stride, padding, dilation, groups):
    steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return plain_torch.backward(dy, x, *arrays, module=partial(module, steps=steps))


def combined(As, Bs, alphas, use_rslora, weights, rank=None, *, kind):
    """Return the change of weight of what add_weighted_adapter makes; "linear" alone is what it does with one."""
    base, names = torch.nn.Linear(As[0].shape[1], len(Bs[0]), bias=False), []
    for A, alpha, root in zip(As, alphas, use_rslora, strict=True):
        config = peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"], use_rslora=root)
        names.append(f"adapter_{len(names)}")
        if len(names) == 1:
            model = peft.get_peft_model(torch.nn.Sequential(base), config, names[0], autocast_adapter_dtype=False)
        else:
            model.add_adapter(names[-1], config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    for name, A, B in zip(names, As, Bs, strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = torch.from_numpy(A), torch.from_numpy(B)
    model.add_weighted_adapter(names, weights, "new", combination_type=kind, svd_rank=rank)
    return layer.get_delta_weight("new").detach().numpy()


globals().update(functions())
convolution = SimpleNamespace(**{**functions(), "forward": forward_conv, "backward": backward_conv})
kinds = {
    "rslora": SimpleNamespace(**functions(use_rslora=True)),
    "dora": SimpleNamespace(**functions(use_dora=True)),
    "embedding": SimpleNamespace(**functions(table=True)),
    "conv1d": convolution,
    "conv2d": convolution,
    "mixed": SimpleNamespace(
        forward=partial(plain_torch.forward, module=on_bfloat16),
        backward=partial(plain_torch.backward, module=on_bfloat16),
        merge=merge_bfloat16,
        init=init,
    ),
    "combine": SimpleNamespace(
        **{kind: partial(combined, kind=kind) for kind in ("cat", "linear", "svd")},
        dtype="float32",  # in which PEFT takes the weights
    ),
}
