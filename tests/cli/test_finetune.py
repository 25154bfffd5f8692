"""``minilora finetune``."""

import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
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
    cli,
    cross_entropy,
    evaluate,
    load_adapter,
    quantize,
    train,
)
from minilora.cli.finetune import _best
from minilora.fast import accumulate
from minilora.figures import plot_learning
from minilora.files.checkpoint import read
from minilora.files.tensors import TensorFile
from minilora.language.data import load_data, windows
from minilora.language.finetuning.losstable import LOG_EVERY, Table, TrainingLoss
from minilora.language.generation import generate
from minilora.language.trainingmemory import cache_bytes, parameter_bytes
from minilora.layer import parameter_count
from minilora.training import backpropagate

from ..support.command_line import FEW, finetune, losses, overfitting, rows, run
from ..support.language import LETTERS, TEXT, arrays_of, tiny_llama

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


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


def test_a_text_is_read_before_the_model_is_loaded(folder, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "load", lambda *a, **k: pytest.fail("the model is loaded"))
    Path("text").write_bytes(b"\xff")
    assert finetune() == 2
    assert "not a text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [5.0, 4.0, 4.5],
            "the held-out loss was lowest at step 20: 4.000; the same command with --steps 20 ends there",
        ),
        ([5.0, 6.0, 5.5], "the held-out loss was lowest at step 0: 5.000, before the training"),
        ([5.0, 4.0, 3.0], ""),
        ([5.0, 4.0004, 4.0], ""),
        ([5.0, 4.0, 4.0004], ""),  # as printed, they are the same
    ],
)
def test_the_best_step_is_named_unless_it_is_last(losses, said):
    table = Table(40, 0, 8, TrainingLoss(backpropagate), 0.0)
    table.rows = [(20 * i, math.nan, loss) for i, loss in enumerate(losses)]
    assert _best(SimpleNamespace(checkpoint=None, epochs=None, overwrite=True), table) == said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"epochs": 2.0}, "with --steps 20 in place of --epochs ends there"),
        ({"overwrite": False}, "with --steps 20 and --overwrite ends there"),
        ({"checkpoint": Path("c")}, "with --steps 20 and another --checkpoint ends there"),
    ],
)
def test_the_command_that_ends_at_the_best_step_is_one_that_runs(asked, said):
    """Steps beside epochs are refused, and so is a folder that holds an adapter: it does after the first training."""
    table = Table(40, 0, 8, TrainingLoss(backpropagate), 0.0)
    table.rows = [(0, math.nan, 5.0), (20, 4.0, 4.0), (40, 3.0, 4.5)]
    recipe = SimpleNamespace(**{"checkpoint": None, "epochs": None, "overwrite": True} | asked)
    assert _best(recipe, table).endswith(said)


@pytest.mark.long
@pytest.mark.parametrize("kept", [[], ["--checkpoint", "c"]])
def test_the_steps_that_were_best_end_with_their_adapter(folder, capsys, kept):
    worse = [*overfitting(), "--dtype", "float64"]
    assert finetune(*worse, *kept) == 0
    out = capsys.readouterr().out
    ((best, another),) = re.findall(r"lowest at step (\d+): .* with --steps \1( and another --checkpoint)? ends", out)
    assert bool(another) == bool(kept)
    assert finetune(*worse, "--steps", best, *(["--checkpoint", "another"] if kept else [])) == 0
    assert rows(capsys.readouterr().out)[-1][2] == min(held_out for *_, held_out in rows(out))


def test_a_training_that_breaks_down_names_step_and_rate(folder, capsys):
    assert finetune("--lr", "1e30", "--checkpoint", "c") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"minilora: step (\d) left numbers that are not finite: --lr 1e\+30 is too large for this training. "
        r"No adapter is written; c keeps step (\d), and another --lr needs another file",
        said,
    )
    bad, kept = map(int, re.findall(r"step (\d)", said))
    assert read(Path("c")).epoch == kept == bad - 1
    assert not Path("a").exists()


