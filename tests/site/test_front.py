"""The front page's one object: what it computes is minilora's, and each scroll position and answer has its picture."""

import re
import time
import xml.etree.ElementTree as ET
from functools import cache
from itertools import pairwise
from pathlib import Path

import front
import numpy as np
import pytest
import settings
from ranks import word
from settings import FACTS

from minilora import Linear, LoRA, LoRALinear, best_adapter, evaluate, mse
from minilora.language.memory import MATRICES, count_numbers, training_memory
from minilora.layers.quantized import QuantizedLinear

from .conftest import SITE, built, narrow, wait, widths
from .javascript import LIVE, by_node, node

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "learn" / "index.md").read_text(encoding="utf-8")


def ask(name, *calls):
    """Return what a function of the page's scripts gives for each call."""
    return node("front.mjs", LIVE, **{name: calls})[name]


@by_node
def test_the_pages_memory_is_training_memory_for_every_setting():
    """Its models are the instrument's, which are held to what is published."""
    (models,) = ask("models", [])
    adapted = [{"rank": 16, "bits": bits, "recompute": again} for bits in (16, 8, 4) for again in (False, True)]
    ways = [{"tokens": 4096, **way} for way in ({}, {"rank": 1}, *adapted)]
    found = iter(ask("memory", *([model, way] for model in models.values() for way in ways)))
    counted = iter(ask("counted", *([model, 8] for model in models.values())))
    for name, model in models.items():
        assert ({"tied": False} | model).items() <= FACTS["models"][name].items(), name
        config = settings.config(FACTS["models"][name])
        assert [next(found) for _ in ways] == [training_memory(config, **way) for way in ways], name
        ends = tuple(f"{matrix}.weight" for matrix in MATRICES)
        pairs = sum(sum(shape) for path, shape in config.shapes().items() if path.endswith(ends))
        assert next(counted) == [*count_numbers(config), 8 * pairs], name


@by_node
def test_four_bits_in_the_page_are_nf4():
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((9, 28)), rng.uniform(-1, 1, (4, 32)), np.zeros((2, 64))]
    for matrix, found in zip(matrices, ask("nf4", *([matrix.tolist()] for matrix in matrices)), strict=True):
        right = QuantizedLinear.from_linear(Linear(matrix), double_quant=False).weight
        assert np.allclose(found, right, rtol=1e-6, atol=0)


@by_node
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_strongest_columns_and_rows_are_the_best_of_the_rank(rank):
    matrix = np.random.default_rng(rank).standard_normal((9, 28))
    ((B, A),) = ask("strongest", [matrix.tolist(), rank])
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(np.array(B) @ A, (U[:, :rank] * S[:rank]) @ Vt[:rank], atol=1e-12)
    assert np.allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1))
    assert np.all(np.abs(B).max(axis=0) == np.max(B, axis=0))


# --- the training that one sees ---------------------------------------------------------------------------------------


@by_node
def test_the_page_has_its_script_in_one_piece(tmp_path):
    """It asks for no file, so that a page runs that was opened as one; and each part gives what its module gives."""
    parts = front.bundled("scenes")
    assert not re.findall(r"^(import|export)\b.*", parts, re.M)
    assert not re.findall(r"^(import|export)\b.*", front.bundled("front"), re.M)
    names = re.findall(r"^const in_(\w+) =", parts, re.M)
    given = f"export default {{ {', '.join(f'{name}: in_{name}' for name in names)} }};\n"
    (tmp_path / "one.mjs").write_text(parts + given, encoding="utf-8")
    assert {"matrix", "lora", "experiment", "board"} < {*names}
    for name, (one, own) in node("bundle.mjs", LIVE, tmp_path / "one.mjs", names=names).items():
        assert one == own != [], name


@by_node
def test_the_word_to_learn_is_that_of_the_readme():
    ((truth, _, _, _),) = ask("word", [])
    assert np.array_equal(truth, word())


