"""``minilora finetune``: it is adapt and train, and what it prints, keeps, and refuses before anything has changed."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import (
    History,
    Llama,
    adapt,
    adapters,
    attach,
    cross_entropy,
    evaluate,
    get_backend,
    load_adapter,
    quantize,
    save_adapter,
    train,
)
from minilora.batches import Passes
from minilora.cli.figures import plot_learning
from minilora.fast import accumulate
from minilora.fast.parts import core_count
from minilora.files.checkpoint import read_checkpoint
from minilora.language import next_token_loss
from minilora.language.finetune import Step, best_step, check_recipe, rates, usual_workers
from minilora.language.generation import generate
from minilora.language.llama import RecomputedBlock
from minilora.language.losstable import LOG_EVERY, LossTable
from minilora.language.memory import Memory, parameter_bytes
from minilora.language.recipe import SMALL, Recipe, fitting
from minilora.language.text import windows
from minilora.layer import parameter_count
from minilora.optim import Adam, Schedule
from minilora.variants.dropout import with_dropout

from ..support.command_line import FEW, finetune, losses, overfitting, rows, run
from ..support.language import LETTERS, TEXT, tiny_llama, write_folder

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")

ROOT = Path(__file__).parents[2]
IDS = [LETTERS.index(c) for c in TEXT]
TWO = ["--steps", "2", "--batch-size", "4", "--length", "8", "--rank", "2"]


def weights(name="a"):
    return Path(name, "adapter_model.safetensors").read_bytes()


# --- the numbers ---


def test_finetuning_is_adapt_and_train(folder, capsys):
    assert finetune("--seed", "5") == 0
    out, err = capsys.readouterr()
    model = Llama.load("model")
    X, Y, *held_out = windows([LETTERS.index(c) for c in TEXT], 8)
    rng, passes = np.random.default_rng(5), Passes(len(X), 4, 5)
    adapted = adapt(model, "all-linear", rank=2, alpha=16, rng=rng)
    before = evaluate(adapted, *held_out, cross_entropy)
    given = {"epochs": 30, "steps": 1, "batches": passes, "lr": 0.02, "log_every": LOG_EVERY, "rng": rng}
    given["gradients"] = accumulate(2)  # half of a batch at a time
    history = train(adapted, X, Y, loss=cross_entropy, held_out=tuple(held_out), **given)
    assert list(losses(out)) == [0, *history.epochs] == [0, 20, 30]
    np.testing.assert_allclose(list(losses(out).values()), [before, *history.losses], atol=6e-4)
    saved = load_adapter("a")
    assert saved.keys() == adapters(adapted).keys()
    for path, adapter in adapters(adapted).items():
        np.testing.assert_array_equal(saved[path].lora_A, adapter.lora_A)
        np.testing.assert_array_equal(saved[path].lora_B, adapter.lora_B)
    assert losses(out)[30] < 0.8 * losses(out)[0]
    assert err == ""  # no progress bar where there is no terminal


def trained(steps, dropout=0.0, **more):
    """Train as the command does, through the library alone."""
    X, Y, *_ = windows(IDS, 8)
    rng = np.random.default_rng(0)
    model = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=rng)

    def gradients(model, x, y, loss):
        if dropout:
            keys = rng.integers(1 << 64, size=len(x), dtype=np.uint64).tolist()
            model = with_dropout(model, dropout, keys)
        return accumulate(2)(model, x, y, loss)

    options = {"epochs": steps, "steps": 1, "lr": 0.02, "rng": rng, "loss": next_token_loss}
    train(model, X, Y, gradients=gradients, batches=Passes(len(X), 4, 0), **options, **more)
    return adapters(model)


@pytest.mark.parametrize("parts", [[], ["--micro-batch", "1", "--workers", "1"], ["--workers", "3"]])
@pytest.mark.parametrize(("long", "counts"), [(["--epochs", "3"], {3}), (["--steps", "16"], {2, 3})])
def test_each_pass_has_every_example_once(folder, monkeypatch, parts, long, counts):
    """Of 27 examples to train on: 6 steps of 4 and one of 3 are a pass, and 16 steps are two and a part of a third."""
    lines = [{"prompt": "the cat ", "completion": f"{a}{b}"} for a in "abcde" for b in "fghijk"]
    Path("e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    seen, right = [], Step.__call__

    def step(self, model, x, y, loss):
        seen.append([tuple(row) for row in x.tolist()])
        return right(self, model, x, y, loss)

    monkeypatch.setattr(Step, "__call__", step)
    some = ["--batch-size", "4", "--rank", "1", *long, *parts]
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *some) == 0
    assert [len(rows) for rows in seen] == ([4] * 6 + [3]) * (len(seen) // 7) + [4] * (len(seen) % 7)
    found = Counter(row for rows in seen for row in rows)
    assert (len(found), {*found.values()}) == (27, counts)
    for start in range(0, len(seen) - 6, 7):
        assert len({row for rows in seen[start : start + 7] for row in rows}) == 27
    orders = {tuple(map(tuple, seen[start : start + 7])) for start in range(0, len(seen) - 6, 7)}
    assert len(orders) == len(seen) // 7


def test_all_rows_that_are_held_out_are_measured_or_as_many_as_asked(folder, capsys):
    held_out = windows(IDS, 8, 0.4, None)[2:]
    assert finetune("--steps", "1", "--valid", "0.4") == 0
    out = capsys.readouterr().out
    assert f"measure  all {len(held_out[0])} held-out windows: before the first step and after the last, " in out
    base = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=np.random.default_rng(0))
    assert losses(out)[0] == pytest.approx(evaluate(base, *held_out, cross_entropy), abs=6e-4)
    assert finetune("--steps", "1", "--valid", "0.4", "--eval-rows", "5") == 0
    out = capsys.readouterr().out
    assert f"measure  5 of {len(held_out[0])} held-out windows: " in out
    some = [array[np.linspace(0, len(array) - 1, 5).round().astype(int)] for array in held_out]
    assert losses(out)[0] == pytest.approx(evaluate(base, *some, cross_entropy), abs=6e-4)


@pytest.mark.parametrize(
    ("rows", "batch_size", "every"),
    [(1, 1, 20), (10, 1, 20), (11, 1, 40), (200, 4, 100), (10_000, 4, 5000), (32, 4, 20)],
)
def test_a_measurement_takes_at_most_a_fifth_of_the_time_of_steps(rows, batch_size, every):
    recipe = Recipe(text=Path("t"), save=Path("a"), batch_size=batch_size, workers=1).settled(1)
    assert recipe.measured_each(rows) == every
    assert recipe.steps_of_measuring(rows) <= 0.2 * every
    assert replace(recipe, eval_every=7).measured_each(rows) == 7


def assert_saved(expected):
    saved = load_adapter("a")
    assert saved.keys() == expected.keys()
    for path, adapter in expected.items():
        np.testing.assert_array_equal(saved[path].lora_A, adapter.lora_A)
        np.testing.assert_array_equal(saved[path].lora_B, adapter.lora_B)


@pytest.mark.parametrize(
    ("asked", "schedule"),
    [
        pytest.param(["--warmup", "3"], Schedule("constant", 7, 3), marks=pytest.mark.long),
        pytest.param(["--schedule", "linear"], Schedule("linear", 7), marks=pytest.mark.long),
        (["--schedule", "cosine", "--warmup", "0.25"], Schedule("cosine", 7, 2)),
    ],
)
def test_the_rates_are_those_of_the_schedule(folder, asked, schedule):
    assert finetune("--steps", "7", *asked) == 0
    assert_saved(trained(7, schedule=schedule))


def test_an_epochs_rates_fall_over_all_of_its_steps(folder, monkeypatch):
    seen, right = [], Adam.step
    monkeypatch.setattr(Adam, "step", lambda self, grads: seen.append(self.schedule) or right(self, grads))
    size = ["--batch-size", "4", "--length", "8", "--rank", "1", "--epochs", "0.1", "--schedule", "linear"]
    assert run("finetune", "text", "--save", "a", "--model", "model", *size) == 0
    assert seen == [Schedule("linear", 6)] * 6


@pytest.mark.parametrize(
    ("asked", "config", "given"),
    [
        (["--use-rslora"], {"use_rslora": True}, {"use_rslora": True}),
        (["--use-dora"], {"use_dora": True}, {"use_dora": True}),
        (["--init", "pissa"], {"r": 4, "use_dora": False, "use_rslora": False}, {"init": "pissa"}),
    ],
)
def test_variants_are_those_of_adapt(folder, capsys, asked, config, given):
    assert finetune("--steps", "3", *asked) == 0
    saved = json.loads(Path("a/adapter_config.json").read_text())
    assert {name: saved[name] for name in config} == config
    X, Y, *held_out = windows([LETTERS.index(c) for c in TEXT], 8)
    rng = np.random.default_rng(0)
    adapted = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=rng, **given)
    given = {"lr": 0.02, "loss": cross_entropy, "gradients": accumulate(2), "batches": Passes(len(X), 4, 0)}
    train(adapted, X, Y, epochs=3, steps=1, rng=rng, **given)
    ours = attach(Llama.load("model"), load_adapter("a"))
    assert evaluate(ours, *held_out, cross_entropy) == pytest.approx(
        evaluate(adapted, *held_out, cross_entropy), rel=1e-4
    )


def test_dropout_is_in_the_steps_and_in_the_adapters_configuration(folder, capsys):
    assert finetune("--steps", "5", "--dropout", "0.25") == 0
    before = losses(capsys.readouterr().out)[0]
    assert_saved(trained(5, dropout=0.25))
    assert json.loads(Path("a/adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert finetune("--steps", "5") == 0
    assert losses(capsys.readouterr().out)[0] == before  # measured without


def test_clipping_and_weight_decay_are_those_of_train(folder):
    assert finetune("--steps", "5", "--max-grad-norm", "0.5", "--weight-decay", "0.3") == 0
    assert_saved(trained(5, max_grad_norm=0.5, weight_decay=0.3))


@pytest.mark.parametrize("option", ["--max-grad-norm", "--weight-decay"])
def test_a_bound_or_a_decay_out_of_range_is_refused(folder, capsys, monkeypatch, option):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert finetune(option, "-1") == 2
    assert f"{option[2:].replace('-', '_')} must be a" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--micro-batch", "30", "--workers", "3"],
        ["--dropout", "0.3", "--target-modules", "q_proj,down_proj"],
        ["--use-dora", "--quantize", "nf4"],
    ],
)
def test_recomputing_writes_the_same_adapter_with_less_memory(folder, capsys, monkeypatch, more):
    Path("e.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n{"text": "on the mat"}\n' * 60)
    write_folder(Path("deep"), tiny_llama(blocks=6))
    few = ["--model", "deep", "--steps", "3", "--batch-size", "100", "--rank", "2", *more]
    again, right = [], RecomputedBlock.backward
    monkeypatch.setattr(RecomputedBlock, "backward", lambda *a, **k: again.append(a) or right(*a, **k))
    found, needed = [], []
    for name, lean in {"a": [], "b": ["--recompute"]}.items():
        before = len(again)
        assert run("finetune", "e.jsonl", "--save", name, *few, *lean, "--log", f"{name}.jsonl") == 0
        needed.append(float(re.search(r"memory +([\d.]+) MB of activations", capsys.readouterr().out)[1]))
        found.append((weights(name), Path(f"{name}.jsonl").read_text()))
    assert found[0] == found[1]
    assert 0 < needed[1] < 0.8 * needed[0]
    assert before == 0 < len(again)


def test_an_adapted_head_has_masks_for_every_position(folder):
    lines = [{"prompt": "the cat ", "completion": "sat on the mat"[: 1 + i]} for i in range(12)]
    Path("e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    some = ["--steps", "2", "--batch-size", "3", "--rank", "2", "--target-modules", "q_proj,lm_head"]
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *some, "--dropout", "0.3") == 0
    assert "lm_head" in load_adapter("a")


def test_any_number_of_workers_writes_the_same_adapter(folder):
    found = set()
    for workers in ("1", "2", "5"):
        some = ["--batch-size", "5", "--micro-batch", "1", "--steps", "3", "--dropout", "0.3"]
        assert finetune("--workers", workers, *some) == 0
        found.add(weights())
    assert len(found) == 1


@pytest.mark.long
def test_a_base_in_four_bits_is_finetuned_and_speaks(folder, capsys):
    base = quantize(Llama.load("model"))
    assert finetune("--quantize", "nf4") == 0
    out = capsys.readouterr().out
    size, kept = parameter_count(Llama.load("model")), parameter_bytes(base)
    assert f"model    model: {size:,} parameters in float32" in out
    assert f"weights  {kept / 1e6:.1f} MB with quantised linear layers, {4 * size / 1e6:.1f} MB without" in out
    held_out = windows([LETTERS.index(c) for c in TEXT], 8)[2:]
    assert losses(out)[0] == pytest.approx(evaluate(base, *held_out, cross_entropy), abs=6e-4)
    adapted = attach(base, load_adapter("a"))
    assert losses(out)[30] == pytest.approx(evaluate(adapted, *held_out, cross_entropy), abs=6e-4)
    assert (
        run("generate", "the cat", "--model", "model", "--adapter", "a", "--quantize", "nf4", "--temperature", "0") == 0
    )
    said = capsys.readouterr().out
    prompt = [LETTERS.index(c) for c in "the cat"]
    expected = [*generate(adapted, prompt, 100, end=[LETTERS.index(".")])]
    assert said == "the cat" + "".join(LETTERS[i] for i in expected) + "\n"


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        ("q_proj", ["q_proj"]),
        ("up_proj, model.layers.1.self_attn.o_proj", ["up_proj", "layers.1.self_attn.o_proj"]),
        (r".*layers\.0\..*(k|v)_proj", ["layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"]),
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_target_modules_are_names_or_a_regular_expression(folder, asked, targets):
    assert finetune("--steps", "1", "--target-modules", asked) == 0
    expected = adapt(tiny_llama(), targets, rank=1, alpha=1, rng=np.random.default_rng(0))
    assert load_adapter("a").keys() == adapters(expected).keys()


def test_what_is_left_open_follows_the_models_size_and_the_data():
    assert fitting(852_608) == fitting(SMALL) == {"steps": 300, "batch_size": 16, "lr": 3e-3}
    assert fitting(134_515_008) == fitting(SMALL + 1) == {"steps": 80, "batch_size": 4, "lr": 1e-3}
    recipe = replace(Recipe(text=Path("t"), save=Path("a")), lr=0.5, batch_size=4, workers=1).settled(SMALL)
    assert (recipe.lr, recipe.batch_size, recipe.steps, recipe.for_rows(228).steps) == (0.5, 4, 300, 300)
    assert [replace(recipe, epochs=e).for_rows(228).steps for e in (1, 0.1, 0.001)] == [57, 6, 1]
    parts = [replace(recipe, micro_batch=n).part_rows for n in (None, 1, 3, 199)]
    assert parts == [2, 1, 3, 4]  # half of a batch, and never more than it has


# --- the adapter to go on from, and the one that is written ---


GO_ON = ["finetune", "text", "--save", "b", "--model", "model", "--adapter", "a"]


SIZES = ["--steps", "4", "--batch-size", "4", "--length", "8", "--lr", "0.02"]


def test_a_training_goes_on_from_an_adapter(folder, capsys):
    assert finetune("--use-rslora", "--target-modules", "q_proj,down_proj") == 0
    end = losses(capsys.readouterr().out)[30]
    before = weights()
    assert run(*GO_ON, *SIZES) == 0
    out = capsys.readouterr().out
    assert losses(out)[0] == pytest.approx(end, abs=2e-3)
    assert "adapter  rank 2 beside 4 layers" in out
    first, second = load_adapter("a"), load_adapter("b")
    assert first.keys() == second.keys()
    assert all(second[path].scaling == adapter.scaling for path, adapter in first.items())
    assert all((second[path].lora_A != adapter.lora_A).any() for path, adapter in first.items())
    assert weights() == before


def test_an_adapter_goes_on_in_the_dtype_of_the_training(folder):
    assert finetune("--steps", "1") == 0
    assert run(*GO_ON, *SIZES, "--dtype", "float64") == 0
    assert {str(adapter.lora_A.dtype) for adapter in load_adapter("b").values()} == {"float64"}


def test_ranks_that_differ_stay_as_they_are(folder):
    model, rng = Llama.load("model"), np.random.default_rng(0)
    wide = adapters(adapt(model, ["q_proj"], rank=3, alpha=5, rng=rng))
    narrow = adapters(adapt(model, ["v_proj"], rank=1, alpha=2, rng=rng))
    save_adapter("a", wide | narrow)
    assert run(*GO_ON, *SIZES) == 0
    saved = load_adapter("b")
    assert {adapter.rank for path, adapter in saved.items() if path.endswith("q_proj")} == {3}
    assert {(adapter.rank, adapter.alpha) for path, adapter in saved.items() if path.endswith("v_proj")} == {(1, 2.0)}


def test_an_adapter_that_cannot_be_read_is_refused_before_the_model_is(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run(*GO_ON, *SIZES) == 2
    assert "'a" in capsys.readouterr().err


def test_dropout_before_a_dora_is_refused(folder, capsys):
    assert finetune("--steps", "1", "--use-dora") == 0
    assert run(*GO_ON, *SIZES, "--dropout", "0.1") == 2
    assert "which is a DoRA's" in capsys.readouterr().err


def test_a_finetuned_adapter_names_its_base(folder, capsys):
    assert run("finetune", "text", "--save", "a", "--model", "model", *TWO) == 0
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_folder_that_holds_an_adapter_is_not_replaced_unless_it_may_be(folder, capsys, monkeypatch):
    some = ["finetune", "text", "--save", "a", "--model", "model", *TWO]
    assert run(*some, "--checkpoint", "c") == 0
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("minilora.language.text.open_regular", lambda path: pytest.fail("something is read"))
        assert run(*some) == 2
        assert run(*some, "--checkpoint", "new") == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "minilora: save 'a' holds an adapter: name another folder, or say --overwrite\n" * 2)
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before
    assert run(*some, "--checkpoint", "c", "--steps", "3") == 0
    gone_on = Path("a/adapter_model.safetensors").read_bytes()
    assert gone_on not in before.values()
    assert run(*some, "--overwrite") == 0
    assert Path("a/adapter_model.safetensors").read_bytes() in before.values()


@pytest.mark.long
def test_the_step_of_the_least_held_out_loss_is_saved(folder, capsys):
    some = overfitting()
    assert finetune(*some, "--keep-best") == 0
    out = capsys.readouterr().out
    shown = losses(out)
    best = min(shown, key=shown.get)
    assert 0 < best < 61
    assert f"the adapter is that of step {best}, the one with the least held-out loss: {shown[best]:.3f}" in out
    kept = weights()
    assert finetune(*some, "--steps", str(best)) == 0
    assert weights() == kept
    assert finetune(*some) == 0
    assert weights() != kept


def test_the_step_before_the_first_is_never_the_best(folder, capsys, monkeypatch):
    measured = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(Step, "evaluate", lambda *a: next(measured))
    assert finetune("--steps", "21", "--keep-best") == 0
    out = capsys.readouterr().out
    assert (
        "the adapter is that of step 20, the one with the least held-out loss: 2.000; before the training it was 1.000"
        in out
    )


@pytest.mark.parametrize(
    ("losses", "asked", "said"),
    [
        ([5.0, 4.0, 4.5], {}, "lowest at step 20: 4.000; the same command with --steps 20 ends there"),
        ([5.0, 6.0, 5.5], {}, "lowest at step 0: 5.000, before the training"),
        ([5.0, 4.0, 3.0], {}, ""),
        ([5.0, 4.0004, 4.0], {}, ""),
        ([5.0, 4.0, 4.0004], {}, ""),  # as printed, they are the same
        ([5.0, 4.0004, 4.0, 4.5], {}, "lowest at step 20: 4.000; the same command with --steps 20 ends there"),
        ([5.0, 4.0, 4.5], {"epochs": 2.0}, "with --steps 20 in place of --epochs ends there"),
        ([5.0, 4.0, 4.5], {"overwrite": False}, "with --steps 20 and --overwrite ends there"),
        ([5.0, 4.0, 4.5], {"checkpoint": "c"}, "with --steps 20 and another --checkpoint ends there"),
    ],
)
def test_the_best_step_is_named_unless_it_is_last(losses, asked, said):
    """By a command that runs: the folder holds an adapter then, and steps beside epochs are refused."""
    table = LossTable(40, 0, 8)
    table.rows = [(20 * i, math.nan, loss) for i, loss in enumerate(losses)]
    found = best_step(SimpleNamespace(**{"checkpoint": None, "epochs": None, "overwrite": True} | asked), table)
    assert found.endswith(said)
    assert bool(found) == bool(said)


# --- what is printed, and when ---


class File(io.StringIO):
    """A stdout that is a file: what has been flushed can be read."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_what_is_loaded_is_said_before_it_is(folder, monkeypatch):
    file = File()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail(file.seen))
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(pytest.fail.Exception, match=r"^model    model$"):
        finetune()


