"""The layer that trains in the browser: its JavaScript is minilora's mathematics, and its page shows what is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, best_adapter, cli, evaluate, train

from .conftest import narrow, wait, widths
from .javascript import LIVE, by_node, node, numbers

PYTHON = Path(__file__).parents[2] / "minilora"
SHOWN_AT = {
    "A-zero": "A",
    "alpha-not-divided": "y",
    "base-passes-no-gradient": "dx",
    "B-not-zero": "B",
    "wrong-scale-in-dA": "dA",
}
"""The array at which each mistake shows."""
RUN = {"rank": 2, "alpha": 4, "rate": 0.03, "optimizer": "adam", "truth": "face", "steps": 600}
"""How the page begins."""


# --- the mathematics, by Node -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Return the folder that ``minilora vectors`` writes."""
    folder = tmp_path_factory.mktemp("vectors") / "v"
    assert cli.main(["vectors", str(folder)]) == 0
    return folder


def answer(vectors, answers, live=LIVE):
    """Let docs/_static/live/lora.js and optim.js answer, and return the exit code of ``minilora vectors --compare``."""
    node("vectors.mjs", live, vectors, answers)
    return cli.main(["vectors", str(vectors), "--compare", str(answers)])


@by_node
def test_lora_js_passes_minilora_vectors(vectors, tmp_path, capsys):
    assert answer(vectors, tmp_path / "answers") == 0
    assert capsys.readouterr().out.count("15 of 15 cases answered") == 2  # float64 and float32


@by_node
def test_a_heat_map_tells_both_signs_apart():
    """The style sheet has orange for `above` and blue for `below`."""
    assert node("parts.mjs", LIVE, heat=[0.5, -0.5, 0, 1]) == ["frame", "above", "below", "above"]


@pytest.fixture(scope="module")
def computed():
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((10, 2)) @ rng.standard_normal((2, 14))
    matrices = [rng.standard_normal((10, 14)), rng.standard_normal((14, 3)), thin, np.zeros((3, 4)), np.eye(4, 5)]
    changed = [
        {"optimizer": "descent", "rate": 0.3},
        {"optimizer": "descent", "rate": 0.3, "alpha": 16},
        {"alpha": 16},
        {"rank": 5},
        {"start": "swapped", "steps": 1},
        *({"mistakes": [name]} for name in SHOWN_AT),
    ]
    runs = [RUN | {"truth": "noise", "steps": 50}, *(RUN | change for change in changed)]
    found = node("layer.mjs", LIVE, runs=runs, matrices=[matrix.tolist() for matrix in matrices])
    return found | {"matrices": matrices}


@by_node
def test_each_mistake_turns_its_own_array_red_from_each_start(computed):
    assert set(computed["checks"]) == {"peft", "gaussian", "swapped"}
    for checks in computed["checks"].values():
        wrong = {name: {a for a, v in check.items() if not v["right"]} for name, check in checks.items()}
        assert wrong == {"": set(), **{name: {array} for name, array in SHOWN_AT.items()}}


@by_node
def test_the_pages_training_is_minilora_train(computed):
    """On noise: where a row of the truth is zero, Adam takes a gradient that is rounding alone for a direction."""
    found = computed["runs"][0]
    X, Y, W, A, B, D = (np.array(found[name], float) for name in ("X", "Y", "W", "A0", "B0", "D"))
    assert np.allclose(Y, X @ (W + D).T)
    adapter = LoRA(A, B, RUN["alpha"])
    history = train(adapter, X, Y - X @ W.T, epochs=50, batch_size=len(X), lr=RUN["rate"], rng=np.random.default_rng(0))
    assert np.allclose(adapter.lora_A, found["A"], rtol=0, atol=1e-9)
    assert np.allclose(adapter.lora_B, found["B"], rtol=0, atol=1e-9)
    losses = [entry["loss"] for entry in found["history"]]
    assert np.allclose([losses[epoch] for epoch in history.epochs], history.losses, rtol=1e-9)


@by_node
def test_the_dashed_line_is_the_best_of_that_rank(computed):
    found = computed["runs"][0]
    X, Y, W = (np.array(found[name]) for name in ("X", "Y", "W"))
    best = best_adapter(X, Y - X @ W.T, rank=RUN["rank"])
    assert evaluate(best, X, Y - X @ W.T) == pytest.approx(found["least"], rel=1e-9)


@by_node
def test_singular_values_are_numpys(computed):
    for matrix, found in zip(computed["matrices"], computed["values"], strict=True):
        right = np.linalg.svd(matrix, compute_uv=False)
        assert np.allclose(found, right, rtol=0, atol=1e-12 * max(1, right[0]))


