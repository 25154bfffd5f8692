"""The gradients of this library, checked on this machine: what ``minilora check`` runs.

Each entry states a function through the library's own forward, and the gradients through its own backward. All values
are Gaussian: at the usual start of LoRA, B = 0, several wrong backwards look right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from ..backend import Backend, backend_or_numpy
from ..checks import Array, check_integer
from ..layer import Layer
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from ..losses import mse
from .gradcheck import GradientError, GradReport, gradcheck
from .slopes import Function, Params

SIZES = ((6, 5, 4, 2), (3, 2, 7, 1), (2, 4, 3, 6), (96, 80, 70, 8))
"""Rows, in_features, out_features and rank of each problem: thin, wide, of a rank above both widths, and large."""

ALPHA = 3.0


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

    for n, in_features, out_features, rank in SIZES:
        x, dy = randn(n, in_features), randn(n, out_features)
        weight, bias = randn(out_features, in_features), randn(out_features)
        lora_A, lora_B = randn(rank, in_features), randn(out_features, rank)

        def linear(p: Params) -> Linear:
            return Linear(p["weight"], p["bias"])

        def lora(p: Params) -> LoRA:
            return LoRA(p["lora_A"], p["lora_B"], ALPHA)

        def lora_linear(p: Params, weight: Array = weight, bias: Array = bias) -> LoRALinear:
            return LoRALinear(Linear(weight, bias), lora(p))

        def loss(p: Params, target: Array = dy) -> Array:
            return mse(p["prediction"], target)[0]

        def loss_of(build: Callable[[Params], Layer], p: Params, x: Array = x, target: Array = dy) -> Array:
            return mse(build(p)(x), target)[0]

        full, factors = {"x": x, "weight": weight, "bias": bias}, {"x": x, "lora_A": lora_A, "lora_B": lora_B}
        at = f"N={n} in={in_features} out={out_features} r={rank}"
        for name, build, params in (
            ("Linear.backward", linear, full),
            ("LoRA.backward", lora, factors),
            ("LoRALinear.backward", lora_linear, factors),
        ):
            layer = build(params)
            dx, grads = layer.backward(dy, layer.forward(x)[1])
            yield f"{name}  {at}", _report(partial(_output, build), params, {"x": dx, **grads}, dy)

        prediction = {"prediction": randn(n, out_features)}
        yield f"mse  {at}", _report(loss, prediction, {"prediction": mse(prediction["prediction"], dy)[1]})
        del factors["x"]
        grads = lora(factors).mse_gradients(x, dy)
        yield f"LoRA.mse_gradients  {at}", _report(partial(loss_of, lora), factors, grads)
        grads = lora_linear(factors).mse_gradients(x, dy)
        yield f"LoRALinear.mse_gradients  {at}", _report(partial(loss_of, lora_linear), factors, grads)


def _output(build: Callable[[Params], Layer], p: Params) -> Array:
    """Return what the layer built from `p` makes of its input."""
    return build(p)(p["x"])


def _report(f: Function, params: Params, grads: Params, cotangent: Array | None = None) -> GradReport:
    """Return what gradcheck found, where it would raise as well."""
    try:
        return gradcheck(f, params, grads, cotangent=cotangent, every_entry_below=100)
    except GradientError as error:
        return error.report
