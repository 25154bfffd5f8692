"""Small instances of all layers, with the check of their gradients that ``minilora check`` runs.

`INSTANCES` is the list, one row each; `minilora.cli.check` adds the language model. `prove` checks every row in one
way: `gradcheck` moves the layer's trainable arrays and its input; its own forward is the function, its own backward the
claim. The tests hold the rows against a second forward in loops and against the same on other devices. A test compares
the list with every subclass of `Layer` in the package, so a new layer without a row fails.

A row is a function of a `Drawing`. All its values are Gaussian: at the usual start of LoRA, B = 0, several wrong
backwards look right. Weights are divided where an activation or a softmax would be flat otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..adaptation import adapt
from ..backend import Backend, backend_or_numpy
from ..checks import Array, check_integer
from ..fast import residual_form
from ..fast.blockwise import Blocks, BlockwiseAttention
from ..fast.experts_by_rows import ExpertsByRows
from ..layer import Layer, freeze, rebuild
from ..layers.activation import ACTIVATIONS
from ..layers.attention import Attention
from ..layers.convolution import Conv1d, Conv2d
from ..layers.embedding import Embedding
from ..layers.experts import Experts
from ..layers.flatten import Flatten
from ..layers.gated import GatedMLP
from ..layers.mixture import MixtureOfExperts
from ..layers.mlp import MLP
from ..layers.norm import RMSNorm
from ..layers.quantized import QuantizedLinear
from ..layers.rotary import Rotary, frequencies
from ..layers.router import Router
from ..layers.stacked import StackedLinear
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from ..losses import cross_entropy, mse
from ..variants.dropout import DroppingLoRALinear
from ..variants.stackedlora import StackedLoRA, StackedLoRALinear
from .gradcheck import GradientError, GradReport, Params, gradcheck

INSTANCE_SIZES = ((6, 5, 4, 2, 3.0), (3, 2, 7, 1, 0.5), (2, 4, 3, 6, 16.0), (96, 80, 70, 8, 20.0))
"""Rows, in_features, out_features, rank and alpha: thin, wide, with a rank above both widths, and large."""
HIDDEN = 9
EPS = 0.3  # the norms' eps, large enough to matter
ROTARY_BASE = 50.0  # the base of the rotations
CLEAR = 0.05  # the margins between the scores of a router's kept experts, and to the first other one


@dataclass(frozen=True)
class Drawing:
    """The sizes of an instance, with the source of its values; numbers such as that of heads are drawn too."""

    n: int  # rows
    in_features: int
    out_features: int
    rank: int
    alpha: float
    randn: Callable[..., Array]  # randn(*shape) returns Gaussian values
    rng: np.random.Generator  # draws integers, on the host
    backend: Backend | None = None  # the backend of ids; NumPy by default
    bias: bool = True  # whether linear layers inside others have a bias

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high."""
        return int(self.rng.integers(low, high, endpoint=True))

    def ids(self, count: int, *shape: int) -> Array:
        """Return integers from 0 to count - 1."""
        return backend_or_numpy(self.backend).asarray(self.rng.integers(0, count, shape))

    def linear(self, n_in: int, n_out: int, *, bias: bool = True, divided_by: float = 1.0) -> Linear:
        """Return a linear layer."""
        return Linear(self.randn(n_out, n_in) / divided_by, self.randn(n_out) / divided_by if bias else None)

    def lora_linear(self, n_in: int, n_out: int) -> LoRALinear:
        """Return a linear layer with an adapter."""
        adapter = LoRA(self.randn(self.rank, n_in), self.randn(n_out, self.rank), self.alpha)
        return LoRALinear(self.linear(n_in, n_out), adapter)


Row = Callable[[Drawing], tuple[Layer, Array]]
"""Returns a layer and an input for it."""


# --- linear layers, activations, and models of them ---