@by_node
@pytest.mark.parametrize(
    "settings", [{"rank": 2}, {"rank": 1, "alpha": 4, "rate": 0.15, "optimizer": "descent"}], ids=["Adam", "descent"]
)
def test_what_comes_back_is_what_minilora_computes(settings):
    (found,) = ask("trained", [settings, [0, 1, 2, 20]])
    X, Y, W = (np.array(found[name]) for name in ("X", "Y", "W"))
    assert np.allclose(X.T @ X, len(X) * np.eye(X.shape[1]), atol=1e-9)
    for step in found["steps"]:
        A, B = np.array(step["A"], float), np.array(step["B"], float)
        layer = LoRALinear(Linear(W), LoRA(A, B, alpha=step["s"] * len(A)))
        y, cache = layer.forward(X)
        loss, dy = mse(y, Y)
        _, grads = layer.backward(dy, cache)
        assert step["loss"] == pytest.approx(loss, rel=1e-9)
        for name, right in (("G", dy.T @ X), ("dA", grads["lora_A"]), ("dB", grads["lora_B"])):
            assert np.allclose(step[name], right, rtol=0, atol=1e-12), name
        # The page says that dy^T x folds into both, and that here it is what is missing, with its sign turned.
        assert np.allclose(step["dB"], step["s"] * np.array(step["G"]) @ A.T, atol=1e-12)
        assert np.allclose(step["dA"], step["s"] * B.T @ np.array(step["G"]), atol=1e-12)
        missing = np.linalg.lstsq(X, Y - y, rcond=None)[0].T
        assert np.allclose(step["G"], -2 / len(W) * missing, atol=1e-9)
    first, second, *_ = found["steps"]
    assert np.any(first["dB"])
    assert not np.any(first["dA"])
    assert np.any(second["dA"])


@by_node
def test_each_rank_ends_at_the_least_loss_of_its_rank():
    for rank, found in zip((1, 2, 4), ask("trained", *([{"rank": rank}, [90]] for rank in (1, 2, 4))), strict=True):
        X, Y, W = (np.array(found[name]) for name in ("X", "Y", "W"))
        least = evaluate(best_adapter(X, Y - X @ W.T, rank=rank), X, Y - X @ W.T)
        assert found["least"] == pytest.approx(least, rel=1e-9)
        assert found["steps"][0]["loss"] == pytest.approx(least, rel=3e-3)


@by_node
def test_merging_into_four_bits_keeps_what_the_picture_says():
    ((_, W, _, _),) = ask("word", [])
    sizes = (0.01, 0.03, 0.1, 0.3, 1)

    def four(weight):
        return QuantizedLinear.from_linear(Linear(weight), double_quant=False).weight

    (found,) = ask("trained", [{"rank": 4}, [90]])
    change, stored = np.array(found["steps"][0]["change"]), four(np.array(W))
    for size, said in zip(sizes, ask("merged", *([size] for size in sizes)), strict=True):
        wanted = change * size * np.linalg.norm(stored) / np.linalg.norm(change)
        added = four(stored + wanted) - stored
        kept = (added * wanted).sum() / (wanted**2).sum()
        noise = np.linalg.norm(added - kept * wanted) / np.linalg.norm(wanted)
        assert said["kept"] == pytest.approx(kept, abs=1e-6)
        assert said["noise"] == pytest.approx(noise, abs=1e-6)


# --- what happens to the object ---------------------------------------------------------------------------------------


@cache
def scenes():
    return ask("scenes", [])[0]


def names():
    """Return the scenes that have a question."""
    return [scene["name"] for scene in scenes()[1:]]


def tell_all(calls, still=False):
    """Return, for each list of events, the tale and the picture at the start and after each event."""
    return ask("told", *([still, events] for events in calls))


def tell(*events, still=False):
    return tell_all([list(events)], still)[0]


def to(scene):
    return {"type": "scrolled", "scene": scene}


def answered(scene):
    return {"type": "answered", "scene": scene}


def seconds(count):
    return {"type": "passed", "seconds": count}


@by_node
def test_the_object_moves_before_anything_is_explained():
    tale, *later = tell(*[seconds(0.5)] * 20)
    assert (tale[0]["scene"], tale[0]["running"]) == ("hero", True)
    pictures = [picture["inside"] for _, picture in later]
    assert len(set(pictures)) > 10
    assert not later[-1][0]["running"]  # and it comes to rest


