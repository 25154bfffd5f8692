"""Compare a program's answers with the golden ones, naming the bugs that explain the wrong ones.

A number is right if its error is within the tolerance of the program's precision. A bug explains a wrong answer if the
answer equals the bug's signature within the same tolerance. All numbers come from the folder and none are recomputed,
so this version can judge with folders that earlier versions wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...files.disk import member
from ...report import Diagnosis, Outcome, Report
from ...texts import FileRefused, short
from ..naming import Answers, Parts, World, Wrong, name
from .answerfiles import read_answers, read_tensors
from .folder import CaseEntry, GoldenIndex, SessionEntry, read_index
from .leftovers import ROUNDED
from .reading import NamedArrays

MERGED = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""The allowed error of a merged weight's entry, relative to the largest entry, for one to a few roundings."""
FAR_OFF = 10
"""An answer with an error above this many tolerances, but within a lower precision's, was rounded to that precision."""


@dataclass(frozen=True)
class GoldenOutcome(Outcome):
    """The outcome of one case."""

    precision: str | None = None
    off: float = 0.0  # the largest error of its answers, in units of the tolerance


@dataclass(frozen=True)
class Judged:
    """An outcome, with the numbers that it is based on."""

    outcome: GoldenOutcome
    pairs: Sequence[AnswerPair] = ()  # the answers that a bug has to explain: the wrong ones, or all if none is wrong

    @cached_property
    def allowed(self) -> np.ndarray:
        """The allowed error of each entry of the answers."""
        return _joined(np.full(pair.answer.shape, pair.allowed) for pair in self.pairs)

    @cached_property
    def allowed_of_bugs(self) -> np.ndarray:
        """The allowed error of each entry if a bug predicts it; infinite where the bug's number is unknown."""
        return _joined(pair.allowed_of_bugs for pair in self.pairs)

    def predicted(self, parts: Parts) -> Answers:
        """Return the right answer, or a bug's: the right one with the bug's signature in its place.

        For two bugs at once the answer is unknown, and None. A bug that does not show in this case gives the right one.
        """
        if len(parts) > 1:
            return {self.outcome.id: None}
        flags = [flag for flag in parts if all(flag in pair.signatures for pair in self.pairs)]
        arrays = (pair.predicted(flags[0]) if flags else pair.right for pair in self.pairs)
        return {self.outcome.id: _joined(arrays)}


def compare_golden(folder: Path, results: Path) -> Report:
    """Compare a program's answers with those of a folder of golden adapters.

    Raises
    ------
    FileRefused
        If one of the two folders is not what it should be, has a later format than this version reads, or has a damaged
        file.
    """
    index = read_index(folder)
    if not results.is_dir():
        raise FileRefused(results, "not a folder, expected the folder of a program's answers")
    if results.resolve() in (folder.resolve(), (folder / "answers").resolve()):
        raise FileRefused(results, "the golden adapters themselves, expected the folder of a program's answers")
    judged = [judge_case(folder, results, case, index.tolerance) for case in index.cases]
    unanswered = []
    for session in index.sessions:
        of_session = judge_session(folder, results, session, index.tolerance)
        if all(one.outcome.state == "missing" for one in of_session):  # sessions are optional
            unanswered.append(session.id)
        else:
            judged += of_session
    report = Report(
        str(results), "golden", [one.outcome for one in judged], not_offered=unanswered,
        details={"results": str(results), "unanswered sessions": unanswered},
    )  # fmt: skip
    report.found = _diagnoses(index, judged)
    explained = {id for diagnosis in report.found for id in diagnosis.cases}
    rest = [case.id for case in report.cases if case.state == "wrong" and case.id not in explained]
    if report.found and rest:
        report.lines = [f"no single bug explains {', '.join(rest)}: fix the bugs named first, then compare again"]
    return report


# --- naming -----------------------------------------------------------------------------------------


def _diagnoses(index: GoldenIndex, judged: Sequence[Judged]) -> list[Diagnosis]:
    """Return the explanations of wrong answers: a wrong base first, then the bugs that explain the most answers."""
    fitting = {flag for one in judged for flag in one.outcome.flags}
    table = [Wrong(flag, note.bug, {flag: True}, ", ".join(note.made_in)) for flag, note in index.flags.items()]
    answered = [one for one in judged if one.pairs]
    world = World(
        answered, Judged.predicted, lambda one, id, parts: one.allowed_of_bugs if parts else one.allowed,
        [row for row in table if row.flag in fitting],
    )  # fmt: skip
    _, named = name(world, [{one.outcome.id: _joined(pair.answer for pair in one.pairs)} for one in answered])
    order = [one.outcome.id for one in judged]
    explained = {one.wrongs[0]: sorted(one.explains, key=order.index) for one in named}
    rounded = [one.outcome.id for one in judged if ROUNDED.flag in one.outcome.flags]
    explained |= {row: rounded for row in table if row.flag == ROUNDED.flag and rounded}
    likeliest = sorted(explained, key=lambda row: -len(explained[row]))
    found = [Diagnosis(row.says, row.flag, row.source, tuple(explained[row])) for row in likeliest]
    bases = [case.id for case in index.cases if case.adapter == []]
    for one in judged:
        if one.outcome.id in bases and one.outcome.state == "wrong":
            own = next((bug for bug in found if bug.flag in one.outcome.flags), Diagnosis(one.outcome.text))
            says = f"{one.outcome.id}: the base is wrong even without an adapter, so ignore other cases: {own.says}"
            first = Diagnosis(says, own.flag, own.source, own.cases or (one.outcome.id,))
            found = [first, *(bug for bug in found if bug != own)]
    return found


