"""The questions that the page grades: its script and the command judge alike, by hand, by keyboard and on a phone."""

import html
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("IPython", reason="the site's tools are not installed: pip install -e '.[docs]'")

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import questions as page

from minilora import exercises
from minilora.exercises import QUESTIONS, check_prediction, rank_curve, rate_curve
from minilora.exercises.functions import expression_sheet
from minilora.exercises.questions import sheet, verdict

from .javascript import by_node, node

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "_static" / "questions.js"
EXPRESSION = DOCS / "_static" / "expression.js"


@by_node
def test_the_page_and_the_command_judge_alike():
    """Around every tolerance, at each known mistake, and for each hint."""
    cases = []
    for name in QUESTIONS:
        found = json.loads(json.dumps(sheet(name)))  # as the page has it
        guesses = list(found["choices"])
        if not guesses:
            values = [found["answer"], *(value for value, _ in found["known"])]
            guesses = [value * f for value in values for f in (-1, 0.94, 0.951, 1, 1.02, 1.049, 1.06)]
            guesses += [0, 1e-7, 3e-6, 345, -1e9]
        cases += [(found, guess, earlier) for guess in guesses for earlier in (0, 1, 5)]
    ours = [list(verdict(*case)) for case in cases]
    assert {right for right, _ in ours} == {True, False}
    assert node("questions.mjs", SCRIPT, cases=cases, texts=[])["verdicts"] == ours


@by_node
def test_what_is_typed_is_read_as_a_number():
    read = {"0.01": 0.01, " 1e-2 ": 0.01, "0,01": 0.01, "-3": -3, "\u22123": -3, ".5": 0.5, "107.8": 107.8}
    read |= {"1/4": 0.25, " -1 / 16": -0.0625, "0,5/2": 0.25, "0,001": 0.001, "-0,050": -0.05, "1,5": 1.5, "1000": 1000}
    not_read = ["", "  ", "one", "1.2.3", "Infinity", "nan", "4 GB", "/", "1/", "/4", "1/2/3", "1/0", "0/0"]
    grouped = ["1,000", "1,000,000", "-12,500", "1,000.5", "\u22121,000", "1,000/4", "1/1,000"]
    texts = [*read, *not_read, *grouped]
    found = dict(zip(texts, node("questions.mjs", SCRIPT, cases=[], texts=texts)["typed"], strict=True))
    assert {text: found[text] for text in read} == {text: {"number": number} for text, number in read.items()}
    assert {found[text]["says"] for text in not_read} == {"Write a number, such as 0.25, 1/4 or 3e-4."}
    assert {found[text]["says"] for text in grouped} == {"Write it without commas."}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_form_holds_what_the_grader_judges_by(name, capsys):
    form = page.ask(name).data
    found = json.loads(re.search(r'<script type="application/json">(.*?)</script>', form)[1])
    assert found == json.loads(json.dumps(sheet(name)))
    assert check_prediction(name, found["answer"])
    assert capsys.readouterr().out == found["right"] + "\n"
    assert html.unescape(re.search(r"<legend>(.*?)</legend>", form)[1]) == QUESTIONS[name].text
    assert html.unescape(re.search(r"<details>.*<p>(.*?)</p></details>", form)[1]) == found["solution"]
    assert form.count('type="radio"') == len(QUESTIONS[name].choices)


EXPRESSIONS = {
    "grad_B": ["dy", "h", "s"],
    "grad_h": ["dy", "B", "s"],
    "grad_A": ["dh", "x"],
}
WRITTEN = {
    "grad_B": [
        *("s * dy.T @ h", "s*(dy.T@h)", "dB = s * np.dot(dy.T, h)", "return dy.T @ (s * h)", "(h.T @ dy).T * s"),
        *('np.einsum("no,nk->ok", dy, h) * s', "dy.T @ h", "s * s * dy.T @ h", "-s * dy.T @ h", "s * dy @ h"),
        *("2 * s * dy.T @ h", "s * dy.T @ h / len(dy)", "s * dy.T @ h / dy.shape[1]", "s * h.T @ dy", "s * h @ dy"),
        *("s * dy.T @ h + 1", "0 * dy.T @ h", "dy @ h.T", "s * dy.T @ h / h.shape[1]", "s * dy.T @ h * 7", "s"),
    ],
    "grad_h": [
        "s * dy @ B",
        "dy @ (s * B)",
        "dy @ B",
        "s * dy @ B.T",
        "s * B @ dy",
        "dy.dot(B) * s ** 2",
        "dy.sum(axis=1)",
    ],
    "grad_A": ["dh.T @ x", "np.matmul(np.transpose(dh), x)", "x.T @ dh", "dh @ x", "-dh.T @ x", "dh.T @ x / len(x)"],
}


