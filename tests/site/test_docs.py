"""What can be said about the pages without building them."""

import ast
import importlib
import pkgutil
import re
import shutil
from itertools import chain
from pathlib import Path

import api
import heads
import numbered
import pytest

import minilora

from ..packaging import test_structure

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("l*/*.md"))


def test_every_module_stands_in_the_list_of_the_api():
    page = (ROOT / "docs" / "library" / "api.md").read_text(encoding="utf-8")
    assert {"minilora.lora", "minilora.files", "minilora.files.merge"} <= api.modules().keys()
    assert f"{api.table()}\n" in page, "python docs/_ext/pages.py --write docs/library/api.md adds the line"


def test_the_api_page_shows_each_public_name_with_its_parameters():
    page = (ROOT / "docs" / "library" / "api.md").read_text(encoding="utf-8")
    assert f"{api.names()}\n" in page, "python docs/_ext/pages.py --write docs/library/api.md writes them"
    for name in minilora.__all__:
        value = getattr(minilora, name)
        assert not callable(value) or f"[`{name}{'' if isinstance(value, type) else '('}" in page
    assert "[`adapt(model, target_modules, *, rank, alpha, rng, use_rslora=False" in page
    assert "loss=mse" in page


STATED = {label: page for page in PAGES for label in re.findall(r"^<!-- equation (\S+)", page.read_text("utf-8"), re.M)}
LINES = numbered.find_lines(ROOT / "minilora")
BOOK = [
    path
    for path in sorted((ROOT / "minilora").rglob("*.py"))
    if path.relative_to(ROOT / "minilora").parts[0] in ("lora.py", "linear.py", "layers", "variants")
]


def functions_of(body, path):
    return {node.name: (path, node) for node in body if isinstance(node, ast.FunctionDef)}


HELPERS = {
    name: function
    for path in BOOK
    for name, function in functions_of(ast.parse(path.read_text(encoding="utf-8")).body, path).items()
}


def derived(path):
    """Yield each class of a file that has a backward, with the equations that it computes or refers to.

    Lines with a number count in the backward itself, and in what it calls: methods of its class, functions of the book.
    """
    source = path.read_text(encoding="utf-8")
    helpers = HELPERS | functions_of(ast.parse(source).body, path)
    for cls in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        functions = helpers | functions_of(cls.body, path)
        if "backward" in functions:
            home, backward = functions.pop("backward")
            words = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(backward)}
            run = [(home, backward), *(functions[word] for word in words & functions.keys())]
            computed = {
                line.label
                for line in LINES
                for file, node in run
                if ROOT / f"{line.module.replace('.', '/')}.py" == file
                and node.lineno <= line.lineno <= node.end_lineno
            }
            yield cls.name, computed | set(numbered.REFERENCE.findall(ast.get_source_segment(source, backward)))


def test_every_backward_is_derived_on_a_page():
    """Whether page and line say the same is for the build: `docs/_ext/equations.py` evaluates both."""
    for cls, labels in chain.from_iterable(map(derived, BOOK)):
        assert labels, f"{cls}: its backward has no line with an equation's number, # eq. (...)"
        assert labels <= STATED.keys(), f"{cls}: no page states {labels - STATED.keys()}"


def test_a_backward_without_a_number_is_not_derived(tmp_path):
    rooms = {path.parent.name for path in BOOK if dict(derived(path))}
    assert rooms >= {"minilora", "layers", "variants"}
    new = tmp_path / "new.py"
    new.write_text("class New(Layer):\n    def backward(self, dy, cache):\n        return dy, {}\n")
    assert list(derived(new)) == [("New", set())]


CONTRIBUTING = (ROOT / "docs" / "library" / "contributing.md").read_text(encoding="utf-8")


def test_every_file_and_folder_is_on_the_map():
    package = ROOT / "minilora"
    mapped = re.findall(r"^\| `(\w+(?:\.py|/))` \|", CONTRIBUTING, re.M)
    files = [path.name for path in package.glob("*.py") if not path.stem.startswith("__")]
    assert sorted(mapped) == sorted([*files, *(f"{path.parent.name}/" for path in package.glob("*/__init__.py"))])


