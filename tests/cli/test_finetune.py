"""``minilora finetune``: it is adapt and train, and what it prints, keeps and leaves out.

transcripts/refused.txt has what it refuses.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import Llama, adapt, adapters, attach, evaluate, load_adapter, quantize, save_adapter, train
from minilora.backend import get_backend
from minilora.cli.figures import plot_learning
from minilora.fast import accumulate
from minilora.files.checkpoint import read_checkpoint
from minilora.language import next_token_loss
from minilora.language.finetune import (
    Step,
    best_step,
    check_recipe,
    default_workers,
    finetune,
    plan,
    schedule_of,
    warn_beyond_context,
)
from minilora.language.losstable import LOG_EVERY, LossTable
from minilora.language.memory import parameter_bytes
from minilora.language.recipe import SMALL_MODEL, Recipe, defaults_for, steps_or_share
from minilora.language.text import windows
from minilora.layer import parameter_count
from minilora.losses import cross_entropy
from minilora.optim import Adam
from minilora.schedule import Schedule
from minilora.training import Passes, TrainingDiverged
from minilora.variants.dropout import with_dropout

from ..support.adapter_folder import change_json
from ..support.command_line import FINETUNE, QUICK, losses, rows, run, weights
from ..support.compare import refused
from ..support.disk import contents
from ..support.language import TEXT, greedily, ids_of, tiny_llama
from ..support.sample import one_in
from ..support.streams import File

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytestmark = pytest.mark.usefixtures("folder")

X, Y, *HELD_OUT = windows(ids_of(TEXT), 8)
ASKED = Recipe(text=Path("t"), save=Path("s"), batch_size=4, epochs=1.0, workers=1)


def write_lines(file, *lines):
    Path(file).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


# --- the numbers ---


def trained(adapting, training, seed=0, dropout=0.0):
    """Fine-tune 21 steps as the command does, through the library alone: half of a batch at a time."""
    rng = np.random.default_rng(seed)
    model = adapt(
        Llama.load("model"), **{"target_modules": "all-linear", "rank": 2, "alpha": 16, "rng": rng} | adapting
    )
    before = evaluate(model, *HELD_OUT, cross_entropy)

    def gradients(model, x, y, loss):
        if dropout:
            keys = rng.integers(1 << 64, size=len(x), dtype=np.uint64).tolist()
            model = with_dropout(model, dropout, keys)
        return accumulate(2)(model, x, y, loss)

    history = train(
        model, X, Y, gradients=gradients, batches=Passes(len(X), 4, seed), loss=next_token_loss, rng=rng, epochs=21,
        steps=1, held_out=tuple(HELD_OUT), **{"lr": 0.02, "log_every": LOG_EVERY} | training,
    )  # fmt: skip
    return model, {0: before} | dict(zip(history.epochs, history.losses, strict=True))


SAME = [  # options; what adapt and train are given in their place; what the adapter's file says
    (
        "--use-dora --schedule cosine --warmup 0.25 --max-grad-norm 0.5 --weight-decay 0.3",
        {"use_dora": True},
        {"schedule": Schedule("cosine", 21, 6), "max_grad_norm": 0.5, "weight_decay": 0.3},
        {"use_dora": True, "r": 2, "lora_alpha": 16, "base_model_name_or_path": "model", "lora_dropout": 0.0},
    ),
    (
        "--dropout 0.25 --use-rslora --seed 5 --schedule linear --target-modules q_proj,lm_head",
        {"use_rslora": True, "target_modules": ["q_proj", "lm_head"]},
        {"dropout": 0.25, "seed": 5, "schedule": Schedule("linear", 21)},
        {"lora_dropout": 0.25, "use_rslora": True, "task_type": "CAUSAL_LM"},
    ),
    (
        "--init pissa --warmup 3",
        {"init": "pissa"},
        {"schedule": Schedule("constant", 21, 3)},
        {"r": 4, "use_dora": False, "use_rslora": False},
    ),
]


@pytest.mark.parametrize(("asked", "adapting", "training", "config"), SAME)
def test_finetuning_is_adapt_and_train(shell, asked, adapting, training, config):
    given = {name: training[name] for name in ("seed", "dropout") if name in training}
    expected, measured = trained(adapting, {k: v for k, v in training.items() if k not in given}, **given)
    shown = losses(shell(f"{FINETUNE} --steps 21 {asked}"))
    assert shell.err == ""  # no progress bar where there is no terminal
    assert list(shown) == list(measured) == [0, 20, 21]
    np.testing.assert_allclose(list(shown.values()), list(measured.values()), atol=6e-4)
    assert shown[21] < 0.95 * shown[0]
    said = json.loads(Path("a/adapter_config.json").read_text())
    assert {name: said[name] for name in config} == config
    saved = attach(Llama.load("model"), load_adapter("a"))
    if "pissa" in asked:  # what is saved is the difference to the base
        assert evaluate(saved, *HELD_OUT, cross_entropy) == pytest.approx(measured[21], rel=1e-4)
    else:
        assert saved.trainable().keys() == expected.trainable().keys()
        for name, array in expected.trainable().items():
            np.testing.assert_array_equal(saved.trainable()[name], array)


PARTS = ("--micro-batch 1 --workers 1", "", "--workers 3")


@pytest.mark.parametrize("parts", one_in(3, PARTS, PARTS))
@pytest.mark.parametrize(("long", "counts"), [("--epochs 3", {3}), ("--steps 16", {2, 3})])
def test_each_pass_has_every_example_once(monkeypatch, parts, long, counts):
    """Of 27 examples to train on: 6 steps of 4 and one of 3 are a pass, and 16 steps are two and a part of a third."""
    write_lines("e.jsonl", *({"prompt": "the cat ", "completion": f"{a}{b}"} for a in "abcde" for b in "fghijk"))
    seen, right = [], Step.__call__

    def step(self, model, x, y, loss):
        seen.append([tuple(row) for row in x.tolist()])
        return right(self, model, x, y, loss)

    monkeypatch.setattr(Step, "__call__", step)
    few = "finetune e.jsonl --save a --model model --batch-size 4 --rank 1 --target-modules q_proj"
    assert run(f"{few} {long} {parts}") == 0
    assert [len(rows) for rows in seen] == ([4] * 6 + [3]) * (len(seen) // 7) + [4] * (len(seen) % 7)
    found = Counter(row for rows in seen for row in rows)
    assert (len(found), {*found.values()}) == (27, counts)
    for start in range(0, len(seen) - 6, 7):
        assert len({row for rows in seen[start : start + 7] for row in rows}) == 27
    orders = {tuple(map(tuple, seen[start : start + 7])) for start in range(0, len(seen) - 6, 7)}
    assert len(orders) == len(seen) // 7


@pytest.mark.parametrize(
    ("asked", "measured", "said"),
    [("", slice(None), "all {}"), ("--eval-rows 5", np.linspace(0, 101, 5).round().astype(int), "5 of {}")],
)
def test_held_out_rows_are_measured_all_or_as_asked(shell, asked, measured, said):
    held_out = windows(ids_of(TEXT), 8, 0.4, None)[2:]
    assert len(held_out[0]) == 102
    out = shell(f"{QUICK} --steps 1 --valid 0.4 {asked}")
    assert f"measure  {said.format(102)} held-out windows: before the first step and after the last, " in out
    assert f"time     1 steps of 4 windows: {4 / 152:.3g} passes over all 152\n" in out
    base = evaluate(Llama.load("model"), *(array[measured] for array in held_out), cross_entropy)
    assert losses(out)[0] == pytest.approx(base, abs=6e-4)


def test_measuring_takes_at_most_a_fifth_of_the_steps_time():
    sizes = ((1, 1, 20), (10, 1, 20), (11, 1, 40), (200, 4, 100), (10_000, 4, 5000), (32, 4, 20))
    for count, batch_size, every in sizes:
        recipe = replace(ASKED, epochs=None, batch_size=batch_size).resolved(1)
        assert recipe.eval_interval(count) == every
        assert recipe.eval_cost(count) <= 0.2 * every
        assert replace(recipe, eval_every=7).eval_interval(count) == 7


def planned(rows, steps, every, done=None, batch=4):
    """What is said of a training before it begins: how long it is, and how long measuring so many rows takes."""
    data = SimpleNamespace(X=np.zeros((99, 8)), X_held=np.zeros((rows, 8)), held=rows, unit="windows", example="")
    recipe = replace(ASKED, epochs=None, steps=steps, eval_every=every, batch_size=batch, lr=0.1)
    return plan(recipe.resolved(1), data, done)


def share_of_measuring(rows, steps, every, done=None, batch=4):
    """The same, step by step: a forward takes two fifths of a step's time, and a step has so many rows."""
    times = [step for step in range(1, steps + 1) if step > (done or 0) and (step % every == 0 or step == steps)]
    time = (len(times) + (done is None)) * rows * 0.4 / batch
    return time / (time + steps - (done or 0))