def _joined(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in arrays])


# --- judging ----------------------------------------------------------------------------------------


def judge_case(folder: Path, results: Path, case: CaseEntry, tolerance: Mapping[str, float]) -> Judged:
    """Judge the answers to one case."""
    path = member(results, f"{case.id}.safetensors")
    if not path.exists():
        missing = GoldenOutcome(case.id, "missing", f"there is no {path.name}")
        return Judged(GoldenOutcome(case.id, "right") if case.refused else missing)
    if not case.answers:
        return Judged(GoldenOutcome(case.id, "wrong", f"the adapter was accepted but must be refused: {case.note}"))
    return _judge_file(case.id, path, folder / case.answers, case.flags, tolerance)


def judge_session(folder: Path, results: Path, session: SessionEntry, tolerance: Mapping[str, float]) -> list[Judged]:
    """Judge the answers to each request of a session."""
    judged: list[Judged] = []
    for n, request in enumerate(session.requests):
        id = f"{session.id}.{n}"
        path = member(results, f"{id}.safetensors")
        if not path.exists():
            judged.append(Judged(GoldenOutcome(id, "missing", f"there is no {path.name}")))
            continue
        one = _judge_file(id, path, folder / request.answers, request.flags, tolerance, last=True)
        outcome, right_before = one.outcome, any(before.outcome.state == "right" for before in judged)
        if right_before and not outcome.flags and is_rounded(outcome, tolerance):
            one = replace(one, outcome=replace(outcome, flags=(ROUNDED.flag,)))
        judged.append(one)
    return judged


def is_rounded(outcome: GoldenOutcome, tolerance: Mapping[str, float]) -> bool:
    """Return whether an answer's error is far too large for its own precision, but allowed in the lowest one."""
    return FAR_OFF < outcome.off <= max(tolerance.values()) / tolerance[outcome.precision or "float64"]


def _judge_file(
    id: str, path: Path, answers: Path, shown: list[str], tolerance: Mapping[str, float], *, last: bool = False
) -> Judged:
    """Compare a file of answers with ours; with `last`, only the logits after the last token."""
    names, precision, theirs = read_answers(path, tolerance)
    ours = read_tensors(answers)
    if missing := [name for name in ("logits", *(f"signature.{flag}" for flag in shown)) if name not in ours]:
        raise FileRefused(answers, f"there is no {short(missing[0])}")
    if "each.logits" in ours:
        ours |= {name.removeprefix("each."): array for name, array in ours.items() if name.startswith("each.")}
    elif last:
        theirs = {name: array[:, -1] if array.ndim == 3 else array for name, array in theirs.items()}
        ours["logits"] = ours["logits"][:, None]
    pairs = []
    for quantity in theirs:
        pair = paired_answers(quantity, theirs, ours, shown, precision, tolerance)
        if isinstance(pair, str):
            return Judged(GoldenOutcome(id, "wrong", pair, (), precision))
        pairs += [pair] if pair else []
    if not pairs:
        text = f"the file has no answer to this case; its tensors: {', '.join(map(short, names)) or 'none'}"
        return Judged(GoldenOutcome(id, "wrong", text, (), precision))
    off = max(pair.off for pair in pairs)
    wrong = [pair for pair in pairs if pair.off > 1]
    if not wrong:
        return Judged(GoldenOutcome(id, "right", "", (), precision, off), pairs)
    flags = tuple(flag for flag in shown if all(pair.is_of(flag) for pair in wrong))
    text = ("" if flags else _lower_precision(wrong, precision, tolerance)) + wrong[0].text()
    return Judged(GoldenOutcome(id, "wrong", text, flags, precision, off), wrong)


def _lower_precision(wrong: Sequence[AnswerPair], precision: str, tolerance: Mapping[str, float]) -> str:
    """Name the lower precision in which all the wrong answers would be right; empty if there is none."""
    lower = sorted((p for p in tolerance if tolerance[p] > tolerance[precision]), key=lambda p: tolerance[p])
    for precision in lower:
        if all(pair.off * pair.allowed <= pair.bounds[precision] for pair in wrong):
            return (
                f"as if rounded to {precision}: if that is intended, declare computed_in {precision}; if not, look for "
                "an unwanted cast; "
            )
    return ""


