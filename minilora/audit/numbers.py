"""Each module's numbers: whether they are numbers, whether they moved, and how large the change of weight is.

    |delta W|^2 = s^2 |B A|^2 = s^2 sum of (B^T B) * (A A^T)            two matrices (r, r): delta W is never formed

One module's tensors are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..checks import FileRefused, short
from ..files.tensors import FLOATS
from .adapterfile import AdapterFile, Module
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, have, listed

SENSIBLE = (1e-12, 1e3)
"""Between which the typical change of one weight lies; a trained weight is of the size of 0.02."""
FARTHEST = 1000.0
"""How many times as large as the others' middle one a module's change may be, before it is suspicious."""


@dataclass(frozen=True)
class Numbers:
    """What a module's tensors hold."""

    norm: float | None  # |delta W|, without the gain of a magnitude; None where it is not known
    zero: tuple[str, ...] = ()  # the factors that are zero everywhere: "A", "B"
    zero_experts: int = 0  # how many of a mixture's experts have a B that is zero, where not all have
    not_finite: tuple[str, ...] = ()  # the tensors with NaN or infinity, with what they hold
    unread: str = ""  # why a tensor could not be read
    mark: str = ""  # which no two modules share, but for the same factors; empty where one is zero


def numbers_of(adapter: AdapterFile, module: Module) -> Numbers:
    """Read a module's tensors, and say what they hold."""
    try:
        arrays = {part: adapter.tensors.read(name) for part, name in module.parts.items()}
    except FileRefused as error:
        return Numbers(None, unread=str(error))
    if module.rank_in_file(adapter.tensors) is None:
        return Numbers(None, _zero(arrays), not_finite=_not_finite(module, arrays))
    squares = []
    for A, B in module.pairs(arrays["A"], arrays["B"]):
        A, B = A.astype(np.float64), B.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            squares.append(float(((B.T @ B) * (A @ A.T)).sum()))
    total, idle = sum(squares), squares.count(0.0)
    further = {part: array for part, array in arrays.items() if part not in "AB"}
    # Where the sum is a number, and none is zero, so are all numbers that it is made of, and none needs a second look.
    bad = _not_finite(module, further if np.isfinite(total) else arrays)
    zero = _zero(arrays) if idle == len(squares) else ()
    norm = None if module.scaling is None or bad else abs(module.scaling) * max(total, 0.0) ** 0.5
    mark = "" if zero or bad else f"{total!r} {arrays['A'].flat[0]!r} {arrays['B'].flat[0]!r}"
    return Numbers(norm, zero, idle if idle < len(squares) else 0, bad, mark=mark)


