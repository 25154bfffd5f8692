"""The drawings: their numbers are those of the layers, and in a browser an equation lights its edges."""

import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from .conftest import built

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))


DOCS = Path(__file__).parents[2] / "docs"
RNG = np.random.default_rng(0)


def texts(svg):
    """Return the words of a drawing, or of a part of it."""
    return [unescape(words) for words in re.findall(r"<text[^>]*>(.*?)</text>", svg)]


def numbers(svg):
    """Return the numbers among them."""
    found = [words.replace("\u2212", "-") for words in texts(svg)]
    return [float(words) for words in found if re.fullmatch(r"-?[\d.]+", words)]


def edges(number, role="eq"):
    """Return the numbers, under their names, that an equation of the graph gives, or those that it reads."""
    found = {}
    for attributes, group in re.findall(r"<g([^>]*)>(.*?)</g>", GRAPH, re.S):
        if number in " ".join(re.findall(rf'data-{role}="([^"]*)"', attributes)).split():
            found |= {name: numbers(group) for name in re.findall(r'italic"[^>]*>(.*?)<', group)}
    return found


GRAPH = (DOCS / "learn" / "pictures" / "graph.svg").read_text(encoding="utf-8")

# Each equation again, on whole numbers. An argument's name is what stands beside it on the graph; s is 2.
BY_HAND = {
    "1": ("h", lambda x, A: x @ A.T),
    "2": ("update", lambda h, B: 2 * h @ B.T),
    "7": ("base", lambda x, W: x @ W.T),
    "11": ("y", lambda base, update: base + update),
    "16": ("dy", lambda y, t: (y - t) / 3),
    "3": ("dB", lambda dy, h: 2 * dy.T @ h),
    "4": ("dh", lambda dy, B: 2 * dy @ B),
    "5": ("dA", lambda dh, x: dh.T @ x),
    "10": ("dy W", lambda dy, W: dy @ W),
    "6": ("dh A", lambda dh, A: dh @ A),
    "12": ("dx", lambda dy_W, dh_A: dy_W + dh_A),
}
ROWS = {"W": 2, "A": 1, "B": 2, "dA": 1, "dB": 2}  # of the others 3; a column is written before the next


@pytest.mark.parametrize("number", BY_HAND)
def test_what_an_equation_reads_gives_its_result(number):
    name, formula = BY_HAND[number]
    read = {
        label.replace(" ", "_"): np.reshape(column, (-1, ROWS.get(label, 3))).T
        for label, column in edges(number, "reads").items()
    }
    assert edges(number) == {name: formula(**read).T.ravel().tolist()}


def test_the_graph_has_the_loss_and_the_pages_equations():
    assert edges("15", "reads").keys() == {"y", "t"}
    page = (DOCS / "learn" / "derivation.md").read_text(encoding="utf-8")
    drawn = {number for of in re.findall(r'data-eq="([^"]*)"', GRAPH) for number in of.split()}
    assert drawn == {*BY_HAND, "15"}
    assert all(f"<!-- equation {number} " in page for number in drawn)


# --- in a browser -----------------------------------------------------------------------------------------------------

DRAWN = {
    "network.html": 3,
    "decoder.html": 2,
    "library/variants.html": 1,
    "derivation.html": 1,
}
DRAWN = [pytest.param(page, count, marks=built) for page, count in DRAWN.items()]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("page", "count"), DRAWN)
def test_no_letter_of_a_drawing_is_small_or_cut(visit, page, count, width):
    browser = visit(page, width)
    found = browser.execute_script(
        """return [...document.querySelectorAll("svg.drawn")].map(svg => {
               const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
               const boxes = [...svg.querySelectorAll("text")].map(text => text.getBBox());
               return [12 * scale, boxes.some(b => b.x < 0 || b.x + b.width > svg.viewBox.baseVal.width)]; })"""
    )
    assert len(found) == count
    assert all(size >= 11 and not cut for size, cut in found)


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_an_equation_lights_its_result_and_its_factors(visit, width):
    browser = visit("derivation.html", width)

    def lit():
        return set(
            browser.execute_script(
                """return [...document.querySelectorAll("figure.graph g.lit")].map(e => e.dataset.eq)"""
            )
        )

    def names(css):
        find = """return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"""
        return set(browser.execute_script(find, f"figure.graph g{css} [font-style]"))

    assert lit() == set()
    for number in {*BY_HAND, "15"}:
        button = browser.find_element("css selector", f'figure.graph button[data-eq="{number}"]')
        # By hand: a window in the back gets no event of its own.
        focused = "arguments[0].dispatchEvent(new FocusEvent('focusin', {bubbles: true}))"
        browser.execute_script(focused, button)
        assert lit()
        assert all(number in names.split() for names in lit())
    link = browser.find_element("css selector", "#eq-3 a.to-graph")
    browser.execute_script("arguments[0].click()", link)
    assert lit() == {"3"}
    assert names(".lit") == {"dB"}
    assert names(".read") == {"dy", "h"}
    pale = browser.execute_script(
        """return [...document.querySelectorAll("figure.graph svg > *")].filter(e => !e.matches(".lit, .read"))
               .map(e => getComputedStyle(e).opacity)"""
    )
    assert set(pale) == {"0.25"}
    assert not browser.find_elements("css selector", "#eq-25 a.to-graph")


@pytest.mark.parametrize("page", [pytest.param("derivation.html", marks=built)])
def test_without_javascript_the_graph_stays_whole(visit, page):
    browser = visit(page, 390, script=False)
    assert browser.find_element("css selector", "figure.graph svg").is_displayed()
    assert not browser.find_element("css selector", "figure.graph .steps").is_displayed()
