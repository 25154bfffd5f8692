r"""The change of each weight of a model, and what merging would lose of it in a format of few bits.

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
from typing import Any

import numpy as np

from ..files.tensors import FLOATS
from ..layers.nf4 import dequantize_nf4, quantize_nf4
from .findings import NOTE, SUSPICIOUS, Finding, found
from .fitting import expert_weights
from .headers import AdapterFile, Module
from .landing import Landing
from .numbers import Measured

BLOCK = 1 << 22
"""Numbers of a weight that are changed and rounded at a time."""
WIDTH = 32
"""Numbers in a block of Q8_0."""


# --- the change ---


@dataclass(frozen=True)
class Change:
    """What an adapter does to one matrix of the model, all of it lying as the model stores the weight."""

    W: np.ndarray  # before
    A: np.ndarray
    B: np.ndarray  # with the scaling in it: W becomes W + B A
    magnitude: np.ndarray | None = None  # DoRA's: one number for each output
    across: bool = False  # whether the weight is stored (in, out), so that an output is a column

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield some rows of the weight and their change, from the first row to the last."""
        gain = None
        if self.magnitude is not None:
            gain = (self.magnitude / self._lengths()).astype(self.W.dtype)
            gain = gain[None] if self.across else gain[:, None]
        rows = max(64, BLOCK // self.W.shape[1] // 64 * 64)  # so that a block of NF4 does not end in the next one
        for top in range(0, len(self.W), rows):
            part = self.W[top : top + rows]
            delta = self.B[top : top + rows] @ self.A
            if gain is not None:
                delta = (gain if self.across else gain[top : top + rows]) * (part + delta) - part
            yield part, delta

    def _lengths(self) -> np.ndarray:
        """Return DoRA's lengths of W + B A: of each output's row or column."""
        changed = np.square(self.W + self.B @ self.A, dtype=np.float64)
        lengths = np.sqrt(changed.sum(axis=0 if self.across else 1))
        return np.where(lengths > 0, lengths, 1.0)

    def off_axis(self) -> float:
        """Return how much nearer the magnitude is to the lengths of W's inputs than to its outputs'; above 1 it is.

        It starts as the outputs' lengths, and moves little.
        """
        squares = np.square(self.W.T if self.across else self.W, dtype=np.float64)
        outputs, inputs = np.sqrt(squares.sum(axis=1)), np.sqrt(squares.sum(axis=0))
        if self.magnitude is None or not self.magnitude.shape == outputs.shape == inputs.shape:
            return 0.0
        off = [float(np.linalg.norm(self.magnitude - lengths)) for lengths in (outputs, inputs)]
        return off[0] / max(off[1], 1e-30)


def weights_of(landing: Landing, module: Module) -> list[str]:
    """Return where the model has a module's weight: one path, of a mixture stored apart one or two for each expert.

    There is none where the shapes do not fit, the weight is in few bits, or one expert's layer is a part of an array.
    """
    magnitude = module.shape("magnitude")
    if magnitude is not None and (module.widths is None or math.prod(magnitude) != module.widths[0]):
        return []
    place = landing.places.get(module.path, "")
    weights = expert_weights(landing.model, place) if module.kind == "experts" else [place]
    fits = module.path in landing.fitting and all(map(landing.model.is_exact, weights))
    is_part = module.kind == "linear" and place in landing.model.arrays
    return weights if fits and not is_part else []


def changes(landing: Landing, module: Module, dtype: Any = np.float32) -> Iterator[Change]:
    """Yield what becomes of each matrix of a module's weight; of a mixture's array there is one for each expert.

    There is none where `weights_of` says that it is not known, nor of a convolution with groups.
    """
    if not (weights := weights_of(landing, module)) or module.scaling is None:
        return
    read = module.tensors.read
    pairs = module.pairs(read(module.parts["A"]), read(module.parts["B"]))
    m = read(module.parts["magnitude"]).ravel() if "magnitude" in module.parts else None
    for W, (A, B) in zip(_matrices(landing, module, weights, len(pairs), dtype), pairs, strict=True):
        A, B = A.astype(dtype), B.astype(dtype)
        turned = module.path in landing.turned or module.kind == "embedding"
        across = turned or (len(B), A.shape[1]) != W.shape
        if across:
            A, B = B.T, A.T
        if (len(B), A.shape[1]) == W.shape:
            yield Change(W, A, dtype(module.scaling) * B, m, across)


def _matrices(landing: Landing, module: Module, weights: list[str], experts: int, dtype: Any) -> Iterator[np.ndarray]:
    """Yield the weight as a matrix; of a mixture's array one for each expert, whether or not it is stored in parts."""
    read = landing.model.read
    if module.kind == "experts" and len(weights) > 1:
        parts = len(weights) // experts
        for e in range(experts):
            yield np.concatenate([read(name) for name in weights[e * parts : (e + 1) * parts]]).astype(dtype)
        return
    W = read(weights[0])
    for matrix in W if module.kind == "experts" and W.ndim == 3 else [W]:
        yield matrix.reshape(len(matrix), -1).astype(dtype, copy=False)


PIECES, PIECE = 64, 1 << 14
"""Pieces of a weight that its size is taken from, and numbers in each: a weight of a million is read whole."""


def share_of(landing: Landing, module: Module, rms: float | None) -> float | None:
    """Return a change's root mean square as a part of the weight's, from pieces of it; None where one is not known."""
    weights, model = weights_of(landing, module), landing.model
    if rms is None or not weights:
        return None
    squares, count = 0.0, 0
    for path in weights:
        size = math.prod(model.arrays.get(path) or model.modules[path] or ())
        for start in range(0, size, max(PIECE, -(-size * len(weights) // PIECES))):
            piece = model.part(path, start, min(start + PIECE, size)).astype(np.float64)
            squares, count = squares + float(piece @ piece), count + piece.size
    return rms / (squares / count) ** 0.5 if squares else None


# --- formats ---


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


# --- what is lost ---


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

    def __iadd__(self, other: Sums) -> Sums:
        self.meant += other.meant
        self.along += other.along
        self.whole += other.whole
        return self

    def __str__(self) -> str:
        return f"{self.part:.1%} + {self.noise:.2g}" if self.meant else "-"


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


@dataclass
class Loss:
    """What merging one module loses."""

    relative: float = 0.0  # |delta W| / |W|
    formats: dict[str, Sums] = field(default_factory=dict)
    off_axis: float = 0.0  # of a magnitude, see `Change.off_axis`


def losses(adapter: AdapterFile, landing: Landing, numbers: Mapping[str, Measured]) -> dict[str, Loss | None]:
    """Return what merging each module would lose; None where its weight or its change is not known."""
    merged = {}
    for path in landing.places:
        module = adapter.modules[path]
        known = numbers[path].norm is not None and weights_of(landing, module)
        merged[path] = _loss(landing, module) if known else None
    return merged


def _loss(landing: Landing, module: Module) -> Loss:
    """Return the loss of one module; of a mixture's array that of all experts together."""
    loss, whole, meant = Loss(), 0.0, 0.0
    for change in changes(landing, module):
        loss.off_axis = change.off_axis()
        whole += _dot(change.W, change.W)
        for W, delta in change.blocks():
            meant += _dot(delta, delta)
            for name, rounded in FORMATS.items():
                if name != "Q8_0" or W.shape[1] % WIDTH == 0:
                    loss.formats.setdefault(name, Sums()).add(rounded(W + delta) - rounded(W), delta)
    loss.relative = (meant / whole) ** 0.5 if whole else 0.0
    return loss


def off_axis(merged: Mapping[str, Loss | None]) -> Iterator[Finding]:
    """Find a magnitude on the other axis of a square weight."""
    text = (
        "the magnitude of {names} is nearer to the lengths of the weight's columns than to those of its rows: it lies "
        "on the other axis, which a square weight's shape does not show"
    )
    other = [path for path, loss in merged.items() if loss is not None and loss.off_axis > 1.5]
    yield from found(SUSPICIOUS, "magnitude-axis", text, other)


def above_weight(merged: Mapping[str, Loss | None]) -> Iterator[Finding]:
    """Find a change that is larger than the weight."""
    large = [path for path, loss in merged.items() if loss is not None and loss.relative > 1]
    yield from found(NOTE, "change-above-weight", "the change is larger than the weight itself: {names}", large)


RULES = (off_axis, above_weight)
