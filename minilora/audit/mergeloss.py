r"""What merging would lose: W + delta W, rounded to the few bits of a format, beside W rounded alike.

    E = Q(W + delta W) - Q(W)            the change that arrives
    kept  = <E, delta W> / |delta W|^2   its part along the change that was meant
    noise = |E - kept delta W| / |delta W|

A weight in bfloat16 lies on the format's grid. So a change below half a step is lost there, and one above it arrives as
a whole step. Q(W) is the base as it would be without the adapter: what its own rounding loses is not counted.

Weights pass through memory a block of rows at a time. In NF4 a scale has 64 weights, without double quantisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..files.tensors import FLOATS
from ..layers.nf4 import dequantize_nf4, quantize_nf4
from .adapterfile import AdapterFile, Module
from .expertshapes import expert_weights
from .landing import Landing
from .modelheaders import ModelHeaders
from .numbers import Numbers

BLOCK = 1 << 22
"""Numbers of a weight that are changed and rounded at a time."""
WIDTH = 32
"""Numbers in a block of Q8_0."""


def _bfloat16(W: np.ndarray) -> np.ndarray:
    return W.astype(FLOATS["BF16"]).astype(np.float32)


def _float16(W: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return W.astype(np.float16).astype(np.float32)


def _q8_0(W: np.ndarray) -> np.ndarray:  # (rows, in)
    """Return the numbers of llama.cpp's Q8_0: of 32 in a row the largest is 127 steps, and the step is a float16."""
    blocks = W.reshape(-1, WIDTH)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(blocks * np.divide(1, d, out=np.zeros_like(d), where=d > 0))
    return np.asarray(q * d.astype(np.float16).astype(np.float32)).reshape(W.shape)


def _nf4(W: np.ndarray) -> np.ndarray:
    codes, scales = quantize_nf4(W)
    return np.asarray(dequantize_nf4(codes, scales, W.shape))


FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": _bfloat16, "float16": _float16, "Q8_0": _q8_0, "NF4": _nf4,
}  # fmt: skip


@dataclass
class Sums:
    """Inner products of the change that was meant and of the one that arrives, over some weights."""

    meant: float = 0.0  # |delta W|^2
    along: float = 0.0  # <E, delta W>
    whole: float = 0.0  # |E|^2

    @property
    def part(self) -> float:
        """The part that is kept along the change's own direction."""
        return self.along / self.meant if self.meant else 0.0

    @property
    def noise(self) -> float:
        """What arrives beside that direction, as a part of the change."""
        return (max(self.whole - self.along**2 / self.meant, 0.0) / self.meant) ** 0.5 if self.meant else 0.0

    def add(self, E: np.ndarray, delta: np.ndarray) -> None:
        """Add a block's."""
        self.meant += _dot(delta, delta)
        self.along += _dot(E, delta)
        self.whole += _dot(E, E)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


@dataclass
class Loss:
    """What merging one module's adapter loses."""

    relative: float  # |delta W| / |W|
    formats: dict[str, Sums] = field(default_factory=dict)
    magnitudes: float | None = None  # of DoRA, see `_on_the_other_axis`


def losses(
    adapter: AdapterFile, model: ModelHeaders, landing: Landing, numbers: Mapping[str, Numbers]
) -> Iterator[tuple[str, Loss | None]]:
    """Yield what merging each module that fits would lose; None where its weight or its change is not known."""
    for path, place in landing.places.items():
        module = adapter.modules[path]
        known = numbers[path].norm is not None and _has_fitting_magnitude(adapter, module)
        weights = expert_weights(model, place) if module.kind == "experts" else [place]
        if path in landing.fitting and known and weights and all(model.is_exact(name) for name in weights):
            yield path, _loss(adapter, model, module, weights, turned=path in landing.turned)
        else:
            yield path, None


def _has_fitting_magnitude(adapter: AdapterFile, module: Module) -> bool:
    """Return whether a module has no magnitude, or one number for each output."""
    name, widths = module.parts.get("magnitude"), module.widths(adapter.tensors)
    return name is None or (widths is not None and math.prod(adapter.tensors.shapes[name]) == widths[0])


