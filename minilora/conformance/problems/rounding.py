"""Precisions: how far apart their numbers lie, and rounding to them."""

from __future__ import annotations

import numpy as np

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number of each precision."""
TOLERANCE = 16
TINY = 1e-300
"""Added to a size of zero: an answer without a term must be zero."""


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a precision. NumPy has no bfloat16: its numbers are float32 with the lower half of the bits zero."""
    if array.dtype.kind in "iu":
        return array
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = array.astype(np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to the nearest, ties to even
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)
