"""The questions that the page grades: its script and the command judge alike, by hand, by keyboard and on a phone."""

import ast
import html
import json
import re
import shutil
import textwrap
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import questions as page

from minilora import exercises
from minilora.exercises import QUESTIONS, check_prediction, grading, rank_curve, rate_curve
from minilora.exercises.functions import EXERCISES, ZERO_STARTS, exercise_sheet, starts_sheet
from minilora.exercises.questions import sheet, verdict

from .conftest import resize, served
from .javascript import by_node, node

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT = DOCS / "_static" / "questions.js"
NUMPY, WRITTEN = DOCS / "_static" / "numpy.js", DOCS / "_static" / "exercises.js"


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
    form = page.ask(name)
    found = json.loads(re.search(r'<script type="application/json">(.*?)</script>', form)[1])
    assert found == json.loads(json.dumps(sheet(name)))
    assert check_prediction(name, found["answer"])
    assert capsys.readouterr().out == found["right"] + "\n"
    assert html.unescape(re.search(r"<legend[^>]*>(.*?)</legend>", form)[1]) == QUESTIONS[name].text
    assert f"\n{found['solution']}\n" in page.answered(name)
    assert form.count('type="radio"') == len(QUESTIONS[name].choices)
    assert page.asked(name).startswith(QUESTIONS[name].text)
    assert all(choice in page.asked(name) for choice in QUESTIONS[name].choices)
    assert found["solution"] in page.answered(name)


# --- functions that are written in the page: the same verdict as the grader's -----------------------------------------

FROM_ARGUMENTS = {
    "s": "alpha / len(A)",
    "r": "len(A)",
    "N": "len(dy)",
    "out": "dy.shape[1]",
    "n_in": "x.shape[1]",
}
LENGTHS = {
    "loss_gradient": {"N": "prediction.shape[0]", "out": "prediction.shape[1]"},
    "grad_h": {"n_in": "A.shape[1]"},
    "grad_A": {"N": "len(x)"},
    "lora_backward": {"N": "len(dL_dy)", "out": "dL_dy.shape[1]"},
    "merged": {"out": "len(W)", "n_in": "W.shape[1]"},
    "count": {"r": "rank", "n_in": "in_features", "out": "out_features"},
}


def generated(name, seed=1):
    """Return answers as text: the right one, each mistake, each factor in front of the right one, and some of both."""
    exercise, rng = EXERCISES[name], np.random.default_rng(seed)
    right = {result: own[0][0] for result, own in exercise.forms.items()}
    wrong = [(result, line, "1") for result, line in right.items()]
    wrong += [(result, line, "1") for result, own in exercise.forms.items() for line, _ in own if "float16" not in line]
    wrong += [(result, right[result], factor) for result in right for factor, _ in exercise.scales]
    factors = [factor for factor, _ in exercise.scales] + ["0.37", "0"]
    for _ in range(25):
        result, line, _ = wrong[rng.integers(len(wrong))]
        wrong.append((result, line, " * ".join(f"({f})" for f in rng.choice(factors, rng.integers(1, 4)))))
    for result, line, factor in wrong:
        text = ", ".join(f"({line}) * ({factor})" if one == result else f"({right[one]})" for one in right)
        needed = {word for word in re.findall(r"\w+", text) if word not in (*exercise.arguments, *exercise.also)}
        before = {**FROM_ARGUMENTS, **LENGTHS.get(name, {})}
        yield "".join(f"{word} = {before[word]}\n" for word in before if word in needed) + text


