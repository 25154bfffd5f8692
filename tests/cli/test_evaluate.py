"""``minilora evaluate``."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, attach, cross_entropy, load_adapter

from ..support.command_line import finetune, run
from ..support.language import LETTERS, TEXT

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


def shown(out):
    lines = re.findall(r"^loss +(\S+) nats a token, perplexity (\S+): (.*)$", out, re.M)
    return [(float(loss), float(perplexity), name) for loss, perplexity, name in lines]


def test_the_loss_of_base_and_adapter_is_that_of_all_of_the_text(folder, capsys):
    assert finetune() == 0
    capsys.readouterr()
    assert run("evaluate", "text", "--model", "model", "--adapter", "a", "--length", "8") == 0
    out = capsys.readouterr().out
    assert f"text     text: {len(TEXT):,} tokens, 254 windows of 8" in out
    ids = np.array([LETTERS.index(c) for c in TEXT])
    X, Y = ids[: 254 * 8].reshape(-1, 8), ids[1 : 254 * 8 + 1].reshape(-1, 8)
    base = Llama.load("model")
    losses = [cross_entropy(model(X), Y)[0] for model in (base, attach(base, load_adapter("a")))]
    assert [row[2] for row in shown(out)] == ["model", "with a"]
    np.testing.assert_allclose([row[0] for row in shown(out)], losses, atol=6e-5)
    np.testing.assert_allclose([row[1] for row in shown(out)], [math.exp(loss) for loss in losses], rtol=1e-3)


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.filterwarnings("ignore:.*base's own weight:UserWarning")
def test_an_adapter_of_another_base_is_refused(folder, capsys, command):
    assert finetune("--target-modules", "embed_tokens") == 0
    file, key = Path("a", "adapter_model.safetensors"), "base_model.model.model.embed_tokens.base_layer.weight"
    weight = load_file("model/model.safetensors")["model.embed_tokens.weight"]
    for kept, code in ((weight, 0), (weight + 1, 2)):
        save_file(load_file(file) | {key: kept}, file)
        assert run(command, "text", "--model", "model", "--adapter", "a") == code
    assert "the adapter is of another base" in capsys.readouterr().err


def test_examples_are_measured_where_they_count(folder, capsys):
    Path("e.jsonl").write_text(json.dumps({"prompt": "the ", "completion": "cat"}) + "\n")
    assert run("evaluate", "e.jsonl", "--model", "model") == 0
    ids = np.array([LETTERS.index(c) for c in "the cat."])
    logits = Llama.load("model")(ids[None, :-1])[:, 3:]
    ((loss, _, name),) = shown(capsys.readouterr().out)
    assert name == "model"
    assert loss == pytest.approx(float(cross_entropy(logits, ids[None, 4:])[0]), abs=6e-5)


def test_the_loss_is_measured_on_another_file_or_share(folder, capsys):
    """What finetune measures before its first step is what evaluate prints."""
    Path("other").write_text("a log and a mat.\n" * 9)
    assert finetune("--steps", "1", "--valid", "other", "--checkpoint", "c") == 0
    out = capsys.readouterr().out
    assert "254 windows of 8; held out other: 153 tokens, 19 windows of 8" in out
    (before,) = re.findall(r"^   0 +(\S+)$", out, re.M)
    assert run("evaluate", "other", "--model", "model", "--length", "8") == 0
    assert shown(capsys.readouterr().out)[0][0] == pytest.approx(float(before), abs=6e-4)
    assert finetune("--steps", "2", "--checkpoint", "c") == 2
    assert "what is held out is another" in capsys.readouterr().err
    assert finetune("--steps", "1", "--valid", "0.5") == 0
    assert "127 windows of 8" in capsys.readouterr().out
    for bad in ("0", "0.7", "nan", "nowhere"):
        assert finetune("--steps", "1", "--valid", bad) == 2


def test_a_loss_beyond_every_exponential_has_an_infinite_perplexity(folder, capsys, monkeypatch):
    """An adapter that diverged gives such losses, and they are what one wants to see."""
    monkeypatch.setattr("minilora.language.text.evaluate_where_it_counts", lambda *a, **k: 12345.0)
    assert run("evaluate", "text", "--model", "model", "--length", "8") == 0
    assert shown(capsys.readouterr().out) == [(12345.0, math.inf, "model")]
