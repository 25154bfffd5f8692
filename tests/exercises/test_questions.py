"""Each question has its answer, its reason, and a hint for each likely mistake."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minilora import exercises
from minilora.exercises import experiments, functions, questions

PREDICTIONS = {
    "first step": 0.01,
    "larger gradients": 1,
    "larger alpha": 2,
    "larger alpha, plain steps": 4,
    "off by one": 50,
    "square alone": 2,
    "7B in full": 6.738 * (2 + 4 + 2 + 8),
    "7B at 4 bits": 6.476 * 4.127 / 8 + 0.262 * 2 + 32 * 16 * (4 * 8192 + 3 * 15104) * 16 / 1e9,
    "rank from a curve": "4",
    "rate from a curve": "0.002",
    "first move, one row": "1",
    "first move, many rows": "1/4",
    "along V": 0,
}


def say(question, guess, capsys):
    """Return whether a guess is right, and what is said."""
    right = exercises.check_prediction(question, guess)
    return right, capsys.readouterr().out.strip()


@pytest.fixture(autouse=True)
def nobody_has_guessed(monkeypatch):
    monkeypatch.setattr(questions, "_wrong", Counter())


OFF = {
    "first step": [0, 1, 0.001, -0.01],
    "larger gradients": [100, 0.01, 10],
    "larger alpha": [1, 4, 2**0.5, 0.5],
    "larger alpha, plain steps": [1, 2, 8],
    "off by one": [0, 1, 50**0.5, 50**2],
    "square alone": [7, 4, 3, 1],
    "7B in full": [6.738 * 2, 6.738 * 4, 6.738 * 8, 6.738 * 12, 6.738 * 14, 6.738 * 16 * 1e9 / 2**30, 6.738 * 18],
    "7B at 4 bits": [0.64, 6.476 * 4.127 / 8 + 0.262 * 2, 6.738 * 2 + 0.64, 107.8],
    "rank from a curve": ["1", "2", "8", "16"],
    "rate from a curve": ["0.0005", "0.008", "0.03", "0.12"],
    "first move, one row": ["1/16", "1/4", "4", "16"],
    "first move, many rows": ["1/16", "1", "4", "16"],
    "along V": [1, -1],
}
"""Wrong answers, each reckoned as somebody would who makes the mistake that stands at its place in questions.toml."""


@pytest.mark.parametrize("question", PREDICTIONS)
def test_a_prediction_gets_its_reason_or_its_own_hint(question, capsys):
    asked, right = exercises.QUESTIONS[question], PREDICTIONS[question]
    good, why = say(question, right, capsys)
    assert good
    assert why.startswith("Right: 0, up to rounding." if right == 0 else "Right: ")
    assert questions.sheet(question)["solution"] == why.replace("Right:", "The answer is")
    assert why.endswith(f" {asked.why}")
    hints = [hint for _, hint in asked.known]
    assert [say(question, guess, capsys) for guess in OFF[question]] == [(False, f"Not yet. {hint}") for hint in hints]
    assert not {*hints} & {*asked.hints}
    if asked.choices:  # each wrong one has its own
        assert {*dict(asked.known), right} == {*asked.choices}
        return
    questions._wrong.clear()
    # nobody's mistakes: the first gets a hint, and each later one the second
    said = [say(question, guess, capsys) for guess in (345, 3456, 34567)]
    assert said == [(False, f"Not yet. {hint}") for hint in (*asked.hints, asked.hints[1])]
    assert say(question, right, capsys)[0]
    assert say(question, 345, capsys) == said[0]


@pytest.mark.parametrize(
    "question", [q for q, right in PREDICTIONS.items() if isinstance(right, (int, float)) and right]
)
def test_a_prediction_may_be_off_by_5_percent(question, capsys):
    number = questions.sheet(question)["answer"]
    assert [say(question, number * f, capsys)[0] for f in (0.94, 0.951, 1.049, 1.06)] == [False, True, True, False]


def test_a_sheet_is_what_the_page_grades_by():
    for question, asked in exercises.QUESTIONS.items():
        sheet = questions.sheet(question)
        assert sheet.keys() == {"answer", "right", "solution", "known", "hints", "tolerance", "zero", "choices"}
        assert (sheet["choices"], sheet["hints"]) == ([*asked.choices], [*asked.hints])
        assert (sheet["tolerance"], sheet["zero"]) == (questions.ANSWER_TOLERANCE, questions.ZERO)


@pytest.mark.parametrize("question", ["first step", "7B in full", "7B at 4 bits"])
def test_no_hint_gives_a_number_away(question):
    asked = exercises.QUESTIONS[question]
    hints = (*asked.hints, *dict(asked.known).values())
    assert not [hint for hint in hints if f"{PREDICTIONS[question]:.3g}" in re.findall(r"[\d.]*\d", hint)]


def test_a_prediction_of_another_kind_is_refused(capsys):
    assert PREDICTIONS.keys() == exercises.QUESTIONS.keys() == experiments.EXPERIMENTS.keys()
    with pytest.raises(ValueError, match=r"question must be .* got 'second step'"):
        exercises.check_prediction("second step", 1)
    with pytest.raises(ValueError, match=r"^guess must be .* got 2\.0$"):
        exercises.check_prediction("rank from a curve", 2.0)
    with pytest.raises(TypeError, match="guess must be a number, got 'one'"):
        exercises.check_prediction("first step", "one")
    with pytest.raises(ValueError, match="guess must be '1', '2', '4', '8' or '16', got '32'"):
        exercises.check_prediction("rank from a curve", 32)
    assert not questions._wrong
    assert not capsys.readouterr().out
    assert exercises.check_prediction("rank from a curve", 4)  # a choice may be given as a number
    assert not exercises.check_prediction("first move, many rows", 16)


def test_the_first_move_has_two_regimes():
    """One row keeps it at alpha/r, unrelated rows at alpha/sqrt(r); the other scaling makes a factor of 4 each."""
    found = [experiments.growth(rows, root) for rows, root in ((1, False), (1, True), (256, False), (256, True))]
    assert np.allclose(np.log2(found), [0, 2, -2, 0], atol=0.5)


CURVES = {
    "rank_curve": {1: (18.29, 19.75), 2: (10.82, 13.0), 4: (3.44, 4.92), 8: (2.73, 6.44), 16: (2.05, 7.67)},
    "rate_curve": {
        0.0005: (1.74, 2.66), 0.002: (0.82, 1.41), 0.008: (0.76, 1.63), 0.03: (0.80, 1.58), 0.12: (0.92, 1.71),
    },
}  # fmt: skip
"""As the page's pictures have them."""


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_has_the_numbers_of_its_picture(name):
    curve = getattr(exercises, name)()
    assert curve == {key: pytest.approx(losses, abs=0.01) for key, losses in CURVES[name].items()}


