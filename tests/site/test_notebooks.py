"""The pages as notebooks: what stands in them."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

pages, notebooks = importlib.import_module("pages"), importlib.import_module("notebooks")

PAGES = pages.every()


@pytest.fixture(scope="module")
def made():
    return {page: notebooks.notebook(page) for page in PAGES}


def sources(book, kind):
    return [cell["source"] for cell in book["cells"] if cell["cell_type"] == kind]


def text_alone(book):
    """Return a notebook's Markdown without its blocks of code."""
    return re.sub(r"^(`{3,})[^`]*?\n.*?^\1$", "", "\n\n".join(sources(book, "markdown")), flags=re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_is_a_valid_notebook(made, page):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(made[page]))
    assert made[page]["cells"][0]["source"].startswith("# ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_notebooks_code_is_its_pages(made, page):
    blocks = [block for block in pages.blocks(page.read_text(encoding="utf-8")) if block["info"] == "python"]
    code = [source for source in sources(made[page], "code") if not source.startswith("!")]
    assert code == [block["body"].rstrip() for block in blocks]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_left_that_jupyter_cannot_show(made, page):
    text = text_alone(made[page])
    assert not re.findall(r"<!--|```|\]\(pictures/|\]\((?!https?:)[^)]*\.md", text)
    shown = {name for cell in made[page]["cells"] for name in cell.get("attachments", ())}
    assert shown == set(re.findall(r"\]\(attachment:([^)]*)\)", text))


def test_a_cell_has_what_its_block_prints(made):
    cells = {cell["source"]: cell for book in made.values() for cell in book["cells"] if cell["cell_type"] == "code"}
    said = [output["text"] for cell in cells.values() for output in cell["outputs"]]
    assert len(said) > 60
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert all(f"```text\n{one}```" in text or f"```text rounding\n{one}```" in text for one in said)


def test_a_console_becomes_commands_of_the_shell(made):
    (book,) = [book for page, book in made.items() if page.stem == "is-my-adapter-applied"]
    assert "!minilora audit adapter" in sources(book, "code")


def test_the_command_writes_all_pages_without_sphinx(tmp_path, monkeypatch, capsys):
    for module in ("sphinx", "docutils", "myst_parser"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["notebooks.py", str(tmp_path / "new")])
    assert notebooks.main() == 0
    assert sorted(path.stem for path in (tmp_path / "new").rglob("*.ipynb")) == sorted(page.stem for page in PAGES)
    assert notebooks.main() == 2  # somebody may have edited them
    assert "name a new folder" in capsys.readouterr().err