@by_node
def test_no_picture_gives_an_answer_away():
    """Before its question is answered a scene shows its beginning, whatever time, settings and keys do."""
    hero = tell()[0][1]
    tries = [seconds(3), {"type": "pressed"}, seconds(3), {"type": "moved", "time": 1}, to("hero")]
    calls = [[to(name), *tries, to(name), answered(name), seconds(99)] for name in names()]
    for name, told in zip(names(), tell_all(calls), strict=True):
        first, *others = [picture for tale, picture in told[1:-2] if tale["scene"] == name]
        assert first != hero
        assert all(picture == first for picture in others), name
        assert told[-1][1] != first, name
        assert not told[-1][0]["running"]


@by_node
@pytest.mark.parametrize(
    ("scene", "hint"), [("rank", r">7<"), ("run", r"dasharray|1\.37|gets below"), ("memory", r"6\.6")]
)
def test_what_stands_before_a_guess_does_not_have_the_answer(scene, hint):
    before, after = (picture for _, picture in tell(to(scene), answered(scene), seconds(99))[1::2])
    assert re.search(hint, str(after))
    assert not re.search(hint, str(before))


@by_node
def test_every_setting_shows_something():
    plain, choices = ask("settings", [])[0]
    cases = [(scene["name"], control) for scene in scenes() for control in scene["controls"]]
    calls = []
    for name, control in cases:
        values = [value for value in choices[control] if value != plain[control]]
        sets = [{"type": "set", "name": control, "value": value} for value in values]
        calls.append([to(name), answered(name), seconds(99), *sets])
    for case, told in zip(cases, tell_all(calls), strict=True):
        assert all(one[1] != other[1] for one, other in pairwise(told[3:])), case


@by_node
def test_with_less_motion_pictures_stand_at_once_and_nothing_moves():
    still = tell_all([[to(name), answered(name)] for name in names()], still=True)
    for name, told in zip(names(), still, strict=True):
        assert not any(tale["running"] for tale, _ in told)
        assert told[-1][1] != told[-2][1], name
    play = tell({"type": "pressed"}, seconds(0.1), still=True)
    assert [tale["running"] for tale, _ in play] == [False, True, True]  # but what one starts oneself does


@by_node
def test_what_was_seen_stays_seen_and_can_be_played_again():
    told = tell(to("run"), answered("run"), seconds(9), to("alpha"), to("run"), {"type": "pressed"}, seconds(0.1))
    assert told[3][1] == told[5][1]
    assert told[5][0]["times"]["run"] == 1
    assert told[6][0]["running"]
    assert told[7][0]["times"]["run"] < 0.1
    twice = tell(to("run"), answered("run"), seconds(9), answered("run"))  # another guess does not start it again
    assert twice[-1] == twice[-2]


@by_node
def test_pause_stops_time():
    told = tell(seconds(1), {"type": "pressed"}, seconds(5), {"type": "pressed"}, seconds(1))
    times = [tale["times"]["hero"] for tale, _ in told]
    assert times[1] == times[2] == times[3] < times[5]


@by_node
def test_every_picture_is_well_formed_and_inside_its_frame():
    ((_, _, width, height),) = ask("word", [])
    _, choices = ask("settings", [])[0]
    calls = []
    for scene in scenes():
        moments = [{"type": "moved", "time": t / 60} for t in range(61)]
        sets = [{"type": "set", "name": name, "value": v} for name in scene["controls"] for v in choices[name]]
        calls.append([False, [to(scene["name"]), answered(scene["name"]), *moments, *sets]])
    for told in ask("told", *calls):
        for _, picture in told:
            root = ET.fromstring(f"<svg>{picture['inside']}</svg>")
            assert picture["alt"]
            for shape in root:
                numbers = re.findall(r"-?\d+\.?\d*|NaN|undefined|Infinity", " ".join([*shape.attrib.values()][:5]))
                assert not {"NaN", "undefined", "Infinity"} & {*numbers}, picture["alt"]
                if shape.tag == "rect":
                    x, y, wide, high = (float(shape.get(side)) for side in ("x", "y", "width", "height"))
                    assert 0 <= x <= x + wide <= width, picture["alt"]
                    assert 0 <= y <= y + high <= height, picture["alt"]


