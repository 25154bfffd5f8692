"""Which known mistake an engine's logits are, if they are not right.

Each mistake's logits are computed beside the right ones. An answer is *of* a mistake where it lies within the tolerance
of the engine's precision, the golden adapters' own, and no other answer lies nearly as near: a third as far is far
enough. If nothing fits, the strength with which the update acts is measured, and the nearest mistakes are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...checks import FileRefused, printable, short
from ...files.tensors import TensorFile
from ..report import links
from .answerfiles import INTEGERS, read_answers, read_tensors
from .answering import logits
from .cases import TOLERANCE
from .judging import Compared, held_against
from .mistakes import ROUNDINGS, Mistake, acting_alone, layers_left_out, mistakes_of, outline
from .reading import Arrays
from .subject import Subject, read_subject

PROMPTS = "prompts"
MOST_IDS = 1 << 16
"""Token ids in all prompts together."""
CLEARLY = 3.0
"""How many times as far another answer must lie, to be ruled out."""
OURS = {"float64": 0.0, "float32": 1e-3}
"""How far our own logits may be off, by the type that they are computed in: a large model's in float32."""
ROUNDED_TWICE = 10.0
"""How many tolerances an answer of rounded weights may be off: where a sum is in the midst, its last bit decides."""
SAME = 1e-3
"""How far two answers may differ, in tolerances, that are the same."""
SHOWN = 5
"""Mistakes that are listed where none fits."""
STRENGTHS, NEWTON_STEPS = tuple(2 ** (i / 4) for i in range(-16, 17)), 6
"""The strengths of an update that are tried, a 16th to 16, and how often the best is bettered."""


@dataclass(frozen=True)
class Candidate:
    """One thing that the engine may have done."""

    flag: str  # "" for what is right
    text: str
    source: str
    largest: float  # the largest difference of its logits to the engine's, in tolerances
    typical: float  # the root of the mean square of these differences, in tolerances
    slack: float = 1.0  # how large `largest` may be
    off: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))  # the differences, in tolerances


@dataclass
class Diagnosis:
    """What came out."""

    name: str
    precision: str  # that the engine computed in
    allowed: float  # the tolerance of a logit
    effect: float  # the largest difference that the adapter makes to a logit
    candidates: list[Candidate]  # the right answer first, and the mistakes that give other numbers
    same: Mapping[str, list[Mistake]]  # the mistakes that give the numbers of another one here, by its flag
    strength: tuple[float, float] | None = None  # with which the update acts, and the largest difference then
    lower: str = ""  # the precision in which the answer would be right

    @property
    def fitting(self) -> list[Candidate]:
        """What the engine may have done, the nearest first: all that no other thing rules out."""
        right = self.candidates[0]

        def is_possible(c: Candidate) -> bool:
            if c.slack == 1:
                return c.largest <= 1
            # Rounded weights within the tolerance are the precision that was declared; others explain what is off.
            return right.largest > 1 and c.largest <= c.slack and c.typical <= right.typical / CLEARLY

        nearest = sorted(filter(is_possible, self.candidates), key=lambda c: c.typical)
        return [c for c in nearest if c.typical <= CLEARLY * nearest[0].typical]

    @property
    def status(self) -> int:
        """The exit code: 0 of right logits, 1 of wrong ones, 2 where these logits cannot tell."""
        fitting = self.fitting
        if any(not c.flag for c in fitting):
            return 0 if len(fitting) == 1 else 2
        return 1

    @property
    def first_line(self) -> str:
        """The verdict in a line."""
        fitting, count = self.fitting, len(self.candidates) - 1
        if self.status == 0:
            return f"{self.name}: RIGHT: the adapter is applied as its files say{self._off(fitting[0])}"
        if self.status == 2:
            others = "; or ".join(c.text for c in fitting if c.flag)
            return (
                f"{self.name}: UNDECIDED: right, or {others}. The adapter moves these logits by {self.effect:.2g}, "
                f"and the tolerance of {self.precision} is {self.allowed:.2g}: ask other prompts, or compute in a "
                "higher precision"
            )
        if fitting:
            texts = "; or ".join(_with_links(c) for fit in fitting for c in (fit, *self.same.get(fit.flag, ())))
            return f"{self.name}: WRONG: {texts}{self._off(fitting[0])}, to what is right {self._right()}"
        if self.strength is not None:
            times, off = self.strength
            return (
                f"{self.name}: WRONG: none of the {count} known mistakes fits, and the update acts with {times:.5g} "
                f"times the strength that its files say; largest difference then {off * self.allowed:.2g}, as it "
                f"should be {self._right()}"
            )
        near = min(self.candidates, key=lambda c: c.typical)
        lower = f". As if computed in {self.lower}: declare computed_in, if that is meant" if self.lower else ""
        nearest = near.text if near.flag else "the right answer"
        return (
            f"{self.name}: WRONG: none of the {count} known mistakes fits; the nearest is: {nearest}, and the largest "
            f"difference to it is {near.largest * self.allowed:.2g}, where {self.allowed:.2g} is allowed{lower}"
        )

    def _off(self, candidate: Candidate) -> str:
        return f"; largest difference {candidate.largest * self.allowed:.2g}"

    def _right(self) -> str:
        return f"{self.candidates[0].largest * self.allowed:.2g}"

    def __str__(self) -> str:
        lines = [self.first_line, ""]
        lines.append(f"computed in {self.precision}: a logit may be off by {self.allowed:.2g}")
        lines.append(f"the adapter moves a logit by {self.effect:.3g} at most")
        nearest = sorted(self.candidates, key=lambda c: c.typical)
        lines.append(
            f"the nearest of {len(self.candidates) - 1} mistakes and the right answer, by their largest differences:"
        )
        for c in nearest[:SHOWN]:
            lines.append(f"  {c.largest * self.allowed:9.3g}  {c.text}{f' [{c.flag}]' if c.flag else ''}")
            if same := self.same.get(c.flag):
                lines.append(f"{'':13}the same numbers here: {', '.join(mistake.flag for mistake in same)}")
        return "\n".join(printable(line, 10_000) for line in lines)

    def json(self) -> dict[str, Any]:
        """Return the same for programs."""
        flags = [flag for c in self.fitting for flag in (c.flag, *(m.flag for m in self.same.get(c.flag, ())))]
        return {
            "format": 1, "minilora": __version__, "first_line": printable(self.first_line, 10_000),
            "status": self.status,
            "flags": flags, "computed_in": self.precision, "tolerance": self.allowed,
            "effect": self.effect, "strength": self.strength[0] if self.strength else None,
            "candidates": [
                {"flag": c.flag, "text": c.text, "off": c.largest * self.allowed, "made in": links(c.source)}
                for c in self.candidates
            ],
            "same": {flag: [mistake.flag for mistake in mistakes] for flag, mistakes in self.same.items()},
        }  # fmt: skip