def test_the_curve_that_is_fitted_always_falls():
    fitted, new = zip(*exercises.rank_curve().values(), strict=True)
    assert list(fitted) == sorted(fitted, reverse=True)
    assert new[2] < 0.8 * min(new[:2] + new[3:])


def test_the_module_says_how_to_begin(capsys):
    from minilora.exercises.__main__ import main

    assert main() == 0
    said = capsys.readouterr().out
    assert all(f"\n{step} " in said for step in range(1, 16))
    assert all(f"{name!r}: {question.text}" in said for name, question in exercises.QUESTIONS.items())
    assert "`" not in said
    *rows, _ = said.split("====\n")[2].splitlines()
    assert len(rows) == 17
    assert [row for row in rows if row[54:58].strip() or row[58] == " "] == []  # the columns stand
    assert "6     five numbers, for check_prediction(name, n)         the results of a few lines of code" in rows


def test_the_page_solves_each_exercise_and_asks_each_question():
    """The build runs the solutions: docs/_ext/pages.py compares what they print."""
    page = (Path(__file__).parents[2] / "docs" / "learn" / "exercises.md").read_text(encoding="utf-8")
    solutions = re.findall(r"^<details><summary>Solution</summary>\n\n```python\n(.*?)^```", page, re.S | re.M)
    graders = {name for name in exercises.__all__ if name.startswith("check_")} - {"check_prediction"}
    assert sorted(re.search(r"exercises\.(check_\w+)", code)[1] for code in solutions) == sorted(graders)
    live = re.findall(r"^<!-- live (.*) -->$", page, re.M)
    asked = [name.removeprefix("answer-") for name in live if name.startswith("answer-")]
    assert asked == [name.replace(" ", "-").replace(",", "").lower() for name in exercises.QUESTIONS]
    assert {name.replace("_", "-").lower() for name in functions.EXERCISES} <= {*live}
    shown = re.sub(r"^<details>.*?^</details>", "", page, flags=re.S | re.M)
    folded = "".join(solutions)
    assert [line for line in folded.splitlines() if re.match(r"    (return|d[hABx]\b)", line) and line in shown] == []


def test_an_answer_is_taken_up_to_its_tolerance_only():
    data = {"answer": 10.0, "tolerance": 0.1, "zero": 0.0, "known": [(20.0, "Twice.")], "right": "Yes."}
    data["hints"] = ["A.", "B."]
    said = [questions.verdict(data, guess, earlier=0) for guess in (11.0, 11.25, 22.0, 22.5)]
    assert said == [(True, "Yes."), (False, "Not yet. A."), (False, "Not yet. Twice."), (False, "Not yet. A.")]
    assert questions.verdict(data, 0.0, earlier=5) == (False, "Not yet. B.")
    assert [questions.verdict(data | {"zero": 2.0}, guess, 0)[0] for guess in (12.0, 12.25)] == [True, False]
