r"""What is in an adapter: per layer its shapes, its scaling, and how large its change is and in which directions.

The change :math:`s\,B A` is (out, in) and need not be formed. With B = Q_B R_B and A^T = Q_A R_A, its singular values
are those of the small matrix :math:`s\,R_B R_A^T`, since Q_B and Q_A only rotate.

An embedding's matrix is (dim, V), a convolution's (out, C K). Of DoRA this is the change before each row gets its
length: the whole change depends on the base, which the file does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_path
from .adapterfolder import AdapterFolder
from .kinds import Form

BLOCK_NUMBERS = 1 << 18
"""Numbers of a factor that are widened to float64 at a time."""
SHOWN = 8
"""Singular values whose share a line of the table shows."""


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer.

    Attributes
    ----------
    module : str
        The path of the module.
    out_features, in_features, rank : int
        B is (out, r), A is (r, in); for an embedding `in` is V, for a convolution C times the kernel's size.
    alpha : float
        ``lora_alpha`` as the configuration has it.
    scaling : float
        alpha / r, or alpha / sqrt(r) where it is rank-stabilised.
    parameters : int
        Numbers in A and B and, of DoRA, in the magnitude.
    norm : float
        The Frobenius norm of the change of weight.
    singular_values : numpy.ndarray
        Of the change of weight, those that its rank allows, the largest first.
    shares : numpy.ndarray
        The share of the squared norm in each; all zero where the change is zero.
    form : Form
        The kind of layer, its kernel, and whether it is DoRA.
    """

    module: str
    out_features: int
    in_features: int
    rank: int
    alpha: float
    scaling: float
    parameters: int
    norm: float
    singular_values: np.ndarray
    shares: np.ndarray
    form: Form


def inspect_adapter(path: str | Path) -> list[LayerSummary]:
    """Return a summary of each layer of an adapter in PEFT's layout.

    Raises
    ------
    AdapterFileError
        If it cannot be read.
    """
    folder = AdapterFolder.open(check_path("path", path))
    with folder.file.opened() as file:
        return [_summary(folder, module, *folder.read(module, file)) for module in folder.layers]


def _summary(folder: AdapterFolder, module: str, A: np.ndarray, B: np.ndarray, *magnitude: np.ndarray) -> LayerSummary:
    layer, (out_features, in_features) = folder.layers[module], folder.shapes(module)
    values = singular_values(A, B) * layer.scaling
    relative = values / values[0] if 0 < values[0] < np.inf else np.zeros_like(values)  # keeps the squares in range
    return LayerSummary(
        module=module,
        out_features=out_features,
        in_features=in_features,
        rank=layer.rank,
        alpha=layer.alpha,
        scaling=layer.scaling,
        parameters=A.size + B.size + sum(m.size for m in magnitude),
        norm=float(values[0] * np.linalg.norm(relative)) if relative.any() else float(values[0]),
        singular_values=values,
        shares=relative**2 / max(float((relative**2).sum()), 1.0),
        form=folder.forms[module],
    )


def singular_values(A: np.ndarray, B: np.ndarray) -> np.ndarray:  # (r, in), (out, r) -> (min(r, in, out),)
    """Return the singular values of B A in float64, the largest first."""
    sizes = [max(float(np.abs(factor).max()), 1e-300) for factor in (B, A)]
    left, right = (_triangle(factor, size) for factor, size in zip((B, A.T), sizes, strict=True))
    small = np.zeros((len(left.rows), len(right.rows)))
    for some in _blocks(A.shape[0], len(left.rows) + len(right.rows)):
        small += left[:, some] @ right[:, some].T
    with np.errstate(over="ignore"):  # of float64 factors near its end
        return np.asarray(np.linalg.svd(small, compute_uv=False) * sizes[0] * sizes[1])


class _Scaled:
    """A matrix divided by its size, in float64: parts of it are widened when they are asked for, never the whole."""

    def __init__(self, rows: np.ndarray, size: float) -> None:
        self.rows, self.size = rows, size

    def __getitem__(self, part: Any) -> np.ndarray:
        return np.asarray(self.rows[part], np.float64) / self.size


def _triangle(factor: np.ndarray, size: float) -> _Scaled:  # (n, r) -> (r, r) where n > r, else the factor itself
    """Return R of the QR decomposition of a factor divided by its size, taken some rows at a time."""
    n, r = factor.shape
    if n <= r:
        return _Scaled(factor, size)
    scaled, R = _Scaled(factor, size), np.zeros((0, r))
    for some in _blocks(n, r):
        R = np.asarray(np.linalg.qr(np.vstack([R, scaled[some]]), mode="r"))
    return _Scaled(R, 1.0)


def _blocks(count: int, width: int) -> Iterator[slice]:
    """Cut `count` rows of that width into slices: some megabytes of float64 each, and not fewer rows than columns."""
    height = max(width, BLOCK_NUMBERS // width)
    yield from (slice(start, start + height) for start in range(0, count, height))


def table(summaries: list[LayerSummary]) -> str:
    """Return the summaries as a table, for a terminal. Plain linear layers alone need no column of kinds."""
    head = ("module", "kind", "out x in", "rank", "alpha", "scaling", "parameters", "|delta|")
    lines = [(*head, "share of each singular value")]
    for s in summaries:
        shares = " ".join(f"{100 * share:.1f}%" for share in s.shares[:SHOWN]) + " ..." * (len(s.shares) > SHOWN)
        numbers = (f"{s.rank}", f"{s.alpha:g}", f"{s.scaling:.4g}", f"{s.parameters:,}", f"{s.norm:.4g}")
        lines.append((s.module, str(s.form), f"{s.out_features} x {s.in_features}", *numbers, shares))
    lines.append(("total", "", "", "", "", "", f"{sum(s.parameters for s in summaries):,}", "", ""))
    if all(s.form == Form() for s in summaries):
        return align([(module, *rest) for module, _, *rest in lines], left={0, 7})
    return align(lines, left={0, 1, 8})


def align(lines: Sequence[tuple[str, ...]], left: set[int]) -> str:
    """Return rows of text as columns, those in `left` flush left and the others flush right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
