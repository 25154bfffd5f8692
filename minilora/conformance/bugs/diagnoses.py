"""Name the known bugs that explain wrong answers, and describe those that none explains.

An implementation has a bug where its answers are wrong and are, on every problem, what the right formulas give with the
bug's parts replaced. So `diagnose` names a bug only where it explains all the numbers that it speaks of.

Where several explain something, one is named: that which explains the most answers; of equals that which would change
the fewest others; then one alone before one on top of another; then a known one before a scaling that was measured;
then that which replaces the fewest parts; then that whose flag comes first in the alphabet. So the place of a bug in
the table makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from .. import report
from ..problems.bugs import BUGS, Bug, bugs_of, the_named
from ..problems.formulas import QUANTITIES
from ..problems.problem import Arrays
from ..problems.tolerance import TINY, TOLERANCE, UNIT, Trial


@dataclass(frozen=True)
class Diagnosis:
    """A bug, or two at once, and the answers that it explains."""

    bugs: tuple[Bug, ...]  # one or two
    explains: tuple[str, ...]  # answers that are wrong, and just so
    affected: frozenset[str] = frozenset()  # all answers that it would change
    on_top: bool = False  # whether it explains them on top of the first diagnosis
    where: str = ""  # which part of all that is computed they are; empty where the bug shows in one answer only

    def told(self) -> report.Diagnosis:
        """Return it as a report has it; its cases are the answers that it explains."""
        names = " and, at once, ".join(bug.says for bug in self.bugs) + self.where
        sources = ", ".join(bug.source for bug in self.bugs if bug.source)
        return report.Diagnosis(names, "+".join(bug.flag for bug in self.bugs), sources, self.explains)


def diagnose(
    kind: str, trials: Sequence[Trial], replies: Sequence[Arrays], wrong: frozenset[str], measured: Sequence[Bug] = ()
) -> list[Diagnosis]:
    """Return the known bugs that explain what is wrong, those that explain most of it first.

    Parameters
    ----------
    kind : str
        Of the problems, as `minilora.conformance.problems.kinds.KINDS` has it.
    trials : sequence of Trial
        The problems.
    replies : sequence of dict
        The implementation's answers to each of them.
    wrong : frozenset of str
        The answers that are wrong on some problem.
    measured : sequence of Bug
        Bugs to try besides those of the table.

    Returns
    -------
    list of Diagnosis
        Each explains what those before it do not: alone, or on top of the first.
    """
    chosen: list[Diagnosis] = []
    rest = set(wrong)
    bugs = [bug for bug in (*bugs_of(kind), *measured) if any(bug.of(trial.problem) for trial in trials)]

    def order(diagnosis: Diagnosis) -> tuple[Any, ...]:
        """Return what the diagnosis that is named has least of."""
        unknown = any(bug in measured for bug in diagnosis.bugs)
        replaced = sum(bug.count for bug in diagnosis.bugs)
        flags = [bug.flag for bug in diagnosis.bugs]
        others = len(diagnosis.affected - set(diagnosis.explains))
        return -len(diagnosis.explains), others, diagnosis.on_top, unknown, replaced, flags

    while rest:
        trials, replies = _wrong_first(trials, replies, rest)
        before = chosen[0].bugs if chosen else ()
        candidates = [_explained((bug,), below, trials, replies, rest) for bug in bugs for below in {(), before}]
        if not any(candidates) and trials[0].unit <= UNIT["float32"]:
            scalings = (bug for bug in bugs if bug.breaks == "scaling")  # two of them at once are the second alone
            pairs = product(scalings, (bug for bug in bugs if bug.breaks != "scaling"))
            candidates = [_explained(pair, (), trials, replies, rest) for pair in pairs]
        best = min(filter(None, candidates), key=order, default=None)
        if best is None:
            break
        chosen.append(best)
        rest -= set(chosen[-1].explains)
    return [_with_those_on_top(chosen), *chosen[1:]] if chosen else []


def _with_those_on_top(chosen: Sequence[Diagnosis]) -> Diagnosis:
    """Return the first diagnosis: where another one is on top of it, it shows too, and is not said to be elsewhere."""
    first, covered = chosen[0], {name for diagnosis in chosen if diagnosis.on_top for name in diagnosis.explains}
    return replace(first, where="") if covered and first.affected <= covered | set(first.explains) else first


def _wrong_first(
    trials: Sequence[Trial], replies: Sequence[Arrays], rest: set[str]
) -> tuple[Sequence[Trial], Sequence[Arrays]]:
    """Put a small problem first where all the rest is wrong: a bug that does not explain it shows at once there."""

    def wrong(trial: Trial, reply: Arrays) -> bool:
        small = trial.problem.in_features * trial.problem.out_features <= SMALL
        return small and all(name in reply and not trial.agrees(name, reply[name]) for name in rest)

    pairs = list(zip(trials, replies, strict=True))
    first = next((i for i, pair in enumerate(pairs) if wrong(*pair)), 0)
    pairs.insert(0, pairs.pop(first))
    return [trial for trial, _ in pairs], [reply for _, reply in pairs]


def _explained(
    bugs: tuple[Bug, ...], before: tuple[Bug, ...], trials: Sequence[Trial], replies: Sequence[Arrays], rest: set[str]
) -> Diagnosis | None:
    """Return what bugs explain on top of others: all answers whose numbers are as they have them."""
    shows = {name for bug in bugs for name in bug.shows or rest if name in rest}
    affected: set[str] = set()
    offered = {name for reply in replies for name in reply}
    for trial, reply in zip(trials, replies, strict=True):
        predict = _predicted_once if trial is trials[0] and KNOWN.issuperset((*before, *bugs)) else _predicted
        predicted, sizes = predict((*before, *bugs), trial)
        for name in shows & reply.keys():
            distance = trial.distance(name, reply[name], predicted[name], sizes)
            rounds = any(bug.ties for bug in bugs)
            if distance > TOLERANCE and not (rounds and _but_for_ties(trial, name, reply[name], predicted[name])):
                shows.discard(name)
        if not shows:
            return None
        without, _ = predict(before, trial)
        affected |= {k for k in reply.keys() - affected if not trial.agrees(k, predicted[k], without[k])}
    explains = shows & affected
    if not explains:
        return None
    in_order, where = tuple(name for name in QUANTITIES if name in explains), _where(explains, affected, offered)
    return Diagnosis(bugs, in_order, frozenset(affected), bool(before), where)


def _but_for_ties(trial: Trial, name: str, array: np.ndarray, predicted: np.ndarray) -> bool:
    """Return whether numbers that are rounded to bfloat16 agree, up to the few that were rounded the other way."""
    if np.shape(array) != np.shape(predicted) or not np.isfinite(array).all():
        return False
    error, size = np.abs(array - predicted), np.maximum(trial.sizes[name], np.abs(predicted))
    others = error > TOLERANCE * trial.unit * (size + TINY)
    return bool(others.sum() <= max(1, others.size // 50) and (error <= 2 * UNIT["bfloat16"] * size).all())


def _predicted(bugs: tuple[Bug, ...], trial: Trial) -> tuple[Arrays, Arrays]:
    """Return the answers that bugs give, and the sizes in which their rounding is measured."""
    parts = {name: part for bug in bugs for name, part in bug.of(trial.problem).items()}
    largest = {name: part for bug in bugs for name, part in (bug.largest or bug.of)(trial.problem).items()}
    answers = (
        trial.right | trial.answer(**parts) if parts else trial.right
    )  # what a bug leaves out, it does not explain
    return answers, trial.size(**largest)


SMALL = 1000
KNOWN = frozenset(BUGS)
_predicted_once = lru_cache(maxsize=4096)(_predicted)
"""The same for known bugs, kept for the next check: of the first problem, which rules out all but a few of them."""


def _where(explains: set[str], affected: set[str], offered: set[str]) -> str:
    """Say in which answers a bug shows, where it could show in others too."""
    if explains == affected:
        return ", in all that is computed" if affected == offered and len(affected) > 1 else ""
    names = [QUANTITIES[name].split(",")[0] for name in QUANTITIES if name in explains]
    return f", in {listed(names)} alone"


def left_out(kind: str, trial: Trial, missing: Sequence[str]) -> Bug | None:
    """Return the known bug that returns all but the missing answers, where there is one."""

    def leaves_out(bug: Bug) -> bool:
        parts = bug.of(trial.problem)
        return bool(parts) and trial.right.keys() - trial.answer(**parts).keys() == set(missing)

    return the_named(filter(leaves_out, bugs_of(kind)))


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def unexplained(wrong: frozenset[str], diagnoses: Sequence[Diagnosis]) -> Iterator[str]:
    """Yield the answers that no bug explains, in the order of the report."""
    explained = {name for diagnosis in diagnoses for name in diagnosis.explains}
    return (name for name in QUANTITIES if name in wrong - explained)
