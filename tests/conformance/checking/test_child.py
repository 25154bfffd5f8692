"""The implementation that is named is found, and checked in a process: it may crash, hang or leave."""

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import minilora
from minilora.conformance import CannotRun, check
from minilora.conformance.checking import child
from minilora.conformance.checking.child import check_in_child, imported, sources
from minilora.conformance.checking.kindreport import KindReport

from ..implementations import OURS

MODULE = """
import ctypes
import os
import threading
import time

def forward(x, weight, bias, lora_A, lora_B, alpha):
    y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return y if bias is None else y + bias

class Own(BaseException):
    pass

class Broken:
    def __getattr__(self, name):
        raise RuntimeError("no such thing")

class Does:
    def __init__(self, what):
        self.what = what

    def forward(self, *arrays):
        self.what()
        return forward(*arrays)

def raises():
    raise Own("\\x1b[31mred")

def stops():
    raise KeyboardInterrupt

def loops():
    while True: time.sleep(0.01)

def loops_in_c():
    __import__("re").match("(a*)*b", "a" * 40)

def forks():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

def closes():
    os.close(1)
    forward_has_closed.what = lambda: None

def starts_a_thread():
    if threading.active_count() == 1:
        threading.Thread(target=time.sleep, args=(60,)).start()

def waits():
    time.sleep(1.5)
    forward_waits.what = lambda: None

wrong = Does(None)
wrong.forward = lambda *arrays: print("it prints") or forward(*arrays[:-1], 7 * arrays[-1])
interrupts, raised, broken = Does(stops), Does(raises), Broken()
crashes, leaves = Does(lambda: ctypes.string_at(0)), Does(lambda: os._exit(3))
leaves_by_c = Does(lambda: ctypes.CDLL(None)._exit(0))
endless, endless_in_c = Does(loops), Does(loops_in_c)
forward_forks, forward_has_closed = Does(forks), Does(closes)
has_a_thread, forward_waits = Does(starts_a_thread), Does(waits)
if "WAITS" in os.environ:
    time.sleep(1.5)
"""


THREADS = """
import json
import os
import sys
from pathlib import Path

names = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]
Path("seen.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))

import threadpoolctl

Path("counted.json").write_text(json.dumps([pool["num_threads"] for pool in threadpoolctl.threadpool_info()]))
forward = lambda x, weight, bias, lora_A, lora_B, alpha: None
"""


def line(text):
    """Where a line of the module stands."""
    return f"my_lora.py, line {next(n for n, one in enumerate(MODULE.splitlines(), start=1) if text in one)}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "endless.py").write_text("while True: pass\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "my_lora:crashes": f"it ends the process with SIGSEGV, in {line('string_at')}",
    "my_lora:leaves": "it ends the process with exit code 3",
    "my_lora:leaves_by_c": "it ends the process with exit code 0",
    "my_lora:endless": f"it took longer than 1 s (--timeout), in {line('while True')}",
    "my_lora:endless_in_c": f"it took longer than 1 s (--timeout), in {line('.match(')}",
    "endless": "it took longer than 1 s (--timeout), in endless.py, line 1",
    "my_lora:interrupts": f"it raises KeyboardInterrupt, in {line('raise KeyboardInterrupt')}",
    "my_lora:raised": rf"it raises Own: \x1b[31mred, in {line('raise Own')}",
    "my_lora:broken": f"it raises RuntimeError: no such thing, in {line('raise RuntimeError')}",
    "my_lora:nothing": "module 'my_lora' has no attribute 'nothing'",
    "no_such": "No module named 'no_such'",
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=() if t in list(REFUSED)[:4:3] else pytest.mark.long) for t in REFUSED]
)
def test_why_there_is_no_report_is_said_in_a_line(folder, target):
    with pytest.raises(CannotRun) as refused:
        check_in_child(target, timeout=1)
    assert str(refused.value) == REFUSED[target]


