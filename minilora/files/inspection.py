"""What is in an adapter: per layer its shapes, its scaling, and how large its change is and in which directions.

The change s B A is (out, in) and is never formed: `minilora.variants.sums` takes its singular values from the factors.

An embedding's matrix is (dim, V), a convolution's (out, C K). An adapter of a mixture's array is one for each expert:
norm and singular values are those of all of them. Of DoRA this is the change before each row gets its
length: the whole change depends on the base, which the file does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checks import check_path
from ..lora import LoRA
from ..variants import sums
from ..variants.stackedlora import stacked_A, stacked_B
from .peft import AdapterFolder, Form


@dataclass(frozen=True)
class LayerSummary:
    """One adapted layer."""

    module: str  # its path
    out_features: int  # of the matrix: B is (out, r)
    in_features: int  # A is (r, in): for an embedding V, for a convolution C times the kernel's size
    rank: int
    alpha: float  # lora_alpha as the configuration has it
    scaling: float  # alpha / r, or alpha / sqrt(r) where it is rank-stabilised
    parameters: int  # numbers in A and B and in a variant's further array
    norm: float  # the Frobenius norm of the change of weight
    singular_values: np.ndarray  # of the change of weight, those that its rank allows, the largest first; float64
    shares: np.ndarray  # of the squared norm, in each singular value; all zero where the change is zero
    form: Form  # the kind of layer, its kernel, and the variant


def inspect_adapter(path: str | Path) -> list[LayerSummary]:
    """Return a summary of each layer of an adapter; a UserWarning says if a base's own weight is there too."""
    folder = AdapterFolder.open(check_path("path", path))
    folder.warn_of_base()
    return [_summary(folder, path) for path in folder.modules]


def _summary(folder: AdapterFolder, path: str) -> LayerSummary:
    A, B, *magnitude = folder.read(path)
    module, experts = folder.modules[path], folder.modules[path].form.experts or 1
    pairs = zip(stacked_A(A, experts), stacked_B(B, experts), strict=True)
    values = -np.sort(-np.concatenate([singular_values(*pair) for pair in pairs])) * module.scaling
    relative = values / values[0] if 0 < values[0] < np.inf else np.zeros_like(values)  # keeps the squares in range
    return LayerSummary(
        module=path,
        out_features=module.shape[0],
        in_features=module.shape[1],
        rank=module.rank,
        alpha=module.alpha,
        scaling=module.scaling,
        parameters=sum(array.size for array in (A, B, *magnitude)),
        norm=float(values[0] * np.linalg.norm(relative)) if relative.any() else float(values[0]),
        singular_values=values,
        shares=relative**2 / max(float((relative**2).sum()), 1.0),
        form=module.form,
    )


def singular_values(A: np.ndarray, B: np.ndarray) -> np.ndarray:  # (r, in), (out, r) -> (min(r, in, out),)
    """Return the singular values of B A in float64, the largest first, also where a product leaves its range."""
    size_A, size_B = (max(float(np.abs(factor).max()), 1e-300) for factor in (A, B))
    scaled = LoRA(np.asarray(A, np.float64) / size_A, np.asarray(B, np.float64) / size_B, len(A))
    with np.errstate(over="ignore"):  # of float64 factors near its end
        return np.asarray(sums.singular_values(scaled) * size_A * size_B)
