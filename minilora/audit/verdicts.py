"""The verdict on a merged model as a whole, from the verdicts on its modules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import Diagnosis
from ..texts import enumerated
from .contents import module_kind
from .findings import WRONG, counted, listed
from .landing import BODY, Landing
from .merging import MergeResult
from .suspects import RIGHT, SKIPPED, UNDECIDED, Verdict


@dataclass
class Summary:
    """The verdict: a word, the text of the first line, the diagnoses, and lines about everything else."""

    word: str
    text: str = ""
    found: list[Diagnosis] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def summarize(comparison: MergeResult, landing: Landing) -> Summary:
    """Return the verdict on the whole merged model."""
    modules = comparison.modules
    wrong = [*_of_folder(comparison), *_of_modules(modules), *_of_names(comparison, landing), *_of_tensors(comparison)]
    right, lost, skipped = ([path for path, v in modules.items() if v.state == s] for s in (RIGHT, UNDECIDED, SKIPPED))
    notes = _notes(comparison)
    lines = [_counts(modules), *_rest(comparison), *(f"note: {text} [{code}]" for code, text in notes.items())]
    if wrong:
        return Summary(WRONG.upper(), found=wrong, lines=lines)
    whole = [name for name, verdict in comparison.others.items() if verdict.state == RIGHT]
    few = {name: v.text for name, v in comparison.others.items() if v.flag == "few-bits"}
    if skipped or few or not (right or whole):
        return Summary("UNDECIDED", _undecided(modules, lost, skipped, few), lines=lines)
    dtypes = "/".join(sorted({modules[path].dtype for path in right}))
    steps = max((modules[path].steps for path in right), default=0.0)
    parts = [f"{len(right)} of {counted(len(modules), 'module')}"] if modules else []
    parts += [f"{dtypes}, at most {steps:.2g} ulp from the exact sum"] if right else []
    parts += [f"{counted(len(whole), 'fully trained tensor')}"] if whole else []
    text = f"merged correctly ({', '.join(parts)})"
    text += f"; {len(lost)} cannot be decided, since rounding loses their change" if lost else ""
    text += "".join(f"; {also}" for also in notes.values())
    return Summary("RIGHT", text, lines=lines)


def _undecided(modules: dict[str, Verdict], lost: list[str], skipped: list[str], few: dict[str, str]) -> str:
    if few and not skipped:
        return (
            f"{counted(len(few), 'tensor')} cannot be compared: {next(iter(few.values()))}: {listed([*few], 'tensor')}"
        )
    if skipped:
        reason = modules[skipped[0]].text
        return f"{len(skipped)} of {counted(len(modules), 'module')} cannot be compared: {reason}"
    if not lost:
        return "the adapter has nothing to merge"
    dtype = "/".join(sorted({modules[path].dtype for path in lost}))
    return (
        f"cannot be decided: in all {counted(len(lost), 'module')} the change is zero or below half a step of {dtype}"
    )


# --- diagnoses ---


def _of_modules(modules: dict[str, Verdict]) -> list[Diagnosis]:
    """Return the diagnoses of wrong modules, the most frequent first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, verdict in modules.items():
        if verdict.state == WRONG:
            text = "the wrong change" if verdict.flag == "another-change" else verdict.text
            groups.setdefault((verdict.flag, text), []).append(path)
    right = [path for path, verdict in modules.items() if verdict.state == RIGHT]
    rest = f"; merged correctly: {subset_text(right, modules)}" if right else ""
    found = []
    for (flag, text), paths in sorted(groups.items(), key=lambda group: -len(group[1])):
        places = _exchanged(paths, modules) if flag == "another-change" else subset_text(paths, modules)
        count = f" ({len(paths)} of {len(modules)} modules)" if len(paths) < len(modules) else ""
        text = fill_in(text, [modules[path] for path in paths])
        found.append(Diagnosis(f"{text}: {places}{count}{rest}", flag, cases=tuple(paths)))
        rest = ""
    return found


