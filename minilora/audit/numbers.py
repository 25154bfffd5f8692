"""Rules about each module's tensors: their shapes, types and values, plus the size of the weight's change.

    |delta W|^2 = s^2 |B A|^2 = s^2 sum of (B^T B) * (A A^T)            two matrices (r, r): delta W is never formed

Only one module's tensors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..files.dtypes import FLOATS
from ..texts import FileRefused, short
from .findings import NOTE, SUSPICIOUS, WRONG, Fault, Finding, about, counted, one_per_code
from .headers import AdapterFile, Module, Shape

PLAUSIBLE = (1e-12, 1e3)
"""The range of plausible RMS changes of a weight; trained weights are of the order of 0.02."""
OUTLIER = 1000.0
"""A module's change is suspicious if it is more than this many times the median."""

RANK_TOLERANCE = 1e-12
"""A squared singular value counts toward the rank if it is above this share of the largest."""


@dataclass(frozen=True)
class Measured:
    """Statistics of a module's tensors."""

    norm: float | None  # |delta W|, without a magnitude's gain; None if unknown
    zero: tuple[str, ...] = ()  # the factors that are zero everywhere: "A", "B"
    zero_experts: int = 0  # number of experts whose B is zero; 0 if all are
    not_finite: tuple[str, ...] = ()  # descriptions of the tensors with NaN or infinity
    unread: str = ""  # why a tensor could not be read
    unused: int = 0  # how far a nonzero factor's rank is below r
    constant: bool = False  # whether A has only one distinct number, and B too
    identity: str = ""  # equal only for modules with the same factors; "" if a factor is zero


def read_numbers(module: Module) -> Measured:
    """Read a module's tensors and return their statistics."""
    try:
        arrays = {part: module.tensors.read(name) for part, name in module.parts.items()}
    except FileRefused as error:
        return Measured(None, unread=str(error))
    if module.rank_in_file is None:
        return Measured(None, _zero(arrays), not_finite=_not_finite(module, arrays))
    squares, unused = [], 0
    for A, B in module.pairs(arrays["A"], arrays["B"]):
        A, B = A.astype(np.float64), B.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            grams = B.T @ B, A @ A.T
            squares.append(float((grams[0] * grams[1]).sum()))
        if squares[-1] and np.isfinite(grams).all():
            ranks = np.linalg.matrix_rank(np.stack(grams), rtol=RANK_TOLERANCE, hermitian=True)
            unused = max(unused, min(B.shape) - int(ranks[0]), min(A.shape) - int(ranks[1]))
    total, idle = sum(squares), squares.count(0.0)
    further = {part: array for part, array in arrays.items() if part not in "AB"}
    # If the sum is finite, all numbers of A and B are finite, so they need not be checked one by one.
    bad = _not_finite(module, further if np.isfinite(total) else arrays)
    zero = _zero(arrays)
    norm = None if module.scaling is None or bad else abs(module.scaling) * max(total, 0.0) ** 0.5
    identity = "" if zero or bad else f"{total!r} {arrays['A'].flat[0]!r} {arrays['B'].flat[0]!r}"
    constant = all((arrays[part] == arrays[part].flat[0]).all() for part in "AB")
    return Measured(norm, zero, idle if idle < len(squares) else 0, bad, "", 0 if bad else unused, constant, identity)


def rms_of(module: Module, norm: float | None) -> float | None:
    """Return the RMS of a module's change, or None if its norm is unknown."""
    sides = module.widths
    if norm is None or sides is None or not math.isfinite(norm):
        return None
    return norm / math.sqrt(math.prod(sides) * module.experts)


