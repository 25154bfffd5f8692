"""The diagnosis of a wrong merged weight: a wrong strength, another module's change, or too much rounding.

About a hundred rows of the weight are sampled, including those that should have changed most. Each number restricts the
strength k to an interval,

    m - half a step <= W + k s B A <= m + half a step

and the k that satisfies most of them is accurate, even if steps are larger than the change. (Least squares are not,
because a change below half a step is lost, and one above it becomes a whole step.)

A sketch identifies another module's change: it compares (m - W) X, for a few random columns X, with s B (A X) of each
module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..layers.nf4 import dequantize_nf4, quantize_nf4
from ..texts import short
from ..variants.scaling import scaling
from .findings import WRONG
from .headers import AdapterFile, Module
from .landing import BODY
from .rounding import HALVES, Replay, Rounding, Update, acceptable_casts, bits, mantissa_bits, round_trip, spacing
from .units import Matrix

RIGHT, UNDECIDED, SKIPPED = "right", "cannot be told", "not compared"
MIN_SHARE = 0.995
"""The share of the informative numbers that a suspect must explain."""
SAMPLED_ROWS, SKETCH_COLUMNS, SAMPLED_NUMBERS = 64, 8, 1 << 16
"""Sampled rows of each kind, random columns of a sketch, and numbers that a strength is measured on."""
MIN_COSINE = 0.5
"""The smallest cosine between sketches of the same change, given the noise from rounding."""


@dataclass
class Verdict:
    """The verdict on one module, one of its matrices, or a tensor that no module changes."""

    state: str = RIGHT
    flag: str = ""
    text: str = ""  # a description; {k} and {rest} stand for the next two numbers
    factor: float | None = None  # the strength of the change
    rest: float | None = None  # the size of any other change, relative to the weight
    steps: float = 0.0  # the largest distance from the exact sum, in ulps
    dtype: str = ""


class Sample:
    """Sampled rows of the base and the merged matrix, with the valid roundings and the strengths of known mistakes."""

    def __init__(
        self, base: Matrix, found: Matrix, update: Update, roundings: list[Rounding], known: list[tuple[float, str]]
    ) -> None:
        self.base, self.update, self.out = base, update, np.dtype(found.dtype)
        self.roundings, self.known = roundings, known
        count = len(update.left)
        strongest = np.argsort(-update.norms[0], kind="stable")[:SAMPLED_ROWS]
        spread = np.linspace(0, count - 1, min(SAMPLED_ROWS, count)).astype(int)
        self.rows = np.union1d(spread, strongest)
        runs = np.split(self.rows, np.flatnonzero(np.diff(self.rows) > 1) + 1)  # each run is one read
        self.W, self.m = (np.concatenate([of.read(run[0], run[-1] + 1) for run in runs]) for of in (base, found))
        self.as_base = acceptable_casts(self.W, self.out)
        self.is_base = np.any([bits(self.m) == bits(W) for W in self.as_base], axis=0)
        self.moved = self.m.astype(np.float64) - self.W.astype(np.float64)
        self.change = update.scaling * (update.left[self.rows].astype(np.float64) @ update.right.astype(np.float64))

    def replay(self, rounding: Rounding, update: Update | None = None) -> Replay:
        """Return a replay of a rounding, with this sample's update or another one."""
        return Replay(rounding, update or self.update, self.out, self.base)

    def explained(self, update: Update, roundings: Sequence[Rounding] = ()) -> bool:
        """Return whether an update explains the informative numbers with a rounding, by default a valid one."""
        for rounding in roundings or self.roundings:
            replay = self.replay(rounding, update)
            values = replay.values(self.W, self.rows)
            telling = np.count_nonzero(~self.is_base | (bits(values) != bits(self.as_base[0])))
            if replay.misses(self.W, self.rows, self.m, values).size <= (1 - MIN_SHARE) * max(int(telling), 1):
                return True
        return False

    def strength(self, change: np.ndarray) -> tuple[float, float, float]:
        """Return the lowest and highest strength that a change may have, and the share of numbers that agree."""
        with np.errstate(divide="ignore", invalid="ignore"):  # NaN and infinity have no neighbours
            step = spacing(np.maximum(np.abs(self.m.astype(np.float64)), np.abs(self.W.astype(np.float64))), self.out)
            told = np.where(np.isfinite(self.moved), np.abs(change) / step, 0.0).ravel()
        chosen = np.argpartition(-told, min(SAMPLED_NUMBERS, told.size) - 1)[:SAMPLED_NUMBERS]
        chosen = chosen[told[chosen] > 0]
        if not chosen.size:
            return 0.0, 0.0, 0.0
        by, moved = change.ravel()[chosen], self.moved.ravel()[chosen]
        part = max(2.0 ** -mantissa_bits(self.out), 2.0**-18)
        slack = 0.5 * step.ravel()[chosen] + np.abs(moved) * part + 2.0**-20 * np.abs(by).max()
        ends = np.sort(np.stack([(moved - slack) / by, (moved + slack) / by]), axis=0)
        lows, highs = np.sort(ends[0]), np.sort(ends[1])
        inside = np.arange(1, len(lows) + 1) - np.searchsorted(highs, lows)
        best = int(inside.argmax())
        at_one = float(np.mean((ends[0] <= 1) & (ends[1] >= 1)))
        if at_one >= 0.98 * inside[best] / len(lows):  # then the best interval may miss 1 by chance
            return 1.0, 1.0, at_one
        return float(lows[best]), float(highs[np.searchsorted(highs, lows[best])]), float(inside[best] / len(lows))


