"""The experts of a mixture: E gated MLPs of one size, whose weights are stacked.

An expert is the gated MLP of `minilora.layers.gated`, with both of its first weights in one, W_gu (2 m, d):
c = x W_gu^T, whose first m entries are a and whose last m are b, z = f(a) b by (gate.1), and o = z W_d^T.

Rows are sorted by expert, so that each weight needs one matrix product: see `minilora.layers.stacked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from ..backend import backend_of
from ..checks import Array, check_instance
from ..layer import Cache, Layer, nest, trains
from .activation import SiLU
from .gated import gate


@dataclass(eq=False, repr=False)
class Experts(Layer):
    """E gated MLPs of one size, on rows sorted by expert."""

    gate_up_proj: Annotated[Any, "in -> 2m"]
    down_proj: Annotated[Any, "m -> in"]
    act_fn: Layer = field(default_factory=SiLU)

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_instance("act_fn", self.act_fn, Layer)
        width, m, E = self.gate_up_proj.out_features, self.down_proj.in_features, self.down_proj.experts
        if width != 2 * m or self.count != E:
            raise ValueError(
                f"gate_up_proj is of {self.count} experts, {width} wide, expected {E} and {2 * m}, to go with down_proj"
            )

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, d) -> (R, d)
        """Return o for `counts` rows of each expert, and a cache with the gate's p and u."""
        c, c_cache = self.gate_up_proj.forward(x, counts)
        z, p, u = self.gated(c)
        o, o_cache = self.down_proj.forward(z, counts)
        return o, (c_cache, o_cache, p, u)

    def gated(self, c: Array) -> tuple[Array, Array, Array]:  # (R, 2 m) -> (R, m) each
        """Return z, and its slopes p and u."""
        return gate(self.act_fn, *halves(c))

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, d), and the gradients of both weights, of dy = do."""
        c_cache, o_cache, p, u = cache
        below = need_dx or trains(self.gate_up_proj)
        dz, o_grads = self.down_proj.backward(dy, o_cache, need_dx=below)
        grads = nest("down_proj", o_grads)
        if dz is None:  # no lower layer trains, and the caller needs no dx
            return None, grads
        xp = backend_of(dz).xp
        dc = xp.empty((len(dz), 2 * dz.shape[1]), dz.dtype)
        for half, slope in zip(halves(dc), (p, u), strict=True):  # da and db, (gate.2) and (gate.3)
            xp.multiply(dz, slope, out=half)
        dx, c_grads = self.gate_up_proj.backward(dc, c_cache, need_dx=need_dx)
        return dx, nest("gate_up_proj", c_grads) | grads

    count = property(lambda self: self.gate_up_proj.experts, doc="How many there are, E.")


def halves(c: Array) -> tuple[Array, Array]:  # (R, 2 m) -> (R, m), (R, m)
    """Return a and b, the gate's and the up projection's outputs: views."""
    m = c.shape[1] // 2
    return c[:, :m], c[:, m:]