@pytest.mark.parametrize("done", [None, 1, 4, 5, 9, 10, 11])
def test_the_time_of_measuring_is_counted_as_it_is_spent(done):
    """Before the first step, unless that was done earlier, each so many steps, and after the last."""
    for steps, every in ((12, 4), (12, 5), (13, 5), (13, 20)):
        share = share_of_measuring(20, steps, every, done)
        assert f", about {share:.0%} of the time" in planned(20, steps, every, done)[1]
    assert planned(20, 12, 4, 12)[1].endswith("before the first step, every 4 steps and after the last")


def test_where_measuring_takes_long_fewer_rows_are_named():
    """Above two fifths of the time, and so many that they take a fifth at most."""
    for held in (33, 34, 35, 1000):
        share, line = share_of_measuring(held, 10, 20), planned(held, 10, 20)[1]
        assert (share > 0.4) == ("--eval-rows" in line) == (held > 33)
        if share > 0.4:
            fewer = int(re.search(r"; --eval-rows (\d+) takes 20%$", line)[1])
            assert share_of_measuring(fewer, 10, 20) <= 0.2 < share_of_measuring(fewer + 1, 10, 20)
    assert "--eval-rows" not in planned(5, 1, 20, batch=1)[1]  # of which no row is few enough


def test_a_pass_ends_with_a_batch_of_its_own_rows():
    """Of 99 rows 24 batches of 4 and one of 3; of a training that goes on all steps count."""
    for steps, done, said in (
        (25, None, "25 steps of 4 windows: 1 pass"),
        (50, 20, "30 steps of 4 windows, 50 in all: 2 passes"),
        (5, 0, "5 steps of 4 windows: 0.2 passes"),
    ):
        assert planned(9, steps, 20, done)[0] == f"time     {said} over all 99"


