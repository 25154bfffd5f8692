"""The pages as notebooks: what stands in them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
import notebooks  # noqa: E402
import pages  # noqa: E402

PAGES = [page for page in pages.every() if notebooks.code(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebook_is_valid_with_its_pages_code(page):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    book = notebooks.notebook(page)
    nbformat.validate(nbformat.from_dict(book))
    cells = [cell["source"] for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells == [block["body"].rstrip() for block in notebooks.code(page)]
    told = "\n".join(cell["source"] for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert told.startswith("# ")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", told, flags=re.S | re.M)
    assert not re.findall(r"<!--|\]\(pictures/|\]\((?!https?:)[^)]*\.md", outside)
    assert told.count("data:image/svg+xml;base64,") == len(
        pages.PICTURE.findall(pages.unquoted(page.read_text(encoding="utf-8"))[0])
    )


def test_the_command_writes_them_and_overwrites_none(tmp_path):
    def command():
        told = [sys.executable, ROOT / "docs" / "_ext" / "notebooks.py", tmp_path / "new"]
        return subprocess.run(told, capture_output=True, text=True)

    assert command().returncode == 0
    assert sorted(path.stem for path in tmp_path.rglob("*.ipynb")) == sorted(page.stem for page in PAGES)
    assert "FileExistsError" in command().stderr
