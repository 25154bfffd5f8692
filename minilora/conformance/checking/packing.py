"""The two functions that a layer in NF4 has besides: ``pack``, from a weight to codes, and ``unpack``, back.

pack(weight) -> (packed, absmax)                  two codes in a byte, the earlier one in the high half; float32
unpack(packed, absmax, shape) -> weight           with the keywords nested_absmax and mean, if it names them
"""

from __future__ import annotations

from collections.abc import Callable, Set

import numpy as np

from ...layers.nf4 import NF4
from ..problems.bugs import Bug, bugs_of, the_named
from ..problems.kinds import FOUR_BITS as FOUR_BIT_PROBLEMS
from ..problems.lowprecision import BLOCK
from ..problems.tolerance import Trial
from .calling import Watch, described

NEAR = 1e-6
"""How much nearer another code may be: two programs round the quotient in their own ways."""


def weights() -> list[np.ndarray]:
    """Return weights to quantise: an odd number of them with a block of zeros, and others of another size."""
    rng = np.random.default_rng(6)
    first, second = (0.1 * rng.standard_normal(shape).astype(np.float32) for shape in ((5, 39), (4, 64)))
    first.reshape(-1)[BLOCK : 2 * BLOCK] = 0
    return [first, second]


def codes(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Let weights be quantised: each code is the nearest, and a scale is the largest absolute value of its block."""
    return watch.judge("pack", _codes)


def _codes(watch: Watch) -> str:
    packs, texts = [], []
    for weight in weights():
        returned = watch.call("pack", {"weight": weight})
        if not isinstance(returned, (tuple, list)) or len(returned) < 2:
            return f"pack returns {described(returned)}, expected packed and absmax"
        packed, absmax = (np.asarray(array).ravel() for array in returned[:2])
        count, blocks = weight.size, -(-weight.size // BLOCK)
        if packed.dtype != np.uint8 or len(packed) != (count + 1) // 2 or len(absmax) != blocks:
            said = f"{packed.dtype} ({len(packed)},) and ({len(absmax)},)"
            return f"pack returns {said}, expected uint8 ({(count + 1) // 2},) and ({blocks},)"
        packs.append((packed, absmax.astype(np.float64)))
        texts.append(_wrong_code(weight.ravel(), *packs[-1]))
    if not any(texts):
        return "ok"

    def explains(bug: Bug) -> bool:
        predicted = [bug.of(None)["pack"](weight) for weight in weights()]
        pairs = zip(packs, predicted, strict=True)
        return all(np.array_equal(a[0], b[0]) and np.allclose(a[1], b[1], equal_nan=True) for a, b in pairs)

    bug = the_named(filter(explains, bugs_of(watch.kind, ("codes",))))
    return str(bug) if bug else next(filter(None, texts))


def _wrong_code(weight: np.ndarray, packed: np.ndarray, absmax: np.ndarray) -> str:
    """Say which scale or code is wrong; empty where all are right."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()
    for b, start in enumerate(range(0, len(weight), BLOCK)):
        block = weight[start : start + BLOCK].astype(np.float64)
        largest = np.abs(block).max()
        if not abs(absmax[b] - largest) <= NEAR * largest:
            return f"the scale of block {b} is {absmax[b]:.7g}, expected {largest:.7g}"
        for j, w in enumerate(block if largest else ()):
            distance = np.abs(NF4.astype(np.float64) - w / largest)
            if distance[codes[start + j]] > distance.min() + NEAR:
                where = f"weight {start + j}, {w / largest:.4f} of its block's largest,"
                return f"{where} has the code {codes[start + j]}, expected {distance.argmin()}"
    return ""


def decoded(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Let codes be turned back into weights, with scales of 32 bits and of 8."""
    return watch.judge("unpack", _decoded)


def _decoded(watch: Watch) -> str:
    problems = [problem.restrict(watch.takes("unpack")) for problem in FOUR_BIT_PROBLEMS]
    decoded_weights = []
    for problem in problems:
        codes_and_scales = {"packed": problem.full["packed"], "absmax": problem.full["absmax"]}
        shape = (problem.out_features, problem.in_features)
        result = watch.call("unpack", codes_and_scales | {"shape": shape}, watch.options("unpack", problem))
        array = np.asarray(watch.turn("weight", result))
        if array.shape != shape or array.dtype.kind != "f":
            return f"unpack returns {array.dtype} {array.shape}, expected {shape} of floating-point numbers"
        decoded_weights.append(array.astype(np.float64))
    if all(map(_same, decoded_weights, (problem.weight() for problem in problems))):
        return "ok"

    def explains(bug: Bug) -> bool:
        parts = [bug.of(problem) for problem in problems]
        predicted = [part["weight"](0) if "weight" in part else problem.weight()
                     for part, problem in zip(parts, problems, strict=True)]  # fmt: skip
        return any("weight" in part for part in parts) and all(map(_same, decoded_weights, predicted))

    if bug := the_named(filter(explains, bugs_of(watch.kind))):
        return str(bug)
    for array, problem in zip(decoded_weights, problems, strict=True):
        if not _same(array, problem.weight()):
            at = np.unravel_index(int(np.abs(array - problem.weight()).argmax()), array.shape)
            where = ", ".join(map(str, at))
            return f"the weight at [{where}] is {array[at]:.7g}, expected {problem.weight()[at]:.7g} ({problem})"
    return "ok"


def _same(weight: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether weights are the same up to the rounding of a product and a sum in float32."""
    return bool(np.abs(weight - expected).max() <= 4 * 2.0**-24 * np.abs(expected).max())


FOUR_BITS: dict[str, Callable[[Watch, Trial, str, Set[str]], str]] = {"codes": codes, "decoded": decoded}
"""A claim for each, of the kind nf4."""