def _linear(d: Drawing, *, bias: bool = True) -> tuple[Layer, Array]:
    return d.linear(d.in_features, d.out_features, bias=bias), d.randn(d.n, d.in_features)


def _lora(d: Drawing) -> tuple[Layer, Array]:
    A, B = d.randn(d.rank, d.in_features), d.randn(d.out_features, d.rank)
    return LoRA(A, B, d.alpha), d.randn(d.n, d.in_features)


def _lora_linear(d: Drawing) -> tuple[Layer, Array]:
    return d.lora_linear(d.in_features, d.out_features), d.randn(d.n, d.in_features)


def _dropping(d: Drawing) -> tuple[Layer, Array]:
    """Return an adapted layer with a mask; every row of x is a sequence with its own key."""
    layer = d.lora_linear(d.in_features, d.out_features)
    keys = tuple(int(key) for key in d.rng.integers(1 << 63, size=d.n))
    return DroppingLoRALinear(layer.base, layer.adapter, 0.4, keys), d.randn(d.n, d.in_features)


def _activation(cls: type[Layer]) -> Row:
    return lambda d: (cls(), d.randn(d.n, d.in_features))


def _mlp(d: Drawing) -> tuple[Layer, Array]:
    return _two_layers(d, d.linear(d.in_features, HIDDEN), d.linear(HIDDEN, d.out_features), "silu")


def _mlp_adapted_below(d: Drawing) -> tuple[Layer, Array]:
    return _two_layers(d, d.lora_linear(d.in_features, HIDDEN), freeze(d.linear(HIDDEN, d.out_features)), "silu")


def _mlp_adapted_above(d: Drawing) -> tuple[Layer, Array]:
    return _two_layers(d, d.linear(d.in_features, HIDDEN), d.lora_linear(HIDDEN, d.out_features), "relu")


def _two_layers(d: Drawing, fc1: Layer, fc2: Layer, activation: str) -> tuple[Layer, Array]:
    x = d.randn(d.n, d.in_features) / 4  # small, where the activation is not flat
    return MLP(fc1=fc1, act=ACTIVATIONS[activation](), fc2=fc2), x


def _quantized(d: Drawing) -> tuple[Layer, Array]:
    linear = d.linear(d.in_features, d.out_features, bias=d.bias)
    return QuantizedLinear.from_linear(linear, block_size=32), d.randn(d.n, d.in_features)


# --- layers that rewrite their input to rows ---


def _embedding(d: Drawing) -> tuple[Layer, Array]:
    return Embedding(d.randn(d.out_features, d.in_features)), d.ids(d.out_features, d.n)


def _conv1d(d: Drawing) -> tuple[Layer, Array]:
    channels, filters = min(d.in_features, 2), min(d.out_features, 3)  # every entry of an image is checked
    layer = Conv1d(d.randn(filters, channels, 3), d.randn(filters), stride=2, padding=1, dilation=2)
    return layer, d.randn(min(d.n, 2), channels, 5)


def _conv2d(d: Drawing) -> tuple[Layer, Array]:
    channels, filters = min(d.in_features, 2), min(d.out_features, 3)
    layer = Conv2d(d.randn(filters, channels, 3, 2), d.randn(filters), stride=(2, 1), padding=1, dilation=2)
    return layer, d.randn(min(d.n, 2), channels, 5, 4)


def _flatten(d: Drawing) -> tuple[Layer, Array]:
    return Flatten(), d.randn(min(d.n, 2), min(d.in_features, 2), 5, 4)


def _adapted(row: Row, **options: Any) -> Row:
    """Return the instance with an adapter, moved away from its initial values."""

    def adapted(d: Drawing) -> tuple[Layer, Array]:
        layer, x = row(d)
        with warnings.catch_warnings():  # of ranks above a width, which some have on purpose
            warnings.simplefilter("ignore", UserWarning)
            adapted = adapt(layer, "", rank=d.rank, alpha=d.rank / 4, rng=d.rng, **options)
        return moved(d, adapted), x

    return adapted


