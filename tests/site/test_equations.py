"""The site's checker of equations and lines, on the real code and on broken copies of it."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the site's tools are not installed: pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("equations", ROOT / "docs" / "equations.py")
equations = importlib.util.module_from_spec(spec)
sys.modules["equations"] = equations  # dataclasses look their module up
spec.loader.exec_module(equations)

EQUATION = "```{equation} "


def stated(text):
    """Return the equations that a page states: its directives' numbers and variables."""
    heads = [line.removeprefix(EQUATION).split() for line in text.splitlines() if line.startswith(EQUATION)]
    return [(int(number), names) for number, *names in heads]


@pytest.fixture
def package(tmp_path):
    return Path(shutil.copytree(ROOT / "minilora", tmp_path / "minilora", ignore=shutil.ignore_patterns("__pycache__")))


PAGE = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")


def replace(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_page_and_code_fit(package):
    assert equations.problems(stated(PAGE), equations.find_lines(package)) == []


def test_a_line_is_found_where_it_is(package):
    line = next(x for x in equations.find_lines(package) if x.number == 5)
    assert line.module == "minilora.lora"
    assert "# eq. (5)" in (package / "lora.py").read_text(encoding="utf-8").splitlines()[line.lineno - 1]
    assert line.code == "dA = rows(dh).T @ rows(x)"


def test_a_number_that_comes_twice_in_a_file_has_two_anchors(package):
    assert [x.anchor for x in equations.find_lines(package) if x.number == 5] == ["eq-5", "eq-5-2"]


def test_a_number_in_a_string_is_no_line(package):
    (package / "new.py").write_text('"""See # eq. (99)."""\n', encoding="utf-8")
    assert 99 not in [x.number for x in equations.find_lines(package)]


BROKEN = [
    ("a comment is lost", "lora.py", "  # eq. (6)", "  #", r"equation (6) has no line of code"),
    ("a comment is new", "lora.py", "# eq. (6)", "# eq. (66)", "no equation (66)"),
    ("a variable of an equation is renamed", "lora.py", "dA = ", "gradient = ", "equation (5) speaks of dA"),
    ("an attribute is renamed", "lora.py", "lora_B", "up", "equation (2) speaks of lora_B"),
    ("a number moves to the wrong line", "optim.py", "# eq. (22)", "# eq. (23)", "equation (22) has no line"),
    ("a file is lost", "losses.py", "# eq.", "#", "equation (15) has no line"),
]


@pytest.mark.parametrize(("what", "file", "old", "new", "said"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_break_in_the_code_is_found(package, what, file, old, new, said):
    replace(package / file, old, new)
    assert any(said in problem for problem in equations.problems(stated(PAGE), equations.find_lines(package)))


def test_an_equation_stated_twice_is_found(package):
    twice = [*stated(PAGE), (5, ["dA"])]
    assert "equation (5) is stated 2 times" in equations.problems(twice, equations.find_lines(package))


# --- the same, by a real build of a small site ------------------------------------------------------------------------

CONF = """
import sys
from pathlib import Path
sys.path[:0] = [{docs!r}, str(Path(__file__).parent)]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "equations"]
myst_enable_extensions = ["dollarmath"]
equations_package = Path(__file__).parent / "tiny"
"""
INDEX = """# Tiny

```{toctree}
derivation
```

```{eval-rst}
.. automodule:: tiny.layer
   :members:
```
"""
LAYER = 'def double(x):\n    """Double."""\n    y = 2 * x  # eq. (1)\n    return y\n'
DERIVATION = "# Derivation\n\nSee [(1)](#eq-1).\n\n```{equation} 1 y x\ny = 2 x\n```\n"


def build(folder, layer=LAYER, derivation=DERIVATION, index=INDEX):
    pytest.importorskip("myst_parser")
    (folder / "tiny").mkdir()
    (folder / "tiny" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "tiny" / "layer.py").write_text(layer, encoding="utf-8")
    (folder / "conf.py").write_text(CONF.format(docs=str(ROOT / "docs")), encoding="utf-8")
    (folder / "derivation.md").write_text(derivation, encoding="utf-8")
    (folder / "index.md").write_text(index, encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(folder), str(folder / "html")]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_build_links_both_ways(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "html" / "derivation.html").read_text(encoding="utf-8")
    source = (tmp_path / "html" / "_modules" / "tiny" / "layer.html").read_text(encoding="utf-8")
    assert 'id="eq-1"' in page
    assert 'href="_modules/tiny/layer.html#eq-1"' in page
    assert "tiny/layer.py:3" in page
    assert '<a class="eq" id="eq-1" href="../../derivation.html#eq-1">' in source


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": LAYER.replace("# eq. (1)", "# eq. (2)")}, "no equation (2)"),
        ({"layer": LAYER.replace("# eq. (1)", "")}, "equation (1) has no line of code"),
        ({"layer": LAYER.replace("y", "z")}, "equation (1) speaks of y"),
        ({"derivation": DERIVATION.replace("} 1", "} 3")}, "equation (3) has no line of code"),
        (
            {"index": INDEX.replace("automodule:: tiny.layer\n   :members:", "math:: 1")},
            "is tiny.layer on the API page?",
        ),
    ],
    ids=["other number", "no number", "renamed variable", "other equation", "module without a source page"],
)
def test_the_build_stops_on_a_dangling_end(tmp_path, change, said):
    done = build(tmp_path, **change)
    assert done.returncode != 0
    assert said in done.stderr