@pytest.mark.parametrize("own", [{}, {"OPENBLAS_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "5"}])
def test_the_child_has_one_blas_thread_unless_the_user_asks(folder, monkeypatch, own):
    names = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, count in own.items():
        monkeypatch.setenv(name, count)
    before = dict(os.environ)
    (folder / "threads.py").write_text(THREADS)
    with pytest.raises(CannotRun, match="forward returns None"):  # all that it is to do happens when it is imported
        check_in_child("threads")
    assert json.loads((folder / "seen.json").read_text()) == dict.fromkeys(names, "1") | own
    if not own:  # what NumPy has loaded goes by it
        assert {*json.loads((folder / "counted.json").read_text())} <= {1}
    assert os.environ == before


def test_a_report_comes_back_whole_from_the_process(folder, capfd):
    report = check_in_child("my_lora.py:wrong", dtype="float32")
    assert (report.name, report.dtype, report.passed) == ("my_lora.py:wrong", "float32", False)
    assert [case.id for case in report.cases if case.failed][:2] == ["linear-0-forward", "linear-0-scaling"]
    assert report.errors["y"] > 0
    assert report.functions["forward"]
    out, err = capfd.readouterr()
    assert (out, {*err.split("\n")}) == ("", {"it prints", ""})


@pytest.mark.long
@pytest.mark.parametrize("target", ["forward_forks", "forward_has_closed", "has_a_thread"])
def test_what_a_right_layer_does_beside_is_no_failure(folder, target):
    if target == "forward_forks" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    assert check_in_child(f"my_lora:{target}").passed


@pytest.mark.long
def test_a_slow_import_does_not_count_for_the_check(folder, monkeypatch):
    monkeypatch.setenv("WAITS", "yes")
    assert check_in_child("my_lora:forward_waits", timeout=2.5).passed


def test_the_limit_of_time_begins_anew_after_the_import(tmp_path, monkeypatch):
    done = []
    limit = SimpleNamespace(
        enable=lambda file: None,
        dump_traceback_later=lambda seconds, **_: done.append(f"{seconds:g} s"),
        cancel_dump_traceback_later=lambda: done.append("no limit"),
    )
    monkeypatch.setattr(child, "faulthandler", limit)
    monkeypatch.setattr(child, "imported", lambda target: done.append("import"))
    monkeypatch.setattr("minilora.conformance.checking.check.check", lambda *a, **k: done.append("check") or "found")
    monkeypatch.setattr(os, "_exit", done.append)
    monkeypatch.setattr(sys, "path", [*sys.path])
    child.check_here("my_lora", "", "3", tmp_path / "answer", tmp_path / "traces")
    assert done == ["3 s", "import", "3 s", "check", "no limit", 0]


def test_the_child_imports_this_very_package(folder, monkeypatch):
    """Whatever lies in the folder, and is installed."""
    for name in ("json", "typing", "minilora", "tempfile"):
        (folder / f"{name}.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    (folder / "asks.py").write_text("import minilora\nraise KeyError(minilora.__file__)\n", encoding="utf-8")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(CannotRun) as refused:
        check_in_child("asks.py")
    assert str(refused.value) == f"importing it raises KeyError: {minilora.__file__!r} (asks.py, line 2)"


# --- what is named --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "content", "said"),
    [
        ("raises", "x = 1\nraise RuntimeError('boom')", "importing it raises RuntimeError: boom (raises.py, line 2)"),
        ("exits_now", "raise SystemExit(0)", "importing it raises SystemExit: 0 (exits_now.py, line 1)"),
        ("no_python", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("no_python.py", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("other/no_python.py", "", "there is no file 'other/no_python.py'"),
        ("./no_python", "", "expected the name of a module, such as my_module, or a file, such as folder/my_module.py"),
        (":forward", "", "expected the name of a module, such as my_module, or a file, such as folder/my_module.py"),
        ("needs_more", "import no_such_package", "No module named 'no_such_package'"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_said(tmp_path, monkeypatch, target, content, said):
    if content:
        (tmp_path / f"{target.removesuffix('.py')}.py").write_text(content + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises((CannotRun, ImportError)) as refused:
        imported(target)
    assert str(refused.value) == said


def test_a_file_is_imported_whatever_has_its_name(tmp_path, monkeypatch):
    """And the modules that lie beside it are found, and it itself by its name, as a dataclass looks for it."""
    lines = "from __future__ import annotations", "import dataclasses", "from beside import box", ""
    record = "@dataclasses.dataclass", "class Layer:", "    rank: int = 3"
    (tmp_path / "beside.py").write_text("class box:\n    forward = 'found'\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    for name in ("string", "mine"):
        (tmp_path / f"{name}.py").write_text("\n".join([*lines, *record]), encoding="utf-8")
        assert imported(f"{tmp_path}/{name}.py:box.forward") == "found"


@pytest.mark.parametrize(
    ("target", "files"),
    [
        ("my_lora", ["my_lora.py", "my_lora/__init__.py"]),
        ("box.inner:a.b", ["box/inner.py", "box/inner/__init__.py"]),
        ("a/my_lora.py", ["a/my_lora.py"]),
        ("a/my_lora.py:wrong", ["a/my_lora.py"]),
    ],
)
def test_the_files_that_a_name_may_mean_are_known(target, files):
    assert [file.as_posix() for file in sources(target)] == files


def test_a_report_comes_through_json_as_it_is():
    """Of a right implementation, of wrong ones with a diagnosis, an endless error and further kinds."""
    for functions in ({}, {"forward": lambda x, *_: 2 * x}, {"forward": lambda *_: np.full((1, 1), np.nan)}):
        ours = SimpleNamespace(**{**vars(OURS["linear"]), **functions})
        report = check(SimpleNamespace(linear=ours, kinds={"rslora": OURS["rslora"]}, **vars(ours)), name="x")
        assert report.passed is not bool(functions)
        assert report.kinds["rslora"].passed
        again = KindReport.of(json.loads(json.dumps(asdict(report))))
        assert again == report
        assert (str(again), again.json()) == (str(report), report.json())
