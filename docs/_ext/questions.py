"""What a page grades: questions with a number or a choice, with functions that a reader writes in the page.

The build runs a question's experiment, and `_static/questions.js` and `exercises.js` grade as `minilora.exercises`
does. On a source host, or without JavaScript, the page shows the question and its folded solution.
"""

from __future__ import annotations

import html
from typing import Any

import pictures
from pages import data

from minilora.exercises import QUESTIONS
from minilora.exercises.functions import EXERCISES, ZERO_STARTS, exercise_sheet, starts_sheet
from minilora.exercises.questions import sheet

LINES = {"backward": 6, "lora_backward": 6, "start": 4, "factors": 3, "grad_scores": 3, "grad_V": 4}
"""The number of lines of the functions that take more than one."""


def form(name: str, kind: str, asked: str, answer: str, judged_by: dict[str, Any]) -> str:
    """Return a form that the page grades; `asked` is the question for a screen reader."""
    return (
        f'<form class="question{kind}" id="{name}" novalidate hidden><fieldset><legend class="unseen">{asked}</legend>'
        f'<div class="answer" hidden>{answer}<button type="submit">Check</button></div></fieldset>'
        f'<p class="verdict" role="status" aria-live="polite"></p>{data(judged_by)}</form>'
    )


def ask(name: str) -> str:
    """Return the form of a question whose text is on the page."""
    found, own = sheet(name), f"question-{name.replace(' ', '-').replace(',', '')}"
    if found["choices"]:
        radio = '<label class="choice"><input type="radio" name="guess" value="{0}" autocomplete="off"> {0}</label>'
        answer = "".join(radio.format(html.escape(choice)) for choice in found["choices"])
    else:
        answer = f'<label for="{own}-guess">Your number</label><input type="text" id="{own}-guess" name="guess" '
        answer += 'inputmode="text" autocomplete="off" autocapitalize="none" spellcheck="false">'
    return form(own, "", html.escape(QUESTIONS[name].text), answer, found)


def asked(name: str) -> str:
    """Return the question as Markdown for the page."""
    *others, last = QUESTIONS[name].choices or ("", "")
    return QUESTIONS[name].text + (f" {', '.join(others)} or {last}?" if last else "")


def answered(name: str) -> str:
    """Return its answer as folded Markdown for the page."""
    return f"<details><summary>Answer</summary>\n\n{sheet(name)['solution']}\n\n</details>"


def write(name: str) -> str:
    """Return a form in which a reader writes a function's lines."""
    exercise, own, rows = EXERCISES[name], f"write-{name}", LINES.get(name, 1)
    results = ", ".join(exercise.returns)
    answer = f'<label for="{own}-text"><code>{results} =</code></label><textarea id="{own}-text" rows="{rows}" '
    answer += f'data-rows="{rows}" placeholder="of {", ".join(exercise.arguments)}" autocomplete="off" '
    answer += 'autocapitalize="none" autocorrect="off" spellcheck="false"></textarea>'
    return form(own, " written", f"{name}({', '.join(exercise.arguments)})", answer, exercise_sheet(name))


def starts() -> str:
    """Return a form that asks, for each initialisation, which factors move."""
    names = [f"{'zero' if A else 'random'} A, {'zero' if B else 'random'} B" for A, B in ZERO_STARTS]
    box = (
        '<label class="choice"><input type="checkbox" aria-label="{0}: {1} moves" autocomplete="off"> {1} moves</label>'
    )
    rows = (f"<span>{name}</span>{box.format(name, 'A')}{box.format(name, 'B')}" for name in names)
    return form("write-first_to_move", " written starts", "Which factors move?", "".join(rows), starts_sheet())


def kept() -> str:
    """Return the count of the page's right answers, with a button that clears the answers."""
    return '<p class="kept-answers" hidden><span></span> <button type="button">Forget my answers</button></p>'


def two_losses(curve: dict, what: str, seen: str) -> str:
    """Return two losses by rank or rate, drawn, with their numbers for a screen reader."""
    fitted, new = (list(losses) for losses in zip(*curve.values(), strict=True))
    drawn = pictures.lines(
        {
            seen: (list(curve), fitted, pictures.BASE_COLOR),
            "2,000 new rows": (list(curve), new, pictures.LORA_COLOR),
        },
        points=True,
        xlabel=what,
        ylabel="mean squared error",
        xscale="log",
        xticks=list(curve),
        xticklabels=list(curve),
        ylim=(0, None),
    )
    for axes in drawn.axes:
        axes.minorticks_off()
    numbers = "; ".join(f"{what} {value:g}: {a:.2f} and {b:.2f}" for value, (a, b) in curve.items())
    return pictures.show(
        drawn,
        f"The loss by {what}, on the rows of the training and on new ones. {numbers}.",
        f"The loss by {what}: on the rows that the adapter learned from, and on rows that it never saw.",
    )
