"""A lesson asks before it shows: each choice is answered, and in a browser by a button."""

from pathlib import Path

import pytest

from .conftest import built
from .test_front import question, show

LEARN = Path(__file__).parents[2] / "docs" / "learn"
ASKED = {
    page.stem: [
        question("**Predict.**" + asked) for asked in page.read_text(encoding="utf-8").split("**Predict.**")[1:]
    ]
    for page in sorted(LEARN.glob("*.md"))
    if page.stem != "index"
}
CASES = [(page, i) for page, asked in ASKED.items() for i in range(len(asked))]


def test_some_lessons_ask():
    assert {"rank", "is-a-gradient-right", "alpha"} <= {page for page, _ in CASES}


@pytest.mark.parametrize(("page", "i"), CASES)
def test_every_choice_is_answered_in_plain_words(page, i):
    choices, right, remarks = ASKED[page][i]
    assert len(choices) >= 3
    assert {right, *remarks} == {*choices}
    assert right not in remarks
    assert not any("$" in words for words in [*choices, *remarks.values()])


@pytest.mark.parametrize("page", [pytest.param(page, marks=built) for page, _ in dict(CASES).items()])
def test_a_choice_is_a_button_that_answers(visit, page):
    browser = visit(f"{page}.html", 390)
    groups = browser.find_elements("css selector", ".choices")
    assert len(groups) == len(ASKED[page])
    for group, (choices, right, remarks) in zip(groups, ASKED[page], strict=True):
        answer = browser.execute_script("return arguments[0].nextElementSibling.nextElementSibling", group)
        assert not answer.get_attribute("open")
        buttons = group.find_elements("css selector", "button")
        assert [button.text for button in buttons] == choices
        for button in buttons:
            show(browser, button)
            button.send_keys(" ")
            verdict = browser.execute_script("return arguments[0].nextElementSibling.textContent", group)
            verdict = verdict.replace("\u2019", "'")  # the page has a printer's apostrophe
            said = "Yes." if button.text == right else f"You said {button.text}. {remarks[button.text]}"
            assert (verdict, button.get_attribute("aria-pressed")) == (said, "true")
        assert answer.get_attribute("open")
