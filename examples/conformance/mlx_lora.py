"""mlx-lm's LoRALinear, LoRAEmbedding and DoRALinear; its scale is alpha / r. minilora conformance mlx_lora.py"""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

mx.set_default_device(mx.cpu)
orientation, dtype = "out, in", "float32"


def module(cls, weight, bias, A, B, alpha, *magnitude):
    weight = mx.array(weight)
    if cls is LoRAEmbedding:
        base = nn.Embedding(*weight.shape)
    else:
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    base.weight = weight
    if bias is not None:
        base.bias = mx.array(bias)
    layer = cls.from_base(base, r=len(A), scale=alpha / len(A))
    layer.lora_a, layer.lora_b = mx.array(A.T), mx.array(B.T)
    if magnitude:
        layer.m = mx.array(magnitude[0])
    return layer


def functions(cls, base_type=nn.Linear):
    def forward(x, *arrays):
        return np.array(module(cls, *arrays)(mx.array(x)))

    def backward(dy, x, *arrays):
        layer = module(cls, *arrays)
        names = ["lora_a", "lora_b"] + ["m"] * (cls is DoRALinear)
        ids = x.dtype.kind == "i"

        def apply(*p):
            for name, value in zip(names, p if ids else p[1:], strict=True):
                layer[name] = value
            return layer(mx.array(x) if ids else p[0])

        _, grads = mx.vjp(apply, ([] if ids else [mx.array(x)]) + [layer[name] for name in names], [mx.array(dy)])
        A, B, *more = map(np.array, grads if ids else grads[1:])
        found = {"lora_A": A.T, "lora_B": B.T, **({"magnitude": more[0]} if more else {})}
        return found if ids else {"x": np.array(grads[0]), **found}

    def merge(weight, *arrays):
        return np.array(module(cls, weight, None, *arrays).fuse().weight)

    def init(in_features, out_features, rank, rng, *weight):
        base = nn.Embedding(in_features, out_features) if cls is LoRAEmbedding else nn.Linear(in_features, out_features)
        if weight:
            base.weight = mx.array(weight[0])
        layer = cls.from_base(base, r=rank)
        parts = [np.array(layer.lora_a).T, np.array(layer.lora_b).T]
        return [*parts, np.array(layer.m)] if weight else parts

    return {"forward": forward, "backward": backward, "merge": merge, "init": init}


globals().update(functions(LoRALinear))
kinds = {
    "dora": SimpleNamespace(**functions(DoRALinear), dtype=dtype),
    "embedding": SimpleNamespace(**functions(LoRAEmbedding), dtype=dtype),
}
