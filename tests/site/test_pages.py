"""A page shows what it computes: its runner, on pages of a few lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import markup
import notebooks
import pages

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Return a function that writes a page, and its module where it has one, and returns its file."""
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    monkeypatch.setattr(markup, "DOCS", tmp_path)

    def write(text, module="", name="page"):
        (tmp_path / "learn").mkdir(exist_ok=True)
        file = tmp_path / "learn" / f"{name}.md"
        file.write_text(text, encoding="utf-8")
        if module:
            file.with_suffix(".py").write_text(module, encoding="utf-8")
        return file

    return write


SVG = '<svg role="img" aria-label="{}"><path d="M0 0"/></svg>'
DRAWS = f"from pages import picture\n# %% B\npicture('p', '<figure>{SVG}</figure>'.replace('{{}}', word))\n"


def test_a_page_shows_what_its_blocks_print(page):
    file = page("# A\n\n```python\nx = 6\nprint(x * 7)\n```\n\nMore.\n\n```python\nx += 1\n```\n")
    assert "+42" in pages.check(file)
    assert pages.check(file, write=True) == ""
    assert "print(x * 7)\n```\n\n```text\n42\n```\n\nMore." in file.read_text()
    assert pages.check(file) == ""
    file.write_text(file.read_text().replace("42\n", "43\n"))
    assert re.search(r"(?m)^-43\n\+42$", pages.check(file))


def test_a_console_shows_its_commands_and_their_output(page):
    session = "```console\n$ minilora article --epochs 0\n```\n"
    file = page(f"# A\n\n{session}", "# %% A\nassert status == 2\n")
    assert pages.check(file, write=True) == ""
    assert "$ minilora article --epochs 0\nminilora: " in file.read_text()
    assert "put 'rm -r x' into a ```sh block" in pages.check(page("# A\n\n```console\n$ rm -r x\n```\n", name="b"))


def test_a_block_that_raises_is_named_by_page_and_line(page):
    said = pages.check(page("# A\n\n```python\nx = 1\nx / 0\n```\n"))
    assert said.startswith("learn/page.md does not run:")
    assert re.search(r'page\.md", line 5, in <module>\n    x / 0\n[\s^~]*ZeroDivisionError', said)


def test_a_page_leaves_folder_and_path_as_they_were(page, monkeypatch):
    """So a program that a test starts finds what its user's program would find."""
    monkeypatch.setenv("PYTHONPATH", "mine")
    before = os.getcwd(), sys.path[:]
    told = "```python\nimport os\nprint(sorted(os.listdir()), 'examples' in os.environ['PYTHONPATH'])\n```\n"
    assert "+['docs', 'examples'] True" in pages.check(page(f"# A\n\n{told}"))
    assert "ZeroDivisionError" in pages.check(page("# A\n\n```python\n1 / 0\n```\n", name="b"))
    assert (os.getcwd(), sys.path[:], os.environ["PYTHONPATH"]) == (*before, "mine")


def test_code_that_is_not_to_run_does_not_run(page):
    assert pages.check(page("# A\n\n```py\n1 / 0\n```\n\n```sh\nexit 1\n```\n")) == ""


def test_a_modules_part_runs_after_its_headings_blocks(page):
    text = "# A\n\n```python\nx = 1\n```\n\n## B\n\n```python\nx = 2\n```\n"
    assert pages.check(page(text, '"""Of A."""\n# %% A\nassert x == 1\nown = 3\n# %% B\nassert x + own == 5\n')) == ""
    assert "AssertionError" in pages.check(page(text, "# %% A\nassert x == 2\n", name="b"))


def test_a_page_sees_none_of_its_modules_names(page):
    said = pages.check(page("# A\n\n## B\n\n```python\nprint(own)\n```\n", "# %% A\nown = 1\n"))
    assert "NameError: name 'own' is not defined" in said


def test_a_part_of_a_lost_heading_is_found(page):
    assert "no heading 'Gone'" in pages.check(page("# A\n", "# %% Gone\nassert True\n"))