# --- the strength ---


def known_strengths(module: Module, adapter: AdapterFile) -> list[tuple[float, str]]:
    """Return the factors by which known mistakes scale the change, with a description of each."""
    s, r, alpha = float(module.scaling or 1.0), int(module.rank or module.rank_in_file or 1), module.alpha
    root = adapter.get("use_rslora") is True
    known = [(2.0, "twice"), (0.5, "half"), (-1.0, "subtracted instead of added")]
    if root:
        known += [(r**0.5, "alpha instead of alpha / sqrt(r)"), (r**-0.5, "alpha / r instead of alpha / sqrt(r)")]
    else:
        known += [(float(r), "alpha instead of alpha / r"), (r**0.5, "alpha / sqrt(r) instead of alpha / r")]
    known += [(1 / s, "without the scaling"), (s, "with the scaling applied twice")]
    usual, rank = adapter.get("lora_alpha"), adapter.get("r")
    if isinstance(usual, int | float) and type(rank) is int and rank > 0:
        plain = scaling(usual, rank, use_rslora=root) / s
        known.append((plain, "with r and lora_alpha, without rank_pattern and alpha_pattern"))
        known.append((scaling(usual, r, use_rslora=root) / s, "with lora_alpha, without alpha_pattern"))
    if alpha:
        known.append((scaling(8, r, use_rslora=root) / s, "with alpha 8, PEFT's default"))
    return [(k, name) for k, name in known if not math.isclose(k, 1.0)]


def strength_verdict(low: float, high: float, known: list[tuple[float, str]]) -> Verdict:
    """Return the verdict on a measured strength, with the names of the mistakes that explain it."""
    k = (low + high) / 2
    slack = max(2e-3 * abs(k), (high - low) / 2)
    fits = [(value, name) for value, name in known if abs(value - k) <= slack]
    names = list(dict.fromkeys(name for _, name in fits))[:2]
    named_suspect = f" ({', or '.join(names)})" if names else ""
    return Verdict(WRONG, "factor", f"merged with a factor of {{k}}{named_suspect}", fits[0][0] if fits else k)


# --- another module's change ---


def other_change_verdict(path: str, name: str, k: float) -> Verdict:
    """Return the verdict on a module that has the change called `name`, such as "PATH" or "PATH, transposed"."""
    other, _, how = name.partition(", ")
    times = "" if abs(k - 1) < 0.02 else ", {k} times"
    if other == path and how == "transposed":
        return Verdict(WRONG, "transposed", f"the change is transposed{times}", k)
    if other == path and how.startswith("packed"):
        return Verdict(WRONG, "packing", f"B's ranks and experts are swapped{times}", k)
    if other == path:
        return Verdict(WRONG, "another-change", f"that of other experts{times}", k)
    ours, theirs = (BODY.search(p) for p in (path, other))
    kind, transposed = other.rpartition(".")[2], f", {how}" if how else ""
    whose = short(other)
    if ours and theirs and ours[1] == theirs[1]:
        whose = kind
    elif ours and theirs and kind == path.rpartition(".")[2]:
        by = int(theirs[1]) - int(ours[1])
        whose = f"{'the layer' if abs(by) == 1 else f'{abs(by)} layers'} {'below' if by < 0 else 'above'}"
    return Verdict(WRONG, "another-change", f"that of {whose}{transposed}{times}", k)


