"""Problems and answers as files, for implementations in any language: `write`, and `compare` for what they answered.

A folder of vectors has one safetensors file for each case, and ``index.json``, which says what is in them. A case is a
problem of the suite in one precision. Its file has

    the problem    x, dy, weight, bias or not, lora_A, lora_B, for DoRA magnitude, for dropout mask; alpha; for a
                   convolution stride, padding, dilation and groups; of a layer in NF4, in the place of weight, packed
                   and absmax, and where the scales are quantised too nested_absmax and mean; of fused slots widths,
                   an alpha for each, and lora_A.0, lora_B.0 and so on, by the slot's number; of experts
                   expert_ids
    the answers    y, dx, dA, dB, for DoRA dm, and merged: in float64, of the problem's numbers as they stand
    their sizes    size.y, size.dx, ...: an answer is right where it is off by no more than tolerance times size

A foreign program reads a problem and writes its answers into a file of the same name in another folder, under the same
names. It may leave out files, and answers. A case's flags are the known bugs that it catches: there, a bug's numbers
differ from the right ones.

The answers are summed in one order, first to last, so one version writes the same bits whatever BLAS there is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .bugs.diagnoses import listed
from .checking.behaviour import adam_verdict
from .checking.comparing import judge_numbers, outcomes_of, placed
from .checking.contract import FACTORS
from .checking.kindreport import KindReport, id_of, outcome
from .problems.bugs import BUGS, Bug, bugs_of, links
from .problems.formulas import adam_follows, adam_problem
from .problems.kinds import SETS
from .problems.problem import Arrays, Problem
from .problems.several import Fused
from .problems.tolerance import TOLERANCE, UNIT, Trial, drawn
from .report import CannotRun, Diagnosis, Outcome, Report

DTYPES = ("float64", "float32", "float16", "bfloat16")
OF_ADAM = DTYPES[:2]
SMALL = 2048
"""Weights of a problem that is written in half precision too: the large ones are most of the bytes."""
OF_KIND = {"nf4": ("float32",), "mixed": ("float32",)}
"""The precisions of some kinds: where a weight is a product that is taken in float32, and where the factors are."""
NAMES = {"y": "y", "dx": "x", "dA": "lora_A", "dB": "lora_B", "dm": "magnitude", "merged": "merged"}
"""The answers in a file, and in a report."""
GRADIENTS = {"dx", "dA", "dB", "dm"}
ADAM_TOLERANCE = {"float64": 1e-9, "float32": 2e-6}
HOW = (
    "Each case is a safetensors file: a problem, its answers, and their sizes.",
    "x, dy, weight, bias, lora_A, lora_B, magnitude, mask and alpha are the problem; without a bias there is no tensor"
    " bias. In the adapter's path alone, x is multiplied with mask.",
    "Of the kind nf4, packed and absmax stand for the weight, in blocks of 64; where there are nested_absmax, in blocks"
    " of 256, and mean, absmax are codes too. Products are taken in float32.",
    "y is the output; dx, dA, dB and dm are the gradients at x, lora_A, lora_B and magnitude for the gradient dy at y;"
    " merged is the weight with the update folded in.",
    "An answer is right where |found - answer| <= tolerance * size, with the tolerance of the case's dtype.",
    "Of the kind fused, the outputs are slots of these widths. lora_A.0, lora_B.0, dA.0 and dB.0 are the first slot's,"
    " and alpha has an entry for each slot; a slot without lora_A has no adapter.",
    "Of the kind experts, weight is (E, out, in) and expert_ids has the expert of each row. Expert e has the rows"
    " e r ... e r + r - 1 of lora_A (E r, in), and of lora_B (out, r E) the columns e, E + e, 2 E + e, ...; alpha is"
    " divided by r. An expert without a row has gradients of zero.",
    "Numbers of bfloat16 lie in the files as float32, which holds them exactly: most readers have no bfloat16.",
    "Of the kind mixed, x, dy, weight and bias are numbers of bfloat16, lora_A and lora_B of float32; what of an answer"
    " may be rounded to bfloat16 is in its size.",
    "An answer may lie in float64, float32, float16 or bfloat16.",
    "Write your answers under the same names into a file of the same name in a folder of your own. Leave out what you"
    " do not have. `minilora vectors THIS --compare YOURS` says what is wrong.",
    "A case's flags are the known bugs that it catches.",
)


@dataclass(frozen=True)
class Vector:
    """A problem of a kind, in one precision: one file of the folder."""

    kind: str
    number: int
    dtype: str

    @property
    def problem(self) -> Problem:
        """The problem, without a precision."""
        return SETS[self.kind].problems[self.number]

    @property
    def file(self) -> str:
        """The name of its file: a program that reads ``KIND-*``, and no half precision, goes on doing so."""
        half = "half-" if self.dtype in DTYPES[2:] else ""
        return f"{half}{self.kind}-{self.number}-{self.dtype}.safetensors"

    def trial(self) -> Trial:
        """Return the problem in its precision, with the answers."""
        return drawn(self.problem, self.dtype, SETS[self.kind].formulas)


VECTORS = tuple(
    Vector(kind, number, dtype)
    for kind in SETS
    if kind != "combine"  # whose singular vectors have other bits with another BLAS
    for number, problem in enumerate(SETS[kind].problems)
    for dtype in OF_KIND.get(kind, DTYPES)
    if dtype in DTYPES[:2] or problem.in_features * problem.out_features <= SMALL
)


class OneOrder(np.ndarray):
    """A matrix that adds one term after another, first to last, and so has the same bits whatever BLAS there is."""

    def __matmul__(self, other: Any) -> Any:
        left, right = np.asarray(self), np.asarray(other)
        total = np.zeros((len(left), right.shape[1]))
        for k in range(len(right)):
            total += left[:, k, None] * right[k]
        return total.view(OneOrder)

    def sum(self, axis: int, keepdims: bool = False, **_: Any) -> Any:  # type: ignore[override]
        """Return sums along one axis."""
        total = np.take(np.cumsum(np.asarray(self), axis=axis), -1, axis=axis)
        return (np.expand_dims(total, axis) if keepdims else total).view(OneOrder)


def tensors(vector: Vector) -> Arrays:
    """Return all that stands in a vector's file."""
    trial = Trial.draw(vector.problem, vector.dtype, SETS[vector.kind].formulas, OneOrder)
    problem, right = trial.problem, trial.right
    options = {name: value for name, value in problem.options.items() if name not in trial.arrays}
    arrays: Arrays = {}
    for name, array in trial.arrays.items():
        arrays |= named(problem, name, name, array)
    arrays["alpha"] = np.array(problem.alphas if isinstance(problem, Fused) else [problem.alpha])
    arrays |= {name: np.atleast_1d(np.array(value, np.int64)) for name, value in options.items()}
    for prefix, answers in (("", right), ("size.", trial.sizes)):
        for name, of in NAMES.items():
            arrays |= named(problem, of, prefix + name, answers[of]) if of in answers else {}
    return arrays


