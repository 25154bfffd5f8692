"""Parts of the formulas as known bugs have them, where they take more than a line.

A part is a value or a function in the place of one of `Formulas`; or a function of the problem that returns such parts,
and none where the bug makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ...layers.nf4 import NF4
from ..naming import Parts
from .images import Images
from .lowprecision import BLOCK, FourBits, in_half
from .problem import Problem
from .several import Fused, Sums

WITHOUT_MASK: Parts = {name: lambda x, mask: x for name in ("dropped", "dropped_in_dA", "dropped_in_dx")}


def kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Images], Parts]:
    """Return a merge whose update has each kernel, (out, C, *kernel), changed."""

    def parts(problem: Images) -> Parts:
        def merged(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
            kernels = change(BA.reshape(len(BA), -1, *problem.kernel))
            return W + s * (kernels.reshape(BA.shape) if kernels.size == BA.size else BA)

        return {"merged": merged}

    return parts


def upright(kernels: np.ndarray) -> np.ndarray:
    """Return kernels with height and width exchanged, where that fits."""
    return kernels.swapaxes(-1, -2) if kernels.shape[-1] == kernels.shape[-2] else kernels


def turned(problem: Images) -> Parts:
    """Turn the kernels round, of the base and of the factors."""
    axes = tuple(range(2, 2 + len(problem.kernel)))
    return {"turned": lambda z: np.flip(z.reshape(len(z), -1, *problem.kernel), axes).reshape(z.shape)}


def turned_in_A(problem: Images) -> Parts:
    """Turn the kernels of lora_A alone round."""
    return {"down": turned(problem)["turned"]}


def last_of_each(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows in which an id that comes again is left out the first time."""
    return np.asarray(X * (np.cumsum(X[::-1], axis=0)[::-1] == 1))


