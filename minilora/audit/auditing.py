"""The audit: an adapter's files read, looked up in a model, and judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .adapteropening import open_adapter
from .auditreport import AuditReport
from .configkeys import key_findings
from .findings import NOTE, SUSPICIOUS, Finding, listed
from .landing import Landing, land
from .mergeloss import Loss, losses
from .modelheaders import open_model
from .numbers import number_findings, numbers_of
from .peftadapter import own_findings
from .shapes import compare_shapes
from .targets import coverage, target_findings


def audit(adapter: Path, model: Path | None = None, *, merge: bool = False) -> AuditReport:
    """Look at an adapter, and at the headers of the model that it is for.

    Parameters
    ----------
    adapter : path
        A folder of PEFT's or of mlx-lm's, a .gguf file, or a safetensors file with the names of PEFT, MLX or kohya.
    model : path, optional
        A folder of Hugging Face's layout, weights alone, or a .gguf file.
    merge : bool
        Whether to read the model's weights, and to say what merging would lose.

    Returns
    -------
    AuditReport
        What was found; ``report.status`` is 0 where the adapter is sound, and 1 where it is not.

    Raises
    ------
    FileRefused
        If one of the two cannot be looked at.
    ValueError
        If `merge` is asked for without a model.
    """
    if merge and model is None:
        raise ValueError("--merge needs --model: it compares the change with the weights")
    file = open_adapter(adapter)
    headers = None if model is None else open_model(model)
    landing = Landing()
    if headers is not None:
        landing = land(file, headers)
        compare_shapes(file, headers, landing)
    numbers = {path: numbers_of(file, module) for path, module in file.modules.items()}
    findings = [*file.findings, *number_findings(file, numbers), *landing.findings]
    if file.config is not None and "PEFT" in file.format:
        findings += own_findings(file, headers.modules if headers is not None else ())
    findings += [
        *target_findings(file, headers, landing if headers is not None else None), *key_findings(file),
    ]  # fmt: skip
    merged: dict[str, Loss | None] | None = None
    if merge and headers is not None:
        merged = dict(losses(file, headers, landing, numbers))
        findings += _merge_findings(merged)
    kinds = coverage(file, headers, landing if headers is not None else None)
    return AuditReport(
        file.path.name or str(file.path),
        "audit",
        adapter=file,
        model=headers,
        landing=landing,
        numbers=numbers,
        findings=findings,
        kinds=list(kinds),
        merged=merged,
    )


def _merge_findings(merged: dict[str, Loss | None]) -> Iterator[Finding]:
    """Yield what the weights show: a magnitude on the other axis, a change larger than the weight."""
    other = [path for path, loss in merged.items() if loss is not None and (loss.magnitudes or 0) > 1.5]
    if other:
        text = (
            f"the magnitude of {listed(other)} is nearer to the lengths of the weight's columns than to those of "
            "its rows: it lies on the other axis, which a square weight's shape does not show"
        )
        yield Finding(SUSPICIOUS, "magnitude-axis", text, tuple(other))
    if large := [path for path, loss in merged.items() if loss is not None and loss.relative > 1]:
        yield Finding(
            NOTE, "change-above-weight", f"the change is larger than the weight itself: {listed(large)}", tuple(large)
        )