def named(problem: Problem, name: str, as_name: str, array: np.ndarray) -> Arrays:
    """Return an array as it stands in a file: a name for each slot's own, where there are slots."""
    return problem.named(name, as_name, array) if isinstance(problem, Fused) else {as_name: array}


def adam_tensors(dtype: str) -> Arrays:
    """Return ten steps of Adam: where they begin, the gradients, and where they end."""
    begin, steps = adam_problem()
    begin, steps = _rounded(begin, dtype), [_rounded(grads, dtype) for grads in steps]
    exact = adam_follows({k: p.astype(np.float64) for k, p in begin.items()}, steps)
    letters = {"lora_A": "A", "lora_B": "B"}
    return {
        **{f"begin_{letters[name]}": p for name, p in begin.items()},
        **{f"grads_{letters[name]}": np.array([grads[name] for grads in steps]) for name in begin},
        **{f"end_{letters[name]}": p for name, p in exact.items()},
    }


def _rounded(arrays: Arrays, dtype: str) -> Arrays:
    return {name: array.astype(dtype) for name, array in arrays.items()}


# --- the index ------------------------------------------------------------------------------------


def caught(bug: Bug, trial: Trial) -> bool:
    """Return whether a bug shows in a case: whether its numbers differ from the right ones."""
    parts = bug.of(trial.problem)
    if not parts:
        return False
    wrong = trial.answer(**parts)
    return any(not trial.agrees(name, wrong[name]) for name in bug.shows or wrong if name in wrong)


