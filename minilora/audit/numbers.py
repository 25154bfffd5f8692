"""Each module's numbers: whether they are numbers, whether they moved, and how large the change of weight is.

    |delta W|^2 = s^2 |B A|^2 = s^2 sum of (B^T B) * (A A^T)            two matrices (r, r): delta W is never formed

One module's tensors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..files.dtypes import FLOATS
from ..texts import FileRefused, short
from .findings import NOTE, SUSPICIOUS, WRONG, Fault, Finding, alike, counted, found
from .headers import AdapterFile, Module, Shape

SENSIBLE = (1e-12, 1e3)
"""Between which the typical change of one weight lies; a trained weight is of the size of 0.02."""
FARTHEST = 1000.0
"""How many times as large as the others' middle one a module's change may be, before it is suspicious."""

LEAST_SQUARE = 1e-12
"""The smallest part of the largest that the square of a singular value may be, and still count for the rank."""


@dataclass(frozen=True)
class Measured:
    """What a module's tensors hold."""

    norm: float | None  # |delta W|, without the gain of a magnitude; None where it is not known
    zero: tuple[str, ...] = ()  # the factors that are zero everywhere: "A", "B"
    zero_experts: int = 0  # how many of a mixture's experts have a B that is zero, where not all have
    not_finite: tuple[str, ...] = ()  # the tensors with NaN or infinity, with what they hold
    unread: str = ""  # why a tensor could not be read
    unused: int = 0  # how many of its r one factor has no use for, where it is not zero
    constant: bool = False  # whether all numbers of A are the same, and all of B
    mark: str = ""  # which no two modules share, but for the same factors; empty where one is zero


def read_numbers(module: Module) -> Measured:
    """Read a module's tensors, and say what they hold."""
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
            ranks = np.linalg.matrix_rank(np.stack(grams), rtol=LEAST_SQUARE, hermitian=True)
            unused = max(unused, min(B.shape) - int(ranks[0]), min(A.shape) - int(ranks[1]))
    total, idle = sum(squares), squares.count(0.0)
    further = {part: array for part, array in arrays.items() if part not in "AB"}
    # Where the sum is a number, and none is zero, so are all numbers that it is made of, and none needs a second look.
    bad = _not_finite(module, further if np.isfinite(total) else arrays)
    zero = _zero(arrays)
    norm = None if module.scaling is None or bad else abs(module.scaling) * max(total, 0.0) ** 0.5
    mark = "" if zero or bad else f"{total!r} {arrays['A'].flat[0]!r} {arrays['B'].flat[0]!r}"
    constant = all((arrays[part] == arrays[part].flat[0]).all() for part in "AB")
    return Measured(norm, zero, idle if idle < len(squares) else 0, bad, "", 0 if bad else unused, constant, mark)


def rms_of(module: Module, norm: float | None) -> float | None:
    """Return the root mean square of a module's change; None where its size is not known."""
    sides = module.widths
    if norm is None or sides is None or not math.isfinite(norm):
        return None
    return norm / math.sqrt(math.prod(sides) * module.experts)


