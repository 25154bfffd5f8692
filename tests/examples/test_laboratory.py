"""The laboratory: which trainings it makes, what each keeps, and that a recorded one made again ends where it did."""

import json
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import cross_entropy, evaluate
from minilora.layer import parameter_count

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "measure"))
import laboratory

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "docs" / "recordings" / "laboratory.json").read_text(encoding="utf-8"))
APART = 0.03  # nats: machines round differently, and the same steps end a little apart


def made(run, choice):
    return {"run": run, "result": {"choice": choice}}


@cache
def played(loss, most=2000):
    """Return the trainings that the laboratory would make if this were the loss of each, in their order."""
    trainings = []
    while len(trainings) < most and (run := next(laboratory.missing(trainings), None)):
        trainings.append(made(run, loss(run)))
    return trainings


def valley(run, at=3e-3):
    """A loss with one valley, at a rate that falls with the scaling; a seed moves it a little."""
    wave = np.random.default_rng([run["seed"], round(1e6 * run["lr"])]).normal()
    return abs(np.log2(run["lr"] * run["scaling"] / at)) + 0.1 * wave


def cells():
    return [(of, seeds) for experiment, seeds in laboratory.ORDER for of, _ in experiment()]


# --- which trainings --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("at", [3e-3, 1e-5, 0.2], ids=["a usual rate", "a low rate", "a high rate"])
def test_every_best_rate_and_its_neighbours_get_three_seeds(at):
    trainings = played(partial(valley, at=at))
    assert not list(laboratory.missing(trainings))
    for of, _ in cells():
        losses = {lr: list(seeds.values()) for lr, seeds in laboratory.choices(of, trainings).items()}
        best = min(losses, key=lambda lr: np.mean(losses[lr]))
        assert all(len(losses[lr]) == 3 for lr in (best / 2, best, best * 2))
    keys = [laboratory.key(training["run"]) for training in trainings]
    assert len(keys) == len(set(keys))  # no training is made twice


@pytest.mark.long
def test_every_cell_is_searched_before_a_second_seed():
    trainings = played(valley)
    second = next(i for i, training in enumerate(trainings) if training["run"]["seed"])
    for of, _ in laboratory.grid():
        losses = {lr: seeds[0] for lr, seeds in laboratory.choices(of, trainings[:second]).items()}
        best = min(losses, key=losses.get)
        assert {best / 2, best * 2} <= set(losses)


def test_the_grid_has_every_rank_scaling_and_length():
    found = {(of["rank"], of["scaling"], of["share"]) for of, _ in laboratory.grid() if of["way"] == "LoRA"}
    assert found == {
        (rank, of(rank), share)
        for rank in laboratory.RANKS
        for of in laboratory.SCALINGS.values()
        for share in laboratory.SHARES
    }
    assert [of["share"] for of, _ in laboratory.grid() if of["way"] == "full"] == [1, 1 / 4, 1 / 16]
    assert len(list(laboratory.grid())) == 24


@pytest.mark.long
def test_what_is_stopped_goes_on_from_what_it_wrote(tmp_path):
    file = tmp_path / "laboratory.json"
    whole = played(valley, most=40)
    laboratory.write({"trainings": whole[:17]}, file)
    again = json.loads(file.read_text())["trainings"]
    assert next(laboratory.missing(again)) == whole[17]["run"]