@lru_cache(maxsize=len(VECTORS))
def flags_of(kind: str, number: int, dtype: str = DTYPES[0]) -> tuple[str, ...]:
    """Return the flags of the bugs that show in a problem."""
    trial = Vector(kind, number, dtype).trial()
    return tuple(bug.flag for bug in bugs_of(kind) if caught(bug, trial))


def seen_in(vector: Vector) -> str:
    """Return the precision in which it is judged whether a bug shows: in single precision the same do as in double."""
    return vector.dtype if vector.dtype in DTYPES[2:] or vector.kind == "mixed" else DTYPES[0]


def index() -> dict[str, Any]:
    """Return what ``index.json`` holds."""
    cases: list[dict[str, Any]] = []
    for vector in VECTORS:
        entry = {"file": vector.file, "kind": vector.kind, "dtype": vector.dtype, "sizes": str(vector.problem)}
        cases.append(entry | {"flags": list(flags_of(vector.kind, vector.number, seen_in(vector)))})
    for dtype in OF_ADAM:
        sizes = "ten steps, lr 1e-3, betas 0.9 and 0.999, eps 1e-8: begin_A, begin_B, grads_A, grads_B -> end_A, end_B"
        of_adam = [bug.flag for bug in bugs_of("adam", ("adam",))]
        cases.append({"file": adam_file(dtype), "kind": "adam", "dtype": dtype, "sizes": sizes, "flags": of_adam})
    # Of a start, and of a gradient that is not returned, no vector says anything.
    answered = {flag for case in cases for flag in case["flags"]}
    notes = {
        b.flag: {"bug": b.says, "breaks": b.breaks, "made in": links(b.source)} for b in BUGS if b.flag in answered
    }
    return {
        "minilora": __version__,
        "how": list(HOW),
        "tolerance": {dtype: TOLERANCE * UNIT[dtype] for dtype in DTYPES},
        "tolerance of adam, without a size": ADAM_TOLERANCE,
        "cases": cases,
        "flags": notes,
    }


def _json(value: Any, depth: int = 2) -> str:
    """Return JSON with a line for each thing down to a depth, and what is deeper on that line."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return json.dumps(value)
    pad = " " * (3 - depth)
    if isinstance(value, list):
        return "[\n" + ",\n".join(pad + _json(reply, depth - 1) for reply in value) + "\n" + pad[1:] + "]"
    lines = [f"{pad}{json.dumps(key)}: {_json(reply, depth - 1)}" for key, reply in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + pad[1:] + "}" + "\n" * (depth == 2)


def adam_file(dtype: str) -> str:
    """Return the name of Adam's case."""
    return f"adam-{dtype}.safetensors"


# --- to and from a folder -------------------------------------------------------------------------


def write(folder: Path) -> int:
    """Write the vectors into a new folder, and return how many cases there are.

    Raises
    ------
    ValueError
        If the folder is there already.
    """
    from safetensors.numpy import save  # a compiled package, which the rest of the suite does without

    from ..files.disk import written_folder

    if folder.exists():
        raise ValueError(f"{str(folder)!r} is there already, expected the name of a new folder")
    files = {vector.file: tensors(vector) for vector in VECTORS} | {
        adam_file(dtype): adam_tensors(dtype) for dtype in OF_ADAM
    }
    with written_folder(folder) as new:
        for name, arrays in files.items():
            (new / name).write_bytes(save({key: np.ascontiguousarray(array) for key, array in arrays.items()}))
        (new / "index.json").write_text(_json(index()), encoding="utf-8")
    return len(files)