def test_steps_between_two_measurements_are_told_where_there_are_some():
    before, after = "measure  all 9 held-out windows: before the first step", " and after the last, about "
    for steps, each in ((21, ", every 20 steps"), (20, ""), (19, "")):
        assert planned(9, steps, 20)[1].startswith(before + each + after)


def test_an_epochs_rates_fall_over_all_of_its_steps(monkeypatch):
    seen, right = [], Adam.step
    monkeypatch.setattr(Adam, "step", lambda self, grads: seen.append(self.schedule) or right(self, grads))
    few = "finetune text --save a --model model --batch-size 4 --length 8 --target-modules q_proj"
    assert run(f"{few} --epochs 0.1 --schedule linear") == 0
    assert seen == [Schedule("linear", 6)] * 6


def test_an_adapted_head_has_masks_for_every_position():
    write_lines("e.jsonl", *({"prompt": "the cat ", "completion": "sat on the mat"[: 1 + i]} for i in range(12)))
    some = "finetune e.jsonl --save a --model model --steps 2 --batch-size 3 --target-modules q_proj,lm_head"
    assert run(some, "--dropout", "0.3") == 0
    assert "lm_head" in load_adapter("a")


def test_any_number_of_workers_writes_the_same_adapter():
    found = set()
    for workers in (1, 5):
        assert run(f"{QUICK} --workers {workers} --batch-size 5 --micro-batch 1 --dropout 0.3") == 0
        found.add(weights())
    assert len(found) == 1