def _with_links(what: Candidate | Mistake) -> str:
    """Return what an engine may have done in words, with where that was done before, and the flag."""
    text = what.text if isinstance(what, Candidate) else what.says
    made = f" (made in {what.source})" if what.source else ""
    return f"{text}{made} [{what.flag}]"


def diagnose(model: Path, adapter: Path, answers: Path) -> Diagnosis:
    """Say what an engine did with an adapter.

    Parameters
    ----------
    model : path
        A decoder, as `minilora.Llama.load` takes it.
    adapter : path
        As `minilora audit` takes it.
    answers : path
        A safetensors file with `prompts` (P, T) of token ids, and `logits` (P, T, V) or (P, V), or `log_probabilities`,
        with `ids` beside them where they are of some tokens; as ``minilora golden`` describes them.

    Raises
    ------
    FileRefused
        If one of the three cannot be read, or they do not fit each other.
    """
    prompts, precision, theirs = _read(answers)
    subject = read_subject(model, adapter)
    if prompts.max() >= subject.config.vocab_size or prompts.min() < 0:
        raise FileRefused(
            answers, f"{PROMPTS} holds ids that the model's vocabulary of {subject.config.vocab_size} has not"
        )
    ours = OURS[str(np.dtype(subject.dtype))]
    bounds = {name: max(bound, ours) for name, bound in TOLERANCE.items()}

    def off(z: np.ndarray) -> np.ndarray:
        pair = _compared(answers, theirs, z, precision, bounds)
        return np.asarray((pair.answer - pair.right) / pair.allowed)

    def held(mistake: Mistake | None, z: np.ndarray, flag: str = "", text: str = "what is right") -> Candidate:
        d, source = off(z), mistake.source if mistake else ""
        slack = ROUNDED_TWICE if mistake in ROUNDINGS else 1.0
        return Candidate(flag, text, source, float(np.abs(d).max()), float(np.sqrt((d**2).mean())), slack, d)

    table = _Table(subject, prompts, held)
    for mistake in mistakes_of(subject):
        table.add(mistake)
    effect = float(np.abs(table.right - logits(subject, prompts, times=0.0)).max())
    diagnosis = Diagnosis(str(answers), precision, bounds[precision], effect, table.candidates, table.same)
    if not diagnosis.fitting:
        for mistake in (*layers_left_out(subject), *acting_alone(subject)):
            table.add(mistake)
    if not diagnosis.fitting:
        diagnosis.strength = _strength(lambda times: off(logits(subject, prompts, times=times)))
        largest = table.candidates[0].largest * bounds[precision]
        diagnosis.lower = next((name for name, bound in bounds.items() if bounds[precision] < largest <= bound), "")
    return diagnosis