@by_node
def test_b_stands_tall_at_left_a_lies_flat_above():
    calls = [[to(name), answered(name), {"type": "moved", "time": t}] for name in names() for t in (0.3, 0.85)]
    for told in tell_all(calls):
        picture, name = told[-1][1], told[-1][0]["scene"]
        root = ET.fromstring(f"<svg>{picture['inside']}</svg>")
        frames = [
            tuple(float(shape.get(side)) for side in ("x", "y", "width", "height"))
            for shape in root
            if shape.tag == "rect" and shape.get("stroke")
        ]
        labels = {shape.text for shape in root if shape.tag == "text"}
        if {"A", "B"} <= labels:
            sheet = min(frame for frame in frames if frame[2:] == (336, 108))  # W is behind it
            tall = [frame for frame in frames if frame[3] == 108 and frame[2] < 60]
            flat = [frame for frame in frames if frame[2] == 336 and frame[3] < 60]
            assert tall, name
            assert flat, name
            assert all(x + wide < sheet[0] and y == sheet[1] for x, y, wide, _ in tall), name
            assert all(y + high < sheet[1] and x == sheet[0] for x, y, _, high in flat), name


# --- the page: its sections, and its questions ------------------------------------------------------------------------

SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))


def slug(heading):
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def question(text):
    """Return a section's choices, the right one, and the remarks on others, as front.js reads them."""
    asked = re.search(
        r"\*\*Predict\.\*\*.*?\n\n(.*?)\n\n<details><summary>Answer</summary>\n(.*?)</details>", text, re.S
    )
    choices = re.findall(r"^- (.*)$", asked[1], re.M)
    right = re.search(r"\*\*(.*?)\*\*", asked[2])[1]
    return choices, right, dict(re.findall(r"^- \*(.*?)\*: (.*)$", asked[2], re.M))


@by_node
def test_the_scenes_are_the_pages_sections_in_order():
    headings = [scene["heading"] for scene in scenes()[1:]]
    assert [slug(heading) for heading in SECTIONS][: len(headings)] == headings


@by_node
def test_each_section_asks_before_it_shows_and_answers_each_guess():
    for heading in [*SECTIONS][: len(names())]:
        choices, right, remarks = question(SECTIONS[heading])
        calls = [[{"right": right, "remarks": remarks}, choice] for choice in choices]
        for choice, said in zip(choices, ask("answer", *calls), strict=True):
            assert said["right"] == (choice == right)
            assert said["says"] == ("Yes." if choice == right else f"You said {choice}. {remarks[choice]}")


@by_node
def test_the_reading_line_says_which_scene_it_is():
    rng, order = np.random.default_rng(0), ["hero", *names()]
    cases = [(sorted(rng.integers(-5000, 5000, len(names())).tolist()), line) for line in range(-900, 900, 9)]
    found = ask("place", *([[None, *tops], line] for tops, line in cases))
    assert found == [order[sum(top <= line for top in tops)] for tops, line in cases]
    assert {*found} == {*order}


# --- in a browser -----------------------------------------------------------------------------------------------------

DRAWN = "return document.querySelector('figure.front svg').innerHTML"


def show(browser, element):
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)


