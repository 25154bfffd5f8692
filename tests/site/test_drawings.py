"""The drawings: their numbers are those of the layers, and in a browser an equation lights its edges."""

import re
import sys
from functools import cache
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from .conftest import built
from .test_hands import data_of, move

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "_ext"))

import drawings

from minilora.language.memory import LLAMA_2_7B, cache_bytes, training_memory
from minilora.layers.attention import attend, attend_backward

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
shares, way_of_dy = cache(drawings.shares), cache(drawings.way_of_dy)


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


def test_the_graph_has_the_loss_and_every_equation_of_it_stands_on_the_page():
    assert edges("15", "reads").keys() == {"y", "t"}
    page = (DOCS / "learn" / "derivation.md").read_text(encoding="utf-8")
    drawn = {number for of in re.findall(r'data-eq="([^"]*)"', GRAPH) for number in of.split()}
    assert drawn == {*BY_HAND, "15"}
    assert all(f"<!-- equation {number} " in page for number in drawn)


def example():
    """Return q, k, v and do as the page has them."""
    page = (DOCS / "learn" / "network.md").read_text(encoding="utf-8")
    arrays = re.findall(r"^(q|k|v|do) = np\.array\((\[\[.*\]\])\)\.reshape", page, re.M)
    return {name: np.array(eval(rows)) for name, rows in arrays}


def softmax(S):
    return np.exp(S) / np.exp(S).sum(axis=-1, keepdims=True)


def slopes(f, at):
    """Return the slope of a function of an array by each of its entries, by central differences."""
    steps = 1e-5 * np.eye(at.size).reshape(-1, *at.shape)
    return np.reshape([(f(at + step) - f(at - step)) / 2e-5 for step in steps], at.shape)


@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_position_by_hand_is_what_the_layer_computes(t):
    q, k, v, do = RNG.standard_normal((4, 4, 3))
    n = drawings.of_position(t, q, k, v, do)
    heads = [array.reshape(1, 1, 1, 4, 3) for array in (q, k, v, do)]
    o, P = attend(*heads[:3])
    dq, _, _ = attend_backward(heads[3], *heads[:3], P)
    row = t - 1
    assert np.allclose(n["S"], k[:t] @ q[row] / np.sqrt(3))
    assert np.allclose(n["P"], P[0, 0, row, :t])
    assert np.allclose(n["o"], o[0, 0, 0, row])
    assert np.allclose(n["dq"], dq[0, 0, 0, row])
    assert np.allclose(n["dP"], slopes(lambda P: do[row] @ (P @ v[:t]), n["P"]))
    assert np.allclose(n["dS"], slopes(lambda S: do[row] @ (softmax(S) @ v[:t]), n["S"]))