def test_a_base_in_four_bits_is_finetuned_and_speaks(shell, monkeypatch):
    monkeypatch.setattr("minilora.language.finetune.megabytes", lambda count: f"{count:,.0f} x 1e-6")
    base = quantize(Llama.load("model"))
    out = shell(f"{FINETUNE} --quantize nf4")
    size, kept = parameter_count(Llama.load("model")), parameter_bytes(base)
    assert f"model    model: {size:,} parameters in float32" in out
    assert f"weights  {kept:,} x 1e-6 MB with quantised linear layers, {4 * size:,} x 1e-6 MB without" in out
    adapted = attach(base, load_adapter("a"))
    for step, model in ((0, base), (6, adapted)):
        assert losses(out)[step] == pytest.approx(evaluate(model, *HELD_OUT, cross_entropy), abs=6e-4)
    said = shell("generate 'the cat' --model model --adapter a --quantize nf4 --temperature 0 --tokens 9")
    assert said == f"the cat{greedily('the cat', adapted)}\n"


EACH = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("asked", "targets", "kept"),
    [
        ("q_proj", ["q_proj"], ["q_proj"]),
        ("up_proj, model.layers.1.self_attn.o_proj", ["up_proj", "layers.1.self_attn.o_proj"], None),
        (r".*layers\.0\..*(k|v)_proj", ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"], None),
        ("all-linear", EACH, EACH),
    ],
)
def test_target_modules_are_names_or_a_regular_expression(asked, targets, kept):
    assert run(QUICK, "--steps", "1", "--target-modules", asked) == 0
    expected = adapt(tiny_llama(), targets, rank=1, alpha=1, rng=np.random.default_rng(0))
    assert load_adapter("a").keys() == adapters(expected).keys()
    assert kept in (None, json.loads(Path("a/adapter_config.json").read_text())["target_modules"])


@pytest.mark.parametrize(
    "expression", ["(.*)*(.*)*(.*)*(.*)*(.*)*x", pytest.param("((a|.)*)*\\1z", marks=pytest.mark.long)]
)
def test_an_expression_that_would_run_for_years_is_refused(shell, expression, monkeypatch):
    monkeypatch.setattr("minilora.files.patterns.SECONDS", 0.1)
    assert "target_modules: matching takes more than 0.1 s" in shell.refused(FINETUNE, "--target-modules", expression)
    assert not Path("a").exists()


def test_defaults_follow_the_models_size_and_the_data():
    assert defaults_for(852_608) == defaults_for(SMALL_MODEL) == {"steps": 300, "batch_size": 16, "lr": 3e-3}
    assert defaults_for(134_515_008) == defaults_for(SMALL_MODEL + 1) == {"steps": 80, "batch_size": 4, "lr": 1e-3}
    recipe = replace(ASKED, epochs=None, lr=0.5).resolved(SMALL_MODEL)
    assert (recipe.lr, recipe.batch_size, recipe.steps, recipe.for_rows(228).steps) == (0.5, 4, 300, 300)
    assert [replace(recipe, epochs=e).for_rows(228).steps for e in (1, 0.1, 0.001)] == [57, 6, 1]
    parts = [replace(recipe, micro_batch=n).part_rows for n in (None, 1, 3, 199)]
    assert parts == [2, 1, 3, 4]  # half of a batch, and never more than it has
    resolved = ASKED.resolved(1)  # steps, parts and a warmup are rounded up
    assert [resolved.for_rows(rows).steps for rows in (4, 5, 7, 8, 9)] == [1, 2, 2, 2, 3]
    assert replace(resolved, epochs=2).for_rows(5).steps == 4  # each pass ends with a batch of its own
    assert replace(resolved, epochs=1.1).for_rows(40).steps == 11  # and not 12, for rounding
    assert [replace(resolved, batch_size=size).part_rows for size in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert schedule_of(replace(resolved, warmup=0.01, schedule="linear"), 30) == Schedule("linear", 30, 1)
    for warmup in (1.0, 2.0):  # of a constant rate no step is the last
        assert schedule_of(replace(resolved, warmup=warmup), 30) == Schedule("constant", int(warmup) + 1, int(warmup))


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("7", 7), ("300", 300), ("0.1", 0.1), ("0.0", 0.0), (".5", 0.5), ("0.999", 0.999)]
)
def test_a_warmup_is_a_number_of_steps_or_a_share(text, value):
    assert steps_or_share(text) == value
    assert isinstance(steps_or_share(text), int) == ("." not in text)


