"""Pictures: sliders show minilora's numbers, in a browser too; in the graph an equation lights its edges."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import hands

from .conftest import built, wait, widths


def data_of(picture):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', picture, re.S)[1])


def test_the_matrix_of_the_circle_has_its_singular_values():
    data = data_of(hands.circle())
    lengths = [float(np.hypot(*end)) for _, end in data["arrows"]]
    assert max(lengths) == pytest.approx(hands.LENGTHS[0], abs=1e-3)
    assert min(lengths) == pytest.approx(hands.LENGTHS[1], abs=1e-3)
    assert [float(re.search(r"is ([\d.]+) long", said)[1]) for said in data["says"]] == pytest.approx(
        lengths, abs=0.006
    )
    line = data_of(hands.nearest_on_a_line())
    assert min(line["errors"]) == pytest.approx(hands.LENGTHS[1] ** 2, abs=1e-3)


# --- the derivation's graph, a file: what each equation gives and reads -----------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
GRAPH = (DOCS / "learn" / "pictures" / "graph.svg").read_text(encoding="utf-8")


def names(number, role):
    """Return what an equation of the graph gives, or what it reads."""
    groups = re.findall(r"<g([^>]*)>(.*?)</g>", GRAPH, re.S)
    of = [group for told, group in groups if number in " ".join(re.findall(rf'data-{role}="([^"]*)"', told)).split()]
    return {unescape(name) for group in of for name in re.findall(r'italic"[^>]*>(.*?)<', group)}


EDGES = {
    "1": ("h", {"x", "A"}),
    "2": ("update", {"h", "B"}),
    "7": ("base", {"x", "W"}),
    "11": ("y", {"base", "update"}),
    "16": ("dy", {"y", "t"}),
    "3": ("dB", {"dy", "h"}),
    "4": ("dh", {"dy", "B"}),
    "5": ("dA", {"dh", "x"}),
    "10": ("dy W", {"dy", "W"}),
    "6": ("dh A", {"dh", "A"}),
    "12": ("dx", {"dy W", "dh A"}),
}
"""What each equation gives, and what it reads. The numbers are those that docs/learn/derivation.py computes."""


def test_the_graph_has_what_each_equation_gives_and_reads():
    assert {number: (*names(number, "eq"), names(number, "reads")) for number in EDGES} == EDGES
    assert names("15", "reads") == {"y", "t"}
    page = (DOCS / "learn" / "derivation.md").read_text(encoding="utf-8")
    drawn = {number for of in re.findall(r'data-eq="([^"]*)"', GRAPH) for number in of.split()}
    assert drawn == {*EDGES, "15"}
    assert all(f"<!-- equation {number} " in page for number in drawn)


# --- in a browser -----------------------------------------------------------------------------------------------------


@widths
def test_an_arrow_key_moves_a_slider_and_its_sentence(visit, width):
    from selenium.webdriver.common.keys import Keys

    figures = visit("rank.html", width).find_elements("css selector", "figure.hands")
    assert len(figures) == 2
    for figure in figures:
        slider, output, says = (figure.find_element("css selector", part) for part in ("input", "output", ".says"))
        assert (slider.get_attribute("type"), slider.aria_role) == ("range", "slider")
        assert slider.accessible_name == figure.find_element("css selector", "label").text
        assert says.get_attribute("aria-live") == "polite"
        slider.send_keys(Keys.HOME)
        sizes = set()
        for said in data_of(figure.get_attribute("innerHTML"))["says"]:
            assert says.text == said
            sizes.add((output.size["height"], slider.size["width"]))
            slider.send_keys(Keys.ARROW_RIGHT)
        ((high, _),) = sizes  # a value stays on one line
        assert high < 40


@pytest.mark.parametrize("page", [pytest.param("rank.html", marks=built)])
def test_without_javascript_a_drawing_and_its_sentence_stay(visit, page):
    figure = visit(page, 390, script=False).find_element("css selector", "figure.hands")
    assert not figure.find_element("css selector", ".controls").is_displayed()
    assert figure.find_element("css selector", ".drawing svg").is_displayed()
    assert figure.find_element("css selector", ".says").is_displayed()


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
    wait(lambda: len(browser.find_elements("css selector", "svg.drawn")) == count)  # a busy machine is still reading
    found = browser.execute_script(
        """return [...document.querySelectorAll("svg.drawn")].map(svg => {
               const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
               const boxes = [...svg.querySelectorAll("text")].map(text => text.getBBox());
               return [12 * scale, boxes.some(b => b.x < 0 || b.x + b.width > svg.viewBox.baseVal.width)]; })"""
    )
    assert all(size >= 11 and not cut for size, cut in found)


@widths
def test_an_equation_lights_its_result_and_its_factors(visit, width):
    browser = visit("derivation.html", width)

    def lit():
        return set(
            browser.execute_script(
                """return [...document.querySelectorAll("figure.graph g.lit")].map(e => e.dataset.eq)"""
            )
        )

    def lettered(css):
        find = """return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"""
        return set(browser.execute_script(find, f"figure.graph g{css} [font-style]"))

    assert lit() == set()
    for number in {*EDGES, "15"}:
        button = browser.find_element("css selector", f'figure.graph button[data-eq="{number}"]')
        # By hand: a window in the back gets no event of its own.
        focused = "arguments[0].dispatchEvent(new FocusEvent('focusin', {bubbles: true}))"
        browser.execute_script(focused, button)
        assert lit()
        assert all(number in names.split() for names in lit())
    link = browser.find_element("css selector", "#eq-3 a.to-graph")
    browser.execute_script("arguments[0].click()", link)
    assert lit() == {"3"}
    assert lettered(".lit") == {"dB"}
    assert lettered(".read") == {"dy", "h"}
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
