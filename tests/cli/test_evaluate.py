"""``minilora evaluate``: the loss of a base and with an adapter, of a text, of examples, of what finetune holds out."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, adapt, adapters, attach, cross_entropy, load_adapter, quantize, save_adapter
from minilora.language.text import windows

from ..support.command_line import FINETUNE, finetune, losses, run
from ..support.language import TEXT, ids_of
from ..support.streams import File

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
pytestmark = pytest.mark.usefixtures("folder")


def shown(out):
    lines = re.findall(r"^loss +(\S+) nats a token, perplexity (\S+): (.*)$", out, re.M)
    return [(float(loss), float(perplexity), name) for loss, perplexity, name in lines]


def test_base_and_adapter_are_measured_on_the_whole_text(shell):
    assert finetune() == 0
    save_adapter("a", load_adapter("a"), dtype="float16", overwrite=True)
    out = shell("evaluate text --model model --adapter a --length 8")
    assert f"text     text: {len(TEXT):,} tokens, 254 windows of 8" in out
    ids, base = np.array(ids_of(TEXT)), Llama.load("model")
    X, Y = ids[: 254 * 8].reshape(-1, 8), ids[1 : 254 * 8 + 1].reshape(-1, 8)
    expected = [cross_entropy(model(X), Y)[0] for model in (base, attach(base, load_adapter("a", dtype="float32")))]
    found, perplexities, names = zip(*shown(out), strict=True)
    assert names == ("model", "with a")
    np.testing.assert_allclose(found, expected, atol=6e-5)
    np.testing.assert_allclose(perplexities, np.exp(expected), rtol=1e-3)


def test_a_base_in_four_bits_is_measured(shell):
    assert finetune("--steps 1") == 0
    base = quantize(Llama.load("model"))
    X, Y = (windows(ids_of(TEXT), 8)[i][:1] for i in (0, 1))
    expected = [cross_entropy(model(X), Y)[0] for model in (base, attach(base, load_adapter("a")))]
    Path("short").write_text(TEXT[:9])
    found = shown(shell("evaluate short --model model --adapter a --quantize nf4 --length 8"))
    assert [loss for loss, *_ in found] == pytest.approx(expected, abs=6e-5)


@pytest.mark.filterwarnings("ignore:.*base's own weight:UserWarning")
def test_a_quantised_weight_is_not_held_against_the_bases(shell):
    assert finetune("--steps 1 --target-modules q_proj") == 0
    file, name = Path("a", "adapter_model.safetensors"), "model.layers.0.self_attn.q_proj"
    weight = load_file("model/model.safetensors")[f"{name}.weight"]
    for kept, code in ((weight, 0), (weight + 1, 2)):
        save_file(load_file(file) | {f"base_model.model.{name}.base_layer.weight": kept}, file)
        shell("evaluate text --model model --adapter a", code=code)
        shell("evaluate text --model model --adapter a --quantize nf4")


def test_examples_are_measured_where_they_count(shell):
    Path("e.jsonl").write_text(json.dumps({"prompt": "the ", "completion": "cat"}) + "\n")
    ((loss, _, name),) = shown(shell("evaluate e.jsonl --model model"))
    ids = np.array(ids_of("the cat."))
    logits = Llama.load("model")(ids[None, :-1])[:, 3:]
    assert (loss, name) == (pytest.approx(float(cross_entropy(logits, ids[None, 4:])[0]), abs=6e-5), "model")


def test_a_file_that_was_trained_on_can_be_measured(shell):
    """With the same lines skipped, and the same keys named."""
    good = json.dumps({"prompt": "the ", "completion": "cat", "source": "a"})
    Path("good.jsonl").write_text(f"{good}\n{good}\n")
    Path("e.jsonl").write_text(f"{good}\n{{\n{good}\n")
    shell.refused("evaluate e.jsonl --model model")
    out = shell("evaluate e.jsonl --model model --skip-bad bad.jsonl")
    assert (
        "skipped  1 unusable lines, now in bad.jsonl\n         e.jsonl, line 2: expected one whole JSON object" in out
    )
    assert "\n         not read: source (2 rows)\n" in out
    assert shown(out) == shown(shell("evaluate good.jsonl --model model"))
    assert [json.loads(line)["line"] for line in Path("bad.jsonl").read_text().splitlines()] == [2]
    shell.refused("evaluate e.jsonl --model model --skip-bad good.jsonl")  # never replaced
    assert Path("good.jsonl").read_text() == f"{good}\n{good}\n"
    said = shell.refused("evaluate e.jsonl --model model --skip-bad e.jsonl")
    assert said == "--skip-bad 'e.jsonl' is the file to measure, expected another file"


def test_the_loss_is_measured_on_another_file_or_share(shell):
    """What finetune measures before its first step is what evaluate prints."""
    Path("other").write_text("a log and a mat.\n" * 9)
    out = shell(f"{FINETUNE} --steps 1 --valid other --checkpoint c")
    assert "254 windows of 8; held out other: 153 tokens, 19 windows of 8" in out
    before = shown(shell("evaluate other --model model --length 8"))[0][0]
    assert losses(out)[0] == pytest.approx(before, abs=6e-4)
    assert "the held-out text differs" in shell.refused(f"{FINETUNE} --steps 2 --checkpoint c")
    assert "127 windows of 8" in shell(f"{FINETUNE} --steps 1 --valid 0.5")
    for bad in ("nan", "nowhere"):
        shell.refused(f"{FINETUNE} --steps 1 --valid {bad}")


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
def test_each_loss_is_seen_before_the_next_is_measured(monkeypatch):
    """By a reader of a pipe, as `tee` is."""
    save_adapter("a", adapters(adapt(Llama.load("model"), ["q_proj"], rank=1, alpha=1, rng=np.random.default_rng(0))))
    file, seen = File(), []
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("minilora.language.text.evaluate_where_it_counts", lambda *a, **k: seen.append(file.seen) or 1)
    assert run("evaluate text --model model --adapter a --length 8") == 0
    assert [text.rpartition(": ")[2] for text in (*seen, file.seen)] == [
        "2,040 tokens, 254 windows of 8\n",
        "model\n",
        "with a\n",
    ]


def test_a_loss_beyond_every_exponential_has_an_infinite_perplexity(shell, monkeypatch):
    """An adapter that diverged gives such losses, and they are what one wants to see."""
    monkeypatch.setattr("minilora.language.text.evaluate_where_it_counts", lambda *a, **k: 12345.0)
    assert shown(shell("evaluate text --model model --length 8")) == [(12345.0, math.inf, "model")]