class _Table:
    """What the engine may have done, each with its logits; mistakes that give the numbers of another one beside it."""

    def __init__(self, subject: Subject, prompts: np.ndarray, held: Callable[..., Candidate]) -> None:
        self.subject, self.prompts, self.held = subject, prompts, held
        self.right = logits(subject, prompts)
        self.candidates = [held(None, self.right)]
        self.same: dict[str, list[Mistake]] = {}
        self.outlines = {outline(subject, None): ""}

    def add(self, mistake: Mistake) -> None:
        """Compute what a mistake gives, where that is not plain, and put it in its place."""
        try:
            key = outline(self.subject, mistake)
        except ZeroDivisionError:  # r / alpha, where alpha is 0
            return
        if key is not None and key in self.outlines:
            self._add_same(self.outlines[key], mistake)
            return
        with np.errstate(all="ignore"):
            try:
                z = logits(self.subject, self.prompts, mistake)
            except (ValueError, TypeError):  # it does not fit this model's shapes, so no engine gets on with it
                return
        if not np.isfinite(z).all():
            return
        candidate = self.held(mistake, z, mistake.flag, mistake.says)
        twin = next((c for c in self.candidates if np.abs(c.off - candidate.off).max() <= SAME), None)
        if twin is not None:
            self._add_same(twin.flag, mistake)
        else:
            self.candidates.append(candidate)
        if key is not None:
            self.outlines[key] = mistake.flag if twin is None else twin.flag

    def _add_same(self, flag: str, mistake: Mistake) -> None:
        if flag:
            self.same.setdefault(flag, []).append(mistake)


def _strength(off: Callable[[float], np.ndarray]) -> tuple[float, float] | None:
    """Return the strength of the update with which nothing is off, and the largest difference then; None for none.

    `off` gives the differences, in tolerances, by the strength t. From the best of a few, Gauss and Newton's steps:
    t + <d, off> / <d, d>, where d is the slope of the differences.
    """
    times = min(STRENGTHS, key=lambda t: float(np.square(off(t)).mean()))
    for _ in range(NEWTON_STEPS):
        here, step = off(times), 1e-4
        slope = (here - off(times + step)) / step
        if not slope.any():
            return None
        times += float((slope * here).sum() / np.square(slope).sum())
    largest = float(np.abs(off(times)).max())
    return (times, largest) if largest <= 1 else None


def _read(path: Path) -> tuple[np.ndarray, str, Arrays]:
    """Return the prompts, the precision that an engine computed in, and its numbers."""
    file = TensorFile(path)
    spec = file.tensors.get(PROMPTS)
    if spec is None or spec.dtype not in INTEGERS or len(spec.shape) != 2 or 0 in spec.shape:
        what = "there is none" if spec is None else f"it has dtype {spec.dtype} and shape {list(spec.shape)}"
        raise FileRefused(path, f"expected {PROMPTS}, token ids (P, T) of type I64 or I32: {what}")
    if spec.shape[0] * spec.shape[1] > MOST_IDS:
        raise FileRefused(path, f"{PROMPTS} has shape {list(spec.shape)}, expected {MOST_IDS:,} ids at most")
    _, precision, theirs = read_answers(path, TOLERANCE)
    theirs = {name: array for name, array in theirs.items() if not name.startswith("merged.")}
    if not {"logits", "log_probabilities"} & {*theirs}:
        raise FileRefused(path, "expected logits (P, T, V) or (P, V), or log_probabilities")
    prompts = read_tensors(path, [PROMPTS])[PROMPTS]
    return prompts.astype(np.int64), precision, theirs


def _compared(path: Path, theirs: Arrays, z: np.ndarray, precision: str, bounds: Mapping[str, float]) -> Compared:
    """Put the engine's numbers beside logits of ours; refuse those of another shape."""
    name = "logits" if "logits" in theirs else "log_probabilities"
    pair = held_against(name, theirs, {"logits": z}, [], precision, bounds)
    if not isinstance(pair, Compared):
        raise FileRefused(path, pair or f"{short(name)} cannot be compared")
    return pair
