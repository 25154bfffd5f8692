"""An implementation's numbers compared with the right ones: claims, outcomes and diagnoses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..bugs.diagnoses import diagnose, left_out, listed, unexplained
from ..problems.formulas import QUANTITIES
from ..problems.kind import FACTORS
from ..problems.problem import Arrays, Problem
from ..problems.tolerance import TINY, TOLERANCE, UNIT, Trial
from ..report import Diagnosis
from .calling import Watch
from .contract import ANSWERS, contract, of_problems
from .describing import EVERY_ENTRY, describe_unknown, pattern
from .in_common import in_common
from .kindreport import CANNOT_BE_TOLD, ClaimOutcome, KindReport, id_of, outcome
from .other_scaling import Factor, factors_of, other_factor, other_scaling

SINGLE = (
    "right to float32 only: computed, or kept, in single precision. If that is meant, declare dtype float32, or answer"
    " the vectors in float32 alone"
)


def judge_numbers(
    report: KindReport,
    kind: str,
    trials: Sequence[Trial],
    replies: Sequence[Arrays],
    lacking: Callable[[Sequence[str]], str] | None,
) -> dict[Problem, Factor]:
    """Compare answers with the right ones, and put verdicts, diagnoses and errors into a report.

    Parameters
    ----------
    report : Report
        It gets the claims "forward", "scaling", "slope" and "merge".
    kind : str
        Of the problems, as `minilora.conformance.problems.kinds.KINDS` has it.
    trials : sequence of Trial
        The problems, all of one precision.
    replies : sequence of dict
        What was answered to each of them.
    lacking : callable, or None
        What is said of gradients that are missing on every problem; None where there is no backward.

    Returns
    -------
    dict of Problem
        The factor that the update has in each output; empty where that cannot be measured.
    """
    offered = {key for reply in replies for key in reply}
    wrong = frozenset(key for key in offered if not all_agree(trials, replies, key))
    factors = factors_of(trials, replies)
    bugs = diagnose(kind, trials, replies, wrong, other_scaling(trials, factors))
    report.found += [bug.told() for bug in bugs]
    rest = list(unexplained(wrong, bugs))
    single = [key for key in rest if is_single(trials, replies, key)]
    conditional = under_a_condition(kind, trials, replies, [key for key in rest if key not in single])
    report.found += conditional.values()
    rest = [key for key in rest if not any(key in keys for keys in conditional)]
    if single:
        names = listed([QUANTITIES[key].split(",")[0] for key in single])
        report.found.append(Diagnosis(f"{names}: {SINGLE}", cases=tuple(single)))
    described = {key: _describe(trials, replies, key, inside=key in rest) for key in wrong}
    unknown = [Diagnosis(described[key], cases=(key,)) for key in rest if key not in single]
    report.found += sorted(unknown, key=lambda diagnosis: EVERY_ENTRY not in diagnosis.says)
    for claim, (_, keys) in ANSWERS.items():
        texts = [described[key] for key in keys if key in wrong]
        missing = [key for key in FACTORS if key in trials[0].right and key not in offered]
        if claim == "slope" and missing and lacking:  # that of x may be left out: the first layer needs none
            bug = left_out(kind, trials[0], missing)
            texts.append(str(bug) if bug else lacking(missing))
            told = Diagnosis(bug.says, bug.flag, bug.source) if bug else Diagnosis(texts[-1])
            report.found.append(replace(told, cases=(claim,)))
        report.claims[claim] = "; ".join(texts) or ("ok" if offered & set(keys) else "not offered")
    report.claims["scaling"] = _scaling_verdict(trials, replies, factors)
    report.claims = {claim: report.claims[claim] for claim in contract(kind) if claim in report.claims}
    for key in QUANTITIES:
        if key in offered:
            report.errors[key] = max(
                _error(reply[key], trial.right[key])
                for trial, reply in zip(trials, replies, strict=True)
                if key in reply
            )
    return factors


def placed(report: KindReport) -> KindReport:
    """Put the ids of the cases that fail in the place of the answers, or the claim, that a diagnosis is about."""
    about = {claim: {claim, *keys} for claim, (_, keys) in ANSWERS.items()}
    about["scaling"] = {"scaling", "y"}
    for i, diagnosis in enumerate(report.found):
        of = [case for case in report.cases if case.failed
              and about.get(case.claim, {case.claim}) & set(diagnosis.cases)]  # fmt: skip
        report.found[i] = replace(diagnosis, cases=tuple(case.id for case in of))
    flags = {case.id: tuple(d.flag for d in report.found if d.flag and case.id in d.cases) for case in report.cases}
    report.cases = [replace(case, flags=flags[case.id]) for case in report.cases]
    return report


def under_a_condition(
    kind: str, trials: Sequence[Trial], replies: Sequence[Arrays], wrong: Sequence[str]
) -> dict[tuple[str, ...], Diagnosis]:
    """Name the bugs that explain answers on all problems where these are wrong, and are not made on the others.

    Returns
    -------
    dict
        For each diagnosis the answers that it explains, and what it says.
    """
    if trials[0].unit > UNIT["float32"]:  # a few numbers of eight bits can agree by chance
        return {}
    pairs = list(enumerate(zip(trials, replies, strict=True)))
    where = {
        key: {i for i, (trial, reply) in pairs if key in reply and not trial.agrees(key, reply[key])} for key in wrong
    }
    texts: dict[tuple[str, ...], Diagnosis] = {}
    # All answers together: where lora_B is zero, a bug shows in its gradient alone. Then each as far as it is wrong.
    for keys in (tuple(wrong), *((key,) for key in wrong)):
        keys = tuple(key for key in keys if not any(key in explained for explained in texts))
        failed = sorted(set().union(*(where[key] for key in keys)))
        if not failed or len(failed) == len(trials):
            continue
        own_trials, own_replies = [trials[i] for i in failed], [replies[i] for i in failed]
        when = in_common([trial.problem for trial in own_trials], [trial.problem for trial in trials]).strip(", ")
        those = "the one" if len(failed) == 1 else "those"
        for bug in diagnose(kind, own_trials, own_replies, frozenset(keys)):
            place = f"on {len(failed)} of {len(trials)} problems, {those} {when or 'where it shows'}"
            told = bug.told()
            texts[bug.explains] = replace(told, says=f"{place}: {told.says}")
    return texts


def _scaling_verdict(trials: Sequence[Trial], replies: Sequence[Arrays], factors: Mapping[Problem, Factor]) -> str:
    """Compare the factor that the update has in the output with the one that is declared."""
    if not any("y" in reply for reply in replies):
        return "not offered"
    if all_agree(trials, replies, "y") or is_single(trials, replies, "y"):
        return "ok"
    for trial in trials:
        if text := other_factor(trial, factors):
            return f"{text} ({trial.problem})"
    return CANNOT_BE_TOLD


def _error(array: np.ndarray, right: np.ndarray) -> float:
    if np.shape(array) != np.shape(right) or not np.isfinite(array).all():
        return float("inf")
    error = np.abs(np.asarray(array, np.float64) - right).max(initial=0.0)
    return float(error / max(np.abs(right).max(initial=0.0), np.finfo(float).tiny)) if error else 0.0


def _describe(trials: Sequence[Trial], replies: Sequence[Arrays], key: str, inside: bool) -> str:
    """Say what is wrong with an answer on the first problem where it is, and what the problems have in common."""
    answered = [(trial, reply) for trial, reply in zip(trials, replies, strict=True) if key in reply]
    failed = [(trial, reply) for trial, reply in answered if not trial.agrees(key, reply[key])]
    if is_single(trials, replies, key):
        return SINGLE
    visible = ((trial, reply) for trial, reply in failed if inside and _is_visible(trial, reply, key))
    trial, reply = next(visible, failed[0])  # what is seen inside an array does not show at every size
    for other in trial.right:
        if other != key and all(other in t.right and t.agrees(other, reply[key]) for t, reply in answered):
            return f"{QUANTITIES[other]} is where {QUANTITIES[key]} belongs"
    when = in_common([t.problem for t, _ in failed], [t.problem for t, _ in answered if t.right[key].any()])
    return f"{QUANTITIES[key]}{when} {describe_unknown(key, reply[key], trial, inside)} ({trial.problem})"


def _is_visible(trial: Trial, reply: Arrays, key: str) -> bool:
    """Return whether something is seen inside a wrong answer."""
    array = reply[key]
    return np.shape(array) == trial.right[key].shape and bool(np.isfinite(array).all() and pattern(key, array, trial))


def outcomes_of(
    kind: str,
    number: int,
    trial: Trial,
    reply: Arrays,
    factors: Mapping[Problem, Factor],
    owed: Sequence[str] = (),
    watch: Watch | None = None,
) -> list[ClaimOutcome]:
    """Return the verdict on each claim about one problem.

    Parameters
    ----------
    kind : str
        Of the layer.
    number : int
        Of the problem among those of the kind.
    trial : Trial
        The problem.
    reply : dict
        What was answered.
    factors : dict
        What `judge_numbers` returned.
    owed : sequence of str
        The gradients that may not be missing.
    watch : Watch, optional
        Which functions raised.
    """
    verdicts = {claim: _verdict(*ANSWERS[claim], trial, reply, owed, watch) for claim in ANSWERS}
    verdicts["scaling"] = _scaling_verdict_of(trial, reply, factors)
    return [
        outcome(id_of(kind, claim, number), claim, str(trial.problem), verdicts[claim]) for claim in of_problems(kind)
    ]


def _verdict(
    function: str, keys: Sequence[str], trial: Trial, reply: Arrays, owed: Sequence[str], watch: Watch | None
) -> str:
    """Return what is wrong with a function's answers to one problem."""
    if watch and (text := watch.failed.get(function, {}).get(trial.problem)):
        return f"{function} {text}"
    wrong = [key for key in keys if key in reply and not trial.agrees(key, reply[key])]
    texts = [f"{QUANTITIES[key]} {describe_unknown(key, reply[key], trial)}" for key in wrong]
    if missing := [key for key in owed if key in keys and key in trial.right and key not in reply]:
        texts.append(f"there is no gradient of {listed(missing)}")
    return "; ".join(texts) or ("ok" if set(keys) & reply.keys() else "not offered")