def test_the_first_loss_is_seen_before_the_training(folder, monkeypatch):
    monkeypatch.setattr("minilora.language.finetune.train", lambda *a, **k: seen.append(sys.stdout.seen) or History())
    monkeypatch.setattr(sys, "stdout", File())
    seen = []
    assert run("finetune", "text", "--save", "a", "--model", "model", *TWO) == 0
    assert re.fullmatch(r"   0 +\d\.\d{3}", seen[0].splitlines()[-1])


def test_names_that_the_user_gives_cannot_steer_the_terminal(folder, capsys):
    evil = "\x1b[2J\u202e"
    Path("model").rename(f"{evil}m")
    Path("text").rename(f"{evil}t")
    assert run("finetune", f"{evil}t", "--save", f"{evil}a", "--model", f"{evil}m", *FEW, "--steps", "1") == 0
    out = capsys.readouterr().out
    assert out.count("\\x1b[2J") == 3
    assert out.replace("\n", "").isprintable()


def test_the_figure_has_every_step_also_of_a_training_that_went_on(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("minilora.cli.figures.plot_learning", lambda *a: drawn.append(a) or plot_learning(*a))
    assert finetune("--plot", "p.svg") == 0
    assert finetune("--checkpoint", "c", "--steps", "7") == 0
    assert finetune("--checkpoint", "c", "--plot", "p.svg") == 0
    (table, each), again = drawn
    assert [step for step, _ in each] == [*range(1, 31)]
    assert again[1] == each
    assert np.mean([loss for _, loss in each[:20]]) == pytest.approx(table[1][1], rel=1e-12)
    assert np.mean([loss for _, loss in each[20:]]) == pytest.approx(table[2][1], rel=1e-12)
    figure = plot_learning(table, each)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), each)


