"""The suite in somebody's own tests: pytest finds a test for each claim and problem, from any folder."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minilora import cli
from minilora.conformance.plugin import Held

MODULE = """
def forward(x, weight, bias, A, B, alpha):
    y = x @ weight.T + alpha / len(A) * x @ A.T @ B.T + (len(A) == 1)
    return y if bias is None else y + bias

class right:
    @staticmethod
    def forward(x, weight, bias, A, B, alpha):
        y = x @ weight.T + alpha / len(A) * x @ A.T @ B.T
        return y if bias is None else y + bias

class of_two_kinds(right):
    kinds = {"rslora": right}  # alpha / r in place of its root

class raises:
    @staticmethod
    def forward(*arrays):
        raise RuntimeError("boom")
"""
ID = "linear-6-forward"
WORKFLOW = Path(__file__).parents[2] / "examples" / "conformance" / "workflow.yml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "known.txt").write_text(f"{ID}  rank 1: our issue 12\n", encoding="utf-8")
    (tmp_path / "stale.txt").write_text("linear-5-forward  gone\nlinear-0-merge  not offered\n", encoding="utf-8")
    (tmp_path / "odd.txt").write_text(f"{ID}\n", encoding="utf-8")
    (tmp_path / "nobody.txt").write_text("linear-99-forward  which\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv, env=None):
    line = [sys.executable, "-m", "pytest", "-p", "minilora.conformance.plugin", "--pyargs"]
    line += ["minilora.conformance.test_implementation", "--junitxml=junit.xml", "-p", "no:cacheprovider", *argv]
    return subprocess.run(line, capture_output=True, text=True, env=env)


def outcomes(folder):
    """What became of each test, by the words in brackets of its name."""
    cases = ElementTree.parse(folder / "junit.xml").iter("testcase")
    return {case.get("name").partition("[")[2].rstrip("]"): [child.tag for child in case] for case in cases}


def test_what_is_held_has_an_outcome_for_each_test(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    held = Held("my_lora", {})
    assert [held.outcome(id).id for id in held.ids] == held.ids
    said = held.why(held.outcome(ID)).splitlines()
    assert len(said) == 2
    assert said[0].startswith("the output is off by 1 at ")
    assert said[1].startswith("the output, at rank 1, is off by 1 at ")
    two = Held("my_lora:of_two_kinds", {})
    said = two.why(two.outcome("rslora-0-forward")).splitlines()
    assert said[0].startswith("the output is off by ")
    assert said[1].startswith("rsLoRA's root is ignored")
    assert Held("my_lora:raises", {}).report.startswith("my_lora:raises: forward raises RuntimeError: boom")


@pytest.mark.long
def test_pytest_gives_a_test_for_each_claim_and_problem(folder, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = run("--lora", "my_lora")
    assert done.returncode == 1, done.stdout + done.stderr
    found = outcomes(folder)
    assert [id for id, tags in found.items() if tags == ["failure"]] == [ID]
    assert found["linear-0-forward"] == []
    assert found["linear-0-slope"] == ["skipped"]
    assert "the output, at rank 1, is off by 1 " in done.stdout
    assert "my_lora: WRONG, in float64; 1 of 5 functions offered" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("::error")]
    assert line.startswith("::error title=minilora conformance::my_lora: the output, at rank 1, is off by 1 ")
    assert cli.main(["conformance", "my_lora", "--json", "found.json"]) == 1
    cases = json.loads((folder / "found.json").read_text())["cases"]
    assert [case["id"] for case in cases] == list(found)


@pytest.mark.long
@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--lora", "my_lora:right"], 0, "my_lora:right: passed"),
        (["--lora", "my_lora.py:right"], 0, "my_lora.py:right: passed"),
        (["--lora", "my_lora", "--lora-xfails", "known.txt"], 0, "1 xfailed"),
        (["--lora", "my_lora", "--lora-xfails", "known.txt", "--runxfail"], 1, "1 failed"),
        (["--lora", "my_lora", "--lora-xfails", "stale.txt"], 1, "3 failed"),
        (["--lora", "my_lora", "--lora-xfails", "odd.txt"], 4, "line 1: expected an id and a reason"),
        (["--lora", "my_lora", "--lora-xfails", "nobody.txt"], 4, "'linear-99-forward' is the id of no test"),
        (["--lora", "my_lora", "--lora-xfails", "none.txt"], 4, "none.txt"),
        (["--lora", "my_lora:nothing"], 4, "--lora my_lora:nothing: "),
        (["--lora", "no_such_module"], 4, "--lora no_such_module: No module named 'no_such_module'"),
        (["--lora", "my_lora:raises"], 1, "my_lora:raises could not be checked: "),
        (["--lora-xfails", "known.txt"], 4, "--lora-xfails: expected --lora MODULE[:OBJECT] with it"),
        ([], 2, "expected --lora MODULE[:OBJECT], the LoRA to be checked"),
    ],
)
def test_pytest_says_what_the_command_says(folder, argv, code, said):
    done = run(*argv)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--xfails", "known.txt"], 0, "1 of 1 known failures fail as they should"),
        (["--xfails", "stale.txt"], 1, "linear-0-merge is known to fail, and is not offered: take its line out"),
        (["--xfails", "known.txt", "--require", "forward,slope"], 1, "linear: slope is required, and not offered"),
        (["--xfails", "known.txt", "--require", "forward,nothing-is-changed"], 0, "1 of 1 known"),
        (["--xfails", "odd.txt"], 2, "odd.txt': line 1: expected an id and a reason"),
        (["--require", "froward"], 2, "--require: there is no claim 'froward'; there are forward, scaling, slope"),
    ],
)
@pytest.mark.long
def test_the_command_takes_known_failures_and_requirements(folder, capfd, argv, code, said):
    assert cli.main(["conformance", "my_lora", *argv]) == code
    out, err = capfd.readouterr()
    assert said in (out if code < 2 else err)


@pytest.mark.long
@pytest.mark.parametrize(("target", "lines"), [("my_lora", 1), ("my_lora:right", 0), ("my_lora:raises", 1)])
def test_github_is_shown_what_is_wrong(folder, capfd, monkeypatch, target, lines):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    cli.main(["conformance", target])
    shown = [line for line in "".join(capfd.readouterr()).splitlines() if line.startswith("::error title=")]
    assert len(shown) == lines


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the workflow's shell is of POSIX")
def test_the_workflow_of_the_site_runs(folder):
    """All of its commands but that which installs."""
    steps = re.findall(r"- run: >-\n((?: {10}.*\n)+)", WORKFLOW.read_text(encoding="utf-8"))
    (folder / "lora-xfails.txt").write_text(f"{ID}  rank 1: our issue 12\n", encoding="utf-8")
    module = (folder / "my_lora.py").read_text(encoding="utf-8")
    commands = [" ".join(step.split()).replace("python ", f'"{sys.executable}" ', 1) for step in steps]
    assert len(commands) == 2
    for more, status in (("forward,slope,merge", 1), ("forward", 0)):  # backward and merge are not offered
        line = commands[0].replace("forward,slope,merge", more)
        assert subprocess.run(["sh", "-c", line], capture_output=True).returncode == status
    assert subprocess.run(["sh", "-c", commands[1]], capture_output=True).returncode == 0
    assert all((folder / name).exists() for name in ("lora.json", "lora.xml"))
    (folder / "my_lora.py").write_text(module.replace("(len(A) == 1)", "0"), encoding="utf-8")  # repaired: a stale line
    for command in commands:
        assert subprocess.run(["sh", "-c", command], capture_output=True).returncode == 1
