"""What a program answered, held against the answers: each case's verdict, and the bugs that explain the wrong ones.

A number is right where it is off by no more than the tolerance of the program's precision. A wrong answer is explained
by a bug whose signature it equals within the same tolerance. All numbers come from the folder: nothing is computed
anew, so this version judges by the folders of earlier ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..files.errors import FileRefused, printable, short
from ..files.tensorfile import FLOATS, TensorFile, member, parse_json, read_whole
from .writing import FORMAT, INDEX

Arrays = dict[str, np.ndarray]
COMPUTED_IN = "computed_in"
PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MERGED = {"float64": 1e-6, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""How far a merged weight's entry may be off, as a part of the largest entry: it is rounded once, or a few times."""
MAX_INDEX = 1 << 22


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

    @property
    def passed(self) -> bool:
        """Whether every case is right."""
        return all(case.state == "right" for case in self.cases)

    @property
    def diagnoses(self) -> dict[str, list[str]]:
        """The bugs that explain wrong cases, likeliest first, and the ids of these cases."""
        count = Counter(flag for case in self.cases for flag in case.flags)
        order = list(self.names)
        found = sorted(count, key=lambda flag: (-count[flag], order.index(flag)))
        return {flag: [case.id for case in self.cases if flag in case.flags] for flag in found}

    def __str__(self) -> str:
        count = Counter(case.state for case in self.cases)
        likeliest = next((f": {self.names[flag]}" for flag in self.diagnoses), "")
        lines = [f"{self.results}: {'passed' if self.passed else 'WRONG'}{likeliest}"]
        lines += [", ".join(f"{count[state]} {state}" for state in ("right", "wrong", "missing") if count[state])]
        for flag, ids in self.diagnoses.items():
            made = f" (made in {', '.join(self.links[flag])})" if self.links.get(flag) else ""
            lines.append(f"{flag}{made}: {', '.join(ids)}")
        width = max((len(case.id) for case in self.cases), default=0)
        lines += [f"  {case.id:{width}}  {case.state}{case.text and ': ' + case.text}" for case in self.cases]
        return printable_lines(lines)

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
            "diagnoses": diagnoses, "cases": cases,
        }  # fmt: skip


def printable_lines(lines: list[str]) -> str:
    """Return lines for a terminal: a name in a file can hold anything."""
    return "\n".join(printable(line, 10_000) for line in lines)