def _loss(adapter: AdapterFile, model: ModelHeaders, module: Module, weights: list[str], *, turned: bool) -> Loss:
    """Return the loss of one module; of a mixture's array that of all experts together."""
    loss = Loss(0.0)
    read = adapter.tensors.read
    pairs = module.pairs(read(module.parts["A"]), read(module.parts["B"]))
    m = read(module.parts["magnitude"]).ravel() if "magnitude" in module.parts else None
    s, whole = np.float32(module.scaling or 0.0), 0.0
    for W, (A, B) in zip(_matrices(model, module, weights, len(pairs)), pairs, strict=True):
        A, B = A.astype(np.float32), B.astype(np.float32)
        across = turned or module.kind == "embedding" or (len(B), A.shape[1]) != W.shape
        if across:  # the weight as it is stored is the transpose
            A, B = B.T, A.T
        if (len(B), A.shape[1]) != W.shape:
            return loss  # of a convolution with groups
        gain = None
        if m is not None:
            loss.magnitudes = _on_the_other_axis(W.T if across else W, m)
            gain = m / _lengths(W, A, s * B, across)
            gain = (gain[None] if across else gain[:, None]).astype(np.float32)
        whole += _dot(W, W)
        _add(loss.formats, W, A, s * B, gain)
    meant = loss.formats["bfloat16"].meant
    loss.relative = (meant / whole) ** 0.5 if whole else 0.0
    return loss


def _matrices(model: ModelHeaders, module: Module, weights: list[str], experts: int) -> Iterator[np.ndarray]:
    """Yield the weight as a matrix; of a mixture's array one for each expert, whether or not it is stored in parts."""
    if module.kind == "experts" and len(weights) > 1:
        parts = len(weights) // experts
        for e in range(experts):
            yield np.concatenate([model.read(name) for name in weights[e * parts : (e + 1) * parts]]).astype(np.float32)
        return
    W = model.read(weights[0])
    for matrix in W if module.kind == "experts" and W.ndim == 3 else [W]:
        yield matrix.reshape(len(matrix), -1).astype(np.float32, copy=False)


def _add(formats: dict[str, Sums], W: np.ndarray, A: np.ndarray, B: np.ndarray, gain: np.ndarray | None) -> None:
    """Add what becomes of W + B A, times the gain of each output, in each format: a block of rows at a time."""
    rows = max(64, BLOCK // W.shape[1] // 64 * 64)  # so that a block of NF4 does not end in the next one
    for top in range(0, len(W), rows):
        part = W[top : top + rows]
        delta = B[top : top + rows] @ A
        if gain is not None:
            delta = (gain if len(gain) == 1 else gain[top : top + rows]) * (part + delta) - part
        for name, rounded in FORMATS.items():
            if name != "Q8_0" or W.shape[1] % WIDTH == 0:
                formats.setdefault(name, Sums()).add(rounded(part + delta) - rounded(part), delta)


def _lengths(W: np.ndarray, A: np.ndarray, B: np.ndarray, across: bool) -> np.ndarray:
    """Return DoRA's lengths of W + B A: of each output, a row or, where the weight is stored (in, out), a column."""
    lengths = np.sqrt(np.square(W + B @ A, dtype=np.float64).sum(axis=0 if across else 1))
    return np.where(lengths > 0, lengths, 1.0)


def _on_the_other_axis(W: np.ndarray, m: np.ndarray) -> float | None:
    """Return how much nearer a magnitude is to the lengths of W's columns than to those of its rows; above 1 it is.

    It starts as the rows' lengths, and moves little.
    """
    squares = np.square(W, dtype=np.float64)
    rows, columns = np.sqrt(squares.sum(axis=1)), np.sqrt(squares.sum(axis=0))
    if not m.shape == rows.shape == columns.shape:
        return None
    off = [float(np.linalg.norm(m - lengths)) for lengths in (rows, columns)]
    return off[0] / max(off[1], 1e-30)