ROOT = Path(__file__).parents[2]


def test_finetuning_is_adapt_and_train(folder, capsys):
    assert finetune("--seed", "5") == 0
    out, err = capsys.readouterr()
    model = Llama.load("model")
    X, Y, *held_out = windows([LETTERS.index(c) for c in TEXT], 8)
    rng = np.random.default_rng(5)
    adapted = adapt(model, "all-linear", rank=2, alpha=16, rng=rng)
    before = evaluate(adapted, *held_out, cross_entropy)
    given = {"epochs": 30, "steps": 1, "batch_size": 4, "lr": 0.02, "log_every": LOG_EVERY, "rng": rng}
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


def test_finetuning_says_what_it_works_on(folder, capsys):
    assert finetune("--target-modules", "q_proj,v_proj", "--micro-batch", "1", "--workers", "3") == 0
    out = capsys.readouterr().out
    size = sum(a.size for a in arrays_of(tiny_llama()).values())
    assert f"model    model: {size:,} parameters in float32, CPU" in out
    assert f"text     text: {len(TEXT):,} tokens, 228 windows of 8" in out
    assert "adapter  rank 2 beside 4 layers: 192 parameters" in out
    X, *_ = windows([LETTERS.index(c) for c in TEXT], 8)
    adapted = adapt(Llama.load("model"), ["q_proj", "v_proj"], rank=2, alpha=16, rng=np.random.default_rng(0))
    size = cache_bytes(adapted.forward(X[:3])[1])
    assert f"memory   {size / 1e6:,.1f} MB of activations for the backward of 3 x 1 windows at a time" in out
    assert "adapter written to a" in out


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


@pytest.mark.long
def test_a_checkpoint_over_four_bits_goes_on_over_those_alone(folder, capsys):
    four = ["--quantize", "nf4", "--checkpoint", "c"]
    assert finetune(*four, "--steps", "4") == 0
    assert finetune("--checkpoint", "c") == 2
    assert "is a checkpoint of another configuration" in capsys.readouterr().err
    assert finetune(*four) == 0
    stopped = load_adapter("a")
    assert finetune("--quantize", "nf4") == 0
    for path, adapter in load_adapter("a").items():
        np.testing.assert_array_equal(stopped[path].delta(), adapter.delta())


def test_blocks_of_a_file_are_kept_where_there_are_any(folder, capsys):
    for command in (["finetune", "text", "--save", "a", *FEW], ["generate", "the"]):
        assert run(*command, "--model", "model", "--quantize", "file") == 2
        assert "keeps the blocks of a .gguf file, and the model is model" in capsys.readouterr().err
    assert not (folder / "a").exists()


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


@pytest.mark.long
def test_micro_batches_change_the_memory_alone(folder, capsys):
    found = []
    for more in (
        ["--workers", "2"],
        ["--micro-batch", "1", "--workers", "1"],
        ["--micro-batch", "30"],
        ["--micro-batch", "199"],
    ):
        assert finetune("--dtype", "float64", "--steps", "3", "--batch-size", "100", *more) == 0
        memory = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
        found.append((float(memory.split()[1]), {path: a.delta() for path, a in load_adapter("a").items()}))
    assert found[1][0] <= 0.3 * found[0][0]
    assert found[3][0] == found[0][0]  # no more windows at a time than a batch has
    for _, deltas in found:
        for path, delta in deltas.items():
            np.testing.assert_allclose(delta, found[0][1][path], atol=1e-6)


