"""The five commands that judge: what they refuse, and where their reports go; `test_reports` has their whole output."""

import io
import json
import sys
from inspect import signature

import pytest

from minilora import cli
from minilora.cli import judge
from minilora.conformance import __main__ as door
from minilora.conformance import check
from minilora.conformance.checking import child
from minilora.conformance.problems.tolerance import UNIT
from minilora.conformance.vectors import STARTER, VECTORS
from minilora.report import Report

from ..audit.adapters import config, factors, paths, peft
from ..conformance.implementations import OURS, implementation
from ..conformance.situations import SITUATIONS, build


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("situations")
    (folder / "box").mkdir()
    (folder / "box" / "__init__.py").write_text("def forward(*arrays): pass\n")
    build(folder)
    return folder


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


@pytest.mark.parametrize(
    ("name", "status"), [pytest.param("forward_alone", 0, marks=pytest.mark.long), ("not_divided", 1)]
)
def test_a_check_in_another_process_is_reported_the_same(inside, tmp_path, capfd, name, status):
    assert cli.main(["conformance", f"my_lora.py:{name}", "--json", str(tmp_path / "found.json")]) == status
    out, err = capfd.readouterr()
    assert not err
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["passed"], found["status"], found["first_line"]) == (status == 0, status, out.splitlines()[0])
    assert set(found["versions"]) == {"minilora", "numpy", "python"}


@pytest.mark.parametrize(
    ("situation", "file", "what"),
    [
        ("conformance-right", "my_lora.py", "the implementation"),
        ("conformance box:a", "box/__init__.py", "the implementation"),
        ("conformance-known", "known.txt", "the known failures"),
        ("vectors-right", "vectors/index.json", "an input of the comparison"),
        ("vectors-right", "right/linear-0-float64.safetensors", "an input of the comparison"),
        ("vectors-known", "float32.txt", "the known failures"),
        ("golden-right", "golden/index.json", "an input of the comparison"),
        ("golden-right", "golden/answers/dora.safetensors", "an input of the comparison"),
        ("golden-right", "golden-right/dora.safetensors", "an input of the comparison"),
        ("golden-known", "golden.txt", "the known failures"),
        ("audit-sound", "sound/adapter_config.json", "a file that is read"),
        ("audit-sound", "model/config.json", "a file that is read"),
        ("audit sound --model model --merged llama", "llama/config.json", "a file that is read"),
        ("diagnose-right", "right.safetensors", "a file that is read"),
        ("diagnose-right", "llama/config.json", "a file that is read"),
        ("diagnose-right", "adapter/adapter_config.json", "a file that is read"),
    ],
)
def test_a_report_never_overwrites_an_input(inside, shell, situation, file, what):
    before = (inside / file).read_bytes()
    argv = SITUATIONS.get(situation) or situation.split()
    assert shell.refused(*argv, "--json", f"./{file}").endswith(f"is {what}, expected another file")
    assert (inside / file).read_bytes() == before


def test_a_report_may_be_among_results_and_overwrite_itself(inside, monkeypatch):
    monkeypatch.setattr("minilora.conformance.vectors.compare", lambda *folders: Report("right"))
    for _ in range(2):
        assert cli.main([*SITUATIONS["vectors-right"], "--json", "right/verdict.json"]) == 0


