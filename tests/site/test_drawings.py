"""The drawings: their numbers and colours are those of the layers, and in a browser an equation lights its edges."""

import re
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from .test_derivation import PRINTED
from .test_hands import built, data_of, move

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

import drawings

from minilora import Linear, LoRALinear, adapt, adapters
from minilora.layer import cache_bytes

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
    for attributes, group in re.findall(r"<g([^>]*)>(.*?)</g>", drawings.graph().data, re.S):
        if number in " ".join(re.findall(rf'data-{role}="([^"]*)"', attributes)).split():
            found |= {name: numbers(group) for name in re.findall(r'italic"[^>]*>(.*?)<', group)}
    return found


def whole():
    """Return one of each drawing."""
    layer = LoRALinear.from_linear(Linear.init(40, 30, rng=RNG, bias=False), rank=2, alpha=2, rng=RNG)
    return {
        "beside": drawings.beside(layer),
        "graph": drawings.graph(),
        "attention": drawings.attention(adapt(drawings.small_head()[0], "all-linear", rank=1, alpha=1, rng=RNG)),
        "shares": drawings.shares(),
        "block": drawings.block(drawings.small_model("all-linear")),
        "way": drawings.way_of_dy(),
        "dora": drawings.two_arrows(),
    }


def test_the_graph_has_the_numbers_that_the_page_prints():
    found = drawings.worked()
    for name in PRINTED.keys() - {"error", "A1", "B1", "L1"}:
        assert np.array_equal(np.squeeze(found[name]), np.squeeze(PRINTED[name])), name
    assert np.array_equal(found["dx_base"] + found["dx_adapter"], PRINTED["dx"])
    assert np.array_equal(found["base"] + found["update"], PRINTED["y"])


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
def test_what_an_equation_reads_on_the_graph_gives_its_result(number):
    name, formula = BY_HAND[number]
    read = {
        label.replace(" ", "_"): np.reshape(column, (-1, ROWS.get(label, 3))).T
        for label, column in edges(number, "reads").items()
    }
    assert edges(number) == {name: formula(**read).T.ravel().tolist()}


def test_the_loss_reads_y_and_t():
    assert edges("15", "reads").keys() == {"y", "t"}
    assert 'data-eq="15"' in drawings.graph().data


def test_every_equation_of_the_graph_stands_on_the_page():
    page = (DOCS / "derivation.md").read_text(encoding="utf-8")
    assert all(f"```{{equation}} {number} " in page for number in drawings.STEPS)
    assert drawings.STEPS.keys() == {*BY_HAND, "15"}


@pytest.mark.parametrize("on_q", drawings.STRENGTHS)
@pytest.mark.parametrize("on_v", drawings.STRENGTHS)
def test_the_shares_are_a_softmax_of_moved_scores(on_q, on_v):
    q, k, v = (
        np.array([[1.0, 0], [0, 2], [1, 1]]),
        np.array([[1.0, 1], [2, 0], [0, -1]]),
        np.array([[1.0, 0], [0, 1], [2, 2]]),
    )
    q[2] -= 2 * on_q
    v[1] += on_v
    S = np.where(np.tri(3), q @ k.T / np.sqrt(2), -np.inf)
    P = np.exp(S) / np.exp(S).sum(axis=1, keepdims=True)
    found, o = drawings.adapted_head(on_q, on_v)
    assert np.allclose(found, P, atol=1e-12)
    assert np.allclose(o, P @ v, atol=1e-12)
    place = drawings.STRENGTHS.index(on_q) * len(drawings.STRENGTHS) + drawings.STRENGTHS.index(on_v)
    shown = [float(number) for number, _ in data_of(drawings.shares().data)["cells"][place]]
    assert shown == pytest.approx([*P.ravel(), *(P @ v).ravel()], abs=0.006)
    if on_q == on_v == 0:
        assert numbers(drawings.grids(found, o).svg("")) == shown


def test_a_drawing_marks_the_adapters_that_there_are():
    for targets in (["q_proj"], ["q_proj", "v_proj"], "all-linear"):
        head = adapt(drawings.small_head()[0], targets, rank=1, alpha=1, rng=RNG)
        assert drawings.attention(head).data.count(f'fill="{drawings.LORA}"') == len(adapters(head))
    for targets, count in (("all-linear", 7), (["up_proj"], 1)):
        assert drawings.block(drawings.small_model(targets)).data.count(f'fill="{drawings.LORA}"') == count


def test_dy_ends_where_the_lowest_adapter_is():
    said = data_of(drawings.way_of_dy().data)["says"]
    ends = [
        "embedding",
        "block 0: attention",
        "block 2: attention",
        "block 1: MLP",
        "block 1: attention",
        "block 0: attention",
    ]
    ids = np.random.default_rng(0).integers(0, 50, (2, 13))
    for (name, targets), sentence, end in zip(drawings.WHERE.items(), said, ends, strict=True):
        kept = cache_bytes(drawings.small_model(targets).forward(ids[:, :-1])[1][2])
        assert sentence.startswith(f"{name}: dy goes down to {end}. ")
        assert float(re.search(r"keeps ([\d.]+) kB", sentence)[1]) == pytest.approx(kept / 1000, abs=0.5)