BAD = [
    (["--workers", "0"], "workers must be at least 1, got 0"),
    (["--rank", "0"], "rank must be at least 1, got 0"),
    (
        ["--batch-size", "229"],
        "--batch-size 229 is more than the 228 windows that there are to train on at --length",
    ),
    (["--length", "1020"], "the text has 2040 tokens, expected at least 2041: two windows of 1020"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--target-modules", "query"], "target_modules=['query'] names no layer"),
    (["--target-modules", "(q|v"], "target_modules='(q|v' is not a regular expression: missing ), unterminated"),
    (["--target-modules", ""], "target_modules='' names no layer"),
    (["--save", "text"], "/text' is a file, expected a folder"),
    (["--checkpoint", "model"], "the checkpoint 'model' is a folder, expected a file or a new name"),
    (["--plot", "no/such/folder/x.png"], "there is no folder 'no/such/folder'"),
    (["--checkpoint", "model/config.json"], "the checkpoint cannot be read: 'model/config.json'"),
    (["--model", "nowhere"], "'nowhere': No such file or directory"),
    (["--model", "text"], "expected a folder with config.json, a .gguf file or a .npz file"),
    (["--save", ""], "argument --save: the name is empty"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_bad_argument_is_refused_before_the_training(folder, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("minilora.optim.Adam.step", lambda *a: pytest.fail("training began"))
    assert finetune(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(os.listdir()) == ["model", "text"]


@pytest.mark.parametrize("option", ["--model", "--checkpoint", "--save"])
def test_links_in_a_circle_are_refused_in_a_line(folder, option, capsys):
    Path("one").symlink_to("other")
    Path("other").symlink_to("one")
    assert finetune(option, "one", "--steps", "1") == 2
    err = capsys.readouterr().err
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("text", "message"), [(b"\xff", "not a text in UTF-8"), (b"the cat", "the text has 7 tokens")])
def test_a_text_that_cannot_be_trained_on_is_refused(folder, text, message, capsys):
    Path("text").write_bytes(text)
    assert finetune() == 2
    assert message in capsys.readouterr().err
    assert not Path("a").exists()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folder, capsys):
    words = json.loads(Path("model/tokenizer.json").read_text())
    words["model"]["vocab"]["t"] = 40
    Path("model/tokenizer.json").write_text(json.dumps(words))
    assert finetune() == 2
    assert "the tokenizer gives ids up to 40, and the model has 29 tokens" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_finetuning_that_was_stopped_goes_on_bit_for_bit(folder, how):
    arguments = ["--steps", "50", "--checkpoint", "c"]
    command = [
        sys.executable,
        "-m",
        "minilora",
        "finetune",
        "text",
        "--model",
        "model",
        "--save",
        "a",
        *FEW,
        *arguments,
    ]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where this process ignores it
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, preexec_fn=heard) as first:
        while not Path("c").exists() and first.poll() is None:
            time.sleep(0.002)
        time.sleep(0.03)  # some steps
        first.send_signal(how)
        assert first.wait() in (-signal.SIGKILL, 130)
    assert not Path("a").exists()
    assert finetune(*arguments) == 0
    resumed = Path("a", "adapter_model.safetensors").read_bytes()
    assert finetune(*arguments[:2]) == 0
    assert Path("a", "adapter_model.safetensors").read_bytes() == resumed


TEMPLATE = """{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{{ m.role[0] }} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"""


EXAMPLES = [
    *({"prompt": f"the cat {x} ", "completion": "sat"} for x in "abcdefghij"),
    *({"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": "mat"}]} for x in "klmnopqrst"),
    {"text": "the dog sat on the log"},
]


