"""Test vectors for implementations in any language: problems and answers as files.

`write` writes a folder of vectors: one safetensors file for each case, and ``index.json``, which describes them.
`compare` judges the answers of a program. A case is a problem of the suite in one precision. Its file has

    the problem    x, dy, weight, lora_A, lora_B, alpha, and bias if there is one
                   DoRA: magnitude
                   dropout: mask
                   convolution: stride, padding, dilation and groups
                   NF4: packed and absmax instead of weight; if the scales are quantised too, nested_absmax and mean
                   fused slots: widths, one alpha for each slot, and lora_A.0, lora_B.0 and so on, by slot number
                   experts: expert_ids
    the answers    y, dx, dA, dB, merged, and dm for DoRA, computed in float64 from the numbers in the file
    their sizes    size.y, size.dx, ...: an answer is right if its error is at most tolerance times size

The program reads a problem and writes its answers, under these names, into a file of the same name in another folder.
It may omit files and answers. A case's flags are the known bugs that it catches: a bug is caught if its numbers differ
from the right ones.

The answers are summed in a fixed order, first to last, so that a version writes the same bits with any BLAS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import safetensors.numpy

from .. import __version__
from ..files.disk import read_json, written_folder
from ..files.tensors import TensorFile
from ..report import CannotRun, Diagnosis, Outcome, Report, links
from ..texts import enumerated, reading
from .checking.claims import adam_verdict, diagnosed
from .checking.comparing import Answered, flagged, judge_numbers
from .checking.kindreport import ANSWERED, KindReport, id_of, outcome
from .problems.bugs import BUGS, Bug, bugs_of
from .problems.formulas import adam_problem, run_adam
from .problems.kind import FACTORS
from .problems.kinds import KINDS
from .problems.problem import Arrays, Problem
from .problems.tolerance import TOLERANCE, UNIT, Trial, drawn

VECTORS_INDEX = "index.json"
DTYPES = ("float64", "float32", "float16", "bfloat16")
SMALL_PROBLEM = 2048
"""The most weights of a problem that is also written in half precision: large problems take up most of the bytes."""
ANSWER_NAMES = {"y": "y", "dx": "x", "dA": "lora_A", "dB": "lora_B", "dm": "magnitude", "merged": "merged"}
"""The answers: from their names in a file to their names in a report."""
GRADIENTS = {"dx", "dA", "dB", "dm"}
ADAM_TOLERANCE = {"float64": 1e-9, "float32": 2e-6}
INDEX_TEXT = Path(__file__).with_suffix(".txt")
"""The text that describes the files in the index, one entry per line."""


class SequentialSum(np.ndarray):
    """A matrix that adds its terms one by one, first to last, so that products have the same bits with any BLAS."""

    def __matmul__(self, other: Any) -> Any:
        left, right = np.asarray(self), np.asarray(other)
        total = np.zeros((len(left), right.shape[1]))
        for k in range(len(right)):
            total += left[:, k, None] * right[k]
        return total.view(SequentialSum)

    def sum(self, axis: int, keepdims: bool = False, **_: Any) -> Any:  # type: ignore[override]
        """Return the sums along one axis."""
        total = np.take(np.cumsum(np.asarray(self), axis=axis), -1, axis=axis)
        return (np.expand_dims(total, axis) if keepdims else total).view(SequentialSum)


@dataclass(frozen=True)
class Vector:
    """A problem of a kind in one precision: one file of the folder."""

    kind: str
    number: int
    dtype: str

    @property
    def problem(self) -> Problem:
        """The problem, before it is rounded to a precision."""
        return KINDS[self.kind].problems[self.number]

    @property
    def sizes(self) -> str:
        """The sizes of the problem in words."""
        return str(self.problem)

    @property
    def file(self) -> str:
        """The name of the file; the prefix keeps programs that read ``KIND-*`` from meeting half precision."""
        half = "half-" if self.dtype in DTYPES[2:] else ""
        return f"{half}{self.kind}-{self.number}-{self.dtype}.safetensors"

    def trial(self) -> Trial:
        """Return the problem, rounded to its precision, with the right answers."""
        return drawn(self.problem, self.dtype, KINDS[self.kind].formulas)

    def tensors(self) -> Arrays:
        """Return the contents of the file."""
        trial = Trial.draw(self.problem, self.dtype, KINDS[self.kind].formulas, SequentialSum)
        problem, options = trial.problem, trial.problem.options
        arrays: Arrays = {}
        for name, array in trial.arrays.items():
            arrays |= problem.to_file(name, name, array)
        arrays["alpha"] = np.array(problem.alphas)
        arrays |= {name: np.atleast_1d(np.array(options[name], np.int64)) for name in options if name not in arrays}
        for prefix, answers in (("", trial.right), ("size.", trial.sizes)):
            for of, name in names_of(trial).items():
                arrays |= problem.to_file(of, prefix + name, answers[of])
        return arrays

    def flags(self) -> list[str]:
        """Return the flags of the bugs that the vector catches: those whose numbers differ from the right ones."""
        trial = self.trial()

        def shows(bug: Bug) -> bool:
            parts = bug.replaced_in(trial.problem)
            wrong = trial.answer(**parts) if parts else {}
            return any(not trial.agrees(name, wrong[name]) for name in bug.shows or wrong if name in wrong)

        return [bug.flag for bug in bugs_of(self.kind) if shows(bug)]


@dataclass(frozen=True)
class AdamVector:
    """Ten steps of Adam, in one precision."""

    dtype: str
    kind: ClassVar = "adam"
    sizes: ClassVar = (
        "ten steps, lr 1e-3, betas 0.9 and 0.999, eps 1e-8: begin_A, begin_B, grads_A, grads_B -> end_A, end_B"
    )

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"adam-{self.dtype}.safetensors"

    def tensors(self) -> Arrays:
        """Return the parameters before the first step, the gradients, and the parameters after the last step."""
        begin, steps = adam_problem()
        begin = {name: p.astype(self.dtype) for name, p in begin.items()}
        steps = [{name: g.astype(self.dtype) for name, g in grads.items()} for grads in steps]
        end = run_adam({name: p.astype(np.float64) for name, p in begin.items()}, steps)
        grads = {name: np.array([grads[name] for grads in steps]) for name in begin}
        stages = {"begin": begin, "grads": grads, "end": end}
        return {f"{stage}_{name[-1]}": array for stage, arrays in stages.items() for name, array in arrays.items()}

    def flags(self) -> list[str]:
        """Return the flags of all bugs of Adam; the vector catches each of them."""
        return [bug.flag for bug in bugs_of("adam", ("adam",))]


def names_of(trial: Trial) -> dict[str, str]:
    """Return the names of a problem's answers in a file, keyed by their names in a report."""
    return {of: name for name, of in ANSWER_NAMES.items() if of in trial.right}