@pytest.mark.parametrize("text", ["-1", "-0.1", "1.0", "2.5", "1e-3", "1e3", "nan", "inf", "half", ""])
def test_a_warmup_that_is_neither_is_refused(text):
    said = f"{text!r} is neither a number of steps nor a share below 1, such as 0.1"
    with refused(said, argparse.ArgumentTypeError):
        steps_or_share(text)


def test_workers_follow_the_cores_and_the_library(monkeypatch, standin):
    for available, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr("minilora.language.finetune.core_count", lambda available=available: available)
        assert default_workers(get_backend("numpy")) == expected
        assert default_workers(standin) == 1


# --- the adapter to go on from, and the one that is written ---

GO_ON = "finetune text --save b --model model --adapter a --steps 4 --batch-size 4 --length 8 --lr 0.02"


def test_a_training_goes_on_from_an_adapter(shell):
    end = losses(shell(f"{QUICK} --use-rslora --target-modules q_proj,down_proj"))[3]
    before = weights()
    out = shell(GO_ON)
    assert losses(out)[0] == pytest.approx(end, abs=2e-3)
    assert "adapter  rank 2 in 4 layers" in out
    first, second = load_adapter("a"), load_adapter("b")
    assert first.keys() == second.keys()
    assert all(second[path].scaling == adapter.scaling for path, adapter in first.items())
    assert all((second[path].lora_A != adapter.lora_A).any() for path, adapter in first.items())
    assert weights() == before


BROUGHT = {
    "rank": 2, "alpha": 3.0, "target_modules": ["q_proj"], "target_parameters": ["x"], "use_rslora": True,
    "use_dora": True, "init": "pissa",
}  # fmt: skip


@pytest.mark.parametrize("names", [*([name] for name in BROUGHT), ["alpha", "init"]])
def test_an_adapter_to_go_on_from_brings_what_it_is(names):
    recipe = replace(ASKED, adapter=Path("a"), **{name: BROUGHT[name] for name in names})
    asked = " and ".join(f"--{name.replace('_', '-')}" for name in names)
    with refused(f"leave out {asked}, which --adapter determines", ValueError):
        check_recipe(recipe)


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
def test_ranks_stay_as_they_are_in_the_trainings_dtype(shell):
    model, rng = Llama.load("model"), np.random.default_rng(0)
    wide = adapters(adapt(model, ["q_proj"], rank=3, alpha=5, rng=rng))
    save_adapter("a", wide | adapters(adapt(model, ["v_proj"], rank=1, alpha=2, rng=rng)))
    assert "adapter  rank 1-3 in 4 layers: " in shell(GO_ON, "--dtype", "float64")
    found = {(path[-6:], a.rank, a.alpha, a.lora_A.dtype.name) for path, a in load_adapter("b").items()}
    assert found == {("q_proj", 3, 5.0, "float64"), ("v_proj", 1, 2.0, "float64")}


def test_an_adapter_is_not_replaced_unless_it_may_be(shell, monkeypatch):
    some = f"{QUICK} --steps 2".replace("--overwrite", "")
    shell(some, "--checkpoint", "c")
    before = contents("a")
    with monkeypatch.context() as patched:
        patched.setattr("minilora.language.text.read_whole", lambda path, at_most: pytest.fail("something is read"))
        for more in ([], ["--checkpoint", "new"]):
            said = "save 'a' already has an adapter: choose another folder, or pass --overwrite"
            assert shell.refused(some, *more) == said
            assert shell.out == ""
    assert contents("a") == before
    shell(some, "--checkpoint", "c", "--steps", "3")
    assert weights() not in before.values()
    shell(some, "--overwrite")
    assert weights() in before.values()


