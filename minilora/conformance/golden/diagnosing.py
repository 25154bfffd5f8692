"""Find out from an engine's logits what it did with a user's own adapter, for ``minilora diagnose``.

The adapter, the model and the prompts are the only case of a `World`. Its answers are the logits, and the base's own
logits if the engine gave them too. The right answers and those of each known mistake are computed. A mistake is a
possible explanation if the engine's answers are within the tolerance of its precision (the golden adapters' tolerance),
unless another one fits clearly better: three times as close. If nothing fits, rows for each layer and kind of module
are tried, and then a measured temperature and a measured strength of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...files.dtypes import FLOATS, cast
from ...files.tensors import TensorFile
from ...language.llama import Llama
from ...layer import walk
from ...report import Diagnosis, Report, links
from ...texts import FileRefused
from .. import naming
from ..naming import MEASURED_COUNT, Answers, Parts, World, Wrong
from .answerfiles import INTEGERS, read_answers, read_tensors
from .bases import misdecoded
from .cases import LOGIT_TOLERANCE
from .judging import AnswerPair, paired_answers
from .mistakes import further_mistakes_of, mistakes_of
from .reading import NamedArrays, Reading
from .subject import Subject, read_subject

PROMPTS, OF_THE_BASE = "prompts", "base_logits"
MAX_IDS = 1 << 16
"""The largest number of token ids in all prompts together."""
MARGIN = 3.0
"""A candidate is ruled out if its error is this many times the smallest one."""
OUR_ERROR = {"float64": 0.0, "float32": 1e-3}
"""The possible error of our own logits, by the dtype that they are computed in: float32 for a large model."""
ROUNDED_TWICE = 10.0
"""The allowed error for rounded weights, in tolerances: a sum halfway between two numbers may round either way."""
SAME = 1e-3
"""The largest difference, in tolerances, between two candidates that count as the same."""
STRENGTHS, NEWTON_STEPS = tuple(2 ** (i / 4) for i in range(-16, 17)), 6
"""The strengths of an update that are tried, 1/16 to 16, and the number of steps that refine the best one."""
STRENGTH = "the-update-has-another-strength"
EXTRA = ("given", "rounded", "cached", "temperature")
"""Parts of rows that are not fields of `Reading`."""
IN_THE_BASE = {"base", "kept", "renormalised", "rounded", "temperature"}
"""Parts of rows that change the decoder even without an adapter."""


# --- logits -----------------------------------------------------------------------------------------------------------


def logits_of(subject: Subject, ids: np.ndarray, parts: Parts) -> np.ndarray:
    """Compute the logits (P, T, V) of prompts (P, T), with the adapter applied as `parts` say."""
    which, dtype = parts.get("rounded", ("", ""))
    given = parts.get("given", lambda given: given)(subject.given)
    before = _rounded(subject.arrays, dtype) if which == "base" else subject.arrays
    reading = Reading(**{key: part for key, part in parts.items() if key not in EXTRA}, product=lambda x, W: x @ W.T)
    changed = reading.changed(before, [(given, 1.0)])
    after = {**before, **(_rounded(changed, dtype) if which == "merged" else changed)}
    after = _rounded(after, dtype) if which == "all" else after
    after = misdecoded(subject.config, after, reading.base)
    mixture = subject.config.mixture and reading.decoding(subject.config.mixture)[0]
    model = _model(replace(subject.config, mixture=mixture), after, subject.dtype)
    z = np.asarray(model(ids), np.float64)
    if "cached" in parts:
        base = _model(subject.config, before, subject.dtype)
        first, last = (base, model) if parts["cached"] == "base" else (model, base)
        z = np.asarray(first(ids), np.float64)
        if ids.shape[1] > 1:
            z[:, -1], _ = last.extend(ids[:, -1:], first.extend(ids[:, :-1])[1])
    return np.asarray(z / parts.get("temperature", 1.0))


def _model(config: Any, arrays: NamedArrays, dtype: Any) -> Llama:
    """Build a decoder from these arrays, which may include biases that its config does not have."""
    arrays = {name: np.ascontiguousarray(array).astype(dtype, copy=False) for name, array in arrays.items()}
    model = Llama.build(config, {name: arrays[name] for name in config.shapes()})
    layers = dict(walk(model))
    for name in arrays.keys() - config.shapes().keys():
        layers[name.removesuffix(".bias")].bias = arrays[name]
    return model


def _rounded(arrays: Mapping[str, np.ndarray], dtype: str) -> NamedArrays:
    """Round weights to a type, and return them in their own dtype."""
    with np.errstate(over="ignore"):
        return {name: cast(array.astype("f4"), FLOATS[dtype]).astype(array.dtype) for name, array in arrays.items()}


# --- the world --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineAnswers:
    """The prompts that an engine was given, and its answers."""

    path: Path
    prompts: np.ndarray  # (P, T)
    precision: str  # the precision that the engine computed in
    answered: NamedArrays  # logits or log_probabilities, with or without ids, and perhaps base_logits
    bounds: Mapping[str, float]  # the largest allowed error of a logit, by precision

    @property
    def keys(self) -> list[str]:
        """The names of the answers present: the logits or log-probabilities, and the base's own logits."""
        return [name for name in ("logits", "log_probabilities", OF_THE_BASE) if name in self.answered]

    def paired(self, key: str, z: np.ndarray) -> AnswerPair:
        """Pair an answer with our logits. Raises FileRefused if the shapes differ."""
        quantity = "logits" if key == OF_THE_BASE else key
        theirs = {**self.answered, quantity: self.answered[key]}
        pair = paired_answers(quantity, theirs, {"logits": z}, [], self.precision, self.bounds)
        if not isinstance(pair, AnswerPair):
            raise FileRefused(self.path, (pair or "").replace(quantity, key, 1))
        return pair


