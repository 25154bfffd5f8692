"""What a merged weight is, where it is not right: the change at another strength, another's change, another rounding.

Some hundred rows of the weight are looked at, the ones that should have changed most among them. Each number of a type
says that the strength k lies in an interval,

    m - half a step <= W + k s B A <= m + half a step

and the k that most of them allow is measured exactly, also where steps are larger than the change. (Least squares are
not: of a change below half a step nothing arrives, and of one above it a whole step does.)

Whose change it is tells a sketch: (m - W) X for a few random columns X, beside s B (A X) of each other module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..layers.nf4 import dequantize_nf4, quantize_nf4
from ..texts import short
from ..variants.scaling import scaling
from .headers import AdapterFile, Module
from .landing import BODY
from .roads import HALVES, Replay, Road, Update, bits, digits, roundings, steps, stored_as
from .units import Matrix

RIGHT, WRONG, UNTOLD, UNREAD = "right", "wrong", "cannot be told", "not compared"
ENOUGH = 0.995
"""The part of the numbers that tell something which a suspect must explain."""
ROWS, COLUMNS, NUMBERS = 64, 8, 1 << 16
"""Rows of each kind that are looked at, random columns of a sketch, and numbers that a strength is measured on."""
ALIKE = 0.5
"""The least cosine of two sketches of the same change: noise of rounding is beside it."""


@dataclass
class Verdict:
    """What became of one module's change, of one matrix of it, or of a tensor without one."""

    state: str = RIGHT
    flag: str = ""
    text: str = ""  # what is said of it; {k} and {rest} in it are the numbers beside it
    factor: float | None = None  # how often the change is there
    rest: float | None = None  # how much else was changed, as a part of the weight
    steps: float = 0.0  # how far a number is from the exact sum at most
    dtype: str = ""


