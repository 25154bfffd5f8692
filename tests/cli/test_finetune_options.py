"""``minilora finetune``: its schedule, dropout, the best step, and an adapter to go on from."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import CheckpointError, Llama, adapt, adapters, load_adapter, save_adapter, train
from minilora.fast import accumulate
from minilora.files.checkpoint import read
from minilora.guards import boundedpatterns
from minilora.language import next_token_loss
from minilora.language.data import windows
from minilora.language.finetuning.losstable import TrainingLoss
from minilora.language.finetuning.stopped import LATER, Stopped, check_same
from minilora.language.finetuning.withdropout import WithDropout
from minilora.optim import Adam
from minilora.schedule import Schedule

from ..support.command_line import finetune, losses, overfitting, rows, run
from ..support.language import LETTERS, TEXT

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")

IDS = [LETTERS.index(c) for c in TEXT]


def weights(name="a"):
    return Path(name, "adapter_model.safetensors").read_bytes()


def trained(steps, dropout=0.0, schedule=None):
    """Train as the command does, through the library alone."""
    X, Y, *_ = windows(IDS, 8)
    rng = np.random.default_rng(0)
    model = adapt(Llama.load("model"), "all-linear", rank=2, alpha=16, rng=rng)
    gradients = accumulate(2)
    gradients = WithDropout(gradients, dropout, rng) if dropout else gradients
    options = {"epochs": steps, "steps": 1, "batch_size": 4, "lr": 0.02, "rng": rng, "loss": next_token_loss}
    train(model, X, Y, gradients=gradients, schedule=schedule, **options)
    return adapters(model)


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


def test_dropout_is_in_the_steps_and_in_the_adapters_configuration(folder, capsys):
    assert finetune("--steps", "5", "--dropout", "0.25") == 0
    before = losses(capsys.readouterr().out)[0]
    assert_saved(trained(5, dropout=0.25))
    assert json.loads(Path("a/adapter_config.json").read_text())["lora_dropout"] == 0.25
    assert finetune("--steps", "5") == 0
    assert losses(capsys.readouterr().out)[0] == before  # measured without


@pytest.mark.long
def test_the_masks_do_not_depend_on_workers(folder):
    assert finetune("--steps", "4", "--dropout", "0.3", "--workers", "1") == 0
    one = weights()
    assert finetune("--steps", "4", "--dropout", "0.3", "--workers", "2") == 0
    assert weights() == one


@pytest.mark.long
def test_the_masks_do_not_depend_on_the_micro_batch(folder):
    wide = ["--steps", "4", "--dropout", "0.3", "--dtype", "float64"]
    assert finetune(*wide, "--micro-batch", "1") == 0
    one = load_adapter("a")
    assert finetune(*wide, "--micro-batch", "4") == 0
    for path, adapter in load_adapter("a").items():
        np.testing.assert_allclose(adapter.delta(), one[path].delta(), atol=1e-9)


def test_an_adapted_head_has_masks_for_every_position(folder):
    lines = [{"prompt": "the cat ", "completion": "sat on the mat"[: 1 + i]} for i in range(12)]
    Path("e.jsonl").write_text("\n".join(map(json.dumps, lines)))
    some = ["--steps", "2", "--batch-size", "3", "--rank", "2", "--target-modules", "q_proj,lm_head"]
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *some, "--dropout", "0.3") == 0
    assert "lm_head" in load_adapter("a")


GOING_ON = ["--schedule", "cosine", "--warmup", "0.1", "--dropout", "0.2", "--keep-best", "--lr", "0.3", "--seed", "1"]


def test_a_training_with_all_of_them_goes_on_to_the_same_bits(folder, capsys, monkeypatch):
    some = ["--steps", "24", *GOING_ON]
    assert finetune(*some) == 0
    whole, shown = weights(), rows(capsys.readouterr().out)
    right = Adam.step

    def pressed(self, grads):
        if self.t == 22:
            raise KeyboardInterrupt
        right(self, grads)

    with monkeypatch.context() as patched:
        patched.setattr(Adam, "step", pressed)
        assert finetune(*some, "--checkpoint", "c") == 130
    capsys.readouterr()
    assert read(Path("c")).epoch == 22
    assert finetune(*some, "--checkpoint", "c") == 0
    assert rows(capsys.readouterr().out) == shown
    assert weights() == whole


def test_another_schedule_is_another_training(folder, capsys, monkeypatch):
    some = ["--steps", "6", *GOING_ON, "--checkpoint", "c"]
    assert finetune(*some) == 0
    before = Path("c").read_bytes()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    for change, message in (
        (["--schedule", "linear"], "--schedule is cosine there and linear here"),
        (["--warmup", "3"], "--warmup is 0.1 there and 3 here"),
        (["--dropout", "0.3"], "--dropout is 0.2 there and 0.3 here"),
        (["--steps", "8"], "--steps, on which the rates depend, is 6 there and 8 here"),
    ):
        assert finetune(*some, *change) == 2
        assert message in capsys.readouterr().err
        assert Path("c").read_bytes() == before


@pytest.mark.long
def test_more_steps_are_another_training_where_the_warmup_is_a_share(folder, capsys):
    assert finetune("--steps", "4", "--warmup", "0.25", "--checkpoint", "c") == 0
    assert finetune("--steps", "8", "--warmup", "0.25", "--checkpoint", "c") == 2
    assert "--steps, on which the rates depend, is 4 there and 8 here" in capsys.readouterr().err
    assert finetune("--steps", "4", "--warmup", "2", "--checkpoint", "d") == 0
    assert finetune("--steps", "8", "--warmup", "2", "--checkpoint", "d") == 0
    resumed = weights()
    assert finetune("--steps", "8", "--warmup", "2") == 0
    assert weights() == resumed


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("--keep-best", True, "--keep-best is False there and True here"),
        ("--dropout", 0.1, "--dropout is 0 there and 0.1 here"),
        ("--schedule", "linear", "--schedule is constant there and linear here"),
        ("--use-dora", True, "--use-dora is False there and True here"),
    ],
)
def test_a_checkpoint_of_before_an_option_was_trained_without_it(name, value, said):
    before = {"--rank": 8}
    with pytest.raises(CheckpointError, match=said):
        check_same(Path("c"), Stopped(SimpleNamespace(epoch=0), before), {"--rank": 8, name: value}, None)
    check_same(Path("c"), Stopped(SimpleNamespace(epoch=0), before), {"--rank": 8, name: LATER[name]}, None)
    check_same(Path("c"), Stopped(SimpleNamespace(epoch=0), {}), {name: value}, None)  # one without notes


def test_a_training_that_did_not_keep_the_best_step_does_not_begin_to(folder, capsys):
    assert finetune("--steps", "2", "--checkpoint", "c") == 0
    assert finetune("--steps", "4", "--checkpoint", "c", "--keep-best") == 2
    assert "--keep-best is False there and True here" in capsys.readouterr().err


@pytest.mark.long
def test_the_usual_share_that_is_held_out_may_be_said_or_not(folder):
    assert finetune("--steps", "2", "--checkpoint", "c") == 0
    assert finetune("--steps", "3", "--checkpoint", "c", "--valid", "0.1") == 0


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
    monkeypatch.setattr(TrainingLoss, "evaluate", lambda *a: next(measured))
    assert finetune("--steps", "21", "--keep-best") == 0
    out = capsys.readouterr().out
    assert (
        "the adapter is that of step 20, the one with the least held-out loss: 2.000; before the training it was 1.000"
        in out
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--warmup", "1.5"], "'1.5' is neither a number of steps nor a share below 1"),
        (["--warmup", "-1"], "'-1' is neither a number of steps nor a share below 1"),
        (["--warmup", "30"], "warmup is 30 of 30 steps, expected fewer"),
        (["--schedule", "step"], "invalid choice: 'step'"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1, got 1.0"),
        (["--dropout", "0.1", "--use-dora"], "--dropout takes no --use-dora"),
        (["--dropout", "0.1", "--target-parameters", "x"], "--dropout takes no --target-parameters"),
        (["--target-parameters", "x", "--use-dora"], "--target-parameters takes no --use-dora, as in PEFT"),
        (["--target-parameters", "x", "--init", "pissa"], "--target-parameters takes no --init pissa, as in PEFT"),
        (["--adapter", "b"], "--adapter brings what it is with it, so leave --rank out"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_read(folder, asked, message, capsys, monkeypatch):
    monkeypatch.setattr(
        "minilora.language.finetuning.session.load_data", lambda *a, **k: pytest.fail("the data are read")
    )
    assert finetune(*asked) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text"]


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


@pytest.mark.long
def test_it_goes_on_from_a_checkpoint_and_only_from_that_adapter(folder, capsys, monkeypatch):
    assert finetune() == 0
    assert run(*GO_ON, *SIZES[2:], "--steps", "9") == 0
    whole = weights("b")
    assert run(*GO_ON, "--overwrite", *SIZES, "--checkpoint", "c") == 0
    assert run(*GO_ON, *SIZES[2:], "--steps", "9", "--checkpoint", "c") == 0
    assert weights("b") == whole
    assert finetune("--seed", "3") == 0
    capsys.readouterr()
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run(*GO_ON, *SIZES[2:], "--steps", "9", "--checkpoint", "c") == 2
    assert "the adapter to go on from is another" in capsys.readouterr().err


def test_what_the_adapter_brings_is_not_asked_for(folder, capsys):
    assert finetune("--steps", "1") == 0
    capsys.readouterr()
    brought = (["--rank", "2"], ["--alpha", "16"], ["--target-modules", "q_proj"], ["--use-dora"], ["--init", "pissa"])
    for asked in brought:
        assert run(*GO_ON, *SIZES, *asked) == 2
        assert f"--adapter brings what it is with it, so leave {asked[0]} out" in capsys.readouterr().err
    assert not Path("b").exists()


def test_an_adapter_that_cannot_be_read_is_refused_before_the_model_is(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run(*GO_ON, *SIZES) == 2
    assert "'a" in capsys.readouterr().err


def test_dropout_before_a_dora_is_refused_before_the_model_is_read(folder, capsys, monkeypatch):
    assert finetune("--steps", "1", "--use-dora") == 0
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    assert run(*GO_ON, *SIZES, "--dropout", "0.1") == 2
    assert "which is a DoRA's" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--log", pytest.param("--plot", marks=pytest.mark.long)])
def test_the_adapter_to_go_on_from_is_not_replaced_by_an_output(folder, option, capsys):
    pytest.importorskip("matplotlib")
    assert finetune("--steps", "1") == 0
    Path("a/x.svg").touch()
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    assert run(*GO_ON, *SIZES, option, "a/x.svg") == 2
    assert "is a file of the adapter" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


@pytest.mark.parametrize(
    "expression", ["(.*)*(.*)*(.*)*(.*)*(.*)*x", pytest.param("((a|.)*)*\\1z", marks=pytest.mark.long)]
)
def test_an_expression_that_would_run_for_years_is_refused(folder, expression, capsys, monkeypatch):
    monkeypatch.setattr(boundedpatterns, "MATCHING_SECONDS", 0.3)
    assert finetune("--target-modules", expression) == 2
    assert "target_modules: matching takes more than 0.3 s" in capsys.readouterr().err
    assert not Path("a").exists()