def test_a_picture_is_drawn_and_its_description_shown(page):
    text = "# A\n\n## B\n\n```python\nword = 'two < three'\n```\n\n![](pictures/p.svg)\n"
    module = DRAWS.replace("word)", "word.replace('<', '&lt;'))")
    file = page(text, module)
    assert pages.check(file, write=True) == ""
    assert "![two < three](pictures/p.svg)" in file.read_text()
    drawn = (file.parent / "pictures" / "p.svg").read_text()
    assert drawn.startswith('<svg xmlns="http://www.w3.org/2000/svg" role="img"')
    assert pages.check(file) == ""
    (file.parent / "pictures" / "p.svg").write_text(drawn.replace("two", "four"))
    assert "p.svg is outdated" in pages.check(file)


def test_a_picture_that_no_module_draws_is_its_file(page):
    file = page("# A\n\n![Two.](pictures/own.svg)\n")
    svg = SVG.format("Three.")
    (file.parent / "pictures").mkdir(exist_ok=True)
    (file.parent / "pictures" / "own.svg").write_text(svg)
    assert "+![Three.](pictures/own.svg)" in pages.check(file)
    (file.parent / "pictures" / "own.svg").write_text(svg.replace("Three", "Two"))
    assert pages.check(file) == ""
    assert pages.run(file).pictures == {"own": f'<figure class="picture">{svg.replace("Three", "Two")}</figure>'}


@pytest.mark.parametrize(
    ("text", "module", "said"),
    [
        ("![](pictures/p.svg)", "", "picture p: the page's module does not make it"),
        ("", "from pages import shown\n# %% A\nshown('t', '1')\n", "text t: the page has no place for it"),
        ("<!-- live form -->\n", "", "live part form: the page's module does not make it"),
    ],
)
def test_what_is_shown_and_what_is_made_are_the_same(page, text, module, said):
    assert said in pages.check(page(f"# A\n\n{text}\n", module))


def test_a_page_says_what_its_module_computes(page):
    said = "# A\n\nIt falls by 0.25 at most.\n"
    module = "from pages import says\n# %% A\nsays(f'by {1 / 4:.2f} at most')\n"
    assert pages.check(page(said, module)) == ""
    assert "b.md does not say: by 0.25 at most" in pages.check(page(said.replace("25", "26"), module, name="b"))


NOT_SAID = "Five by 64 and 3.5 % of 1,000,000 at -100 in 5 steps."
NO_CLAIMS = """# 3. A

0, 1 and 2 of `64` with $64$, on [a page](https://a.net/64) and [one](b.md#64), by (7), (att.12) and lessons 3 and 4.

3. Float32, or [4. B](b.md).

```py
64
```

$$
y = 64 \\tag{7}
$$
"""


def test_a_number_that_nobody_says_is_refused_with_its_words(page):
    said = pages.check(page(f"# A\n\n{NOT_SAID}\n"))
    assert "its module does not say the numbers of: # A Five by 64 and 3.5 %" in said
    assert len(pages.unsaid(NOT_SAID, [], words=True)) == 6
    assert len(pages.unsaid(NOT_SAID, ["by 64 and 3.5 %", "at -100", "1,000,"], words=True)) == 3
    assert pages.unsaid(NOT_SAID, [NOT_SAID]) == []


@pytest.mark.parametrize("near", ["1.5", "2 %", "12", "10,000", "0.1"])
def test_only_zero_one_and_two_are_words(near):
    assert len(pages.unsaid(f"It falls by {near} at most.", [], words=True)) == 1


def test_code_formulas_links_and_places_are_no_numbers(page):
    page('# B\n\n<a id="64"></a>\n', name="b")
    assert pages.check(page(NO_CLAIMS)) == ""


TYPED = "```text\nloss 5.25\n```\n"
PRINTS = "```python\nprint('loss 3.25')\n```\n\n"
PRINTED = PRINTS + TYPED.replace("5.25", "3.25")
SHOWS = "<!-- t -->\n```text\nloss 4.25\n```\n<!-- end -->\n"
SHOWING = "from pages import block, says, shown\n# %% A\nshown('t', block('loss 4.25'))\n"


