"""What a program answered, held against the answers: each case's verdict, and the bugs that explain the wrong ones.

A number is right where it is off by no more than the tolerance of the program's precision. A wrong answer is explained
by a bug whose signature it equals within the same tolerance. All numbers come from the folder: nothing is computed
anew, so this version judges by the folders of earlier ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...checks import FileRefused, printable, short
from ...files.disk import member, read_json
from ...files.tensors import FLOATS, TensorFile
from .folder import FORMAT, INDEX
from .leftovers import ROUNDED

Arrays = dict[str, np.ndarray]
COMPUTED_IN = "computed_in"
PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MERGED = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""How far a merged weight's entry may be off, as a part of the largest entry: it is rounded once, or a few times."""
MUCH = 10
"""Tolerances: a request that is off by more, and within a lower precision's, was rounded to that one."""
INTEGERS = {"I64": "<i8", "I32": "<i4"}
MAX_INDEX, MAX_ANSWER = 1 << 22, 1 << 26
"""Bytes of an index, and of one tensor of answers, that are read: the bases have half a megabyte."""


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    id: str
    state: str  # "right", "wrong" or "missing"
    text: str = ""  # what is wrong
    flags: tuple[str, ...] = ()  # the known bugs that explain it
    precision: str = ""
    off: float = 0.0  # in units of the tolerance, the answer that is off most