BY_HAND = {
    "loss_gradient": [
        "N, out = prediction.shape\nerror = prediction - target\nreturn 2 * error / (N * out)",
        "def loss_gradient(p, t):\n    # the mean is over all\n    return 2 * (p - t) / p.size",
        "from minilora import exercises\n\ndef loss_gradient(p, t):\n    return p - t\n\n\n"
        "exercises.check_loss_gradient(loss_gradient)",
        "import numpy as np\ndy = np.multiply(2 / prediction.size, prediction - target)",
        "prediction -= target\nreturn 2 * prediction / prediction.size",
        "dy = (prediction - target).copy()\ndy *= 2 / dy.size",
        *("np.mean((prediction - target)**2)", "2 * (prediction - target) / out", "None", "prediction.shape", "'dy'"),
    ],
    "grad_B": [
        *("s*(dy.T@h)", "dB = s * np.dot(dy.T, h)", "return dy.T @ (s * h)", "(h.T @ dy).T * s", "s"),
        *('np.einsum("no,nk->ok", dy, h) * s', "alpha / r * dy.T @ (x @ A.T)", "lambda dy, h, s: s * dy.T @ h"),
        "dB = np.zeros(B.shape)\nfor o in range(dy.shape[1]):\n    for k in range(h.shape[1]):\n"
        "        for n in range(len(dy)):\n            dB[o, k] += s * dy[n, o] * h[n, k]",
        "dB = dy.T @ h\ns * dB",
        "dB = s * dy.T @ h\ndB / s",
        "for n in range(2):\n    t = dy.T h\ns * dy.T @ h",
        "dB = 0\nfor n in range(len(dy)):\n    dB = dB + np.outer(dy[n], h[n])\nreturn s * dB",
        "s * np.sum(dy[:, :, None] * h[:, None, :], axis=0)",
    ],
    "backward": [
        "s = alpha / A.shape[0]\ndh = s * dy @ B\ndx, dA, dB = dh @ A, dh.T @ x, s * dy.T @ (x @ A.T)",
        "s = alpha / len(A)\ndB = s * dy.T @ (x @ A.T)\ndh = s * dy @ B\ndA = dh.T @ x\ndx = dh @ A",
        "def backward(dy, x, A, B, alpha):\n    s = alpha / len(A)\n    dh = s * dy @ B\n"
        "    return dh @ A, dh.T @ x, s * dy.T @ x @ A.T",
        "s = alpha / len(A)\ndh = s * dy @ B\nreturn s * dy.T @ x @ A.T, dh.T @ x, dh @ A",
        *("return dy @ B @ A", "return dy, x", "1, 2, 3"),
    ],
    "merged": ["W + alpha / A.shape[0] * B @ A", "W + (B.T @ A.T).T", "W + alpha / len(A) * A.T @ B.T", "W"],
    "factors": [
        "U, S, Vt = np.linalg.svd(change, full_matrices=False)\nreturn S[:rank, None] * Vt[:rank], U[:, :rank]",
        "U, S, Vt = np.linalg.svd(change)\nA = Vt[:rank]\nB = U[:, :rank] * S[:rank]",
        "U, S, Vt = np.linalg.svd(change)\nR = np.sqrt(S[:rank])\nreturn np.diag(R) @ Vt[:rank], U[:, :rank] * R",
        "U, S, Vt = np.linalg.svd(change)\nreturn Vt[:rank], U[:, :rank]",
        "U, S, Vt = np.linalg.svd(change)\nreturn S[:rank, None] * Vt[:rank], U[:, :rank] * S[:rank]",
        "U, S, Vt = np.linalg.svd(change, full_matrices=False)\nreturn S[-rank:, None] * Vt[-rank:], U[:, -rank:]",
        "U, S, Vt = np.linalg.svd(change)\nreturn U[:, :rank] * S[:rank], Vt[:rank]",
        "np.ones((rank, change.shape[1])), np.ones((len(change), rank))",
        *("change[:rank], change[:, :rank]", "change", "change, change"),
    ],
    "grad_scores": [
        "mean = (P * dP).sum(axis=1, keepdims=True)\nP * (dP - mean)",
        "P * dP - P * np.sum(P * dP, axis=-1)[:, None]",
        "dS = P * dP\ndS -= P * dS.sum(axis=1, keepdims=True)",
        "dS = np.zeros(P.shape)\nfor t in range(len(P)):\n"
        "    J = np.diag(P[t]) - np.outer(P[t], P[t])\n    dS[t] = J @ dP[t]",
        *("P * (dP - (P * dP).sum(axis=1))", "P * dP", "P * (1 - P) * dP", "P * (dP - dP.mean(axis=1, keepdims=True))"),
    ],
}
"""Answers in forms of their own: with lines before, loops, a function, in place, of another shape, of no number."""


