"""The laboratory's chart shows at each position of its controls what the recordings say."""

import html
import json
import re
from itertools import product

import pytest

pytest.importorskip("matplotlib")

import valley
import words
from recordings import RULES

from .javascript import LIVE, by_node, node

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