@pytest.mark.parametrize("on_q", drawings.STRENGTHS)
@pytest.mark.parametrize("on_v", drawings.STRENGTHS)
def test_shares_are_a_softmax_and_dy_goes_back_through_it(on_q, on_v):
    q, k, v, do = example().values()
    q[2] -= on_q * np.array([1, 2])
    v[1] += on_v
    S = np.where(np.tri(3), q @ k.T / np.sqrt(2), -1e9)
    P = softmax(S)
    loss = lambda q, v: (do * (softmax(np.where(np.tri(3), q @ k.T / np.sqrt(2), -1e9)) @ v)).sum()  # noqa: E731
    dq, dv = slopes(lambda q: loss(q, v), q), slopes(lambda v: loss(q, v), v)
    expected = {
        "P": P,
        "o": P @ v,
        "dS": slopes(lambda S: (do * (softmax(S) @ v)).sum(), S),
        "dy": do,
        "dq": dq,
        "dv": dv,
    }
    # By (3) to (5): the adapter on q reads x_3 = 1 into h, the one on v x_2, so one row of dq and of dv gives dB.
    lengths = {
        "q_proj.lora_A": dq @ [-on_q, -2 * on_q],
        "q_proj.lora_B": dq[2],
        "v_proj.lora_A": dv @ [on_v, on_v],
        "v_proj.lora_B": dv[1],
    }
    found = drawings.adapted_head(on_q, on_v)
    assert found.keys() == drawings.GRIDS.keys() == expected.keys() | lengths.keys()
    expected |= {name: [[np.linalg.norm(gradient)]] for name, gradient in lengths.items()}
    assert all(np.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    place = drawings.STRENGTHS.index(on_q) * len(drawings.STRENGTHS) + drawings.STRENGTHS.index(on_v)
    shown = [float(number.replace("\u2212", "-")) for number, _ in data_of(shares().data)["cells"][place]]
    assert shown == pytest.approx(np.concatenate([np.ravel(expected[name]) for name in drawings.GRIDS]), abs=0.006)
    if (on_q, on_v) == (1, 0):  # where the sliders start
        assert numbers(shares().data.split("</svg>")[0]) == shown


def test_dy_flows_where_a_slider_moves_an_adapter():
    flowing = re.compile(r'<polyline [^>]*stroke-dasharray="4 3" class="flows"')
    assert len(flowing.findall(shares().data)) == 6
    for picture, name in zip(data_of(way_of_dy().data)["pictures"], drawings.WHERE, strict=True):
        assert len(flowing.findall(picture)) == picture.count("<g>"), name


def test_dy_ends_where_the_lowest_adapter_is():
    said = data_of(way_of_dy().data)["says"]
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
    for picture, name in zip(data_of(way_of_dy().data)["pictures"], drawings.WHERE, strict=True):
        grey = "".join(re.findall(r'<g opacity="0\.6">(.*?)</g>', picture, re.S))
        below = int(name[-1]) if name[-1].isdigit() else 0
        assert {f"block {i}: MLP" in grey for i in range(below)} <= {True}
        assert f"block {below}: MLP" not in grey


def memory_ways():
    """Return what Llama-2-7B keeps in three ways."""
    ways = {"full": {}, "LoRA": {"rank": 16}, "4 bits": {"rank": 16, "bits": 4, "recompute": True}}
    return {name: training_memory(LLAMA_2_7B, tokens=4096, **way) for name, way in ways.items()}


def test_a_bar_is_as_long_as_what_it_counts():
    ways = memory_ways()
    svg = drawings.memory(ways, 4096).data
    kinds = [("weights",), ("trained", "gradients", "Adam"), ("activations", "logits")]
    long = [float(width) for width in re.findall(r'width="([\d.e-]+)" height="20"', svg)]
    assert long == pytest.approx(
        [2.5e-9 * sum(w[part] for part in kind) for w in ways.values() for kind in kinds], 1e-4
    )
    for (name, parts), text in zip(ways.items(), texts(svg)[2:5], strict=True):
        assert text == f"{name}: {sum(parts.values()) / 1e9:.3g} GB"
        assert text.replace(":", "") in re.search(r'aria-label="([^"]*)"', svg)[1]


# --- in a browser -----------------------------------------------------------------------------------------------------

DRAWN = {
    "network.html": 3,
    "cost.html": 1,
    "decoder.html": 2,
    "variants.html": 1,
    "rank.html": 1,
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


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_an_adapter_shows_its_shares_and_outputs(visit, width):
    browser = visit("network.html", width)
    places = {"on_q": 1, "on_v": 0}
    for name, step in (("on_q", 1), ("on_v", 2), ("on_q", -2)):
        places[name] += step
        move(browser, name, step)
        found = drawings.adapted_head(*(drawings.STRENGTHS[p] for p in places.values()))
        shown = np.concatenate([found[name].ravel() for name in drawings.GRIDS])
        cells = browser.execute_script(
            """return [...document.querySelectorAll("#shares [data-cell]")].map(e => [
                   e.querySelector("text").textContent, e.querySelector("rect").getAttribute("class")])"""
        )
        assert [float(text.replace("\u2212", "-")) for text, _ in cells] == pytest.approx(shown, abs=0.006)
        blue = [look == "base" for _, look in cells]
        assert blue == [number < -0.005 for number in shown]


@pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
def test_moving_what_trains_shows_where_dy_ends(visit, width):
    browser = visit("decoder.html", width)
    data = data_of(way_of_dy().data)
    for step, place in ((1, 2), (3, 5), (-5, 0)):
        assert move(browser, "adapters", step) == data["says"][place]
        alt = browser.find_element("css selector", "#way svg").get_attribute("aria-label")
        assert alt == unescape(re.search(r'aria-label="([^"]*)"', data["pictures"][place])[1])


@pytest.mark.parametrize("page", [pytest.param("derivation.html", marks=built)])
def test_without_javascript_the_graph_stays_whole(visit, page):
    browser = visit(page, 390, script=False)
    assert browser.find_element("css selector", "figure.graph svg").is_displayed()
    assert not browser.find_element("css selector", "figure.graph .steps").is_displayed()
