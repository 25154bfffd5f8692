"""The floating-point types that files have, and how numbers are rounded to them."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_dtypes import bfloat16

FLOATS: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"), "BF16": np.dtype(bfloat16), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")
}  # fmt: skip
"""The types of the safetensors format that we compute with, in NumPy."""


def cast(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Return numbers in another type; beyond its range they are infinite. All that goes into a file is rounded here.

    float64 is rounded to float32 first, and then to bfloat16, as torch does. ml_dtypes itself did so up to 0.6, and
    rounds once since 0.7: 1 + 2^-8 + 2^-30 became 1.0, and becomes 1.0078125. What we write must not depend on that.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dtype(dtype) == bfloat16 and numbers.dtype.itemsize > 4:
            numbers = numbers.astype(np.float32)
        return numbers.astype(dtype, copy=False)
