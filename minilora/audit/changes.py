r"""The change that an adapter makes to each weight, with the loss from merging it in a low-precision format.

    E = Q(W + delta W) - Q(W)            the change that survives
    kept  = <E, delta W> / |delta W|^2   its share along the intended change
    noise = |E - kept delta W| / |delta W|

A weight in bfloat16 lies on the format's grid. So a change below half a step is lost, and a larger one is rounded to
whole steps. Q(W) is the base without the adapter: what the base itself loses by rounding is not counted.

Weights are read one block of rows at a time. NF4 has one scale for 64 weights here, without double quantisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..files.dtypes import FLOATS
from ..files.experts import EXPERT_PARTS
from ..language.files.gguf import is_permuted
from ..layers.nf4 import dequantize_nf4, quantize_nf4
from ..layers.rotary import halves_from_interleaved
from ..texts import FileRefused, short
from .findings import NOTE, SUSPICIOUS, Finding, about, counted
from .headers import AdapterFile, ModelHeaders, Module
from .landing import Landing
from .numbers import Measured
from .rounding import HALVES, Replay, Rounding, Update, round_trip
from .units import Matrix, head_dim, unit_of

Q8_BLOCK = 32
"""The number of weights in a block of Q8_0."""


# --- the change ---


def unit_in(landing: Landing, module: Module) -> tuple[str, int | None, str]:
    """Return the unit of a module's weight and, if the module is one expert's layer, its expert and its part."""
    place = landing.places[module.path]
    unit, expert, part = unit_of(place)
    if place in landing.model.arrays:
        _, expert, part = unit_of(module.path)
    return unit if unit in landing.source.units else f"{unit}.weight", expert, part


def changed_rows(landing: Landing, module: Module, matrices: list[Matrix]) -> dict[tuple[int, int], Matrix]:
    """Return the rows of a unit that a module changes, keyed by (matrix, first row)."""
    unit, expert, part = unit_in(landing, module)
    if expert is None:
        return {(e, 0): matrix for e, matrix in enumerate(matrices)}
    if expert >= len(matrices):
        raise FileRefused(landing.model.path, f"{short(unit)} has no expert {expert}")
    parts = EXPERT_PARTS[unit.rpartition(".")[2]]
    rows = matrices[expert].shape[0] // len(parts)
    top = rows * parts.index(part)
    return {(expert, top): matrices[expert].cut(top, top + rows)}


def updates(landing: Landing, module: Module, weights: Mapping[tuple[int, int], Matrix]) -> dict[Any, Update]:
    """Return a module's update of each weight; refuse a module that does not fit them."""
    file, found = module.tensors.path, {}
    if module.scaling is None or module.widths is None:
        raise FileRefused(file, f"the change by {short(module.path)} is unknown: a factor or the scaling is missing")
    pairs = factors(module, landing.model)
    if len(pairs) != len(weights):
        count = counted(len(pairs), "expert")
        raise FileRefused(file, f"{short(module.path)} is for {count}, but the model has {len(weights)}")
    m = module.tensors.read(module.parts["magnitude"]).ravel() if "magnitude" in module.parts else None
    dtype = np.result_type(*(FLOATS.get(module.tensors.dtypes[module.parts[part]], np.float32) for part in "AB"))
    for (place, W), (A, B) in zip(weights.items(), pairs, strict=True):
        known = module.path in landing.transposed or module.kind == "embedding"
        transposed = known or (len(B), A.shape[1]) != W.shape
        left, right = (A.T, B.T) if transposed else (B, A)
        if (len(left), right.shape[1]) != W.shape or (m is not None and m.size != len(B)):
            sides = f"{len(B)} x {A.shape[1]}, but the model's is {W.shape[0]} x {W.columns}"
            raise FileRefused(file, f"{short(module.path)} is for a weight of {sides}")
        found[place] = Update(left, right, module.scaling, dtype, m, transposed)
    return found