def _zero(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return which factors are zero everywhere."""
    return tuple(part for part in "AB" if part in arrays and arrays[part].size and not arrays[part].any())


def _not_finite(module: Module, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the tensors with NaN or infinity, and what they hold."""
    bad = []
    for part, array in arrays.items():
        count = array.size - int(np.isfinite(array).sum())
        if count:
            what = "NaN" if np.isnan(array).any() else "infinity"
            bad.append(f"{short(module.parts[part])} ({what} in {count:,} of {array.size:,})")
    return tuple(bad)


# --- shapes ---


def half_pairs(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find modules of which one factor is missing, or both."""
    has = {path: "".join(part for part in "AB" if part in m.parts) for path, m in adapter.modules.items()}
    half = [path for path, parts in has.items() if len(parts) == 1]
    missing = {"A": "B is", "B": "A is"}[has[half[0]]] if len({has[path] for path in half}) == 1 else "A or B is"
    yield from found(WRONG, "half-a-pair", f"half a pair: {missing} missing in {{count}}: {{names}}", half)
    without = [path for path, parts in has.items() if not parts]
    parts = ", ".join(adapter.modules[without[0]].parts if without else ()) or "alpha"  # kohya's, which is no part
    yield from found(WRONG, "half-a-pair", "{parts} and no factors in {names}", without, parts=parts)


def misshapen(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that make no pair of the rank that is said, and magnitudes and biases of another length."""
    faults = []
    for path, m in adapter.modules.items():
        A, B = m.factors
        if A is None or B is None:
            continue
        fault = _of_pair(m, A, B, configured=adapter.config is not None)
        if fault is None and (magnitude := m.shape("magnitude")) is not None:
            kohya = "kohya" in adapter.format
            fault = (_of_lycoris if kohya else _of_magnitude)(magnitude, B[0], A[-1], m.kind)
        faults += [(path, fault)] if fault is not None else []
        bias = m.shape("bias")
        if bias is not None and bias != (B[0],):
            faults.append((path, (WRONG, "bias-shape", f"lora_B.bias has shape {list(bias)}, expected [{B[0]}]")))
    return alike(faults)


def _of_pair(m: Module, A: Shape, B: Shape, *, configured: bool) -> Fault | None:
    """Return what is wrong with the shapes of two factors."""
    a, b = (list(m.tensors.shapes[m.parts[part]]) for part in "AB")
    they = f"the factors have the shapes {a} and {b}"
    if m.matrices is None:
        return WRONG, "shape-of-factors", f"{they}, expected two matrices with numbers in them"
    rows = None if m.rank is None else m.experts * m.rank
    turned = A[1] == B[0] and A[0] != B[1]
    if turned or (rows is not None and A[0] != rows and A[1] == B[0] == rows):
        return WRONG, "factors-turned", f"{they}: they lie transposed, or are exchanged"
    if m.widths is None:
        return WRONG, "ranks-differ", f"{they}: they do not share a rank"
    if rows is not None and A[0] != rows:
        said = "the rank that is configured" if configured else "the rank"
        return WRONG, "rank-differs", f"{they}, and {said} is {m.rank}"
    return None


def _of_magnitude(shape: Shape, out: int, width: int, kind: str) -> Fault | None:
    """Return what is wrong with a magnitude's shape: it has one number for each output."""
    sizes = [n for n in shape if n != 1]
    if (sizes == [out] or (out == 1 and not sizes)) and (kind == "conv" or len(shape) == 1):
        return None
    said = f"the magnitude has shape {list(shape)}"
    if sizes == [width]:
        return WRONG, "magnitude-axis", f"{said}, one number for each input: expected [{out}]"
    return WRONG, "magnitude-shape", f"{said}, expected [{out}]"


def _of_lycoris(shape: Shape, out: int, width: int, kind: str) -> Fault | None:
    """Return what is to be said of the shape of LyCORIS's magnitude, which may have one number for each input."""
    if len(shape) > 1 and shape[:2] == (1, width):
        text = "dora_scale has one number for each input, as LyCORIS allows; PEFT's magnitude has one for each output"
        return NOTE, "magnitude-of-inputs", text
    fits = [n for n in shape if n != 1] in ([out], [])
    return None if fits else (WRONG, "magnitude-shape", f"dora_scale has shape {list(shape)}")


# --- types ---


def types(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that are no floating-point numbers, and tensors of several types in a module."""
    if adapter.tensors.weights is None:
        return
    of = {path: {adapter.tensors.dtypes[name] for name in m.parts.values()} for path, m in adapter.modules.items()}
    strange = [path for path, kinds in of.items() if kinds - {*FLOATS}]
    mixed = [path for path, kinds in of.items() if len(kinds) > 1 and path not in strange]
    for level, code, paths, text in (
        (WRONG, "type", strange, "factors of the type {kinds}, expected {floats}: {names}"),
        (NOTE, "mixed-types", mixed, "tensors of several types ({kinds}) in {names}"),
    ):
        kinds = ", ".join(sorted(set().union(*(of[path] for path in paths))))
        yield from found(level, code, text, paths, kinds=kinds, floats=", ".join(FLOATS))


# --- numbers ---


def not_finite(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find NaN and infinity."""
    bad = {path: n.not_finite[0] for path, n in numbers.items() if n.not_finite}
    first = next(iter(bad.values()), "")
    yield from found(WRONG, "not-finite", "NaN or infinity in {count}: {names}; {first}", bad, first=first)


def unread(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find tensors that cannot be read as floats."""
    why = {path: n.unread for path, n in numbers.items() if n.unread}
    yield from found(WRONG, "not-read", "{count} cannot be read: {why}", why, why=next(iter(why.values()), ""))


def zeros(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors that are zero everywhere: as every B, and an embedding's A, is before the training."""
    starts = {path: "A" if adapter.modules[path].kind == "embedding" else "B" for path in numbers}
    fresh = [path for path, n in numbers.items() if starts[path] in n.zero]
    if fresh and len(fresh) == len([n for n in numbers.values() if not n.unread]):
        text = (
            "every B is zero, so the adapter does nothing: it was never trained, or the optimiser did not hold its "
            "weights, or the save did not gather them"
        )
        yield Finding(SUSPICIOUS, "all-zero", text, tuple(fresh))
    else:
        text = "B is zero in {some} of {all} modules, so these do nothing: {names}"
        yield from found(SUSPICIOUS, "some-zero", text, fresh, some=len(fresh), all=len(numbers))
    dead = [path for path, n in numbers.items() if n.zero and path not in fresh]
    other = {"A": "B", "B": "A"}[starts[dead[0]]] if dead else ""
    text = "{other}, which starts with random numbers, is zero, so these do nothing: {names}"
    yield from found(SUSPICIOUS, "other-zero", text, dead, other=other)
    idle = {path: n.zero_experts for path, n in numbers.items() if n.zero_experts and path not in fresh}
    text = "B is zero for {experts} of {names}: no token reached them"
    yield from found(NOTE, "idle-experts", text, idle, experts=counted(sum(idle.values()), "expert"))


def far_larger(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find a change that is out of all proportion to the others."""
    known = {path: n.norm for path, n in numbers.items() if n.norm}
    middle = float(np.median([*known.values()])) if known else 0.0
    text = "a change of more than {times:g} times the others' middle one: {names}"
    far = [path for path, norm in known.items() if norm > FARTHEST * middle]
    yield from found(SUSPICIOUS, "change-far-larger", text, far, times=FARTHEST)


def absurd(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find changes of a size that no training makes, as where numbers were decoded as another type's."""
    typical = {}
    for path, n in numbers.items():
        if rms := rms_of(adapter.modules[path], n.norm):
            typical[path] = rms
    least, most = SENSIBLE
    text = "a weight's typical change is {size} in {count}, which no training makes: {names}"
    large = [path for path, size in typical.items() if size > most]
    small = [path for path, size in typical.items() if size < least]
    yield from found(SUSPICIOUS, "change-absurd", text, large, size=f"more than {most:g}")
    yield from found(SUSPICIOUS, "change-absurd", text, small, size=f"less than {least:g}")


def twins(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find modules with the same factors."""
    seen: dict[str, list[str]] = {}
    for path, n in numbers.items():
        if n.mark:
            seen.setdefault(n.mark, []).append(path)
    same = [path for paths in seen.values() if len(paths) > 1 for path in paths]
    by_hand = all(n.constant for n in numbers.values())  # as in a test: no accident
    text = "the very same factors as another module's, so one was saved in the place of the other: {names}"
    yield from found(NOTE if by_hand else SUSPICIOUS, "same-factors", text, same)


def unused_ranks(adapter: AdapterFile, numbers: Mapping[str, Measured]) -> Iterator[Finding]:
    """Find factors of a lower rank than r: of rows that are zero, or other rows' sums."""
    unused = {path: n.unused for path, n in numbers.items() if n.unused}
    text = (
        "a factor's rank is below r, by {most} at most, in {names}: zeros or copies that fill it up, or a training of "
        "fewer tokens than r"
    )
    yield from found(NOTE, "rank-unused", text, unused, most=max(unused.values(), default=0))


RULES = (half_pairs, misshapen, types, not_finite, unread, zeros, far_larger, absurd, twins, unused_ranks)
