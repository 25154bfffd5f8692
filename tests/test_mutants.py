"""A test that passes on wrong code proves nothing: each of these bugs must be caught by the properties themselves."""

from functools import cache

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from minilora import best_of_rank, gradcheck, weighted_sum
from minilora.variants.scaling import scaling

from .support import expert_mutants, language_mutants, mutants
from .support.cases import KINDS, adapted_case, lora_case, plain_case
from .support.claims import ADAM_CLAIMS, MSE_CLAIMS
from .support.compare import gradients_are_the_slope_of_mse
from .support.formulas import AdamByFormulas
from .support.mutants import HIDDEN_AT_THE_START, MUTANTS, written_out
from .support.mutants import Wrong as RightPieces
from .support.problems import Problem, problems


def rejected(claims, problem) -> bool:
    for claim in claims:
        try:
            claim(problem)
        except Exception:  # an assertion, or a shape that does not fit: either is a rejection
            return True
    return False


@cache
def ten_problems() -> list[Problem]:
    """Ten examples, as the property tests draw them, and the same ones for every mutant."""
    drawn = []

    @settings(max_examples=10, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(problem=problems())
    def draw(problem):
        drawn.append(problem)

    draw()
    assert len(drawn) <= 10
    return drawn


def caught(mutant) -> bool:
    """Whether the mutant is rejected within ten examples."""
    return any(rejected(mutant.claims, problem) for problem in ten_problems())


EVERY_MUTANT = [
    pytest.param(mutant, id=mutant.name, marks=() if len(mutant.claims) == 1 or i % 3 == 0 else pytest.mark.long)
    for i, mutant in enumerate(MUTANTS)
]
"""In the default run those that one claim alone must reject, and a third of the others."""


@pytest.mark.parametrize("mutant", EVERY_MUTANT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_this_bug_is_caught_within_ten_examples(mutant):
    assert caught(mutant)


def test_there_are_many_bugs_with_names_of_their_own():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 190


# Of each scaffold without a bug, by one problem: what a right layer claims at many is in test_gradients.py.


def test_the_same_code_without_a_bug_passes():
    """Otherwise the scaffold of the bugs, and not the bugs, might be what is caught."""
    problem = ten_problems()[-1]

    def right_mse(p, t):
        return ((p - t) ** 2).mean(), 2 / p.size * (p - t)

    for case in (lora_case(RightPieces), mutants.with_parts()):
        for claim in case.claims:
            claim(case, problem)
    for claim in MSE_CLAIMS:
        claim(right_mse, problem)
    for claim in ADAM_CLAIMS:
        claim(AdamByFormulas, problem)
    gradients_are_the_slope_of_mse(written_out, problem)


def test_the_other_layers_without_a_bug_pass():
    problem = ten_problems()[-1]
    cases = [
        plain_case(KINDS["embedding"], mutants.WrongEmbedding),
        mutants.dora_case(mutants.WrongDoRA),
    ]
    for case in cases:
        for claim in mutants.TWO_CLAIMS:
            claim(case, problem)
    mutants.merged_gives_the_same_output(adapted_case(KINDS["conv2d"]), problem)
    for start in (mutants.start_of_library, mutants.uniform_start()):
        mutants.a_start_has_the_fan_of_the_input(start, problem)
    mutants.rslora_divides_by_the_root(scaling, problem)
    for right in (weighted_sum, mutants.RIGHT_SUM):
        mutants.sums_are_exact(right, problem)
    mutants.the_best_rank_leaves_the_discarded_values(best_of_rank, problem)


RIGHT = language_mutants.RIGHT | expert_mutants.RIGHT


@pytest.mark.parametrize("name", RIGHT)
def test_a_language_models_layers_without_a_bug_pass(name):
    problem = ten_problems()[-1]
    case, subjects, claims = RIGHT[name]
    for subject in subjects:
        for claim in claims:
            claim(case(subject), problem)


@pytest.mark.parametrize("name", HIDDEN_AT_THE_START)
@given(problem=problems())
@settings(max_examples=10)
def test_at_the_start_of_lora_this_bug_is_invisible(name, problem):
    """At B = 0 a wrong backward agrees with every measured slope. So nothing is ever checked there."""
    factors = {"lora_A": problem.factors["lora_A"], "lora_B": np.zeros_like(problem.factors["lora_B"])}
    case = HIDDEN_AT_THE_START[name]
    params = {"x": problem.x, **factors}
    grads = case.gradients(problem, params, problem.dy)
    gradcheck(case.output(problem), params, grads, cotangent=problem.dy, allow_zero=["x", "lora_A"])
