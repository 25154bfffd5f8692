"""Count the multiply-adds of matrix products by watching them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


class Counted(np.ndarray):
    """An array whose products are counted; what is computed from it is counted, too."""

    total = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        """Compute as NumPy does, and count where the operation is ``@``."""
        plain = [np.asarray(x) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            Counted.total += math.prod(result.shape) * plain[0].shape[-1]
        if out is not None:
            return out[0]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def count(work: Callable[[], object]) -> int:
    """Return the multiply-adds that `work` spends in products of counted arrays."""
    Counted.total = 0
    work()
    return Counted.total


def counted(*shape: int) -> Counted:
    """Return a counted float32 array of that shape; its values do not matter."""
    return np.ones(shape, np.float32).view(Counted)
