"""Every gradient in minilora is the measured slope of its forward; and what else holds for every layer.

First Hypothesis searches: it draws hundreds of problems for each family of layers, for the losses and for Adam, with
sizes from 1, more axes, no rows, zeros, both precisions, other orders in memory, small and large scales. Where a
gradient is wrong, the smallest such problem is printed as a line of Python, for a prompt at the root of the repository:

    >>> from tests.support.search import *
    >>> MSEProblem(dtype='float64', scale=1.0, order='C', seed=0, shape=(1,), equal=False).holds()

Then every layer of the package meets every claim at a few problems, and at night at many. A claim is a function of
(case, problem) that raises where it does not hold: `tests/support/claims.py` has them. A case is a layer or a model:
`support/cases.py`.
"""

import pytest
from hypothesis import example, given, note, settings
from hypothesis import strategies as st

from minilora.cli.check import all_instances
from minilora.layer import walk

from .support.cases import CASES, PRODUCTS
from .support.claims import backward_is_the_slope_of_forward, forward_is_the_reference
from .support.loops import drawn
from .support.problems import ALL_ONES, LARGE, ONE_ROW, RANK_ABOVE_WIDTHS, SQUARE, problems
from .support.search import FAMILIES, LOOKED_AT

# There are hundreds of pairs of a case and a claim. The other corners are drawn as well, now and then.
EXAMPLES, CORNERS = {
    "ci": (3, (ALL_ONES, ONE_ROW, RANK_ABOVE_WIDTHS, SQUARE)),
    "night": (40, (ALL_ONES, ONE_ROW, RANK_ABOVE_WIDTHS, SQUARE)),
    "mutation": (1, (ALL_ONES, SQUARE)),
}.get(settings.get_current_profile_name(), (1, (ALL_ONES,)))


def at_corners(test):
    for problem in CORNERS:
        test = example(problem=problem)(test)
    return test


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=LOOKED_AT)
def test_gradients_are_slopes_wherever_hypothesis_looks(family, data):
    problem = data.draw(FAMILIES[family].drawn())
    note(f"{problem!r}.holds()")
    problem.holds()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@given(problem=problems())
@at_corners
@settings(max_examples=EXAMPLES)
def test_every_layer_keeps_every_claim(case, problem):
    for claim in case.claims:
        claim(case, problem)


def test_every_layer_of_the_package_is_in_some_case():
    """One that has a row in `minilora.verify.instances` and no second forward in `support/cases.py` fails here."""
    built = (case.build(SQUARE, case.params(SQUARE)) for case in CASES)
    missing = {cls for row in all_instances() for cls in classes_in(drawn(row, SQUARE)[0])}
    assert missing - {cls for layer in built for cls in classes_in(layer)} == set()


def classes_in(layer):
    return {type(part) for _, part in walk(layer)}


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
@pytest.mark.parametrize("large", LARGE)
def test_a_large_layer_is_a_layer(case, large):
    forward_is_the_reference(case, LARGE[large])
    backward_is_the_slope_of_forward(case, LARGE[large])