def test_the_floors_are_those_that_are_tested():
    (line,) = re.findall(r"^`backend`, `checks`.* \| .*$", CONTRIBUTING, re.M)
    assert [set(re.findall(r"`(\w+)`", floor)) for floor in line.split("|")] == [
        rooms for rooms in test_structure.FLOORS if rooms != {"__main__"}
    ]


def test_what_contributing_names_is_there():
    """Files, folders and tests, but for what its examples would add and what the build writes."""
    new = {
        "minilora/layers/scale.py",
        "minilora/cli/count.py",
        "minilora/variants/x.py",
        "tests/cli/test_count.py",
    }
    for path in set(re.findall(r"`((?:minilora|tests|docs|examples|\.ci)/[\w./]+)`", CONTRIBUTING)) - new:
        assert (ROOT / path).exists(), path
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", CONTRIBUTING):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("address", ["", "https://example.org/minilora"])
def test_every_page_says_what_it_is_about(address):
    texts = {(page.parent.name, page.stem): page.read_text(encoding="utf-8") for page in PAGES}
    said = {of: heads.front_matter(of[1], text, address, of[0]) for of, text in texts.items()}
    for (site, page), front in said.items():
        meta = dict(re.findall(r'^    "(?:property=og:)?(.*?)": "(.*)"$', front, re.M))
        assert 25 < len(meta["description"]) < 250, page
        there = f"{address}/{'library/' * (site == 'library')}" if address else ""
        assert meta.get("url") == (f"{there}{page}.html" if address else None)
        assert meta.get("image") == (f"{there}_static/preview.png" if page == "index" else None)
    assert len({re.search('"description": (.*)', front)[1] for front in said.values()}) == len(said)
    assert (ROOT / "docs" / heads.PREVIEW).read_bytes().startswith(b"\x89PNG")


def test_every_old_address_leads_to_a_page(tmp_path):
    pytest.importorskip("matplotlib")
    build = importlib.import_module("build")
    build.write_redirects(tmp_path)
    for file in tmp_path.iterdir():
        there = re.search(r"url=([\w/-]+)\.html", file.read_text(encoding="utf-8"))[1]
        site, name = there.split("/") if "/" in there else ("learn", there)
        assert (ROOT / "docs" / site / f"{name}.md").is_file(), file.name
        assert not (ROOT / "docs" / "learn" / f"{file.stem}.md").exists()
    assert len(build.MOVED) > 30


def test_a_lesson_is_numbered_and_leads_to_the_next():
    index = (ROOT / "docs" / "learn" / "index.md").read_text(encoding="utf-8")
    lessons = re.findall(r"^(\d+)\. \[(.*?)\]\((\S+)\.md\)", index, re.M)
    assert [int(number) for number, _, _ in lessons] == list(range(13 - len(lessons), 13))
    for (number, title, name), (_, _, after) in zip(lessons, [*lessons[1:], (0, "", "exercises")], strict=True):
        text = (ROOT / "docs" / "learn" / f"{name}.md").read_text(encoding="utf-8")
        assert name == "index" or text.startswith(f"# {number}. {title}\n")
        assert name == "index" or re.search(rf"^Next: \[.*\]\({after}\.md\)", text, re.M), name


CHANGELOG = (ROOT / "docs" / "library" / "changelog.md").read_text(encoding="utf-8")
MOVED = re.findall(r"^\| (`minilora\..*`) \| `(minilora\..*)` \|$", CHANGELOG, re.M)


@pytest.mark.parametrize(("old", "new"), MOVED, ids=[new for _, new in MOVED])
def test_what_moved_is_where_the_changelog_says(old, new):
    pkgutil.resolve_name(new)
    for name in re.findall("`(.*?)`", old):
        with pytest.raises((ImportError, AttributeError)):
            pkgutil.resolve_name(name)


def test_the_changelog_has_its_table_of_moves():
    assert len(MOVED) > 30


def test_a_build_without_node_says_so_in_one_line(monkeypatch, tmp_path):
    pytest.importorskip("sphinxcontrib.katex", reason="the site's tools are not installed: pip install -e '.[docs]'")
    build = importlib.import_module("build")
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(build, "DOCS", tmp_path)
    with pytest.raises(SystemExit, match=r"^the site needs Node.js .*: node and npm not on the PATH$"):
        build.fetch_katex()