VECTORS: tuple[Vector | AdamVector, ...] = (
    *(
        Vector(kind.name, number, dtype)
        for kind in KINDS.values()
        if kind.in_files
        for number, problem in enumerate(kind.problems)
        for dtype in (DTYPES if DTYPES[0] in kind.dtypes else kind.dtypes[:1])
        if dtype in DTYPES[:2] or problem.in_features * problem.out_features <= SMALL_PROBLEM
    ),
    *map(AdamVector, DTYPES[:2]),
)
BY_FILE = {vector.file: vector for vector in VECTORS}
STARTER = [BY_FILE[f"linear-{number}-{dtype}.safetensors"] for number in range(7) for dtype in DTYPES[:2]]
"""A small set to start with: linear layers, which catch all but three of the bugs that a linear layer can have."""


# --- the index ------------------------------------------------------------------------------------


def _index(vectors: Sequence[Vector | AdamVector]) -> dict[str, Any]:
    """Return the contents of ``index.json``."""
    cases = [
        {name: getattr(vector, name) for name in ("file", "kind", "dtype", "sizes")} | {"flags": vector.flags()}
        for vector in vectors
    ]
    # No vector catches a wrong initialisation, or a gradient that is not returned.
    flags = {flag for case in cases for flag in case["flags"]}
    notes = {b.flag: {"bug": b.says, "breaks": b.breaks, "made in": links(b.source)} for b in BUGS if b.flag in flags}
    return {
        "minilora": __version__,
        "how": INDEX_TEXT.read_text("utf-8").splitlines(),
        "tolerance": {dtype: TOLERANCE * UNIT[dtype] for dtype in DTYPES},
        "tolerance of adam, without a size": ADAM_TOLERANCE,
        "cases": cases,
        "flags": notes,
    }


def _json(value: Any, depth: int = 2) -> str:
    """Return JSON with one line for each entry down to a depth; deeper entries share that line."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return json.dumps(value)
    pad = " " * (3 - depth)
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + _json(reply, depth - 1) for reply in value) + "\n" + pad[1:] + "]"
    lines = [f"{pad}{json.dumps(key)}: {_json(reply, depth - 1)}" for key, reply in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + pad[1:] + "}" + "\n" * (depth == 2)


# --- to and from a folder -------------------------------------------------------------------------


def write(folder: Path, vectors: Sequence[Vector | AdamVector] = VECTORS) -> int:
    """Write vectors into a new folder, and return their number.

    Raises
    ------
    ValueError
        If the folder already exists.
    """
    if os.path.lexists(folder):
        raise ValueError(f"{str(folder)!r} already exists, expected the name of a new folder")
    with written_folder(folder) as new:
        for vector in vectors:
            arrays = {name: np.ascontiguousarray(array) for name, array in vector.tensors().items()}
            safetensors.numpy.save_file(arrays, new / vector.file)
        (new / VECTORS_INDEX).write_bytes(_json(_index(vectors)).encode())
    return len(vectors)


class VectorFile(msgspec.Struct):
    """The part of a case's entry in the index that a comparison needs."""

    file: str


