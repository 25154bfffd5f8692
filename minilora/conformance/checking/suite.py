"""Hold an implementation of LoRA against the formulas: `check`, and what it says.

An implementation is a module or an object with functions on NumPy arrays; only ``forward`` is required::

    forward(x, weight, bias, lora_A, lora_B, alpha) -> y
    backward(dy, x, weight, bias, lora_A, lora_B, alpha) -> {"x": ..., "lora_A": ..., "lora_B": ...}
    merge(weight, lora_A, lora_B, alpha) -> weight
    init(in_features, out_features, rank, rng) -> (lora_A, lora_B)
    step(params, grads, state) -> (params, state)          Adam with lr 1e-3; state is None at first
    merging(weight, bias, lora_A, lora_B, alpha) -> layer  a layer that keeps its state: it has forward(x), merge() and
                                                           unmerge(), after each of which forward gives the same
    kinds = {"conv2d": another such object}                other kinds of layers

    dtype = "float64"            the precision to be checked in: "float64", "float32", "float16" or "bfloat16"; if
                                 nothing is said, float64, or that in which it answers where its output is not right
                                 in float64
    scaling = "alpha / r"        or "alpha / sqrt(r)", "alpha", "1"
    orientation = "out, in"      how its weights lie: "out, in" as in PyTorch, or "in, out": weight (in, out),
                                 lora_A (in, r), lora_B (r, out)
    fan_in_fan_out = False       True where the weight and the merged weight lie (in, out), however the factors do, as
                                 PEFT has it for GPT-2's Conv1D

x is (N, in), weight (out, in), bias (out,) or None, lora_A (r, in), lora_B (out, r). Each function gets all that it
needs: a backward may not count on which forward was called last. The kinds are "rslora", "dora", "embedding",
"conv1d", "conv2d", "dropout", "nf4", "mixed" and "fused". `problems.kinds` has their shapes, and their functions take
more:

- "dora": magnitude (out,) as the last argument of ``forward``, ``backward`` and ``merge``, and its gradient in the
  dict; weight as the last argument of ``init``, which returns the magnitude as well. ``detached_norm`` is True, as in
  PEFT, or False where the gradient passes through the norm.
- "dropout": mask (N, in), of zeros and 1 / (1 - p), as the last argument of ``forward`` and ``backward``. It is
  multiplied with x in the adapter's path alone.
- "embedding": x are ids, bias is None, and there is no dx.
- "conv1d", "conv2d": those of the keywords stride, padding, dilation (a tuple each) and groups that a function has
  among its parameters; without them they are 1, 0, 1 and 1. ``init`` takes the kernel's shape last.
- "nf4": packed and absmax in the place of weight, in blocks of 64; those of the keywords nested_absmax and mean that a
  function names. Beside them ``pack(weight) -> (packed, absmax)`` and ``unpack(packed, absmax, shape) -> weight``.
  Checked in float32.
- "mixed": x, dy, weight and bias are numbers of bfloat16, in arrays of float32; the factors are float32. What is
  computed in bfloat16 comes back in float32. ``output = "float32"`` where the output is not rounded to bfloat16.
- "fused": lora_A, lora_B and alpha are lists with an entry for each slot of the outputs, None where a slot has no
  adapter; the slots' widths, a list, are the last argument of all functions. The gradients of lora_A and lora_B are
  such lists too. ``slots`` is 2 or 3 where there are always so many, ``one_rank`` is True where all slots have one rank
  and alpha, ``one_width`` where all are of one width. There is no ``init``: a slot starts as a linear layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from ...checks import check_choice
from ..bugs.diagnoses import EVERY_ENTRY, describe_unknown, diagnose, left_out, listed, unexplained
from ..bugs.table import Bug
from ..bugs.wrong_arrays import HALVES, pattern
from ..problems.kinds import AGAIN, DECLARED, SETS, Images
from ..problems.mixed import Mixed
from ..problems.problem import Arrays, Problem
from ..problems.reference import QUANTITIES, SCALINGS, TINY, TOLERANCE, UNIT, Formulas, Trial, drawn, round_to
from ..problems.slots import Fused
from . import behaviour as judges
from .calling import Watch, answers, forward, spelled, suited
from .edges import EDGES
from .output_dtype import OUTPUT_DTYPE, OUTPUTS
from .packing import FOUR_BITS
from .report import CANNOT_BE_TOLD, NOT_FAILED, CannotRun, Outcome, Report, id_of

CONTRACT = (
    *("forward", "scaling", "slope", "merge", "merged and back", "start", "adam", "frozen base", "nothing is changed"),
    *EDGES,
)
"""What is checked, in the order of the report; of a layer in four bits `FOUR_BITS` as well."""
FACTORS = ("lora_A", "lora_B", "magnitude")
ANSWERS = {"forward": ("forward", ("y",)), "slope": ("backward", ("x", *FACTORS)), "merge": ("merge", ("merged",))}
"""The function that each claim about numbers is about, and its answers."""
OF_PROBLEMS = ("forward", "scaling", "slope", "merge")
"""The claims that are judged on each problem; the others are about no single one."""
ORIENTATIONS = ("out, in", "in, out")
FUNCTIONS = ("forward", "backward", "merge", "init", "step")
"""What an implementation may offer; for a further kind of layers all but the last."""


def functions_of(kind: str) -> tuple[str, ...]:
    """Return what an implementation may offer for a kind of layers."""
    if kind == "fused":
        return FUNCTIONS[:3]
    further = ("pack", "unpack") if kind == "nf4" else ()
    return FUNCTIONS if kind == "linear" else (*FUNCTIONS[:-1], *further)


FURTHER = {"nf4": FOUR_BITS, "mixed": OUTPUT_DTYPE}
"""The claims that one kind has besides those of all."""


def contract(kind: str) -> tuple[str, ...]:
    """Return what is checked of a kind of layers, in the order of the report."""
    without = ("start", "adam") if kind == "fused" else ()  # each slot starts as a linear layer does
    return (*(claim for claim in CONTRACT if claim not in without), *FURTHER.get(kind, ()))


def check(implementation: Any, *, dtype: str | None = None, name: str | None = None) -> Report:
    """Hold an implementation of LoRA against the formulas.

    Parameters
    ----------
    implementation : module or object
        With the functions that the module's page lists. What it lacks is not offered, and never failed.
    dtype : {"float64", "float32", "float16", "bfloat16"}, optional
        The precision; by default the implementation's own ``dtype``. Where it has none, float64, or the precision in
        which it answers to float64 where its output is not right in float64.
    name : str, optional
        For the report.

    Returns
    -------
    Report
        Claims, habits and diagnoses.

    Raises
    ------
    CannotRun
        If it has no ``forward``, or declares a precision, an orientation, a scaling or a kind that is not known.
    """
    title = str(name or getattr(implementation, "__name__", type(implementation).__name__))
    kinds = _further_kinds(implementation, title)
    report = _check_kind(implementation, title, dtype, "linear")
    for kind, other in kinds.items():
        report.kinds[kind] = _check_kind(other, f"{title}, {kind}", dtype, kind)
    return report


def _further_kinds(implementation: Any, title: str) -> Mapping[str, Any]:
    kinds = getattr(implementation, "kinds", {})
    if not isinstance(kinds, Mapping):
        raise CannotRun(f"kinds of {title} must be a dict of objects, got {type(kinds).__name__}")
    if unknown := [kind for kind in kinds if kind not in DECLARED]:
        raise CannotRun(f"{title} has the kind {unknown[0]!r}; known are {', '.join(DECLARED)}")
    return kinds


def formulas_of(kind: str, implementation: Any) -> Formulas:
    """Return what a kind of problems should give, by the scaling that an implementation declares."""
    formulas = SETS[kind].formulas
    if hasattr(implementation, "scaling"):
        return replace(formulas, scaling=SCALINGS[spelled(implementation.scaling, tuple(SCALINGS))])
    return formulas


def _check_kind(implementation: Any, name: str, dtype: str | None, kind: str) -> Report:
    """Check one object with functions for one kind of layer."""
    if not callable(getattr(implementation, "forward", None)):
        raise CannotRun(f"{name} has no function forward(x, weight, bias, lora_A, lora_B, alpha)")
    if isinstance(implementation, type) and _takes_self(getattr(implementation, "forward")):  # noqa: B009
        raise CannotRun(f"{name} is a class, hand over an object: {implementation.__name__}(...)")
    wanted = spelled(dtype or getattr(implementation, "dtype", None), tuple(UNIT))
    if kind == "mixed" or (kind == "nf4" and wanted in (None, "float64")):
        wanted = "float32"  # that of the factors; of a weight in four bits, in which a product is taken
    declared = {
        "dtype": (wanted or "float64", tuple(UNIT)),
        "orientation": (getattr(implementation, "orientation", "out, in"), ORIENTATIONS),
        "scaling": (getattr(implementation, "scaling", "alpha / r"), tuple(SCALINGS)),
        "output": (getattr(implementation, "output", "bfloat16") if kind == "mixed" else "bfloat16", OUTPUTS),
    }
    for what, (value, choices) in declared.items():
        try:
            check_choice(f"{what} of {name}", spelled(value, choices), choices)
        except ValueError as error:
            raise CannotRun(str(error)) from None
    if kind == "fused" and getattr(implementation, "slots", None) not in (None, 2, 3):
        raise CannotRun(f"slots of {name} must be 2 or 3, got {implementation.slots!r}")
    if getattr(implementation, "fan_in_fan_out", None) not in (None, False, True):
        raise CannotRun(f"fan_in_fan_out of {name} must be True or False, got {implementation.fan_in_fan_out!r}")
    full = kind == "dora" and not getattr(implementation, "detached_norm", True)
    kind_of_problems = "dora-full" if full else kind
    formulas, watch = formulas_of(kind_of_problems, implementation), Watch(implementation, kind)
    problems = [suited(problem, watch) for problem in SETS[kind_of_problems].problems]
    report = _compare(watch, name, wanted or "float64", kind_of_problems, formulas, problems)
    answered = report.habits["dtype kept"].partition(" ")[0]
    if wanted is None and answered in UNIT and report.claims["forward"] != "ok":  # an output in float64 settles it
        return _compare(Watch(implementation, kind), name, answered, kind_of_problems, formulas, problems)
    return report


def _takes_self(function: Callable[..., Any]) -> bool:
    try:
        return next(iter(signature(function).parameters), "") == "self"
    except (TypeError, ValueError):  # of a compiled function nothing is known
        return False


def _compare(watch: Watch, name: str, dtype: str, kind: str, formulas: Formulas, problems: Sequence[Problem]) -> Report:
    """Let an implementation answer every problem, and judge the answers."""
    trials = [drawn(problem, dtype, formulas) for problem in problems]
    found = [answers(watch, trial) for trial in trials]
    if not any(found):
        raise CannotRun(f"{name}: forward {watch.told('forward')}{_instead(watch, trials[0], dtype)}")
    between = drawn(replace(problems[0], seed=1 + problems[0].seed), dtype, formulas)
    again = answers(watch, trials[0], between)
    report = Report(name, dtype)
    report.functions = {f: watch.offers(f) for f in functions_of(watch.kind)}
    returned = watch.returned
    got = f"it returns those of {', '.join(returned)}" if returned else "it returns none"
    factors = judge_numbers(
        report, kind, trials, found,
        None if returned is None else lambda missing: f"backward returns no gradient of {listed(missing)}; {got}",
    )  # fmt: skip
    of_first = {}
    for claim, (function, _) in ANSWERS.items():
        if function in watch.raised:
            report.claims[claim] = f"{function}{_common(list(watch.failed[function]), problems)} {watch.told(function)}"
            if function == "forward" or watch.raised[function] != watch.raised.get("forward"):
                report.diagnoses.append(report.claims[claim])
            if not any(problem in watch.failed[function] for problem in problems):  # on the one in between
                of_first[claim] = report.claims[claim]
        elif text := _changes_its_mind(trials[0], found[0], again, claim):
            report.claims[claim] = of_first[claim] = text
            report.diagnoses.insert(0, text)
        elif claim == "slope" and report.claims[claim] == "ok" and (text := _left_out_on_some(trials, found)):
            report.claims[claim] = text
            report.diagnoses.append(text)
    verdicts = {
        "merged and back": watch.judge("merging", lambda watch: judges.merged_and_back(watch, trials[0])),
        "start": watch.judge("init", judges.start),
        "adam": watch.judge("step", lambda watch: judges.adam(watch, dtype)),
        "frozen base": watch.judge("backward", lambda watch: judges.frozen(watch, trials[0])),
        "nothing is changed": watch.look_back() or "ok",
    }
    if "backward" in watch.raised:
        verdicts["frozen base"] = "not offered"
    other = {key for claim in of_first for key in ANSWERS[claim][1]}
    right = {key for key in found[0] if key not in other and _all_agree(trials, found, key)}
    if "y" not in right or watch.kind in ("dropout", "mixed"):  # dropout ends, and bfloat16 rounds, in a merge
        verdicts["merged and back"] = "not offered"
    for claim, edge in (EDGES | FURTHER.get(watch.kind, {})).items():
        verdicts[claim] = edge(watch, trials[0], dtype, right) if right else "not offered"
    told = [verdict for verdict in verdicts.values() if verdict not in NOT_FAILED and verdict != watch.changed]
    report.diagnoses = [*filter(None, [watch.changed]), *report.diagnoses, *told]
    report.claims |= verdicts
    report.claims = {claim: report.claims[claim] for claim in contract(watch.kind)}
    owed = FACTORS if watch.offers("backward") else ()
    numbers = [outcomes_of(watch.kind, number, trial, one, factors, owed, watch)
               for number, (trial, one) in enumerate(zip(trials, found, strict=True))]  # fmt: skip
    numbers[0] = [replace(case, verdict=of_first.get(case.claim, case.verdict)) for case in numbers[0]]
    others = [Outcome(id_of(watch.kind, claim), claim, "", verdict) for claim, verdict in verdicts.items()
              if claim in report.claims]  # fmt: skip
    report.cases = [*(case for cases in numbers for case in cases), *others]
    report.habits = judges.habits(watch, trials[0], found[0])
    return report


def _instead(watch: Watch, trial: Trial, dtype: str) -> str:
    """Say what to declare where a forward that raises would answer in another precision or orientation."""
    for turned in (False, True):
        for other in dict.fromkeys((dtype, "float32")):
            quiet = Watch(watch.functions, watch.kind)
            quiet.transposed = watch.transposed is not turned
            y = forward(quiet, drawn(trial.problem, other, trial.formulas))
            if np.shape(y) == trial.right["y"].shape:
                instead = [f'dtype = "{other}"'] if other != dtype else []
                instead += [f'orientation = "{ORIENTATIONS[quiet.transposed]}"'] if turned else []
                return f"; it answers with {listed(instead)}"
    return ""


def ids(implementation: Any) -> list[str]:
    """Return the ids of all that `check` will judge of an implementation, in the order of the report."""
    return [id for kind in ("linear", *_further_kinds(implementation, "it")) for id in _ids_of(kind)]


def _ids_of(kind: str) -> Iterator[str]:
    for number in range(len(SETS[kind].problems)):
        yield from (id_of(kind, claim, number) for claim in OF_PROBLEMS)
    yield from (id_of(kind, claim) for claim in contract(kind) if claim not in OF_PROBLEMS)


def outcomes_of(
    kind: str,
    number: int,
    trial: Trial,
    one: Arrays,
    factors: Mapping[Problem, Factor],
    owed: Sequence[str] = (),
    watch: Watch | None = None,
) -> list[Outcome]:
    """Return the verdict on each claim about one problem.

    Parameters
    ----------
    kind : str
        Of the layer.
    number : int
        Of the problem among those of the kind.
    trial : Trial
        The problem.
    one : dict
        What was answered.
    factors : dict
        What `judge_numbers` returned.
    owed : sequence of str
        The gradients that may not be missing.
    watch : Watch, optional
        Which functions raised.
    """
    verdicts = {claim: _verdict(*ANSWERS[claim], trial, one, owed, watch) for claim in ANSWERS}
    verdicts["scaling"] = _scaling_of(trial, one, factors)
    return [Outcome(id_of(kind, claim, number), claim, str(trial.problem), verdicts[claim]) for claim in OF_PROBLEMS]


def _verdict(
    function: str, keys: Sequence[str], trial: Trial, one: Arrays, owed: Sequence[str], watch: Watch | None
) -> str:
    """Return what is wrong with a function's answers to one problem."""
    if watch and (text := watch.failed.get(function, {}).get(trial.problem)):
        return f"{function} {text}"
    wrong = [key for key in keys if key in one and not trial.agrees(key, one[key])]
    texts = [f"{QUANTITIES[key]} {describe_unknown(key, one[key], trial)}" for key in wrong]
    if missing := [key for key in owed if key in keys and key in trial.right and key not in one]:
        texts.append(f"there is no gradient of {listed(missing)}")
    return "; ".join(texts) or ("ok" if set(keys) & one.keys() else "not offered")