def factors(module: Module, model: ModelHeaders) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return A (r, in) and B (out, r) for each matrix of a module, with rows in transformers' order."""
    read, parts, metadata = module.tensors.read, module.parts, module.tensors.metadata
    pairs = module.pairs(read(parts["A"]), read(parts["B"]))
    of_llama = module.tensors.weights is None and metadata.get("general.architecture") == "llama"
    if of_llama and is_permuted(module.path, "llama"):
        return [(A, halves_from_interleaved(B, head_dim(model))) for A, B in pairs]
    return pairs


def weights_of(landing: Landing, module: Module) -> dict[tuple[int, int], Matrix]:
    """Return the rows that a module changes; none if its shapes do not fit or the weight is quantised."""
    if module.path not in landing.fitting:
        return {}
    try:
        matrices = landing.source.units.get(unit_in(landing, module)[0], [])
        exact = all(landing.source.is_exact(matrix.name) for matrix in matrices)
        return changed_rows(landing, module, matrices) if exact else {}
    except FileRefused:  # the expert does not exist, or the weight's layout is unknown
        return {}


def changes(landing: Landing, module: Module) -> Iterator[tuple[Matrix, Update]]:
    """Yield each matrix that a module changes, with its update; nothing if the update is unknown."""
    weights = weights_of(landing, module)
    try:
        found = updates(landing, module, weights)
    except FileRefused:
        return
    yield from ((weights[place], update) for place, update in found.items())


def row_blocks(matrix: Matrix, update: Update) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of a weight's rows and their change, both in float64, from the first row to the last."""
    replay = Replay(Rounding(), update, np.float64, matrix)
    for start, stop in matrix.blocks(64):  # so that no block of NF4 is cut
        W = matrix.read(start, stop).astype(np.float64)
        yield W, replay.change(W, np.arange(start, stop))


SAMPLED_PIECES, PIECE_NUMBERS = 64, 1 << 14
"""How many pieces of a weight are sampled, and numbers in each: a weight of a million numbers is read whole."""


