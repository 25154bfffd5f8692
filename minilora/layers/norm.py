"""RMSNorm: divide each row by its root mean square, then scale each entry.

    r_n  = sqrt(mean_j x_nj^2 + eps)        (norm.1)    (N, 1)
    y_nj = x_nj / r_n g_j                   (norm.2)    (N, d)       g (d,) is the layer's weight

Write x^ for x / r. The weight acts on every row, so its gradient sums over them:

    dg_j = sum_n dy_nj x^_nj                (norm.3)    (d,)

x_nj acts on y_nj directly, and on all of its row through r_n, where dr_n/dx_nj = x_nj / (d r_n) = x^_nj / d. With
dx^ = dy g, the second path adds sum_i dx^_ni (-x_ni / r_n^2) x^_nj / d = -(x^_nj / r_n) mean_i dx^_ni x^_ni:

    dx = (dx^ - x^ mean(dx^ x^)) / r        (norm.4)    (N, d)       the mean over a row

At eps = 0, dx stands at a right angle to x: a longer row gives the same y.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..backend import backend_of
from ..checks import Array
from ..layer import Cache, Layer, inner, rows


@dataclass(eq=False, repr=False)
class RMSNorm(Layer):
    """Rows divided by their root mean square, times a weight. Training changes the given array in place."""

    weight: Annotated[Array, "in"]  # (d,)
    eps: Annotated[float, "> 0"] = 1e-6  # inside the root

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., d)
        """Return y, and a cache with x and r."""
        r = backend_of(x).xp.sqrt(inner(x, x) / x.shape[-1] + self.eps)  # eq. (norm.1)  (..., 1)
        y = x / r * self.weight  # eq. (norm.2)
        return y, (x, r)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradient of the weight."""
        x, r = cache
        g, d = self.weight, x.shape[-1]
        dg = None if self.frozen else rows(dy * (x / r)).sum(axis=0)  # eq. (norm.3)  (d,)
        mean = inner(dy * g, x) / (d * r)  # of dx^ x^, over each row  (..., 1)
        dx = (dy * g - x * (mean / r)) / r if need_dx else None  # eq. (norm.4)
        return dx, {} if dg is None else {"weight": dg}