class Sample:
    """Some rows of two matrices and the change between them, the right roads, and the strengths of known mistakes."""

    def __init__(
        self, base: Matrix, found: Matrix, update: Update, roads: list[Road], known: list[tuple[float, str]]
    ) -> None:
        self.base, self.update, self.out = base, update, np.dtype(found.dtype)
        self.roads, self.known = roads, known
        count = len(update.left)
        strongest = np.argsort(-update.lengths[0], kind="stable")[:ROWS]
        self.rows = np.unique(np.concatenate([np.linspace(0, count - 1, min(ROWS, count)).astype(int), strongest]))
        runs = np.split(self.rows, np.flatnonzero(np.diff(self.rows) > 1) + 1)  # each is read at once
        self.W, self.m = (np.concatenate([of.read(run[0], run[-1] + 1) for run in runs]) for of in (base, found))
        self.as_base = roundings(self.W, self.out)
        self.is_base = np.any([bits(self.m) == bits(W) for W in self.as_base], axis=0)
        self.moved = self.m.astype(np.float64) - self.W.astype(np.float64)
        self.change = update.scaling * (update.left[self.rows].astype(np.float64) @ update.right.astype(np.float64))

    def replay(self, road: Road, update: Update | None = None) -> Replay:
        """Return a road over these rows, of the update or of another one."""
        return Replay(road, update or self.update, self.out, self.base)

    def explained(self, update: Update) -> bool:
        """Return whether an update explains the numbers that tell something, on one of the roads."""
        for road in self.roads:
            replay = self.replay(road, update)
            values = replay.values(self.W, self.rows)
            telling = np.count_nonzero(~self.is_base | (bits(values) != bits(self.as_base[0])))
            if replay.misses(self.W, self.rows, self.m, values).size <= (1 - ENOUGH) * max(int(telling), 1):
                return True
        return False

    def strength(self, change: np.ndarray) -> tuple[float, float, float]:
        """Return between which strengths a change was added, and which part of the numbers allows these."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a number that is none has no neighbour
            step = steps(np.maximum(np.abs(self.m.astype(np.float64)), np.abs(self.W.astype(np.float64))), self.out)
            told = np.where(np.isfinite(self.moved), np.abs(change) / step, 0.0).ravel()
        chosen = np.argpartition(-told, min(NUMBERS, told.size) - 1)[:NUMBERS]
        chosen = chosen[told[chosen] > 0]
        if not chosen.size:
            return 0.0, 0.0, 0.0
        by, moved = change.ravel()[chosen], self.moved.ravel()[chosen]
        part = max(2.0 ** -digits(self.out), 2.0**-18)
        slack = 0.5 * step.ravel()[chosen] + np.abs(moved) * part + 2.0**-20 * np.abs(by).max()
        ends = np.sort(np.stack([(moved - slack) / by, (moved + slack) / by]), axis=0)
        lows, highs = np.sort(ends[0]), np.sort(ends[1])
        inside = np.arange(1, len(lows) + 1) - np.searchsorted(highs, lows)
        best = int(inside.argmax())
        return float(lows[best]), float(highs[np.searchsorted(highs, lows[best])]), float(inside[best] / len(lows))


# --- the strength ---


def known_strengths(module: Module, adapter: AdapterFile) -> list[tuple[float, str]]:
    """Return the factors by which known mistakes are off, and their names."""
    s, r, alpha = float(module.scaling or 1.0), int(module.rank or module.rank_in_file or 1), module.alpha
    root = adapter.get("use_rslora") is True
    known = [(2.0, "twice"), (0.5, "by half"), (-1.0, "subtracted in the place of added")]
    if root:
        known += [
            (r**0.5, "alpha in the place of alpha / sqrt(r)"),
            (r**-0.5, "alpha / r in the place of alpha / sqrt(r)"),
        ]
    else:
        known += [(float(r), "alpha in the place of alpha / r"), (r**0.5, "alpha / sqrt(r) in the place of alpha / r")]
    known += [(1 / s, "without the scaling"), (s, "with the scaling taken twice")]
    usual, rank = adapter.get("lora_alpha"), adapter.get("r")
    if isinstance(usual, int | float) and type(rank) is int and rank > 0:
        plain = scaling(usual, rank, use_rslora=root) / s
        known.append((plain, "with r and lora_alpha, without rank_pattern and alpha_pattern"))
        known.append((scaling(usual, r, use_rslora=root) / s, "with lora_alpha, without alpha_pattern"))
    if alpha:
        known.append((scaling(8, r, use_rslora=root) / s, "with alpha 8, which is PEFT's own default"))
    return [(k, name) for k, name in known if not math.isclose(k, 1.0)]


def of_strength(low: float, high: float, known: list[tuple[float, str]]) -> Verdict:
    """Return what is said of a strength."""
    k = (low + high) / 2
    slack = max(2e-3 * abs(k), (high - low) / 2)
    fits = [(value, name) for value, name in known if abs(value - k) <= slack]
    names = list(dict.fromkeys(name for _, name in fits))[:2]
    named = f" ({', or '.join(names)})" if names else ""
    return Verdict(WRONG, "factor", f"merged by the factor {{k}}{named}", fits[0][0] if fits else k)


# --- whose change ---


def of_another(path: str, name: str, k: float) -> Verdict:
    """Return what is said of a module that has the change which has a name: "PATH", "PATH, transposed"."""
    other, _, how = name.partition(", ")
    times = "" if abs(k - 1) < 0.02 else ", {k} times"
    if other == path and how == "transposed":
        return Verdict(WRONG, "transposed", f"the change is transposed{times}", k)
    if other == path and how.startswith("packed"):
        return Verdict(WRONG, "packing", f"B's ranks and experts are exchanged{times}", k)
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
    """A few numbers of the change of each module of an adapter, made where something is wrong."""

    def __init__(
        self, factors: Callable[[str], Iterator[tuple[str, np.ndarray, np.ndarray]]], paths: list[str]
    ) -> None:
        """`factors` yields of a module the names, lefts with the scaling, and rights of its changes."""
        self.factors, self.paths = factors, paths
        self.kept: dict[tuple[int, int], list[tuple[str, np.ndarray]]] = {}

    def nearest(self, shape: tuple[int, int], rows: np.ndarray, sketch: np.ndarray) -> tuple[str, float]:
        """Return whose change of a matrix of this shape is most like a sketch of these rows, and how much it is."""
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
        """Return some rows of the change that has a name."""
        path = name.partition(", ")[0]
        found = ((left, right) for n, left, right in self.factors(path) if n == name and len(left) == shape[0])
        left, right = next(found)
        return np.asarray(left[rows].astype(np.float64) @ right.astype(np.float64))


def columns(width: int) -> np.ndarray:
    """Return the random columns of sketches."""
    return np.random.default_rng(0).standard_normal((width, COLUMNS))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two arrays."""
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / size if size else 0.0


# --- all together ---


def named(sample: Sample, own: str, sketches: Sketches) -> Verdict:
    """Return what some rows of a merged weight are, which are neither right nor the base's."""
    for rule in (_rounded_further, _strengths, _twice, _of_dora):
        if (suspect := rule(sample)) is not None:
            return suspect
    return _another(sample, own, sketches) or _in_part(sample) or _measured(sample)


def _another(sample: Sample, own: str, sketches: Sketches) -> Verdict | None:
    """Find another module's change, or the module's own turned round."""
    if not np.isfinite(sample.moved).all():
        return None
    shape = (len(sample.update.left), sample.update.right.shape[1])
    name, near = sketches.nearest(shape, sample.rows, sample.moved @ columns(shape[1]))
    if abs(near) > ALIKE and name != own:
        low, high, share = sample.strength(sketches.change(name, shape, sample.rows))
        if share >= ENOUGH:
            return of_another(own.partition(", ")[0], name, (low + high) / 2)
    return None


