"""The laboratory's records: a training that is made again gives the recorded numbers."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("king_james")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "08_laboratory.py"
RECORDED = json.loads((ROOT / "docs" / "laboratory.json").read_text(encoding="utf-8"))
APART = 0.03  # nats: machines round differently, and the same steps end a little apart


def remade(tmp_path, experiment, *arguments):
    command = [sys.executable, EXAMPLE, experiment, *arguments, "--json", tmp_path / "fresh.json"]
    subprocess.run(command, check=True)
    return json.loads((tmp_path / "fresh.json").read_text(encoding="utf-8"))


def test_every_recorded_training_is_one_of_the_examples():
    known = {json.dumps(run, sort_keys=True) for of in runpy.run_path(EXAMPLE)["TRAININGS"].values() for run in of()}
    assert {json.dumps(point["run"], sort_keys=True) for point in RECORDED["trainings"]} <= known


@pytest.mark.full
@pytest.mark.parametrize("way", ["full", "LoRA"])
def test_a_recorded_training_made_again_ends_where_it_did(tmp_path, way):
    trainings = list(runpy.run_path(EXAMPLE)["rates"]())
    like = {"way": way, "lr": 0.002, "rank": None if way == "full" else 4, "scaling": 2.0}
    (place,) = [i for i, run in enumerate(trainings) if like.items() <= run.items()]
    fresh = remade(tmp_path, "rates", "--only", str(place))
    assert fresh["before"] == pytest.approx(RECORDED["before"], abs=APART)
    (new,) = fresh["trainings"]
    (old,) = [point for point in RECORDED["trainings"] if point["run"] == new["run"]]
    for name in ("new", "old"):
        assert new["result"][name] == pytest.approx(old["result"][name], abs=APART)
    assert math.isclose(new["result"]["change"], old["result"]["change"], rel_tol=0.02)


@pytest.mark.full
def test_recorded_first_directions_are_those_of_the_model(tmp_path):
    fresh = remade(tmp_path, "directions", "--steps", "3")["directions"]
    for optimizer in ("Adam", "momentum"):
        new, old = (found[optimizer]["steps"]["1"] for found in (fresh, RECORDED["directions"]))
        for what in ("gradient", "step"):
            for kind, spread in old[what].items():
                assert new[what][kind]["share"] == pytest.approx(spread["share"], abs=0.01)
