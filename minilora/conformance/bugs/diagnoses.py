"""Name the known bugs that explain wrong answers, and describe those that none explains.

An implementation has a bug where its answers are wrong and are, on every problem, what the right formulas give with the
bug's parts replaced. So `diagnose` names a bug only where it explains all the numbers that it speaks of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from ..problems.kinds import Images
from ..problems.problem import Arrays, Problem
from ..problems.reference import QUANTITIES, TINY, TOLERANCE, UNIT, Trial
from .table import BUGS as BUGS  # importable from here too, for one version: the table stood here before 0.3
from .table import Bug, bugs_of
from .wrong_arrays import pattern


@dataclass(frozen=True)
class Found:
    """A bug, or two at once, and the answers that it explains."""

    bugs: tuple[Bug, ...]  # one or two
    explains: tuple[str, ...]  # answers that are wrong, and just so
    where: str = ""  # which part of all that is computed they are; empty where the bug shows in one answer only

    def __str__(self) -> str:
        names = " and, at once, ".join(bug.name for bug in self.bugs) + self.where
        sources = ", ".join(bug.source for bug in self.bugs if bug.source)
        return f"{names} (made in {sources})" if sources else names


def diagnose(
    kind: str, trials: Sequence[Trial], found: Sequence[Arrays], wrong: frozenset[str], more: Sequence[Bug] = ()
) -> list[Found]:
    """Return the known bugs that explain what is wrong, those that explain most of it first.

    Parameters
    ----------
    kind : str
        Of the problems, as `minilora.conformance.problems.kinds.SETS` has it.
    trials : sequence of Trial
        The problems.
    found : sequence of dict
        The implementation's answers to each of them.
    wrong : frozenset of str
        The answers that are wrong on some problem.
    more : sequence of Bug
        Bugs to try after those of the table.

    Returns
    -------
    list of Found
        Each explains what those before it do not: alone, or on top of the first.
    """
    chosen: list[Found] = []
    left = set(wrong)
    bugs = [bug for bug in (*bugs_of(kind), *more) if any(bug.by(trial.problem) for trial in trials)]
    while left:
        trials, found = _wrong_first(trials, found, left)
        before = chosen[0].bugs if chosen else ()
        candidates = [_explained((bug,), (), trials, found, left) for bug in bugs]
        if before:
            candidates += [_explained((bug,), before, trials, found, left) for bug in bugs]
        if not any(candidates) and trials[0].unit <= UNIT["float32"]:
            scalings = (bug for bug in bugs if bug.breaks == "scaling")  # two of them at once are the second alone
            pairs = product(scalings, (bug for bug in bugs if bug.breaks != "scaling"))
            candidates = [_explained(pair, (), trials, found, left) for pair in pairs]
        best = max(filter(None, candidates), key=lambda candidate: candidate[0], default=None)
        if best is None:
            break
        chosen.append(best[1])
        left -= set(best[1].explains)
    return chosen


def _wrong_first(
    trials: Sequence[Trial], found: Sequence[Arrays], left: set[str]
) -> tuple[Sequence[Trial], Sequence[Arrays]]:
    """Put a small problem first where all that is left is wrong: a bug that does not explain it shows at once there."""

    def wrong(trial: Trial, answers: Arrays) -> bool:
        small = trial.problem.in_features * trial.problem.out_features <= SMALL
        return small and all(name in answers and not trial.agrees(name, answers[name]) for name in left)

    pairs = list(zip(trials, found, strict=True))
    first = next((i for i, pair in enumerate(pairs) if wrong(*pair)), 0)
    pairs.insert(0, pairs.pop(first))
    return [trial for trial, _ in pairs], [answers for _, answers in pairs]


def _explained(
    bugs: tuple[Bug, ...], before: tuple[Bug, ...], trials: Sequence[Trial], found: Sequence[Arrays], left: set[str]
) -> tuple[tuple[int, int], Found] | None:
    """Return a rank, and the answers that bugs explain on top of others: all whose numbers are as they have them."""
    shows = {name for bug in bugs for name in bug.shows if name in left}
    affected: set[str] = set()
    offered = {name for answers in found for name in answers}
    for trial, answers in zip(trials, found, strict=True):
        predict = _predicted_once if trial is trials[0] and KNOWN.issuperset((*before, *bugs)) else _predicted
        predicted, sizes = predict((*before, *bugs), trial)
        for name in shows & answers.keys():
            distance = trial.distance(name, answers[name], predicted[name], sizes)
            rounds = any(bug.rounds for bug in bugs)
            if distance > TOLERANCE and not (rounds and _but_for_ties(trial, name, answers[name], predicted[name])):
                shows.discard(name)
        if not shows:
            return None
        without, _ = predict(before, trial)
        affected |= {k for k in answers.keys() - affected if not trial.agrees(k, predicted[k], without[k])}
    explains = shows & affected
    if not explains:
        return None
    rank = (len(explains), -len(affected - explains))  # of equals the first is told, so a measured bug is last
    return rank, Found(
        bugs, tuple(name for name in QUANTITIES if name in explains), _where(explains, affected, offered)
    )


def _but_for_ties(trial: Trial, name: str, found: np.ndarray, predicted: np.ndarray) -> bool:
    """Return whether numbers that are rounded to bfloat16 agree, up to the few that were rounded the other way."""
    if np.shape(found) != np.shape(predicted) or not np.isfinite(found).all():
        return False
    error, size = np.abs(found - predicted), np.maximum(trial.sizes[name], np.abs(predicted))
    others = error > TOLERANCE * trial.unit * (size + TINY)
    return bool(others.sum() <= max(1, others.size // 50) and (error <= 2 * UNIT["bfloat16"] * size).all())


def _predicted(bugs: tuple[Bug, ...], trial: Trial) -> tuple[Arrays, Arrays]:
    """Return the answers that bugs give, and the sizes in which their rounding is measured."""
    parts = {name: part for bug in bugs for name, part in bug.by(trial.problem).items()}
    largest = {name: part for bug in bugs for name, part in bug.largest(trial.problem).items()}
    answers = trial.right | trial.by(**parts) if parts else trial.right  # what a bug leaves out, it does not explain
    return answers, trial.sizes_by(**largest)


SMALL = 1000
KNOWN = frozenset(BUGS)
_predicted_once = lru_cache(maxsize=4096)(_predicted)
"""The same for known bugs, kept for the next check: of the first problem, which rules out all but a few of them."""


def _where(explains: set[str], affected: set[str], offered: set[str]) -> str:
    """Say in which answers a bug shows, where it could show in others too."""
    if explains == affected:
        return ", in all that is computed" if affected == offered and len(affected) > 1 else ""
    told = [QUANTITIES[name].split(",")[0] for name in QUANTITIES if name in explains]
    return f", in {listed(told)} alone"


def left_out(kind: str, trial: Trial, missing: Sequence[str]) -> Bug | None:
    """Return the known bug that returns all but the missing answers, where there is one."""
    for bug in bugs_of(kind):
        parts = bug.by(trial.problem)
        if parts and trial.right.keys() - trial.by(**parts).keys() == set(missing):
            return bug
    return None


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def unexplained(wrong: frozenset[str], found: Sequence[Found]) -> Iterator[str]:
    """Yield the answers that no bug explains, in the order of the report."""
    told = {name for one in found for name in one.explains}
    return (name for name in QUANTITIES if name in wrong - told)


EVERY_ENTRY = "every entry is off by the factor"


def describe_unknown(name: str, found: np.ndarray, trial: Trial, inside: bool = False) -> str:
    """Return what can be said of a wrong answer that no known bug explains: its shape, or ratio and worst entry.

    With `inside`, also what is seen inside the array, which takes longer.
    """
    expected = trial.right[name]
    if np.ndim(found) == np.ndim(expected) == 2 and trial.agrees(name, np.transpose(found)):
        return "is transposed"
    if np.shape(found) != np.shape(expected):
        return f"has shape {np.shape(found)}, expected {np.shape(expected)}{_steps(np.shape(found), trial.problem)}"
    found = np.asarray(found, np.float64)
    if not np.isfinite(found).all():
        return "is not finite"
    at = np.unravel_index(int(np.abs(found - expected).argmax()), expected.shape)
    where = ", ".join(map(str, at))
    where = f"[{where}]{trial.problem.place(name, at)}"
    text = f"is off by {abs(found[at] - expected[at]):.3g} at {where}: {found[at]:.7g}, expected {expected[at]:.7g}"
    ratio = _ratio(name, found, trial)
    if abs(ratio - 1) > 1e-3:
        return f"{text}; {EVERY_ENTRY} {ratio:.6g}"
    seen = pattern(name, found, trial) if inside else ""
    return f"{text}; {seen}" if seen else text


def _ratio(name: str, found: np.ndarray, trial: Trial) -> float:
    """Return by which factor every entry of an answer is off; 1 where no factor is that of all."""
    expected = trial.right[name]
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = float((found * expected).sum() / max(float((expected * expected).sum()), TINY))
        larger = {name: trial.sizes[name] * max(1.0, abs(ratio))}
        if trial.unit <= UNIT["float32"] and trial.distance(name, found, ratio * expected, larger) <= TOLERANCE:
            return ratio
    seen = np.abs(expected) > 1e-3 * np.abs(expected).max()  # also where it was computed in a lower precision
    ratios = found[seen] / expected[seen]
    same = ratios.size and np.ptp(ratios) <= 1e-4 * abs(ratios).max()
    return float(np.median(ratios)) if same else 1.0


def _steps(shape: tuple[int, ...], problem: Problem) -> str:
    """Say which other steps of a kernel would give an output of a shape."""
    if not isinstance(problem, Images):
        return ""
    one, none = (1,) * len(problem.kernel), (0,) * len(problem.kernel)
    others: dict[str, dict[str, Any]] = {
        "if stride were 1": {"stride": one},
        "without padding": {"padding": none},
        "if dilation were 1": {"dilation": one},
        "if stride and dilation were exchanged": {"stride": problem.dilation, "dilation": problem.stride},
        "if a step of two axes were exchanged": {
            name: getattr(problem, name)[::-1] for name in ("stride", "padding", "dilation")
        },
    }
    found = (words for words, steps in others.items() if replace(problem, **steps).positions == shape[2:])
    return next((f", as it would be {words}" for words in found), "")
