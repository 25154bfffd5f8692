"""llama.cpp, through node-llama-cpp: it reads exported adapters as golden ones say, and speaks our greedy tokens.

MINILORA_NODE names a folder whose node_modules has node-llama-cpp.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama, LlamaConfig, adapt, adapters, attach, cli, load_adapter, save_adapter
from minilora.conformance.golden.bases import MERGES, VOCABULARY
from minilora.language.generation import generate
from minilora.layers.rotary import frequencies

from ..conformance.golden.conftest import MIXTURES, index_of, written
from ..support.peers import write_gguf

pytestmark = pytest.mark.peers
NODE = os.environ.get("MINILORA_NODE", "")
if not (NODE and Path(NODE, "node_modules", "node-llama-cpp").is_dir() and shutil.which("node")):
    pytest.skip("MINILORA_NODE names no folder with node-llama-cpp", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "golden" / "llama_cpp.mjs"
NOT_HELD = {
    *("lora-bias", "dora", "dora-rslora", "dora-square", "tied-embedding", "tied-head", "nf4-untied", "nf4-tied"),
    *("modules-to-save", "bias-lora-only", "trained-tokens"),
    *(case.id for case in MIXTURES if case.answered),
}
"""What a LoRA GGUF has no place for, the bases that have no .gguf file, and mixtures, which `export` refuses."""
WORDS = "the cat and the dog sat on the mat in the sun\n"


def run(folder, results, tmp_path):
    """Run the script beside its node_modules, with this interpreter's minilora."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "minilora").write_text(f'#!/bin/sh\nexec {sys.executable} -m minilora "$@"\n')
    (bin / "minilora").chmod(0o755)
    script = shutil.copy(SCRIPT, Path(NODE) / f"{os.getpid()}-{SCRIPT.name}")  # tests may run in two processes
    env = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["node", script, str(folder), str(results)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def golden(tmp_path_factory):
    return written(tmp_path_factory.mktemp("golden") / "golden")


@pytest.fixture
def index(golden):
    return index_of(golden)


def test_llama_cpp_reads_every_adapter_that_it_can_hold(golden, index, tmp_path):
    run(golden, tmp_path / "results", tmp_path)
    cli.main(["golden", str(golden), "--compare", str(tmp_path / "results"), "--json", str(tmp_path / "v.json")])
    verdicts = {one["id"]: one for one in json.loads((tmp_path / "v.json").read_text())["cases"]}
    assert {id for id, one in verdicts.items() if one["state"] == "missing"} == NOT_HELD
    assert not [one for one in verdicts.values() if one["state"] == "wrong"]
    answered = {case["id"] for case in index["cases"] if not case["refused"]} - NOT_HELD | {"alpha-missing"}
    assert {id for id, one in verdicts.items() if one["off"]} == answered


def write_kind(path, model):
    """A decoder as llama.cpp's converter writes its kind, with the tokens of golden bases."""
    more = {"rope_parameters": {"rope_theta": 500.0}, "max_position_embeddings": 64}
    config = SimpleNamespace(**{field.name: getattr(model.config, field.name) for field in fields(model.config)} | more)
    tokens = {
        "pre": "qwen2",
        "tokens": list(VOCABULARY),
        "types": [3, 3] + [1] * (len(VOCABULARY) - 2),
        "merges": list(MERGES),
    }
    ends = [("tokenizer.ggml.bos_token_id", 0), ("tokenizer.ggml.eos_token_id", 1)]
    write_gguf(path, config, model.trainable(), metadata=ends, **tokens)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_other_kinds_and_their_adapters_are_what_llama_cpp_computes(tmp_path, kind):
    """It keeps keys and values in float16. Rows in another order would put them off by far more than it does."""
    rng, folder = np.random.default_rng(0), tmp_path / "kind"
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, frequencies=frequencies(16, 500.0), model_type=kind,
        attention_bias=kind == "qwen2",
    )  # fmt: skip
    sizes = {1: lambda shape: 0.3, 2: lambda shape: 2 * shape[1] ** -0.5}  # biases and norms, and matrices
    arrays = {name: rng.standard_normal(s) * sizes[len(s)](s) for name, s in config.shapes().items()}
    arrays = {name: (array + name.endswith("norm.weight")).astype("f4") for name, array in arrays.items()}
    model = Llama.build(config, arrays)
    folder.mkdir()
    write_kind(folder / "base.gguf", model)
    adapted = adapt(model, ["q_proj", "k_proj", "v_proj", "up_proj"], rank=4, alpha=8, rng=rng)
    for array in adapted.trainable().values():
        array += rng.standard_normal(array.shape).astype("f4") / 4
    save_adapter(folder / "adapter", adapters(adapted))
    prompt = rng.integers(2, len(VOCABULARY), 12).tolist()
    case = {"id": "tuned", "adapter": "adapter", "prompts": [prompt], "refused": False}
    base = {"gguf": "base.gguf"}
    (folder / "index.json").write_text(json.dumps({"base": "base.gguf", "bases": {"base.gguf": base}, "cases": [case]}))
    run(folder, tmp_path / "results", tmp_path)
    found = load_file(tmp_path / "results" / "tuned.safetensors")["log_probabilities"][0]
    tuned = attach(Llama.load(folder / "base.gguf"), load_adapter(folder / "adapter"))
    logits = np.stack([each(np.array([prompt]))[0] for each in (tuned, model)]).astype("f8")
    ours, plain = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert np.abs(found - ours).max() < 0.05
    assert np.abs(found - plain).max() > 1


def test_a_tuned_adapter_speaks_the_same_greedy_tokens(golden, index, tmp_path):
    """Trained here on a text, exported; llama.cpp's likeliest token after each is the next that we generate."""
    folder, base = tmp_path / "tuned", golden / index["base"]
    (tmp_path / "text").write_text(WORDS * 40)
    shutil.copytree(golden / "bases", folder / "bases")
    arguments = [str(tmp_path / "text"), "--model", str(base), "--save", str(folder / "adapter"), "--steps", "60"]
    assert cli.main(["finetune", *arguments, "--batch-size", "4", "--length", "16", "--lr", "0.01"]) == 0
    adapted = attach(Llama.load(base), load_adapter(folder / "adapter"))
    start = [40, 41, 42]
    said = [int(token) for token in generate(adapted, start, 24)]
    assert len(set(said)) > 4  # and not one token again and again
    case = {"id": "tuned", "adapter": "adapter", "prompts": [[*start, *said]], "refused": False}
    (folder / "index.json").write_text(json.dumps({**index, "cases": [case]}))
    run(folder, tmp_path / "results", tmp_path)
    likeliest = load_file(tmp_path / "results" / "tuned.safetensors")["log_probabilities"][0].argmax(axis=-1)
    assert likeliest[len(start) - 1 : -1].tolist() == said