@pytest.mark.long
def test_the_log_has_each_step_and_each_measurement(folder, capsys):
    assert finetune("--log", "l.jsonl", "--steps", "23", "--checkpoint", "c") == 0
    shown, lines = (
        rows(capsys.readouterr().out),
        [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()],
    )
    assert [line["step"] for line in lines] == [*range(24)]
    for name in ("training_loss", "grad_norm"):
        assert [name in line for line in lines] == [False, *[True] * 23]
    assert {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line} == pytest.approx(
        {step: held_out for step, _, held_out in shown}, abs=6e-4
    )
    assert finetune("--log", "l.jsonl", "--checkpoint", "c") == 0
    resumed = [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == [*range(31)]
    assert resumed[:23] == lines[:23]
    assert finetune("--log", "whole.jsonl") == 0
    whole = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    for name in ("training_loss", "grad_norm"):
        assert [line.get(name) for line in resumed] == [line.get(name) for line in whole]


# --- what is refused before anything has changed ---


def test_a_text_is_read_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    Path("text").write_bytes(b"\xff")
    assert finetune() == 2
    assert "'utf-8' codec can't decode byte 0xff" in capsys.readouterr().err


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folder, capsys):
    words = json.loads(Path("model/tokenizer.json").read_text())
    words["model"]["vocab"]["t"] = 40
    Path("model/tokenizer.json").write_text(json.dumps(words))
    assert finetune() == 2
    assert "the tokenizer gives ids up to 40, and the model has 29 tokens" in capsys.readouterr().err