def _exchanged(paths: list[str], modules: dict[str, Verdict]) -> str:
    """Describe which modules have which other module's change."""
    whose: dict[str, list[str]] = {}
    for path in paths:
        whose.setdefault(modules[path].text, []).append(path)
    parts = [f"{subset_text(of, modules)} with {fill_in(text, [modules[p] for p in of])}" for text, of in whose.items()]
    return ", ".join(parts[:3]) + (" and so on" if len(parts) > 3 else "")


def fill_in(text: str, verdicts: Sequence[Verdict]) -> str:
    """Return a verdict's text with {k} and {rest} replaced by the range of these numbers over all verdicts."""
    factors, rests = ([x for v in verdicts if (x := getattr(v, name)) is not None] for name in ("factor", "rest"))
    return text.replace("{k}", _between(factors, _factor)).replace("{rest}", _between(rests, _percent))


def _between(numbers: Sequence[float], form: Callable[[float], str]) -> str:
    return " to ".join(dict.fromkeys(form(n) for n in (min(numbers, default=0.0), max(numbers, default=0.0))))


def _factor(k: float) -> str:
    """Return a number with three digits, or with as many as show by how much it differs from 1."""
    apart = abs(k - 1)
    return f"{k:.{max(3, 1 - math.floor(math.log10(apart))) if 0 < apart < 1 else 3}g}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 or not share else f"{100 * share:.2g}%"


def _of_folder(comparison: MergeResult) -> Iterator[Diagnosis]:
    """Yield the diagnoses of the whole folder: it is not merged, or its base is a different one."""
    beside = [name for name, verdict in comparison.others.items() if verdict.flag == "factors-beside"]
    if beside:
        text = f"not merged: the folder has {counted(len(beside), 'tensor')} of an unmerged PeftModel"
        yield Diagnosis(text, "factors-beside", cases=tuple(beside))
    changed = _changed(comparison)
    if _is_other_base(comparison):
        of_all = f"{len(changed)} of {len(changed) + comparison.same} tensors without an adapter"
        text = f"merged into another base: {of_all} differ from this one by {fill_in('{rest}', [*changed.values()])}"
        yield Diagnosis(f"{text} of their size", "other-base", cases=tuple(changed))


def _changed(comparison: MergeResult) -> dict[str, Verdict]:
    return {name: verdict for name, verdict in comparison.others.items() if verdict.flag == "changed"}


def _is_other_base(comparison: MergeResult) -> bool:
    """Return whether most matrices without an adapter differ from the base, and no module is right."""
    right = any(verdict.state == RIGHT for verdict in comparison.modules.values())
    matrices = [name for name in _changed(comparison) if name not in comparison.vectors]
    return not right and bool(matrices) and len(matrices) >= comparison.same - comparison.same_vectors


def _of_names(comparison: MergeResult, landing: Landing) -> Iterator[Diagnosis]:
    """Yield the diagnoses of names: a prefix that no program loads, and modules that the base does not have."""
    for prefix, names in comparison.unloaded.items():
        one = len(names) == 1
        begin = f"begin{'s' * one} with {prefix!r}" if prefix else f"lack{'s' * one} the model's prefix"
        tensors = "the tensor" if one else "the tensors"
        text = f"{counted(len(names), 'name')} in the merged model {begin}, so transformers ignores {tensors}"
        yield Diagnosis(text, "prefix-not-loaded", cases=tuple(names))
    if landing.lost:
        are = "is" if len(landing.lost) == 1 else "are"
        text = f"{counted(len(landing.lost), 'module')} of the adapter {are} not in the base: {listed(landing.lost)}"
        yield Diagnosis(text, "module-unknown", cases=(*landing.lost,))