@pytest.mark.parametrize("above", ["", "```sh\nrun 9.25\n```\n\n", PRINTED, f"{PRINTED}\nSo:\n\n", f"{SHOWS}\n"])
def test_a_text_that_nothing_prints_or_shows_is_prose(page, above):
    text, module = f"# A\n\n{above}", SHOWING if "-- t" in above else "from pages import says\n# %% A\n"
    assert pages.check(page(text, module)) == ""
    refused = pages.check(page(text + TYPED, module, name="b"))
    assert re.search(r"b\.md: its module does not say the numbers of: [^|]*loss 5\.25[^|]*$", refused)
    assert pages.check(page(text + TYPED, f"{module}says('loss 5.25')\n", name="c")) == ""


def test_lines_quoted_from_a_file_are_no_prose():
    assert pages.unsaid("<!-- lines LICENSE -->\n```text\nCopyright (c) 2026\n```\n", []) == []


def test_the_changelogs_numbers_are_of_their_day(page):
    assert pages.check(page("# A\n\nIt has 64 tests.\n", name="changelog")) == ""


EQUATION = "# A\n\n$$\n{}\n$$\n"
HOLDS = """import numpy as np
from pages import holds, not_computed
# %% A
rng = np.random.default_rng(0)
x, A, u, v = (rng.standard_normal(shape) for shape in ((4, 5), (3, 5), 6, 6))
"""


def test_an_equation_that_no_module_computes_is_refused(page):
    said = pages.check(page(EQUATION.format("h = x A^\\top")))
    assert said.endswith("its module does not check an equation without a number: h = x A^\\top")


@pytest.mark.parametrize(
    ("tex", "wrong", "names"),
    [
        ("h = x A^\\top - 2", ("- 2", "+ 2"), "h=x @ A.T - 2, x=x, A=A"),
        ("h_{nk} = -\\sum_i x_{ni} A_{ki}", ("= -", "= "), "h=-x @ A.T, x=x, A=A"),
        ("c = 3 (u \\cdot v)", ("3 (", "2 ("), "c=3 * u @ v, u=u, v=v"),
        ("M = \\begin{bmatrix} 3 & -1 \\\\ 0.5 & 7 \\end{bmatrix}", ("-1", "1"), "M=[[3, -1], [0.5, 7]]"),
        ("A \\leftarrow \\begin{bmatrix} 2 \\\\ 3 - 0.5 \\end{bmatrix}", ("- 0", "+ 0"), "A=[[2], [2.5]]"),
        ("\\begin{aligned}\ny &= u - v \\\\\n  &= -v + u\n\\end{aligned}", ("-v +", "-v -"), "y=u - v, u=u, v=v"),
        (
            "dL_{j} = \\sum_{k} \\frac{\\partial L}{\\partial y_{k}} \\frac{\\partial y_{k}}{\\partial x_{j}}",
            ("\\sum_{k} ", "-\\sum_{k} "),
            "dL=u[:3] @ A, dy=u[:3], dydx=A",
        ),
    ],
)
def test_a_wrong_sign_in_an_equation_is_refused(page, tex, wrong, names):
    module = f"{HOLDS}holds({tex[:3]!r}, {names})\n"
    assert pages.check(page(EQUATION.format(tex), module)) == ""
    old, new = wrong
    assert tex.count(old) == 1
    assert "does not hold: it gives" in pages.check(page(EQUATION.format(tex.replace(old, new)), module, name="b"))


def test_an_equation_that_states_nothing_is_excused_by_a_reason(page):
    text = EQUATION.format("\\text{any } x")
    assert pages.check(page(text, f"{HOLDS}not_computed('\\\\text', 'a definition in words')\n")) == ""
    assert "AssertionError" in pages.check(page(text, f"{HOLDS}not_computed('\\\\text', '')\n", name="b"))
    assert "0 equations without a number begin with 'y'" in pages.check(page(text, f"{HOLDS}holds('y')\n", name="c"))


def test_a_generated_table_stands_in_the_page(page):
    file = page("# A\n\n<!-- t -->\n<!-- end -->\n\nMore.\n", "from pages import shown\n# %% A\nshown('t', '| 1 |')\n")
    assert pages.check(file, write=True) == ""
    assert "<!-- t -->\n| 1 |\n<!-- end -->\n\nMore." in file.read_text()