def test_a_write_that_fails_leaves_the_recording_whole(tmp_path, monkeypatch):
    file = tmp_path / "laboratory.json"
    laboratory.write({"trainings": [1]}, file)
    with pytest.raises(TypeError):
        laboratory.write({"trainings": [object()]}, file)
    monkeypatch.setattr(laboratory.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        laboratory.write({"trainings": [1, 2]}, file)
    assert json.loads(file.read_text()) == {"trainings": [1]}


# --- one training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(king_james):
    return laboratory.model_and_texts()


@pytest.mark.long
def test_model_and_windows_are_those_of_the_recording(texts):
    base, data = texts
    model = laboratory.trainable(base, {"way": "full"})
    assert parameter_count(model, trained=True) == parameter_count(base) == RECORDED["numbers"] == 852_608
    for name, part in (("choice", "choice"), ("new", "report"), ("old", "old")):
        assert evaluate(base, *data[part], cross_entropy) == pytest.approx(RECORDED["before"][name], abs=APART)
    parts = {name: {row.tobytes() for row in data[name][0]} for name in ("train", "choice", "report")}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 956, "choice": 54, "report": 53}
    assert not parts["choice"] & parts["report"]  # no window both chooses and reports
    assert not parts["train"] & (parts["choice"] | parts["report"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("losses", "last", "best", "least"),
    [
        (lambda step: 4 + abs(step - 80) / 100, 120, 80, 4),  # the first moment a third of whose steps brought none
        (lambda step: 6.0, 60, 0, None),  # it only gets worse
        (lambda step: 4 - step / 1000, laboratory.STEPS, laboratory.STEPS, 4 - laboratory.STEPS / 1000),
    ],
)
def test_the_weights_of_the_least_loss_are_kept(texts, losses, last, best, least):
    """Of a training whose weights pass through the numbers of steps; it ends where it learns no more."""
    base, data = texts
    watch = laboratory.Watch(laboratory.trainable(base, {"way": "full"}), data, laboratory.MOMENTS)
    (_name, weight), *_ = watch.params.items()
    with pytest.MonkeyPatch.context() as patched:
        for step in range(1, laboratory.STEPS + 1):
            weight[...] = step
            patched.setattr(laboratory, "evaluate", lambda *_, step=step: losses(step))
            try:
                watch(SimpleNamespace(epoch=step))
            except laboratory.Stopped:
                break
    watch.restore()
    assert (step, watch.step) == (last, best)
    assert (weight == (best or next(iter(base.trainable().values())))).all()
    if best:
        assert watch.least == least
    if best == laboratory.STEPS:
        assert len(watch.losses) == len(laboratory.MOMENTS)


# --- the recording ----------------------------------------------------------------------------------------------------


def test_the_recording_says_how_it_was_made():
    assert (ROOT / RECORDED["script"]).read_text(encoding="utf-8").startswith(f'"""{laboratory.__doc__}')
    assert RECORDED["about"] == laboratory.about()
    assert RECORDED["moments"] == list(laboratory.MOMENTS)
    known = [of for of, _ in cells()]
    for training in RECORDED["trainings"]:
        run = training["run"]
        assert training["when"]
        assert {name: run[name] for name in run if name not in ("lr", "seed")} in known
        assert run["seed"] in laboratory.SEEDS
        assert np.log2(1000 * run["lr"]).is_integer()


def test_recorded_losses_hold_together():
    for training in RECORDED["trainings"]:
        result, per_step = training["result"], training["run"]["batch"] / laboratory.BATCH
        losses = [RECORDED["before"]["choice"], *result["losses"]]
        assert result["choice"] == min(losses)
        assert len(result["olds"]) == len(result["losses"])
        place = losses.index(min(losses))
        assert result["step"] == (int(laboratory.MOMENTS[place - 1] / per_step) if place else 0)
        if place:  # adapters are merged at the end
            assert result["old"] == pytest.approx(result["olds"][place - 1], abs=0.001)


@pytest.mark.full
@pytest.mark.parametrize("like", [{"way": "full", "share": 1 / 16}, {"way": "LoRA", "rank": 16, "share": 1 / 16}])
def test_a_recorded_training_made_again_ends_where_it_did(texts, like):
    old = next(training for training in RECORDED["trainings"] if like.items() <= training["run"].items())
    new = laboratory.one(old["run"])
    for name in ("choice", "new", "seen", "old"):
        assert new["result"][name] == pytest.approx(old["result"][name], abs=APART)
    assert new["result"]["change"] == pytest.approx(old["result"]["change"], rel=0.02)


@pytest.mark.full
def test_recorded_first_directions_are_those_of_the_model(texts):
    fresh = laboratory.look_at_directions(*texts, steps=3)
    for optimizer in ("Adam", "momentum"):
        new, old = (
            found[optimizer]["steps"][1 if found is fresh else "1"] for found in (fresh, RECORDED["directions"])
        )
        for what in ("gradient", "step"):
            for kind, spread in old[what].items():
                assert new[what][kind]["share"] == pytest.approx(spread["share"], abs=0.01)