def without_first_id(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows without those of id 0."""
    return X * (np.arange(X.shape[1]) > 0)


def no_groups(problem: Images) -> Parts:
    """Let B have no groups, where a group has one rank."""
    one_group = {"hidden": lambda B: B.sum(axis=1, keepdims=True) + 0 * B}
    return one_group if problem.groups == problem.rank > 1 else {}


def depthwise(problem: Images) -> Parts:
    """Let B have no groups, where each channel is a group."""
    return no_groups(problem) if problem.groups == problem.in_features else {}


def all_ranks_but_one(problem: Problem) -> Parts:
    """Leave the last rank out."""
    counted = np.arange(problem.rank) < problem.rank - 1
    return {"hidden": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def ranks_up_to_32(problem: Problem) -> Parts:
    """Leave out all ranks but the first 32."""
    if problem.rank <= 32:
        return {}
    counted = np.arange(problem.rank) < 32
    return {"hidden": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def rows_up_to_128(problem: Problem) -> Parts:
    """Leave out the update of all rows but the first 128."""
    return {"update": (np.arange(problem.n) < 128)[:, None] * 1.0} if problem.n > 128 else {}


def outputs_up_to_128(problem: Problem) -> Parts:
    """Leave out the update of all outputs but the first 128."""
    if problem.out_features <= 128:
        return {}
    counted = (np.arange(problem.out_features) < 128)[:, None]
    return {"hidden": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def whole(V: np.ndarray) -> np.ndarray:
    """Return the length of all of V, for each row."""
    return np.full((len(V), 1), np.linalg.norm(V))


def other_weight(only_double: bool = False, **changes: Any) -> Callable[[Any], Parts]:
    """Return a weight in NF4 that is decoded otherwise; where scales are quantised too, if that is what is wrong."""

    def parts(problem: Any) -> Parts:
        if not isinstance(problem, FourBits) or (only_double and not problem.double):
            return {}
        return {"weight": lambda W: problem.weight(**changes)}

    return parts


def without_scales(problem: Any) -> Parts:
    """Decode a weight in NF4 without its scales."""
    if not isinstance(problem, FourBits):
        return {}
    plain = replace(problem, double=False)  # the same codes
    return {"weight": lambda W: plain.weight(absmax=np.ones(plain.blocks, np.float32))}


def column_after_column(problem: Any) -> Parts:
    """Decode a weight in NF4 column after column."""
    if not isinstance(problem, FourBits):
        return {}
    return {"weight": lambda W: problem.weight().reshape(problem.in_features, problem.out_features).T}


def packed(
    weight: np.ndarray,
    scale: Callable[[np.ndarray], np.ndarray] = lambda blocks: np.abs(blocks).max(axis=1),
    nearest: Callable[[np.ndarray], np.ndarray] = lambda v: np.abs(NF4[:, None, None] - v).argmin(axis=0),
    high: int = 16,
    low: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of a weight in NF4, each part as it is given."""
    blocks = np.pad(weight.ravel(), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    a = scale(blocks)
    with np.errstate(invalid="ignore"):
        codes = nearest(blocks / np.where(a == 0, 1, a)[:, None]).ravel()
    return (high * codes[0::2] + low * codes[1::2]).astype(np.uint8)[: (weight.size + 1) // 2], a


def no_scale_of_zeros(blocks: np.ndarray) -> np.ndarray:
    """Return scales that are not a number where a block is zero."""
    with np.errstate(invalid="ignore"):
        return np.asarray((blocks / np.abs(blocks).max(axis=1)[:, None]).max(axis=1) * np.abs(blocks).max(axis=1))


def middle_quantiles() -> np.ndarray:
    """Return the 16 quantiles at (i + 1/2) / 16, divided by the largest: a book without a 0."""
    book = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    return np.asarray((book / book[-1]).astype(np.float32))


def rows_by(place: Callable[[Fused, int], Any]) -> Callable[[Fused], Parts]:
    """Return slots whose updates are added to other rows, where these are rows of the weight."""

    def parts(fused: Fused) -> Parts:
        places = [place(fused, i) for i in fused.adapted]
        inside = all(rows is None or rows.max() < fused.out_features for rows in places)
        return {"slot_rows": place} if inside else {}

    return parts


def rows_from(fused: Fused, i: int, first: int) -> np.ndarray:
    """Return the rows of a slot's update, if it began at another one."""
    return first + np.arange(fused.widths[i])


def _alike(fused: Fused, i: int) -> list[int]:
    """Return the slots that are as wide as one, itself among them."""
    return [j for j, width in enumerate(fused.widths) if width == fused.widths[i]]


def exchanged(fused: Fused, i: int) -> np.ndarray:
    """Return the rows of the slot that changes places with one, among those of its width."""
    alike = _alike(fused, i)
    return fused.rows_of(alike[::-1][alike.index(i)])


def to_the_next(fused: Fused, i: int) -> np.ndarray:
    """Return the rows of the next slot, where it is as wide."""
    following = min(i + 1, len(fused.widths) - 1)
    return fused.rows_of(following if following in _alike(fused, i) else i)


def _grouped(fused: Fused, groups: Callable[[Fused], int]) -> dict[int, np.ndarray]:
    """Return the rows of each slot where all are cut into groups, and the slots' first groups come first."""
    n, owner = groups(fused), []
    for _ in range(n):
        for i, width in enumerate(fused.widths):
            owner += [i] * (width // n)
    return {i: np.flatnonzero(np.array(owner) == i) for i in range(len(fused.widths))}


def by_groups(groups: Callable[[Fused], int]) -> Callable[[Fused], Parts]:
    """Return slots that are cut into groups."""

    def parts(fused: Fused) -> Parts:
        if any(width % groups(fused) for width in fused.widths):
            return {}
        return {"slot_rows": lambda fused, i: _grouped(fused, groups)[i]}

    return parts


def one_down(fused: Fused) -> Parts:
    """Use the first slot's lora_A for all, where they have one rank."""
    one_rank = len({fused.ranks[i] for i in fused.adapted}) == 1
    return {"slot_down": lambda fused, i: fused.adapted[0]} if one_rank else {}


def packed_slots(fused: Fused, i: int) -> np.ndarray:
    """Return the rows of a slot, if those without an adapter took none."""
    return rows_from(fused, i, sum(fused.widths[j] for j in fused.adapted if j < i))


def paired_in_reverse(sums: Sums) -> Parts:
    """Pair each adapter's B with the A of another, where all have one rank."""
    one_rank = len({*sums.ranks}) == 1 < len(sums.ranks)
    return {"sum_pairs": lambda sums, i, count: count - 1 - i} if one_rank else {}


def autocast() -> Parts:
    """Return an adapter that computes in bfloat16: its factors are rounded, and so is each of its products."""

    def updated(update: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return in_half(s * in_half(in_half(x @ in_half(A).T) @ in_half(B).T))

    def passed(path: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return in_half(in_half(in_half(s * dy) @ in_half(B)) @ in_half(A))

    def trained(
        dA: np.ndarray, dB: np.ndarray, dy: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        du = in_half(s * dy)
        return in_half(in_half(du @ in_half(B)).T @ x), in_half(du.T @ in_half(x @ in_half(A).T))

    return {"updated": updated, "passed": passed, "trained": trained}