def returning(text, results):
    """Return lines with a return: of the last expression, else of the results, else of what was assigned last."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    last = tree.body[-1]
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if isinstance(last, ast.Expr):
        tree.body[-1] = ast.Return(last.value)
    elif made := [name for name in results if name in stored]:
        tree.body += ast.parse(f"return {', '.join(made)}").body
    elif isinstance(last, ast.Assign):
        tree.body += ast.parse(f"return {ast.unparse(last.targets[0])}").body
    return ast.unparse(tree)


def as_function(name, text):
    """Return a text as a Python function of the exercise's arguments; what the page gives beside them is there, too."""
    exercise = EXERCISES[name]
    known = [grading.data(**sizes) for sizes in exercise.sizes]
    text = returning(re.sub(r"^(from minilora|exercises).*\n?", "", text, flags=re.M).strip(), exercise.returns)

    def answer(*given):
        own = dict(zip(exercise.arguments, given, strict=True))
        d = next(d for d in known if all(np.array_equal(vars(d)[word], value) for word, value in own.items()))
        names = {"np": np, **{word: vars(d)[word] for word in exercise.also}, **own}
        if text.startswith("def"):
            exec(text, names)
            return names[name](*given)
        head = f"def f({', '.join(exercise.arguments)}):\n"
        exec(head + "".join(f"    {line}\n" for line in text.split("\n")), names)
        value = names["f"](*given)
        return value(*given) if callable(value) else value

    return answer


def in_the_page(cases, sheets):
    return node("exercises.mjs", NUMPY, WRITTEN, sheets=json.loads(json.dumps(sheets)), cases=cases)


def alike(name, texts, capsys):
    """Hand answers to the page and to the grader, hold their words against each other, and return the verdicts."""
    found = in_the_page([(name, text) for text in texts], {name: exercise_sheet(name)})
    for text, (right, says) in zip(texts, found, strict=True):
        assert getattr(exercises, f"check_{name}")(as_function(name, text)) == right, (text, says)
        told = capsys.readouterr().out.strip()
        if "your code stopped" in told:
            assert says.startswith("Not yet. "), text
        else:
            assert says == re.sub(r"you returned a (float|int)\w*", "you returned a number", told), text
    return [right for right, _ in found]


@by_node
@pytest.mark.parametrize("name", [name for name in EXERCISES if name != "start"])
def test_lines_are_judged_as_a_function_is(name, capsys):
    """But for the factors, whose directions have a sign of their own, among them each known mistake."""
    texts = [*BY_HAND.get(name, ()), *(generated(name) if name != "factors" else ())]
    assert {*alike(name, texts, capsys)} == {True, False}


STARTED = {
    "bound = 1 / np.sqrt(in_features)\nA = rng.uniform(-bound, bound, size=(rank, in_features))\n"
    "B = np.zeros((out_features, rank))": "The start is right",
    "def start(n, m, r, rng):\n    return rng.uniform(-1, 1, (r, n)) / n**0.5, np.zeros((m, r))": "The start is right",
    "rng.standard_normal((rank, in_features)) / np.sqrt(3 * in_features), np.zeros((out_features, rank))": "The start",
    "rng.standard_normal((rank, in_features)) / np.sqrt(rank), np.zeros((out_features, rank))": "Not yet. A: A's fan "
    "is taken from the wrong side",
    "b = np.sqrt(6 / rank)\nrng.uniform(-b, b, (in_features, rank)), np.zeros((rank, out_features))": "Not yet. A: A's "
    "fan is taken from the wrong side: h = x A^T sums over in, so the fan is in, not the rank; and the bound "
    "is too large by sqrt(6), with the gain of ReLU; PEFT passes a=sqrt(5), which makes it 1/sqrt(in)\n(wrong shape: A "
    "must be (rank, in), here (80, 640); you returned an array of shape (640, 80))",
    "rng.normal(0, 0.02, (rank, in_features)), rng.normal(0, 0.02, (out_features, rank))": "Not yet. A: A has size "
    "0.02 at any width, but the bound must depend on in\nB: it must be zero",
    "rng.normal(scale=1, size=(rank, in_features)), np.zeros((out_features, rank))": "Not yet. A: A has size 1",
    "np.zeros((rank, in_features)), rng.random((out_features, rank))": "Not yet. A: A is zero",
    "rng.choice(3), 2": "Not yet. rng.choice is not read here",
}


