"""A missing optional package is named, with what needs it and how to install it."""

import sys
from pathlib import Path

import pytest

from minilora import Llama
from minilora.extras import EXTRAS, install
from minilora.language import load_tokenizer
from minilora.language.files.chattemplate import load_template
from minilora.language.files.ggufexport import export_adapter
from minilora.language.resume import exclusive_lock

from ..support.compare import refused
from ..support.gguf_file import write
from ..support.language import tiny_llama, write_folder

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
NEEDED = [
    ("gguf", "a .gguf file", lambda: Llama.load("m.gguf")),
    ("gguf", "a .gguf file", lambda: load_tokenizer(Path("m.gguf"))),
    ("gguf", "a .gguf file", lambda: export_adapter("a", "m", "a.gguf")),
    ("tokenizers", "its tokenizer", lambda: load_tokenizer(Path("m.gguf"))),
    ("tokenizers", "tokenizer.json", lambda: load_tokenizer(Path("m"))),
    ("glassllm", "an .npz file", lambda: load_tokenizer(Path("m.npz"))),
    ("jinja2", "a chat template", lambda: load_template(Path("m")).render([])),
    ("filelock", "a training that is kept", lambda: exclusive_lock(Path("a")).__enter__()),
]


@pytest.mark.parametrize(("package", "why", "use"), NEEDED)
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package, why, use):
    monkeypatch.chdir(tmp_path)
    write(Path("m.gguf"), tiny_llama(dtype="float32"))
    write_folder(Path("m"), tiny_llama())
    Path("m", "chat_template.jinja").write_text("Hello")
    Path("m.npz").touch()
    monkeypatch.setitem(sys.modules, package, None)
    reason = f"import of {package} halted; None in sys.modules"
    with refused(f"{why} needs {package} ({reason}): {install(EXTRAS[package])}", ValueError):
        use()
