"""The gradients of this library, checked on this machine: what ``minilora check`` runs.

Every layer is checked in one way: `gradcheck` moves its trainable arrays and its input; its own forward is the
function, its own backward the claim. All values are Gaussian: at the usual start of LoRA, B = 0, several wrong
backwards look right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from ..adaptation import adapt
from ..backend import Backend, backend_of, backend_or_numpy
from ..checks import Array, check_integer
from ..fast import residual_form
from ..layer import Layer, freeze, rebuild
from ..layers.activation import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.convolution import Conv1d, Conv2d
from ..layers.embedding import Embedding
from ..layers.flatten import Flatten
from ..layers.gated import GatedMLP
from ..layers.norm import RMSNorm
from ..layers.rotary import Rotary, frequencies
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from ..losses import cross_entropy, mse
from ..models.llama import Llama
from ..models.llamaconfig import LlamaConfig
from ..models.mlp import MLP
from .gradcheck import GradientError, GradReport, gradcheck
from .slopes import Params

SIZES = ((6, 5, 4, 2, 3.0), (3, 2, 7, 1, 0.5), (2, 4, 3, 6, 16.0), (96, 80, 70, 8, 20.0))
"""Rows, in_features, out_features, rank and alpha: thin, wide, of a rank above both widths, and large."""
HIDDEN = 9

Randn = Callable[..., Array]
Claim = tuple[Callable[[Params], Any], Params, Params, Array | None]
"""A function, its parameters, their claimed gradients, and a cotangent where the function returns an array."""


def prove(backend: Backend | None = None, seed: int = 0) -> Iterator[tuple[str, GradReport]]:
    """Check every hand-written gradient at every size.

    Parameters
    ----------
    backend : Backend, optional
        Where to compute; NumPy by default.
    seed : int
        Of the values.

    Yields
    ------
    title : str
        What was checked, and at which size.
    report : GradReport
        What was found, whether right or wrong.
    """
    backend = backend_or_numpy(backend)
    rng = np.random.default_rng(check_integer("seed", seed, at_least=0))

    def randn(*shape: int) -> Array:
        return backend.asarray(rng.standard_normal(shape))

    for n, in_features, out_features, rank, alpha in SIZES:
        at = f"N={n} in={in_features} out={out_features} r={rank} alpha={alpha:g}"
        ids = backend.asarray(rng.integers(0, out_features, n))
        sizes = n, in_features, out_features, rank
        of_language = _language(randn, *sizes)
        for name, claim in (*_claims(randn, *sizes, alpha, ids), *_variants(randn, *sizes, ids), *of_language):
            yield f"{name}  {at}", _report(*claim)


def _claims(
    randn: Randn, n: int, in_features: int, out_features: int, rank: int, alpha: float, ids: Array
) -> Iterator[tuple[str, Claim]]:
    """State each gradient of this library at one size."""

    def linear(n_in: int, n_out: int, *, bias: bool = True) -> Linear:
        return Linear(randn(n_out, n_in), randn(n_out) if bias else None)

    def lora(n_in: int, n_out: int) -> LoRA:
        return LoRA(randn(rank, n_in), randn(n_out, rank), alpha)

    def lora_linear(n_in: int, n_out: int, *, bias: bool = True) -> LoRALinear:
        return LoRALinear(linear(n_in, n_out, bias=bias), lora(n_in, n_out))

    def mlp(fc1: Layer, fc2: Layer, activation: str) -> MLP:
        return MLP(fc1=fc1, act=ACTIVATIONS[activation](), fc2=fc2)

    widths, inner, outer = (in_features, out_features), (in_features, HIDDEN), (HIDDEN, out_features)
    layers: dict[str, Layer] = {
        "Linear": linear(*widths),
        "Linear, no bias": linear(*widths, bias=False),
        "LoRA": lora(*widths),
        "LoRALinear": lora_linear(*widths),
        **{cls.__name__: cls() for cls in ACTIVATIONS.values()},
        "MLP": mlp(linear(*inner), linear(*outer), "silu"),
        "MLP, LoRA on fc1": mlp(lora_linear(*inner), freeze(linear(*outer)), "silu"),
        "MLP, LoRA on fc2": mlp(linear(*inner), lora_linear(*outer), "relu"),
    }
    for name, layer in layers.items():
        x = randn(n, in_features) / 4  # small, so that the MLPs are not flat there
        yield name, layer_claim(layer, x, randn(*layer(x).shape))

    target = randn(n, out_features)
    for loss, goal in ((mse, target), (cross_entropy, ids)):
        prediction = randn(n, out_features)
        of_prediction = partial(_loss_of, loss, goal)
        yield loss.__name__, (of_prediction, {"y": prediction}, {"y": loss(prediction, goal)[1]}, None)

    factored: dict[str, LoRA | LoRALinear] = {
        "LoRA": lora(*widths),
        "LoRALinear": lora_linear(*widths),
        "LoRALinear, no bias": lora_linear(*widths, bias=False),
    }
    for name, layer in factored.items():
        x = randn(n, in_features)
        of_factors = partial(_mse_of, layer, x, target)
        grads = residual_form(layer, x, target)
        yield f"residual_form of {name}", (of_factors, layer.trainable(), grads, None)


def _variants(
    randn: Randn, n: int, in_features: int, out_features: int, rank: int, ids: Array
) -> Iterator[tuple[str, Claim]]:
    """State the gradients of layers that rewrite their input, and of the adapters beside them."""
    channels, filters = min(in_features, 2), min(out_features, 3)  # every entry of an image counts
    steps: dict[str, Any] = {"padding": 1, "dilation": 2}
    sequences, images = randn(min(n, 2), channels, 5), randn(min(n, 2), channels, 5, 4)
    rewritten: dict[str, tuple[Layer, Array]] = {
        "Embedding": (Embedding(randn(out_features, in_features)), ids),
        "Conv1d": (Conv1d(randn(filters, channels, 3), randn(filters), stride=2, **steps), sequences),
        "Conv2d": (Conv2d(randn(filters, channels, 3, 2), randn(filters), stride=(2, 1), **steps), images),
        "Flatten": (Flatten(), images),
    }
    for name, (layer, x) in rewritten.items():
        yield name, layer_claim(layer, x, randn(*layer(x).shape))
    # The constant norm's gradient is not the slope of the forward, so the full one is what can be checked here.
    rewritten["Linear"] = Linear(randn(out_features, in_features)), randn(n, in_features)
    variants: dict[str, dict[str, Any]] = {"LoRA": {}, "DoRA": {"use_dora": True, "dora_norm": "full"}}
    for name, (layer, x) in rewritten.items():
        for variant, options in variants.items() if name != "Flatten" else ():
            adapted = adapt(layer, "", rank=rank, alpha=rank / 4, rng=np.random.default_rng(0), **options)
            moved = substitute(adapted, {key: p + randn(*p.shape) / 4 for key, p in adapted.trainable().items()})
            yield f"{name}, {variant}", layer_claim(moved, x, randn(*moved(x).shape))


def _language(randn: Randn, n: int, in_features: int, out_features: int, rank: int) -> Iterator[tuple[str, Claim]]:
    """State the gradients of a language model's layers, and of a decoder with adapters in its lowest and last block."""
    K, g, D = 2, 1 + rank % 3, 4  # key heads, query heads of each, and a head's width
    q, kv, m = K * g * D, K * D, HIDDEN

    def linear(n_in: int, n_out: int) -> Linear:
        return Linear(randn(n_out, n_in) / n_in**0.5, randn(n_out))  # so that no softmax is flat

    in_features, out_features = min(in_features, 7), min(out_features, 7)  # every entry counts
    rotary, x = Rotary(frequencies(D, 100.0)), randn(min(n, 2), 3, in_features)
    four = (linear(in_features, q), linear(in_features, kv), linear(in_features, kv), linear(q, out_features))
    layers: dict[str, tuple[Layer, Array]] = {
        "RMSNorm": (RMSNorm(randn(in_features), 0.1), x),
        "Rotary": (rotary, randn(min(n, 2), 3, D)),
        "Attention": (Attention(*four, rotary), x),
        "GatedMLP": (GatedMLP(linear(in_features, m), linear(in_features, m), linear(m, in_features)), x),
    }
    config = LlamaConfig(
        vocab_size=out_features, hidden_size=in_features, intermediate_size=m, num_hidden_layers=2,
        num_attention_heads=K * g, num_key_value_heads=K, head_dim=D, rms_norm_eps=0.1,
        frequencies=rotary.frequencies, tie_word_embeddings=True,
    )  # fmt: skip
    arrays = {name: randn(*shape) / shape[-1] ** 0.5 for name, shape in config.shapes().items()}
    llama = Llama.build(config, arrays)
    targets = ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    adapted = adapt(llama, targets, rank=min(rank, 2), alpha=rank, rng=np.random.default_rng(0))
    moved = substitute(adapted, {key: p + randn(*p.shape) / 4 for key, p in adapted.trainable().items()})
    text = backend_of(x).xp.arange(3)[None]  # all differ: of equal values any query reads the same
    for name, (layer, given) in (layers | {"Llama, LoRA": (moved, text)}).items():
        yield name, layer_claim(layer, given, randn(*layer(given).shape))