@by_node
def test_a_start_is_judged_as_by_the_grader(capsys):
    found = in_the_page([("start", text) for text in STARTED], {"start": exercise_sheet("start")})
    for (text, says), (right, told) in zip(STARTED.items(), found, strict=True):
        assert told.startswith(says), text
        if "choice" not in text:
            answer = as_function_of_rng(text)
            assert exercises.check_start(answer) == right
            assert capsys.readouterr().out.strip() == told


def as_function_of_rng(text):
    def answer(in_features, out_features, rank, rng):
        names = {"np": np, "in_features": in_features, "out_features": out_features, "rank": rank, "rng": rng}
        *before, last = text.split("\n")
        if text.startswith("def"):
            exec(text, names)
            return names["start"](in_features, out_features, rank, rng)
        exec("\n".join([*before, last if " = " in last else f"made = {last}"]), names)
        return names.get("made") or (names["A"], names["B"])

    return answer


@by_node
def test_which_factors_move_is_judged_as_by_the_grader(capsys):
    answers = [list(each) for each in product(("", "A", "B", "AB"), repeat=4)]
    found = in_the_page([("starts", each) for each in answers], {"starts": starts_sheet()})
    for each, (right, says) in zip(answers, found, strict=True):
        by_start = dict(zip(ZERO_STARTS, each, strict=True))
        assert exercises.check_first_to_move(lambda *start, by=by_start: set(by[start])) == right
        assert capsys.readouterr().out.strip() == says
    assert [right for right, _ in found].count(True) == 1


@by_node
def test_what_is_not_read_is_said_and_nothing_runs():
    texts = [
        *("dy.T @", "dy @@ h", "Q @ h", "alert(1)", "dy.constructor", "np.load('x')", "__proto__", "dy.T @ h h", "(dy"),
        *("dy.T @ h)", "h.shape[5]", "np.einsum('no,nk->zz', dy, h)", "dy.T * h", "import os", "exec('1')", "dy[0"),
        *("for i in range(10**9): dy", "np.zeros(10**9)", "def f(dy):\nreturn dy", "  dy\n dy", "dy.T ^ h", "if 1: dy"),
        *("while True: pass", "f = lambda: f()\nf()", "open('x')", "np.__class__", "dy = 3 = h", "return", "1 = dy"),
        *("(" * 99, "(" * 99_999, "dy" * 9_999, "-" * 99_999 + "dy"),
    ]
    found = in_the_page([("grad_B", text) for text in texts], {"grad_B": exercise_sheet("grad_B")})
    for text, (right, says) in zip(texts, found, strict=True):
        assert not right
        assert re.fullmatch(r"Not yet\. .{8,175}", says), (text, says)
        assert "undefined" not in says, (text, says)


def test_the_drawn_curve_has_its_numbers_in_words():
    for what, curve in (("rank", rank_curve()), ("rate", rate_curve())):
        told = re.search(r'aria-label="(.*?)"', page.two_losses(curve, what, "rows"))[1]
        for value, (seen, new) in curve.items():
            assert f"{what} {value:g}: {seen:.2f} and {new:.2f}" in told