def _rounded_further(sample: Sample) -> Verdict | None:
    """Find numbers of a type of fewer bits than the file's, next to those of a right merge."""
    out, W = sample.out, sample.W.astype(np.float64)
    m = W + sample.moved
    right = sample.replay(Road()).values(sample.W, sample.rows).astype(np.float64)
    if not np.isfinite(m).all():
        return None
    for t in HALVES:
        near = np.abs(m - right) <= 1.5 * steps(np.maximum(np.abs(W), np.abs(m)), t)
        if digits(t) < digits(out) and np.array_equal(stored_as(m, t), m) and near.mean() >= ENOUGH:
            return Verdict(WRONG, "rounded-further", f"rounded to {t.name}, further than {out.name} explains", 1.0)
    if sample.W.shape[1] % 64 == 0:
        rest, base = m - right, sample.W.astype(np.float32)
        for x, text in ((base, "merged over the base in NF4, not over its own weights"),
                        (right.astype(np.float32), f"rounded to NF4, further than {out.name} explains")):  # fmt: skip
            lost = dequantize_nf4(*quantize_nf4(x), x.shape) - x
            if np.linalg.norm(rest - lost) < 0.3 * np.linalg.norm(rest):
                return Verdict(WRONG, "over-four-bits" if x is base else "rounded-further", text, 1.0)
    return None


def _strengths(sample: Sample) -> Verdict | None:
    """Find the change at another strength."""
    if sample.update.magnitude is None:
        low, high, share = sample.strength(sample.change)
        if share >= ENOUGH and not (low <= 1.0 <= high) and not low <= 0.0 <= high:
            return of_strength(low, high, sample.known)
        return None
    for k, _ in sample.known:
        if sample.explained(replace(sample.update, scaling=k * sample.update.scaling)):
            return of_strength(k, k, sample.known)
    return None


def _twice(sample: Sample) -> Verdict | None:
    """Find a merge into what was merged."""
    for road in sample.roads:
        first, second = sample.replay(road), sample.replay(replace(road, base=None))
        once, second.norms = first.values(sample.W, sample.rows), first.norms
        misses = second.misses(once, sample.rows, sample.m, second.values(once, sample.rows))
        if misses.size <= (1 - ENOUGH) * float(np.count_nonzero(~sample.is_base)):
            return Verdict(WRONG, "twice", "merged twice, the second time into what was merged", 2.0)
    return None


def _of_dora(sample: Sample) -> Verdict | None:
    """Find what is made of a magnitude: nothing, the base's lengths for those of the sum, or the other axis."""
    update = sample.update
    if update.magnitude is None:
        return None
    if sample.explained(replace(update, magnitude=None)):
        return Verdict(WRONG, "without-magnitude", "merged as LoRA, without DoRA's magnitude")
    if sample.explained(replace(update, lengths_of_base=True)):
        return Verdict(WRONG, "lengths-of-base", "DoRA's gain is by the lengths of the base, not of the sum")
    if sample.explained(replace(update, scaling=0.0)):
        return Verdict(WRONG, "magnitude-alone", "DoRA's magnitude is there without the change")
    return None


def _in_part(sample: Sample) -> Verdict | None:
    """Find weights of which some numbers are changed, all by one strength, and all others the base's."""
    if sample.update.magnitude is not None or not sample.is_base.any():
        return None
    low, high, share = sample.strength(np.where(sample.is_base, 0.0, sample.change))
    if share < ENOUGH:
        return None
    right = sample.replay(Road()).values(sample.W, sample.rows)
    moves = bits(right) != bits(sample.as_base[0])
    part, rows = np.mean(sample.is_base[moves]), [sample.is_base[i][moves[i]] for i in range(len(moves))]
    if not 1 - ENOUGH < part < ENOUGH:  # a few numbers are neither a merge nor its lack
        return None
    places = "in some rows" if all(row.all() or not row.any() for row in rows) else "in part"
    times = "" if low <= 1 <= high else ", and there by the factor {k}"
    text = f"merged {places} alone{times}, {part:.0%} of what should change is the base's"
    return Verdict(WRONG, "in-part", text, (low + high) / 2)


def _measured(sample: Sample) -> Verdict:
    """Measure by least squares how much of the change is there, and what is beside it."""
    with np.errstate(over="ignore", invalid="ignore"):
        E, D, W = sample.moved, sample.change, sample.W.astype(np.float64)
        k = float((E * D).sum()) / max(float((D * D).sum()), 1e-300)
        rest = float(np.linalg.norm(E - k * D)) / max(float(np.linalg.norm(W)), 1e-300)
    if abs(k) < 0.1:
        return Verdict(
            WRONG,
            "other-weights",
            "changed by something else: by {rest} of the weight, the change is not in it",
            k,
            rest,
        )
    text = "changed by more than the adapter: the change is there {k} times, beside it {rest} of the weight"
    return Verdict(WRONG, "other-weights", text, k, rest)