@by_node
def test_an_expression_is_judged_as_a_function_is(capsys):
    cases = [(step, text) for step, texts in WRITTEN.items() for text in texts]
    sheets = {step: json.loads(json.dumps(expression_sheet(step))) for step in WRITTEN}
    found = node("expression.mjs", EXPRESSION, cases=[(sheets[step], text) for step, text in cases])
    for (step, text), (right, says) in zip(cases, found, strict=True):
        body = re.sub(r"^(return|dB =) ", "", text)
        answer = eval(f"lambda {', '.join(EXPRESSIONS[step])}: {body}", {"np": np})
        assert getattr(exercises, f"check_{step}")(answer) == right, text
        told = capsys.readouterr().out.strip()
        if "your code stopped" in told or "wrong shape" in told:
            assert says.startswith("Not yet."), text
        else:
            assert says == told.partition("\n")[0], text
    assert [right for right, _ in found].count(True) == 6 + 2 + 2


@by_node
def test_what_is_no_expression_is_said_and_nothing_runs():
    texts = [
        "",
        "dy.T @",
        "dy @@ h",
        "W @ h",
        "alert(1)",
        "dy.constructor",
        "np.load('x')",
        "__proto__",
        "dy.T @ h h",
        "(dy",
    ]
    texts += ["dy.T @ h)", "dy[0]", "h.shape[5]", "np.einsum('no,nk->zz', dy, h)", "dy; h", "dy.T * h", "'a'"]
    sheet = json.loads(json.dumps(expression_sheet("grad_B")))
    found = node("expression.mjs", EXPRESSION, cases=[(sheet, text) for text in texts])
    for text, (right, says) in zip(texts, found, strict=True):
        assert not right
        assert re.fullmatch(r"Not yet\. .{8,120}", says), (text, says)
        assert "undefined" not in says, (text, says)


def test_the_drawn_curve_has_its_numbers_in_words():
    for what, curve in (("rank", rank_curve()), ("rate", rate_curve())):
        told = re.search(r'aria-label="(.*?)"', page.two_losses(curve, what, "rows").data)[1]
        for value, (seen, new) in curve.items():
            assert f"{what} {value:g}: {seen:.2f} and {new:.2f}" in told


# --- in a browser -----------------------------------------------------------------------------------------------------

SITE = DOCS / "_build" / "html" / "exercises.html"
built = [
    pytest.mark.site,
    pytest.mark.skipif(not SITE.is_file(), reason="the site is not built: python docs/build.py"),
]
widths = pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])


def submit(browser, name, guess):
    """Answer a question by keyboard alone, and return what the page says."""
    from selenium.webdriver.common.keys import Keys

    form = browser.find_element("css selector", f'form[data-question="{name}"]')
    if QUESTIONS[name].choices:
        first, *_ = form.find_elements("css selector", "input[type=radio]")
        first.send_keys(Keys.SPACE)
        place = QUESTIONS[name].choices.index(guess)
        for radio in form.find_elements("css selector", "input[type=radio]")[:place]:
            radio.send_keys(Keys.ARROW_RIGHT)
        form.find_elements("css selector", "input[type=radio]")[place].send_keys(Keys.ENTER)
    else:
        field = form.find_element("css selector", "input[type=text]")
        field.clear()
        field.send_keys(str(guess), Keys.ENTER)
    return form.find_element("css selector", "[aria-live=polite]").text


@widths
def test_every_question_can_be_answered_by_keyboard(visit, width):
    browser = visit("exercises.html", width)
    for name in QUESTIONS:
        found = sheet(name)
        wrong, hint = found["known"][0]
        assert submit(browser, name, wrong) == f"Not yet. {hint}"
        answer = found["answer"] if found["choices"] else float(f"{found['answer']:.6f}")
        assert submit(browser, name, answer) == found["right"]
        form = browser.find_element("css selector", f'form[data-question="{name}"]')
        assert form.get_attribute("data-verdict") == "right"


@widths
def test_a_second_wrong_answer_gets_another_hint(visit, width):
    browser = visit("exercises.html", width)
    hints = [f"Not yet. {hint}" for hint in QUESTIONS["first step"].hints]
    assert [submit(browser, "first step", guess) for guess in (345, "ten", 3456)] == [
        hints[0],
        "Write a number, such as 0.25, 1/4 or 3e-4.",
        hints[1],
    ]


@widths
def test_a_question_fits_the_screen_and_a_thumb(visit, width):
    browser = visit("exercises.html", width)
    sizes = browser.execute_script(
        """return [...document.querySelectorAll("form.question :is(input[type=text], button, .choice)")].map(e => {
               const box = e.getBoundingClientRect();
               return [box.left >= 0 && box.right <= arguments[0], box.height >= 44]})""",
        width,
    )
    assert sizes
    assert all(all(fits) for fits in sizes)


@widths
def test_without_javascript_the_solution_is_folded(visit, width):
    browser = visit("exercises.html", width, script=False)
    forms = browser.find_elements("css selector", "form.question:not(.expression)")
    assert len(forms) == len(QUESTIONS)
    for form in forms:
        assert not form.find_element("css selector", ".answer").is_displayed()
        assert form.find_element("css selector", "legend").is_displayed()
        assert form.find_element("css selector", "summary").is_displayed()
        assert form.find_element("css selector", "details").get_attribute("open") is None