def world_of(subject: Subject, asked: EngineAnswers) -> World:
    """Return the world of this one case, whose answers have the form of the engine's."""
    base_only = replace(subject, given=replace(subject.given, modules={}, saved={}))
    base = logits_of(base_only, asked.prompts, {}) if OF_THE_BASE in asked.keys else np.empty(0)

    def answers(_: Any, parts: Parts) -> Answers:
        of_a_base = {key: part for key, part in parts.items() if key in IN_THE_BASE}
        found = {key: base if key == OF_THE_BASE else logits_of(subject, asked.prompts, parts) for key in asked.keys}
        if OF_THE_BASE in found and of_a_base:
            found[OF_THE_BASE] = logits_of(base_only, asked.prompts, of_a_base)
        return {key: asked.paired(key, z).right for key, z in found.items()}

    def allowed(_: Any, key: str, parts: Parts) -> float:
        of_logarithms = 2 if key == "log_probabilities" else 1  # the log-sum-exp may be off as well
        return asked.bounds[asked.precision] * of_logarithms * (ROUNDED_TWICE if "rounded" in parts else 1)

    return World([subject], answers, allowed, mistakes_of(subject))


def measured_temperature(world: World, given: Answers, key: str) -> list[Wrong]:
    """Return a row with a temperature if all logits are the right ones times a factor; none otherwise."""

    def centred(numbers: np.ndarray) -> np.ndarray:  # a shift of all logits at a position means nothing
        return numbers - numbers.mean(axis=-1, keepdims=True) if key == "log_probabilities" else numbers

    (case,) = world.cases
    right = world.answers(case, {})[key]
    times = naming.factor(centred(given[key]), centred(right), lambda _: world.allowed(case, key, {}))
    if times is None or times.value <= 0:
        return []
    says = f"all logits are divided by a temperature of {1 / times.value:.5g}"
    return [Wrong("there-is-a-temperature", says, {"temperature": 1 / times.value}, count=MEASURED_COUNT)]


def measured_strength(world: World, given: Answers, key: str) -> list[Wrong]:
    """Return a row with the strength of the update that fits the answers best; none if the strength has no effect.

    From the best of a few strengths, take Gauss-Newton steps t + <d, off> / <d, d>, where d is the slope of -off.
    """
    (case,) = world.cases

    def off(times: float) -> np.ndarray:
        return np.asarray(given[key] - world.answers(case, {"times": times})[key])

    times = min(STRENGTHS, key=lambda t: float(np.square(off(t)).mean()))
    for _ in range(NEWTON_STEPS):
        here, step = off(times), 1e-4
        slope = (here - off(times + step)) / step
        if not slope.any():
            return []
        times += float((slope * here).sum() / np.square(slope).sum())
    says = f"the update acts with {times:.5g} times the strength given by its files"
    return [Wrong(STRENGTH, says, {"times": times}, count=MEASURED_COUNT)]


# --- candidates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """One thing that the engine may have done, with the distance of its answers from the engine's, in tolerances."""

    rows: list[Wrong]  # all rows that give these numbers; none for the right answer
    largest: float
    typical: float  # the root mean square

    @property
    def is_measured(self) -> bool:
        """Whether it is not a known mistake, but was fitted to these answers."""
        return bool(self.rows) and self.rows[0].count == MEASURED_COUNT

    def is_same(self, other: Candidate) -> bool:
        """Return whether two candidates give the same numbers here."""
        return abs(self.largest - other.largest) <= SAME and abs(self.typical - other.typical) <= SAME

    def __str__(self) -> str:
        return f"{self.rows[0].says} [{self.rows[0].flag}]" if self.rows else "what is right"