def layer_claim(layer: Layer, x: Array, dy: Array) -> Claim:
    """State that a layer's backward gives the slopes of its forward, at the input and at all that trains.

    Parameters
    ----------
    layer : Layer
        Any layer or model.
    x : array
        Its input. Token ids have no slope and are left out.
    dy : array, of the output's shape
        The gradient of a loss at the output.

    Returns
    -------
    tuple
        The function, its parameters, the claimed gradients and the cotangent, as `gradcheck` takes them.
    """
    dx, grads = layer.backward(dy, layer.forward(x)[1])
    inputs, at_inputs = ({}, {}) if dx is None else ({"x": x}, {"x": dx})

    def output(p: Params) -> Array:
        return substitute(layer, p)(p.get("x", x))

    return output, inputs | layer.trainable(), at_inputs | grads, dy


def substitute(layer: Layer, arrays: Params) -> Layer:
    """Return a copy of a layer with other arrays in place of those that train, under their names."""
    other = {id(p): arrays[name] for name, p in layer.trainable().items()}
    return rebuild(layer, array=lambda a: other.get(id(a), a))  # type: ignore[no-any-return]


def _loss_of(loss: Callable[[Array, Array], tuple[Array, Array]], target: Array, p: Params) -> Array:
    return loss(p["y"], target)[0]


def _mse_of(layer: Layer, x: Array, target: Array, p: Params) -> Array:
    return mse(substitute(layer, p)(x), target)[0]


def _report(f: Callable[[Params], Any], params: Params, grads: Params, cotangent: Array | None) -> GradReport:
    """Return what gradcheck found, where it would raise as well."""
    try:
        return gradcheck(f, params, grads, cotangent=cotangent, method="complex", every_entry_below=100)
    except GradientError as error:
        return error.report
