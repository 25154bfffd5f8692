"""The questions: each has an experiment that answers it, the answer's reason, and hints for wrong answers.

`check_prediction` grades an answer. The site grades the same questions in the page: `sheet` is what it takes of them,
as JSON, and `verdict` is how both judge. A number is right to 5 %. A wrong answer that many people give has a hint of
its own. Any other gets the question's hint, and the next one a hint that says more. The texts stand in questions.toml.
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

TOLERANCE = 0.05
"""How far a number may be off, as a part of what the experiment gives."""
ZERO = 1e-6
"""How far it may be off where the experiment gives zero."""


@dataclass(frozen=True)
class Question:
    """A question, and what a grader says to each answer."""

    text: str
    why: str  # told with the right answer
    hints: Sequence[str]  # for a wrong answer that is not known: the first, and any later one
    known: Sequence[tuple[float | str, str]]  # wrong answers with hints of their own; all other choices, if there are
    choices: Sequence[str] = ()


_texts = tomllib.loads(Path(__file__).with_name("questions.toml").read_text(encoding="utf-8"))
QUESTIONS = {name: Question(**texts) for name, texts in _texts.items()}
"""The questions by their names, for `check_prediction`."""


def check_prediction(question: str, guess: float | str) -> bool:
    """Grade an answer to a question: run its experiment and compare.

    Parameters
    ----------
    question : str
        Its name, of `QUESTIONS`, which has their texts.
    guess : float or str
        The number that you expect, right to 5 %; or one of the question's choices.

    Returns
    -------
    bool
        Whether it is right. The verdict is printed, and the experiment's number only where you had it. A second wrong
        answer to a question gets another hint than the first.

    Raises
    ------
    ValueError, TypeError
        If there is no such question or choice, or the guess is no number where one is asked.
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
"""How many wrong answers each question got since its last right one: which hint comes next."""


def sheet(name: str) -> dict[str, Any]:
    """Return what an answer to a question is judged by, after its experiment; JSON can hold it."""
    question = QUESTIONS[name]
    answer = _answer(name)
    result = answer if isinstance(answer, str) else f"{answer:.4g}" if abs(answer) > ZERO else "0, but for rounding"
    told = f"{result}. {question.why}"
    data: dict[str, Any] = {"answer": answer, "right": f"Right: {told}", "solution": f"The answer is {told}"}
    data |= {"known": [list(pair) for pair in question.known], "hints": list(question.hints)}
    return data | {"tolerance": TOLERANCE, "zero": ZERO, "choices": list(question.choices)}


@cache  # an experiment gives the same each time
def _answer(name: str) -> float | str:
    return EXPERIMENTS[name]()


def verdict(data: Mapping[str, Any], guess: float | str, earlier: int) -> tuple[bool, str]:
    """Return whether an answer is right, and what to say to it after that many `earlier` wrong ones.

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