def test_what_dy_does_not_reach_is_grey():
    for picture, name in zip(data_of(drawings.way_of_dy().data)["pictures"], drawings.WHERE, strict=True):
        grey = "".join(re.findall(r'<g opacity="0\.6">(.*?)</g>', picture, re.S))
        below = int(name[-1]) if name[-1].isdigit() else 0
        assert {f"block {i}: MLP" in grey for i in range(below)} <= {True}
        assert f"block {below}: MLP" not in grey


def test_doras_new_row_lies_along_v_and_is_m_long():
    svg = drawings.two_arrows().data
    m = float(re.search(r"m = ([\d.]+)", svg)[1])
    tips = [tuple(map(float, point.split(","))) for point in re.findall(r'<polygon points="(\S+) ', svg)]
    row, W, _, V = (np.array(tip) - (22, 206) for tip in tips)
    assert np.linalg.norm(row) / 84 == pytest.approx(m, abs=0.01)
    assert row @ V / np.linalg.norm(row) / np.linalg.norm(V) == pytest.approx(1, abs=1e-4)
    assert np.linalg.norm(W) / 84 == pytest.approx(float(re.search(r"a row of W, ([\d.]+)", svg)[1]), abs=0.01)


def test_matrices_are_drawn_to_scale():
    layer = LoRALinear.from_linear(Linear.init(120, 60, rng=RNG, bias=False), rank=6, alpha=6, rng=RNG)
    boxes = re.findall(r'width="([\d.]+)" height="([\d.]+)" fill="(#\w+)"', drawings.beside(layer).data)
    (W, A, B) = [(float(width), float(height)) for width, height, _ in boxes]
    assert np.allclose(np.array([W, A, B]) / 0.9, [(60, 120), (6, 120), (60, 6)])


@pytest.mark.parametrize("name", ["beside", "graph", "attention", "shares", "block", "way", "dora"])
def test_a_drawing_has_a_text_a_caption_and_legible_letters(name):
    picture = whole()[name].data
    assert all(len(alt) > 60 for alt in re.findall(r'<svg class="drawn"[^>]* aria-label="([^"]*)"', picture))
    assert len(re.search(r"<figcaption>(.*?)</figcaption>", picture, re.S)[1]) > 40
    assert 'font-size="12"' in picture
    assert f'viewBox="0 0 {drawings.WIDTH} ' in picture
    assert drawings.WIDTH <= 330


# --- in a browser -----------------------------------------------------------------------------------------------------

DRAWN = {"index.html": 1, "attention.html": 2, "decoder.html": 2, "variants.html": 1, "derivation.html": 1}
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
def test_an_equation_lights_what_it_gives_and_less_what_it_reads(visit, width):
    browser = visit("derivation.html", width)

    def lit():
        return {e.get_attribute("data-eq") for e in browser.find_elements("css selector", "figure.graph g.lit")}

    def names(css):
        words = [e.text for e in browser.find_elements("css selector", f"figure.graph g{css} [font-style]")]
        return {word for word in words if word}

    assert lit() == set()
    for number in drawings.STEPS:
        button = browser.find_element("css selector", f'figure.graph button[data-eq="{number}"]')
        browser.execute_script("arguments[0].focus()", button)
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


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_an_adapter_shows_its_shares_and_outputs(visit, width):
    browser = visit("attention.html", width)
    places = {"on_q": 0, "on_v": 0}
    for name, step in (("on_q", 1), ("on_v", 2), ("on_q", -1)):
        places[name] += step
        move(browser, name, step)
        P, o = drawings.adapted_head(*(drawings.STRENGTHS[place] for place in places.values()))
        cells = browser.find_elements("css selector", "#shares [data-cell] text")
        assert [float(cell.text) for cell in cells] == pytest.approx([*P.ravel(), *o.ravel()], abs=0.006)


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_what_trains_shows_where_dy_ends(visit, width):
    browser = visit("decoder.html", width)
    data = data_of(drawings.way_of_dy().data)
    for step, place in ((1, 2), (3, 5), (-5, 0)):
        assert move(browser, "adapters", step) == data["says"][place]
        alt = browser.find_element("css selector", "#way svg").get_attribute("aria-label")
        assert alt == unescape(re.search(r'aria-label="([^"]*)"', data["pictures"][place])[1])


@pytest.mark.parametrize("page", [pytest.param("derivation.html", marks=built)])
def test_without_javascript_the_graph_stays_whole(visit, page):
    browser = visit(page, 390, script=False)
    assert browser.find_element("css selector", "figure.graph svg").is_displayed()
    assert not browser.find_element("css selector", "figure.graph .steps").is_displayed()
