"""The blocks of the site that show a step in torch or PEFT print what ours prints, digit for digit."""

import contextlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.peers
pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("IPython", reason="the site's tools are not installed: pip install -e '.[docs]'")

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```\{(?P<kind>code-cell|peer)\} (?P<name>\w+)\n(?P<code>.*?)^```", re.S | re.M)
PAGES = [path for path in sorted(DOCS.glob("*.md")) if "```{peer}" in path.read_text(encoding="utf-8")]


def printed(code, names):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "<page>", "exec"), names)
    return out.getvalue()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_print_the_same_digits(page, monkeypatch):
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    last = max(i for i, block in enumerate(blocks) if block["kind"] == "peer")
    ours, said = {"__name__": "__main__"}, ""
    for block in blocks[: last + 1]:
        code = re.sub(r"\A(---\n.*?\n---\n|(:[^\n]*\n)+)", "", block["code"], flags=re.S)
        if block["kind"] == "code-cell":
            said = printed(code, ours) or said
        else:
            # Of our arrays it gets copies, since torch may share memory with them.
            theirs = {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in ours.items()}
            assert printed(code, theirs) == said, f"{block['name']}:\n{code}"


def test_the_pages_that_teach_a_step_have_such_blocks():
    taught = {"the-idea", "derivation", "network", "variants", "adapter-files"}
    assert taught | {"embeddings-and-convolutions", "decoder", "language-model"} <= {page.stem for page in PAGES}
