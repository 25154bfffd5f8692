"""The command ``python -m minilora.exercises``, which lists the exercises."""

import re

from . import QUESTIONS
from . import __doc__ as told

HOW_TO_BEGIN = """
Start at a Python prompt:

    >>> from minilora import exercises
    >>> def loss_gradient(prediction, target):
    ...     return prediction - target
    >>> exercises.check_loss_gradient(loss_gradient)
    Not yet. dy: ...

docs/learn/exercises.md has every step in full, with a folded solution; on the site, the page grades your answers.
The questions for exercises.check_prediction(name, your_answer) are:
"""


def main() -> int:
    """Print the exercises, how to start, and the questions; return 0."""
    assert told is not None
    text = told.strip().rpartition("\n\n")[0]
    text = re.sub(r"^([\d ].*?)``(.*?)``(.{2,}?)(?=  )", r"\1\2\3    ", text, flags=re.M)  # keeps the columns aligned
    print(text.replace("`", ""))
    print(HOW_TO_BEGIN)
    for name, question in QUESTIONS.items():
        print(f"{name!r}: {question.text}")
        if question.choices:
            print(f"    {', '.join(map(repr, question.choices))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