def test_the_step_of_the_least_held_out_loss_is_saved(shell, monkeypatch):
    """The step before the first is never the best."""
    measured = iter([1.0, 2.0, 3.0])
    said = "the adapter is from step 1, with the lowest held-out loss: 2.000; before training it was 1.000"
    with monkeypatch.context() as patched:
        patched.setattr("minilora.language.finetune.evaluate_where_it_counts", lambda *a, **k: next(measured))
        assert said in shell(f"{QUICK} --steps 2 --eval-every 1 --keep-best")
    kept = weights()
    for steps in (1, 2):
        shell(QUICK, "--steps", steps)
        assert (weights() == kept) == (steps == 1)


LOWEST = "the held-out loss was lowest at step"
BEST = [
    ([5.0, 4.0, 4.5], {}, f"{LOWEST} 20: 4.000; the same command with --steps 20 ends there"),
    ([5.0, 6.0, 5.5], {}, f"{LOWEST} 0: 5.000, before training"),
    ([5.0, 4.0, 3.0], {}, ""),
    ([5.0, 4.0004, 4.0], {}, ""),
    ([5.0, 4.0, 4.0004], {}, ""),  # as printed, they are the same
    ([5.0, 4.0004, 4.0, 4.5], {}, f"{LOWEST} 20: 4.000; the same command with --steps 20 ends there"),
    *(
        ([5.0, 4.0, 4.5], asked, f"{LOWEST} 20: 4.000; the same command with --steps 20 {more} ends there")
        for asked, more in (
            ({"epochs": 2.0}, "instead of --epochs"),
            ({"overwrite": False}, "and --overwrite"),
            ({"checkpoint": "c"}, "and another --checkpoint"),
        )
    ),
]


def test_the_best_step_is_named_unless_it_is_last():
    """By a command that runs: the folder holds an adapter then, and steps beside epochs are refused."""
    for measured, asked, said in BEST:
        table = LossTable(40, 0, 8)
        table.rows = [(20 * i, math.nan, loss) for i, loss in enumerate(measured)]
        found = best_step(SimpleNamespace(**{"checkpoint": None, "epochs": None, "overwrite": True} | asked), table)
        assert found == said
    for before, more in ((4.0, "; before training it was 4.000"), (4.1, "")):
        table.rows, table.best_step = [(0, math.nan, before), (9, math.nan, 4.0), (12, math.nan, 5.0)], 9
        said = "the adapter is from step 9, with the lowest held-out loss: 4.000"
        assert best_step(SimpleNamespace(), table) == said + more


def test_a_training_that_breaks_down_names_step_and_rate(shell):
    said = shell.refused(FINETUNE, "--lr", "1e30", "--checkpoint", "c")
    bad, kept = map(int, re.findall(r"step (\d)", said))
    assert said == (
        f"step {bad} produced NaN or infinity: --lr 1e+30 is too large for this training. "
        f"No adapter is written; c has step {kept}, and another --lr needs another file"
    )
    assert read_checkpoint(Path("c")).epoch == kept == bad - 1
    assert not Path("a").exists()
    recipe = Recipe(
        text=Path("text"), model=Path("model"), save=Path("a"), length=8, batch_size=4, steps=2, lr=1e39, rank=1,
        alpha=1.0, target_modules=["q_proj"],
    )  # fmt: skip
    with pytest.raises(TrainingDiverged, match=r"^step 1 produced") as broken:
        finetune(recipe, get_backend("numpy"))
    assert (broken.value.epoch, broken.value.step) == (1, 1)


# --- what is printed, and when ---