def test_an_example_that_is_none_stops_the_finetuning(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    Path("e.jsonl").write_text('{"text": "the cat"}\n{"prompt": "the", "completion": ""}\n')
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *FEW) == 2
    out, err = capsys.readouterr()
    assert out == "model    model\n"
    assert "'e.jsonl': line 2" in err
    assert not Path("a").exists()


def test_all_bad_lines_are_told_and_may_be_left_out(folder, capsys, monkeypatch):
    good = ['{"text": "the cat sat"}'] * 3
    Path("e.jsonl").write_text("\n".join([good[0], "{", '{"text": 3}', *good[1:]]))
    few = ["finetune", "e.jsonl", "--save", "a", "--model", "model", "--steps", "1", "--batch-size", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
        assert run(*few) == 2
    assert capsys.readouterr().err.splitlines() == [
        "minilora: 'e.jsonl': 2 lines cannot be used:",
        "  line 2: Input data was truncated",
        "  line 3: Expected `str`, got `int` - at `$.text`",
    ]
    assert run(*few, "--skip-bad", "bad.jsonl") == 0
    out = capsys.readouterr().out
    assert "skipped  2 lines that cannot be used, now in bad.jsonl\n" in out
    assert "data     e.jsonl: 2 examples and 1 held out" in out
    assert "\n         copies of other examples: 2\n         held out and trained on too: 1 of 1 examples" in out
    assert Path("bad.jsonl").read_text() == '{\n{"text": 3}\n'
    assert run(*few, "--skip-bad", "bad.jsonl", "--save", "c") == 0  # the same lines: as after a stop
    assert "now in bad.jsonl\n" in capsys.readouterr().out
    Path("bad.jsonl").write_text("others")
    for more, said in {
        ("--skip-bad", "bad.jsonl", "--save", "b"): "file of skipped lines 'bad.jsonl' is there already",
        ("--skip-bad", "e.jsonl", "--save", "b"): "the file of skipped lines 'e.jsonl' is the text, expected another",
        ("--skip-bad", "l", "--log", "l", "--save", "b"): "the file of skipped lines 'l' is the log, expected another",
        ("--skip-bad", "b", "--save", "b"): "would lie where the adapter goes",
        ("--valid", "./e.jsonl", "--save", "b"): "is the text to train on, expected another file, or a share",
    }.items():
        assert run(*few, *more) == 2
        assert said in capsys.readouterr().err


def test_a_batch_of_more_than_there_is_is_refused_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert finetune("--batch-size", "229", "--length", "8") == 2
    assert "--batch-size 229 is more than the 228 windows that there are to train on" in capsys.readouterr().err


def test_lines_are_skipped_of_examples_alone(folder, capsys):
    assert finetune("--steps", "1", "--skip-bad", "bad") == 2
    assert capsys.readouterr().err == "minilora: --skip-bad leaves out lines of a .jsonl file, and none is read\n"
    Path("held.jsonl").write_text('{"text": "the cat sat"}\n{')
    assert finetune("--steps", "1", "--skip-bad", "bad", "--valid", "held.jsonl") == 0
    assert Path("bad").read_text() == "{\n"


@pytest.mark.parametrize("option", ["--model", "--checkpoint", "--save"])
def test_links_in_a_circle_are_refused_in_a_line(folder, option, capsys):
    Path("one").symlink_to("other")
    Path("other").symlink_to("one")
    assert finetune(option, "one", "--steps", "1") == 2
    err = capsys.readouterr().err
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", ["--log", pytest.param("--plot", marks=pytest.mark.long)])
def test_the_adapter_to_go_on_from_is_not_replaced_by_an_output(folder, option, capsys):
    pytest.importorskip("matplotlib")
    assert finetune("--steps", "1") == 0
    Path("a/x.svg").touch()
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    assert run(*GO_ON, *SIZES, option, "a/x.svg") == 2
    assert "is a file of the adapter" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


@pytest.mark.parametrize("name", ["link", "hard"])
def test_a_log_in_the_place_of_something_else_is_refused(folder, capsys, name):
    (folder / "held").write_text(TEXT)
    (folder / "link").symlink_to("text")
    (folder / "hard").hardlink_to("text")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert finetune("--log", name, "--checkpoint", "c", "--valid", "held") == 2
    assert "the log" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "expression", ["(.*)*(.*)*(.*)*(.*)*(.*)*x", pytest.param("((a|.)*)*\\1z", marks=pytest.mark.long)]
)
def test_an_expression_that_would_run_for_years_is_refused(folder, expression, capsys, monkeypatch):
    monkeypatch.setattr("minilora.files.patterns.SECONDS", 0.3)
    assert finetune("--target-modules", expression) == 2
    assert "target_modules: matching takes more than 0.3 s" in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_training_that_breaks_down_names_step_and_rate(folder, capsys):
    assert finetune("--lr", "1e30", "--checkpoint", "c") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"minilora: step (\d) left numbers that are not finite: --lr 1e\+30 is too large for this training. "
        r"No adapter is written; c keeps step (\d), and another --lr needs another file",
        said,
    )
    bad, kept = map(int, re.findall(r"step (\d)", said))
    assert read_checkpoint(Path("c")).epoch == kept == bad - 1
    assert not Path("a").exists()


