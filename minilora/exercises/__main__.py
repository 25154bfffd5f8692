"""``python -m minilora.exercises``: say what the exercises are, and how to begin."""

import re

from . import QUESTIONS
from . import __doc__ as told

BEGIN = """
Begin at a Python prompt:

    >>> from minilora import exercises
    >>> def loss_gradient(prediction, target):
    ...     return prediction - target
    >>> exercises.check_loss_gradient(loss_gradient)
    Not yet. dy: ...

docs/learn/exercises.md has each step in full, with its solution folded; on the site the page grades all of them.
These are the questions, for exercises.check_prediction(name, your_answer):
"""


def main() -> int:
    """Print it. Returns 0."""
    assert told is not None
    text = told.strip().rpartition("\n\n")[0]
    text = re.sub(r"^([\d ].*?)``(.*?)``(.{2,}?)(?=  )", r"\1\2\3    ", text, flags=re.M)  # the columns stay
    print(text.replace("`", ""))
    print(BEGIN)
    for name, question in QUESTIONS.items():
        print(f"{name!r}: {question.text}")
        if question.choices:
            print(f"    {', '.join(map(repr, question.choices))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