@dataclass
class Judgement:
    """What became of all cases."""

    results: str
    cases: list[Verdict] = field(default_factory=list)
    names: Mapping[str, str] = field(default_factory=dict)  # of the bugs, by their flags
    links: Mapping[str, list[str]] = field(default_factory=dict)  # where they were made
    known: Mapping[str, str] = field(default_factory=dict)  # the reason of each case that is known to fail
    bases: frozenset[str] = frozenset()  # the cases of a base alone
    unanswered: list[str] = field(default_factory=list)  # the sessions of which no request has an answer
    denied: Counter[str] = field(default_factory=Counter)  # by a bug's flag, the right requests where it would show

    @property
    def passed(self) -> bool:
        """Whether every case is right."""
        return all(case.state == "right" for case in self.cases)

    @property
    def failing(self) -> list[Verdict]:
        """All cases that are not right, known or not."""
        return [case for case in self.cases if case.state != "right"]

    @property
    def unexpected(self) -> list[Verdict]:
        """The cases that are not right, and not known to fail."""
        return [case for case in self.failing if case.id not in self.known]

    @property
    def stale(self) -> dict[str, str]:
        """What becomes of the cases that are known to fail, and do not."""
        ids, failing = {case.id for case in self.cases}, {case.id for case in self.failing}
        return {id: "is right" if id in ids else "is no case here" for id in self.known if id not in failing}

    @property
    def status(self) -> int:
        """The exit code: 0 where all that fails is known, and all that is known fails."""
        return 1 if self.unexpected or self.stale else 0

    @property
    def diagnoses(self) -> dict[str, list[str]]:
        """The bugs that explain wrong cases, likeliest first, and the ids of these cases.

        Of bugs that explain as many, that one comes first which would show in the fewest requests that are right.
        """
        count = Counter(flag for case in self.cases for flag in case.flags)
        order = list(self.names)
        likeliest = sorted(count, key=lambda flag: (-count[flag], self.denied[flag], order.index(flag)))
        return {flag: [case.id for case in self.cases if flag in case.flags] for flag in likeliest}

    def __str__(self) -> str:
        count = Counter(case.state for case in self.cases)
        word = f"WRONG: {self._likeliest()}" if self.unexpected else "fails as is known" if self.failing else "passed"
        lines = [f"{self.results}: {word}"]
        lines += [", ".join(f"{count[state]} {state}" for state in ("right", "wrong", "missing") if count[state])]
        for flag, ids in self.diagnoses.items():
            made = f" (made in {', '.join(self.links[flag])})" if self.links.get(flag) else ""
            lines.append(f"{flag}{made}, {self._share(flag)}: {', '.join(ids)}")
        if self.diagnoses and (rest := [case.id for case in self.failing if case.state == "wrong" and not case.flags]):
            lines.append(f"no signature of one bug fits {', '.join(rest)}: mend what is named first, then look again")
        width = max((len(case.id) for case in self.cases), default=0)
        for case in self.cases:
            known = f", as is known ({self.known[case.id]})" if case in self.failing and case.id in self.known else ""
            lines.append(f"  {case.id:{width}}  {case.state}{known}{case.text and ': ' + case.text}")
        if self.unanswered:
            lines.append(f"sessions without an answer, which are not judged: {', '.join(self.unanswered)}")
        lines += self._of_known()
        return "\n".join(printable(line, 10_000) for line in lines)  # a name in a file can hold anything

    def _of_known(self) -> list[str]:
        if not self.known:
            return []
        unexpected = [case.id for case in self.unexpected]
        count = f"{len(self.failing) - len(unexpected)} of {len(self.known)} known failures fail as they should"
        stale = [f"{id} is known to fail, and {now}: take its line out" for id, now in self.stale.items()]
        return [count, *stale, *([f"not known to fail: {', '.join(unexpected)}"] if unexpected else [])]

    def _likeliest(self) -> str:
        """Return the base's own fault, or the bug that explains most or, where none does, the first that is not right.

        What is known to fail does not count.
        """
        cases = sorted(self.unexpected, key=lambda case: case.state != "wrong")
        alone = next((case for case in cases if case.id in self.bases and case.state == "wrong"), None)
        if alone is not None:
            what = next((self.names[flag] for flag in alone.flags), alone.text)
            return f"{alone.id}: the base is wrong without an adapter, so other cases do not count: {what}"
        unexpected = {case.id for case in cases}
        named = [flag for flag, ids in self.diagnoses.items() if unexpected & set(ids)]
        if named:
            return f"{self.names[named[0]]} ({self._share(named[0])})"
        return f"{cases[0].id}: {cases[0].text}"

    def _share(self, flag: str) -> str:
        """Say how many of the wrong cases a bug explains."""
        wrong = sum(case.state == "wrong" for case in self.cases)
        return f"explains {len(self.diagnoses[flag])} of {wrong} wrong cases"

    def json(self) -> dict[str, Any]:
        """Return the same for programs."""
        cases = [
            {
                "id": case.id, "state": case.state, "text": case.text, "flags": list(case.flags),
                "precision": case.precision or None, "off": case.off,
            }
            for case in self.cases
        ]  # fmt: skip
        diagnoses = [
            {"flag": flag, "bug": self.names[flag], "made in": self.links.get(flag, []), "cases": ids}
            for flag, ids in self.diagnoses.items()
        ]
        return {
            "format": FORMAT, "minilora": __version__, "results": self.results, "passed": self.passed,
            "diagnoses": diagnoses, "cases": cases, "status": self.status, "known": dict(self.known),
            "unexpected": [case.id for case in self.unexpected], "stale": self.stale,
            "unanswered sessions": self.unanswered,
        }  # fmt: skip


def compare(folder: Path, results: Path, known: Mapping[str, str] | None = None) -> Judgement:
    """Hold a program's answers against those of a folder of golden adapters.

    `known` are the cases that are known to fail, with a reason each, as `minilora.conformance.report.read_known` reads
    them.

    Raises
    ------
    FileRefused
        If one of the two is no such folder, is of a later format than this version reads, or holds a damaged file.
    """
    index = read_index(folder)
    if not results.is_dir():
        raise FileRefused(results, "not a folder, expected that of a program's answers")
    if results.resolve() in (folder.resolve(), (folder / "answers").resolve()):
        raise FileRefused(results, "the golden adapters themselves, expected a folder with what a program answered")
    flags = index["flags"]
    judgement = Judgement(
        str(results),
        names={flag: note["bug"] for flag, note in flags.items()},
        links={flag: note["made in"] for flag, note in flags.items()},
        known=known or {},
        bases=frozenset(case["id"] for case in index["cases"] if case["adapter"] == []),
    )
    for case in index["cases"]:
        judgement.cases.append(judge(folder, results, case, index["tolerance"]))
    for session in index.get("sessions", ()):
        verdicts = judge_session(folder, results, session, index["tolerance"])
        if all(verdict.state == "missing" for verdict in verdicts):  # a program need not live on from case to case
            judgement.unanswered.append(session["id"])
            continue
        judgement.cases += verdicts
        for verdict, request in zip(verdicts, session["requests"], strict=True):
            judgement.denied.update(request["flags"] if verdict.state == "right" else ())
    return judgement