class Sketches:
    """Sketches of the changes of all modules of an adapter, computed only if a weight is wrong."""

    def __init__(
        self, factors: Callable[[str], Iterator[tuple[str, np.ndarray, np.ndarray]]], paths: list[str]
    ) -> None:
        """`factors` yields the name, the scaled left factor and the right factor of each change of a module."""
        self.factors, self.paths = factors, paths
        self.kept: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}

    def nearest(self, shape: tuple[int, int], rows: np.ndarray, sketch: np.ndarray) -> tuple[str, float]:
        """Return the name of the change most similar to a sketch of some rows, and the cosine of the two."""
        if shape not in self.kept:
            X = columns(shape[1])
            self.kept[shape] = [
                (name, left @ (right @ X))
                for path in self.paths
                for name, left, right in self.factors(path)
                if (len(left), right.shape[1]) == shape
            ]
        best, most = "", 0.0
        for name, other in self.kept[shape]:
            c = cosine(sketch, other[rows])
            if abs(c) > abs(most):
                best, most = name, c
        return best, most

    def change(self, name: str, shape: tuple[int, int], rows: np.ndarray) -> np.ndarray:
        """Return some rows of the change called `name`."""
        path = name.partition(", ")[0]
        found = ((left, right) for n, left, right in self.factors(path) if n == name and len(left) == shape[0])
        left, right = next(found)
        return np.asarray(left[rows].astype(np.float64) @ right.astype(np.float64))


def columns(width: int) -> np.ndarray:
    """Return the random columns X (width, COLUMNS) of sketches."""
    return np.random.default_rng(0).standard_normal((width, SKETCH_COLUMNS))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


# --- the diagnosis ---


def identify(sample: Sample, own: str, sketches: Sketches) -> Verdict:
    """Return the verdict on a merged weight that is neither right nor the base's."""
    for rule in (_unmerged, _rounded_further, _rounded_before, _strengths, _twice, _of_dora):
        if (suspect := rule(sample)) is not None:
            return suspect
    return _another(sample, own, sketches) or _in_part(sample) or _measured(sample)


def _another(sample: Sample, own: str, sketches: Sketches) -> Verdict | None:
    """Find another module's change, or the module's own, transposed or packed differently."""
    if not np.isfinite(sample.moved).all():
        return None
    shape = (len(sample.update.left), sample.update.right.shape[1])
    name, near = sketches.nearest(shape, sample.rows, sample.moved @ columns(shape[1]))
    if abs(near) > MIN_COSINE and name != own:
        low, high, share = sample.strength(sketches.change(name, shape, sample.rows))
        if share >= MIN_SHARE:
            return other_change_verdict(own.partition(", ")[0], name, (low + high) / 2)
    return None


def _unmerged(sample: Sample) -> Verdict | None:
    """Find the base but for rounding: the change was added, and then subtracted again."""
    E, D, W = sample.moved, sample.change, sample.W.astype(np.float64)
    if sample.update.magnitude is not None or not np.isfinite(E).all():
        return None
    near = np.abs(E) <= 2 * spacing(np.abs(W) + np.abs(D), sample.out)
    small = abs(float((E * D).sum())) < 0.01 * float((D * D).sum()) and np.linalg.norm(E) < np.linalg.norm(D)
    if not (near.all() and small):
        return None
    return Verdict(WRONG, "not-merged", "not merged: the base but for rounding, as if merged and unmerged", 0.0)


def _rounded_before(sample: Sample) -> Verdict | None:
    """Find a base or factors that were rounded to half precision before the merge."""
    if sample.explained(sample.update):  # then nearly all numbers are right
        return None
    stored = sample.base.dtype, sample.update.dtype
    for what, dtype in zip(("base was", "factors were"), stored, strict=True):
        for t in (t for t in HALVES if mantissa_bits(t) < mantissa_bits(dtype)):
            if sample.explained(sample.update, [Rounding(base=t) if what == "base was" else Rounding(factors=t)]):
                text = f"the {what} rounded to {t.name} before the merge"
                return Verdict(WRONG, "rounded-further", text, 1.0)
    return None


def _rounded_further(sample: Sample) -> Verdict | None:
    """Find a right merge that was rounded to a type with fewer bits than the file's."""
    out, W = sample.out, sample.W.astype(np.float64)
    m = W + sample.moved
    right = sample.replay(Rounding()).values(sample.W, sample.rows).astype(np.float64)
    if not np.isfinite(m).all():
        return None
    for t in HALVES:
        near = np.abs(m - right) <= 1.5 * spacing(np.maximum(np.abs(W), np.abs(m)), t)
        if mantissa_bits(t) < mantissa_bits(out) and np.array_equal(round_trip(m, t), m) and near.mean() >= MIN_SHARE:
            return Verdict(WRONG, "rounded-further", f"rounded to {t.name} before being stored as {out.name}", 1.0)
    if sample.W.shape[1] % 64 == 0:
        rest, base = m - right, sample.W.astype(np.float32)
        for x, text in ((base, "merged into the base in NF4, not into its original weights"),
                        (right.astype(np.float32), f"rounded to NF4 before being stored as {out.name}")):  # fmt: skip
            lost = dequantize_nf4(*quantize_nf4(x), x.shape) - x
            if np.linalg.norm(rest - lost) < 0.3 * np.linalg.norm(rest):
                return Verdict(WRONG, "over-four-bits" if x is base else "rounded-further", text, 1.0)
    return None


