"""The README is run: every block of Python, and what is printed under it."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from minilora.cli import _parser

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def rounded(text: str) -> str:
    """Errors of the size of rounding differ from machine to machine: keep that they are small."""
    return re.sub(r"\d\.\de-1[5-9]", "tiny", text)


def test_every_python_block_prints_what_stands_under_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them writes files
    names: dict = {}
    count = 0
    for (language, code), (after, printed) in pairwise(BLOCKS):
        if language == "python":
            exec(compile(code, str(README), "exec"), names)
            assert after == "text"
            assert rounded(capsys.readouterr().out) == rounded(printed)
            count += 1
    assert count >= 5


def test_every_file_and_folder_is_on_the_map():
    package = README.parent / "minilora"
    linked = set(re.findall(r"\(minilora/(\w+(?:\.py)?)\)", README.read_text(encoding="utf-8")))
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert linked == files | {path.parent.name for path in package.glob("*/__init__.py")}


def test_every_command_is_one_that_the_command_line_takes():
    lines = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("minilora ")]
    assert {command for command, *_ in commands} >= {"article", "inspect", "merge"}
    for command in commands:
        _parser().parse_args(command)


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (README.parent / link).exists()] == []


COMMANDS = ("pip install -e . && python -m minilora article", 'pip install -e ".[test]" && python -m pytest')


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_stand_there(command):
    assert [language for language, code in BLOCKS if command in code] == ["sh"]


def test_the_torch_wrapper_is_the_examples():
    (shown,) = [code for language, code in BLOCKS if language == "py"]
    assert shown == (README.parent / "examples" / "conformance" / "plain_torch.py").read_text(encoding="utf-8")