def _zero(arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return which factors are zero everywhere."""
    return tuple(part for part in "AB" if part in arrays and not arrays[part].any())


def _not_finite(module: Module, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Return the tensors with NaN or infinity, and what they hold."""
    bad = []
    for part, array in arrays.items():
        count = array.size - int(np.isfinite(array).sum())
        if count:
            what = "NaN" if np.isnan(array).any() else "infinity"
            bad.append(f"{short(module.parts[part])} ({what} in {count:,} of {array.size:,})")
    return tuple(bad)


def number_findings(adapter: AdapterFile, numbers: dict[str, Numbers]) -> Iterator[Finding]:
    """Yield what is wrong with factors: missing ones, their shapes, and their numbers."""
    yield from _pairs(adapter)
    yield from _types(adapter)
    bad = {path: n for path, n in numbers.items() if n.not_finite}
    if bad:
        first = next(iter(bad.values())).not_finite[0]
        text = f"NaN or infinity in {counted(len(bad), 'module')}: {listed(list(bad))}; {first}"
        yield Finding(WRONG, "not-finite", text, tuple(bad))
    if unread := [n.unread for n in numbers.values() if n.unread]:
        yield Finding(WRONG, "not-read", f"{counted(len(unread), 'module')} cannot be read: {unread[0]}")
    yield from _zeros(adapter, numbers)
    known = {path: n.norm for path, n in numbers.items() if n.norm}
    middle = float(np.median(list(known.values()))) if known else 0.0
    if far := [path for path, norm in known.items() if norm > FARTHEST * middle]:
        text = f"the change of {listed(far)} is more than {FARTHEST:g} times the others' middle one"
        yield Finding(SUSPICIOUS, "change-far-larger", text, tuple(far))
    yield from _absurd(adapter, known)
    seen: dict[str, list[str]] = {}
    for path, n in numbers.items():
        if n.mark:
            seen.setdefault(n.mark, []).append(path)
    if twins := [path for paths in seen.values() if len(paths) > 1 for path in paths]:
        text = f"{listed(twins)} have the very same factors as another module: one was saved in the place of the other"
        made_up = len(twins) == len(numbers)  # as in a test, and no accident
        yield Finding(NOTE if made_up else SUSPICIOUS, "same-factors", text, tuple(twins))


def _absurd(adapter: AdapterFile, norms: dict[str, float]) -> Iterator[Finding]:
    """Yield changes of a size that no training makes, as where numbers were decoded as another type's."""
    typical = {}
    for path, norm in norms.items():
        m = adapter.modules[path]
        out, width = m.widths(adapter.tensors) or (1, 1)
        typical[path] = norm / math.sqrt(out * width * m.experts)
    least, most = SENSIBLE
    for text, paths in (
        (f"more than {most:g}", [path for path, size in typical.items() if size > most]),
        (f"less than {least:g}", [path for path, size in typical.items() if size < least]),
    ):
        if paths:
            what = f"a weight's typical change is {text} in {counted(len(paths), 'module')}, which no training makes"
            yield Finding(SUSPICIOUS, "change-absurd", f"{what}: {listed(paths)}", tuple(paths))


def _pairs(adapter: AdapterFile) -> Iterator[Finding]:
    """Yield half pairs, and shapes that make no pair."""
    half = [path for path, m in adapter.modules.items() if len({*m.parts} & {*"AB"}) == 1]
    if half:
        missing = "B" if "A" in adapter.modules[half[0]].parts else "A"
        text = f"half a pair: {missing} is missing in {counted(len(half), 'module')}: {listed(half)}"
        if len({frozenset({*adapter.modules[path].parts} & {*"AB"}) for path in half}) > 1:
            text = f"half a pair: A or B is missing in {counted(len(half), 'module')}: {listed(half)}"
        yield Finding(WRONG, "half-a-pair", text, tuple(half))
    without = [path for path, m in adapter.modules.items() if not {*m.parts} & {*"AB"}]
    if without:
        text = f"{listed(without)} {have(without)} {', '.join(adapter.modules[without[0]].parts)} and no factors"
        yield Finding(WRONG, "half-a-pair", text, tuple(without))
    misfits: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for path, m in adapter.modules.items():
        A, B = m.shapes(adapter.tensors)
        if A is None or B is None:
            continue
        code, text = _misfit(m, A, B, adapter)
        if code:
            misfits.setdefault(code, []).append(path)
            texts.setdefault(code, text)
        if (magnitude := m.parts.get("magnitude")) is not None and not code:
            code, text = _axis(m, adapter.tensors.shapes[magnitude], B[0], A[-1], adapter.format)
            if code:
                misfits.setdefault(code, []).append(path)
                texts.setdefault(code, text)
        bias = m.parts.get("bias")
        if bias is not None and adapter.tensors.shapes[bias] != (B[0],):
            misfits.setdefault("bias-shape", []).append(path)
            texts.setdefault(
                "bias-shape", f"lora_B.bias has shape {list(adapter.tensors.shapes[bias])}, expected [{B[0]}]"
            )
    for code, paths in misfits.items():
        level = NOTE if code == "magnitude-of-inputs" else WRONG
        also = f"; so in {counted(len(paths), 'module')}: {listed(paths)}" if len(paths) > 1 else ""
        yield Finding(level, code, f"{short(paths[0])}: {texts[code]}{also}", tuple(paths))


def _misfit(m: Module, A: tuple[int, ...], B: tuple[int, ...], adapter: AdapterFile) -> tuple[str, str]:
    """Return what is wrong with the shapes of two factors, nothing where they make a pair of the rank that is said."""
    a, b = (list(adapter.tensors.shapes[m.parts[part]]) for part in "AB")
    if len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
        return (
            "shape-of-factors",
            f"the factors have the shapes {a} and {b}, expected two matrices with numbers in them",
        )
    grouped = m.kind == "conv" and A[0] % B[1] == 0  # of a convolution with groups
    rank, many = m.rank, m.experts
    turned = A[1] == B[0] and A[0] != B[1]
    if turned or (rank is not None and A[0] != many * rank and A[1] == many * rank and B[0] == many * rank):
        return "factors-turned", f"the factors have the shapes {a} and {b}: they lie transposed, or are exchanged"
    if A[0] != B[1] and not grouped:
        return "ranks-differ", f"the factors have the shapes {a} and {b}: they do not share a rank"
    if rank is not None and A[0] != many * rank:
        said = "the rank that is configured" if adapter.config is not None else "the rank"
        return "rank-differs", f"the factors have the shapes {a} and {b}, and {said} is {rank}"
    return "", ""


def _axis(m: Module, shape: tuple[int, ...], out: int, width: int, format: str) -> tuple[str, str]:
    """Return what is wrong with a magnitude's shape: one number for each output, which LyCORIS may have of inputs."""
    sizes = [n for n in shape if n != 1]
    if "kohya" in format:
        of_inputs = len(shape) > 1 and shape[0] == 1 and shape[1] == width and (out != width or shape != (out, 1))
        text = "dora_scale has one number for each input, as LyCORIS allows; PEFT's magnitude has one for each output"
        if of_inputs:
            return "magnitude-of-inputs", text
        return ("", "") if sizes in ([out], []) else ("magnitude-shape", f"dora_scale has shape {list(shape)}")
    if len(shape) == 2 and shape[0] == 1 and sizes == [width] and m.kind == "linear":
        return "magnitude-axis", f"the magnitude has shape {list(shape)}, one number for each input: expected [{out}]"
    if (sizes == [out] or (out == 1 and not sizes)) and (m.kind == "conv" or len(shape) == 1):
        return "", ""
    if sizes == [width]:
        return "magnitude-axis", f"the magnitude has shape {list(shape)}, one number for each input: expected [{out}]"
    return "magnitude-shape", f"the magnitude has shape {list(shape)}, expected [{out}]"


def _types(adapter: AdapterFile) -> Iterator[Finding]:
    """Yield factors that are no floating-point numbers."""
    if adapter.tensors.base is None:
        return
    types = {path: {adapter.tensors.dtypes[name] for name in m.parts.values()} for path, m in adapter.modules.items()}

    def found(paths: list[str]) -> str:
        return ", ".join(sorted(set().union(*(types[path] for path in paths))))

    strange = [path for path, of_it in types.items() if of_it - {*FLOATS}]
    if strange:
        text = f"{listed(strange)} {have(strange)} the type {found(strange)}, expected {', '.join(FLOATS)}"
        yield Finding(WRONG, "type", text, tuple(strange))
    if mixed := [path for path, of_it in types.items() if len(of_it) > 1 and path not in strange]:
        text = f"the tensors of {listed(mixed)} have several types: {found(mixed)}"
        yield Finding(NOTE, "mixed-types", text, tuple(mixed))


def _zeros(adapter: AdapterFile, numbers: dict[str, Numbers]) -> Iterator[Finding]:
    """Yield factors that are zero everywhere: as every B, and an embedding's A, is before the training."""
    starts = {path: "A" if adapter.modules[path].kind == "embedding" else "B" for path in numbers}
    fresh = [path for path, n in numbers.items() if starts[path] in n.zero]
    if fresh and len(fresh) == len([n for n in numbers.values() if not n.unread]):
        text = (
            "every B is zero, so the adapter does nothing: it was never trained, or the optimiser did not hold its "
            "weights, or the save did not gather them"
        )
        yield Finding(SUSPICIOUS, "all-zero", text, tuple(fresh))
    elif fresh:
        text = f"B is zero in {len(fresh)} of {len(numbers)} modules, so these do nothing: {listed(fresh)}"
        yield Finding(SUSPICIOUS, "some-zero", text, tuple(fresh))
    dead = [path for path, n in numbers.items() if n.zero and path not in fresh]
    if dead:
        what = {"A": "B", "B": "A"}[starts[dead[0]]]
        text = f"{what}, which starts with random numbers, is zero in {listed(dead)}, so these do nothing"
        yield Finding(SUSPICIOUS, "other-zero", text, tuple(dead))
    if idle := {path: n.zero_experts for path, n in numbers.items() if n.zero_experts and path not in fresh}:
        text = f"B is zero for {counted(sum(idle.values()), 'expert')} of {listed(list(idle))}: no token reached them"
        yield Finding(NOTE, "idle-experts", text, tuple(idle))
