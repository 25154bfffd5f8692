"""Flax's nnx.LoRALinear, which has no alpha. minilora conformance flax_lora.py"""

import jax
import numpy as np
from flax import nnx

jax.config.update("jax_enable_x64", True)
orientation, scaling = "in, out", "1"


def new(n_in, n_out, rank, **options):
    return nnx.LoRALinear(n_in, n_out, lora_rank=rank, rngs=nnx.Rngs(0), **options)


def apply(x, A, B, weight, bias):
    double = {"param_dtype": weight.dtype, "lora_param_dtype": weight.dtype}
    layer = new(*weight.shape, len(B), use_bias=bias is not None, **double)
    layer.kernel[...], layer.lora.lora_a[...], layer.lora.lora_b[...] = weight, A, B
    if bias is not None:
        layer.bias[...] = bias
    return layer(x)


def forward(x, weight, bias, A, B, alpha):
    return np.asarray(apply(x, A, B, weight, bias))


def backward(dy, x, weight, bias, A, B, alpha):
    _, vjp = jax.vjp(lambda *p: apply(*p, weight, bias), x, A, B)
    return dict(zip(("x", "lora_A", "lora_B"), map(np.asarray, vjp(dy)), strict=True))


def init(in_features, out_features, rank, rng):
    lora = new(in_features, out_features, rank).lora
    return np.asarray(lora.lora_a[...]), np.asarray(lora.lora_b[...])