# With a constant norm the gradient is not the slope of the forward, so the full gradient is checked.
DORA_OPTIONS = {"use_dora": True, "dora_norm": "full"}


# --- a language model's layers ---


def _norm(d: Drawing) -> tuple[Layer, Array]:
    width = min(d.in_features, 7)  # every entry is checked
    return RMSNorm(d.randn(width), EPS), _sequences(d, width)


def _rotary(d: Drawing) -> tuple[Layer, Array]:
    D = 2 * d.integer(1, 2)
    return Rotary(frequencies(D, ROTARY_BASE)), _sequences(d, D)


def _attention(
    d: Drawing, cls: type[Attention] = Attention, *, normed: bool = False, **more: Any
) -> tuple[Layer, Array]:
    n_in, n_out = min(d.in_features, 7), min(d.out_features, 7)
    K, g, D = d.integer(1, 2), d.integer(1, 3), 2 * d.integer(1, 2)
    widths = ((n_in, K * g * D), (n_in, K * D), (n_in, K * D), (K * g * D, n_out))
    q, k, v, o = (d.linear(*pair, bias=d.bias, divided_by=2) for pair in widths)
    norms = [RMSNorm(d.randn(D), EPS) for _ in range(2 * normed)]
    return cls(q, k, v, o, Rotary(frequencies(D, ROTARY_BASE)), *norms, **more), _sequences(d, n_in)


def _gated(d: Drawing) -> tuple[Layer, Array]:
    n_in, m = min(d.in_features, 7), min(d.out_features, 7) + 1
    gate, up, down = (d.linear(*pair, bias=d.bias, divided_by=2) for pair in ((n_in, m), (n_in, m), (m, n_in)))
    return GatedMLP(gate, up, down), _sequences(d, n_in)


def _router(d: Drawing, *, renormalised: bool = True) -> tuple[Router, Array]:
    """Return a router that keeps at least two experts: with a renormalised single one there is no gradient."""
    n_in, E = min(d.in_features, 7), d.integer(3, 5)
    top_k = d.integer(2, E - 1)
    return _clear(lambda: (Router(StackedLinear(d.randn(E, n_in)), top_k, renormalised), _sequences(d, n_in)))


def _mixture(
    d: Drawing, kind: Callable[..., Experts] = Experts, *, shared: bool = False
) -> tuple[MixtureOfExperts, Array]:
    """Return a mixture: renormalised without a shared expert, like Mixtral, or with one, like Qwen2-MoE."""
    router, x = _router(d, renormalised=not shared)
    n_in, m, E = router.in_features, min(d.out_features, 6) + 1, router.experts
    experts = kind(StackedLinear(d.randn(E, 2 * m, n_in) / 2), StackedLinear(d.randn(E, n_in, m) / 2))
    if not shared:
        return MixtureOfExperts(router, experts), x
    pairs = ((n_in, m - 1), (n_in, m - 1), (m - 1, n_in), (n_in, 1))
    gate, up, down, opening = (d.linear(*pair, bias=False, divided_by=2) for pair in pairs)
    return MixtureOfExperts(router, experts, GatedMLP(gate, up, down), opening), x


def _mixture_adapted(d: Drawing) -> tuple[MixtureOfExperts, Array]:
    """Return a mixture in which only adapters of the router's and the experts' parameters train."""

    def beside(path: str, layer: Any) -> Layer:
        if not isinstance(layer, StackedLinear):
            return layer  # type: ignore[no-any-return]
        (n_out, n_in), E, r = layer.shape, layer.experts, min(d.rank, 3)
        factors = d.randn(E * r, n_in) / 4, d.randn(n_out, r * E) / 4
        return StackedLoRALinear(layer, StackedLoRA(*factors, d.alpha / 4, experts=E))

    def draw() -> tuple[MixtureOfExperts, Array]:
        mixture, x = _mixture(d)
        return rebuild(freeze(mixture), layer=beside), x

    return _clear(draw)


