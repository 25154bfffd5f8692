"""What an audit found, as text and for programs. The first line is made to be pasted into an issue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..checks import printable
from .adapterfile import AdapterFile
from .findings import LEVELS, NOTE, SUSPICIOUS, WRONG, Finding, counted
from .landing import Landing
from .mergeloss import FORMATS, Loss, Sums
from .modelheaders import ModelHeaders
from .numbers import Numbers
from .targets import Kind

FORMAT = 1
"""The version of what `Report.json` returns."""


@dataclass(frozen=True)
class Report:
    """What an audit found."""

    adapter: AdapterFile
    model: ModelHeaders | None
    landing: Landing
    numbers: dict[str, Numbers]
    findings: tuple[Finding, ...]
    kinds: tuple[Kind, ...]
    merged: dict[str, Loss | None] | None  # what merging loses, where that was asked for

    @property
    def status(self) -> int:
        """The exit code: 0 of a sound adapter, with notes or without, and 1 of another."""
        return 0 if self.word == "SOUND" else 1

    @property
    def word(self) -> str:
        """The verdict in a word."""
        levels = {finding.level for finding in self.findings}
        return "WRONG" if WRONG in levels else "SUSPICIOUS" if SUSPICIOUS in levels else "SOUND"

    def of(self, level: str) -> list[Finding]:
        """Return the findings of one weight."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def first_line(self) -> str:
        """The verdict in a line."""
        name, count = self.adapter.path.name or str(self.adapter.path), len(self.of(NOTE))
        if self.word == "SOUND":
            notes = f"; {counted(count, 'note')}" if count else ""
            return f"{name}: SOUND: {self._what()}{self._where()}{notes}"
        serious = [*self.of(WRONG), *self.of(SUSPICIOUS)]
        more = f" (and {counted(len(serious) - 1, 'more finding')})" if len(serious) > 1 else ""
        return f"{name}: {self.word}: {serious[0].text}{more} [{serious[0].code}]; {self._what()}{self._where()}"

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

    def __str__(self) -> str:
        lines = [self.first_line, ""]
        lines += self._findings()
        lines += self._coverage()
        lines += self._merge()
        lines += self._modules()
        return "\n".join(printable(line, 10_000) for line in lines)

    def _findings(self) -> list[str]:
        lines = [f"{f.level:10}  {f.text} [{f.code}]" for level in LEVELS for f in self.of(level)]
        lines += ["nothing to say"] if not lines else []
        return [*lines, f"{self.adapter.bytes:,} bytes in {self.adapter.tensors.path}", ""]

    def _coverage(self) -> list[str]:
        if self.model is None:
            kinds = ", ".join(f"{kind.name} in {kind.adapted}" for kind in self.kinds)
            return [f"modules: {kinds or 'none'}; whether they land was not looked at: it needs --model", ""]
        kinds = ", ".join(f"{kind.name} {kind.adapted} of {kind.total}" for kind in self.kinds)
        lines = [f"modules: {kinds}"]
        lines += [f"not found in the model: {path}" for path in self.landing.lost]
        fitting, packed = len(self.landing.fitting), len(self.landing.packed)
        lines.append(
            f"shapes: {fitting} fit" + (f"; {packed} not compared, where the weights are in few bits" if packed else "")
        )
        return [*lines, ""]

    def _merge(self) -> list[str]:
        if self.merged is None:
            return ["|delta W| / |W| and what merging loses were not looked at: --merge reads the model's weights", ""]
        whole = {name: Sums() for name in FORMATS}
        for loss in self.merged.values():
            for name, sums in (loss.formats if loss else {}).items():
                whole[name].meant += sums.meant
                whole[name].along += sums.along
                whole[name].whole += sums.whole
        lines = ["merging: of the change, the part that is kept along its direction, and the noise beside it"]
        for name, sums in whole.items():
            lines.append(f"  {name:9} {_loss(sums)}")
        skipped = [path for path, loss in self.merged.items() if loss is None]
        lines += [f"  not looked at, where experts or few bits: {counted(len(skipped), 'module')}"] if skipped else []
        return [*lines, ""]

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

    def json(self) -> dict[str, Any]:
        """Return the same for programs."""
        tensors = self.adapter.tensors
        return {
            "format": FORMAT, "minilora": __version__, "first_line": printable(self.first_line, 10_000),
            "verdict": self.word.lower(), "status": self.status,
            "adapter": {
                "path": str(self.adapter.path), "file": str(tensors.path), "format": self.adapter.format,
                "numbers": self.adapter.numbers, "bytes": self.adapter.bytes,
            },
            "model": None if self.model is None else str(self.model.path),
            "findings": [
                {"level": f.level, "code": f.code, "text": f.text, "modules": list(f.modules)} for f in self.findings
            ],
            "kinds": [
                {"kind": k.name, "adapted": k.adapted, "total": k.total if self.model else None} for k in self.kinds
            ],
            "modules": [self._module(path) for path in self.adapter.modules],
        }  # fmt: skip

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