def test_a_recording_is_shown_to_the_last_decimal(page):
    text, module = (
        "# A\n\n<!-- t -->\nloss 0.25\n<!-- end -->\n",
        "from pages import shown\n# %% A\nshown('t', 'loss 0.26'{})\n",
    )
    assert pages.check(page(text, module.format(""))) == ""
    assert "-loss 0.25\n+loss 0.26" in pages.check(page(text, module.format(", exact=True"), name="b"))


def test_a_recordings_picture_is_described_to_the_last_decimal(page):
    text, module = "# A\n\n## B\n\n![loss 0.25](pictures/p.svg)\n", DRAWS.replace("word)", "'loss 0.26')")
    assert "+![loss 0.26]" in pages.check(page(text, module.replace("'))", "'), exact=True)")))
    file = page(text, module, name="b")
    (file.parent / "pictures").mkdir(exist_ok=True)
    (file.parent / "pictures" / "p.svg").write_text(SVG.format("loss 0.25"))
    assert pages.check(file) == ""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("loss 0.79 after", "loss 0.78 after", True),
        ("loss 0.79 after", "loss 0.77 after", False),
        ("loss 0.79 after", "gain 0.79 after", False),
        ("largest difference 3e-15", "largest difference 2e-14", True),
        ("largest difference 2e-14", "largest difference 3e-15", True),
        ("largest difference 0e+00", "largest difference 9e-16", True),
        ("largest difference 2e-07", "largest difference 2e-05", False),
        ("largest difference 2e-07", "largest difference 2e-09", False),
        ("largest difference 2e-07", "largest difference 0e+00", False),
        ("largest difference 3e-15", "largest difference 2e-3", False),
        ("76 of 90", "77 of 90", False),
        ("1,234.5", "1,234.6", True),
        ("-0.79", "0.79", False),
    ],
)
def test_processors_may_differ_by_a_last_decimal(old, new, same):
    assert pages.alike(old, new) == same


def test_where_an_error_is_largest_may_differ():
    told = "1 of 1 agree\nx  (9, 6)  54 entries  8.9e-16  1.7e-12  (3, 2)  1.704  1.704  1  ok\n"
    other = told.replace("(3, 2)  1.704  1.704", "(3, 5)   -4.564   -4.564").replace("8.9e-16", "1.8e-15")
    assert pages.alike(told, other, rounding=True)
    assert not pages.alike(told, other)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ok", "WRONG"),
        ("1 of 1", "2 of 2"),
        ("(9, 6)", "(9, 7)"),
        ("54", "45"),
        ("8.9e-16", "8.9e-13"),
        ("  1.704", "  2.704"),
        ("1  ok", "3  ok"),
    ],
)
def test_all_else_of_a_report_is_compared(right, wrong):
    told = "1 of 1 agree\nx  (9, 6)  54 entries  8.9e-16  1.7e-12  (3, 2)  1.704  1.704  1  ok\n"
    assert not pages.alike(told.replace(right, wrong, 1), told, rounding=True)


@pytest.mark.parametrize("wrong", ["(3, 4)", "4.3", "1.6", "3.9e+00"])
def test_of_a_wrong_gradient_the_place_is_compared(wrong):
    told = "x  (9, 6)  54 entries  3.5e+00  1.7e-12  (4, 2)  -3.8903  -0.3488174  11.1528274  WRONG\n"
    right = {"(3, 4)": "(4, 2)", "4.3": "-3.8903", "1.6": "11.1528274", "3.9e+00": "3.5e+00"}[wrong]
    assert not pages.alike(told.replace(right, wrong), told, rounding=True)


def test_quoted_lines_are_those_of_the_file(page):
    file = page("# A\n\n<!-- lines minilora/lora.py LoRA.forward -->\n```py\nold\n```\n")
    assert pages.check(file, write=True) == ""
    source = (ROOT / "minilora" / "lora.py").read_text()
    quoted = re.search(r"```py\n(.*?)```", file.read_text(), re.S)[1]
    assert quoted.startswith("def forward(")
    assert quoted.splitlines()[-1].strip() in source


# --- links, and what Sphinx is handed ---------------------------------------------------------------------------------