@pytest.fixture
def examples(folder):
    """A model with a chat template, and examples of all three kinds."""
    pytest.importorskip("jinja2", reason="pip install -e '.[models]'")
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    Path("e.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))


def test_finetuning_takes_examples_of_three_kinds(examples, capsys):
    few = ["--steps", "30", "--batch-size", "4", "--length", "24", "--rank", "2", "--lr", "0.02"]
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *few) == 0
    out = capsys.readouterr().out
    assert "data     e.jsonl: 18 examples and 3 held out, 102 of 263 tokens count" in out
    assert "example  line 2, 14 tokens; the 4 behind a | count:\n    the cat b \n  | sat.\n" in out
    assert losses(out)[30] < losses(out)[0] - 0.3
    data = load_data("e.jsonl", "model", 24)
    expected = evaluate(Llama.load("model"), data.X_held, data.Y_held, cross_entropy)
    assert losses(out)[0] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "the", "completion": ""}, "'e.jsonl': line 22: its completion is empty"),
        (
            {"messages": [{"role": "system", "content": "a"}, *EXAMPLES[10]["messages"]]},
            "TemplateError: no system here",
        ),
        ({"question": "the"}, "'e.jsonl': line 22: its keys are ['question']"),
    ],
)
def test_an_example_that_is_none_stops_the_finetuning(examples, line, message, capsys):
    Path("e.jsonl").write_text("\n".join(map(json.dumps, [*EXAMPLES, line])))
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *FEW) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == "model    model\n"
    assert not Path("a").exists()


def test_names_that_the_user_gives_cannot_steer_the_terminal(folder, capsys):
    evil = "\x1b[2J\u202e"
    Path("model").rename(f"{evil}m")
    Path("text").rename(f"{evil}t")
    assert run("finetune", f"{evil}t", "--save", f"{evil}a", "--model", f"{evil}m", *FEW, "--steps", "1") == 0
    out = capsys.readouterr().out
    assert out.count("\\x1b[2J") == 3
    assert out.replace("\n", "").isprintable()


TWO = ["--steps", "2", "--batch-size", "4", "--length", "8", "--rank", "2"]


