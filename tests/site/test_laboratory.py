"""The laboratory: what is computed of its recordings, and its chart at each position of the controls."""

import html
import json
import re
from itertools import product

import pytest

pytest.importorskip("matplotlib")

import valley
import words
from recordings import RULES, Recordings

from .javascript import LIVE, by_node, node

# --- on a few trainings that were made up -----------------------------------------------------------------------------

BEFORE = {"new": 5.0, "old": 3.0}


def training(way, rank, lr, new, old=3.5, *, seed=0, scaling=2.0, **more):
    run = {"way": way, "rank": rank, "lr": lr, "seed": seed, "scaling": scaling, "share": 1.0, "batch": 16}
    return {"run": run, "result": {"new": new, "old": old, **more}}


def recorded(*trainings, before=BEFORE):
    return Recordings({"before": before, "windows": 956, "trainings": list(trainings)})


FULL = [training("full", None, lr, new, old) for lr, new, old in ((1, 4.0, 3.4), (2, 3.0, 4.0), (4, 3.5, 5.0))]
LORA = [training("LoRA", 4, lr, new) for lr, new in ((2, 3.9), (4, 3.5), (8, 3.6), (16, 4.9))]


def test_a_gain_is_a_part_of_the_other_gain():
    assert recorded(*FULL, *LORA).gain(4) == pytest.approx(1.5 / 2.0)


def test_a_rate_breaks_where_half_of_the_gain_is_lost():
    found = recorded(*FULL, *LORA)
    assert found.breaks("LoRA", 4) == 16
    assert found.breaks("full") is None
    assert found.lost("LoRA", 4) == pytest.approx({0.5: 0.4 / 1.5, 1: 0, 2: 0.1 / 1.5, 4: 1.4 / 1.5})


def test_other_windows_choose_than_report():
    choose = {1: 4.0, 2: 3.6, 4: 3.2}
    of = [training("full", None, lr, new, choice=choose[lr]) for lr, new in ((1, 3.9), (2, 3.0), (4, 3.1))]
    found = recorded(*of, before=BEFORE | {"choice": 5.0})
    assert (found.best("full"), found.least("full")) == (4, 3.1)
    assert (recorded(*of).best("full"), recorded(*of).least("full")) == (2, 3.0)


def test_seeds_count_only_where_they_are_asked_for():
    found = recorded(training("full", None, 1, 4.0), training("full", None, 1, 3.0, seed=1))
    assert found.losses("full") == {1: 3.5}
    assert found.losses("full", among=(0,)) == {1: 4.0}


def test_forgetting_is_read_on_the_way_where_it_was_measured():
    paths = {"losses": [4.0, 3.0], "olds": [3.2, 3.8]}, {"losses": [3.8, 3.2], "olds": [3.4, 3.6]}
    of = [training("full", None, 1, 3.0, seed=i, choice=3.0, **path) for i, path in enumerate(paths)]
    found = recorded(*of, before=BEFORE | {"choice": 5.0})
    assert found.forgotten_in_full(3.5) == pytest.approx((0.5 + 0.5) / 2)
    assert found.forgotten_in_full(4.5) == pytest.approx((0.1 + 0.4 * 0.5 / 1.2) / 2)


def test_a_search_is_done_when_the_best_rate_has_neighbours():
    def of(*rates, seed=0):
        return [training("LoRA", 4, lr, abs(lr - 4) + 1, seed=seed) for lr in rates]

    assert recorded(*of(2, 4)).tried("LoRA", 4) == 0
    assert recorded(*of(2, 4, 8)).tried("LoRA", 4) == 1
    assert recorded(*of(2, 4, 8, 16), *of(2, 4, 8, seed=1)).tried("LoRA", 4) == 2
    assert recorded(*of(2, 4, 8)).tried("LoRA", 4, windows=60) == 0


# --- the chart, of the real ones --------------------------------------------------------------------------------------

RECORDED = words.laboratory()


@pytest.fixture(scope="module")
def data():
    text = re.search(r'<script type="application/json">(.*?)</script>', valley.chart(RECORDED), re.S)[1]
    return json.loads(text)


def every(data):
    values = data["values"]
    return [dict(zip(values, position, strict=True)) for position in product(*values.values())]


@pytest.fixture(scope="module")
def shown(data):
    positions = every(data)
    return list(zip(positions, node("valley.mjs", LIVE, data=data, positions=positions), strict=True))


@by_node
def test_every_valley_is_the_recorded_one(shown):
    for at, state in shown:
        for curve in state["valleys"]:
            rank = None if curve["rank"] == "full" else curve["rank"]
            of = {"windows": at["windows"]} | ({"scaling": RULES[at["rule"]](rank)} if rank else {})
            losses = RECORDED.losses(valley.way(rank), rank, **of)
            assert curve["points"] == [[lr, pytest.approx(loss, abs=1e-4)] for lr, loss in losses.items()]
            assert curve.get("best") == (RECORDED.best(valley.way(rank), rank, **of) if losses else None)
            assert curve["chosen"] == (curve["rank"] == at["rank"])


@by_node
def test_what_is_said_is_recorded_or_said_to_be_missing(shown):
    for at, state in shown:
        rank = None if at["rank"] == "full" else at["rank"]
        of = {"windows": at["windows"]} | ({"scaling": RULES[at["rule"]](rank)} if rank else {})
        losses = RECORDED.losses(valley.way(rank), rank, **of)
        said = state["says"]
        if rank:
            s, product_of_both = re.search(r"s is ([\d.]+), and s times the rate is ([\d.e-]+)\.", said).groups()
            assert float(s) == of["scaling"]
            assert float(product_of_both) == pytest.approx(of["scaling"] * at["lr"], rel=0.005)
        if at["lr"] not in losses:
            assert "is recorded" in said
            assert "steps" not in said
        elif not any(RECORDED.seeds(valley.way(rank), rank, **of, what="step")[at["lr"]]):
            assert "No step was better than the untouched model" in said
        elif losses[at["lr"]] > RECORDED.before["new"]:
            assert "above the untouched model's" in said
        else:
            loss, share = re.search(r"steps: ([\d.]+)(?:, (\d+)% of what full fine-tuning gains)? \(", said).groups()
            assert float(loss) == pytest.approx(losses[at["lr"]], abs=0.0051)
            assert (share is None) == (rank is None)
            gained = RECORDED.before["new"] - losses[at["lr"]]
            of_full = RECORDED.before["new"] - RECORDED.least("full", windows=at["windows"])
            assert rank is None or float(share) == pytest.approx(100 * gained / of_full, abs=0.51)


@by_node
def test_a_path_begins_where_full_and_the_rate_were_measured(data, shown):
    for at, state in shown:
        full, chosen = (each["path"] for each in state["paths"])
        assert max(len(full), len(chosen)) <= len(data["moments"])
        if chosen and at["rank"] == "full" and at["lr"] == RECORDED.best("full", windows=at["windows"]):
            assert chosen == full


def test_the_first_drawing_says_its_numbers(data):
    drawing = valley.still(RECORDED, 956)
    said = html.unescape(re.search(r'aria-label="([^"]*)"', drawing)[1])
    best = RECORDED.best("full")
    assert f"full: {RECORDED.least('full'):.2f} at {best:g}" in said
