"""The laboratory's records: a training that is made again gives the recorded numbers."""

import json
import math
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "08_laboratory.py"
TRAININGS = runpy.run_path(EXAMPLE)["TRAININGS"]
RECORDED = json.loads((ROOT / "docs" / "laboratory.json").read_text(encoding="utf-8"))
APART = 0.03  # nats: machines round differently, and the same steps end a little apart


def remade(tmp_path, experiment, *arguments):
    command = [sys.executable, EXAMPLE, experiment, *arguments, "--json", tmp_path / "fresh.json"]
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "fresh.json").read_text(encoding="utf-8"))


def test_the_records_are_the_examples_trainings():
    known = [json.dumps(run, sort_keys=True) for of in TRAININGS.values() for run in of()]
    recorded = [json.dumps(point["run"], sort_keys=True) for point in RECORDED["trainings"]]
    assert sorted(recorded) == sorted(set(known))


def test_more_seeds_were_tried_at_each_variants_best_rate():
    losses, again = defaultdict(dict), defaultdict(set)
    for run in TRAININGS["variants"]():
        (point,) = [point for point in RECORDED["trainings"] if point["run"] == run]
        if run["seed"] == 0:
            losses[run["way"]][run["lr"]] = point["result"]["new"]
        else:
            again[run["way"]].add(run["lr"])
    assert {way: {min(of, key=of.get)} for way, of in losses.items()} == again


# One of each experiment.
AGAIN = [
    ("rates", {"way": "full", "lr": 2e-3}),
    ("batches", {"way": "LoRA", "batch": 64, "lr": 2e-3}),
    ("texts", {"way": "LoRA", "rank": 4, "share": 1 / 4, "lr": 2e-3}),
    ("variants", {"way": "DoRA", "seed": 1}),
]


@pytest.mark.full
@pytest.mark.usefixtures("king_james")
@pytest.mark.parametrize(("experiment", "like"), AGAIN)
def test_a_recorded_training_made_again_ends_where_it_did(tmp_path, experiment, like):
    (place,) = [i for i, run in enumerate(TRAININGS[experiment]()) if like.items() <= run.items()]
    fresh = remade(tmp_path, experiment, "--only", str(place))
    assert fresh["before"] == pytest.approx(RECORDED["before"], abs=APART)
    (new,) = fresh["trainings"]
    (old,) = [point for point in RECORDED["trainings"] if point["run"] == new["run"]]
    for name in ("new", "seen", "old"):
        assert new["result"][name] == pytest.approx(old["result"][name], abs=APART)
    assert math.isclose(new["result"]["change"], old["result"]["change"], rel_tol=0.02)


@pytest.mark.full
@pytest.mark.usefixtures("king_james")
def test_recorded_first_directions_are_those_of_the_model(tmp_path):
    fresh = remade(tmp_path, "directions", "--steps", "3")["directions"]
    for optimizer in ("Adam", "momentum"):
        new, old = (found[optimizer]["steps"]["1"] for found in (fresh, RECORDED["directions"]))
        for what in ("gradient", "step"):
            for kind, spread in old[what].items():
                assert new[what][kind]["share"] == pytest.approx(spread["share"], abs=0.01)