Routed = TypeVar("Routed", Router, MixtureOfExperts)


def _clear(draw: Callable[[], tuple[Routed, Array]]) -> tuple[Routed, Array]:
    """Draw until no row is close to a change of the router's choice or order, where there is no slope."""
    while True:
        layer, x = draw()
        router = layer if isinstance(layer, Router) else layer.gate
        scores = router.weight(x.reshape(-1, router.in_features))
        scores.sort(axis=1)
        highest = scores[:, -router.top_k - 1 :]
        if float((highest[:, 1:] - highest[:, :-1]).min()) > CLEAR:
            return layer, x


def _sequences(d: Drawing, width: int) -> Array:
    """Return one or two sequences, since every entry is moved to measure its slope."""
    return d.randn(min(d.n, 2), 3 + d.n % 2, width)


INSTANCES: dict[str, Row] = {
    "Linear": _linear,
    "Linear, no bias": lambda d: _linear(d, bias=False),
    "LoRA": _lora,
    "LoRALinear": _lora_linear,
    "LoRALinear, dropout": _dropping,
    **{cls.__name__: _activation(cls) for cls in ACTIVATIONS.values()},
    "MLP": _mlp,
    "MLP, LoRA on fc1": _mlp_adapted_below,
    "MLP, LoRA on fc2": _mlp_adapted_above,
    "Embedding": _embedding,
    "Conv1d": _conv1d,
    "Conv2d": _conv2d,
    "Flatten": _flatten,
    "Embedding, LoRA": _adapted(_embedding),
    "Embedding, DoRA": _adapted(_embedding, **DORA_OPTIONS),
    "Conv1d, LoRA": _adapted(_conv1d),
    "Conv1d, DoRA": _adapted(_conv1d, **DORA_OPTIONS),
    "Conv2d, LoRA": _adapted(_conv2d),
    "Conv2d, DoRA": _adapted(_conv2d, **DORA_OPTIONS),
    "Linear, LoRA": _adapted(lambda d: _linear(d, bias=False)),
    "Linear, DoRA": _adapted(lambda d: _linear(d, bias=False), **DORA_OPTIONS),
    "QuantizedLinear": _quantized,
    "QuantizedLinear, LoRA": _adapted(_quantized),
    "QuantizedLinear, DoRA": _adapted(_quantized, **DORA_OPTIONS),
    "RMSNorm": _norm,
    "Rotary": _rotary,
    "Attention": _attention,
    "Attention, by blocks": lambda d: _attention(d, BlockwiseAttention, blocks=Blocks(2, 3, plain_up_to=0)),
    "Attention, q and k normed": lambda d: _attention(d, normed=True),
    "GatedMLP": _gated,
    "Router": _router,
    "Router, over all": lambda d: _router(d, renormalised=False),
    "MixtureOfExperts": _mixture,
    "MixtureOfExperts, shared expert": lambda d: _mixture(d, shared=True),
    "MixtureOfExperts, LoRA": _mixture_adapted,
    "MixtureOfExperts, by rows": lambda d: _mixture(d, partial(ExpertsByRows, rows=2)),
}


def substitute(layer: Layer, arrays: Mapping[str, Array]) -> Layer:
    """Return a copy of a layer with other trainable arrays, given by name."""
    other = {id(p): arrays[name] for name, p in layer.trainable().items()}
    return rebuild(layer, array=lambda a: other.get(id(a), a))  # type: ignore[no-any-return]


def moved(d: Drawing, layer: Layer) -> Layer:
    """Return a copy with all trainable arrays moved away from their initial values."""
    return substitute(layer, {name: p + d.randn(*p.shape) / 4 for name, p in layer.trainable().items()})


# --- the check ---

