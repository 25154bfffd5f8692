"""The questions, each with an experiment that answers it.

`check_prediction` grades an answer. The site grades the same questions in the page, with the data from `sheet` and the
rules of `verdict`. A number may be off by 5 %. Common wrong answers have their own hints. Any other wrong answer gets
the question's first hint, and later ones get a more detailed hint. The texts are in questions.toml.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_choice, check_number
from .experiments import EXPERIMENTS

ANSWER_TOLERANCE = 0.05
"""The relative error that is allowed in a number."""
ZERO = 1e-6
"""The absolute error that is allowed if the right answer is zero."""


@dataclass(frozen=True)
class Question:
    """A question, with the grader's reply to each answer."""

    text: str
    why: str  # the explanation, printed with the right answer
    hints: Sequence[str]  # for unknown wrong answers: for the first, and for any later one
    known: Sequence[tuple[float | str, str]]  # wrong answers with their own hints: all wrong ones, if there are choices
    choices: Sequence[str] = ()


_texts = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
QUESTIONS = {name: Question(**texts) for name, texts in _texts.items()}
"""The questions for `check_prediction`, by name."""


def check_prediction(question: str, guess: float | str) -> bool:
    """Grade an answer to a question by running its experiment.

    Parameters
    ----------
    question : str
        Its name in `QUESTIONS`, which has its text.
    guess : float or str
        The number that you expect, within 5 %, or one of the question's choices.

    Returns
    -------
    bool
        Whether it is right. The function also prints a verdict, with the experiment's result only if you were right. A
        second wrong answer to a question gets another hint.

    Raises
    ------
    ValueError, TypeError
        If there is no such question or choice, or the guess is not a number although one is asked for.
    """
    check_choice("question", question, tuple(QUESTIONS))
    choices = QUESTIONS[question].choices
    if choices:
        guess = check_choice("guess", str(guess) if isinstance(guess, int) else guess, choices)
    else:
        guess = check_number("guess", guess, above=-np.inf)
    right, says = verdict(sheet(question), guess, earlier=_wrong[question])
    _wrong[question] = 0 if right else _wrong[question] + 1
    print(says)
    return right


_wrong: Counter[str] = Counter()
"""The number of wrong answers to each question since the last right one, which decides the next hint."""


def sheet(name: str) -> dict[str, Any]:
    """Run a question's experiment, and return the data by which its answers are judged, ready for JSON."""
    question = QUESTIONS[name]
    answer = _answer(name)
    result = answer if isinstance(answer, str) else f"{answer:.4g}" if abs(answer) > ZERO else "0, up to rounding"
    reply = f"{result}. {question.why}"
    data: dict[str, Any] = {"answer": answer, "right": f"Right: {reply}", "solution": f"The answer is {reply}"}
    data |= {"known": [list(pair) for pair in question.known], "hints": list(question.hints)}
    return data | {"tolerance": ANSWER_TOLERANCE, "zero": ZERO, "choices": list(question.choices)}


@cache  # an experiment gives the same each time
def _answer(name: str) -> float | str:
    return EXPERIMENTS[name]()


def verdict(data: Mapping[str, Any], guess: float | str, earlier: int) -> tuple[bool, str]:
    """Return whether an answer is right, and the reply to it after `earlier` wrong answers.

    `docs/_static/questions.js` has the same function.
    """

    def off(value: float | str) -> float:  # in tolerances
        if isinstance(guess, str) or isinstance(value, str):
            return 0.0 if guess == value else np.inf
        return float(abs(guess - value) / max(data["tolerance"] * abs(value), data["zero"]))

    if off(data["answer"]) <= 1:
        return True, data["right"]
    near = min(data["known"], key=lambda pair: off(pair[0]))
    hint = near[1] if off(near[0]) <= 1 else data["hints"][min(earlier, 1)]
    return False, f"Not yet. {hint}"
