"""Activations: functions of single entries, whose derivative is a product per entry.

    y = f(x),    dx = dy f'(x)        all of one shape

    ReLU    f(x) = max(x, 0)           f'(x) = 1 where x > 0, else 0                    (act.1), (act.2)
    Tanh    f(x) = tanh(x)             f'(x) = 1 - tanh(x)^2                            (act.3), (act.4)
    SiLU    f(x) = x q                 f'(x) = q (1 + x (1 - q)),  q = 1/(1 + e^-x)     (act.5), (act.6)

An activation caches what its derivative needs. None of these layers has trainable arrays.
"""

from __future__ import annotations

from ..backend import backend_of
from ..checks import Array
from ..layer import Cache, Layer


class ReLU(Layer):
    """max(x, 0), with slope 0 at 0."""

    takes = "..."

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with the mask."""
        mask = x.real > 0  # the real part, since a complex step moves the imaginary one
        y = x * mask  # eq. (act.1)
        return y, (mask,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (mask,) = cache
        dx = dy * mask if need_dx else None  # eq. (act.2)
        return dx, {}


class Tanh(Layer):
    """The hyperbolic tangent."""

    takes = "..."

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with it."""
        y = backend_of(x).xp.tanh(x)  # eq. (act.3)
        return y, (y,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (y,) = cache
        dx = dy * (1 - y * y) if need_dx else None  # eq. (act.4)
        return dx, {}


class SiLU(Layer):
    """x times the logistic function of x; also called swish."""

    takes = "..."

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with x and q."""
        q = logistic(x)
        y = x * q  # eq. (act.5)
        return y, (x, q)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        x, q = cache
        dx = dy * (q * (1 + x * (1 - q))) if need_dx else None  # eq. (act.6)
        return dx, {}


def logistic(x: Array) -> Array:  # (...) -> (...)
    """Return 1/(1 + e^-x), computed as (1 + tanh(x/2))/2, which cannot overflow."""
    return 0.5 * (1 + backend_of(x).xp.tanh(0.5 * x))


ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "tanh": Tanh, "silu": SiLU}
"""The activations by their names in configurations."""