def relative_rms(landing: Landing, module: Module, rms: float | None) -> float | None:
    """Return a change's RMS relative to the weight's, which is estimated from pieces; None if either is unknown."""
    weights = weights_of(landing, module)
    if rms is None or not weights:
        return None
    squares, count = 0.0, 0
    for W in weights.values():
        rows, height = W.shape[0], max(1, PIECE_NUMBERS // max(1, W.columns))
        for top in range(0, rows, max(height, -(-rows * len(weights) // SAMPLED_PIECES))):
            piece = W.read(top, min(top + height, rows)).astype(np.float64).ravel()
            squares, count = squares + float(piece @ piece), count + piece.size
    return rms / (squares / count) ** 0.5 if squares else None


# --- formats ---


def _q8_0(W: np.ndarray) -> np.ndarray:  # (rows, in)
    """Return W as llama.cpp's Q8_0 stores it: the largest of 32 numbers is 127 steps, and the step is a float16."""
    row_blocks = W.reshape(-1, Q8_BLOCK)
    d = np.abs(row_blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(row_blocks * np.divide(1, d, out=np.zeros_like(d), where=d > 0))
    return np.asarray(q * d.astype(np.float16).astype(np.float32)).reshape(W.shape)


def _nf4(W: np.ndarray) -> np.ndarray:
    codes, scales = quantize_nf4(W)
    return np.asarray(dequantize_nf4(codes, scales, W.shape))


STORED_FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    **{half.name: partial(round_trip, dtype=half) for half in HALVES}, "Q8_0": _q8_0, "NF4": _nf4,
}  # fmt: skip


# --- what is lost ---


@dataclass
class Sums:
    """Inner products of the intended change and of the one that survives, summed over some weights."""

    intended: float = 0.0  # |delta W|^2
    along: float = 0.0  # <E, delta W>
    actual: float = 0.0  # |E|^2

    @property
    def kept(self) -> float:
        """The share of the change that is kept, along its own direction."""
        return self.along / self.intended if self.intended else 0.0

    @property
    def noise(self) -> float:
        """The norm of the rest, orthogonal to the change, relative to the change."""
        return (max(self.actual - self.along**2 / self.intended, 0.0) / self.intended) ** 0.5 if self.intended else 0.0

    def add(self, E: np.ndarray, delta: np.ndarray) -> None:
        """Add the inner products of one block."""
        self.intended += _dot(delta, delta)
        self.along += _dot(E, delta)
        self.actual += _dot(E, E)

    def __iadd__(self, other: Sums) -> Sums:
        self.intended += other.intended
        self.along += other.along
        self.actual += other.actual
        return self

    def __str__(self) -> str:
        return f"{self.kept:.1%} + {self.noise:.2g}" if self.intended else "-"


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


@dataclass
class MergeLoss:
    """The loss from merging one module."""

    relative: float = 0.0  # |delta W| / |W|
    formats: dict[str, Sums] = field(default_factory=dict)
    off_axis: float = 0.0  # above 1, the magnitude is closer to the norms of W's inputs than of its outputs


def losses(adapter: AdapterFile, landing: Landing, numbers: Mapping[str, Measured]) -> dict[str, MergeLoss | None]:
    """Return the loss from merging each module; None if its weight or its change is unknown."""
    known = {path: numbers[path].norm is not None for path in landing.places}
    return {path: _loss(landing, adapter.modules[path]) if known[path] else None for path in known}


def _loss(landing: Landing, module: Module) -> MergeLoss | None:
    """Return the loss from merging one module, over all its experts if it has several."""
    loss, size, intended = None, 0.0, 0.0
    for matrix, update in changes(landing, module):
        loss = loss or MergeLoss()
        loss.off_axis = _off_axis(matrix, update)
        for block in row_blocks(matrix, update):
            W, delta = (x.astype(np.float32) for x in block)
            size += _dot(W, W)
            intended += _dot(delta, delta)
            for name, rounded in STORED_FORMATS.items():
                if name != "Q8_0" or W.shape[1] % Q8_BLOCK == 0:
                    loss.formats.setdefault(name, Sums()).add(rounded(W + delta) - rounded(W), delta)
    if loss is not None:
        loss.relative = (intended / size) ** 0.5 if size else 0.0
    return loss


def _off_axis(matrix: Matrix, update: Update) -> float:
    """Return how much closer a magnitude is to the norms of W's inputs than of its outputs, where DoRA starts it."""
    rows, m = matrix.shape[0], update.magnitude
    if m is None or not len(m) == rows == matrix.columns:
        return 0.0
    squares = np.square(matrix.read(0, rows).astype(np.float64))
    outputs, inputs = (float(np.linalg.norm(m - np.sqrt(squares.sum(axis=axis)))) for axis in (1, 0))
    return inputs / max(outputs, 1e-30) if update.transposed else outputs / max(inputs, 1e-30)


def off_axis(merged: Mapping[str, MergeLoss | None]) -> Iterator[Finding]:
    """Find magnitudes that belong to the wrong axis of a square weight."""
    text = (
        "the magnitude of {names} is closer to the norms of the weight's columns than of its rows: it is along the "
        "wrong axis, which the shape of a square weight does not reveal"
    )
    other = [path for path, loss in merged.items() if loss is not None and loss.off_axis > 1.5]
    yield from about(SUSPICIOUS, "magnitude-axis", text, other)


def above_weight(merged: Mapping[str, MergeLoss | None]) -> Iterator[Finding]:
    """Find changes that are larger than the weight."""
    large = [path for path, loss in merged.items() if loss is not None and loss.relative > 1]
    yield from about(NOTE, "change-above-weight", "the change is larger than the weight itself: {names}", large)


RULES = (off_axis, above_weight)
