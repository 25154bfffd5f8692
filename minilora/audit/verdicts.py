"""What is said of a merged model: one verdict over all modules and tensors, with the places where it is not right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import Diagnosis
from ..texts import enumerated, short
from .contents import kind_of
from .findings import counted, some
from .landing import BODY, Landing
from .merging import Merger
from .suspects import RIGHT, UNREAD, UNTOLD, WRONG, Verdict

UNLOADED = ("base_model.", "module.", "_orig_mod.")
"""Beginnings of names that transformers passes over, without a word."""


@dataclass
class Told:
    """The verdict: its word, the text of the first line, what is wrong, and lines about the rest."""

    word: str
    text: str = ""
    found: list[Diagnosis] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def tell(comparison: Merger, landing: Landing) -> Told:
    """Return the verdict over all."""
    modules = comparison.modules
    wrong = [*_of_whole(comparison), *_of_modules(modules), *_of_names(comparison, landing), *_of_others(comparison)]
    right, untold, unread = ([path for path, v in modules.items() if v.state == s] for s in (RIGHT, UNTOLD, UNREAD))
    lines = [_counts(modules), *_rest(comparison)]
    if wrong:
        return Told(WRONG.upper(), found=wrong, lines=lines)
    whole = [name for name, verdict in comparison.others.items() if verdict.state == RIGHT]
    if unread or not (right or whole):
        return Told("UNDECIDED", _undecided(modules, untold, unread), lines=lines)
    dtypes = "/".join(sorted({modules[path].dtype for path in right}))
    steps = max((modules[path].steps for path in right), default=0.0)
    parts = [f"{len(right)} of {counted(len(modules), 'module')}"] if modules else []
    parts += [f"{dtypes}, at most {steps:.2g} ulp beside the exact sum"] if right else []
    parts += [f"{counted(len(whole), 'tensor')} trained in full"] if whole else []
    text = f"merged rightly ({', '.join(parts)})"
    text += f"; of {len(untold)} nothing can be told: the change is lost in rounding" if untold else ""
    return Told("RIGHT", text, lines=lines)


def _undecided(modules: dict[str, Verdict], untold: list[str], unread: list[str]) -> str:
    if unread:
        reason = modules[unread[0]].text
        return f"{len(unread)} of {counted(len(modules), 'module')} cannot be compared: {reason}"
    if not untold:
        return "the adapter has nothing that could be merged"
    dtype = "/".join(sorted({modules[path].dtype for path in untold}))
    return (
        f"cannot be told: in all {counted(len(untold), 'module')} the change is below half a step of {dtype}, or zero"
    )


# --- what is wrong ---


def _of_modules(modules: dict[str, Verdict]) -> list[Diagnosis]:
    """Return what is wrong with modules, what most of them have first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, verdict in modules.items():
        if verdict.state == WRONG:
            text = "not its own change" if verdict.flag == "another-change" else verdict.text
            groups.setdefault((verdict.flag, text), []).append(path)
    right = [path for path, verdict in modules.items() if verdict.state == RIGHT]
    rest = f"; merged rightly: {where(right, modules)}" if right else ""
    found = []
    for (flag, text), paths in sorted(groups.items(), key=lambda group: -len(group[1])):
        places = _exchanged(paths, modules) if flag == "another-change" else where(paths, modules)
        count = f" ({len(paths)} of {len(modules)} modules)" if len(paths) < len(modules) else ""
        text = filled(text, [modules[path] for path in paths])
        found.append(Diagnosis(f"{text}: {places}{count}{rest}", flag, cases=tuple(paths)))
        rest = ""
    return found


def _exchanged(paths: list[str], modules: dict[str, Verdict]) -> str:
    """Say which modules have whose change."""
    whose: dict[str, list[str]] = {}
    for path in paths:
        whose.setdefault(modules[path].text, []).append(path)
    said = [f"{where(of, modules)} with {filled(text, [modules[path] for path in of])}" for text, of in whose.items()]
    return ", ".join(said[:3]) + (" and so on" if len(said) > 3 else "")


def filled(text: str, verdicts: Sequence[Verdict]) -> str:
    """Return a text with the numbers of all that it is about."""
    factors, rests = (
        [getattr(v, name) for v in verdicts if getattr(v, name) is not None] for name in ("factor", "rest")
    )
    return text.replace("{k}", _between(factors, "{:.3g}")).replace("{rest}", _between(rests, "{:.1%}"))


def _between(numbers: Sequence[float], form: str) -> str:
    ends = dict.fromkeys(form.format(n) for n in (min(numbers, default=0.0), max(numbers, default=0.0)))
    return " to ".join(ends)


def _of_whole(comparison: Merger) -> Iterator[Diagnosis]:
    """Yield what is wrong with the folder as a whole: it is not merged, or of another base."""
    beside = [name for name, verdict in comparison.others.items() if verdict.flag == "factors-beside"]
    if beside:
        stand = "stands" if len(beside) == 1 else "stand"
        text = f"not merged: {counted(len(beside), 'tensor')} of a model beside its adapter {stand} there"
        yield Diagnosis(text, "factors-beside", cases=tuple(beside))
    changed = _changed(comparison)
    if _is_other_base(comparison):
        of_all = f"{len(changed)} of {len(changed) + comparison.same} tensors without an adapter"
        text = f"merged over another base: {of_all} differ from this one by {filled('{rest}', [*changed.values()])}"
        yield Diagnosis(f"{text} of their size", "other-base", cases=tuple(changed))