# --- memory and cores ---


def has_memory(monkeypatch, whole, free):
    """Let the machine have so many bytes."""
    monkeypatch.setattr("minilora.language.finetune.machine_memory", lambda backend: Memory(whole, free))


def test_a_longer_file_to_measure_on_is_said_and_counted(folder, capsys):
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    Path("e.jsonl").write_text('{"text": "the cat"}\n' * 8)
    Path("held.jsonl").write_text('{"text": "the cat sat on the mat and the dog"}\n' * 3)
    few = ["--model", "model", "--steps", "1", "--batch-size", "2", "--rank", "1"]
    assert run("finetune", "e.jsonl", "--save", "a", *few) == 0
    assert capsys.readouterr().err == ""
    assert run("finetune", "e.jsonl", "--save", "b", *few, "--valid", "held.jsonl") == 0
    assert "an example has 34 tokens, and the model's context is 20" in capsys.readouterr().err


def test_a_batch_beyond_the_machine_is_refused_with_what_fits(folder, capsys, monkeypatch):
    has_memory(monkeypatch, 2_400_000, 2_300_000)
    large = ["--batch-size", "200", "--checkpoint", "c"]
    assert finetune(*large) == 2
    out, err = capsys.readouterr()
    assert re.search(r"the training needs [\d.]+ MB and the machine has 2.4 MB: --micro-batch \d+ fits", err)
    assert rows(out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    (fitting,) = re.findall(r"--micro-batch \d+", err)
    assert finetune(*large, *fitting.split(), "--steps", "2") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("whole", "hint"), [(5_000_000, r"--micro-batch \d+ or --recompute"), (400_000, "--recompute --micro-batch 1")]
)
def test_what_recomputing_saves_is_said_where_memory_is_short(folder, capsys, monkeypatch, whole, hint):
    has_memory(monkeypatch, whole, whole)
    write_folder(Path("deep"), tiny_llama(blocks=8))
    large = ["--model", "deep", "--batch-size", "30", "--length", "40", "--steps", "1"]
    assert finetune(*large) == 2
    (said,) = re.findall(r": ([^:]*) fits, and takes the same steps", capsys.readouterr().err)
    assert re.fullmatch(hint, said)
    assert finetune(*large, *said[said.index("--recompute") :].split()) == 0
    assert capsys.readouterr().err == ""


