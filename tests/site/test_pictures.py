"""Pictures: sliders show minilora's numbers, in a browser too; in the graph an equation lights its edges."""

import json
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import costs
import hands

from minilora import NF4, dequantize_nf4, quantize_nf4

from .conftest import SITE, built, wait


def data_of(picture):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', picture, re.S)[1])


@pytest.mark.parametrize("n", [4, 12])
@pytest.mark.parametrize("N", [3, 40])
@pytest.mark.parametrize("r", [1, 5])
def test_the_ledgers_sums_are_those_of_the_steps(n, N, r):
    ways = costs.ways(N, n, n, r, need_dx=True)
    for key, name in (("full", "full training"), ("lora", "LoRA beside its base")):
        found = hands.tally(hands.spelled()[key], w=n, N=N, r=r)
        assert found["multiply-adds"] == ways[name].multiply_adds == costs.watch(ways[name].run)[0]
        assert (found["bytes moved"], found["bytes of Adam"]) == (ways[name].least_bytes, ways[name].optimizer_bytes)


def test_the_levels_are_nf4_and_lose_what_is_said():
    picture = hands.levels_under_the_bell().data
    data = data_of(picture)
    assert data["values"]["bits"] == ["2", "3", "4", "5", "6"]
    assert np.allclose(data["books"][2], NF4, atol=1e-4)
    assert [len(book) for book in data["books"]] == [4, 8, 16, 32, 64]
    assert all(sum(shares) == pytest.approx(1, abs=0.01) for shares in data["shares"])
    weights = np.random.default_rng(1).standard_normal((512, 64)).astype("float32")
    found = dequantize_nf4(*quantize_nf4(weights), weights.shape)
    error = np.linalg.norm(found - weights) / np.linalg.norm(weights)
    assert float(re.search(r"error is ([\d.]+)%", data["says"][2])[1]) == pytest.approx(100 * error, abs=0.2)


def test_the_matrix_of_the_circle_has_its_singular_values():
    data = data_of(hands.circle().data)
    lengths = [float(np.hypot(*end)) for _, end in data["arrows"]]
    assert max(lengths) == pytest.approx(hands.LENGTHS[0], abs=1e-3)
    assert min(lengths) == pytest.approx(hands.LENGTHS[1], abs=1e-3)
    assert [float(re.search(r"is ([\d.]+) long", said)[1]) for said in data["says"]] == pytest.approx(
        lengths, abs=0.006
    )
    line = data_of(hands.nearest_on_a_line().data)
    assert min(line["errors"]) == pytest.approx(hands.LENGTHS[1] ** 2, abs=1e-3)


# --- the derivation's graph, a file: what each equation gives and reads -----------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"
GRAPH = (DOCS / "learn" / "pictures" / "graph.svg").read_text(encoding="utf-8")


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

PICTURES = {
    "rank.html": "circle",
    "cost.html": "ledger",
    "merging.html": "levels",
}
site = [pytest.param(*item, marks=built) for item in PICTURES.items()]


class Inputs(HTMLParser):
    """The native sliders of a page, and the labels."""

    def __init__(self, page):
        super().__init__()
        self.sliders, self.labels, self.live = [], [], 0
        self.feed((SITE / page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "input" and attrs.get("type") == "range":
            self.sliders.append(attrs["id"])
        if tag == "label" and "for" in attrs:
            self.labels.append(attrs["for"])
        self.live += attrs.get("aria-live") == "polite"


@pytest.mark.parametrize(("page", "picture"), site)
def test_sliders_are_native_and_named_in_the_page(page, picture):
    found = Inputs(page)
    assert found.sliders
    assert set(found.sliders) <= set(found.labels)
    assert found.live >= 1


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(("page", "picture"), site)
def test_a_sliders_value_stays_on_one_line(visit, page, picture, width):
    found = visit(page, width).execute_script(
        """return [...document.querySelectorAll("figure.hands .control")].map(control => {
               const [input, output] = [control.querySelector("input"), control.querySelector("output")], found = [];
               for (input.value = input.min; ; input.stepUp()) {
                   input.dispatchEvent(new Event("input"));
                   found.push([output.getClientRects().length, output.offsetHeight, input.offsetWidth]);
                   if (input.value === input.max) return found;
               } })"""
    )
    for places in found:
        assert all(place == places[0] for place in places)
        assert places[0][1] < 40


def move(browser, name, places):
    """Press an arrow key on a slider, and return the picture's sentence."""
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("css selector", f"figure.hands [name={name}]")
    slider.send_keys((Keys.ARROW_RIGHT if places > 0 else Keys.ARROW_LEFT) * abs(places))
    return slider.find_element("xpath", "ancestor::figure").find_element("css selector", ".says").text


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_the_ledgers_sliders_counts_that_step(visit, width):
    browser = visit("cost.html", width)
    for name, step in (("width", -3), ("batch", -1), ("r", 4), ("width", 1)):
        said = move(browser, name, step)
        w, N, r, *shares = map(float, re.findall(r"[\d.]*\d", said.replace(",", "")))
        full, lora = (hands.tally(way, w=int(w), N=int(N), r=int(r)) for way in hands.spelled().values())
        assert shares == pytest.approx([100 * lora[key] / full[key] for key in full], rel=6e-3)
        shown = [x.text for x in browser.find_elements("css selector", "#ledger .drawing svg text.tick")]
        numbers = [float(text.replace(",", "")) for text in shown if text[0].isdigit()]
        expected = [way[key] / 1e6 for key in full for way in (full, lora)]
        assert numbers == pytest.approx(expected, rel=6e-3)
    assert (w, N, r) == (256, 32, 128)


@pytest.mark.parametrize(("page", "picture"), site)
def test_without_javascript_a_drawing_and_its_sentence_stay(visit, page, picture):
    browser = visit(page, 390, script=False)
    figure = browser.find_element("css selector", "figure.hands")
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