def candidate(world: World, given: Answers, row: Wrong | None) -> Candidate | None:
    """Compare a row's answers with the engine's; None if the row does not fit the model's shapes."""
    (case,) = world.cases
    with np.errstate(all="ignore"):
        try:
            answers = world.answers(case, row.replaced_in(case) if row else {})
        except (ValueError, TypeError, ZeroDivisionError):  # an engine would fail too
            return None
        off = np.concatenate([((given[key] - answers[key]) / world.allowed(case, key, {})).ravel() for key in given])
    largest, typical = float(np.abs(off).max()), float(np.sqrt((off**2).mean()))
    return Candidate([row] if row else [], largest, typical) if np.isfinite(off).all() else None


def add_rows(world: World, given: Answers, rows: Sequence[Wrong], candidates: list[Candidate]) -> None:
    """Add rows to the candidates. A row that gives a candidate's numbers joins it."""
    for row in rows:
        new = candidate(world, given, row)
        twin = next((one for one in candidates if new and one.is_same(new)), None)
        if twin and twin.rows:  # drop rows that change nothing here
            twin.rows.append(row)
        elif new and not twin:
            candidates.append(new)


def plausible(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return what the engine may have done, the nearest first: all candidates that fit and are not ruled out."""
    right = candidates[0]

    def fits(one: Candidate) -> bool:
        if not one.rows or "rounded" not in one.rows[0].replaced_in(None):
            return one.largest <= 1
        # If the right answer is within the tolerance, rounding is part of the declared precision and explains nothing.
        return right.largest > 1 and one.largest <= ROUNDED_TWICE and one.typical <= right.typical / MARGIN

    nearest = sorted(filter(fits, candidates), key=lambda one: one.typical)
    return [one for one in nearest if one.typical <= MARGIN * nearest[0].typical]


def diagnose(model: Path, adapter: Path, answers: Path) -> Report:
    """Find out what an engine did with an adapter.

    Parameters
    ----------
    model : path
        A decoder in any form that `minilora.Llama.load` accepts.
    adapter : path
        An adapter in any form that `minilora audit` accepts.
    answers : path
        A safetensors file with `prompts` (P, T) of token ids, and `logits` (P, T, V) or (P, V), or `log_probabilities`,
        with `ids` if they are only of some tokens, as ``minilora golden`` describes. With `base_logits`, the logits of
        the model without the adapter, a wrong base can be told from a wrong adapter.

    Returns
    -------
    Report
        The verdict, and the distance of the engine's answers from each candidate's.

    Raises
    ------
    FileRefused
        If one of the three cannot be read, or they do not fit each other.
    """
    asked, subject = _read(answers), read_subject(model, adapter)
    size, ours = subject.config.vocab_size, OUR_ERROR[str(np.dtype(subject.dtype))]
    if asked.prompts.max() >= size or asked.prompts.min() < 0:
        raise FileRefused(answers, f"{PROMPTS} has ids outside the model's vocabulary of {size}")
    asked = replace(asked, bounds={name: max(bound, ours) for name, bound in LOGIT_TOLERANCE.items()})
    world, given = world_of(subject, asked), {key: asked.answered[key] for key in asked.keys}
    key, right = asked.keys[0], world.answers(subject, {})
    stages: list[Callable[[], Sequence[Wrong]]] = [
        lambda: world.table,
        lambda: further_mistakes_of(subject),
        lambda: [*measured_temperature(world, given, asked.keys[-1]), *measured_strength(world, given, key)],
    ]
    candidates, found = list(filter(None, [candidate(world, given, None)])), list[Candidate]()
    for rows in stages:
        if not found:
            add_rows(world, given, rows(), candidates)
            found = plausible(candidates)
    together: list[Wrong] = []
    wrong = {key for key in given if naming.off(given[key], right[key], world.allowed(subject, key, {})) > 1}
    if not found and OF_THE_BASE in wrong:  # a mistake in the base, and another in the adapter
        every = [one.rows[0] for one in candidates if one.rows]
        with np.errstate(all="ignore"):
            _, named = naming.name(replace(world, table=every), [given])
        together = [row for one in named for row in one.wrongs if OF_THE_BASE in named[0].explains]
    effect = float(np.abs(right[key] - world.answers(subject, {"times": 0.0})[key]).max())
    return _report(asked, effect, wrong, candidates, found, together)


def _report(
    asked: EngineAnswers,
    effect: float,
    wrong: set[str],
    candidates: Sequence[Candidate],
    found: Sequence[Candidate],
    together: Sequence[Wrong],
) -> Report:
    """Report the result: the candidates found, several mistakes at once, or nothing known."""
    right, bound = candidates[0], asked.bounds[asked.precision]
    rows = [row for one in found for row in one.rows] or [*together]
    word, says = "WRONG", _one_of(rows) if found else rows[0].says if rows else _nothing_known(asked, candidates)
    if right in found and not rows:
        word, says = "RIGHT", f"the adapter is applied as its files say; largest difference {right.largest * bound:.2g}"
    elif right in found:
        word, says = "UNDECIDED", f"right, or {says}"
    elif OF_THE_BASE in wrong:
        says = f"the base's own logits are wrong: {says}"
    lines = [
        f"computed in {asked.precision}: a logit may be off by {bound:.2g}",
        f"the adapter changes a logit by at most {effect:.3g}",
        f"largest difference from the right answer: {right.largest * bound:.3g}",
    ]
    if OF_THE_BASE in asked.keys:
        lines.append(f"the base's own logits are {'wrong' if OF_THE_BASE in wrong else 'right'}")
    if word == "UNDECIDED":
        lines.append("try other prompts, or a higher precision")
    elif found and rows:
        lines.append(f"largest difference from the mistake named: {found[0].largest * bound:.3g}")
    nearest = sorted(candidates, key=lambda one: one.typical)
    return Report(
        str(asked.path),
        "diagnose",
        found=[] if right in found else [Diagnosis(row.says, row.flag, row.source) for row in rows],
        word=word,
        text=says,
        flag=rows[0].flag if rows else "",
        lines=lines,
        rows=[*lines, "largest difference from each:", *(line for one in nearest for line in _lines_of(one, bound))],
        details={
            "flags": [row.flag for row in rows], "computed_in": asked.precision, "tolerance": bound, "effect": effect,
            "strength": next((row.replaced_in(None)["times"] for row in rows if row.flag == STRENGTH), None),
            "base": None if OF_THE_BASE not in asked.keys else "wrong" if OF_THE_BASE in wrong else "right",
            "candidates": [_json_of(one, bound) for one in candidates],
            "same": {one.rows[0].flag: [row.flag for row in one.rows[1:]] for one in candidates if len(one.rows) > 1},
        },
    )  # fmt: skip


def _one_of(rows: Sequence[Wrong]) -> str:
    """Return the sentence of the first row, with the number of other rows that fit as well."""
    others = {1: "", 2: ", or one other"}.get(len(rows), f", or one of {len(rows) - 1} others")
    return f"{rows[0].says}{others}" if rows else ""


def _nothing_known(asked: EngineAnswers, candidates: Sequence[Candidate]) -> str:
    """Say that no row fits, with the nearest one if one is close, and a lower precision in which it would be right."""
    right, bound = candidates[0], asked.bounds[asked.precision]
    count = sum(len(one.rows) for one in candidates if not one.is_measured)
    near = min((one for one in candidates if not one.is_measured), key=lambda one: one.typical)
    lower = (name for name, other in asked.bounds.items() if bound < right.largest * bound <= other)
    says = f"none of the {count} known mistakes fits"
    if near.typical <= right.typical / MARGIN:
        says += f"; the nearest: {near.rows[0].says}"
    if name := next(lower, ""):
        says = f"as if computed in {name} (if that is intended, declare computed_in); {says}"
    return says


def _lines_of(one: Candidate, bound: float) -> list[str]:
    """Return the report's lines about one candidate."""
    same = ", ".join(row.flag for row in one.rows[1:])
    return [f"  {one.largest * bound:9.3g}  {one}", *([f"{'':13}same numbers here: {same}"] if same else [])]


def _json_of(one: Candidate, bound: float) -> dict[str, Any]:
    """Return a candidate as JSON data."""
    row = one.rows[0] if one.rows else Wrong("", "what is right", {})
    return {"flag": row.flag, "text": row.says, "off": one.largest * bound, "made in": links(row.source)}


def _read(path: Path) -> EngineAnswers:
    """Read a file of prompts and answers."""
    spec = TensorFile(path).tensors.get(PROMPTS)
    if spec is None or spec.dtype not in INTEGERS or len(spec.shape) != 2 or 0 in spec.shape:
        what = "there is none" if spec is None else f"it has dtype {spec.dtype} and shape {list(spec.shape)}"
        raise FileRefused(path, f"expected {PROMPTS}, token ids (P, T) of dtype I64 or I32, but {what}")
    if spec.shape[0] * spec.shape[1] > MAX_IDS:
        raise FileRefused(path, f"{PROMPTS} has shape {list(spec.shape)}, expected at most {MAX_IDS:,} ids")
    _, precision, answered = read_answers(path, LOGIT_TOLERANCE, more=(OF_THE_BASE,))
    if not {"logits", "log_probabilities"} & {*answered}:
        raise FileRefused(path, "there is no answer in it, expected logits (P, T, V) or (P, V), or log_probabilities")
    prompts = read_tensors(path, [PROMPTS])[PROMPTS]
    return EngineAnswers(path, prompts.astype(np.int64), precision, answered, LOGIT_TOLERANCE)
