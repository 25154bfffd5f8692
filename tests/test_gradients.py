"""Every gradient in minilora is the measured slope of its forward, to 1e-12; and what else holds for every layer.

A claim is a function of (case, problem) that raises where it does not hold: `minilora.conformance.claims` has them. A
case is a layer or a model: `support/cases.py`. Hypothesis draws sizes and a seed.
"""

import pytest
from hypothesis import example, given, settings

from minilora.conformance.claims import backward_is_the_slope_of_forward, forward_is_the_reference

from .support.cases import ALL_CASES, CASES, DORA_CASES, LAYER_CASES
from .support.language_cases import LANGUAGE_CASES
from .support.problems import ALL_ONES, LARGE, ONE_ROW, RANK_ABOVE_WIDTHS, SQUARE, problems

CLAIMED = [
    pytest.param(case, claim, id=f"{case.name}: {claim.__name__}") for case in ALL_CASES for claim in case.claims
]

EXAMPLES = 4  # of each pair of a case and a claim, and there are more than a hundred


@pytest.mark.parametrize(("case", "claim"), CLAIMED)
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=ONE_ROW)
@example(problem=RANK_ABOVE_WIDTHS)
@example(problem=SQUARE)
@settings(max_examples=EXAMPLES)
def test_every_layer_keeps_every_claim(case, claim, problem):
    claim(case, problem)


@pytest.mark.parametrize("case", LANGUAGE_CASES, ids=lambda case: case.name)
@given(problem=problems())
@example(problem=ONE_ROW)
@settings(max_examples=2)
def test_every_layer_of_a_language_model_keeps_every_claim(case, problem):
    for claim in case.claims:
        claim(case, problem)


@pytest.mark.parametrize("case", LAYER_CASES + DORA_CASES, ids=lambda case: case.name)
@given(problem=problems())
@example(problem=RANK_ABOVE_WIDTHS)
@settings(max_examples=3)
def test_every_rewriting_and_every_variant_keeps_every_claim(case, problem):
    for claim in case.claims:
        claim(case, problem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("large", LARGE)
def test_a_large_layer_is_a_layer(case, large):
    forward_is_the_reference(case, LARGE[large])
    backward_is_the_slope_of_forward(case, LARGE[large])
