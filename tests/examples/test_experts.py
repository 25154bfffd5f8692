"""The recorded trainings of a mixture: they are the example's, and one made again gives the recorded numbers."""

import json
import subprocess
import sys
from collections import defaultdict
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

from minilora import Llama
from minilora.layer import parameter_count

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs" / "recordings" / "experts.json").read_text(encoding="utf-8"))
APART = 0.03  # nats: machines round differently, and the same steps end a little apart


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "examples" / "measure")
        yield import_module("experts")


@pytest.fixture(scope="module")
def dense(king_james):
    return Llama.load(Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz"))))


def test_the_records_are_the_examples_trainings(example):
    known = [json.dumps(run, sort_keys=True) for of in example.TRAININGS.values() for run in of()]
    recorded = [json.dumps(point["run"], sort_keys=True) for point in RECORDED["trainings"]]
    assert sorted(recorded) == sorted(known)


def test_two_more_seeds_were_tried_at_each_ways_best_rate(example):
    losses, again = defaultdict(dict), defaultdict(list)
    for run in example.TRAININGS["ways"]():
        (point,) = [point for point in RECORDED["trainings"] if point["run"] == run]
        way = json.dumps(run["ranks"])
        if run["seed"] == 0:
            losses[way][run["lr"]] = point["result"]["new"]
        else:
            again[way].append((run["seed"], run["lr"]))
    assert {way: [(seed, min(of, key=of.get)) for seed in (1, 2)] for way, of in losses.items()} == again
    assert all(min(of) < min(of, key=of.get) < max(of) for of in losses.values())  # the best is not at the grid's edge


def test_a_mixture_of_copies_begins_as_the_dense_model(example, dense):
    ids = np.arange(64).reshape(2, 32)
    mixture = example.upcycled(dense)
    assert np.abs(mixture(ids) - dense(ids)).max() < 3e-5
    for ranks in example.WAYS:
        model = example.adapted(dense if "all" in ranks else mixture, ranks, seed=0)
        assert np.abs(model(ids) - dense(ids)).max() < 3e-5
        assert parameter_count(model, trained=True) == pytest.approx(81_856, rel=0.013)


def test_a_routers_measures_are_counted_from_its_choices(example):
    X = np.array([[1, 1, 2, 2], [1, 3, 2, 3]])
    best = np.array([[0, 0, 1, 2], [3, 2, 1, 2]])  # token 1: 0 twice of three; 2: 1 twice of three; 3: 2 twice
    assert example.share_told_by_the_token(X, best) == pytest.approx(6 / 8)


@pytest.mark.full
@pytest.mark.usefixtures("king_james")
def test_a_recorded_training_made_again_ends_where_it_did(tmp_path, example):
    (place,) = [i for i, run in enumerate(example.TRAININGS["router"]()) if run["seed"] == 1]
    command = [sys.executable, ROOT / "examples" / "measure" / "experts.py", "router", "--only", str(place)]
    subprocess.run([*command, "--json", tmp_path / "fresh.json"], check=True)
    fresh = json.loads((tmp_path / "fresh.json").read_text(encoding="utf-8"))
    for name in ("dense", "mixture"):
        for text in ("new", "old"):
            assert fresh[name][text] == pytest.approx(RECORDED[name][text], abs=APART)
    (new,) = fresh["trainings"]
    (old,) = [point for point in RECORDED["trainings"] if point["run"] == new["run"]]
    for text in ("new", "old", "old, not merged"):
        assert new["result"][text] == pytest.approx(old["result"][text], abs=APART)
    assert new["result"]["routing"]["moved"] == pytest.approx(old["result"]["routing"]["moved"], abs=0.05)