class Pipe(io.StringIO):
    """What is printed, and what a reader at the other end has seen of it: all up to the last flush."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_the_first_loss_is_seen_before_the_training(folder, monkeypatch):
    monkeypatch.setattr(
        "minilora.language.finetuning.session.train", lambda *a, **k: seen.append(sys.stdout.seen) or History()
    )
    monkeypatch.setattr(sys, "stdout", Pipe())
    seen = []
    assert run("finetune", "text", "--save", "a", "--model", "model", *TWO) == 0
    assert re.fullmatch(r"   0 +\d\.\d{3}", seen[0].splitlines()[-1])


@pytest.mark.parametrize(("dtype", "name"), [("float64", "F64"), ("float32", "F32")])
def test_finetuning_computes_in_the_dtype_it_says(folder, capsys, dtype, name):
    assert run("finetune", "text", "--save", "a", "--model", "model", *TWO, "--dtype", dtype) == 0
    assert f"parameters in {dtype}" in capsys.readouterr().out
    tensors = TensorFile(folder / "a" / "adapter_model.safetensors").tensors.values()
    assert {spec.dtype for spec in tensors} == {name}


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
        patched.setattr("minilora.language.data.open_regular", lambda path: pytest.fail("something is read"))
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


def test_a_name_that_matches_nothing_is_refused_beside_one_that_does(folder, capsys):
    assert finetune("--target-modules", "q_proj,xx") == 2
    assert "target_modules names 'xx', which is no layer without an adapter" in capsys.readouterr().err
    assert not Path("a").exists()


def test_the_default_rate_is_the_one_in_the_help(folder, capsys):
    found = {}
    for more in ([], ["--lr", "3e-3"], ["--lr", "3e-4"]):
        assert run("finetune", "text", "--save", "a", "--model", "model", "--overwrite", *TWO, *more) == 0
        found[" ".join(more)] = next(iter(load_adapter("a").values())).lora_B
    np.testing.assert_array_equal(found[""], found["--lr 3e-3"])
    assert np.abs(found[""] - found["--lr 3e-4"]).max() > 1e-4


@pytest.mark.parametrize("output", ["text.svg", "c.svg", "v.svg", "l.svg"])
def test_a_figure_never_takes_the_place_of_what_the_training_keeps_or_reads(folder, capsys, output):
    pytest.importorskip("matplotlib", reason="pip install -e '.[plot]'")
    Path("text.svg").write_text("the cat")
    Path("v.svg").write_text("the dog")
    line = ["finetune", "text.svg", "--model", "model", "--save", "s", "--checkpoint", "c.svg", "--plot", output]
    assert cli.main([*line, "--valid", "v.svg", "--log", "l.svg"]) == 2
    names = "the text|the checkpoint|the log|the text to measure the loss on"
    assert re.search(f"plot file .* is ({names}), expected another file", capsys.readouterr().err)
    assert Path("v.svg").read_text() == "the dog"
    assert not Path("c.svg").exists()
    assert Path("text.svg").read_text() == "the cat"


def test_the_figure_has_every_step_also_of_a_training_that_went_on(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("minilora.figures.plot_learning", lambda *a: drawn.append(a) or plot_learning(*a))
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
    assert ["training_loss" in line for line in lines] == [False, *[True] * 23]
    assert {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line} == pytest.approx(
        {step: held_out for step, _, held_out in shown}, abs=6e-4
    )
    assert finetune("--log", "l.jsonl", "--checkpoint", "c") == 0
    resumed = [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()]
    assert [line["step"] for line in resumed] == [*range(31)]
    assert resumed[:23] == lines[:23]
    assert finetune("--log", "whole.jsonl") == 0
    whole = [json.loads(line) for line in Path("whole.jsonl").read_text().splitlines()]
    assert [line.get("training_loss") for line in resumed] == [line.get("training_loss") for line in whole]


@pytest.mark.parametrize(
    "name",
    [*("text", "c", "model", "held", "no/l", "a", "a/adapter_config.json"), "model/tokenizer.json", "link", "hard"],
)
def test_a_log_in_the_place_of_something_else_is_refused(folder, capsys, name):
    (folder / "held").write_text(TEXT)
    (folder / "link").symlink_to("text")
    (folder / "hard").hardlink_to("text")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert finetune("--log", name, "--checkpoint", "c", "--valid", "held") == 2
    assert "the log" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("epochs", "steps"), [("1", 57), ("0.1", 6), ("0.001", 1)])
def test_an_epoch_has_as_many_steps_as_there_are_batches_in_the_text(folder, capsys, epochs, steps):
    size = ["--batch-size", "4", "--length", "8", "--rank", "1"]
    assert run("finetune", "text", "--save", "a", "--model", "model", *size, "--epochs", epochs) == 0
    assert f"time     {steps} steps of 4 windows" in capsys.readouterr().out


def test_fewer_epochs_than_are_done_are_refused_before_the_training(folder, capsys):
    line = ["finetune", "text", "--model", "model", "--save", "a", "--overwrite", *FEW[2:], "--checkpoint", "c"]
    assert run(*line, "--epochs", "0.1") == 0
    capsys.readouterr()
    assert run(*line, "--epochs", "0.05") == 2
    out, err = capsys.readouterr()
    assert "--steps is 3 here, and 6 are done there" in err
    assert "steps of" not in out


def test_epochs_and_steps_are_one_of_them(folder, capsys):
    assert finetune("--epochs", "1") == 2
    assert "--steps and --epochs both say how long to train" in capsys.readouterr().err


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
    train(adapted, X, Y, epochs=3, steps=1, batch_size=4, lr=0.02, rng=rng, loss=cross_entropy, gradients=accumulate(2))
    ours = attach(Llama.load("model"), load_adapter("a"))
    assert evaluate(ours, *held_out, cross_entropy) == pytest.approx(
        evaluate(adapted, *held_out, cross_entropy), rel=1e-4
    )


def test_a_checkpoint_of_another_variant_is_refused(folder, capsys):
    assert finetune("--steps", "3", "--checkpoint", "c", "--use-dora") == 0
    assert finetune("--steps", "3", "--checkpoint", "c") == 2
    assert "--use-dora is True there and False here" in capsys.readouterr().err