ClaimedGradient = tuple[Callable[[Params], Any], Params, Params, Array | None]
"""A function, its parameters, their claimed gradients, and a cotangent if the function returns an array."""


def prove(
    backend: Backend | None = None, seed: int = 0, instances: Mapping[str, Row] = INSTANCES
) -> Iterator[tuple[str, GradReport]]:
    """Check every hand-written gradient at every size, yielding a name with the size and the report."""
    backend = backend_or_numpy(backend)
    rng = np.random.default_rng(check_integer("seed", seed, at_least=0))

    def randn(*shape: int) -> Array:
        return backend.asarray(rng.standard_normal(shape))

    for n, in_features, out_features, rank, alpha in INSTANCE_SIZES:
        at = f"N={n} in={in_features} out={out_features} r={rank} alpha={alpha:g}"
        drawing = Drawing(n, in_features, out_features, rank, alpha, randn, rng, backend)
        for name, row in instances.items():
            layer, x = row(drawing)
            yield f"{name}  {at}", _report(*layer_claim(layer, x, randn(*layer(x).shape)))
        for name, claim in (*_losses(drawing), *_residual_forms(drawing)):
            yield f"{name}  {at}", _report(*claim)


def _losses(d: Drawing) -> Iterator[tuple[str, ClaimedGradient]]:
    """Yield the gradients of the losses."""
    for loss, goal in ((mse, d.randn(d.n, d.out_features)), (cross_entropy, d.ids(d.out_features, d.n))):
        prediction = d.randn(d.n, d.out_features)
        claimed = loss(prediction, goal)[1]
        yield loss.__name__, (partial(_loss_of, loss, goal), {"y": prediction}, {"y": claimed}, None)


def _residual_forms(d: Drawing) -> Iterator[tuple[str, ClaimedGradient]]:
    """Yield the gradients of `residual_form`."""
    with_bias = d.lora_linear(d.in_features, d.out_features)
    without = LoRALinear(d.linear(d.in_features, d.out_features, bias=False), with_bias.adapter)
    target = d.randn(d.n, d.out_features)
    for name, layer in {"LoRA": with_bias.adapter, "LoRALinear": with_bias, "LoRALinear, no bias": without}.items():
        x = d.randn(d.n, d.in_features)
        grads = residual_form(layer, x, target)
        yield f"residual_form of {name}", (partial(mse_of, layer, x, target), layer.trainable(), grads, None)


def layer_claim(layer: Layer, x: Array, dy: Array) -> ClaimedGradient:
    """Return the claim that a layer's backward gives the slopes of its forward, for the input and all trainable arrays.

    `x` is the layer's input; token ids have no slope and are left out. `dy`, of the output's shape, is the gradient of
    a loss there. Returns the function, its parameters, the claimed gradients and the cotangent: `gradcheck` takes them.
    """
    dx, grads = layer.backward(dy, layer.forward(x)[1])
    inputs, at_inputs = ({}, {}) if dx is None else ({"x": x}, {"x": dx})

    def output(p: Params) -> Array:
        return substitute(layer, p)(p.get("x", x))

    return output, inputs | layer.trainable(), at_inputs | grads, dy


def _loss_of(loss: Callable[[Array, Array], tuple[Array, Array]], target: Array, p: Params) -> Array:
    return loss(p["y"], target)[0]


def mse_of(layer: Layer, x: Array, target: Array, p: Params) -> Array:
    """Return the mean squared error of a layer whose trainable arrays, and its input if it is among them, are p."""
    return mse(substitute(layer, p)(p.get("x", x)), target)[0]


def _report(f: Callable[[Params], Any], params: Params, grads: Params, cotangent: Array | None) -> GradReport:
    """Return the report of gradcheck, even if it would raise."""
    try:
        return gradcheck(f, params, grads, cotangent=cotangent, method="complex", every_entry_below=100)
    except GradientError as error:
        return error.report