def compare(folder: Path, results: Path) -> list[KindReport]:
    """Hold what a foreign program wrote against the answers: a report for each precision, as `check` gives one.

    Parameters
    ----------
    folder : Path
        The vectors, as this version wrote them.
    results : Path
        The folder with the program's files.

    Raises
    ------
    CannotRun
        If the vectors are of another version, or are the results themselves, or no file answers one of them.
    FileRefused
        If a file is not sound.
    """
    from ..files.disk import read_json

    version = read_json(folder / "index.json").get("minilora")
    if version != __version__:
        raise CannotRun(f"{str(folder)!r} was written by minilora {version}, this is {__version__}: write it again")
    if not results.is_dir():
        raise CannotRun(f"{str(results)!r} is no folder, expected that of a program's answers")
    if results.resolve() == folder.resolve():
        raise CannotRun(f"{str(results)!r} has the vectors, expected a folder with what a program answered to them")
    reports = [report for dtype in DTYPES for report in _compare_in(results, dtype)]
    if not reports:
        raise CannotRun(f"{str(results)!r} has no file of answers, expected names such as {VECTORS[0].file!r}")
    return reports


def in_one(results: Path, reports: Sequence[KindReport]) -> Report:
    """Return one report of those of each precision, in which a case's id begins with the precision."""
    precisions = [report.as_dict() | {"failing": [case.id for case in report.failing]} for report in reports]
    whole = Report(str(results), "vectors", details={"precisions": precisions})
    cases: list[Outcome] = []
    said: dict[str, dict[str, Diagnosis]] = {}
    for report in reports:
        cases += [replace(case, id=f"{report.dtype}/{case.id}") for case in report.every_case()]
        for diagnosis in report.every_diagnosis():
            ids = tuple(f"{report.dtype}/{id}" for id in diagnosis.cases)
            said.setdefault(diagnosis.says, {})[report.dtype] = replace(diagnosis, cases=ids)
        whole.lines += [f"{report.dtype}:", *(f"  {line}" for line in report.own_lines(all=False))]
        whole.rows += [f"{report.dtype}:", *(f"  {line}" for line in report.own_lines(all=True))]
    for says, of in said.items():
        where = "" if len(of) == len(reports) else f"{listed(list(of))}: "
        ids = tuple(id for diagnosis in of.values() for id in diagnosis.cases)
        whole.found.append(replace(next(iter(of.values())), says=f"{where}{says}", cases=ids))
    whole.cases = cases
    return whole


def _compare_in(results: Path, dtype: str) -> Iterator[KindReport]:
    """Yield a report of one precision, where there are answers in it."""
    whole = KindReport(str(results), dtype=dtype)
    for kind in SETS:
        report = _compare_kind(results, kind, dtype)
        if report is None:
            continue
        if kind == "linear":
            report.name, report.parts = whole.name, whole.parts
            whole = report
        else:
            whole.kinds[kind] = report
    if dtype in OF_ADAM and (results / adam_file(dtype)).exists():
        arrays, _ = _read(results / adam_file(dtype), ("end_A", "end_B"))
        begin, steps = adam_problem()
        begin, steps = _rounded(begin, dtype), [_rounded(grads, dtype) for grads in steps]
        missing = [name for name in ("end_A", "end_B") if name not in arrays]
        ends = {"lora_A": arrays.get("end_A"), "lora_B": arrays.get("end_B")}
        verdict = f"{adam_file(dtype)} has no {missing[0]}" if missing else ""
        whole.claims["adam"] = verdict or adam_verdict(begin, steps, ends, ADAM_TOLERANCE[dtype])
        case = outcome(id_of("linear", "adam"), "adam", "", whole.claims["adam"])
        whole.found += [Diagnosis(case.text, cases=(case.id,))] if case.failed else []
        whole.cases.append(case)
    if whole.claims or whole.kinds:
        yield whole