# --- in a browser: the forms on a page of their own, as docs/learn/exercises.md has them ------------------------------

LEARN = DOCS / "learn" / "exercises.md"
SOLVED = re.compile(r"^<details><summary>Solution</summary>\n\n```python\n(def (\w+)(?:.|\n)*?)\n\n\n", re.M)
SOLUTIONS = {name: code for code, name in SOLVED.findall(LEARN.read_text(encoding="utf-8"))}
widths = pytest.mark.parametrize("width", [390, 1280])


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Serve a page with all forms, and return its address."""
    folder = tmp_path_factory.mktemp("forms")
    for name in ("numpy.js", "questions.js", "exercises.js", "questions.css"):
        shutil.copy(DOCS / "_static" / name, folder)
    drawn = [page.kept(), page.starts(), *map(page.write, EXERCISES), *map(page.ask, QUESTIONS)]
    head = '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += '<link rel="stylesheet" href="questions.css">'
    scripts = (f'<script src="{name}" defer></script>' for name in ("numpy.js", "questions.js", "exercises.js"))
    folder.joinpath("index.html").write_text("\n".join([head, *drawn, *scripts]))
    with served(folder) as address:
        yield address


@pytest.fixture
def open_forms(browser, forms):
    """Return a function that opens the page of forms at a width, nothing answered yet."""

    def go(width, script=True):
        resize(browser, width)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(forms)
        if script:
            browser.execute_script("localStorage.clear()")
            browser.refresh()
        return browser

    yield go
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def form_of(browser, name):
    own = f"write-{name}" if name in EXERCISES or name == "first_to_move" else None
    return browser.find_element("id", own or f"question-{name.replace(' ', '-').replace(',', '')}")


def submit(browser, name, guess):
    """Answer by keyboard alone, and return what the page says."""
    from selenium.webdriver.common.keys import Keys

    form = form_of(browser, name)
    if name in EXERCISES:
        area = form.find_element("css selector", "textarea")
        area.clear()
        area.send_keys(guess)  # a key for each letter; Enter begins a line where there are several
        form.find_element("css selector", "button").send_keys(Keys.ENTER)
    elif QUESTIONS[name].choices:
        radios = form.find_elements("css selector", "input[type=radio]")
        radios[0].send_keys(Keys.SPACE)
        place = QUESTIONS[name].choices.index(guess)
        for radio in radios[:place]:
            radio.send_keys(Keys.ARROW_RIGHT)
        radios[place].send_keys(Keys.ENTER)
    else:
        field = form.find_element("css selector", "input[type=text]")
        field.clear()
        field.send_keys(str(guess), Keys.ENTER)
    return form.find_element("css selector", "[aria-live=polite]").text


def body(name):
    """Return a solution of the page without its def, and its lines without their indentation."""
    return textwrap.dedent("\n".join(SOLUTIONS[name].split("\n")[1:]))


@pytest.mark.site
@widths
def test_every_exercise_can_be_written_by_keyboard(open_forms, width):
    browser = open_forms(width)
    assert {*SOLUTIONS} == {*EXERCISES, "first_to_move"}
    for name in EXERCISES:
        assert submit(browser, name, body(name)) == EXERCISES[name].praise
        assert form_of(browser, name).get_attribute("data-verdict") == "right"
    assert not [
        entry
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE" and "favicon" not in entry["message"]
    ]


@pytest.mark.site
@widths
def test_every_question_can_be_answered_by_keyboard(open_forms, width):
    browser = open_forms(width)
    for name in QUESTIONS:
        found = sheet(name)
        wrong, hint = found["known"][0]
        assert submit(browser, name, wrong) == f"Not yet. {hint}"
        answer = found["answer"] if found["choices"] else float(f"{found['answer']:.6f}")
        assert submit(browser, name, answer) == found["right"]
        assert form_of(browser, name).get_attribute("data-verdict") == "right"


@pytest.mark.site
def test_a_second_wrong_answer_gets_another_hint(open_forms):
    browser = open_forms(1280)
    hints = [f"Not yet. {hint}" for hint in QUESTIONS["first step"].hints]
    assert [submit(browser, "first step", guess) for guess in (345, "ten", 3456)] == [
        hints[0],
        "Write a number, such as 0.25, 1/4 or 3e-4.",
        hints[1],
    ]


@pytest.mark.site
def test_enter_checks_one_line_or_begins_another_of_several(open_forms):
    from selenium.webdriver.common.keys import Keys

    browser = open_forms(1280)

    def said(name):
        return form_of(browser, name).find_element("css selector", "[aria-live=polite]").text

    area = form_of(browser, "grad_B").find_element("css selector", "textarea")
    area.send_keys("s * dy.T @ h", Keys.ENTER)
    assert said("grad_B") == EXERCISES["grad_B"].praise
    area.clear()
    area.send_keys("t = dy.T", Keys.SHIFT, Keys.ENTER, Keys.SHIFT, "dB = t @ h", Keys.ENTER)
    assert area.get_attribute("value") == "t = dy.T\ndB = t @ h\n"
    area.send_keys(Keys.CONTROL, Keys.ENTER)
    assert said("grad_B").startswith("Not yet. dB: alpha/r is missing")


@pytest.mark.site
def test_answers_outlive_a_reload_until_they_are_forgotten(open_forms):
    browser = open_forms(1280)
    boxes = form_of(browser, "first_to_move").find_elements("css selector", "input[type=checkbox]")
    for place in (0, 1, 3, 4):  # both factors move from two random ones, else the one that starts at zero
        boxes[place].click()
    forms = form_of(browser, "first_to_move")
    forms.find_element("css selector", "button").click()
    submit(browser, "backward", body("backward"))
    submit(browser, "grad_B", "dy.T @ h")
    submit(browser, "first step", "0,01")
    submit(browser, "first move, one row", "16")
    form_of(browser, "count").find_element("css selector", "textarea").send_keys("rank *")  # not checked yet

    def shown():
        asked = [*EXERCISES, "first_to_move", *QUESTIONS]
        said = {name: form_of(browser, name).find_element("css selector", "[aria-live=polite]").text for name in asked}
        inputs = browser.find_elements("css selector", "textarea, input")
        return said, [(field.get_attribute("value"), field.is_selected()) for field in inputs]

    def counted():
        return browser.find_element("css selector", ".kept-answers span").text

    before = shown()
    assert counted() == f"3 of {len(EXERCISES) + len(QUESTIONS) + 1} right. Your answers stay in this browser."
    assert sum(map(bool, before[0].values())) == 5
    assert ("rank *", False) in before[1]
    browser.refresh()
    assert shown() == before
    assert counted().startswith("3 of ")
    browser.find_element("css selector", ".kept-answers button").click()
    browser.switch_to.alert.dismiss()
    assert shown() == before
    browser.find_element("css selector", ".kept-answers button").click()
    browser.switch_to.alert.accept()
    for _ in range(2):
        assert not any(shown()[0].values())
        assert not any(selected for _, selected in shown()[1])
        assert counted().startswith("0 of ")
        browser.refresh()


@pytest.mark.site
@widths
def test_a_form_fits_the_screen_and_a_thumb(open_forms, width):
    browser = open_forms(width)
    sizes = browser.execute_script(
        """const own = "input[type=text], textarea, button, .choice";
           return [...document.querySelectorAll(`:is(form.question, .kept-answers) :is(${own})`)].map(e => {
               const box = e.getBoundingClientRect();
               return [box.left >= 0 && box.right <= arguments[0], box.height >= 44]})""",
        width,
    )
    assert sizes
    assert all(all(fits) for fits in sizes)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.site
def test_without_javascript_no_form_is_in_the_way(open_forms):
    browser = open_forms(390, script=False)
    assert not [form for form in browser.find_elements("css selector", "form, .kept-answers") if form.is_displayed()]