class VectorIndex(msgspec.Struct):
    """The part of the index that a comparison needs."""

    cases: list[VectorFile]
    tolerance: dict[str, float]
    of_adam: dict[str, float] = msgspec.field(name="tolerance of adam, without a size")


def compare(folder: Path, results: Path) -> VectorsReport:
    """Compare a program's results with the answers in a folder, in each precision as `check` does.

    Problems, answers, sizes and tolerances are read from the folder. The answers of the known bugs are computed from
    the folder's problems, so folders written by earlier versions can be judged too.

    Raises
    ------
    CannotRun
        If the folder has a problem that this version does not know, if `results` is the folder itself, or if `results`
        has no file with answers.
    FileRefused
        If a file is malformed.
    """
    index = read_json(folder / VECTORS_INDEX, VectorIndex)
    files = [case.file for case in index.cases]
    if results.resolve() == folder.resolve():
        raise CannotRun(f"{str(results)!r} is the folder of the vectors, expected a folder with a program's answers")
    answered = [file for file in files if (results / file).exists()]
    if not answered:
        raise CannotRun(f"{str(results)!r} has no file of answers, expected names such as {(*files, *BY_FILE)[0]!r}")
    if unknown := [file for file in answered if file not in BY_FILE]:
        which = repr(str(folder / unknown[0]))
        raise CannotRun(f"{which} is not a case of minilora {__version__}: compare with the version that wrote it")
    vectors = [BY_FILE[file] for file in files if file in BY_FILE]
    dtypes = {BY_FILE[file].dtype for file in answered}
    return _combined(results, [_report_in(name, vectors, index, folder, results) for name in DTYPES if name in dtypes])


@dataclass(repr=False)
class VectorsReport(Report):
    """The results of a comparison in all precisions."""

    precisions: list[KindReport] = field(default_factory=list)

    def own_lines(self, *, all: bool) -> list[str]:
        """Return the claims that do not hold, kind by kind, in each precision."""
        lines: list[str] = []
        for report in self.precisions:
            known = {id.removeprefix(f"{report.dtype}/") for id in self.known}
            lines += [line for one in (report, *report.kinds.values()) for line in one.block(known, all)]
        return lines


def _combined(results: Path, reports: Sequence[KindReport]) -> VectorsReport:
    """Return one report that combines those of each precision; the ids of its cases begin with the precision."""
    precisions = [report.as_dict() | {"failing": [case.id for case in report.failing]} for report in reports]
    whole = VectorsReport(str(results), "vectors", details={"precisions": precisions}, precisions=list(reports))
    cases: list[Outcome] = []
    said: dict[str, list[tuple[str, Diagnosis]]] = {}
    for report in reports:
        cases += [replace(case, id=f"{report.dtype}/{case.id}") for case in report.every_case()]
        for diagnosis in report.every_diagnosis():
            said.setdefault(diagnosis.says, []).append((report.dtype, diagnosis))
    for says, of in said.items():
        where = "" if len(of) == len(reports) else f"{enumerated([dtype for dtype, _ in of])}: "
        ids = tuple(f"{dtype}/{id}" for dtype, diagnosis in of for id in diagnosis.cases)
        whole.found.append(replace(of[0][1], says=f"{where}{says}", cases=ids))
    whole.cases = cases
    return whole


def _report_in(
    dtype: str, vectors: Sequence[Vector | AdamVector], index: VectorIndex, folder: Path, results: Path
) -> KindReport:
    """Return the report on the answers in one precision."""
    kinds: dict[str, list[Any]] = {}
    for vector in vectors:
        if vector.dtype == dtype:
            kinds.setdefault(vector.kind, []).append(vector)
    whole = KindReport(str(results), dtype=dtype)
    for kind, of in kinds.items():
        answered = [vector for vector in of if (results / vector.file).exists()]
        if answered and kind == AdamVector.kind:
            _judge_adam(whole, folder / answered[0].file, results / answered[0].file, index.of_adam[dtype])
        elif answered:
            report = whole if kind == whole.kind else KindReport(f"{results}, {kind}", kind=kind, dtype=dtype)
            _judge_kind(report, answered, len(of), folder, results, index.tolerance[dtype])
            whole.kinds |= {kind: report} if report is not whole else {}
    return whole