def read_index(folder: Path) -> dict[str, Any]:
    """Return index.json; refuse one of a later format."""
    path = folder / INDEX
    index: dict[str, Any] = read_json(path, at_most=MAX_INDEX)
    version = index.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise FileRefused(path, f"format is {short(version)}, expected at most {FORMAT}: a later minilora wrote it")
    _check_index(path, index)
    return index


def _check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Refuse an index that is none: each entry is used as what it must be."""
    flags, cases, tolerance = (index.get(name) for name in ("flags", "cases", "tolerance"))
    if not isinstance(cases, list) or not cases:
        raise FileRefused(path, f"cases is {short(cases)}, expected a list of cases")
    if not isinstance(tolerance, dict) or not all(
        isinstance(tolerance.get(name), int | float) and tolerance[name] > 0 for name in MERGED
    ):
        raise FileRefused(path, f"tolerance is {short(tolerance)}, expected a number above 0 for {', '.join(MERGED)}")
    if not isinstance(flags, dict) or not all(
        isinstance(note, dict) and isinstance(note.get("bug"), str) and isinstance(note.get("made in"), list)
        for note in flags.values()
    ):
        raise FileRefused(path, f"flags is {short(flags)}, expected an object of bugs")
    sessions = index.get("sessions", [])
    if not isinstance(sessions, list) or not all(
        isinstance(session, dict) and isinstance(session.get("id"), str) and isinstance(session.get("requests"), list)
        for session in sessions
    ):
        raise FileRefused(path, f"sessions is {short(sessions)}, expected a list of sessions with id and requests")
    for session in sessions:
        for request in session["requests"]:
            answers, shown = (request.get(name) if isinstance(request, dict) else None for name in ("answers", "flags"))
            if not isinstance(answers, str) or not isinstance(shown, list) or any(flag not in flags for flag in shown):
                raise FileRefused(
                    path, f"a request of {short(session['id'])} is {short(request)}, expected answers and known flags"
                )
    for case in cases:
        if not isinstance(case, dict):
            raise FileRefused(path, f"a case is {short(case)}, expected an object")
        fields = {"id": str, "refused": bool} | ({"answers": str, "flags": list} if "answers" in case else {})
        if not all(isinstance(case.get(name), kind) for name, kind in fields.items()):
            raise FileRefused(path, f"a case is {short(case)}, expected one with {', '.join(fields)}")
        if unknown := [flag for flag in case.get("flags", ()) if flag not in flags]:
            raise FileRefused(path, f"{short(case['id'])} names {short(unknown[0])}, which is not in flags")


def judge(folder: Path, results: Path, case: Mapping[str, Any], tolerance: Mapping[str, float]) -> Verdict:
    """Judge the answers to one case."""
    id, refused = case["id"], case["refused"]
    path = member(results, f"{id}.safetensors")
    if not path.exists():
        return Verdict(id, "right") if refused else Verdict(id, "missing", f"there is no {path.name}")
    if "answers" not in case:
        return Verdict(id, "wrong", f"the adapter was taken, and must be refused: {case['note']}")
    return _verdict(id, path, folder / case["answers"], case["flags"], tolerance)


def judge_session(
    folder: Path, results: Path, session: Mapping[str, Any], tolerance: Mapping[str, float]
) -> list[Verdict]:
    """Judge the answers to each request of a session."""
    verdicts: list[Verdict] = []
    for n, request in enumerate(session["requests"]):
        id = f"{session['id']}.{n}"
        path = member(results, f"{id}.safetensors")
        if not path.exists():
            verdicts.append(Verdict(id, "missing", f"there is no {path.name}"))
            continue
        verdict = _verdict(id, path, folder / request["answers"], request["flags"], tolerance, last=True)
        right_before = any(before.state == "right" for before in verdicts)
        rounded = MUCH < verdict.off <= max(tolerance.values()) / tolerance[verdict.precision]
        if rounded and right_before and not verdict.flags:
            verdict = replace(verdict, flags=(ROUNDED.flag,))
        verdicts.append(verdict)
    return verdicts


def _verdict(
    id: str, path: Path, answers: Path, flags_shown: list[str], tolerance: Mapping[str, float], *, last: bool = False
) -> Verdict:
    """Hold a file of answers against ours; with `last`, only what it has after the last token."""
    file, precision, theirs = read_answers(path, tolerance)
    ours = read_tensors(answers)
    if missing := [name for name in ("logits", *(f"signature.{flag}" for flag in flags_shown)) if name not in ours]:
        raise FileRefused(answers, f"there is no {short(missing[0])}")
    if last:
        theirs = {name: array[:, -1] if array.ndim == 3 else array for name, array in theirs.items()}
        ours["logits"] = ours["logits"][:, None]
    compared = []
    for quantity in theirs:
        pair = held_against(quantity, theirs, ours, flags_shown, precision, tolerance)
        if isinstance(pair, str):
            return Verdict(id, "wrong", pair, (), precision)
        compared += [pair] if pair else []
    if not compared:
        names = ", ".join(map(short, file.tensors)) or "no tensor"
        return Verdict(id, "wrong", f"it has {names}, and no answer to this case", (), precision)
    off = max(pair.off for pair in compared)
    wrong = [pair for pair in compared if pair.off > 1]
    if not wrong:
        return Verdict(id, "right", "", (), precision, off)
    flags = tuple(flag for flag in flags_shown if all(pair.is_of(flag) for pair in wrong))
    text = wrong[0].text() + ("" if flags else _lower_precision(wrong, precision, tolerance))
    return Verdict(id, "wrong", text, flags, precision, off)


def _lower_precision(wrong: list[Compared], precision: str, tolerance: Mapping[str, float]) -> str:
    """Say in which lower precision all that is wrong would be right."""
    lower = sorted((name for name in tolerance if tolerance[name] > tolerance[precision]), key=lambda n: tolerance[n])
    for name in lower:
        if all(pair.off * pair.allowed <= pair.bounds[name] for pair in wrong):
            return (
                f"; as if rounded to {name}: declare computed_in {name}, if that is meant, or look for a cast that "
                "nobody declared"
            )
    return ""


@dataclass(frozen=True)
class Compared:
    """One of a program's answers beside ours, and beside the bugs'."""

    quantity: str
    answer: np.ndarray
    right: np.ndarray
    allowed: float  # how far an entry may be off
    bounds: Mapping[str, float]  # the same in each precision
    signatures: Mapping[str, np.ndarray]
    part: np.ndarray  # of the answer, the part that signatures have

    @property
    def off(self) -> float:
        """The entry that is off most, in units of what is allowed."""
        return _off(self.answer, self.right) / self.allowed

    def is_of(self, flag: str) -> bool:
        """Return whether the numbers are a bug's."""
        return _off(self.part, self.signatures[flag]) <= self.allowed

    def text(self) -> str:
        """Say which entry is off most and, of logits, where they begin to be wrong."""
        off = np.abs(self.answer - self.right)
        at = np.unravel_index(int(off.argmax()), off.shape)
        where, answer, right = ", ".join(map(str, at)), self.answer[at], self.right[at]
        text = f"{self.quantity} is off by {off[at]:.3g} at [{where}]: {answer:.6g}, expected {right:.6g}"
        text += f"; tolerance {self.allowed:.2g}"
        in_time = off.ndim == 3 and not self.quantity.startswith("merged.")
        first = int((off.max(axis=(0, 2)) > self.allowed).argmax()) if in_time else 0
        return f"{text}; right up to position {first - 1}" if first else text


