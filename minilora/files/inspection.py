"""Summaries of an adapter's layers: shapes, scaling, and the norm and singular values of the change.

The change s B A is (out, in) and is never formed; `minilora.variants.sums` computes its singular values from the
factors.

An embedding's matrix is (dim, V), a convolution's (out, C K). A mixture's array has one adapter per expert; the norm
and the singular values cover all of them. For DoRA this is the change before the rows are rescaled: the full change
depends on the base, which is not in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checks import check_path
from ..lora import LoRA
from ..variants import sums
from ..variants.stackedlora import stacked_A, stacked_B
from .peft import AdaptedModule, AdapterFolder


@dataclass(frozen=True)
class LayerSummary:
    """The summary of one adapted layer."""

    path: str
    module: AdaptedModule  # the kind of layer, the shape (out, in) of its matrix, rank, alpha and scaling
    parameters: int  # the number of entries of A, B and, with DoRA, the magnitude
    norm: float  # the Frobenius norm of the change of weight
    singular_values: np.ndarray  # of the change of weight, largest first; float64
    shares: np.ndarray  # the share of the squared norm in each singular value; all zero if the change is zero


def inspect_adapter(path: str | Path) -> list[LayerSummary]:
    """Return a summary of each layer of an adapter; warn if the file also contains a base weight."""
    folder = AdapterFolder.open(check_path("path", path))
    folder.warn_of_base()
    return [_summary(path, module, *folder.read(path)) for path, module in folder.modules.items()]


def _summary(path: str, module: AdaptedModule, A: np.ndarray, B: np.ndarray, *more: np.ndarray) -> LayerSummary:
    experts = module.form.experts or 1
    pairs = zip(stacked_A(A, experts), stacked_B(B, experts), strict=True)
    values = -np.sort(-np.concatenate([product_spectrum(*pair) for pair in pairs])) * module.scaling
    relative = values / values[0] if 0 < values[0] < np.inf else np.zeros_like(values)  # keeps the squares in range
    norm = float(values[0] * np.linalg.norm(relative)) if relative.any() else float(values[0])
    shares = relative**2 / max(float((relative**2).sum()), 1.0)
    return LayerSummary(path, module, sum(array.size for array in (A, B, *more)), norm, values, shares)


def product_spectrum(A: np.ndarray, B: np.ndarray) -> np.ndarray:  # (r, in), (out, r) -> (min(r, in, out),)
    """Return the singular values of B A in float64, largest first, even if their products overflow."""
    size_A, size_B = (max(float(np.abs(factor).max()), 1e-300) for factor in (A, B))
    scaled = LoRA(np.asarray(A, np.float64) / size_A, np.asarray(B, np.float64) / size_B, len(A))
    with np.errstate(over="ignore"):  # for float64 factors near the end of their range
        return np.asarray(sums.singular_values(scaled) * size_A * size_B)