@by_node
def test_what_the_page_says_of_settings_happens(computed):
    _, descent, too_strong, adam, rank5, swapped, *wrong = computed["runs"]
    last = [run["history"][-1]["loss"] for run in (descent, adam, *wrong)]
    least = descent["least"]
    assert too_strong["history"][-1]["loss"] is None  # JSON's word for NaN
    assert last[:2] == pytest.approx([least] * 2, rel=1e-3)
    assert rank5["history"][-1]["loss"] < 1e-5
    assert swapped["history"][1]["A"] > 0
    assert np.array_equal(swapped["B"], swapped["B0"])
    stuck, *going = last[2:]
    assert stuck == computed["runs"][6]["history"][0]["loss"]
    assert going == pytest.approx([least] * 4, rel=1e-3)


@pytest.mark.parametrize(
    ("javascript", "python", "left_out"),
    [
        ("lora.js", ("linear.py", "lora.py"), {"8", "9"}),  # of a weight that trains
        ("losses.js", ("losses.py",), set()),
        ("optim.js", ("optim.py",), {"clip.1", "clip.2", "decay.1"}),
        ("attention.js", ("layers/attention.py",), set()),
        (
            "layers.js",
            ("layers/norm.py", "layers/rotary.py", "layers/gated.py"),
            {"norm.3", "rope.1", "act.5", "act.6"},
        ),
        ("llama.js", ("language/llama.py",), {"rope.1"}),
        ("tuning.js", ("language/generation.py",), {"gen.2", "gen.3"}),
    ],
)
def test_javascript_has_pythons_equations(javascript, python, left_out):
    right = {number for name in python for number in numbers(PYTHON / name, "#")}
    assert {*numbers(LIVE / javascript, "//")} - left_out == right - left_out != set()


@pytest.mark.site
def test_javascript_keeps_to_120_columns_and_a_loop_a_line():
    files = [
        *LIVE.glob("*.js"),
        *(LIVE.parent / name for name in ("questions.js", "exercises.js", "numpy.js")),
        *Path(__file__).parent.glob("live/*.mjs"),
    ]
    lines = [(file.name, i, line) for file in files for i, line in enumerate(file.read_text("utf-8").splitlines(), 1)]
    assert [found for found in lines if len(found[2]) > 120 or found[2].count("for (") > 1] == []


# --- the page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def page(visit):
    def go(width):
        browser = visit("live-layer.html", width)
        assert find(browser, ".works").is_displayed()
        return browser

    return go


def find(browser, selector):
    return browser.find_element("css selector", f'[data-live="layer"] {selector}')


def press(browser, selector, keys):
    """Give an element the focus and press keys."""
    element = find(browser, selector)
    browser.execute_script("arguments[0].focus()", element)
    browser.switch_to.active_element.send_keys(keys)


def loss(browser):
    return float(find(browser, "[data-loss]").text)


def verdicts(browser):
    rows = browser.find_elements("css selector", '[data-live="layer"] [data-check]')
    return {row.get_attribute("data-check"): row.get_attribute("data-verdict") for row in rows}


@widths
def test_the_loss_falls_to_the_best_of_the_rank(page, width):
    browser = page(width)
    assert loss(browser) == 4
    press(browser, "[data-do=step]", " ")
    assert find(browser, "[data-step]").text == "1"
    assert loss(browser) < 4
    assert "After 1 step the loss is" in find(browser, ".says").text
    press(browser, "[data-do=run]", " ")
    wait(lambda: loss(browser) < 0.674)
    press(browser, "[data-do=run]", " ")
    assert loss(browser) >= 0.6735
    steps, says = find(browser, "[data-step]").text, find(browser, ".says").text
    assert f"After {steps} steps the loss is {find(browser, '[data-loss]').text}." in says
    assert float(re.search(r"No adapter of this rank gets below ([\d.]+)\.", says)[1]) <= loss(browser)


@widths
def test_each_mistake_by_keyboard_turns_one_check_red(page, width):
    """Its sentence and the curve are in sight."""
    browser = page(width)
    assert set(verdicts(browser).values()) == {"right"}
    for name, array in SHOWN_AT.items():
        box = find(browser, f"[data-mistake={name}]")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", box)
        press(browser, f"[data-mistake={name}]", " ")
        assert {a for a, verdict in verdicts(browser).items() if verdict == "wrong"} == {array}
        assert find(browser, f'[data-check="{array}"]').text.endswith("wrong")
        above, below, curve = browser.execute_script(
            """const why = arguments[0].parentElement.nextElementSibling, place = why.getBoundingClientRect();
               const drawn = document.querySelector("[data-map=losses]").getBoundingClientRect();
               const told = why.textContent.length > 30;
               return [told && place.top, place.bottom, drawn.bottom > 60 && drawn.top < innerHeight]""",
            box,
        )
        assert 0 < above < below < 900, name
        assert curve, name
        press(browser, f"[data-mistake={name}]", " ")
        assert browser.execute_script("return arguments[0].parentElement.nextElementSibling.textContent", box) == ""
    assert set(verdicts(browser).values()) == {"right"}


