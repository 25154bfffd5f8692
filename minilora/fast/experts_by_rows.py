"""The experts of a mixture with a faster gate, which processes some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checks import Array
from ..layers.experts import Experts, halves
from ..layers.gated import gate

GATE_ROWS = 128
"""The rows at a time: for 2,048 rows with m = 192 in float32, 0.3 of the time of all rows at once, on one core."""


@dataclass(eq=False, repr=False)
class ExpertsByRows(Experts):
    """Experts whose gate processes some rows at a time, so that its dozen passes stay in a core's cache.

    The numbers are the same. On a GPU the gate processes all rows at once, since each kernel must be launched.
    """

    rows: int = GATE_ROWS

    def gated(self, c: Array) -> tuple[Array, Array, Array]:  # (R, 2 m) -> (R, m) each
        """Return z, and its slopes p and u."""
        if not isinstance(c, np.ndarray) or len(c) <= self.rows:
            return super().gated(c)
        a, b = halves(c)
        z, p, u = (np.empty(a.shape, c.dtype) for _ in range(3))
        for start in range(0, len(c), self.rows):
            part = slice(start, start + self.rows)
            z[part], p[part], u[part] = gate(self.act_fn, a[part], b[part])
        return z, p, u
