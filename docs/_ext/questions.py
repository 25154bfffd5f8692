"""Questions that a page grades: what `minilora.exercises` asks, and what it judges an answer by.

The experiment runs when the site is built, and `_static/questions.js` judges as the grader does. Without JavaScript a
reader has the question and its folded solution.
"""

from __future__ import annotations

import html
import json

import pictures
from pages import Drawn

from minilora.exercises import QUESTIONS
from minilora.exercises.functions import expression_sheet
from minilora.exercises.questions import sheet


def ask(name: str) -> Drawn:
    """Return a question as a form, with its answer folded."""
    found, own = sheet(name), f"question-{name.replace(' ', '-').replace(',', '')}"
    text = json.dumps(found, separators=(",", ":")).replace("</", "<\\/")
    if found["choices"]:
        radio = '<label class="choice"><input type="radio" name="guess" value="{0}" autocomplete="off"> {0}</label>'
        answer = "".join(radio.format(html.escape(choice)) for choice in found["choices"])
    else:
        answer = f'<label for="{own}-guess">Your number</label><input type="text" id="{own}-guess" name="guess" '
        answer += 'inputmode="text" autocomplete="off" autocapitalize="none" spellcheck="false">'
    return Drawn(
        f'<form class="question" id="{own}" data-question="{html.escape(name)}" novalidate><fieldset>'
        f"<legend>{html.escape(QUESTIONS[name].text)}</legend>"
        f'<div class="answer" hidden>{answer}<button type="submit">Check</button></div></fieldset>'
        '<p class="verdict" role="status" aria-live="polite"></p>'
        f"<details><summary>Solution</summary><p>{html.escape(found['solution'])}</p></details>"
        f'<script type="application/json">{text}</script></form>'
    )


def write(step: str) -> Drawn:
    """Return a form for one NumPy expression, graded in the page."""
    found = expression_sheet(step)
    text = json.dumps(found, separators=(",", ":")).replace("</", "<\\/")
    return Drawn(
        f'<form class="question expression" id="write-{step}" novalidate><div class="answer" hidden>'
        f'<label for="write-{step}-text">{found["result"]} =</label><input type="text" id="write-{step}-text" '
        f'placeholder="of {", ".join(found["inputs"])}" autocomplete="off" autocapitalize="none" spellcheck="false">'
        '<button type="submit">Check</button></div><p class="verdict" role="status" aria-live="polite"></p>'
        f'<script type="application/json">{text}</script></form>'
    )


def two_losses(curve: dict, what: str, seen: str) -> Drawn:
    """Return two losses by rank or rate, drawn, with their numbers for whom the drawing is nothing."""
    fitted, new = (list(losses) for losses in zip(*curve.values(), strict=True))
    drawn = pictures.lines(
        {
            seen: (list(curve), fitted, pictures.BASE),
            "2,000 new rows": (list(curve), new, pictures.LORA),
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