def _scaling_verdict_of(trial: Trial, reply: Arrays, factors: Mapping[Problem, Factor]) -> str:
    """Compare the factor that the update has in one output with the one that is declared."""
    if "y" not in reply:
        return "not offered"
    if trial.agrees("y", reply["y"]):
        return "ok"
    return other_factor(trial, factors) or ("ok" if trial.problem in factors else CANNOT_BE_TOLD)


def left_out_on_some(trials: Sequence[Trial], replies: Sequence[Arrays]) -> str:
    """Say where a gradient is missing that the backward returns on other problems."""
    lacking = {trial.problem: [key for key in FACTORS if key in trial.right and key not in reply]
               for trial, reply in zip(trials, replies, strict=True)}  # fmt: skip
    where = [problem for problem, missing in lacking.items() if missing]
    if not where:
        return ""
    when = in_common(where, list(lacking))
    return f"backward returns no gradient of {listed(lacking[where[0]])}{when} ({where[0]})"


def changes_its_mind(trial: Trial, first: Arrays, second: Arrays, claim: str) -> str:
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


def all_agree(trials: Sequence[Trial], replies: Sequence[Arrays], key: str, looser: float = 1.0) -> bool:
    """Return whether an answer is right on every problem to which it was given."""
    pairs = zip(trials, replies, strict=True)
    return all(trial.agrees(key, reply[key], looser=looser) for trial, reply in pairs if key in reply)


def is_single(trials: Sequence[Trial], replies: Sequence[Arrays], key: str) -> bool:
    """Return whether an answer to problems in double precision is right in single precision, and as far off as that."""
    single = UNIT["float32"] / trials[0].unit
    if single <= 1 or not all_agree(trials, replies, key, single):
        return False
    pairs = zip(trials, replies, strict=True)
    return max(trial.distance(key, reply[key]) for trial, reply in pairs if key in reply) > 1e-3 * single
