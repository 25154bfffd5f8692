"""The pages as notebooks: what stands in them, and that each runs alone beside the wheel."""

import fcntl
import importlib
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

notebooks = importlib.import_module("notebooks")

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
LONG = {"article-run"}  # the article in full: minutes


@pytest.fixture(scope="module")
def made():
    return {name: notebooks.notebook(name) for name in PAGES}


def sources(book, kind):
    return [cell["source"] for cell in book["cells"] if cell["cell_type"] == kind]


def code_of_the_page(name):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    cells = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```$", text, re.S | re.M)
    return [re.sub(r"\A(---\n.*?\n---\n|(:[^\n]*\n)+)", "", cell, flags=re.S).strip("\n") for cell in cells]


def text_alone(book):
    """Return a notebook's Markdown without its blocks of code."""
    return re.sub(r"^(`{3,})[^`]*?\n.*?^\1$", "", "\n\n".join(sources(book, "markdown")), flags=re.S | re.M)


@pytest.mark.site
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_a_valid_notebook(made, name):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.from_dict(made[name]))
    assert made[name]["cells"][0]["source"].startswith("# ")
    assert made[name]["metadata"]["kernelspec"]["display_name"]


@pytest.mark.site
@pytest.mark.parametrize("name", PAGES)
def test_a_notebooks_code_is_its_pages(made, name):
    code, page = sources(made[name], "code"), code_of_the_page(name)
    first = len(code) - len(page)
    assert code[first:] == page
    assert all("minilora-pages" in cell or cell.startswith(("%%writefile ", "%%html")) for cell in code[:first])


@pytest.mark.site
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_that_jupyter_cannot_read(made, name):
    text = text_alone(made[name])
    assert "```" not in text
    assert re.findall(r"\{[\w:-]+\}`|^%.*|^\(.*\)=$|^: .*|\\of\{|^:::.*|\]\([^)]*\.md[^)]*\)", text, re.M) == []
    assert text.count("$$") % 2 == 0


@pytest.mark.site
@pytest.mark.parametrize("name", PAGES)
def test_every_link_between_notebooks_leads_somewhere(made, name):
    links = re.findall(r"\]\(([\w-]+\.ipynb)?(#[^)]+)?\)", text_alone(made[name]))
    assert links or name not in ("index", "choosing", "derivation")
    for file, place in links:
        target = made[file.removesuffix(".ipynb") or name]
        ids = re.findall(r'<a id="([\w-]+)"></a>', "\n".join(sources(target, "markdown")))
        headings = [re.sub("[`*]", "", line) for line in re.findall(r"^#+ (.*)$", text_alone(target), re.M)]
        assert not place or unquote(place[1:]) in {*ids, *(heading.replace(" ", "-") for heading in headings)}


@pytest.mark.site
def test_an_equation_has_its_number_and_its_line(made):
    (cell,) = [text for text in sources(made["derivation"], "markdown") if r"\tag{5}" in text]
    line = next(line for line in notebooks.numbered_lines() if line.label == "5" and line.module == "minilora.lora")
    assert f"`{line.code}` (*minilora/lora.py, line {line.lineno}*)" in cell
    assert '<a id="eq-5"></a>' in cell
    assert r"\underset{\smash{(r,\,in)}\vphantom{)}}{dA}" in cell


@pytest.mark.site
def test_a_macros_braces_may_hold_braces():
    assert notebooks.tex(r"\of{W_{1}^{\top}}{r,\,\text{in}} + 1") == (
        r"\underset{\smash{(r,\,\text{in})}\vphantom{)}}{W_{1}^{\top}} + 1"
    )


@pytest.mark.site
def test_an_included_method_shows_its_numbered_lines(made):
    """Lines are counted from the method's first: a longer docstring moves them."""
    (cell,) = [text for text in sources(made["the-idea"], "markdown") if "def forward" in text]
    block = re.search(r"```python\n(.*?)```", cell, re.S)[1]
    assert [line.split("# eq. ")[1][:3] for line in block.splitlines() if "# eq." in line] == ["(1)", "(2)"]
    assert '"""' not in block
    assert block.splitlines()[-1].startswith("    return y")


@pytest.mark.site
def test_what_pages_share_is_written_by_the_notebook(made):
    code = sources(made["four-bits"], "code")
    written = {cell.split()[1]: cell.partition("\n")[2] for cell in code if cell.startswith("%%writefile ")}
    assert set(written) == {"hands.py", "pictures.py", "costs.py", "ranks.py", "four-bits.json"}
    for file, text in written.items():
        assert text == (ROOT / "docs" / file).read_text(encoding="utf-8").rstrip()
    assert '".[plot]"' in sources(made["four-bits"], "markdown")[1]
    assert '".[plot,models]"' in sources(made["experts"], "markdown")[1]


def test_a_page_runs_again_where_something_that_it_reads_has_changed(monkeypatch, tmp_path):
    page = "words\n\n```{code-cell} ipython3\nimport pictures\n```\n"
    first = notebooks.inputs(page)
    assert notebooks.inputs(page.replace("words", "other words")) == first
    assert notebooks.inputs(page.replace("pictures", "pictures, hands")) != first
    monkeypatch.setattr(notebooks, "shared", lambda code: [tmp_path / "pictures.py"])
    (tmp_path / "pictures.py").write_text("changed = True")
    assert notebooks.inputs(page) != first
    monkeypatch.undo()
    assert notebooks.inputs(page) == first
    monkeypatch.setattr(notebooks, "surroundings", lambda: b"another package")
    assert notebooks.inputs(page) != first


@pytest.mark.site
def test_notes_and_formulas_in_directives_are_shown(monkeypatch):
    note = "```{note}\nOne.\n\nTwo.\n```"
    tip = "```{tip} My title\nThree.\n```"
    formula = "```{math}\n:label: m\n\na &= b \\\\ c &= d\n```"
    page = "\n\n".join(["# A", note, tip, formula, ""])
    monkeypatch.setattr(notebooks, "pages", lambda: {"index": page})
    text = notebooks.notebook("index")["cells"][0]["source"]
    assert "> **Note.** One.\n> \n> Two.\n" in text
    assert "> **My title.** Three.\n" in text
    assert text.endswith("$$\n\\begin{aligned}a &= b \\\\ c &= d\\end{aligned}\n$$")


@pytest.mark.site
def test_an_unknown_directive_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(notebooks, "pages", lambda: {"index": "# A\n\n```{figure} x.png\n```\n"})
    with pytest.raises(notebooks.BadPage, match=r"index\.md: no notebook can show \{figure\}"):
        notebooks.notebook("index")


@pytest.mark.site
def test_a_link_to_nowhere_is_refused(monkeypatch):
    for target in ("lost.md", "lost.md#here", "#lost", "index.md#lost"):
        monkeypatch.setattr(notebooks, "pages", lambda target=target: {"index": f"# A\n\n[x]({target})\n"})
        with pytest.raises(notebooks.BadPage, match=f"index.md: there is nothing at {target}"):
            notebooks.notebook("index")


@pytest.mark.site
def test_the_command_writes_all_pages_without_sphinx(tmp_path, monkeypatch, capsys):
    for module in ("sphinx", "docutils", "myst_nb", "myst_parser"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "notebooks")
    fresh = importlib.import_module("notebooks")
    monkeypatch.setattr(fresh, "numbered_lines", notebooks.numbered_lines)  # found already
    monkeypatch.setattr(sys, "argv", ["notebooks.py", str(tmp_path / "new")])
    assert fresh.main() == 0
    assert sorted(path.stem for path in (tmp_path / "new").iterdir()) == PAGES
    assert capsys.readouterr().out == f"{len(PAGES)} notebooks in {tmp_path / 'new'}\n"
    monkeypatch.setattr(sys, "argv", ["notebooks.py"])
    assert fresh.main() == 2


# --- with the site's tools --------------------------------------------------------------------------------------------


@pytest.mark.site
@pytest.mark.parametrize("name", PAGES)
def test_mysts_own_reader_finds_the_same_code(made, name):
    read = pytest.importorskip(
        "myst_nb.core.read", reason="the site's tools are not installed: pip install -e '.[docs]'"
    )
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    theirs = [cell["source"] for cell in read.read_myst_markdown_notebook(text)["cells"] if cell["cell_type"] == "code"]
    code = sources(made[name], "code")
    assert code[len(code) - len(theirs) :] == [source.strip("\n") for source in theirs]


@pytest.fixture(scope="module")
def python_with(tmp_path_factory):
    """Return a function that makes an environment of the built wheel, some of its extras, and Jupyter's kernel.

    The processes of a run share them. One with extras sees the one without, and has what the extras add.
    """
    pytest.importorskip("build", reason="build is not installed")
    base = tmp_path_factory.getbasetemp()  # of this process; its parent is of the run
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "environments"
    folder.mkdir(exist_ok=True)
    plain = folder / "plain" / "bin" / "python"

    def install(home, what, *, pip):
        wheel = next(folder.glob("*.whl"))
        command = [plain, "-m", "pip", "--python", home, "install", "--quiet", "--no-compile", f"{wheel}{what}", *pip]
        if subprocess.run(command).returncode:
            shutil.rmtree(home)
            pytest.skip("pip finds no packages here")

    def make(extras):
        home = folder / (extras or "plain")
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not any(folder.glob("*.whl")):
                build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
                subprocess.run(build, check=True)
            if not plain.exists():
                venv.create(folder / "plain", with_pip=True)
                install(folder / "plain", "", pip=["ipykernel", "nbclient"])
            if not home.exists():
                venv.create(home)
                (packages,) = home.glob("lib/python*/site-packages")
                (packages / "plain.pth").write_text(f"{next(plain.parents[1].glob('lib/python*/site-packages'))}\n")
                install(home, extras, pip=[])
        return home / "bin" / "python"

    return make


RUN = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], 4)
NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(book, sys.argv[1])
"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in LONG else pytest.mark.site) for name in PAGES]
)
def test_a_notebook_runs_in_an_empty_folder(made, python_with, tmp_path, name):
    """With the wheel, the extras that it names, and nothing of the checkout."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    extras = "".join(re.findall(r'-e "\.(\[[\w,]+\])"', sources(made[name], "markdown")[1]))
    book, empty = tmp_path / f"{name}.ipynb", tmp_path / "empty"
    nbformat.write(nbformat.from_dict(made[name]), book)
    empty.mkdir()
    run = [python_with(extras), "-c", RUN, book]
    env = {"PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=empty, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = [output for cell in nbformat.read(book, 4)["cells"] for output in cell.get("outputs", ())]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert outputs or not sources(made[name], "code")
    assert {path.name for path in empty.iterdir()} <= {"minilora-pages"}


@pytest.mark.site
def test_the_sliders_of_a_notebook_move(browser, tmp_path):
    """A notebook adds its figures after the script of the folded cell has run."""
    pytest.importorskip("IPython", reason="the site's tools are not installed: pip install -e '.[docs]'")
    figure = importlib.import_module("hands").levels_under_the_bell().data
    page = tmp_path / "notebook.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{notebooks.sliders()}</body>", encoding="utf-8")
    browser.get(page.as_uri())
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", figure)
    shown = browser.find_element("css selector", "figure.hands.live")
    says = shown.find_element("css selector", ".says")
    slider = shown.find_element("css selector", "input[type=range]")
    assert slider.is_displayed()
    before = says.text
    browser.execute_script(
        "arguments[0].value = arguments[0].value == 0 ? 1 : 0; arguments[0].dispatchEvent(new Event('input'))", slider
    )
    assert says.text not in ("", before)
    assert browser.execute_script(
        "return getComputedStyle(document.querySelector('figure.hands .line.lora')).stroke"
    ) == ("rgb(232, 116, 59)")