def test_the_load_and_the_first_loss_are_told_before_training(monkeypatch):
    seen, load = [], Llama.load
    monkeypatch.setattr(Llama, "load", lambda *a, **k: seen.append(sys.stdout.seen) or load(*a, **k))
    monkeypatch.setattr(
        "minilora.language.finetune.adapt", lambda *a, **k: seen.append(sys.stdout.seen) or adapt(*a, **k)
    )
    monkeypatch.setattr(
        "minilora.language.finetune.train", lambda *a, **k: seen.append(sys.stdout.seen) or train(*a, **k)
    )
    monkeypatch.setattr(sys, "stdout", File())
    assert run(QUICK) == 0
    said = []
    with monkeypatch.context() as patched:  # an error begins on a line of its own
        patched.setattr("minilora.cli.console.print_error", lambda text: said.append(sys.stdout.seen))
        assert run(QUICK, "--batch-size", "229") == 2
    assert said[0].endswith("model    model\n")
    device = get_backend("numpy").device
    assert seen[:2] == ["model    model", f"model    model: 3,348 parameters in float32, {device}\n"]
    assert re.fullmatch(r"   0 +\d\.\d{3}", seen[2].splitlines()[-1])


def test_what_is_beyond_the_context_is_warned_of_there():
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=1024))
    said = "a text has 1,025 tokens, but the model's context is 1,024: its output beyond may be nonsense"
    warn_beyond_context(model, 1024, "a text has")
    with pytest.warns(UserWarning, match=f"^{said}$"):
        warn_beyond_context(model, 1025, "a text has")


@pytest.mark.parametrize("longer", ["e.jsonl", "held.jsonl"])
def test_the_longest_example_is_warned_of_wherever_it_is(shell, longer):
    """Of those to train on, and of those held out: a context has 16 tokens, and the longest row 17."""
    change_json(Path("model/config.json"), max_position_embeddings=16)
    for name in ("e.jsonl", "held.jsonl"):
        last = "sat on the mat" if name == longer else "sat on the ma"
        write_lines(name, *({"prompt": "cat", "completion": text} for text in (last, "a", "sat")))
    few = "finetune e.jsonl --valid held.jsonl --model model --save a --steps 1 --batch-size 2 --target-modules q_proj"
    shell(few)
    said = "an example has 17 tokens, but the model's context is 16: its output beyond may be nonsense"
    assert shell.err == f"minilora: {said}\n"


def test_names_that_the_user_gives_cannot_steer_the_terminal(shell):
    evil = "\x1b[2J\u202e"
    Path("model").rename(f"{evil}m")
    Path("text").rename(f"{evil}t")
    out = shell(f"finetune {evil}t --save {evil}a --model {evil}m --steps 1 --batch-size 4 --length 8")
    assert out.count("\\x1b[2J") == 3
    assert out.replace("\n", "").isprintable()


def test_figure_and_log_have_every_step_also_after_a_stop(shell, monkeypatch, pictures):
    drawn = []
    monkeypatch.setattr("minilora.cli.figures.plot_learning", lambda *a: drawn.append(a) or plot_learning(*a))
    typed = f"{QUICK} --steps 8 --log-every 5 --eval-every 5"
    shown = rows(shell(f"{typed} --plot p.svg --log whole"))
    for asked in ("--steps 2", "--plot p.svg"):
        shell(f"{typed} --checkpoint c --log log {asked}")
    (table, each), again = drawn
    assert pictures == ["svg", "svg"]
    assert ([row[0] for row in table], [step for step, _ in each]) == ([0, 5, 8], [*range(1, 9)])
    assert again[1] == each
    assert np.mean([loss for _, loss in each[:5]]) == pytest.approx(table[1][1], rel=1e-12)
    assert np.mean([loss for _, loss in each[5:]]) == pytest.approx(table[2][1], rel=1e-12)
    np.testing.assert_array_equal(plot_learning(table, each).axes[0].lines[0].get_xydata(), each)
    whole, resumed = ([json.loads(line) for line in Path(name).read_text().splitlines()] for name in ("whole", "log"))
    assert [line["step"] for line in whole] == [*range(9)]
    measured = {line["step"]: line["held_out_loss"] for line in whole if "held_out_loss" in line}
    assert measured == pytest.approx({step: held_out for step, _, held_out in shown}, abs=6e-4)
    for name in ("step", "training_loss", "grad_norm"):
        assert [name in line for line in whole[1:]] == [True] * 8
        assert [line.get(name) for line in resumed] == [line.get(name) for line in whole]


