"""Problems to check layers on: Hypothesis draws shapes and a seed, and the values are Gaussian from that seed.

Values drawn one by one would be zero half of the time, and a zero hides a bug. The four sizes of a problem all differ,
so that no transposed or swapped array fits by accident.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Problem:
    n: int
    in_features: int
    out_features: int
    rank: int
    alpha: float = 3.0
    bias: bool = True
    seed: int = 0

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Gaussian values that depend on the seed and the name alone, so no two arrays of a problem are alike."""
        return np.random.default_rng([self.seed, *name.encode()]).standard_normal(shape)

    @property
    def x(self) -> np.ndarray:
        return self.randn("x", self.n, self.in_features)

    @property
    def dy(self) -> np.ndarray:
        return self.randn("dy", self.n, self.out_features)

    @property
    def target(self) -> np.ndarray:
        return self.randn("target", self.n, self.out_features)

    @property
    def full(self) -> dict[str, np.ndarray]:
        weight = {"weight": self.randn("weight", self.out_features, self.in_features)}
        return weight | {"bias": self.randn("bias", self.out_features)} if self.bias else weight

    @property
    def factors(self) -> dict[str, np.ndarray]:
        return {
            "lora_A": self.randn("lora_A", self.rank, self.in_features),
            "lora_B": self.randn("lora_B", self.out_features, self.rank),
        }


@dataclass(frozen=True)
class SmallIntegers(Problem):
    """The same in integers from -2 to 2: with alpha / r a power of two, even float16 computes these exactly."""

    def randn(self, name: str, *shape: int) -> np.ndarray:
        return np.rint(super().randn(name, *shape)).clip(-2, 2)


@st.composite
def problems(draw: st.DrawFn, largest: int = 7) -> Problem:
    """Draw four different sizes, in any order: the rank may exceed both widths."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=4, max_size=4, unique=True))
    alpha = draw(st.sampled_from([0.5, 1.0, 3.0, 16.0]))
    return Problem(*sizes, alpha=alpha, bias=draw(st.booleans()), seed=draw(st.integers(0, 2**32 - 1)))


# Corners that random sizes seldom reach.
ALL_ONES = Problem(n=1, in_features=1, out_features=1, rank=1)
ONE_ROW = Problem(n=1, in_features=5, out_features=4, rank=2)
RANK_ABOVE_WIDTHS = Problem(n=4, in_features=2, out_features=3, rank=6)
SQUARE = Problem(n=3, in_features=3, out_features=3, rank=3)

# Sizes beyond any block or buffer that code may compute in.
MANY_ROWS = Problem(n=5000, in_features=2, out_features=3, rank=1)
MANY_INPUTS = Problem(n=2, in_features=1500, out_features=3, rank=1)
MANY_OUTPUTS = Problem(n=2, in_features=3, out_features=1500, rank=1)
LARGE_RANK = Problem(n=2, in_features=3, out_features=4, rank=1200)
LARGE = {"rows": MANY_ROWS, "inputs": MANY_INPUTS, "outputs": MANY_OUTPUTS, "rank": LARGE_RANK}