def _changed(comparison: Merger) -> dict[str, Verdict]:
    return {name: verdict for name, verdict in comparison.others.items() if verdict.flag == "changed"}


def _is_other_base(comparison: Merger) -> bool:
    """Return whether most matrices without an adapter are others, and no module is merged rightly."""
    right = any(verdict.state == RIGHT for verdict in comparison.modules.values())
    matrices = [name for name in _changed(comparison) if name not in comparison.vectors]
    return not right and bool(matrices) and len(matrices) >= comparison.same - comparison.same_vectors


def _of_names(comparison: Merger, landing: Landing) -> Iterator[Diagnosis]:
    """Yield what is wrong with names: a beginning that no program loads, modules that the base has not."""
    if comparison.renamed.startswith(UNLOADED):
        text = f"the names in the merged model begin with {comparison.renamed!r}, and transformers passes over such"
        yield Diagnosis(text, "prefix-not-loaded")
    if landing.lost:
        are = "is" if len(landing.lost) == 1 else "are"
        text = f"{counted(len(landing.lost), 'module')} of the adapter {are} not in the base: {some(landing.lost)}"
        yield Diagnosis(text, "module-unknown", cases=(*landing.lost,))


def _of_others(comparison: Merger) -> Iterator[Diagnosis]:
    """Yield what is wrong with tensors that no module changes."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, verdict in comparison.others.items():
        if verdict.state == WRONG and verdict.flag != "factors-beside":
            groups.setdefault((verdict.flag, verdict.text), []).append(name)
    for (flag, text), names in groups.items():
        if flag != "changed" or not _is_other_base(comparison):
            text = filled(text, [comparison.others[name] for name in names])
            yield Diagnosis(f"{text}: {some(names, 'tensor')}", flag, cases=tuple(names))


# --- where ---


def where(paths: Collection[str], every: Collection[str]) -> str:
    """Say which modules some are, of all: "layers 0 to 13", "q_proj of layer 3", or their names."""
    chosen = {*paths}
    if len(chosen) == len(every) > 1:
        return f"all {len(every)} modules"
    kinds, layers = {kind_of(path) for path in chosen}, {_layer(path) for path in chosen}
    if None not in layers and len(chosen) > 1:
        numbers = ranges(sorted(n for n in layers if n is not None))
        said = f"layer{'s' * (len(layers) > 1)} {numbers}"
        if chosen == {path for path in every if _layer(path) in layers}:
            return said
        named = enumerated(sorted(kinds)) if len(kinds) < 6 else ""
        if named and chosen == {path for path in every if kind_of(path) in kinds}:
            return named
        if named and chosen == {path for path in every if kind_of(path) in kinds and _layer(path) in layers}:
            return f"{named} of {said}"
    return some([*paths])


def _layer(path: str) -> int | None:
    match = BODY.search(path)
    return int(match[1]) if match else None


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers in order as ranges: "0 to 13, 20"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# --- the rest ---


def _counts(modules: dict[str, Verdict]) -> str:
    counts = Counter(verdict.state for verdict in modules.values())
    said = [f"{counts[state]} {state}" for state in (RIGHT, WRONG, UNTOLD, UNREAD) if counts[state]]
    return f"merged modules: {', '.join(said) or 'none'}"


def _rest(comparison: Merger) -> Iterator[str]:
    """Say what became of the other tensors."""
    others = [name for name, verdict in comparison.others.items() if verdict.state == WRONG]
    yield f"other tensors: {comparison.same} are the base's, {len(others)} are not"
    for name, rows in comparison.grown.items():
        more = f"{counted(rows, 'row')} more in the merged model, of which nothing is said"
        yield f"note: {short(name)} has {more} [vocabulary-grown]"
    if comparison.extra:
        yield f"note: only in the merged model: {some(comparison.extra, 'tensor')} [merged-alone]"
    if comparison.renamed:
        yield f"note: the names begin otherwise in the merged model: {comparison.renamed!r} [renamed]"
    unread = [f"{name}: {v.text}" for name, v in comparison.others.items() if v.state == UNREAD]
    yield from (f"note: not compared: {text} [not-compared]" for text in unread[:3])


def for_programs(comparison: Merger) -> dict[str, Any]:
    """Return what was found as JSON has it."""
    return {
        "path": str(comparison.merged.path), "same": comparison.same, "extra": comparison.extra,
        "grown": comparison.grown, "renamed": comparison.renamed,
        "modules": [{"module": path} | _verdict(verdict) for path, verdict in comparison.modules.items()],
        "tensors": [{"tensor": name} | _verdict(verdict) for name, verdict in comparison.others.items()],
    }  # fmt: skip


def _verdict(verdict: Verdict) -> dict[str, Any]:
    known = {key: value for key, value in vars(verdict).items() if not isinstance(value, float) or math.isfinite(value)}
    return dict.fromkeys(vars(verdict)) | known | {"text": filled(verdict.text, [verdict])}
