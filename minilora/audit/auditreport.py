"""What an audit found, as a report: findings, what the file is, where it lands, what merging loses, its modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..conformance.report import Diagnosis, Report
from .adapterfile import AdapterFile
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted
from .landing import Landing
from .mergeloss import FORMATS, Loss, Sums
from .modelheaders import ModelHeaders
from .numbers import Numbers
from .targets import Kind


@dataclass(repr=False)
class AuditReport(Report):
    """What an audit found."""

    adapter: AdapterFile = field(kw_only=True)
    model: ModelHeaders | None = None
    landing: Landing = field(default_factory=Landing)
    numbers: dict[str, Numbers] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)
    merged: dict[str, Loss | None] | None = None  # what merging loses, where that was asked for

    def __post_init__(self) -> None:
        """Say it all as every report does: the heaviest findings are the diagnoses."""
        serious = [*self.of(WRONG), *self.of(SUSPICIOUS)]
        self.word = serious[0].level.upper() if serious else "SOUND"
        for finding in serious:
            level = "" if finding.level == serious[0].level else f"{finding.level}: "
            self.found.append(Diagnosis(f"{level}{finding.text}", finding.code, cases=finding.modules))
        if not serious:
            notes = len(self.of(NOTE))
            self.text = f"{self._what()}{self._where()}" + (f"; {counted(notes, 'note')}" if notes else "")
        self.not_offered += [] if self.model else ["whether the modules land (--model)"]
        self.not_offered += ["what merging loses (--merge)"] if self.merged is None else []
        self.lines += [] if self.text else [f"{self._what()}{self._where()}"]
        self.lines += [f"note: {finding.text} [{finding.code}]" for finding in self.of(NOTE)]
        self.lines += [
            f"{self.adapter.bytes:,} bytes in {self.adapter.tensors.path}",
            *self._coverage(),
            *self._merge(),
        ]
        self.rows += [*self.lines, *self._modules()]
        self.details |= self._details()

    def of(self, level: str) -> list[Finding]:
        """Return the findings of one weight."""
        return [finding for finding in self.findings if finding.level == level]

    def _what(self) -> str:
        """Say what the file is."""
        tensors, modules = self.adapter.tensors, self.adapter.modules
        types = sorted({tensors.dtypes[name] for m in modules.values() for name in m.parts.values()})
        ranks = sorted({m.rank_in_file(tensors) for m in modules.values()} - {None})  # type: ignore[type-var]
        scalings = sorted({m.scaling for m in modules.values() if m.scaling is not None})
        parts = [f"{self.adapter.format} of {counted(len(modules), 'module')}"]
        if ranks:
            parts.append(f"rank {_range(ranks)}")
        parts.append(f"scaling {_range(scalings)}" if scalings else "scaling unknown")
        parts.append(f"{self.adapter.numbers:,} numbers in {'/'.join(types) or 'no tensors'}")
        return ", ".join(parts)

    def _where(self) -> str:
        if self.model is None:
            return ", not looked up in a model"
        landed, count = len(self.landing.places) - len(self.landing.misnamed), len(self.adapter.modules)
        return f", {landed} of {count} found in {self.model.path.name or self.model.path}"

    def _coverage(self) -> list[str]:
        if self.model is None:
            return [f"modules: {', '.join(f'{kind.name} in {kind.adapted}' for kind in self.kinds) or 'none'}"]
        kinds = ", ".join(f"{kind.name} {kind.adapted} of {kind.total}" for kind in self.kinds)
        fitting, packed = len(self.landing.fitting), len(self.landing.packed)
        few = f"; {packed} not compared, where the weights are in few bits" if packed else ""
        lost = [f"not found in the model: {path}" for path in self.landing.lost]
        return [f"modules: {kinds}", *lost, f"shapes: {fitting} fit{few}"]

    def _merge(self) -> list[str]:
        if self.merged is None:
            return []
        whole = {name: Sums() for name in FORMATS}
        for loss in self.merged.values():
            for name, sums in (loss.formats if loss else {}).items():
                whole[name].meant += sums.meant
                whole[name].along += sums.along
                whole[name].whole += sums.whole
        lines = ["merging: of the change, the part that is kept along its direction, and the noise beside it"]
        lines += [f"  {name:9} {_loss(sums)}" for name, sums in whole.items()]
        skipped = sum(loss is None for loss in self.merged.values())
        return lines + (
            [f"  not looked at, where experts or few bits: {counted(skipped, 'module')}"] if skipped else []
        )

    def _modules(self) -> list[str]:
        head = ["module", "kind", "out x in", "rank", "scaling", "|delta W|"]
        if self.merged is not None:
            head += ["/ |W|", *FORMATS]
        rows = [tuple(head)]
        for path, m in self.adapter.modules.items():
            widths, norm = m.widths(self.adapter.tensors), self.numbers[path].norm
            rank = m.rank_in_file(self.adapter.tensors)
            kind = (
                f"{m.experts} experts" if m.kind == "experts" else m.kind + (" DoRA" if "magnitude" in m.parts else "")
            )
            row = [
                path, kind, " x ".join(map(str, widths)) if widths else "-", f"{rank or '-'}",
                "-" if m.scaling is None else f"{m.scaling:.4g}", "-" if norm is None else f"{norm:.4g}",
            ]  # fmt: skip
            if self.merged is not None:
                loss = self.merged.get(path)
                row.append(f"{loss.relative:.2g}" if loss else "-")
                row += [_loss(loss.formats[name]) if loss and name in loss.formats else "-" for name in FORMATS]
            rows.append(tuple(row))
        return _aligned(rows)

    def _details(self) -> dict[str, Any]:
        adapter, total = self.adapter, self.model is not None
        return {
            "adapter": {
                "path": str(adapter.path),
                "file": str(adapter.tensors.path),
                "format": adapter.format,
                "numbers": adapter.numbers,
                "bytes": adapter.bytes,
            },
            "model": str(self.model.path) if self.model else None,
            "findings": [vars(finding) | {"modules": list(finding.modules)} for finding in self.findings],
            "kinds": [{"kind": k.name, "adapted": k.adapted, "total": k.total if total else None} for k in self.kinds],
            "modules": [self._module(path) for path in adapter.modules],
        }

    def _module(self, path: str) -> dict[str, Any]:
        m, n, tensors = self.adapter.modules[path], self.numbers[path], self.adapter.tensors
        loss = (self.merged or {}).get(path)
        widths = m.widths(tensors)
        merged = None if loss is None else {
            "relative": loss.relative,
            **{name: {"kept": sums.part, "noise": sums.noise} for name, sums in loss.formats.items()},
        }  # fmt: skip
        norm = n.norm if n.norm is None or math.isfinite(n.norm) else None
        return {
            "module": path, "kind": m.kind, "experts": m.experts, "shape": list(widths) if widths else None,
            "rank": m.rank_in_file(tensors), "alpha": m.alpha, "scaling": m.scaling, "delta": norm,
            "weight": self.landing.places.get(path), "fits": path in self.landing.fitting if self.model else None,
            "merged": merged,
        }  # fmt: skip


def _range(values: list[Any]) -> str:
    """Return one value, or the smallest and the largest of several."""
    return f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"


def _loss(sums: Sums) -> str:
    return f"{sums.part:.1%} + {sums.noise:.2g}" if sums.meant else "-"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
