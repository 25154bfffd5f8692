"""What the problems have in common on which an answer is wrong follows from their fields."""

import pytest

from minilora.conformance.checking.comparing import Answered, judge_numbers
from minilora.conformance.checking.in_common import in_common
from minilora.conformance.problems import Problem
from minilora.conformance.problems.formulas import RIGHT_FORMULAS
from minilora.conformance.problems.images import ConvolutionProblem
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn

WHERE = {
    "linear": {
        "with the sizes of an earlier problem (is something kept between calls?)": lambda p: p.alpha == 4.5,
        "with lora_A's shape of an earlier problem (is something kept between calls?)": lambda p: (
            p.alpha == 4.5 or p.out_features == 133
        ),
        "with lora_B's shape of an earlier problem (is something kept between calls?)": lambda p: (
            p.alpha in (4, 4.5, 7)
        ),
        "where there is a bias": lambda p: p.bias,
        "where there is no bias": lambda p: not p.bias,
        "where lora_B is zero": lambda p: p.start,
        "": lambda p: not p.start,  # no clue: there a wrong update is right
        "where in = out": lambda p: p.in_features == p.out_features,
        "where in is not out": lambda p: p.in_features != p.out_features,
        "where in is above out": lambda p: p.in_features > p.out_features,
        "where in is below out": lambda p: p.in_features < p.out_features,
        "where r is above the smaller width": lambda p: p.rank > min(p.in_features, p.out_features),
        "where alpha is below r": lambda p: p.alpha < p.rank,
        "where alpha / r is not a whole number": lambda p: p.alpha % p.rank,
        "where N is 1": lambda p: p.n == 1,
        "where N is above 1": lambda p: p.n > 1,
        "where N is above 67": lambda p: p.n > 128,
        "where out is above 69": lambda p: p.out_features > 128,
        "where r is above 17": lambda p: p.rank > 32,
        "where in is above 35": lambda p: p.in_features > 100,
        "where in is below 130": lambda p: p.in_features < 100,
    },
    "fused": {
        "with three slots": lambda p: len(p.widths) == 3,
        "with two slots": lambda p: len(p.widths) == 2,
        "where the smallest of ranks is 0": lambda p: 0 in p.ranks,
        "where the smallest of ranks is above 0": lambda p: 0 not in p.ranks,
        "where ranks differ": lambda p: len({*p.ranks} - {0}) > 1,
    },
    "combine": {
        "where the smallest of weights is below 0": lambda p: min(p.weights) < 0,
        "with three adapters": lambda p: len(p.ranks) == 3,
        "with one adapter": lambda p: len(p.ranks) == 1,
        "where all use_rslora are True": lambda p: all(p.stabilised),
        "where use_rslora differ": lambda p: len({*p.stabilised}) > 1,
    },
    "conv2d": {
        "where the largest of stride is above 1": lambda p: max(p.stride) > 1,
        "where the largest of padding is above 0": lambda p: max(p.padding) > 0,
        "where groups is above 1": lambda p: p.groups > 1,
    },
    "experts": {"where experts is 1": lambda p: p.experts == 1},
    "mixed": {"where the update cancels the base's output": lambda p: p.near},
}


@pytest.mark.parametrize(("kind", "words"), [(kind, words) for kind, table in WHERE.items() for words in table])
def test_what_decides_is_told(kind, words):
    every = KINDS[kind].problems
    assert in_common([problem for problem in every if WHERE[kind][words](problem)], every) == words


@pytest.mark.parametrize(
    ("words", "least"), [("above 0.5", 1.0), ("below 1", 1.0), ("above 1", 2.0), ("below 1", 2.0), ("below 3", 3.0)]
)
def test_a_bound_lies_between_what_is_wrong_and_right(words, least):
    small = (0.25, 0.5) if least < 3 else (0.25, 2.5)
    every = [Problem(3, 4, 5, 5, alpha=alpha) for alpha in (*small, least, 4.0)]
    wrong = [problem for problem in every if (problem.alpha >= least) is ("above" in words)]
    assert in_common(wrong, every) == f"where alpha is {words}"


def test_what_is_the_same_where_right_is_told_first():
    steps = [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((3, 3), (2, 2)), ((4, 4), (3, 3))]
    every = [ConvolutionProblem(2, 3, 4, 2, sizes=(17, 14), stride=s, dilation=d) for s, d in steps]
    assert in_common(every[2:], every) == "where the largest of dilation is above 1"


@pytest.mark.parametrize(("wrong", "every"), [(0, 15), (15, 15), (1, 3)])
def test_where_nothing_decides_nothing_is_told(wrong, every):
    """Where all are wrong, or none; and of three problems anything would decide."""
    problems = KINDS["linear"].problems[:every]
    assert in_common(problems[:wrong], problems) == ""


def test_a_problem_without_an_answer_is_no_clue():
    """Of all with a bias that have one, the answer is wrong."""
    kind = KINDS["linear"]
    trials = [drawn(problem, "float64", RIGHT_FORMULAS) for problem in kind.problems]
    given = [{"y": trial.right["y"] + trial.problem.bias} for trial in trials]
    last = max(number for number, trial in enumerate(trials) if trial.problem.bias)
    given[last] = {}
    names = [f"linear-{number}" for number in range(len(trials))]
    found = judge_numbers(Answered(kind, names, trials, given, str)).claims["forward"]
    assert found.endswith("; where there is a bias)")
