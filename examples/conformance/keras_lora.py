"""Keras's Dense and Embedding with enable_lora, on JAX. minilora conformance keras_lora.py"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from types import SimpleNamespace

import jax
import keras
import numpy as np

jax.config.update("jax_enable_x64", True)
orientation = "in, out"


def module(weight, bias, A, B, alpha, table=False):
    """Return a layer and the names of its variables for A and B."""
    if table:
        layer, name = keras.layers.Embedding(*weight.shape, dtype=weight.dtype.name), "embeddings"
    else:
        layer = keras.layers.Dense(weight.shape[1], use_bias=bias is not None, dtype=weight.dtype.name)
        name = "kernel"
    layer.build((None, len(weight)))
    getattr(layer, f"_{name}").assign(weight)
    if bias is not None:
        layer.bias.assign(bias)
    layer.enable_lora(len(B), lora_alpha=alpha)
    parts = getattr(layer, f"lora_{name}_a"), getattr(layer, f"lora_{name}_b")
    for part, numbers in zip(parts, (A, B), strict=True):
        part.assign(numbers)
    return layer, parts, name


def functions(table):
    def forward(x, *arrays):
        return np.asarray(module(*arrays, table=table)[0](x))

    def backward(dy, x, *arrays):
        layer, parts, _ = module(*arrays, table=table)

        def apply(x, A, B):
            at = {id(parts[0]): A, id(parts[1]): B}
            trained = [at.get(id(v), v.value) for v in layer.trainable_variables]
            return layer.stateless_call(trained, [v.value for v in layer.non_trainable_variables], x)[0]

        values = (part.value for part in parts)
        if table:
            _, vjp = jax.vjp(lambda *p: apply(x, *p), *values)
            return dict(zip(("lora_A", "lora_B"), map(np.asarray, vjp(dy)), strict=True))
        _, vjp = jax.vjp(apply, x, *values)
        return dict(zip(("x", "lora_A", "lora_B"), map(np.asarray, vjp(dy)), strict=True))

    def merge(weight, *arrays):
        layer, _, name = module(weight, None, *arrays, table=table)
        return np.asarray(getattr(layer, name))

    def init(in_features, out_features, rank, rng):
        layer = keras.layers.Embedding(in_features, out_features) if table else keras.layers.Dense(out_features)
        layer.build((None, in_features))
        layer.enable_lora(rank)
        name = "embeddings" if table else "kernel"
        return [np.asarray(getattr(layer, f"lora_{name}_{end}").value) for end in "ab"]

    return {"forward": forward, "backward": backward, "merge": merge, "init": init}


globals().update(functions(table=False))
kinds = {"embedding": SimpleNamespace(**functions(table=True), orientation=orientation)}
