r"""The change of each weight of a model, and what merging would lose of it in a format of few bits.

    E = Q(W + delta W) - Q(W)            the change that arrives
    kept  = <E, delta W> / |delta W|^2   its part along the change that was meant
    noise = |E - kept delta W| / |delta W|

A weight in bfloat16 lies on the format's grid. So a change below half a step is lost there, and one above it arrives as
a whole step. Q(W) is the base as it would be without the adapter: what its own rounding loses is not counted.

Weights pass through memory a block of rows at a time. In NF4 a scale has 64 weights, without double quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..files.dtypes import FLOATS
from ..files.experts import PARTS
from ..language.files.gguf import is_permuted
from ..layers.nf4 import dequantize_nf4, quantize_nf4
from ..layers.rotary import halves_from_interleaved
from ..texts import FileRefused, short
from .findings import NOTE, SUSPICIOUS, Finding, counted, found
from .headers import AdapterFile, ModelHeaders, Module
from .landing import Landing
from .numbers import Measured
from .roads import HALVES, Replay, Road, Update, stored_as
from .units import Matrix, head_dim, unit_of

WIDTH = 32
"""Numbers in a block of Q8_0."""


# --- the change ---


def unit_in(landing: Landing, module: Module) -> tuple[str, int | None, str]:
    """Return the unit of a module's weight, and the expert and the part of its matrix that the module is."""
    place = landing.places[module.path]
    unit, expert, part = unit_of(place)
    if place in landing.model.arrays:
        _, expert, part = unit_of(module.path)
    return unit if unit in landing.source.units else f"{unit}.weight", expert, part


def changed_rows(landing: Landing, module: Module, matrices: list[Matrix]) -> dict[tuple[int, int], Matrix]:
    """Return what a module changes of a unit's matrices: by the matrix and the first row these rows."""
    unit, expert, part = unit_in(landing, module)
    if expert is None:
        return {(e, 0): matrix for e, matrix in enumerate(matrices)}
    if expert >= len(matrices):
        raise FileRefused(landing.model.path, f"{short(unit)} has no expert {expert}")
    parts = PARTS[unit.rpartition(".")[2]]
    rows = matrices[expert].shape[0] // len(parts)
    top = rows * parts.index(part)
    return {(expert, top): matrices[expert].cut(top, top + rows)}


def updates(landing: Landing, module: Module, weights: Mapping[tuple[int, int], Matrix]) -> dict[Any, Update]:
    """Return what a module does to each of some weights; require that it fits them."""
    file, found = module.tensors.path, {}
    if module.scaling is None or module.widths is None:
        raise FileRefused(file, f"nothing says what {short(module.path)} adds: a factor or the scaling is missing")
    pairs = factors(module, landing.model)
    if len(pairs) != len(weights):
        of = counted(len(pairs), "expert")
        raise FileRefused(file, f"{short(module.path)} is for {of}, and there are {len(weights)}")
    m = module.tensors.read(module.parts["magnitude"]).ravel() if "magnitude" in module.parts else None
    dtype = np.result_type(*(FLOATS.get(module.tensors.dtypes[module.parts[part]], np.float32) for part in "AB"))
    for (place, W), (A, B) in zip(weights.items(), pairs, strict=True):
        turned = module.path in landing.turned or module.kind == "embedding"
        across = turned or (len(B), A.shape[1]) != W.shape
        left, right = (A.T, B.T) if across else (B, A)
        if (len(left), right.shape[1]) != W.shape or (m is not None and m.size != len(B)):
            sides = f"{len(B)} x {A.shape[1]}, and it is {W.shape[0]} x {W.columns}"
            raise FileRefused(file, f"{short(module.path)} is for a weight of {sides}")
        found[place] = Update(left, right, module.scaling, dtype, m, across)
    return found


def factors(module: Module, model: ModelHeaders) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return A (r, in) and B (out, r) of each matrix of a module, in transformers' order of rows."""
    read, parts, notes = module.tensors.read, module.parts, module.tensors.notes
    pairs = module.pairs(read(parts["A"]), read(parts["B"]))
    of_llama = module.tensors.weights is None and notes.get("general.architecture") == "llama"
    if of_llama and is_permuted(module.path, "llama"):
        return [(A, halves_from_interleaved(B, head_dim(model))) for A, B in pairs]
    return pairs