def test_a_link_to_nowhere_is_found(page):
    page('# B\n\n## One two\n\n<a id="here"></a>\n', name="b")
    targets = ["b.md#one-two", "b.md#here", "page.md", "#a", "b.md#lost", "lost.md", "#lost", "../lost/b.md"]
    file = page("# A\n\n" + "".join(f"[x]({target}) " for target in targets) + "\n\n```text\n[x](lost.md)\n```\n")
    assert markup.broken_links(file) == [f"learn/page.md: {target} leads nowhere" for target in targets[4:]]


def test_a_link_to_another_lesson_than_it_says_is_found(page):
    page("# 5. B\n\n## One two\n", name="b")
    file = page("# A\n\n[Lesson 5](b.md), [see lesson 6](b.md#one-two), [5. B](b.md), [15. B](b.md), [5 rows](b.md)\n")
    assert markup.broken_links(file) == [
        "learn/page.md: 'see lesson 6' leads to '5. B'",
        "learn/page.md: '15. B' leads to '5. B'",
    ]


def test_a_link_to_a_lesson_without_heading_is_found(page):
    page("no heading\n", name="b")
    (page("", name="b").parent / "run.py").write_text("1\n")
    file = page("# A\n\n[lesson 5](b.md), [Lesson 6](run.py), [lesson 7](../learn), [b](b.md)\n")
    assert markup.broken_links(file) == [
        "learn/page.md: 'lesson 5' leads to a page without a heading",
        "learn/page.md: 'Lesson 6' leads to a page without a heading",
        "learn/page.md: 'lesson 7' leads to a page without a heading",
    ]


def test_a_link_to_the_other_site_is_its_address():
    assert markup.address("learn", "../library/finetune.md#memory") == "library/finetune.html#memory"
    assert markup.address("library", "../learn/rank.md") == "../rank.html"
    assert markup.address("learn", "../../minilora/lora.py") == "library/reference/minilora.lora.html"
    assert markup.address("library", "../../minilora/files/__init__.py") == "reference/minilora.files.html"
    assert markup.address("learn", "alpha.md") == ""


def test_the_front_pages_lists_are_the_contents():
    lessons = "## Lessons\n\n1. [A](index.md), this page\n2. [Rank](rank.md): words\n3. [Alpha](alpha.md)\n"
    text = f"# A\n\n[x](x.md)\n\n{lessons}\n## More\n\n- [Glossary](glossary.md)\n"
    trees = re.findall(r":caption: (\w+)\n\n(.*?)```", markup.contents(text), re.S)
    assert trees == [("Lessons", "self\nrank\nalpha\n"), ("More", "glossary\n")]


def test_every_page_is_in_the_contents_of_its_site():
    for site in pages.SITES:
        folder = ROOT / "docs" / site
        listed = markup.LISTED.findall((folder / "index.md").read_text(encoding="utf-8"))
        assert sorted({*listed, "index"}) == sorted(page.stem for page in folder.glob("*.md"))
        assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("page", pages.every(), ids=lambda page: page.stem)
def test_nothing_in_a_page_is_hidden(page):
    """No directive, role or cell: a source host shows all of it."""
    text = markup.outside_fences(page.read_text(encoding="utf-8"))
    infos = {fence["info"] for fence in pages.FENCE.finditer(page.read_text(encoding="utf-8"))}
    assert not [info for info in infos if info.startswith("{")]
    assert not re.findall(r"\{[\w:-]+\}`|^%.*|^:::.*|^---$", text, re.M)
    assert markup.broken_links(page) == []


@pytest.mark.parametrize("page", pages.every(), ids=lambda page: page.stem)
def test_a_readers_code_needs_nothing_of_the_sites(page):
    own = {file.stem for file in (ROOT / "docs" / "_ext").glob("*.py")}
    running = pages.blocks(page.read_text(encoding="utf-8"))
    code = "\n".join(block["body"] for block in running if block["info"] == "python")
    assert not own & set(re.findall(r"^ *(?:import|from) (\w+)", code, re.M))
    assert [line for line in code.splitlines() if len(line) > 88] == []


# --- the pages as notebooks -------------------------------------------------------------------------------------------

RUNNING = [page for page in pages.every() if notebooks.code(page)]


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.stem)
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
    assert sorted(path.stem for path in tmp_path.rglob("*.ipynb")) == sorted(page.stem for page in RUNNING)
    assert "FileExistsError" in command().stderr
