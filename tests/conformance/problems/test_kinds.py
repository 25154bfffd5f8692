"""The problems of each kind of layers keep their numbers."""

from pathlib import Path

from minilora.conformance.problems.kinds import SETS

PROBLEMS = Path(__file__).with_name("problems.txt").read_text(encoding="utf-8").splitlines()
"""Adopters list failures by a problem's number, so it stays: new problems come after the others of their kind."""


def test_a_problem_keeps_its_number():
    found = {f"{kind}-{number}  {problem}{'' if problem.bias else ', no bias'}"
             for kind in SETS for number, problem in enumerate(SETS[kind].problems)}  # fmt: skip
    assert set(PROBLEMS) <= found
    assert len(PROBLEMS) == 130