def weights_of(landing: Landing, module: Module) -> dict[tuple[int, int], Matrix]:
    """Return what a module changes; nothing where its shapes do not fit, or the weight is in few bits."""
    if module.path not in landing.fitting:
        return {}
    try:
        matrices = landing.source.units.get(unit_in(landing, module)[0], [])
        exact = all(landing.source.is_exact(matrix.name) for matrix in matrices)
        return changed_rows(landing, module, matrices) if exact else {}
    except FileRefused:  # of an expert that is not there, or of numbers that nothing says how to read
        return {}


def changes(landing: Landing, module: Module) -> Iterator[tuple[Matrix, Update]]:
    """Yield each matrix that a module changes, and how; none where that is not known."""
    weights = weights_of(landing, module)
    try:
        found = updates(landing, module, weights)
    except FileRefused:
        return
    yield from ((weights[place], update) for place, update in found.items())


def blocks(matrix: Matrix, update: Update) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield some rows of a weight and their change in float64, from the first row to the last."""
    replay = Replay(Road(), update, np.float64, matrix)
    for start, stop in matrix.blocks(64):  # so that a block of NF4 does not end in the next one
        W = matrix.read(start, stop).astype(np.float64)
        yield W, replay.change(W, np.arange(start, stop))


PIECES, PIECE = 64, 1 << 14
"""Pieces of a weight that its size is taken from, and numbers in each: a weight of a million is read whole."""


def share_of(landing: Landing, module: Module, rms: float | None) -> float | None:
    """Return a change's root mean square as a part of the weight's, from pieces of it; None where one is not known."""
    weights = weights_of(landing, module)
    if rms is None or not weights:
        return None
    squares, count = 0.0, 0
    for W in weights.values():
        rows, height = W.shape[0], max(1, PIECE // max(1, W.columns))
        for top in range(0, rows, max(height, -(-rows * len(weights) // PIECES))):
            piece = W.read(top, min(top + height, rows)).astype(np.float64).ravel()
            squares, count = squares + float(piece @ piece), count + piece.size
    return rms / (squares / count) ** 0.5 if squares else None


# --- formats ---


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
    **{half.name: partial(stored_as, dtype=half) for half in HALVES}, "Q8_0": _q8_0, "NF4": _nf4,
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
    off_axis: float = 0.0  # of a magnitude: above 1 it is nearer to the lengths of W's inputs


def losses(adapter: AdapterFile, landing: Landing, numbers: Mapping[str, Measured]) -> dict[str, Loss | None]:
    """Return what merging each module would lose; None where its weight or its change is not known."""
    known = {path: numbers[path].norm is not None for path in landing.places}
    return {path: _loss(landing, adapter.modules[path]) if known[path] else None for path in known}


def _loss(landing: Landing, module: Module) -> Loss | None:
    """Return the loss of one module; of a mixture's array that of all experts together."""
    loss, whole, meant = None, 0.0, 0.0
    for matrix, update in changes(landing, module):
        loss = loss or Loss()
        loss.off_axis = _off_axis(matrix, update)
        for block in blocks(matrix, update):
            W, delta = (x.astype(np.float32) for x in block)
            whole += _dot(W, W)
            meant += _dot(delta, delta)
            for name, rounded in FORMATS.items():
                if name != "Q8_0" or W.shape[1] % WIDTH == 0:
                    loss.formats.setdefault(name, Sums()).add(rounded(W + delta) - rounded(W), delta)
    if loss is not None:
        loss.relative = (meant / whole) ** 0.5 if whole else 0.0
    return loss


def _off_axis(matrix: Matrix, update: Update) -> float:
    """Return how much nearer a magnitude is to the lengths of W's inputs than to its outputs', where it starts."""
    rows, m = matrix.shape[0], update.magnitude
    if m is None or not len(m) == rows == matrix.columns:
        return 0.0
    squares = np.square(matrix.read(0, rows).astype(np.float64))
    outputs, inputs = (float(np.linalg.norm(m - np.sqrt(squares.sum(axis=axis)))) for axis in (1, 0))
    return inputs / max(outputs, 1e-30) if update.across else outputs / max(inputs, 1e-30)


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