def held_against(
    quantity: str, theirs: Arrays, ours: Arrays, flags: list[str], precision: str, tolerance: Mapping[str, float]
) -> Compared | str | None:
    """Put an answer beside ours; say what is wrong with its shape, or return None of what is no answer of the case."""
    answer, logits, ids = theirs[quantity], ours["logits"], None
    last = answer.ndim == 2  # after the last token alone
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
        bounds = {name: 2 * bound for name, bound in tolerance.items()}  # the logarithm of the sum may be off as well
        right, ids = logits[:, -1] if last else logits, theirs.get("ids")
        if ids is not None and ids.shape != answer.shape:
            return f"ids has shape {ids.shape}, expected {answer.shape} as {quantity} has"
        if ids is not None and (outside := ids[(ids < 0) | (ids >= logits.shape[-1])]).size:
            return f"ids has {outside[0]}, expected ids below {logits.shape[-1]}"
        if ids is None or ids.shape[:-1] == right.shape[:-1]:
            right = _log_probabilities(right, ids)
    if answer.shape != right.shape:
        return f"{quantity} has shape {theirs[quantity].shape}, expected {right.shape}"
    if not np.isfinite(answer).all():
        return f"{quantity} holds NaN or infinity: {_not_finite(answer)}"
    if quantity.startswith("merged."):
        signatures = {flag: ours.get(f"signature.{flag}.merged", np.empty(0)) for flag in flags}
        part = answer[: len(next(iter(signatures.values()), right))]
    else:
        signatures = {flag: ours[f"signature.{flag}"] for flag in flags}
        part = answer if last else answer[:, -1]
    if quantity == "log_probabilities":
        ends = ids if ids is None or last else ids[:, -1]
        signatures = {flag: _log_probabilities(one, ends) for flag, one in signatures.items()}
    return Compared(quantity, answer, right, bounds[precision], bounds, signatures, part)