def compare(folder: Path, results: Path) -> Judgement:
    """Hold a program's answers against those of a folder of golden adapters.

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
    found = Judgement(
        str(results),
        names={flag: one["bug"] for flag, one in flags.items()},
        links={flag: one["made in"] for flag, one in flags.items()},
    )
    for case in index["cases"]:
        found.cases.append(judge(folder, results, case, index["tolerance"]))
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """Return index.json; refuse one of a later format."""
    path = folder / INDEX
    index = parse_json(path, read_whole(path, MAX_INDEX), "file")
    version = index.get("format")
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise FileRefused(path, f"format is {short(version)}, expected at most {FORMAT}: a later minilora wrote it")
    return index


def judge(folder: Path, results: Path, case: Mapping[str, Any], tolerance: Mapping[str, float]) -> Verdict:
    """Judge the answers to one case."""
    id = case["id"]
    path = member(results, f"{id}.safetensors")
    answered, refused = "answers" in case, case["refused"]
    if not path.exists():
        text = "" if refused else f"there is no {path.name}"
        return Verdict(id, "right" if refused else "missing", text)
    if not answered:
        return Verdict(id, "wrong", f"the adapter was taken, and must be refused: {case['note']}")
    file, precision, theirs = _read(path, tolerance)
    if not theirs:
        return Verdict(id, "wrong", f"it has {', '.join(map(short, file.tensors)) or 'no tensor'}: no answers")
    ours = _answers(folder / case["answers"])
    worst, text = 0.0, ""
    agree = set(case["flags"])
    for quantity, found in theirs.items():
        if quantity == "ids":
            continue
        allowed = tolerance[precision]
        if quantity.startswith("merged."):
            name = quantity if quantity in ours else f"{quantity}.weight"
            if name not in ours:
                continue
            right, size = ours[name], np.abs(ours[name]).max()
            compared, allowed = found[: len(right)], MERGED[precision] * max(1.0, float(size))
            rows = {flag: ours[f"signature.{flag}.merged"] for flag in case["flags"]}
            signatures = {flag: (compared[: len(one)], one) for flag, one in rows.items()}
        elif quantity == "logits":
            right, compared = ours["logits"], found
            signatures = {flag: (found[..., -1, :], ours[f"signature.{flag}"]) for flag in case["flags"]}
        else:
            last = found.ndim == 2
            ids, allowed = theirs.get("ids"), 2 * allowed
            if ids is not None and ids.shape != found.shape:
                return Verdict(id, "wrong", f"ids has shape {ids.shape}, expected {found.shape} as {quantity} has")
            V = ours["logits"].shape[-1]
            if ids is not None and (outside := ids[(ids < 0) | (ids >= V)]).size:
                return Verdict(id, "wrong", f"ids has {outside[0]}, expected ids below {V}")
            right, compared = _chosen(ours["logits"][:, -1] if last else ours["logits"], ids), found
            end = found if last else found[..., -1, :]
            ends = ids if ids is None or last else ids[..., -1, :]
            signatures = {flag: (end, _chosen(ours[f"signature.{flag}"], ends)) for flag in case["flags"]}
        if compared.shape != right.shape:
            return Verdict(id, "wrong", f"{quantity} has shape {found.shape}, expected {right.shape}", (), precision)
        if not np.isfinite(compared).all():
            return Verdict(id, "wrong", f"{quantity} holds NaN or infinity", (), precision)
        off = _off(compared, right) / allowed
        if off > 1:
            agree &= {flag for flag, (one, other) in signatures.items() if _off(one, other) <= allowed}
            text = text or _told(quantity, compared, right, allowed)
        worst = max(worst, off)
    if worst <= 1:
        return Verdict(id, "right", "", (), precision, worst)
    return Verdict(id, "wrong", text, tuple(flag for flag in case["flags"] if flag in agree), precision, worst)


def _read(path: Path, tolerance: Mapping[str, float]) -> tuple[TensorFile, str, Arrays]:
    """Return a file of answers, the precision that it was computed in, and its answers."""
    file = TensorFile(path)
    names = [n for n in file.tensors if n in ("logits", "log_probabilities", "ids") or n.startswith("merged.")]
    types = [file.tensors[name].dtype for name in names if name != "ids"]
    for name, dtype in zip([name for name in names if name != "ids"], types, strict=True):
        if dtype not in FLOATS:
            raise FileRefused(path, f"{short(name)} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    coarsest = max((PRECISIONS[dtype] for dtype in types), key=lambda p: tolerance[p], default="float32")
    precision = file.metadata.get(COMPUTED_IN, coarsest)
    if precision not in tolerance:
        raise FileRefused(path, f"{COMPUTED_IN} is {short(precision)}, expected one of {', '.join(tolerance)}")
    with file.opened() as opened:
        found = {name: _tensor(file, name, opened) for name in names}
    return file, precision, {} if set(found) == {"ids"} else found


def _tensor(file: TensorFile, name: str, opened: Any) -> np.ndarray:
    if name != "ids":
        return file.read(name, opened).astype(np.float64)
    spec = file.tensors[name]
    if spec.dtype not in ("I64", "I32"):
        raise FileRefused(file.path, f"ids has dtype {spec.dtype}, expected I64 or I32")
    opened.seek(spec.start)
    raw = file.read_bytes(opened, spec.end - spec.start)
    return np.asarray(raw.view("<i8" if spec.dtype == "I64" else "<i4").reshape(spec.shape))


def _answers(path: Path) -> Arrays:
    """Read a case's own file."""
    file = TensorFile(path)
    with file.opened() as opened:
        return {n: file.read(n, opened).astype(np.float64) for n, s in file.tensors.items() if s.dtype in FLOATS}


def _chosen(logits: np.ndarray, ids: np.ndarray | None) -> np.ndarray:  # (..., V), (..., n) -> (..., V or n)
    """Return log-probabilities, of all tokens or of those named."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(found if ids is None else np.take_along_axis(found, ids, axis=-1))


def _off(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf


def _told(quantity: str, found: np.ndarray, right: np.ndarray, allowed: float) -> str:
    """Say where an answer is off most, and where it begins to be wrong."""
    off = np.abs(found - right)
    at = np.unravel_index(int(off.argmax()), off.shape)
    where = ", ".join(map(str, at))
    text = (
        f"{quantity} is off by {off[at]:.3g} at [{where}], {found[at]:.6g} for {right[at]:.6g}; tolerance {allowed:.2g}"
    )
    if quantity == "logits":
        first = int((off.max(axis=(0, 2)) > allowed).argmax())
        text += f"; wrong from position {first} on" if first else ""
    return text