def test_a_training_that_a_busy_machine_cannot_hold_is_refused_unless_it_is_to_begin_anyway(
    folder, capsys, monkeypatch
):
    has_memory(monkeypatch, 10**12, 1000)
    assert finetune("--steps", "1") == 2
    out, err = capsys.readouterr()
    assert re.search(
        r"MB that are free: not even --recompute --micro-batch 1 fits; .* needs less; --anyway begins all the same", err
    )
    assert rows(out) == []
    assert sorted(os.listdir()) == ["model", "text"]
    assert finetune("--steps", "1", "--anyway") == 0
    assert "MB that are free: not even --recompute --micro-batch 1 fits" in capsys.readouterr().err
    assert finetune("--steps", "1", "--recompute") == 2
    assert "MB that are free: not even --micro-batch 1 fits" in capsys.readouterr().err


def test_what_is_free_is_read_before_the_process_takes_any(folder, capsys, monkeypatch):
    order, load, forward = [], Llama.load, Llama.forward
    read = "minilora.language.finetune.machine_memory"
    monkeypatch.setattr(read, lambda backend: order.append("memory") or Memory(10**10, 10**10))
    monkeypatch.setattr(Llama, "load", lambda *a, **k: order.append("load") or load(*a, **k))
    monkeypatch.setattr(Llama, "forward", lambda self, *a: order.append("forward") or forward(self, *a))
    assert finetune("--steps", "1") == 0
    assert order[:3] == ["memory", "load", "forward"]
    assert order.count("memory") == 1