@widths
def test_the_picture_moves_above_the_fold(visit, width):
    browser = visit("index.html", width)
    box = browser.execute_script("return document.querySelector('figure.front svg').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] < box["bottom"] <= 900
    before = browser.execute_script(DRAWN)
    wait(lambda: browser.execute_script(DRAWN) != before)


@widths
def test_each_keyboard_guess_is_answered_with_the_picture_in_sight(visit, width):
    browser = visit("index.html", width)
    for scene in scenes()[1:]:
        section = browser.find_element("id", scene["heading"])
        choices, right, remarks = question(SECTIONS[[*SECTIONS][scenes().index(scene) - 1]])
        buttons = section.find_elements("css selector", ".choices button")
        assert [button.text for button in buttons] == choices
        wrong = next(choice for choice in choices if choice != right)
        for choice, says in ((wrong, f"You said {wrong}. {remarks[wrong]}"), (right, "Yes.")):
            button = buttons[choices.index(choice)]
            show(browser, button)
            browser.execute_script("arguments[0].focus({preventScroll: true})", button)
            before = browser.execute_script(DRAWN)
            browser.switch_to.active_element.send_keys(" ")
            assert section.find_element("css selector", ".verdict").text == says
            assert section.find_element("css selector", "details").get_attribute("open")
            if choice == wrong:
                wait(lambda before=before: browser.execute_script(DRAWN) != before)
        top, bottom, covered = browser.execute_script(
            """const box = document.querySelector("figure.front svg").getBoundingClientRect();
               const own = arguments[0].getBoundingClientRect();
               const there = document.elementFromPoint(own.x + own.width / 2, own.y + own.height / 2);
               return [box.top, box.bottom, there !== arguments[0]]""",
            button,
        )
        assert 0 <= top < bottom <= 900, scene["name"]
        assert not covered, scene["name"]


@widths
def test_its_sliders_work_by_keys(visit, width):
    from selenium.webdriver.common.keys import Keys

    browser = visit("index.html", width)
    section = browser.find_element("id", "alpha-and-the-rate")
    show(browser, section.find_element("css selector", ".choices"))
    section.find_elements("css selector", ".choices button")[1].send_keys(" ")
    for name in ("rank", "alpha", "rate"):
        slider, before = browser.find_element("id", f"front-{name}"), browser.execute_script(DRAWN)
        assert slider.is_displayed()
        slider.send_keys(Keys.ARROW_LEFT)
        assert browser.execute_script(DRAWN) != before
    assert not browser.find_element("id", "front-model").is_displayed()


@narrow
def test_less_motion_stands_still(visit, browser, width):
    feature = {"name": "prefers-reduced-motion", "value": "reduce"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        visit("index.html", width)
        before = browser.execute_script(DRAWN)
        time.sleep(0.5)
        assert browser.execute_script(DRAWN) == before
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@widths
def test_without_javascript_text_and_picture_stand(visit, width):
    browser = visit("index.html", width, script=False)
    assert browser.find_element("css selector", "figure.front svg").is_displayed()
    assert not browser.find_element("css selector", "figure.front .controls").is_displayed()
    folded = browser.find_elements("css selector", "article details")
    assert len(folded) == len(names())
    assert all(answer.is_displayed() and answer.find_elements("css selector", "svg") for answer in folded)


@narrow
def test_the_page_runs_from_a_file(visit, browser, width):
    visit("index.html", width)
    browser.get((SITE / "index.html").as_uri())
    wait(lambda: browser.find_element("css selector", "figure.front button").is_displayed())


# --- the other lessons ask, too ---------------------------------------------------------------------------------------

ASKED = {
    page.stem: [question("**Predict.**" + told) for told in page.read_text(encoding="utf-8").split("**Predict.**")[1:]]
    for page in sorted((DOCS / "learn").glob("*.md"))
}


def test_every_choice_is_answered_in_plain_words():
    assert {"index", "rank", "is-a-gradient-right", "alpha"} <= {page for page, asked in ASKED.items() if asked}
    for choices, right, remarks in (one for asked in ASKED.values() for one in asked):
        assert len(choices) >= 3
        assert {right, *remarks} == {*choices}
        assert right not in remarks
        assert not any("$" in words for words in [*choices, *remarks.values()])


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=built) for page, asked in ASKED.items() if asked and page != "index"]
)
def test_a_choice_is_a_button_that_answers(visit, page):
    browser = visit(f"{page}.html", 390)
    wait(lambda: len(browser.find_elements("css selector", ".choices")) == len(ASKED[page]))  # on a busy machine
    groups = browser.find_elements("css selector", ".choices")
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
