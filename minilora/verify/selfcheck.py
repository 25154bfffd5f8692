"""The gradients of this library, checked on this machine: what ``minilora check`` runs.

Every layer is checked in one way: `gradcheck` moves its trainable arrays and its input; its own forward is the
function, its own backward the claim. The layers are those of `minilora.verify.instances`; the losses and the residual
form stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from ..backend import Backend, backend_or_numpy
from ..checks import Array, check_integer
from ..fast import residual_form
from ..layer import Layer
from ..lora import LoRALinear
from ..losses import cross_entropy, mse
from .gradcheck import GradientError, GradReport, gradcheck
from .instances import INSTANCES, Drawing, Row, substitute
from .slopes import Params

SIZES = ((6, 5, 4, 2, 3.0), (3, 2, 7, 1, 0.5), (2, 4, 3, 6, 16.0), (96, 80, 70, 8, 20.0))
"""Rows, in_features, out_features, rank and alpha: thin, wide, of a rank above both widths, and large."""

Claim = tuple[Callable[[Params], Any], Params, Params, Array | None]
"""A function, its parameters, their claimed gradients, and a cotangent where the function returns an array."""


def prove(
    backend: Backend | None = None, seed: int = 0, instances: Mapping[str, Row] | None = None
) -> Iterator[tuple[str, GradReport]]:
    """Check every hand-written gradient at every size.

    Parameters
    ----------
    backend : Backend, optional
        Where to compute; NumPy by default.
    seed : int
        Of the values.
    instances : mapping of str to row, optional
        The layers; those of the book by default. `minilora.language.llamainstance` adds the language model.

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
        drawing = Drawing(n, in_features, out_features, rank, alpha, randn, rng, backend)
        for name, row in (INSTANCES if instances is None else instances).items():
            layer, x = row(drawing)
            yield f"{name}  {at}", _report(*layer_claim(layer, x, randn(*layer(x).shape)))
        for name, claim in (*_losses(drawing), *_residual_forms(drawing)):
            yield f"{name}  {at}", _report(*claim)


def _losses(d: Drawing) -> Iterator[tuple[str, Claim]]:
    """State the gradient of each loss at its prediction."""
    for loss, goal in ((mse, d.randn(d.n, d.out_features)), (cross_entropy, d.ids(d.out_features, d.n))):
        prediction = d.randn(d.n, d.out_features)
        of_prediction = partial(_loss_of, loss, goal)
        yield loss.__name__, (of_prediction, {"y": prediction}, {"y": loss(prediction, goal)[1]}, None)


def _residual_forms(d: Drawing) -> Iterator[tuple[str, Claim]]:
    """State the gradients that `residual_form` gives."""
    with_bias = d.lora_linear(d.in_features, d.out_features)
    without = LoRALinear(d.linear(d.in_features, d.out_features, bias=False), with_bias.adapter)
    target = d.randn(d.n, d.out_features)
    for name, layer in {"LoRA": with_bias.adapter, "LoRALinear": with_bias, "LoRALinear, no bias": without}.items():
        x = d.randn(d.n, d.in_features)
        grads = residual_form(layer, x, target)
        yield f"residual_form of {name}", (partial(_mse_of, layer, x, target), layer.trainable(), grads, None)


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
