"""What stands at the edge of the contract: another memory order, more axes, no rows, an alpha or a row of zero.

An implementation may refuse these, which is no failure: it raises, or returns an array of another shape. What it does
answer must be right. An answer that is wrong already on the problems is not judged here again.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace

import numpy as np

from ..problems.bugs import Bug, bugs_of, known, the_named
from ..problems.formulas import QUANTITIES, RIGHT
from ..problems.images import Ids, Images
from ..problems.problem import Arrays, Problem
from ..problems.several import Fused, Stacks
from ..problems.tolerance import TOLERANCE, Trial, drawn, round_to
from .calling import Watch, answers, forward, strided
from .describing import describe_unknown
from .kindreport import REFUSED

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in Fortran order": np.asfortranarray,
    "at every second place": strided,
}
"""How an array may lie in memory, beside C order."""
ROWS = ("x", "dy", "y", "mask", "expert_ids")
"""The arrays whose first axis is of rows."""


def memory_order(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Hand over the same numbers in another order of memory."""
    verdicts = []
    for words, lay in LAYOUTS.items():
        quiet = Watch(watch.functions, watch.kind, lay)
        verdicts.append(_judged(answers(quiet, trial), trial, right, f"where arrays lie {words},"))
        for function in quiet.raised.keys() - watch.raised.keys():
            watch.notes.setdefault("memory order", f"{words} {function} {quiet.said(function)}")
    return max(verdicts, key=lambda verdict: (verdict not in ("ok", REFUSED), verdict == "ok"))


def more_axes(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Hand over six rows as two times three: each axis but the last is of rows."""
    if isinstance(trial.problem, Images):
        return "not offered"
    sizes = (6, 7, 4, 5) if isinstance(trial.problem, Ids) else (6, 5, 4, 7)  # no two of the axes are alike
    own = isinstance(trial.problem, (Fused, Stacks))  # they have sizes of their own
    problem = replace(trial.problem, n=6, seed=20) if own else type(trial.problem)(*sizes, seed=20)
    rows = drawn(problem, dtype, trial.formulas)

    def split(arrays: Arrays) -> Arrays:
        return {name: a.reshape(2, 3, *a.shape[1:]) if name in ROWS else a for name, a in arrays.items()}

    axes = replace(rows, arrays=split(rows.arrays), right=split(rows.right), sizes=split(rows.sizes))
    reply = answers(Watch(watch.functions, watch.kind), axes)
    fit = {key: a for key, a in reply.items() if a.shape == axes.right[key].shape}
    return _judged(fit, axes, right - {"merged"}, "for rows of two axes")


def no_rows(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Hand over an empty batch: the output is empty, and the gradients are zero."""
    empty = replace(trial, arrays={name: a[:0] if name in ROWS else a for name, a in trial.arrays.items()})
    reply = {key: a for key, a in answers(Watch(watch.functions, watch.kind), empty).items() if key in right}
    reply.pop("merged", None)
    for key, a in reply.items():
        if a.size if key in ("y", "x") else a.any():  # what is not a number is not zero either
            said = f"has shape {a.shape}" if key in ("y", "x") else "is not zero"
            return f"for no rows {QUANTITIES[key]} {said}"
    return "ok" if reply else REFUSED


def alpha_of_0(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Let alpha be 0: the update is zero, unless the declared scaling has no alpha."""
    zero = drawn(replace(trial.problem, alpha=0.0), dtype, trial.formulas)
    reply = {key: a for key, a in answers(Watch(watch.functions, watch.kind), zero).items() if key in right}
    verdict = _judged(reply, zero, right, "for an alpha of 0")
    if verdict in ("ok", REFUSED):
        return verdict
    wrong = {key: a for key, a in reply.items() if not zero.agrees(key, a)}

    def explains(bug: Bug) -> bool:
        parts = bug.of(zero.problem)
        predicted, sizes = zero.answer(**parts), zero.size(**parts)
        return all(zero.distance(key, a, predicted[key], sizes) <= TOLERANCE for key, a in wrong.items())

    bug = the_named(filter(explains, bugs_of(watch.kind, ("alpha of 0",))))
    return str(bug) if bug else verdict


@dataclass(frozen=True)
class ZeroRow(Problem):
    """A start at which a row of the weight is zero."""

    start: bool = True

    @property
    def full(self) -> Arrays:
        """The weight, with its third row zero, and the bias."""
        return {**super().full, "weight": super().full["weight"] * (np.arange(self.out_features) != 2)[:, None]}


def row_of_zeros(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Let a row of DoRA's weight be zero, and its magnitude with it: the output is the base's. The backward is free."""
    if "magnitude" not in trial.arrays or "y" not in right:
        return "not offered"
    base = drawn(ZeroRow(5, 4, 6, 3, seed=22), dtype, RIGHT)  # as lora_B is zero, DoRA's output is that of LoRA
    lengths = np.linalg.norm(base.arrays["weight"].astype(np.float64), axis=1)
    start = replace(base, arrays=base.arrays | {"magnitude": round_to(lengths, dtype)})
    with np.errstate(all="ignore"):  # 0 / 0 is told in the verdict
        y = forward(Watch(watch.functions, watch.kind), start)
    if y is not None and y.shape == base.right["y"].shape and not np.isfinite(y).all():
        return str(known("dora-divides-by-the-length-of-a-row-of-zeros"))
    return _judged({} if y is None else {"y": y}, start, right, "where a row of the weight is zero")


def _judged(reply: Arrays, trial: Trial, right: Set[str], where: str) -> str:
    """Say what is wrong among answers that are right elsewhere."""
    judged = [key for key in reply if key in right]
    for key in judged:
        if not trial.agrees(key, reply[key]):
            return f"{where} {QUANTITIES[key]} {describe_unknown(key, reply[key], trial)}"
    return "ok" if judged else REFUSED


EDGES = {"memory order": memory_order, "more axes": more_axes, "no rows": no_rows, "alpha of 0": alpha_of_0,
         "row of zeros": row_of_zeros}  # fmt: skip
"""A claim for each."""
