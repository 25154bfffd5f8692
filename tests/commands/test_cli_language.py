"""``minilora finetune`` and ``minilora generate``."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minilora import (
    Llama,
    LoRA,
    adapt,
    adapters,
    attach,
    cross_entropy,
    evaluate,
    load_adapter,
    quantize,
    save_adapter,
    train,
)
from minilora.fast import accumulate
from minilora.language.examples import load_data
from minilora.language.finetuning import cores
from minilora.language.finetuning.losstable import LOG_EVERY
from minilora.language.generation import generate
from minilora.language.text import windows
from minilora.language.trainingmemory import cache_bytes, parameter_bytes
from minilora.layer import parameter_count

from ..support.language import LETTERS, TEXT, arrays_of, tiny_llama
from .test_cli import run

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "30", "--batch-size", "4", "--length", "8", "--rank", "2", "--lr", "0.02"]


def finetune(*more):
    return run("finetune", "text", "--save", "a", "--model", "model", *SMALL, *more)


def losses(out):
    """Return the held-out losses that were printed, by step."""
    return {row[0]: row[-1] for row in rows(out)}


def rows(out):
    """Return step, training loss and held-out loss of each row that was printed; of step 0 the latter alone."""
    found = re.findall(r"^ *(\d+) +(?:(\d+\.\d{3}) +)?(\d+\.\d{3})(?: |$)", out, re.M)
    return [(int(step), float(training) if training else None, float(held_out)) for step, training, held_out in found]


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
    size = cache_bytes(adapted.forward(X[:26])[1])  # a step has 3 at a time
    assert f"memory   {size / 1e6:,.1f} MB of activations to measure the loss of 26 windows at a time" in out
    assert "adapter written to a" in out


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
    for command in (["finetune", "text", "--save", "a", *SMALL], ["generate", "the"]):
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


def test_any_number_of_workers_writes_the_same_adapter(folder):
    found = set()
    for workers in ("1", "2", "5"):
        assert finetune("--workers", workers, "--batch-size", "5", "--micro-batch", "1", "--steps", "3") == 0
        found.add((folder / "a" / "adapter_model.safetensors").read_bytes())
    assert len(found) == 1


def test_a_command_has_one_blas_thread_from_its_start(folder):
    """Set before NumPy is loaded, in this process alone, whatever the environment says."""
    script = """if True:
        import os, sys
        from minilora import cli
        from minilora.commands import finetune, generate
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
        (["generate", "the"], str(min(2, cores.core_count()))),
    ):
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, env=environment)
        assert set(done.stdout.split()) <= {expected}, done.stderr


def test_a_command_in_a_running_program_leaves_the_environment(folder):
    before = dict(os.environ)
    assert finetune("--steps", "1") == 0
    assert dict(os.environ) == before


def test_workers_follow_the_cores_and_the_library(monkeypatch, standin):
    for available, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(cores, "core_count", lambda available=available: available)
        assert cores.worker_count(None, "numpy") == expected
        assert cores.worker_count(None, standin.name) == 1
    assert cores.worker_count(5, "numpy") == 5
    with pytest.raises(ValueError, match="workers = 5 is for NumPy, expected 1 with --backend cupy"):
        cores.worker_count(5, standin.name)


