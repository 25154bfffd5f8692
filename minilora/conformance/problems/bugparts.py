"""Parts of the formulas of known bugs that take more than a line.

A part is a value or function that replaces one in `Formulas`. Functions of the problem return such parts, or none if
the bug makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from ..naming import Parts
from .images import ConvolutionProblem
from .lowprecision import NF4Problem, as_bfloat16
from .problem import Problem
from .several import CombineProblem, FusedProblem

WITHOUT_MASK: Parts = {name: lambda x, mask: x for name in ("dropped", "dropped_in_dA", "dropped_in_dx")}


def kernels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ConvolutionProblem], Parts]:
    """Return a merge that applies a change to the update's kernels, (out, C, *kernel)."""

    def parts(problem: ConvolutionProblem) -> Parts:
        def merged(W: np.ndarray, BA: np.ndarray, s: float) -> np.ndarray:
            kernels = change(BA.reshape(len(BA), -1, *problem.kernel))
            return W + s * (kernels.reshape(BA.shape) if kernels.size == BA.size else BA)

        return {"merged": merged}

    return parts


def swap_height_and_width(kernels: np.ndarray) -> np.ndarray:
    """Return kernels with height and width swapped if they are equal, and unchanged otherwise."""
    return kernels.swapaxes(-1, -2) if kernels.shape[-1] == kernels.shape[-2] else kernels


def flip_kernels(problem: ConvolutionProblem) -> Parts:
    """Flip the kernels of the base and of lora_A."""
    axes = tuple(range(2, 2 + len(problem.kernel)))
    return {"flipped": lambda z: np.flip(z.reshape(len(z), -1, *problem.kernel), axes).reshape(z.shape)}


def flip_kernels_of_A(problem: ConvolutionProblem) -> Parts:
    """Flip only the kernels of lora_A."""
    return {"used_A": flip_kernels(problem)["flipped"]}


