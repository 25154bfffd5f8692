"""llama.cpp, through node-llama-cpp: it reads exported adapters as golden ones say, and speaks our greedy tokens.

MINILORA_NODE names a folder whose node_modules has node-llama-cpp.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from minilora import Llama, attach, cli, load_adapter
from minilora.golden.cases import CASES
from minilora.models.generate import generate

from ..golden.conftest import golden, index  # noqa: F401

pytestmark = pytest.mark.peers
NODE = os.environ.get("MINILORA_NODE", "")
if not (NODE and Path(NODE, "node_modules", "node-llama-cpp").is_dir() and shutil.which("node")):
    pytest.skip("MINILORA_NODE names no folder with node-llama-cpp", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "examples" / "golden" / "llama_cpp.mjs"
NOT_HELD = {"lora-bias", "dora", "dora-rslora", "tied-embedding", "tied-head", "nf4-untied", "nf4-tied"}
"""What a LoRA GGUF has no place for, and the bases that have no .gguf file."""
WORDS = "the cat and the dog sat on the mat in the sun\n"


def run(folder, results, tmp_path):
    """Run the script beside its node_modules, with this interpreter's minilora."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "minilora").write_text(f'#!/bin/sh\nexec {sys.executable} -m minilora "$@"\n')
    (bin / "minilora").chmod(0o755)
    script = shutil.copy(SCRIPT, Path(NODE) / SCRIPT.name)
    env = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["node", script, str(folder), str(results)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_llama_cpp_reads_every_adapter_that_it_can_hold(golden, index, tmp_path):  # noqa: F811
    run(golden, tmp_path / "results", tmp_path)
    cli.main(["golden", str(golden), "--compare", str(tmp_path / "results"), "--json", str(tmp_path / "v.json")])
    verdicts = {one["id"]: one for one in json.loads((tmp_path / "v.json").read_text())["cases"]}
    assert {id for id, one in verdicts.items() if one["state"] == "missing"} == NOT_HELD
    assert not [one for one in verdicts.values() if one["state"] == "wrong"]
    answered = {case.id for case in CASES if not case.refused} - NOT_HELD
    assert {id for id, one in verdicts.items() if one["off"]} == answered


def test_a_tuned_adapter_speaks_the_same_greedy_tokens(golden, index, tmp_path):  # noqa: F811
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
