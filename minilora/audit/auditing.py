"""The audit of an adapter, alone or in a model, with its report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import Diagnosis, Report
from ..texts import align
from . import changes, contents, fitting, formats, keys, landing, merging, numbers, verdicts
from .changes import STORED_FORMATS, MergeLoss, Sums
from .contents import Coverage, module_kind
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted
from .headers import AdapterFile, Module, open_model
from .landing import Landing
from .numbers import Measured, rms_of

MODULES_SHOWN = 12
"""The most modules that are shown one by one; if there are more, kinds are shown, or with ``--all`` every module."""


def audit(
    adapter: Path, model: Path | None = None, *, merge: bool = False, merged: Path | None = None, progress: bool = False
) -> AuditReport:
    """Check an adapter alone, against the headers of a model, or against a model that it was merged into.

    Parameters
    ----------
    adapter : path
        A PEFT or mlx-lm folder, a .gguf file, or a safetensors file with PEFT's, MLX's or kohya's tensor names.
    model : path, optional
        The base: a Hugging Face folder, only its weights, or a .gguf file.
    merge : bool
        Whether to read the model's weights and report what merging would lose.
    merged : path, optional
        A merged model, in any of the formats of `model`. The verdict is then whether it is `model` with the adapter
        merged into it.
    progress : bool
        Whether to show a progress bar on stderr if that is a terminal.

    Returns
    -------
    AuditReport
        The findings. ``report.status`` is 0 if the adapter is sound, and 1 if not. With `merged` it is 0 if the merged
        model is right, 1 if it is wrong, and 2 if that cannot be decided.

    Raises
    ------
    FileRefused
        If the adapter or a model cannot be read.
    ValueError
        If `merge` or `merged` is given without `model`.
    """
    if merge and model is None:
        raise ValueError("--merge needs --model: it compares the change with the weights")
    if merged is not None and model is None:
        raise ValueError("--merged needs --model, the base: a merged weight alone looks like a trained one")
    file = formats.open_adapter(adapter)
    landed = None if model is None else landing.land(file, open_model(model))
    if landed is not None:
        fitting.check_shapes(file, landed)
    read = {path: numbers.read_numbers(module) for path, module in file.modules.items()}
    found: list[Finding] = [*formats.empty(file), *file.findings, *formats.without_config(file)]
    found += (finding for rule in numbers.RULES for finding in rule(file, read))
    if landed is None:
        found += landing.wrapped(file)
    else:
        found += (finding for rule in (*landing.RULES, *fitting.RULES) for finding in rule(file, landed))
    found += (finding for rule in contents.rules_of(file) for finding in rule(file, landed))
    if file.is_peft:
        found += (finding for rule in keys.RULES for finding in rule(file))
    losses: dict[str, MergeLoss | None] | None = None
    if merge and landed is not None:
        losses = changes.losses(file, landed, read)
        found += (finding for rule in changes.RULES for finding in rule(losses))
    comparison = None
    if merged is not None and landed is not None:
        comparison = merging.compare_merged(file, landed, open_model(merged), progress=progress)
    name = (merged or file.path).name or str(merged or file.path)
    return AuditReport(
        name, "audit", adapter=file, landing=landed, numbers=read, findings=found,
        kinds=contents.coverage(file, landed), merged=losses, comparison=comparison,
    )  # fmt: skip


@dataclass(repr=False)
class AuditReport(Report):
    """The report of an audit: the findings, the file's format, its modules, where they land, and what merging loses."""

    adapter: AdapterFile = field(kw_only=True)
    numbers: dict[str, Measured] = field(kw_only=True)  # by module
    findings: list[Finding] = field(kw_only=True)
    kinds: list[Coverage] = field(kw_only=True)
    landing: Landing | None = None  # None without a model
    merged: dict[str, MergeLoss | None] | None = None  # what merging loses; None without `merge`
    comparison: merging.MergeResult | None = None  # None without a merged model

    def __post_init__(self) -> None:
        """Fill in the fields of every report: findings that are wrong or suspicious become its diagnoses."""
        self.rms = {path: rms_of(m, self.numbers[path].norm) for path, m in self.adapter.modules.items()}
        self.shares = {path: self._share(path) for path in self.adapter.modules}
        serious, notes = [*self.of(WRONG), *self.of(SUSPICIOUS)], self.of(NOTE)
        if self.comparison is not None and self.landing is not None:
            summary = verdicts.summarize(self.comparison, self.landing)
            self.word, self.text, self.found = summary.word, summary.text, summary.found
            self.lines += [*summary.lines, self._description()]
            self.lines += [f"the adapter itself: {f.level}: {f.text} [{f.code}]" for f in serious]
        else:
            self._sound(serious, notes)
        self.lines += [f"note: {finding.text} [{finding.code}]" for finding in notes]
        self.lines.append(f"{self.adapter.bytes:,} bytes in {self.adapter.tensors.path}")
        self.lines += [*self._coverage(), *self._merge()]
        each = [[path] for path in self.adapter.modules]
        of_kinds: dict[str, list[str]] = {}
        for path in self.adapter.modules:
            of_kinds.setdefault(module_kind(path), []).append(path)
        self.rows += [*self.lines, *self._table(each)]
        self.lines += self._table(each if len(each) <= MODULES_SHOWN else of_kinds.values())
        self.not_offered += [] if self.landing else ["whether the modules land (--model)"]
        self.not_offered += ["what merging loses (--merge)"] if self.merged is None else []
        self.details |= self._details()

    def _sound(self, serious: list[Finding], notes: list[Finding]) -> None:
        """Fill in the verdict on the adapter itself, without a merged model."""
        self.word = serious[0].level.upper() if serious else "SOUND"
        for finding in serious:
            level = "" if finding.level == serious[0].level else f"{finding.level}: "
            self.found.append(Diagnosis(f"{level}{finding.text}", finding.code, cases=finding.modules))
        if serious:
            self.lines.append(self._description())
        else:
            self.text = self._description() + (f"; {counted(len(notes), 'note')}" if notes else "")

    def _share(self, path: str) -> float | None:
        """Return a change's size relative to the weight's: estimated from pieces, or exact if all of it was read."""
        if self.landing is None:
            return None
        loss = (self.merged or {}).get(path)
        if loss is not None:
            return loss.relative
        return changes.relative_rms(self.landing, self.adapter.modules[path], self.rms[path])

    def of(self, level: str) -> list[Finding]:
        """Return the findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def _description(self) -> str:
        """Return a line that describes the file: format, ranks, scaling, size, and how many modules the model has."""
        modules = self.adapter.modules.values()
        types = sorted({m.tensors.dtypes[name] for m in modules for name in m.parts.values()})
        ranks, scalings = (m.rank_in_file for m in modules), (m.scaling for m in modules)
        parts = [f"{self.adapter.format} of {counted(len(modules), 'module')}"]
        parts += [f"rank {rank}"] if (rank := _range(ranks)) else []
        parts.append(f"scaling {_range(scalings) or 'unknown'}")
        parts.append(f"{self.adapter.numbers:,} numbers in {'/'.join(types) or 'no tensors'}")
        if self.landing is None:
            return ", ".join([*parts, "not looked up in a model"])
        path = self.landing.model.path
        return ", ".join([*parts, f"{self.landing.found} of {len(modules)} found in {path.name or path}"])

    def _coverage(self) -> list[str]:
        if self.landing is None:
            return [f"modules: {', '.join(f'{kind.name} in {kind.adapted}' for kind in self.kinds) or 'none'}"]
        kinds = ", ".join(f"{kind.name} {kind.adapted} of {kind.total}" for kind in self.kinds)
        fitting, packed = len(self.landing.fitting), len(self.landing.packed)
        few = f"; {packed} not compared, since those weights are quantised" if packed else ""
        lost = [f"not found in the model: {path}" for path in self.landing.lost]
        return [f"modules: {kinds}", *lost, f"shapes: {fitting} fit{few}"]

    def _merge(self) -> list[str]:
        if self.merged is None:
            return []
        lines = ["merging: the share of the change that is kept, plus the noise that is added, relative to the change"]
        lines += [f"  {name:9} {self._sums(name, self.merged)}" for name in STORED_FORMATS]
        skipped = sum(loss is None for loss in self.merged.values())
        lines += [f"  not checked, quantised or of another shape: {counted(skipped, 'module')}"] if skipped else []
        return lines

    def _sums(self, name: str, paths: Iterable[str]) -> Sums:
        """Return the summed losses of merging some modules in one format."""
        sums, losses = Sums(), ((self.merged or {}).get(path) for path in paths)
        for loss in losses:
            if loss is not None and name in loss.formats:
                sums += loss.formats[name]
        return sums

    def _table(self, groups: Iterable[list[str]]) -> list[str]:
        """Return a table with a row for each group of modules: one module, or all modules of a kind."""
        rows = [["module", "kind", "out x in", "rank", "scaling", "|delta W|", "RMS"]]
        rows[0] += ["/ W's RMS"] if self.landing is not None else []
        rows[0] += [] if self.merged is None else [*STORED_FORMATS]
        for paths in groups:
            modules = [self.adapter.modules[path] for path in paths]
            first = paths[0] if len(paths) == 1 else f"{module_kind(paths[0])} in {len(paths)}"
            row = [first, _common({_kind(m) for m in modules}), _common({_shape_text(m) for m in modules})]
            row += [_range(m.rank_in_file for m in modules) or "-", _range(m.scaling for m in modules) or "-"]
            row += [_range(self.numbers[path].norm for path in paths) or "-"]
            row += [_range((self.rms[path] for path in paths), "{:.2g}") or "-"]
            row += [_range((self.shares[path] for path in paths), "{:.2g}") or "-"] if self.landing is not None else []
            row += [] if self.merged is None else [str(self._sums(name, paths)) for name in STORED_FORMATS]
            rows.append(row)
        return align(rows, left={0, 1})

    def _details(self) -> dict[str, Any]:
        adapter, landed = self.adapter, self.landing is not None
        return {
            "adapter": {
                "path": str(adapter.path), "file": str(adapter.tensors.path), "format": adapter.format,
                "numbers": adapter.numbers, "bytes": adapter.bytes,
            },
            "model": str(self.landing.model.path) if self.landing else None,
            "findings": [vars(finding) | {"modules": list(finding.modules)} for finding in self.findings],
            "kinds": [{"kind": k.name, "adapted": k.adapted, "total": k.total if landed else None} for k in self.kinds],
            "modules": [self._module(path, module) for path, module in adapter.modules.items()],
            "merged": None if self.comparison is None else verdicts.comparison_json(self.comparison),
        }  # fmt: skip

    def _module(self, path: str, m: Module) -> dict[str, Any]:
        norm, loss, landed = self.numbers[path].norm, (self.merged or {}).get(path), self.landing
        lost = {name: {"kept": sums.kept, "noise": sums.noise} for name, sums in (loss.formats if loss else {}).items()}
        return {
            "module": path, "kind": m.kind, "experts": m.experts, "shape": list(m.widths) if m.widths else None,
            "rank": m.rank_in_file, "alpha": m.alpha, "scaling": m.scaling,
            "delta": norm if norm is None or math.isfinite(norm) else None, "rms": self.rms[path],
            "share": self.shares[path],
            "weight": landed.places.get(path) if landed else None, "fits": path in landed.fitting if landed else None,
            "merged": {"relative": loss.relative, **lost} if loss else None,
        }  # fmt: skip


def _kind(module: Module) -> str:
    if module.kind == "experts":
        return f"{module.experts} experts"
    return module.kind + (" DoRA" if "magnitude" in module.parts else "")


def _shape_text(module: Module) -> str:
    return " x ".join(map(str, module.widths)) if module.widths else "-"


def _common(texts: set[str]) -> str:
    """Return the text that all modules of a group share, or "several"."""
    return texts.pop() if len(texts) == 1 else "several"


def _range(values: Iterable[float | None], form: str = "{:.4g}") -> str:
    """Return the only value, or the smallest and the largest; "" if none is known."""
    known = sorted({value for value in values if value is not None})
    ends = known if len(known) < 2 else [known[0], known[-1]]
    return " to ".join(form.format(value) for value in ends)