@narrow
def test_one_mistaken_start_takes_the_place_of_the_other(page, width):
    browser = page(width)
    for name, other in [("A-zero", "B-not-zero"), ("B-not-zero", "A-zero"), ("A-zero", "B-not-zero")]:
        press(browser, f"[data-mistake={name}]", " ")
        assert find(browser, f"[data-mistake={name}]").is_selected()
        assert not find(browser, f"[data-mistake={other}]").is_selected()
        assert {a for a, verdict in verdicts(browser).items() if verdict == "wrong"} == {SHOWN_AT[name]}


@widths
def test_run_and_the_loss_are_in_sight_beside_the_check(page, width):
    browser = page(width)
    browser.execute_script("arguments[0].scrollIntoView({block: 'end', behavior: 'instant'})", find(browser, ".checks"))
    for selector in ("[data-do=run]", "[data-loss]", ".checks tr:last-child"):
        assert browser.execute_script(
            """const box = arguments[0].getBoundingClientRect();
               const there = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
               return arguments[0].contains(there)""",
            find(browser, selector),
        ), selector


@narrow
def test_the_address_has_the_settings_and_a_reload_keeps_them(page, width):
    from selenium.webdriver.common.keys import Keys

    browser = page(width)
    assert "?" not in browser.current_url
    press(browser, "[name=rank]", Keys.ARROW_RIGHT)
    press(browser, "[data-mistake=alpha-not-divided]", " ")
    press(browser, "[data-map=truth]", " ")
    address, drawn, says = browser.current_url, loss(browser), find(browser, ".says").text
    assert {"rank=3", "mistakes=alpha-not-divided"} <= set(address.partition("?")[2].split("&"))
    browser.get("about:blank")
    browser.get(address)
    wait(lambda: find(browser, ".works").is_displayed())
    assert (browser.current_url, loss(browser), find(browser, ".says").text) == (address, drawn, says)
    assert find(browser, "[data-mistake=alpha-not-divided]").is_selected()
    browser.get(address.partition("?")[0] + "?rank=99&cells=zz&mistakes=none&truth=moon&seed=x")
    wait(lambda: find(browser, ".works").is_displayed())
    assert loss(browser) == 4  # what an address says wrongly is as if it did not say it


def draw_nothing(browser):
    """Choose the empty truth, and bring it to the middle of the screen."""
    browser.execute_script(
        "const s = document.querySelector('[name=truth]'); s.value = 'nothing'; s.dispatchEvent(new Event('input'))"
    )
    assert loss(browser) == 0
    svg = find(browser, "[data-map=truth]")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", svg)
    return svg


@narrow
def test_a_finger_scrolls_past_the_truth_and_paints_across_it(page, width):
    browser = page(width)
    svg = draw_nothing(browser)
    x, y, cell = browser.execute_script(
        "const box = arguments[0].getBoundingClientRect(); return [box.x, box.y, box.width / 14]", svg
    )

    def touch(*cells):  # from one (row, column) to the next
        points = [{"x": x + (column + 0.5) * cell, "y": y + (row + 0.5) * cell} for row, column in cells]
        kinds = ["touchStart", *["touchMove"] * (len(points) - 1), "touchEnd"]
        for kind, at in zip(kinds, [*([point] for point in points), []], strict=True):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    def scrolled():
        return browser.execute_script("return scrollY")

    there = scrolled()
    touch((4, 2))
    assert loss(browser) == pytest.approx(0.1)  # one entry of 1: |D|^2 / out
    touch((2, 5), (2, 6), (2, 7), (2, 9), (5, 9))
    assert loss(browser) == pytest.approx(0.1 * (1 + 5 + 3))  # sideways first, and then any way
    assert scrolled() == pytest.approx(there, abs=1)  # a pixel is the browser's rounding
    touch((8, 3), (6, 3), (4, 3), (2, 3))
    wait(lambda: scrolled() > there + cell)
    assert loss(browser) == pytest.approx(0.9)


@widths
def test_the_truth_is_drawn_by_keys_and_by_pointer(page, width):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser = page(width)
    svg = draw_nothing(browser)
    press(browser, "[data-map=truth]", Keys.ARROW_DOWN + Keys.ARROW_RIGHT + " ")
    assert loss(browser) == pytest.approx(0.1)  # one entry of 1: |D|^2 / out
    assert find(browser, ".painted").get_attribute("textContent") == "Row 2, column 2 is 1."
    cell = svg.size["width"] / 14
    stroke = ActionChains(browser, duration=100).move_to_element_with_offset(svg, cell / 2, cell / 2).click_and_hold()
    stroke.move_by_offset(round(2 * cell), 0).release().perform()
    assert loss(browser) == pytest.approx(0.4)  # three more, in one stroke
