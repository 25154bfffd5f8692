"""The floating-point types of tensors in files, with the rounding to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_dtypes import bfloat16

FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "BF16": np.dtype(bfloat16), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")
}  # fmt: skip
"""NumPy's dtypes for the supported types of the safetensors format."""


def cast(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast numbers to another dtype; out of its range they become infinite. All written files are rounded here.

    float64 is rounded to float32 first and then to bfloat16, as in torch. ml_dtypes did so up to 0.6, and rounds once
    since 0.7: 1 + 2^-8 + 2^-30 became 1.0, and now becomes 1.0078125. Files must not depend on its version.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dtype(dtype) == bfloat16 and numbers.dtype.itemsize > 4:
            numbers = numbers.astype(np.float32)
        return numbers.astype(dtype, copy=False)
