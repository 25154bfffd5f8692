"""The pictures with sliders: their numbers are minilora's, as the build has them and in a browser that moves them."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import costs
import hands

from minilora import NF4, dequantize_nf4, quantize_nf4

from .conftest import SITE, built


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
