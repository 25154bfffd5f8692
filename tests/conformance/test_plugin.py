"""The pytest plugin: pytest finds a test for each claim and problem, from any folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.conformance.plugin import lora_cases  # imported once here; otherwise each inner run would import it again

from .implementations import PLAIN, beside_forward

pytest_plugins = ["pytester"]
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
FILES = {
    "my_lora.py": MODULE,
    "known.txt": f"{ID}  rank 1: our issue 12\n",
    "stale.txt": "linear-5-forward  gone\nlinear-0-merge  not offered\n",
    "odd.txt": f"{ID}\n",
    "nobody.txt": "linear-99-forward  which\n",
}
PLUGIN = ["-p", "minilora.conformance.plugin", "--pyargs", "minilora.conformance.test_implementation"]
WORKFLOW = Path(__file__).parents[2] / "examples" / "conformance" / "workflow.yml"


@pytest.fixture
def run(pytester, monkeypatch):
    """Return a function that runs pytest in this process, in a folder with the files and without other plugins."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "yes")
    for name, text in FILES.items():
        pytester.path.joinpath(name).write_text(text, encoding="utf-8")
    return lambda *argv: pytester.runpytest_inprocess("-p", "no:cacheprovider", "-rA", *argv)


def outcomes_of(done):
    """Return the numbers of tests by outcome, without the warning that the plugin is already imported."""
    return {what: count for what, count in done.parseoutcomes().items() if what != "warnings"}


def became(done):
    """Return the outcome of each test by the id in its brackets."""
    return {m[2]: m[1] for line in done.outlines if (m := re.match(r"([A-Z]+) .*\[(\S+)\]", line))}


SAID = [
    ("--lora my_lora:of_two_kinds", 1, "my_lora:of_two_kinds: WRONG: rslora: rsLoRA's root is ignored"),
    ("--lora my_lora --lora-xfails known.txt", 0, "1 xfailed"),
    ("--lora my_lora --lora-xfails known.txt", 0, "my_lora: fails as is known: in float64; 1 of 5 functions offered"),
    ("--lora my_lora --lora-xfails stale.txt", 1, "3 failed"),
    ("--lora my_lora --lora-xfails odd.txt", 4, "line 1: expected an id and a reason"),
    ("--lora my_lora:nothing", 4, "--lora my_lora:nothing: "),
    (
        "--lora my_lora:raises",
        1,
        "the implementation could not be checked: my_lora:raises: forward raises RuntimeError: boom",
    ),
    ("--lora-xfails known.txt", 4, "--lora-xfails needs --lora MODULE[:OBJECT]"),
    ("", 2, "expected --lora MODULE[:OBJECT], the LoRA to check"),
]


@pytest.mark.parametrize(("line", "code", "said"), SAID)
def test_pytest_says_what_the_command_says(run, line, code, said):
    done = run(*PLUGIN, *line.split())
    text = "\n".join(done.outlines + done.errlines)
    assert done.ret == code, text
    assert said in text
    assert "INTERNALERROR" not in text


def test_each_claim_and_problem_is_a_test_by_its_id(run, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = run(*PLUGIN, "--lora", "my_lora")
    found = became(done)
    assert [id for id, word in found.items() if word == "FAILED"] == [ID]
    assert found["linear-0-forward"] == "PASSED"
    assert outcomes_of(done) == {"failed": 1, "passed": 29, "skipped": 40}
    assert done.ret == 1
    assert "my_lora: WRONG: the output, where r is 1, is off by 1 " in "\n".join(done.outlines)
    (line,) = [line for line in done.outlines if line.startswith("::error")]
    assert line.startswith("::error title=minilora conformance::my_lora: the output, where r is 1, is off by 1 ")


def test_a_module_in_the_folder_takes_precedence(run, pytester, monkeypatch):
    pytester.mkdir("other").joinpath("my_lora.py").touch()
    monkeypatch.syspath_prepend(pytester.path / "other")
    assert run(*PLUGIN, "--lora", "my_lora:right").ret == 0


@pytest.mark.parametrize(
    ("xfails", "outcomes", "said"),
    [
        (", xfails='known.txt'", {"xfailed": 1, "passed": 29, "skipped": 40},
         "rank 1: our issue 12: the output is off"),
        (f", xfails={{'{ID}': 'a', 'linear-0-merge': 'b'}}", {"failed": 1, "xfailed": 1, "passed": 29, "skipped": 39},
         "listed as a known failure (b), but is not offered: remove its line"),
        (", xfails={'linear-99-forward': 'which'}", {"errors": 1},
         "'linear-99-forward' is listed as a known failure, but no test has this id"),
    ],
)  # fmt: skip
def test_the_decorator_makes_tests_in_any_test_file(run, pytester, xfails, outcomes, said):
    pytester.syspathinsert()
    pytester.makepyfile(
        f"""
        import my_lora
        from minilora.conformance.plugin import lora_cases

        @lora_cases(my_lora{xfails})
        def test_my_lora(case):
            case()
        """
    )
    done = run()
    assert outcomes_of(done) == outcomes
    assert said in "\n".join(done.outlines)


def forward(*arrays):
    if not arrays[-1]:
        raise ValueError("alpha is 0")
    return PLAIN.forward(*arrays)


@pytest.mark.parametrize(
    ("id", "outcome", "said"),
    [
        ("linear-0-merge", pytest.fail, ["merge returns the weight unchanged"]),
        ("linear-start", pytest.skip, []),
        ("linear-alpha-of-0", pytest.skip, []),
    ],
)
def test_a_case_reports_only_its_own_mistakes(id, outcome, said):
    mine = beside_forward(forward=forward, backward=lambda *arrays: {}, merge=lambda weight, *factors: weight)
    cases = {case.id: case.values[0] for case in lora_cases(mine).args[1]}
    with pytest.raises(outcome.Exception) as told:
        cases[id]()
    assert str(told.value).splitlines()[1:] == said


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the workflow's shell is of POSIX")
def test_the_workflow_of_the_site_runs(tmp_path, monkeypatch):
    """All commands but the one that installs are run."""
    monkeypatch.chdir(tmp_path)
    steps = re.findall(r"- run: >-\n((?: {10}.*\n)+)", WORKFLOW.read_text(encoding="utf-8"))
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "lora-xfails.txt").write_text(FILES["known.txt"], encoding="utf-8")
    commands = [" ".join(step.split()).replace("python ", f'"{sys.executable}" ', 1) for step in steps]
    assert len(commands) == 2
    for more, status in (("forward,slope,merge", 1), ("forward", 0)):  # backward and merge are not offered
        line = commands[0].replace("forward,slope,merge", more)
        assert subprocess.run(["sh", "-c", line], capture_output=True).returncode == status
    assert subprocess.run(["sh", "-c", commands[1]], capture_output=True).returncode == 0
    assert all((tmp_path / name).exists() for name in ("lora.json", "lora.xml"))
    (tmp_path / "my_lora.py").write_text(
        MODULE.replace("(len(A) == 1)", "0"), encoding="utf-8"
    )  # repaired, so the known failure is stale
    for command in commands:
        assert subprocess.run(["sh", "-c", command], capture_output=True).returncode == 1
