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

from ..naming import Parts
from .images import ConvolutionProblem
from .lowprecision import NF4Problem, in_half
from .problem import Problem
from .several import CombineProblem, FusedProblem

WITHOUT_MASK: Parts = {name: lambda x, mask: x for name in ("dropped", "dropped_in_dA", "dropped_in_dx")}


def kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ConvolutionProblem], Parts]:
    """Return a merge whose update has each kernel, (out, C, *kernel), changed."""

    def parts(problem: ConvolutionProblem) -> Parts:
        def merged(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
            kernels = change(BA.reshape(len(BA), -1, *problem.kernel))
            return W + s * (kernels.reshape(BA.shape) if kernels.size == BA.size else BA)

        return {"merged": merged}

    return parts


def upright(kernels: np.ndarray) -> np.ndarray:
    """Return kernels with height and width exchanged, where that fits."""
    return kernels.swapaxes(-1, -2) if kernels.shape[-1] == kernels.shape[-2] else kernels


def turned(problem: ConvolutionProblem) -> Parts:
    """Turn the kernels round, of the base and of the factors."""
    axes = tuple(range(2, 2 + len(problem.kernel)))
    return {"turned": lambda z: np.flip(z.reshape(len(z), -1, *problem.kernel), axes).reshape(z.shape)}


def turned_in_A(problem: ConvolutionProblem) -> Parts:
    """Turn the kernels of lora_A alone round."""
    return {"down": turned(problem)["turned"]}


def last_of_each(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows in which an id that comes again is left out the first time."""
    return np.asarray(X * (np.cumsum(X[::-1], axis=0)[::-1] == 1))


def without_first_id(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows without those of id 0."""
    return X * (np.arange(X.shape[1]) > 0)


def no_groups(problem: ConvolutionProblem) -> Parts:
    """Let B have no groups, where a group has one rank."""
    one_group = {"hidden": lambda B: B.sum(axis=1, keepdims=True) + 0 * B}
    return one_group if problem.groups == problem.rank else {}


def depthwise(problem: ConvolutionProblem) -> Parts:
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


def other_weight(only_double: bool = False, **changes: Any) -> Callable[[NF4Problem], Parts]:
    """Return a weight in NF4 that is decoded otherwise; where scales are quantised too, if that is what is wrong."""

    def parts(problem: NF4Problem) -> Parts:
        return {} if only_double and not problem.double else {"weight": lambda W: problem.weight(**changes)}

    return parts


def without_scales(problem: NF4Problem) -> Parts:
    """Decode a weight in NF4 without its scales."""
    plain = replace(problem, double=False)  # the same codes
    return {"weight": lambda W: plain.weight(absmax=np.ones(plain.blocks, np.float32))}


def column_after_column(problem: NF4Problem) -> Parts:
    """Decode a weight in NF4 column after column."""
    return {"weight": lambda W: problem.weight().reshape(problem.in_features, problem.out_features).T}


def middle_quantiles() -> np.ndarray:
    """Return the 16 quantiles at (i + 1/2) / 16, divided by the largest: a book without a 0."""
    book = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    return np.asarray((book / book[-1]).astype(np.float32))


def rows_by(place: Callable[[FusedProblem, int], Any]) -> Callable[[FusedProblem], Parts]:
    """Return slots whose updates are added to other rows, where these are rows of the weight."""

    def parts(fused: FusedProblem) -> Parts:
        places = [place(fused, i) for i in fused.adapted]
        inside = all(rows is None or rows.max() < fused.out_features for rows in places)
        return {"slot_rows": place} if inside else {}

    return parts


def rows_from(fused: FusedProblem, i: int, first: int) -> np.ndarray:
    """Return the rows of a slot's update, if it began at another one."""
    return first + np.arange(fused.widths[i])


def _alike(fused: FusedProblem, i: int) -> list[int]:
    """Return the slots that are as wide as one, itself among them."""
    return [j for j, width in enumerate(fused.widths) if width == fused.widths[i]]


def exchanged(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of the slot that changes places with one, among those of its width."""
    alike = _alike(fused, i)
    return fused.rows_of(alike[::-1][alike.index(i)])


def to_the_next(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of the next slot, where it is as wide."""
    return fused.rows_of(i + 1 if i + 1 in _alike(fused, i) else i)


def _grouped(fused: FusedProblem, groups: Callable[[FusedProblem], int]) -> dict[int, np.ndarray]:
    """Return the rows of each slot where all are cut into groups, and the slots' first groups come first."""
    n, owner = groups(fused), []
    for _ in range(n):
        for i, width in enumerate(fused.widths):
            owner += [i] * (width // n)
    return {i: np.flatnonzero(np.array(owner) == i) for i in range(len(fused.widths))}


def by_groups(groups: Callable[[FusedProblem], int]) -> Callable[[FusedProblem], Parts]:
    """Return slots that are cut into groups."""

    def parts(fused: FusedProblem) -> Parts:
        if any(width % groups(fused) for width in fused.widths):
            return {}
        return {"slot_rows": lambda fused, i: _grouped(fused, groups)[i]}

    return parts


def one_down(fused: FusedProblem) -> Parts:
    """Use the first slot's lora_A for all, where they have one rank."""
    one_rank = len({fused.ranks[i] for i in fused.adapted}) == 1
    return {"slot_down": lambda fused, i: fused.adapted[0]} if one_rank else {}


def packed_slots(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of a slot, if those without an adapter took none."""
    return rows_from(fused, i, sum(fused.widths[j] for j in fused.adapted if j < i))


def paired_in_reverse(sums: CombineProblem) -> Parts:
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