def _not_finite(array: np.ndarray) -> str:
    """Say which entry is the first that is not finite, and how many are."""
    bad = ~np.isfinite(array)
    at = np.unravel_index(int(bad.argmax()), array.shape)
    count = f"the only one of {array.size}" if bad.sum() == 1 else f"the first of {bad.sum()} among {array.size}"
    return f"[{', '.join(map(str, at))}] is {array[at]:g}, {count}"


def read_answers(path: Path, tolerance: Mapping[str, float]) -> tuple[TensorFile, str, Arrays]:
    """Return a file of answers, the precision that they were computed in, and the answers."""
    file = TensorFile(path)
    names = [name for name in file.tensors if name in ("logits", "log_probabilities") or name.startswith("merged.")]
    for name in names:
        if file.tensors[name].dtype not in FLOATS:
            raise FileRefused(path, f"{short(name)} has dtype {file.tensors[name].dtype}, expected a float's")
    if "ids" in file.tensors and file.tensors["ids"].dtype not in INTEGERS:
        raise FileRefused(path, f"ids has dtype {file.tensors['ids'].dtype}, expected one of {', '.join(INTEGERS)}")
    for name in (*names, "ids"):
        spec = file.tensors.get(name)
        if spec is not None and not 0 < spec.end - spec.start <= MAX_ANSWER:
            raise FileRefused(
                path, f"{short(name)} has shape {list(spec.shape)}, expected a tensor of 1 to {MAX_ANSWER:,} bytes"
            )
    types = [PRECISIONS[file.tensors[name].dtype] for name in names]
    precision = file.metadata.get(COMPUTED_IN, max(types, key=lambda one: tolerance[one], default="float32"))
    if precision not in tolerance:
        raise FileRefused(path, f"{COMPUTED_IN} is {short(precision)}, expected one of {', '.join(tolerance)}")
    return file, precision, read_tensors(path, (*names, "ids") if "ids" in file.tensors else names)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> Arrays:
    """Read tensors of a file, all of them by default; floats in float64, whichever type they have."""
    file, arrays = TensorFile(path), {}
    for name in file.tensors if names is None else names:
        spec = file.tensors[name]
        if spec.dtype in INTEGERS:
            raw = file.read_bytes(spec.start, spec.end - spec.start)
            arrays[name] = raw.view(INTEGERS[spec.dtype]).reshape(spec.shape)
        else:
            arrays[name] = file.read(name).astype(np.float64)
    return arrays


def _log_probabilities(logits: np.ndarray, ids: np.ndarray | None) -> np.ndarray:  # (..., V), (..., n) -> (..., V or n)
    """Return log-probabilities, of all tokens or of those named."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(log_probabilities if ids is None else np.take_along_axis(log_probabilities, ids, axis=-1))


def _off(answer: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(answer - expected).max()) if answer.shape == expected.shape else np.inf