HANDED_ON = {  # a command; the function, and its arguments
    "audit a --model m --merge": ("audit.auditing.audit", "a m merge=True merged=None progress=True"),
    "audit a --model m --merged n": ("audit.auditing.audit", "a m merge=False merged=n progress=True"),
    "diagnose l --model m --adapter a": ("conformance.golden.diagnosing.diagnose", "m a l"),
    "conformance x --dtype float32 --timeout 3 --require forward,output-dtype": (
        "conformance.checking.child.check_in_child", "x dtype=float32 timeout=3.0 claims=['forward', 'output dtype']"
    ),
    "conformance x --require 'forward , output-dtype,output dtype'": (  # blanks around a claim are ignored
        "conformance.checking.child.check_in_child",
        "x dtype=None timeout=20.0 claims=['forward', 'output dtype', 'output dtype']",
    ),
    "vectors v --compare r": ("conformance.vectors.compare", "v r"),
    "golden g --compare r": ("conformance.golden.judging.compare_golden", "g r"),
    "vectors v": ("conformance.vectors.write", f"v {len(VECTORS)}"),
    "vectors v --starter": ("conformance.vectors.write", f"v {len(STARTER)}"),
    "vectors v --kind rslora,dora --kind linear": (
        "conformance.vectors.write", f"v {sum(vector.kind in ('rslora', 'dora', 'linear') for vector in VECTORS)}"
    ),
    "golden g": ("conformance.golden.folder.write_golden", "g"),
}  # fmt: skip


@pytest.mark.parametrize("command", HANDED_ON)
def test_the_options_reach_the_function(shell, monkeypatch, command):
    function, expected = HANDED_ON[command]
    writes, given = "write" in function, []

    class Judged(Report):
        def require(self, claims):
            given.extend([f"claims={claims}"] if claims else [])

    def answered(*places, **options):
        given.extend(str(len(place) if isinstance(place, list | tuple) else place) for place in places)
        given.extend(f"{name}={option}" for name, option in options.items())
        return 3 if writes else Judged("right")

    monkeypatch.setattr(f"minilora.{function}", answered)
    said = shell(command)
    assert " ".join(given) == expected
    folder = command.split()[1]
    assert not writes or said == f"wrote 3 cases to {folder}; index.json describes them\n"


def test_the_reason_for_checking_nothing_is_one_line(shell, monkeypatch):
    def check_apart(*given, **more):
        raise OSError("two\n  lines")

    monkeypatch.setattr(child, "check_in_child", check_apart)
    assert shell.refused("conformance x") == "x could not be checked: two lines"


def test_a_start_is_printed_or_written_to_a_new_file(inside, tmp_path, shell):
    file = tmp_path / "mine.py"
    said = shell(f"conformance --start class -o {file}")
    assert said == f"wrote {file}; fill it in, then run: minilora conformance {file}\n"
    assert shell("conformance --start class") == file.read_text("utf-8")
    refused = shell.refused(f"conformance --start class -o {file}")
    assert refused == f"{str(file)!r} already exists, expected the name of a new file"
    for command in ("conformance", f"conformance my_lora -o {tmp_path / 'new'}"):
        assert shell.refused(command) == "expected MODULE[:OBJECT], or --start KIND with or without -o FILE"


def test_a_closed_pipe_changes_no_verdict(monkeypatch):
    class Broken(io.StringIO):
        def flush(self):
            if self.getvalue():
                self.truncate(0)
                raise BrokenPipeError

    for right, code in ((OURS["linear"], 0), (implementation(merge=lambda weight, *arrays: weight + 1), 1)):
        report = check(right, name="mine")
        monkeypatch.setattr(child, "check_in_child", lambda *given, report=report, **more: report)
        monkeypatch.setattr(sys, "stdout", Broken())
        assert door.main(["mine"]) == code


def test_the_commands_have_every_precision_and_the_time_limit():
    assert set(judge.CHECKED_DTYPES) == set(UNIT)
    assert judge.TIMEOUT == signature(child.check_in_child).parameters["timeout"].default == 20


@pytest.mark.parametrize("call", [cli.main, lambda argv: door.main(argv[1:])])
def test_the_help_warns_that_there_is_no_sandbox(capsys, call):
    with pytest.raises(SystemExit):
        call(["conformance", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "This imports and runs the code in a child process, which is not a sandbox" in said


def test_names_that_steer_a_terminal_are_escaped(tmp_path, shell):
    tensors = {name.replace("q_proj", "q\x1b[2Jproj"): array for name, array in factors(paths("q_proj")).items()}
    assert "\x1b" not in shell("audit", peft(tmp_path / "a", tensors, config("q_proj")), code=1)