def _strengths(sample: Sample) -> Verdict | None:
    """Find the change at a wrong strength."""
    if sample.update.magnitude is None:
        low, high, share = sample.strength(sample.change)
        if share >= MIN_SHARE and not (low <= 1.0 <= high) and not low <= 0.0 <= high:
            return strength_verdict(low, high, sample.known)
        return None
    for k, _ in sample.known:
        if sample.explained(replace(sample.update, scaling=k * sample.update.scaling)):
            return strength_verdict(k, k, sample.known)
    return None


def _twice(sample: Sample) -> Verdict | None:
    """Find a second merge into an already merged weight."""
    for rounding in sample.roundings:
        first, second = sample.replay(rounding), sample.replay(replace(rounding, base=None))
        once, second.norms = first.values(sample.W, sample.rows), first.norms
        misses = second.misses(once, sample.rows, sample.m, second.values(once, sample.rows))
        if misses.size <= (1 - MIN_SHARE) * float(np.count_nonzero(~sample.is_base)):
            return Verdict(WRONG, "twice", "merged twice, the second time into the merged weights", 2.0)
    return None


def _of_dora(sample: Sample) -> Verdict | None:
    """Find mistakes with DoRA: no magnitude, the base's norms instead of the sum's, or no change."""
    update = sample.update
    if update.magnitude is None:
        return None
    if sample.explained(replace(update, magnitude=None)):
        return Verdict(WRONG, "without-magnitude", "merged as LoRA, without DoRA's magnitude")
    if sample.explained(replace(update, norms_of_base=True)):
        return Verdict(WRONG, "lengths-of-base", "DoRA's gain divides by the norms of the base, not of the sum")
    if sample.explained(replace(update, scaling=0.0)):
        return Verdict(WRONG, "magnitude-alone", "DoRA's magnitude was applied without the change")
    return None


def _in_part(sample: Sample) -> Verdict | None:
    """Find a weight in which some numbers have the change, at one strength, and all others are the base's."""
    if sample.update.magnitude is not None or not sample.is_base.any():
        return None
    low, high, share = sample.strength(np.where(sample.is_base, 0.0, sample.change))
    if share < MIN_SHARE:
        return None
    right = sample.replay(Rounding()).values(sample.W, sample.rows)
    moves = bits(right) != bits(sample.as_base[0])
    part, rows = np.mean(sample.is_base[moves]), [sample.is_base[i][moves[i]] for i in range(len(moves))]
    if not 1 - MIN_SHARE < part < MIN_SHARE:  # a few odd numbers do not make a partial merge
        return None
    places = "only in some rows" if all(row.all() or not row.any() for row in rows) else "only in part"
    times = "" if low <= 1 <= high else ", there with a factor of {k}"
    text = f"merged {places}{times}; {part:.0%} of the numbers that should change are the base's"
    return Verdict(WRONG, "in-part", text, (low + high) / 2)


def _measured(sample: Sample) -> Verdict:
    """Measure by least squares the strength of the change, and the size of everything else."""
    with np.errstate(over="ignore", invalid="ignore"):
        E, D, W = sample.moved, sample.change, sample.W.astype(np.float64)
        k = float((E * D).sum()) / max(float((D * D).sum()), 1e-300)
        rest = float(np.linalg.norm(E - k * D)) / max(float(np.linalg.norm(W)), 1e-300)
        noise = float(np.linalg.norm(E - k * D)) / max(abs(k) * float(np.linalg.norm(D)), 1e-300)
    if noise < 0.02 and rest < 2.0 ** -mantissa_bits(sample.out) and abs(k - 1) > 0.05:
        return strength_verdict(k, k, sample.known)
    if abs(k) < 0.1:
        return Verdict(WRONG, "other-weights", "changed, but not by this adapter: by {rest} of the weight", k, rest)
    text = "changed by more than the adapter: its change is there {k} times, plus {rest} of the weight"
    return Verdict(WRONG, "other-weights", text, k, rest)
