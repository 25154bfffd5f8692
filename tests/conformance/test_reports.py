"""Whole reports of the five commands, as text and as JSON, compared with the approved files in `reports`.

``python -m pytest tests/conformance/test_reports.py --approve`` rewrites the files; look at the difference afterwards.
"""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest

from minilora import cli
from minilora.conformance.checking import check, child
from minilora.report import LONGEST_FIRST_LINE

from ..support.compare import same_but_rounding
from .situations import FOR_PROGRAMS, SITUATIONS, build

DOCS = Path(__file__).parents[2] / "docs" / "library" / "hold-yours-against-it.md"
APPROVED = Path(__file__).parent / "reports"
OF_THE_MACHINE = ("minilora", "versions", "kernel")
"""The keys of the JSON that differ between versions and machines."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("situations")
    build(folder)
    return folder


@cache
def checked(target, dtype):
    """Return the report of an implementation, checked in this process and cached for all situations."""
    return check.check(child.imported(target), dtype=dtype, name=target)


@pytest.fixture
def run(world, monkeypatch, capsys):
    """Return a function that runs a command line in the folder of the situations."""
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "my_lora", None)  # it is imported anew, and removed at the end
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(child, "check_in_child", lambda target, *, dtype, timeout: deepcopy(checked(target, dtype)))

    def run(argv):
        code = cli.main(argv)
        out, err = capsys.readouterr()
        return f"$ minilora {' '.join(argv)}\n{out}{err}exit code {code}\n"

    return run


def steady(value):
    """Return a JSON value without the last digits, which depend on the order of summation."""
    if isinstance(value, float):
        return 0.0 if abs(value) < 1e-12 else float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: float(f"{one:.2g}") if key == "noise" else steady(one) for key, one in value.items()}
    return [steady(one) for one in value] if isinstance(value, list) else value


def in_lines(content):
    """Return JSON with one line for each key, and for each entry of a list or object below it."""
    lines = []
    for key, value in content.items():
        if isinstance(value, (list, dict)) and len(json.dumps(value)) > 80:
            entries = value if isinstance(value, list) else [{name: one} for name, one in value.items()]
            lines += [f"{key}:", *(f"  {json.dumps(entry)}" for entry in entries)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def compare(file, text, request):
    if request.config.getoption("approve"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    approved = file.read_text(encoding="utf-8")
    if not same_but_rounding(text, approved):
        assert text == approved  # shows the difference


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_report_is_as_approved(name, run, world, request, monkeypatch):
    argv, found = SITUATIONS[name], world / f"{name}.json"
    monkeypatch.setenv("GITHUB_ACTIONS", "true" if name.endswith("-github") else "")
    text = run([*argv, "--json", str(found)]).replace(f" --json {found}", "", 1)  # --json changes nothing else
    compare(APPROVED / f"{name}.txt", text, request)
    assert found.exists() is (not text.endswith("exit code 2\n") or "UNDECIDED" in text)
    if found.exists():
        assert found.read_text() == json.dumps(json.loads(found.read_text()), indent=1) + "\n"
        assert len(text.splitlines()[1]) <= LONGEST_FIRST_LINE
        content = {key: value for key, value in json.loads(found.read_text()).items() if key not in OF_THE_MACHINE}
        assert text.splitlines()[1] == content["first_line"]
        assert text.endswith(f"exit code {content['status']}\n")
        if name in FOR_PROGRAMS:
            compare(APPROVED / f"{name}.json.txt", in_lines(steady(content)), request)


def test_every_approved_file_belongs_to_a_situation():
    assert {file.name.partition(".")[0] for file in APPROVED.iterdir()} <= {*SITUATIONS}


def keys_of(file):
    """Return the top-level keys of an approved JSON."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {line.partition(":")[0] for line in lines if not line.startswith(" ")}


def test_the_index_of_fields_names_every_field_of_the_json():
    text = DOCS.read_text(encoding="utf-8")
    tables = text[text.index("## What a report says") : text.index("## What it may define")]
    rows = [line.split("|") for line in tables.splitlines() if line.startswith("| `")]
    head = {key for row in rows if len(row) == 4 for key in re.findall("`([^`]+)`", row[1])}
    own = {row[1].strip(" `"): set(re.findall("`([^`]+)`", row[2])) for row in rows if len(row) == 5}
    for file in APPROVED.glob("*.json.txt"):
        assert keys_of(file) | {*OF_THE_MACHINE} == head | own[file.name.partition("-")[0]], file.name


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="the lines are of a POSIX shell")
@pytest.mark.parametrize(("adapter", "status"), [("sound", 0), ("untrained", 0), ("not-a-target", 1), ("nothing", 1)])
def test_a_ci_tells_suspicious_from_wrong_as_the_site_says(world, tmp_path, adapter, status):
    lines = re.findall(r"^minilora audit adapter --model model .*", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 2
    for line in lines if shutil.which("jq") else lines[:1]:
        line = line.replace("minilora audit adapter --model ", f"audit {world / adapter} --model {world}/", 1)
        done = subprocess.run(["sh", "-c", f'"{sys.executable}" -m minilora {line}'], cwd=tmp_path, capture_output=True)
        assert min(done.returncode, 1) == status, done
