"""Problems as Hypothesis draws them, and corners that random sizes seldom reach."""

from hypothesis import strategies as st

from minilora.conformance.problems import Problem

from .claims import SmallIntegers

__all__ = ["Problem", "SmallIntegers", "problems"]


@st.composite
def problems(draw: st.DrawFn, largest: int = 7) -> Problem:
    """Draw four different sizes, in any order: the rank may exceed both widths."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=4, max_size=4, unique=True))
    alpha = draw(st.sampled_from([0.5, 1.0, 3.0, 16.0]))
    return Problem(*sizes, alpha=alpha, bias=draw(st.booleans()), seed=draw(st.integers(0, 2**32 - 1)))


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
