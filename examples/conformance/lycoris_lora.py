"""LyCORIS's LoCon, of linear layers and convolutions, and its DoRA. minilora conformance lycoris_lora.py"""

from functools import partial
from types import SimpleNamespace

import plain_torch
import torch
from lycoris.modules.locon import LoConModule


def base_of(weight, bias, **steps):
    if weight.ndim == 2:
        base = torch.nn.Linear(weight.shape[1], len(weight), bias is not None)
    else:
        conv = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d}[weight.ndim]
        base = conv(weight.shape[1], len(weight), tuple(weight.shape[2:]), bias=bias is not None, **steps)
    base.weight.data = weight
    if bias is not None:
        base.bias.data = bias
    return base.requires_grad_(False)


def module(weight, bias, A, B, alpha, *magnitude, steps=None, **options):
    base = base_of(weight, bias, **(steps or {}))
    layer = LoConModule("lora", base, 1.0, len(A), alpha, weight_decompose=bool(magnitude), **options).to(weight.dtype)
    parts = [layer.lora_down.weight, layer.lora_up.weight, *([layer.dora_scale] if magnitude else [])]
    for part, numbers in zip(parts, (A, B, *magnitude), strict=True):
        part.data = numbers.reshape(part.shape)
    return layer, *parts


def backward(dy, x, *arrays, module):
    grads = plain_torch.backward(dy, x, *arrays, module=module)
    return grads | ({"magnitude": grads["magnitude"].ravel()} if "magnitude" in grads else {})


def merge(weight, *arrays, module):
    layer, *_ = module(*plain_torch.tensors([weight, None, *arrays]))
    return layer.get_merged_weight()[0].detach().numpy()


def init(in_features, out_features, rank, rng, *more):
    kernel = more[0] if more and isinstance(more[0], tuple) else ()
    weight = more[0] if more and not kernel else rng.standard_normal((out_features, in_features, *kernel))
    base = base_of(torch.from_numpy(weight).float(), None)
    layer = LoConModule("lora", base, 1.0, rank, 1, weight_decompose=bool(more) and not kernel)
    parts = [layer.lora_down.weight, layer.lora_up.weight, *([layer.dora_scale] if layer.wd else [])]
    return [part.detach().numpy() for part in parts]


def functions(**options):
    made = partial(module, **options)
    return {
        "forward": partial(plain_torch.forward, module=made),
        "backward": partial(backward, module=made),
        "merge": partial(merge, module=made),
        "init": init,
    }


def forward_conv(x, *arrays, stride, padding, dilation):
    return functions(steps={"stride": stride, "padding": padding, "dilation": dilation})["forward"](x, *arrays)


def backward_conv(dy, x, *arrays, stride, padding, dilation):
    return functions(steps={"stride": stride, "padding": padding, "dilation": dilation})["backward"](dy, x, *arrays)


globals().update(functions())
convolution = SimpleNamespace(**{**functions(), "forward": forward_conv, "backward": backward_conv})
kinds = {
    "rslora": SimpleNamespace(**functions(rs_lora=True)),
    "dora": SimpleNamespace(**functions(), detached_norm=False),
    "conv1d": convolution,
    "conv2d": convolution,
}