def last_of_each(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows that keep only the last occurrence of each id."""
    return np.asarray(X * (np.cumsum(X[::-1], axis=0)[::-1] == 1))


def without_first_id(X: np.ndarray) -> np.ndarray:
    """Return one-hot rows with those of id 0 set to zero."""
    return X * (np.arange(X.shape[1]) > 0)


def no_groups(problem: ConvolutionProblem) -> Parts:
    """Ignore the groups of B if each group has one rank."""
    one_group = {"used_B": lambda B: B.sum(axis=1, keepdims=True) + 0 * B}
    return one_group if problem.groups == problem.rank else {}


def depthwise(problem: ConvolutionProblem) -> Parts:
    """Ignore the groups of B if each channel is a group."""
    return no_groups(problem) if problem.groups == problem.in_features else {}


def all_ranks_but_one(problem: Problem) -> Parts:
    """Drop the last rank."""
    counted = np.arange(problem.rank) < problem.rank - 1
    return {"used_B": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def ranks_up_to_32(problem: Problem) -> Parts:
    """Drop all ranks but the first 32."""
    if problem.rank <= 32:
        return {}
    counted = np.arange(problem.rank) < 32
    return {"used_B": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def rows_up_to_128(problem: Problem) -> Parts:
    """Drop the update of all rows but the first 128."""
    return {"update": (np.arange(problem.n) < 128)[:, None] * 1.0} if problem.n > 128 else {}


def outputs_up_to_128(problem: Problem) -> Parts:
    """Drop the update of all outputs but the first 128."""
    if problem.out_features <= 128:
        return {}
    counted = (np.arange(problem.out_features) < 128)[:, None]
    return {"used_B": lambda B: B * counted, "s_in_dB": lambda s: s * counted}


def norm_of_all(V: np.ndarray) -> np.ndarray:
    """Return the norm of the whole matrix V, repeated for each row."""
    return np.full((len(V), 1), np.linalg.norm(V))


def misread_weight(only_double: bool = False, **changes: Any) -> Callable[[NF4Problem], Parts]:
    """Return a part that decodes an NF4 weight with some arrays or options changed.

    With `only_double`, it applies only to problems whose scales are quantised too.
    """

    def parts(problem: NF4Problem) -> Parts:
        return {} if only_double and not problem.double else {"weight": lambda W: problem.weight(**changes)}

    return parts


def without_scales(problem: NF4Problem) -> Parts:
    """Decode an NF4 weight without its scales."""
    plain = replace(problem, double=False)  # the same codes
    return {"weight": lambda W: plain.weight(absmax=np.ones(plain.blocks, np.float32))}


def column_by_column(problem: NF4Problem) -> Parts:
    """Decode an NF4 weight column by column."""
    return {"weight": lambda W: problem.weight().reshape(problem.in_features, problem.out_features).T}


def middle_quantiles() -> np.ndarray:
    """Return the 16 normal quantiles at (i + 1/2) / 16, divided by the largest; none of them is 0."""
    book = np.array([NormalDist().inv_cdf((i + 0.5) / 16) for i in range(16)])
    return np.asarray((book / book[-1]).astype(np.float32))


def rows_by(place: Callable[[FusedProblem, int], Any]) -> Callable[[FusedProblem], Parts]:
    """Return parts that add each slot's update to the rows given by `place`, if the weight has all of these rows."""

    def parts(fused: FusedProblem) -> Parts:
        places = [place(fused, i) for i in fused.adapted]
        inside = all(rows is None or rows.max() < fused.out_features for rows in places)
        return {"slot_rows": place} if inside else {}

    return parts


def rows_from(fused: FusedProblem, i: int, first: int) -> np.ndarray:
    """Return the rows of a slot's update if it began at row `first`."""
    return first + np.arange(fused.widths[i])


def _slots_of_same_width(fused: FusedProblem, i: int) -> list[int]:
    """Return the slots of the same width as slot i, including itself."""
    return [j for j, width in enumerate(fused.widths) if width == fused.widths[i]]


def swapped_slot_rows(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of the slot that takes the place of slot i if the slots of its width are reversed."""
    slots = _slots_of_same_width(fused, i)
    return fused.rows_of(slots[::-1][slots.index(i)])


def next_slot_rows(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of the next slot if it has the same width, and the slot's own rows otherwise."""
    return fused.rows_of(i + 1 if i + 1 in _slots_of_same_width(fused, i) else i)


def _grouped(fused: FusedProblem, groups: Callable[[FusedProblem], int]) -> dict[int, np.ndarray]:
    """Return the rows of each slot if slots are cut into groups: the first group of each slot, then the second, ..."""
    n, owner = groups(fused), []
    for _ in range(n):
        for i, width in enumerate(fused.widths):
            owner += [i] * (width // n)
    return {i: np.flatnonzero(np.array(owner) == i) for i in range(len(fused.widths))}


def by_groups(groups: Callable[[FusedProblem], int]) -> Callable[[FusedProblem], Parts]:
    """Return parts that cut the slots into groups, which then alternate."""

    def parts(fused: FusedProblem) -> Parts:
        if any(width % groups(fused) for width in fused.widths):
            return {}
        return {"slot_rows": lambda fused, i: _grouped(fused, groups)[i]}

    return parts


def first_lora_A_for_all(fused: FusedProblem) -> Parts:
    """Use the first slot's lora_A for all slots if their ranks are equal."""
    one_rank = len({fused.ranks[i] for i in fused.adapted}) == 1
    return {"slot_of_A": lambda fused, i: fused.adapted[0]} if one_rank else {}


def rows_without_gaps(fused: FusedProblem, i: int) -> np.ndarray:
    """Return the rows of a slot if slots without an adapter took up no rows."""
    return rows_from(fused, i, sum(fused.widths[j] for j in fused.adapted if j < i))


def paired_in_reverse(sums: CombineProblem) -> Parts:
    """Pair each adapter's B with the A of another adapter if all ranks are equal."""
    one_rank = len({*sums.ranks}) == 1 < len(sums.ranks)
    return {"sum_pairs": lambda sums, i, count: count - 1 - i} if one_rank else {}


def autocast() -> Parts:
    """Return the parts of an adapter that computes in bfloat16: factors and products are rounded."""

    def final_update(update: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return as_bfloat16(s * as_bfloat16(as_bfloat16(x @ as_bfloat16(A).T) @ as_bfloat16(B).T))

    def final_path(path: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
        return as_bfloat16(as_bfloat16(as_bfloat16(s * dy) @ as_bfloat16(B)) @ as_bfloat16(A))

    def final_gradients(
        dA: np.ndarray, dB: np.ndarray, dy: np.ndarray, x: np.ndarray, A: np.ndarray, B: np.ndarray, s: float
    ) -> tuple[np.ndarray, np.ndarray]:
        du, h = as_bfloat16(s * dy), as_bfloat16(x @ as_bfloat16(A).T)
        return as_bfloat16(as_bfloat16(du @ as_bfloat16(B)).T @ x), as_bfloat16(du.T @ h)

    return {"final_update": final_update, "final_path": final_path, "final_gradients": final_gradients}