BAD = [
    (["--workers", "0"], "workers must be at least 1, got 0"),
    (["--rank", "0"], "rank must be at least 1, got 0"),
    (["--steps", "0"], "steps must be at least 1, got 0"),
    (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    (
        ["--batch-size", "229"],
        "--batch-size 229 is more than the 228 windows that there are to train on at --length",
    ),
    (["--micro-batch", "0"], "micro_batch must be at least 1, got 0"),
    (["--length", "0"], "length must be at least 1, got 0"),
    (["--length", "1020"], "the text has 2040 tokens, expected at least 2041: two windows of 1020"),
    (["--lr", "0"], "lr must be above 0 and finite, got 0.0"),
    (["--alpha", "1e300"], "alpha must be above 1e-30 and below 1e+30, got 1e+300"),
    (["--seed", "-1"], "seed must be at least 0, got -1"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--target-modules", "query"], "target_modules=['query'] names no layer"),
    (["--target-modules", "q_proj;v_proj"], "target_modules='q_proj;v_proj' names no layer"),
    (["--target-modules", "(q|v"], "target_modules='(q|v' is not a regular expression: missing ), unterminated"),
    (["--target-modules", ""], "target_modules='' names no layer"),
    (["--save", "text"], "/text' is a file, expected a folder"),
    (["--save", "./model"], "save 'model' is the model's folder, expected one of the adapter's own"),
    (["--save", "model/../model"], "save 'model/../model' is the model's folder, expected one of the adapter's own"),
    (["--checkpoint", "a"], "/a' would lie where the adapter goes: name another file"),
    (["--checkpoint", "a", "--save", "a/b/c"], "/a' would lie where the adapter goes: name another file"),
    (["--checkpoint", "a/adapter_config.json"], "/a/adapter_config.json' would lie where the adapter goes"),
    (["--checkpoint", "a/adapter_model.safetensors"], "/a/adapter_model.safetensors' would lie where the adapter"),
    (["--checkpoint", "model/../a"], "/a' would lie where the adapter goes: name another file"),
    (["--checkpoint", "model"], "the checkpoint 'model' is a folder, expected a file or a new name"),
    (["--plot", "no/such/folder/x.png"], "there is no folder 'no/such/folder'"),
    (["--plot", "figure.xyz"], "ends in 'xyz', expected one of"),
    (["--checkpoint", "text/c"], "checkpoints cannot be kept in 'text'"),
    (["--checkpoint", "model/config.json"], "the checkpoint cannot be read: 'model/config.json'"),
    (["--model", "nowhere"], "'nowhere': there is no such file"),
    (["--model", "text"], "expected a folder with config.json, a .gguf file or a .npz file"),
    (["--model", ""], "argument --model: the name is empty"),
    (["--save", ""], "argument --save: the name is empty"),
    (["--checkpoint", ""], "argument --checkpoint: the name is empty"),
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
        *SMALL,
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


# --- examples -------------------------------------------------------------------------------------

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
        ({"messages": [{"role": "system", "content": "a"}, *EXAMPLES[10]["messages"]]}, "it says: no system here"),
        ({"question": "the"}, "'e.jsonl': line 22: its keys are ['question']"),
    ],
)
def test_an_example_that_is_none_stops_the_finetuning(examples, line, message, capsys):
    Path("e.jsonl").write_text("\n".join(map(json.dumps, [*EXAMPLES, line])))
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", *SMALL) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == "model    model\n"
    assert not Path("a").exists()


def test_a_chat_is_answered_and_the_answer_printed_alone(examples, capsys):
    model, template = Llama.load("model"), "u the cat.a "
    ids = [LETTERS.index(c) for c in template]
    expected = "".join(LETTERS[i] for i in generate(model, ids, 9, end={LETTERS.index(".")}))
    command = ["generate", "the cat", "--model", "model", "--chat", "--tokens", "9", "--temperature", "0"]
    assert run(*command) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_chat_needs_a_template(folder, capsys):
    assert run("generate", "the cat", "--model", "model", "--chat") == 2
    out, err = capsys.readouterr()
    assert "'model': there is no chat template in tokenizer_config.json, nor a file chat_template.jinja" in err
    assert out == ""


# --- generate -------------------------------------------------------------------------------------


def test_generate_says_what_the_model_says(folder, capsys):
    assert finetune() == 0
    capsys.readouterr()
    model = Llama.load("model")
    ids = [LETTERS.index(c) for c in "the cat"]
    said = {}
    for name, more, m in (("plain", [], model), ("adapted", ["--adapter", "a"], attach(model, load_adapter("a")))):
        assert run("generate", "the cat", "--model", "model", "--tokens", "20", "--temperature", "0", *more) == 0
        said[name] = capsys.readouterr().out
        expected = "".join(LETTERS[i] for i in generate(m, ids, 20, end={LETTERS.index(".")}))
        assert said[name] == f"the cat{expected}\n"
    assert said["plain"] != said["adapted"]


def test_a_seed_chooses_the_text(folder, capsys):
    said = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--temperature", "0.01"]):
        assert run("generate", "the", "--model", "model", *more) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(set(said)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--model", "model"], "the prompt is empty"),
        (["the", "--model", "model", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["the", "--model", "model", "--temperature", "-1"], "temperature must be at least 0 and finite, got -1.0"),
        (["the", "--model", "model", "--temperature", "nan"], "temperature must be at least 0 and finite, got nan"),
        (["the", "--model", "model", "--top-p", "0"], "top_p must be above 0 and finite, got 0.0"),
        (["the", "--model", "model", "--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["the", "--model", "model", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["the", "--model", "model", "--adapter", "model"], "adapter_config.json"),
        (["the", "--model", "model", "--backend", "torch"], "argument --backend: invalid choice: 'torch'"),
        (["the", "--model", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_said_is_one_line(folder, arguments, message, capsys):
    assert run("generate", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minilora: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(("layer", "width"), [(7, 12), (1, 13)])  # one layer too many, one input too many
def test_an_adapter_of_another_model_is_refused_by_path(folder, layer, width, capsys):
    path = f"model.layers.{layer}.self_attn.q_proj"
    save_adapter("b", {path: LoRA(np.ones((1, width)), np.ones((16, 1)), 1.0)})
    assert run("generate", "the", "--model", "model", "--adapter", "b") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert path in err


def test_a_models_words_cannot_steer_the_terminal(folder, capsys):
    words = json.loads(Path("model/tokenizer.json").read_text())
    evil = {letter: i for i, letter in enumerate(LETTERS) if letter not in "abcdefghijklm"}
    evil |= {f"\x1b[{i}J\u202e": i for i in range(13)}
    words["model"]["vocab"] = evil
    Path("model/tokenizer.json").write_text(json.dumps(words))
    assert run("generate", "no\x07", "--model", "model", "--tokens", "60", "--temperature", "3") == 0
    out = capsys.readouterr().out
    assert "\\x1b[" in out
    assert out.startswith("no\\x07")
    assert out.replace("\n", "").isprintable()


def test_names_that_the_user_gives_cannot_steer_the_terminal(folder, capsys):
    evil = "\x1b[2J\u202e"
    Path("model").rename(f"{evil}m")
    Path("text").rename(f"{evil}t")
    assert run("finetune", f"{evil}t", "--save", f"{evil}a", "--model", f"{evil}m", *SMALL, "--steps", "1") == 0
    out = capsys.readouterr().out
    assert out.count("\\x1b[2J") == 3
    assert out.replace("\n", "").isprintable()


def test_without_a_model_glassllms_is_taken(folder, capsys):
    pytest.importorskip("glassllm")
    assert run("finetune", "text", "--save", "a", "--steps", "2", "--batch-size", "2", "--length", "16") == 0
    out = capsys.readouterr().out
    assert "glassllm's English model: 852,608 parameters in float32" in out
    assert losses(out)[2] < losses(out)[0]
    assert json.loads(Path("a/adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert run("generate", "The cat", "--adapter", "a", "--tokens", "5") == 0
    assert capsys.readouterr().out.startswith("The cat")


def test_a_missing_default_model_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "glassllm", None)
    for command in (["generate", "the"], ["finetune", "text", "--save", "a"]):
        assert run(*command) == 2
        assert "needs glassllm" in capsys.readouterr().err
