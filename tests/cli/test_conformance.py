"""``minilora conformance``: its exit codes, its report as JSON, and what happens where it cannot be written."""

import io
import json
import os
import subprocess
import sys

import pytest

from minilora import cli
from minilora.cli import judge as command
from minilora.conformance import __main__ as door
from minilora.conformance import check
from minilora.conformance.checking import child
from minilora.conformance.problems.tolerance import UNIT

from ..conformance.implementations import OURS, implementation

MODULE = """
def forward(x, weight, bias, lora_A, lora_B, alpha):
    y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return y if bias is None else y + bias

class wrong:
    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        return forward(x, weight, bias, lora_A, lora_B, alpha * len(lora_A))

class speaks:
    @staticmethod
    def forward(*arrays):
        raise ValueError("\\x1b[31mred\\x07")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("my_lora", 0, "my_lora: passed: in float64; 1 of 5 functions offered"),
        ("my_lora:wrong", 1, "my_lora:wrong: WRONG: alpha is not divided by the rank"),
        pytest.param("my_lora:speaks", 2, r"my_lora:speaks could not be checked: my_lora:speaks: forward raises "
                     r"ValueError: \x1b[31mred\x07 (N=7 in=5 out=3 r=2 alpha=3, a bias)", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_the_exit_code_and_the_json_say_what_is_wrong(folder, capfd, target, code, said):
    assert cli.main(["conformance", target, "--json", "found.json"]) == code
    out, err = capfd.readouterr()
    assert (out if code < 2 else err).removeprefix("minilora: ").startswith(said)
    assert (folder / "found.json").exists() is (code < 2)
    if code < 2:
        assert not err
        found = json.loads((folder / "found.json").read_text())
        assert (found["passed"], found["status"]) == (code == 0, code)
        assert set(found["versions"]) == {"minilora", "numpy", "python"}
        assert [case["id"] for case in found["cases"] if case["failed"]] == found["failing"] == found["unexpected"]
        assert found["functions"] == {"forward": True, "backward": False, "merge": False, "init": False, "step": False}


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize(("output", "why"), [(">/dev/full", "[Errno 28]"), (">&-", "there is no standard output\n")])
def test_a_report_that_cannot_be_written_is_no_verdict(folder, output, why):
    line = f'"{sys.executable}" -m minilora.conformance my_lora {output}'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"my_lora was checked, and the report could not be written: {why}")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_changes_no_verdict(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            if text:
                raise BrokenPipeError

    for right, code in ((OURS["linear"], 0), (implementation(merge=lambda weight, *arrays: weight + 1), 1)):
        report = check(right, name="mine")
        monkeypatch.setattr(child, "check_apart", lambda *given, report=report, **more: report)
        monkeypatch.setattr(sys, "stdout", Broken())
        assert door.main(["mine"]) == code


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--json", ""], "argument --json: the name is empty"),
        (["--xfails", ""], "argument --xfails: the name is empty"),
        *[([f"--timeout={text}"], f"expected a number of seconds above 0, got {text!r}")
          for text in ("0", "-1", "nan", "inf", "soon")],
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_before_the_check(monkeypatch, capsys, given, said):
    monkeypatch.setattr(child, "check_apart", lambda *given, **more: pytest.fail("the check began"))
    with pytest.raises(SystemExit) as ended:
        door.main(["my_lora", *given])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_knows_every_precision():
    assert set(command.DTYPES) == set(UNIT)
    assert command.TIMEOUT == child.TIMEOUT == 20


@pytest.mark.parametrize(("target", "output"), [("my_lora", "my_lora.py"), ("box:a", "box/__init__.py")])
def test_a_report_never_takes_the_place_of_the_implementation(folder, capsys, target, output):
    (folder / "box").mkdir()
    (folder / "box" / "__init__.py").write_text(MODULE, encoding="utf-8")
    assert cli.main(["conformance", target, "--json", output]) == 2
    assert f"--json '{output}' is the implementation, expected another file" in capsys.readouterr().err
    assert (folder / output).read_text(encoding="utf-8") == MODULE


def test_a_report_never_takes_the_place_of_the_known_failures(folder, capsys):
    (folder / "known").write_text("# none\n", encoding="utf-8")
    assert cli.main(["conformance", "my_lora", "--xfails", "known", "--json", "./known"]) == 2
    assert "is the known failures" in capsys.readouterr().err
    assert (folder / "known").read_text(encoding="utf-8") == "# none\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes in a folder are POSIX's")
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_report_goes_into_a_regular_file_alone(folder, capsys, kind):
    (folder / "other").write_text("x")
    os.mkfifo(folder / "found") if kind == "pipe" else os.symlink("other", folder / "found")
    assert cli.main(["conformance", "my_lora", "--json", "found"]) == 2
    assert "expected a regular file or a new name" in capsys.readouterr().err
    assert (folder / "other").read_text() == "x"