def _trial_in(path: Path, vector: Vector, tolerance: float) -> Trial:
    """Return a problem with the arrays, right answers and sizes from its file in a folder."""
    trial, numbers = vector.trial(), _read(path)
    names = names_of(trial)
    arrays = _collect(trial.problem, {name: name for name in trial.arrays}, numbers)
    right = _collect(trial.problem, names, numbers)
    sizes = _collect(trial.problem, {of: f"size.{name}" for of, name in names.items()}, numbers)
    for own, found in ((trial.arrays, arrays), (trial.right, right), (trial.sizes, sizes)):
        if {name: a.shape for name, a in own.items()} != {name: a.shape for name, a in found.items()}:
            raise CannotRun(f"{str(path)!r} does not contain the problem that it is named after, {vector.problem}")
    return replace(trial, arrays=arrays, right=right, sizes=sizes, unit=tolerance / TOLERANCE)


def _reply_in(file: TensorFile, trial: Trial) -> Arrays:
    """Return a program's answers to a problem."""
    numbers = {name: file.read(name) for name in file.tensors if name.partition(".")[0] in ANSWER_NAMES}
    try:
        reply = _collect(trial.problem, names_of(trial), numbers)
    except ValueError as error:
        raise CannotRun(f"{str(file.path)!r} has {error}") from None
    if not reply:
        raise CannotRun(
            f"{str(file.path)!r} has {', '.join(file.tensors) or 'no tensor'}, expected {', '.join(ANSWER_NAMES)}"
        )
    return reply


def _collect(problem: Problem, names: Mapping[str, str], numbers: Arrays) -> Arrays:
    """Return those of the named arrays that a file has, with the arrays of several slots joined into one."""
    found = {own: problem.from_file(own, name, numbers) for own, name in names.items()}
    return {own: array for own, array in found.items() if array is not None}


def _read(path: Path) -> Arrays:
    with reading(path):
        return safetensors.numpy.load_file(path)


def _judge_kind(
    report: KindReport, answered: Sequence[Vector], count: int, folder: Path, results: Path, tolerance: float
) -> None:
    """Judge the answers to a kind's problems; the folder has `count` of them."""
    trials = [_trial_in(folder / vector.file, vector, tolerance) for vector in answered]
    files = [TensorFile(results / vector.file) for vector in answered]
    replies = [_reply_in(file, trial) for file, trial in zip(files, trials, strict=True)]
    written = {name.partition(".")[0] for file in files for name in file.tensors}  # without slot numbers
    has_gradients = not written.isdisjoint(GRADIENTS)

    def lacking(missing: Sequence[str]) -> str:
        names = [name for name, of in ANSWER_NAMES.items() if of in missing]
        return f"no file has {enumerated(names)}, found {', '.join(sorted(written))}"

    owed = [key for key in FACTORS if has_gradients and not any(key in reply for reply in replies)]
    given = [reply | dict.fromkeys(key for key in owed if key in trial.right)
             for trial, reply in zip(trials, replies, strict=True)]  # fmt: skip
    names = [f"{report.kind}-{vector.number}" for vector in answered]
    judged = judge_numbers(Answered(KINDS[report.kind], names, trials, given, lacking))
    report.cases, report.found = flagged(judged.cases, judged.found), judged.found
    report.claims, report.errors = judged.claims, judged.errors
    report.habits[ANSWERED] = f"{len(answered)} of {count}"
    for name, of in ANSWER_NAMES.items():
        owing = [reply for trial, reply in zip(trials, replies, strict=True) if of in trial.right]
        if 0 < (there := sum(of in reply for reply in owing)) < len(owing):
            report.habits[ANSWERED] += f", {name} in {there}"


def _judge_adam(report: KindReport, asked: Path, answered: Path, tolerance: float) -> None:
    """Judge the parameters after a program's ten steps of Adam."""
    given, file = _read(asked), TensorFile(answered)
    missing = [name for name in ("end_A", "end_B") if name not in file.tensors]
    if missing:
        verdict = Diagnosis(f"{answered.name} has no {missing[0]}")
    else:
        begin = {"lora_A": given["begin_A"], "lora_B": given["begin_B"]}
        steps = [{"lora_A": A, "lora_B": B} for A, B in zip(given["grads_A"], given["grads_B"], strict=True)]
        ends = {"lora_A": file.read("end_A"), "lora_B": file.read("end_B")}
        verdict = diagnosed(adam_verdict(begin, steps, ends, tolerance))
    case = outcome(id_of("linear", "adam"), "adam", "", str(verdict))
    report.claims["adam"] = str(verdict)
    found = [replace(verdict, cases=(case.id,))] if case.failed else []
    report.cases += flagged([case], found)
    report.found += found