def _zero(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the factors that are zero everywhere."""
    return tuple(part for part in "AB" if part in arrays and arrays[part].size and not arrays[part].any())


def _not_finite(module: Module, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return a description of each tensor with NaN or infinity."""
    bad = []
    for part, array in arrays.items():
        count = array.size - int(np.isfinite(array).sum())
        if count:
            what = "NaN" if np.isnan(array).any() else "infinity"
            bad.append(f"{short(module.parts[part])} ({what} in {count:,} of {array.size:,})")
    return tuple(bad)


# --- shapes ---


def half_pairs(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find modules that lack one factor or both."""
    has = {path: "".join(part for part in "AB" if part in m.parts) for path, m in adapter.modules.items()}
    half = [path for path, parts in has.items() if len(parts) == 1]
    missing = {"A": "B is", "B": "A is"}[has[half[0]]] if len({has[path] for path in half}) == 1 else "A or B is"
    yield from about(WRONG, "half-a-pair", f"half a pair: {missing} missing in {{count}}: {{names}}", half)
    without = [path for path, parts in has.items() if not parts]
    parts = ", ".join(adapter.modules[without[0]].parts if without else ()) or "alpha"  # kohya's alpha is no part
    yield from about(WRONG, "half-a-pair", "{parts} without factors in {names}", without, parts=parts)


def misshapen(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that do not form a pair of the expected rank, and magnitudes and biases of the wrong length."""
    faults = []
    for path, m in adapter.modules.items():
        A, B = m.factors
        if A is None or B is None:
            continue
        fault = _pair_fault(m, A, B, configured=adapter.config is not None)
        if fault is None and (magnitude := m.shape("magnitude")) is not None:
            kohya = "kohya" in adapter.format
            fault = (_lycoris_fault if kohya else _magnitude_fault)(magnitude, B[0], A[-1], m.kind)
        faults += [(path, fault)] if fault is not None else []
        bias = m.shape("bias")
        if bias is not None and bias != (B[0],):
            faults.append((path, (WRONG, "bias-shape", f"lora_B.bias has shape {list(bias)}, expected [{B[0]}]")))
    return one_per_code(faults)


def _pair_fault(m: Module, A: Shape, B: Shape, *, configured: bool) -> Fault | None:
    """Return the fault in the shapes of two factors, or None."""
    a, b = (list(m.tensors.shapes[m.parts[part]]) for part in "AB")
    they = f"the factors have the shapes {a} and {b}"
    if m.matrices is None:
        return WRONG, "shape-of-factors", f"{they}, expected two nonempty matrices"
    rows = None if m.rank is None else m.experts * m.rank
    exchanged = A[1] == B[0] and A[0] != B[1]
    if exchanged or (rows is not None and A[0] != rows and A[1] == B[0] == rows):
        return WRONG, "factors-turned", f"{they}: they are transposed or exchanged"
    if m.widths is None:
        return WRONG, "ranks-differ", f"{they}: they do not share a rank"
    if rows is not None and A[0] != rows:
        rank = "the configured rank" if configured else "the rank"
        return WRONG, "rank-differs", f"{they}, but {rank} is {m.rank}"
    return None


def _magnitude_fault(shape: Shape, out: int, width: int, kind: str) -> Fault | None:
    """Return the fault in a magnitude's shape, which should have one number for each output, or None."""
    sizes = [n for n in shape if n != 1]
    if (sizes == [out] or (out == 1 and not sizes)) and (kind == "conv" or len(shape) == 1):
        return None
    start = f"the magnitude has shape {list(shape)}"
    if sizes == [width]:
        return WRONG, "magnitude-axis", f"{start}, one number for each input, expected [{out}]"
    return WRONG, "magnitude-shape", f"{start}, expected [{out}]"


def _lycoris_fault(shape: Shape, out: int, width: int, kind: str) -> Fault | None:
    """Return the fault in the shape of LyCORIS's magnitude, which may have one number for each input, or None."""
    if len(shape) > 1 and shape[:2] == (1, width):
        text = "dora_scale has one number for each input, as LyCORIS allows; PEFT's magnitude has one for each output"
        return NOTE, "magnitude-of-inputs", text
    fits = [n for n in shape if n != 1] in ([out], [])
    return None if fits else (WRONG, "magnitude-shape", f"dora_scale has shape {list(shape)}, expected {out} numbers")


# --- types ---


def types(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that are not floating-point numbers, and modules whose tensors have different types."""
    if adapter.tensors.weights is None:
        return
    of = {path: {adapter.tensors.dtypes[name] for name in m.parts.values()} for path, m in adapter.modules.items()}
    strange = [path for path, kinds in of.items() if kinds - {*FLOATS}]
    mixed = [path for path, kinds in of.items() if len(kinds) > 1 and path not in strange]
    for level, code, paths, text in (
        (WRONG, "type", strange, "factors of the type {kinds}, expected {floats}: {names}"),
        (NOTE, "mixed-types", mixed, "tensors of different types ({kinds}) in {names}"),
    ):
        kinds = ", ".join(sorted(set().union(*(of[path] for path in paths))))
        yield from about(level, code, text, paths, kinds=kinds, floats=", ".join(FLOATS))


# --- numbers ---


def not_finite(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find tensors with NaN or infinity."""
    bad = {path: n.not_finite[0] for path, n in numbers.items() if n.not_finite}
    first = next(iter(bad.values()), "")
    yield from about(WRONG, "not-finite", "NaN or infinity in {count}: {names}; {first}", bad, first=first)


def unread(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find tensors that cannot be read as floats."""
    why = {path: n.unread for path, n in numbers.items() if n.unread}
    yield from about(WRONG, "not-read", "{count} cannot be read: {why}", why, why=next(iter(why.values()), ""))


def zeros(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that are zero everywhere, as every B and an embedding's A are before training."""
    starts = {path: "A" if adapter.modules[path].kind == "embedding" else "B" for path in numbers}
    fresh = [path for path, n in numbers.items() if starts[path] in n.zero]
    if fresh and len(fresh) == len([n for n in numbers.values() if not n.unread]):
        text = (
            "every B is zero, so the adapter does nothing: it was never trained, or the optimiser did not have its "
            "weights, or the save did not gather them"
        )
        yield Finding(SUSPICIOUS, "all-zero", text, tuple(fresh))
    else:
        text = "B is zero in {some} of {all} modules, which therefore do nothing: {names}"
        yield from about(SUSPICIOUS, "some-zero", text, fresh, some=len(fresh), all=len(numbers))
    dead = [path for path, n in numbers.items() if n.zero and path not in fresh]
    other = {"A": "B", "B": "A"}[starts[dead[0]]] if dead else ""
    text = "{other}, which is initialised with random numbers, is zero, so these modules do nothing: {names}"
    yield from about(SUSPICIOUS, "other-zero", text, dead, other=other)
    idle = {path: n.zero_experts for path, n in numbers.items() if n.zero_experts and path not in fresh}
    text = "B is zero for {experts} of {names}: no token reached them"
    yield from about(NOTE, "idle-experts", text, idle, experts=counted(sum(idle.values()), "expert"))


def far_larger(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find changes that are far larger than the others."""
    known = {path: n.norm for path, n in numbers.items() if n.norm}
    median = float(np.median([*known.values()])) if known else 0.0
    text = "a change of more than {times:g} times the median: {names}"
    far = [path for path, norm in known.items() if norm > OUTLIER * median]
    yield from about(SUSPICIOUS, "change-far-larger", text, far, times=OUTLIER)


def implausible(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find changes of an implausible size, as if numbers had been decoded as the wrong type."""
    typical = {}
    for path, n in numbers.items():
        if rms := rms_of(adapter.modules[path], n.norm):
            typical[path] = rms
    least, most = PLAUSIBLE
    text = "the RMS change of a weight is {size} in {count}, which is implausible: {names}"
    large = [path for path, size in typical.items() if size > most]
    small = [path for path, size in typical.items() if size < least]
    yield from about(SUSPICIOUS, "change-absurd", text, large, size=f"more than {most:g}")
    yield from about(SUSPICIOUS, "change-absurd", text, small, size=f"less than {least:g}")


def duplicates(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find modules with identical factors."""
    seen: dict[str, list[str]] = {}
    for path, n in numbers.items():
        if n.identity:
            seen.setdefault(n.identity, []).append(path)
    same = [path for paths in seen.values() if len(paths) > 1 for path in paths]
    by_hand = all(n.constant for n in numbers.values())  # as in a test, where it is intended
    text = "identical to another module's factors, so one was saved instead of the other: {names}"
    yield from about(NOTE if by_hand else SUSPICIOUS, "same-factors", text, same)


def unused_ranks(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors whose rank is below r because rows are zero or linear combinations of others."""
    unused = {path: n.unused for path, n in numbers.items() if n.unused}
    text = (
        "a factor's rank is below r, by at most {most}, in {names}: it was padded with zeros or copies, or trained on "
        "fewer than r tokens"
    )
    yield from about(NOTE, "rank-unused", text, unused, most=max(unused.values(), default=0))


RULES = (half_pairs, misshapen, types, not_finite, unread, zeros, far_larger, implausible, duplicates, unused_ranks)