def _of_tensors(comparison: MergeResult) -> Iterator[Diagnosis]:
    """Yield the diagnoses of tensors that no module changes."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, verdict in comparison.others.items():
        if verdict.state == WRONG and verdict.flag != "factors-beside":
            groups.setdefault((verdict.flag, verdict.text), []).append(name)
    for (flag, text), names in groups.items():
        if flag != "changed" or not _is_other_base(comparison):
            text = fill_in(text, [comparison.others[name] for name in names])
            yield Diagnosis(f"{text}: {listed(names, 'tensor')}", flag, cases=tuple(names))


# --- descriptions of modules ---


def subset_text(paths: Collection[str], every: Collection[str]) -> str:
    """Describe a subset of all modules: "layers 0 to 13", "q_proj of layer 3", or their names."""
    chosen = {*paths}
    if len(chosen) == len(every) > 1:
        return f"all {len(every)} modules"
    kinds, layers = {module_kind(path) for path in chosen}, {_layer(path) for path in chosen}
    if None not in layers and len(chosen) > 1:
        numbers = ranges(sorted(n for n in layers if n is not None))
        said = f"layer{'s' * (len(layers) > 1)} {numbers}"
        if chosen == {path for path in every if _layer(path) in layers}:
            return said
        named = enumerated(sorted(kinds)) if len(kinds) < 6 else ""
        if named and chosen == {path for path in every if module_kind(path) in kinds}:
            return named
        if named and chosen == {path for path in every if module_kind(path) in kinds and _layer(path) in layers}:
            return f"{named} of {said}"
    return listed([*paths])


def _layer(path: str) -> int | None:
    match = BODY.search(path)
    return int(match[1]) if match else None


def ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers as a text of ranges: "0 to 13, 20"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


# --- other lines ---


def _counts(modules: dict[str, Verdict]) -> str:
    counts = Counter(verdict.state for verdict in modules.values())
    said = [f"{counts[state]} {state}" for state in (RIGHT, WRONG, UNDECIDED, SKIPPED) if counts[state]]
    return f"merged modules: {', '.join(said) or 'none'}"


def _rest(comparison: MergeResult) -> Iterator[str]:
    """Yield lines about the other tensors."""
    others = [name for name, verdict in comparison.others.items() if verdict.state == WRONG]
    yield f"other tensors: {comparison.same} equal the base's, {len(others)} differ"
    skipped = [f"{name}: {v.text}" for name, v in comparison.others.items() if v.state == SKIPPED]
    yield from (f"note: not compared: {text} [not-compared]" for text in skipped[:3])


def _notes(comparison: MergeResult) -> dict[str, str]:
    """Return texts about what a loader would not mind, by their codes."""
    grown, texts = comparison.grown, {}
    if grown:
        more = counted(max(grown.values()), "more row")
        texts["vocabulary-grown"] = f"{listed([*grown], 'tensor')} with {more}, whose values are not checked"
    if comparison.extra:
        texts["merged-alone"] = (
            f"{counted(len(comparison.extra), 'tensor')} only in the merged model: {listed(comparison.extra, 'tensor')}"
        )
    if comparison.renamed:
        texts["renamed"] = f"the names begin differently in the merged model: {comparison.renamed!r}"
    if comparison.numbering:
        texts["experts-numbered"] = (
            f"experts are numbered {comparison.numbering}: transformers reads them in this order"
        )
    if comparison.settings:
        texts["config-may-differ"] = f"config.json differs: {', '.join(comparison.settings[:3])}"
    return texts


def comparison_json(comparison: MergeResult) -> dict[str, Any]:
    """Return the comparison as data for JSON."""
    return {
        "path": str(comparison.merged.path), "same": comparison.same, "extra": comparison.extra,
        "grown": comparison.grown, "renamed": comparison.renamed,
        "modules": [{"module": path} | _verdict(verdict) for path, verdict in comparison.modules.items()],
        "tensors": [{"tensor": name} | _verdict(verdict) for name, verdict in comparison.others.items()],
    }  # fmt: skip


def _verdict(verdict: Verdict) -> dict[str, Any]:
    known = {key: value for key, value in vars(verdict).items() if not isinstance(value, float) or math.isfinite(value)}
    return dict.fromkeys(vars(verdict)) | known | {"text": fill_in(verdict.text, [verdict])}