@dataclass(frozen=True)
class AnswerPair:
    """One of a program's answers, with ours and the bugs'."""

    quantity: str
    answer: np.ndarray
    right: np.ndarray
    allowed: float  # the allowed error of an entry
    bounds: Mapping[str, float]  # the allowed error in each precision
    signatures: Mapping[str, np.ndarray]  # the bugs' numbers, for a part of the answer
    part: Any  # the index of that part

    @property
    def off(self) -> float:
        """The largest error of an entry, in units of the allowed error."""
        return _off(self.answer, self.right) / self.allowed

    def is_of(self, flag: str) -> bool:
        """Return whether the answer has a bug's numbers."""
        return flag in self.signatures and _off(self.answer[self.part], self.signatures[flag]) <= self.allowed

    def predicted(self, flag: str) -> np.ndarray:
        """Return the right answer, with a bug's numbers where they are known."""
        array = self.right.copy()
        array[self.part] = self.signatures[flag]
        return array

    @property
    def allowed_of_bugs(self) -> np.ndarray:
        """The allowed error of each entry of a bug's answer; infinite where its numbers are unknown."""
        allowed = np.full(self.answer.shape, np.inf)
        allowed[self.part] = self.allowed
        return allowed

    def text(self) -> str:
        """Describe the entry with the largest error and, for logits, the position where they begin to be wrong."""
        off = np.abs(self.answer - self.right)
        at = np.unravel_index(int(off.argmax()), off.shape)
        where, answer, right = ", ".join(map(str, at)), self.answer[at], self.right[at]
        text = f"{self.quantity} is off by {off[at]:.3g} at [{where}]: {answer:.6g}, expected {right:.6g}"
        text += f"; tolerance {self.allowed:.2g}"
        in_time = off.ndim == 3 and not self.quantity.startswith("merged.")
        first = int((off.max(axis=(0, 2)) > self.allowed).argmax()) if in_time else 0
        return f"{text}; right up to position {first - 1}" if first else text


def paired_answers(
    quantity: str,
    theirs: NamedArrays,
    ours: NamedArrays,
    flags: list[str],
    precision: str,
    tolerance: Mapping[str, float],
) -> AnswerPair | str | None:
    """Pair an answer with ours; return what is wrong with its shape, or None if the case does not ask for it."""
    answer, logits, ids = theirs[quantity], ours["logits"], None
    whole = "each.logits" in ours  # a request with logits at all positions
    last = answer.ndim == 2 and not whole  # only after the last token
    bounds = dict(tolerance)
    if quantity == "ids":
        return None
    if quantity.startswith("merged."):
        name = quantity if quantity in ours else f"{quantity}.weight"
        if name not in ours:
            return None
        right, answer = ours[name], answer[: len(ours[name])]
        bounds = {name: MERGED[name] * max(1.0, float(np.abs(right).max())) for name in tolerance}
    elif quantity == "logits":
        right = logits[:, -1] if last else logits
    else:
        bounds = {name: 2 * bound for name, bound in tolerance.items()}  # the log-sum-exp may be off as well
        right, ids = logits[:, -1] if last else logits, theirs.get("ids")
        if ids is not None and ids.shape != answer.shape:
            return f"ids has shape {ids.shape}, expected {answer.shape}, the shape of {quantity}"
        if ids is not None and (outside := ids[(ids < 0) | (ids >= logits.shape[-1])]).size:
            return f"ids has {outside[0]}, expected ids below {logits.shape[-1]}"
        if ids is None or ids.shape[:-1] == right.shape[:-1]:
            right = _log_probabilities(right, ids)
    if answer.shape != right.shape:
        return f"{quantity} has shape {theirs[quantity].shape}, expected {right.shape}"
    if not np.isfinite(answer).all():
        return f"{quantity} holds NaN or infinity: {_not_finite(answer)}"
    part: Any = np.s_[:, -1] if answer.ndim == 3 and not whole else np.s_[:]
    if quantity.startswith("merged."):
        names = {flag: f"signature.{flag}.merged" for flag in flags}
        signatures = {flag: ours[name] for flag, name in names.items() if name in ours}
        part = np.s_[: len(next(iter(signatures.values()), right))]
    else:
        signatures = {flag: ours[f"signature.{flag}"] for flag in flags}
    if quantity == "log_probabilities":
        ends = ids if ids is None or last or whole else ids[:, -1]
        signatures = {flag: _log_probabilities(one, ends) for flag, one in signatures.items()}
    return AnswerPair(quantity, answer, right, bounds[precision], bounds, signatures, part)


def _not_finite(array: np.ndarray) -> str:
    """Describe the first entry that is not finite, and count them."""
    bad = ~np.isfinite(array)
    at = np.unravel_index(int(bad.argmax()), array.shape)
    count = f"the only one of {array.size}" if bad.sum() == 1 else f"the first of {bad.sum()} among {array.size}"
    return f"[{', '.join(map(str, at))}] is {array[at]:g}, {count}"


def _log_probabilities(logits: np.ndarray, ids: np.ndarray | None) -> np.ndarray:  # (..., V), (..., n) -> (..., V or n)
    """Return the log-probabilities of all tokens, or of the given ids."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(log_probabilities if ids is None else np.take_along_axis(log_probabilities, ids, axis=-1))


def _off(answer: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(answer - expected).max()) if answer.shape == expected.shape else np.inf
