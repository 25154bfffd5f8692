"""lora-pytorch's LoRA; its first factor holds alpha / r. minilora conformance lora_pytorch_lora.py"""

from functools import partial
from types import SimpleNamespace

import plain_torch
import torch
from lora_pytorch import LoRA


def adapted(base, weight, bias, r):
    """Put LoRA around a base, which gets these numbers; return it with its factors."""
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    layer = LoRA.from_module(base, rank=r)
    return layer, *(part for _, part in layer.lora_module.named_parameters())


def base_of(weight, bias, table=False, **steps):
    if table:
        return torch.nn.Embedding(*weight.shape)
    if weight.ndim == 2:
        return torch.nn.Linear(weight.shape[1], len(weight), bias is not None)
    conv = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d}[weight.ndim]
    return conv(weight.shape[1], len(weight), tuple(weight.shape[2:]), bias=bias is not None, **steps)


def module(weight, bias, A, B, alpha, steps=None, table=False):
    layer, down, up = adapted(base_of(weight, bias, table, **(steps or {})), weight, bias, len(A))
    A = alpha / len(A) * A
    down.data, up.data = (A, B) if A.ndim > 2 else (A.T, B.T)
    return layer, down, up


def turned(array):
    return array if array.ndim > 2 else array.T


def backward(dy, x, *arrays, module=module):
    grads = plain_torch.backward(dy, x, *arrays, module=module)
    s = arrays[-1] / len(arrays[2])
    return {"x": grads["x"], "lora_A": s * turned(grads["lora_A"]), "lora_B": turned(grads["lora_B"])}


def init(in_features, out_features, rank, rng, kernel=(), table=False):
    shape = (in_features, out_features) if table else (out_features, in_features, *kernel)
    weight = torch.from_numpy(rng.standard_normal(shape))
    return [turned(part.detach().numpy()) for part in adapted(base_of(weight, None, table), weight, None, rank)[1:]]


def forward_conv(x, *arrays, stride, padding, dilation):
    steps = {"stride": stride, "padding": padding, "dilation": dilation}
    return plain_torch.forward(x, *arrays, module=partial(module, steps=steps))


def backward_conv(dy, x, *arrays, stride, padding, dilation):
    steps = {"stride": stride, "padding": padding, "dilation": dilation}
    return backward(dy, x, *arrays, module=partial(module, steps=steps))


forward = partial(plain_torch.forward, module=module)
table = partial(module, table=True)
convolution = SimpleNamespace(forward=forward_conv, backward=backward_conv, init=init)
kinds = {
    "embedding": SimpleNamespace(
        forward=partial(plain_torch.forward, module=table),
        backward=partial(backward, module=table),
        init=partial(init, table=True),
    ),
    "conv1d": convolution,
    "conv2d": convolution,
}