def _left_out_on_some(trials: Sequence[Trial], found: Sequence[Arrays]) -> str:
    """Say where a gradient is missing that the backward returns on other problems."""
    lacking = {trial.problem: [key for key in FACTORS if key in trial.right and key not in one]
               for trial, one in zip(trials, found, strict=True)}  # fmt: skip
    where = [problem for problem, missing in lacking.items() if missing]
    if not where:
        return ""
    common = _common(where, list(lacking))
    return f"backward returns no gradient of {listed(lacking[where[0]])}{common} ({where[0]})"


def judge_numbers(
    report: Report,
    kind: str,
    trials: Sequence[Trial],
    found: Sequence[Arrays],
    lacking: Callable[[Sequence[str]], str] | None,
) -> dict[Problem, Factor]:
    """Compare answers with the right ones, and put verdicts, diagnoses and errors into a report.

    Parameters
    ----------
    report : Report
        It gets the claims "forward", "scaling", "slope" and "merge".
    kind : str
        Of the problems, as `minilora.conformance.problems.kinds.SETS` has it.
    trials : sequence of Trial
        The problems, all of one precision.
    found : sequence of dict
        The answers to each of them.
    lacking : callable, or None
        What is said of gradients that are missing on every problem; None where there is no backward.

    Returns
    -------
    dict of Problem
        The factor that the update has in each output; empty where that cannot be measured.
    """
    there = {key for one in found for key in one}
    wrong = frozenset(key for key in there if not _all_agree(trials, found, key))
    factors = _factors(trials, found)
    bugs = diagnose(kind, trials, found, wrong, _other_scaling(trials, factors))
    report.diagnoses += [str(bug) for bug in bugs]
    rest = list(unexplained(wrong, bugs))
    single = [key for key in rest if _is_single(trials, found, key)]
    if single:
        report.diagnoses.append(f"{listed([QUANTITIES[key].split(',')[0] for key in single])}: {SINGLE}")
    described = {key: _describe(trials, found, key, inside=key in rest) for key in wrong}
    unknown = [described[key] for key in rest if key not in single]
    report.diagnoses += sorted(unknown, key=lambda text: EVERY_ENTRY not in text)
    for claim, (_, keys) in ANSWERS.items():
        texts = [described[key] for key in keys if key in wrong]
        missing = [key for key in FACTORS if key in trials[0].right and key not in there]
        if claim == "slope" and missing and lacking:  # that of x may be left out: the first layer needs none
            bug = left_out(kind, trials[0], missing)
            texts.append(str(bug) if bug else lacking(missing))
            report.diagnoses.append(texts[-1])
        report.claims[claim] = "; ".join(texts) or ("ok" if there & set(keys) else "not offered")
    report.claims["scaling"] = _scaling(trials, found, factors)
    report.claims = {claim: report.claims[claim] for claim in CONTRACT if claim in report.claims}
    for key in QUANTITIES:
        if key in there:
            report.errors[key] = max(
                _error(one[key], trial.right[key]) for trial, one in zip(trials, found, strict=True) if key in one
            )
    return factors


