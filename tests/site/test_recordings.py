"""What the site computes from the recorded trainings, on a few trainings that were made up."""

import pytest
from recordings import Recordings

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
