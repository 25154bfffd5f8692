"""Pages beside others: a step in torch or PEFT prints what ours prints, and the recipe to llama.cpp runs."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora import load_adapter

pytestmark = pytest.mark.peers
pytest.importorskip("torch")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
THEIRS = r"<details><summary>(?:In|The same in) [^\n]*</summary>\n\n```py\n"
BLOCK = re.compile(rf"^(?:(?P<theirs>{THEIRS})|```python\n)(?P<code>.*?)^```", re.S | re.M)
PAGES = [page for page in sorted((ROOT / "docs").glob("*/*.md")) if re.search(THEIRS, page.read_text(encoding="utf-8"))]


def printed(code, names):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "<page>", "exec"), names)
    return out.getvalue()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_print_the_same_digits(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("examples", "docs"):
        Path(name).symlink_to(ROOT / name)
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    last = max(i for i, block in enumerate(blocks) if block["theirs"])
    ours, said = {"__name__": "__main__"}, ""
    for block in blocks[: last + 1]:
        if block["theirs"]:
            # Of our arrays it gets copies, since torch may share memory with them.
            theirs = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in ours.items()}
            assert printed(block["code"], theirs) == said, block["code"]
        else:
            said = printed(block["code"], ours) or said


def test_the_pages_that_teach_a_step_have_such_blocks():
    taught = {"derivation", "network", "decoder", "language-model", "variants", "adapter-files"}
    assert taught | {"embeddings-and-convolutions", "experts"} <= {page.stem for page in PAGES}


def test_the_commands_for_llama_cpp_write_what_is_shown(smollm2, tmp_path):
    """llama.cpp itself reads exported adapters in `test_llama_cpp`."""
    gguf = pytest.importorskip("gguf")
    page = (ROOT / "docs" / "library" / "recipes.md").read_text(encoding="utf-8")
    section = page.partition("\n## From SmolLM2 to llama.cpp\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"^```sh\n(.*?)^```", section, re.S | re.M)
    (output,) = re.findall(r"^```text\n(.*?)^```", section, re.S | re.M)
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
