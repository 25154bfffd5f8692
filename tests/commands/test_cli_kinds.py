"""``finetune``, ``merge`` and ``generate`` of each kind of decoder, and what they say beyond its context."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from minilora import Llama
from minilora.files import save_llama

from ..support.language import tiny_llama
from .test_cli import run

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
SMALL = ["--batch-size", "2", "--length", "8", "--rank", "2", "--lr", "0.02"]


def finetune(model, steps):
    return run("finetune", "text", "--save", "a", "--model", model, "--steps", str(steps), *SMALL)


def of_context(folder, length):
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": length}))


def test_what_is_longer_than_the_context_is_warned_of_once(folder, capsys):
    said = "tokens, and the model's context is 7: what it says beyond may be nonsense"
    for length in (8, 7):
        of_context(folder, length)
        assert finetune("model", 1) == 0
        assert run("generate", "cat", "--model", "model", "--tokens", "5", "--temperature", "0") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "context" in line]
    assert lines == [f"minilora: a window has 8 {said}", f"minilora: prompt and text may have 8 {said}"]


@pytest.mark.parametrize("kind", ["qwen2", pytest.param("mistral", marks=pytest.mark.long)])
def test_what_was_tuned_and_merged_speaks_as_beside_its_base(folder, capsys, kind):
    config = dataclasses.replace(tiny_llama().config, model_type=kind, attention_bias=kind == "qwen2")
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(s).astype("f4") / 4 for name, s in config.shapes().items()}
    save_llama(Llama.build(config, arrays), folder / kind)
    shutil.copy(folder / "model" / "tokenizer.json", folder / kind)
    assert finetune(kind, 3) == 0
    assert run("merge", kind, "a", "-o", "merged") == 0
    capsys.readouterr()
    for more in (["--model", kind, "--adapter", "a"], ["--model", "merged"]):
        assert run("generate", "the cat", "--tokens", "20", "--temperature", "0", *more) == 0
    beside, merged = capsys.readouterr().out.split("the cat")[1:]
    assert len(beside) == 21
    assert merged == beside
