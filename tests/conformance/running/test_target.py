"""What is named on a command line is found, imported and checked."""

import json
import os
import sys

import pytest

from minilora import cli
from minilora.cli import judge as command
from minilora.conformance import CannotRun
from minilora.conformance.problems.tolerance import UNIT
from minilora.conformance.running import child_process as apart
from minilora.conformance.running.target import imported

MODULE = """
import numpy as np

def forward(x, weight, bias, lora_A, lora_B, alpha):
    y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return y if bias is None else y + bias

class wrong:
    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        return forward(x, weight, bias, lora_A, lora_B, alpha * len(lora_A))
"""


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("my_lora", 0, "my_lora: passed, in float64; 1 of 5 functions offered"),
        ("my_lora:wrong", 1, "alpha is not divided by the rank"),
        pytest.param("my_lora.py:wrong", 1, "alpha is not divided by the rank", marks=pytest.mark.long),
        pytest.param("./my_lora.py", 0, "./my_lora.py: passed", marks=pytest.mark.long),
        pytest.param("my_lora:nothing", 2, "my_lora:nothing could not be checked: ", marks=pytest.mark.long),
        pytest.param("no_such", 2, "no_such could not be checked: No module named 'no_such'", marks=pytest.mark.long),
    ],
)
def test_the_command_line_checks_a_module(tmp_path, monkeypatch, capfd, target, code, said):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["conformance", target, "--json", "found.json"]) == code
    out, err = capfd.readouterr()
    assert (out if code < 2 else err).startswith(said)
    assert (tmp_path / "found.json").exists() is (code < 2)
    if code < 2:
        assert not err
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["passed"], found["status"]) == (code == 0, code)
        assert set(found["versions"]) == {"minilora", "numpy", "python"}
        assert [case["id"] for case in found["cases"] if case["failed"]] == found["failing"] == found["unexpected"]
        assert found["functions"] == {"forward": True, "backward": False, "merge": False, "init": False, "step": False}


@pytest.mark.parametrize(
    ("target", "content", "said"),
    [
        (
            "raises_now",
            "x = 1\nraise RuntimeError('boom')",
            "importing it raises RuntimeError: boom (raises_now.py, line 2)",
        ),
        ("exits_now", "raise SystemExit(0)", "importing it raises SystemExit: 0 (exits_now.py, line 1)"),
        ("no_python", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("no_python.py", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("other/no_python.py", "", "there is no file 'other/no_python.py'"),
        ("./no_python", "", "expected the name of a module"),
        (":forward", "", "expected the name of a module"),
        ("needs_more", "import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, monkeypatch, target, content, said):
    file = tmp_path / f"{target.removeprefix('./').removesuffix('.py').strip(':')}.py"
    if content:
        file.write_text(content + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises((CannotRun, ImportError)) as refused:
        imported(target)
    assert str(refused.value).startswith(said)


def test_a_file_is_imported_whatever_has_its_name(tmp_path, monkeypatch):
    """And the modules that lie beside it are found."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "string.py").write_text("from beside import forward\n", encoding="utf-8")
    (folder / "beside.py").write_text("forward = 'found'\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    assert imported(f"{folder}/string.py:forward") == "found"


def test_the_command_knows_every_precision():
    assert set(command.DTYPES) == set(UNIT)
    assert command.TIMEOUT == apart.TIMEOUT == 20


@pytest.mark.parametrize(
    ("target", "output"),
    [
        ("my_lora", "my_lora.py"),
        ("my_lora.py:wrong", "my_lora.py"),
        ("box.inner", "box/inner.py"),
        ("box:a", "box/__init__.py"),
    ],
)
def test_a_report_never_takes_the_place_of_the_implementation(tmp_path, monkeypatch, capsys, target, output):
    (tmp_path / "box").mkdir()
    for name in ("my_lora.py", "box/__init__.py", "box/inner.py"):
        (tmp_path / name).write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["conformance", target, "--json", output]) == 2
    assert f"--json '{output}' is the implementation, expected another file" in capsys.readouterr().err
    assert (tmp_path / output).read_text(encoding="utf-8") == MODULE


def test_a_report_never_takes_the_place_of_the_known_failures(tmp_path, monkeypatch, capsys):
    (tmp_path / "known").write_text("# none\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["conformance", "my_lora", "--xfails", "known", "--json", "./known"]) == 2
    assert "is the known failures" in capsys.readouterr().err
    assert (tmp_path / "known").read_text(encoding="utf-8") == "# none\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes in a folder are POSIX's")
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_report_goes_into_a_regular_file_alone(tmp_path, monkeypatch, capsys, kind):
    (tmp_path / "other").write_text("x")
    os.mkfifo(tmp_path / "found") if kind == "pipe" else os.symlink("other", tmp_path / "found")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["conformance", "my_lora", "--json", "found"]) == 2
    assert "expected a regular file or a new name" in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == "x"