def test_the_longest_example_is_cut_to_what_memory_allows(folder, capsys, monkeypatch):
    """Only where no length is named; the line says what is lost, and the length that keeps it."""
    lines = ['{"prompt": "the ", "completion": "cat"}'] * 8 + [
        json.dumps({"prompt": "the ", "completion": "log" * 400})
    ]
    Path("e.jsonl").write_text("\n".join(lines))
    has_memory(monkeypatch, 10**10, 5_000_000)
    few = ["--model", "model", "--steps", "1", "--batch-size", "2"]
    assert run("finetune", "e.jsonl", "--save", "a", *few) == 0
    out, err = capsys.readouterr()
    length, lost = map(
        int, re.search(r"1 are cut after (\d+) tokens: (\d+) more .* --length 1204 keeps all", out).groups()
    )
    assert 100 < length == 1204 - lost
    assert err == ""
    assert run("finetune", "e.jsonl", "--save", "b", *few, "--length", "1204") == 2
    assert "MB that are free" in capsys.readouterr().err


RSS = """
import re, sys
from pathlib import Path
from minilora.cli import main
def peak():  # of this process alone: what getrusage says begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
from minilora.language import finetune as pipeline
from minilora.cli import finetune
import minilora.files.adapters, minilora.language.data, tokenizers
from minilora import Llama
before = peak()
assert main(sys.argv[1:]) == 0
print("grown", peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's peak")
@pytest.mark.parametrize("more", [[], ["--micro-batch", "20"], ["--recompute"]])
def test_the_process_grows_by_the_memory_that_is_said(tmp_path, more):
    pytest.importorskip("glassllm")
    (tmp_path / "text").write_text("The cat sat on the mat. " * 6000)
    sizes = ["--steps", "2", "--batch-size", "100", "--length", "128", *more]
    command = [sys.executable, "-c", RSS, "finetune", "text", "--save", "a", *sizes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    said = float(re.search(r"([\d,.]+) MB together", done.stdout)[1].replace(",", "")) * 1e6
    grown = int(re.search(r"grown (\d+)", done.stdout)[1])
    assert 0.75 * said < grown < 1.35 * said + 60e6  # the tokenizer and libraries besides


def test_a_command_has_one_blas_thread_from_its_start(folder):
    """Set before NumPy is loaded, in this process alone, whatever the environment says."""
    script = """if True:
        import os, sys
        from minilora import cli
        from minilora.cli import finetune, generate
        def tell(options):
            assert "numpy" in sys.modules
            from threadpoolctl import threadpool_info
            print(*(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"))
            return 0
        finetune.run = generate.run = tell
        cli.main(sys.argv[1:])"""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    for command, expected in (
        (["finetune", "text", "--save", "a"], "1"),
        (["generate", "the"], str(min(2, core_count()))),
    ):
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, env=environment)
        assert set(done.stdout.split()) <= {expected}, done.stderr


def test_a_command_in_a_running_program_leaves_the_environment(folder):
    before = dict(os.environ)
    assert finetune("--steps", "1") == 0
    assert dict(os.environ) == before


def test_workers_follow_the_cores_and_the_library(monkeypatch, standin):
    for available, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr("minilora.language.finetune.core_count", lambda available=available: available)
        assert usual_workers(get_backend("numpy")) == expected
        assert usual_workers(standin) == 1


ASKED = Recipe(text=Path("t"), save=Path("s"), batch_size=4, epochs=1.0, workers=1)


def test_steps_parts_and_a_warmup_are_rounded_up():
    settled = ASKED.settled(1)
    assert [settled.for_rows(rows).steps for rows in (4, 5, 7, 8, 9)] == [1, 2, 2, 2, 3]
    assert [replace(settled, batch_size=size).part_rows for size in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert rates(replace(settled, warmup=0.01, schedule="linear"), 30).warmup == 1


BROUGHT = {
    "rank": 4, "alpha": 2.0, "target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"], "use_rslora": True,
    "use_dora": True, "init": "pissa",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BROUGHT.items())
def test_what_an_adapter_brings_is_not_asked_for_again(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"so leave --{name.replace('_', '-')} out"):
        check_recipe(replace(ASKED, adapter=Path("b"), **{name: value}))