@pytest.mark.parametrize(("option", "what"), [("--log", "the log"), ("--skip-bad", "the file of skipped lines")])
def test_a_figure_takes_the_place_of_no_file_beside(shell, option, what):
    said = shell.refused(f"{FINETUNE} --valid e.jsonl {option} one.svg --plot ./one.svg")
    assert said == f"plot file 'one.svg' is {what}, expected another file"


def test_log_and_skipped_lines_are_two_files(shell):
    said = shell.refused(f"{FINETUNE} --valid e.jsonl --log one --skip-bad ./one")
    assert said == "the file of skipped lines 'one' is the log, expected another file"


# --- lines that are left out ---


def test_bad_lines_may_be_left_out_and_copies_are_told(shell):
    write_lines("e.jsonl", *[{"text": "the cat sat"}] * 3, "{", '{"text": 3}', "", '{"text": 4}')
    few = "finetune e.jsonl --model model --steps 1 --batch-size 1 --skip-bad bad.jsonl --target-modules q_proj"
    out = shell(few, "--save", "a")
    assert (
        "skipped  3 unusable lines, now in bad.jsonl\n"
        "         e.jsonl, line 4: expected one whole JSON object on one line: Input data was truncated\n"
        "         e.jsonl, 2 lines (5, 7): Expected `str`, got `int` - at `$.text`\n"
    ) in out
    assert "data     e.jsonl: 2 examples and 1 held out" in out
    assert "\n         duplicate examples: 2\n         held-out examples that are also trained on: 1 of 1" in out
    written = [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()]
    assert [(bad["file"], bad["line"], bad["content"]) for bad in written] == [
        *(("e.jsonl", 4, "{"), ("e.jsonl", 5, '{"text": 3}'), ("e.jsonl", 7, '{"text": 4}')),
    ]
    assert [bad["reason"].partition(" ")[0] for bad in written] == ["expected", "Expected", "Expected"]
    shell.refused("finetune bad.jsonl --model model --save b")  # it is no file of examples
    assert "now in bad.jsonl\n" in shell(few, "--save", "c")  # the same lines: as after a stop
    write_lines("held.jsonl", {"text": "the cat sat"}, "{")
    shell(f"{QUICK} --skip-bad bad --valid held.jsonl")
    assert [bad["file"] for bad in map(json.loads, Path("bad").read_text().splitlines())] == ["held.jsonl"]


def test_unread_keys_are_named_before_training(shell):
    write_lines("e.jsonl", *({"text": "the cat sat", "source": i} for i in range(3)), {"text": "a dog", "\x1b": 0})
    write_lines("held.jsonl", {"text": "the mat", "\x1b": 1})
    few = "finetune e.jsonl --model model --steps 1 --batch-size 1 --target-modules q_proj --save a --valid held.jsonl"
    out = shell(few).partition("\ntime ")[0]
    assert "\n         not read: source (3 rows), \\x1b (1)\n" in out
    assert "\n         held.jsonl: not read: \\x1b (1 row)\n" in out


def test_a_batch_beyond_the_data_names_the_batch_that_fits(shell):
    """Without an option, too: the default depends on the model."""
    write_lines("e.jsonl", *({"text": "the cat sat"} for _ in range(4)))
    few = "finetune e.jsonl --model model --steps 1 --target-modules q_proj --save a"
    for more, batch in (("", 16), ("--batch-size 4", 4)):
        said = shell.refused(f"{few} {more}")
        assert said == f"a batch of {batch} is larger than the 3 examples to train on: --batch-size 3 fits"
    shell(f"{few} --batch-size 3")