def _changes_its_mind(trial: Trial, first: Arrays, second: Arrays, claim: str) -> str:
    """Say where the same arguments give other numbers the second time, by more than two orders of summation may."""
    for key in ANSWERS[claim][1]:
        if key not in first or key not in second or _as_before(trial, key, first[key], second[key]):
            continue
        if trial.agrees(key, first[key]):
            return f"{QUANTITIES[key]} is another one the second time it is asked for: something is kept between calls"
        if np.shape(first[key]) == np.shape(trial.right[key]) and np.isfinite(first[key]).all():
            return f"{QUANTITIES[key]} is another one at each call with the same arguments: is dropout on?"
    return ""


def _as_before(trial: Trial, key: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two answers are the same up to the rounding of both. A wrong one may be larger than the right."""
    largest = np.abs(trial.right[key]).max(initial=TINY)
    times = max(1.0, float(np.abs(first.astype(np.float64)).max(initial=0.0) / largest))
    sizes = {key: trial.sizes[key] * times}
    return trial.distance(key, second, first.astype(np.float64), sizes) <= 2 * TOLERANCE


@dataclass(frozen=True)
class Factor:
    """What the update is multiplied by in an output, as measured."""

    value: float
    size: float  # of the factor, as an answer has one: what its rounding is measured in
    unit: float  # unit roundoff

    def is_other(self, expected: float) -> bool:
        """Return whether it is another factor than the expected one, beyond rounding."""
        return abs(self.value - expected) > TOLERANCE * self.unit * self.size


def _factor(trial: Trial, key: str, found: np.ndarray, without: np.ndarray, update: np.ndarray) -> Factor | None:
    """Measure by least squares how often an answer adds an update; None where it adds something else."""
    if np.shape(found) != np.shape(update) or not np.isfinite(found).all():
        return None
    squares = float((update * update).sum())
    with np.errstate(over="ignore"):
        value = float(((found - without) * update).sum() / squares)
    if not np.isfinite(value):
        return None
    sizes = trial.sizes_by(scaling=lambda alpha, r: value)
    if trial.distance(key, found, without + value * update, sizes) > TOLERANCE:
        return None
    top = max(float(sizes[key].max()), TINY)  # taken out, or the square of a huge one would overflow
    size = top * float(np.sqrt(((sizes[key] / top * update) ** 2).sum())) / squares  # each entry rounds on its own
    return Factor(value if Factor(value, size, trial.unit).is_other(0.0) else 0.0, size, trial.unit)


@dataclass(frozen=True, eq=False)
class _Measured(Bug):
    """A scaling that no known bug gives, as it was measured on each problem."""

    factors: Mapping[Problem, Factor] = field(default_factory=dict)

    def by(self, problem: Problem | None = None) -> Mapping[str, Any]:
        """Return the scaling of a problem."""
        factor = self.factors.get(problem) if problem else None
        return {"scaling": lambda alpha, r: factor.value} if factor else {}

    def largest(self, problem: Problem) -> Mapping[str, Any]:
        """Return the scaling with its own rounding, which the answers that it explains have beside theirs."""
        factor = self.factors.get(problem)
        return {"scaling": lambda alpha, r: abs(factor.value) + factor.size} if factor else {}


def _factors(trials: Sequence[Trial], found: Sequence[Arrays]) -> dict[Problem, Factor]:
    """Measure the factor of the update in each output; empty where an output is not the base plus a factor times it."""
    factors: dict[Problem, Factor] = {}
    for trial, one in zip(trials, found, strict=True):
        if "y" not in one or "magnitude" in trial.arrays:
            continue
        if trial.problem.start:  # the update is zero there: lora_B's gradient has the factor
            key, without, update = "lora_B", np.zeros(()), trial.by(scaling=SCALINGS["1"])["lora_B"]
        else:
            key, without = "y", trial.by(update=0.0)["y"]
            update = trial.by(scaling=SCALINGS["1"], s_in_base=_nothing, s_in_bias=_nothing)["y"]
        factor = _factor(trial, key, one[key], without, update) if key in one else None
        if factor is None and key == "y":
            return {}
        if factor is not None:
            factors[trial.problem] = factor
    return factors


def _nothing(s: float) -> float:
    return 0.0


def _other_scaling(trials: Sequence[Trial], factors: Mapping[Problem, Factor]) -> list[Bug]:
    """Return a bug that scales as was measured; none where the scaling is right everywhere."""
    measured = [trial for trial in trials if trial.problem in factors]
    expected = {trial.problem: trial.formulas.scaling(trial.problem.alpha, trial.problem.rank) for trial in measured}
    other = [problem for problem, s in expected.items() if factors[problem].is_other(s)]
    if not other:
        return []
    cases = [f"{factors[p].value:.6g} at in={p.in_features} out={p.out_features} "
             f"r={p.rank} alpha={p.alpha:g}, expected {expected[p]:.6g}" for p in other[:3]]  # fmt: skip
    where, how = _common(other, list(factors)).rstrip(","), _relation(expected, factors)
    name = f"the update has another scaling{where}: {'; '.join(cases)}{how}"
    return [_Measured("another-scaling", name, {}, "scaling", factors=factors)]


def _relation(expected: Mapping[Problem, float], factors: Mapping[Problem, Factor]) -> str:
    """Say how measured scalings come from the right ones, where one rule holds on every problem."""

    def so(rule: Callable[[float], float]) -> bool:
        return not any(factors[problem].is_other(rule(s)) for problem, s in expected.items())

    expected = {problem: s for problem, s in expected.items() if not problem.start}  # there it is that of a gradient
    first = next(iter(expected.values()))
    for half in HALVES:
        if so(partial(_short, half=half)):
            return f"; it is the right one rounded to {half}"
    if so(lambda s: first) and len(set(expected.values())) > 1:
        return "; it is that of the first problem everywhere (is something kept between calls?)"
    times = [factors[problem].value / s for problem, s in expected.items() if s]
    if times and np.abs(np.subtract(times, 1)).max() < 4 * UNIT["float32"]:
        return "; it is the right one in single precision"
    if len(times) > 1 and np.ptp(times) < 1e-5 * abs(times[0]):
        return f"; it is {times[0]:.6g} times the right one"
    return ""


def _short(s: float, half: str) -> float:
    return float(round_to(np.array([s]), half)[0])


def _scaling(trials: Sequence[Trial], found: Sequence[Arrays], factors: Mapping[Problem, Factor]) -> str:
    """Compare the factor that the update has in the output with the one that is declared."""
    if not any("y" in one for one in found):
        return "not offered"
    if _all_agree(trials, found, "y") or _is_single(trials, found, "y"):
        return "ok"
    for trial in trials:
        if text := _other_factor(trial, factors):
            return f"{text} ({trial.problem})"
    return CANNOT_BE_TOLD


def _other_factor(trial: Trial, factors: Mapping[Problem, Factor]) -> str:
    s = trial.formulas.scaling(trial.problem.alpha, trial.problem.rank)
    factor = factors.get(trial.problem)
    other = factor is not None and factor.is_other(s)
    return f"the update is multiplied by {factor.value:.6g}, expected {s:.6g}" if factor and other else ""


def _scaling_of(trial: Trial, one: Arrays, factors: Mapping[Problem, Factor]) -> str:
    """Compare the factor that the update has in one output with the one that is declared."""
    if "y" not in one:
        return "not offered"
    if trial.agrees("y", one["y"]):
        return "ok"
    return _other_factor(trial, factors) or ("ok" if trial.problem in factors else CANNOT_BE_TOLD)


def _all_agree(trials: Sequence[Trial], found: Sequence[Arrays], key: str, looser: float = 1.0) -> bool:
    pairs = zip(trials, found, strict=True)
    return all(trial.agrees(key, one[key], looser=looser) for trial, one in pairs if key in one)


def _error(found: np.ndarray, right: np.ndarray) -> float:
    if np.shape(found) != np.shape(right) or not np.isfinite(found).all():
        return float("inf")
    error = np.abs(np.asarray(found, np.float64) - right).max(initial=0.0)
    return float(error / max(np.abs(right).max(initial=0.0), np.finfo(float).tiny)) if error else 0.0


def _describe(trials: Sequence[Trial], found: Sequence[Arrays], key: str, inside: bool) -> str:
    """Say what is wrong with an answer on the first problem where it is, and what the problems have in common."""
    asked = [(trial, one) for trial, one in zip(trials, found, strict=True) if key in one]
    failed = [(trial, one) for trial, one in asked if not trial.agrees(key, one[key])]
    if _is_single(trials, found, key):
        return SINGLE
    seen = ((trial, one) for trial, one in failed if inside and _seen(trial, one, key))
    trial, one = next(seen, failed[0])  # what is seen inside an array does not show at every size
    for other in trial.right:
        if other != key and all(trial.agrees(other, one[key]) for trial, one in asked):
            return f"{QUANTITIES[other]} is where {QUANTITIES[key]} belongs"
    common = _common([t.problem for t, _ in failed], [t.problem for t, _ in asked if t.right[key].any()])
    return f"{QUANTITIES[key]}{common} {describe_unknown(key, one[key], trial, inside)} ({trial.problem})"


def _seen(trial: Trial, one: Arrays, key: str) -> bool:
    found = one[key]
    return np.shape(found) == trial.right[key].shape and bool(np.isfinite(found).all() and pattern(key, found, trial))


SINGLE = (
    "right to float32 only: computed, or kept, in single precision. If that is meant, declare dtype float32, or answer"
    " the vectors in float32 alone"
)


def _is_single(trials: Sequence[Trial], found: Sequence[Arrays], key: str) -> bool:
    """Return whether an answer to problems in double precision is right in single precision, and as far off as that."""
    single = UNIT["float32"] / trials[0].unit
    if single <= 1 or not _all_agree(trials, found, key, single):
        return False
    pairs = zip(trials, found, strict=True)
    return max(trial.distance(key, one[key]) for trial, one in pairs if key in one) > 1e-3 * single


def _common(failed: Sequence[Problem], asked: Sequence[Problem]) -> str:
    """Say when it is wrong, where one property of the problems decides that."""
    for words, has in _properties(failed[0]).items():
        if len(failed) < len(asked) and [p for p in asked if has(p)] == list(failed):
            return f", {words},"
    return ""


Properties = Mapping[str, Callable[[Any], bool]]


def _properties(problem: Problem) -> Properties:
    """Return what problems of a kind may have, in the order in which it is told."""
    if isinstance(problem, Fused):  # whose slots have ranks and alphas of their own
        return OF_SLOTS
    own = OF_IMAGES if isinstance(problem, Images) else OF_MIXED if isinstance(problem, Mixed) else OF_LAYERS
    return {**own, **PROPERTIES}


PROPERTIES: Properties = {
    "wherever there is a bias": lambda p: p.bias,
    "wherever there is no bias": lambda p: not p.bias,
    "at rank 1": lambda p: p.rank == 1,
    "at a single row": lambda p: p.n == 1,
    "for more than one row": lambda p: p.n > 1,
    "where alpha is below the rank": lambda p: p.alpha < p.rank,
    "where alpha is above the rank": lambda p: p.alpha > p.rank,
    "where alpha / r is no whole number": lambda p: p.alpha % p.rank != 0,
    "where lora_B is zero": lambda p: p.start,
}
"""What a problem may have, in the order in which it is told."""


def _met(part: Callable[[Problem], Any]) -> Callable[[Any], bool]:
    """Return whether an earlier problem has the same part."""
    problems = SETS["linear"].problems
    parts = [part(problem) for problem in problems]
    again = {problem for i, problem in enumerate(problems) if parts[i] in parts[:i]}
    return lambda problem: problem in again


OF_LAYERS: Properties = {
    "with the sizes of an earlier problem (is something kept between calls?)": lambda p: p == AGAIN,
    "with lora_A's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.rank, p.in_features)
    ),
    "with lora_B's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.out_features, p.rank)
    ),
    "with the weight's shape of an earlier problem (is something kept between calls?)": _met(
        lambda p: (p.out_features, p.in_features)
    ),
    "where in = out": lambda p: p.in_features == p.out_features,
    "where in and out differ": lambda p: p.in_features != p.out_features,
    "where in is below out": lambda p: p.in_features < p.out_features,
    "where in is above out": lambda p: p.in_features > p.out_features,
    "at ranks above 32": lambda p: p.rank > 32,
    "at a rank that is a multiple of 32": lambda p: p.rank % 32 == 0,
    "for more than 128 rows": lambda p: p.n > 128,
    "for more than 128 outputs": lambda p: p.out_features > 128,
    "where the rank is above a width": lambda p: p.rank > min(p.in_features, p.out_features),
    "in wide layers": lambda p: p.in_features > 100,
    "in layers that are not wide": lambda p: p.in_features <= 100,
}
OF_MIXED: Properties = {"where the update cancels the base's output": lambda p: p.near}
OF_SLOTS: Properties = {
    "where a slot has no adapter": lambda p: 0 in p.ranks,
    "where every slot has an adapter": lambda p: 0 not in p.ranks,
    "where slots differ in width": lambda p: len(set(p.widths)) > 1,
    "of three slots": lambda p: len(p.widths) == 3,
    "of two slots": lambda p: len(p.widths) == 2,
    "where slots differ in rank": lambda p: len(set(p.ranks) - {0}) > 1,
    **{words: PROPERTIES[words] for words in ("wherever there is a bias", "wherever there is no bias")},
    **{words: PROPERTIES[words] for words in ("at a single row", "where lora_B is zero")},
}
OF_IMAGES: Properties = {
    "where the kernel has more than one entry": lambda p: max(p.kernel) > 1,
    "at a stride above 1": lambda p: max(p.stride) > 1,
    "with padding": lambda p: max(p.padding) > 0,
    "with dilation": lambda p: max(p.dilation) > 1,
    "with groups": lambda p: p.groups > 1,
    "where it is depthwise": lambda p: p.groups == p.in_features > 1,
}
