"""The pictures with sliders: their numbers are minilora's, as the build has them and in a browser that moves them."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("IPython", reason="the site's tools are not installed: pip install -e '.[docs]'")

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import costs
import hands

from minilora import NF4, LoRA, dequantize_nf4, mse, quantize_nf4, train


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


def test_a_followed_training_is_that_of_train():
    found = hands.follow(8, 0.01)
    rng = np.random.default_rng(0)
    X, change = rng.standard_normal((256, 32)), rng.standard_normal((24, 3)) @ rng.standard_normal((3, 32)) / 3
    R = X @ change.T + 0.1 * rng.standard_normal((256, 24))
    adapter = LoRA.init(32, 24, rank=4, alpha=8, rng=rng, dtype="float64")
    A0 = adapter.lora_A.copy()
    history = train(adapter, X, R, epochs=hands.STEPS, batch_size=256, lr=0.01, log_every=50, rng=rng)
    assert np.allclose(found[0, [hands.MARKS.index(e) for e in history.epochs]], history.losses, rtol=1e-6)
    moved = np.linalg.norm(adapter.lora_A - A0), np.linalg.norm(adapter.lora_B)
    assert np.allclose(found[1:, -1], moved, rtol=1e-6)
    assert found[0, 0] == pytest.approx(float(mse(0 * R, R)[0]))
    assert found[1, 1] == 0 < found[2, 1]  # after one step B alone has moved


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


def test_the_sentences_and_the_table_say_one_thing():
    picture = hands.rank_against_spectrum().data
    data, truth = data_of(picture), hands.word()
    for rank, (learned, said) in enumerate(zip(data["learned"], data["says"], strict=True)):
        left = ((truth - np.array(learned)) ** 2).sum() / (truth**2).sum()
        assert float(re.search(r"left ([\d.]+)%", said)[1]) == pytest.approx(100 * left, abs=0.2)
        assert np.linalg.matrix_rank(np.array(learned), tol=0.2) <= rank
        assert f"<td>{rank}</td><td>{rank * sum(truth.shape)}</td>" in picture
        # The least that any matrix of the rank can leave, by Eckart and Young.
        least = (np.linalg.svd(truth, compute_uv=False)[rank:] ** 2).sum() / (truth**2).sum()
        assert left > least - 0.002


# --- in a browser -----------------------------------------------------------------------------------------------------

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
PICTURES = {"index.html": "rank", "choosing.html": "training", "why-not-faster.html": "ledger"}
built = [
    pytest.mark.site,
    pytest.mark.skipif(not SITE.is_dir(), reason="the site is not built: python docs/build.py"),
]
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
    assert found.live == 1


@pytest.mark.parametrize(("page", "picture"), site)
def test_a_page_with_sliders_stays_under_300_kilobytes(page, picture):
    files = [SITE / page, SITE / "_static" / "hands.js"]
    assert sum(file.stat().st_size for file in files) < 300_000
    assert "hands.js" in files[0].read_text(encoding="utf-8")


def move(browser, name, places):
    """Press an arrow key on a slider, and return the picture's sentence."""
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("name", name)
    slider.send_keys((Keys.ARROW_RIGHT if places > 0 else Keys.ARROW_LEFT) * abs(places))
    return browser.find_element("css selector", ".says").text


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_the_rank_shows_what_it_learns(visit, width):
    browser = visit("index.html", width)
    data = data_of((SITE / "index.html").read_text(encoding="utf-8"))
    assert browser.find_element("css selector", ".says").text == data["says"][2]
    for step, rank in ((1, 3), (4, 7), (-7, 0)):
        assert move(browser, "rank", step) == data["says"][rank]
        cells = browser.execute_script(
            "return document.querySelectorAll('.drawing svg')[1].querySelectorAll('.lora, .base').length"
        )
        assert cells == np.count_nonzero(data["learned"][rank])
        assert browser.find_element("name", "rank").get_attribute("aria-valuetext") == str(rank)


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_alpha_and_the_rate_shows_that_training(visit, width):
    browser = visit("choosing.html", width)
    for name, step in (("alpha", 2), ("rate", -3), ("alpha", -4)):
        said = move(browser, name, step)
        alpha, rate = (float(x) for x in re.match(r"alpha (\S+), rate (\S+):", said).groups())
        loss, A, B = hands.follow(alpha, rate)
        assert re.search(r"to (\S+)\. A moved", said)[1] == f"{loss[-1]:.2g}"
        assert said.endswith(f"A moved by {A[-1]:.2f}, B by {B[-1]:.2f}.")
    assert (alpha, rate) == (1, 0.001)
    assert len(browser.find_elements("css selector", ".drawing polyline")) == 3


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_the_ledgers_sliders_counts_that_step(visit, width):
    browser = visit("why-not-faster.html", width)
    for name, step in (("width", -3), ("batch", -1), ("r", 4), ("width", 1)):
        said = move(browser, name, step)
        w, N, r, *shares = map(float, re.findall(r"[\d.]*\d", said.replace(",", "")))
        full, lora = (hands.tally(way, w=int(w), N=int(N), r=int(r)) for way in hands.spelled().values())
        assert shares == pytest.approx([lora[key] / full[key] for key in full], rel=6e-3)
        shown = [x.text for x in browser.find_elements("css selector", ".drawing svg text.tick")]
        numbers = [float(text.replace(",", "")) for text in shown if text[0].isdigit()]
        expected = [way[key] / 1e6 for key in full for way in (full, lora)]
        assert numbers == pytest.approx(expected, rel=6e-3)
    assert (w, N, r) == (256, 32, 128)


@pytest.mark.parametrize(("page", "picture"), site)
def test_without_javascript_a_drawing_and_a_table_stay(visit, page, picture):
    browser = visit(page, 390, script=False)
    figure = browser.find_element("css selector", "figure.hands")
    assert not figure.find_element("css selector", ".controls").is_displayed()
    assert figure.find_element("css selector", ".drawing svg").is_displayed()
    assert figure.find_element("css selector", "details > summary").is_displayed()  # a browser opens it by itself
    assert len(figure.find_elements("css selector", "table tr")) > 5
