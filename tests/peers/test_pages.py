"""The blocks of the site that show a step in torch or PEFT print what ours prints, digit for digit."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

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