def _compare_kind(results: Path, kind: str, dtype: str) -> KindReport | None:
    """Judge the answers to all vectors of a kind, where there are any."""
    vectors = [vector for vector in VECTORS if (vector.kind, vector.dtype) == (kind, dtype)]
    answered = [vector for vector in vectors if (results / vector.file).exists()]
    if not answered:
        return None
    trials = [vector.trial() for vector in answered]
    read = [_read(results / vector.file, _names(trial)) for vector, trial in zip(answered, trials, strict=True)]
    answers = [_answers(results / vector.file, trial.problem, arrays)
               for vector, trial, (arrays, _) in zip(answered, trials, read, strict=True)]  # fmt: skip
    written = {name.partition(".")[0] for _, names in read for name in names}
    report = KindReport(f"{results}, {kind}", kind=kind, dtype=dtype)
    factors = judge_numbers(report, kind, trials, answers, _lacking(written) if written & GRADIENTS else None)
    owed = [key for key in FACTORS if written & GRADIENTS and not any(key in reply for reply in answers)]
    for vector, trial, reply in zip(answered, trials, answers, strict=True):
        report.cases += outcomes_of(kind, vector.number, trial, reply, factors, owed)
    report.cases = [replace(case, text=_as_in_files(case.text)) for case in report.cases]
    report.claims = {claim: _as_in_files(verdict) for claim, verdict in report.claims.items()}
    report.found = [replace(diagnosis, says=_as_in_files(diagnosis.says)) for diagnosis in report.found]
    report.habits = {"cases answered": f"{len(answered)} of {len(vectors)}{_fewer(trials, answers)}"}
    return placed(report)


def _names(trial: Trial) -> tuple[str, ...]:
    """Return the names that the answers to a problem have in a file."""
    if not isinstance(trial.problem, Fused):
        return tuple(NAMES)
    return tuple(key for name, of in NAMES.items() if of in trial.right
                 for key in trial.problem.named(of, name, trial.right[of]))  # fmt: skip


def _answers(path: Path, problem: Problem, arrays: Arrays) -> Arrays:
    """Return a file's answers under the names of a report, the slots' of each in one array."""
    answers = {NAMES[name]: array for name, array in arrays.items() if name in NAMES}
    if not isinstance(problem, Fused):
        return answers
    for name, of in NAMES.items():
        parts = {key: array for key, array in arrays.items() if key.startswith(f"{name}.")}
        if parts:
            try:
                answers[of] = problem.joined(of, [parts.get(f"{name}.{i}") for i in range(len(problem.widths))])
            except ValueError as error:
                raise CannotRun(f"{str(path)!r} has {error}") from None
    return answers


def _as_in_files(text: str) -> str:
    """Put the name that a wrong gradient has in a file before what is said of its numbers."""
    for name in ("dA", "dB", "dm"):
        said = f"{NAMES[name]}'s gradient(,| is off by| has shape| is transposed| is not finite)"
        text = re.sub(rf"(^|; )({said})", rf"\1{name}: \2", text)
    return text


def _lacking(written: set[str]) -> Callable[[Sequence[str]], str]:
    """Return what is said of gradients that no file has, by the names that stand in files."""
    names = {of: name for name, of in NAMES.items()}
    answered = ", ".join(sorted(written))
    return lambda missing: f"no file has {listed([names[of] for of in missing])}; there are {answered}"


def _fewer(trials: Sequence[Trial], replies: Sequence[Arrays]) -> str:
    """Say which answers are there in some of the files and missing in others."""
    text = ""
    for name, of in NAMES.items():
        owing = [reply for trial, reply in zip(trials, replies, strict=True) if of in trial.right]
        if 0 < (count := sum(of in reply for reply in owing)) < len(owing):
            text += f", {name} in {count}"
    return text


def _read(path: Path, names: tuple[str, ...]) -> tuple[Arrays, list[str]]:
    """Read those of a file's tensors that are answers; and the names of all."""
    from ..files.tensors import TensorFile

    file = TensorFile(path)
    answers = [name for name in file.tensors if name in names]
    if not answers:
        raise CannotRun(f"{str(path)!r} has {', '.join(file.tensors) or 'no tensor'}, expected {', '.join(names)}")
    return {name: file.read(name) for name in answers}, list(file.tensors)
