"""Foreign code may do anything: the command says what in a line, with exit code 2; the suite notes what it spoils."""

import io
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance import __main__ as command
from minilora.conformance.running import child_process as apart

from ..implementations import OURS, implementation

LINEAR = vars(OURS["linear"])

MODULE = """
import os
import sys

def forward(x, weight, bias, lora_A, lora_B, alpha):
    y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return y if bias is None else y + bias

class Own(BaseException):
    pass

def raising(error):
    def forward(*arrays):
        raise error
    return forward

class Broken:
    def __getattr__(self, name):
        raise RuntimeError("no such thing")

class Plain:
    forward = staticmethod(forward)

class Closes:
    def forward(self, *arrays):
        sys.stdout.close()
        return forward(*arrays)

class Leaves:
    def forward(self, *arrays):
        os._exit(0)

class Forks:
    def forward(self, *arrays):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
        return forward(*arrays)

class Speaks:
    def forward(self, *arrays):
        raise ValueError("\\x1b[31mred\\x07")

class Names:
    forward = staticmethod(forward)
    def backward(self, *arrays):
        return {"\\x1b[31m": 1}

import ctypes
import subprocess
import threading
import time

class Crashes:
    def forward(self, *arrays):
        ctypes.string_at(0)

class Hangs:
    def forward(self, *arrays):
        while True: pass

class HangsInC:
    def forward(self, *arrays):
        pattern, text = "(a*)*b", "a" * 40
        __import__("re").match(pattern, text)

class LeavesByC:
    def forward(self, *arrays):
        ctypes.CDLL(None)._exit(0)

class Closes1:
    def forward(self, *arrays):
        if x_is_new(arrays): os.close(1)
        return forward(*arrays)

def x_is_new(arrays, seen=[]):
    seen.append(arrays)
    return len(seen) == 1

class Prints:
    def forward(self, *arrays):
        if x_is_new(arrays):
            print("\\x1b[31mred", flush=True)
            os.write(1, b"by its number\\n")
        return forward(*arrays)

class Starts:
    def forward(self, *arrays):
        if x_is_new(arrays):
            started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            with open("started", "w") as file: file.write(str(started.pid))
        return forward(*arrays)

class Threads:
    def forward(self, *arrays):
        if x_is_new(arrays): threading.Thread(target=time.sleep, args=(60,)).start()
        return forward(*arrays)

interrupt, generator, own = (Plain() for _ in range(3))
interrupt.forward = raising(KeyboardInterrupt())
generator.forward = raising(GeneratorExit())
own.forward = raising(Own("mine"))
broken, closes, leaves, forks, speaks, names = Broken(), Closes(), Leaves(), Forks(), Speaks(), Names()
crashes, hangs, hangs_in_c, leaves_by_c, closes_1 = Crashes(), Hangs(), HangsInC(), LeavesByC(), Closes1()
prints, starts, threads = Prints(), Starts(), Threads()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv, **more):
    line = [sys.executable, "-m", "minilora.conformance", *argv]
    return subprocess.run(line, stderr=subprocess.PIPE, stdout=more.pop("stdout", subprocess.PIPE), text=True, **more)


def refused(capfd, *argv):
    """What the command says of an implementation that cannot be checked: a line, and nothing beside it."""
    assert command.main([*argv]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert err.strip().isprintable()
    name, _, said = err.rstrip("\n").partition(" could not be checked: ")
    assert name == argv[0]
    return said


def line_with(text):
    """The number of the line of the module that has a text."""
    return next(number for number, line in enumerate(MODULE.splitlines(), start=1) if text in line)


BREAKS = {
    "interrupt": "it raises KeyboardInterrupt, in my_lora.py, line 14",
    "generator": "it raises GeneratorExit, in my_lora.py, line 14",
    "own": "it raises Own: mine, in my_lora.py, line 14",
    "broken": "it raises RuntimeError: no such thing, in my_lora.py, line 19",
    "leaves": "it calls os._exit(0), in my_lora.py, line 31",
    "closes": "it closes the standard output",
    "closes_1": "it closes the standard output",
    "Leaves": "my_lora:Leaves is a class, hand over an object: Leaves(...)",
    "crashes": f"it ends the process by SIGSEGV, in my_lora.py, line {line_with('string_at')}",
    "leaves_by_c": "it ends the process with exit code 0",
}


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
@pytest.mark.parametrize("target", BREAKS)
def test_what_foreign_code_does_is_said_in_a_line(folder, capfd, target):
    assert refused(capfd, f"my_lora:{target}") == BREAKS[target]


@pytest.mark.long
def test_an_escape_code_of_a_message_is_shown_as_text(folder, capfd):
    said = refused(capfd, "my_lora:speaks")
    assert said.startswith(r"my_lora:speaks: forward raises ValueError: \x1b[31mred\x07 (N=7")


@pytest.mark.long
@pytest.mark.parametrize("target", ["hangs", "hangs_in_c"])
def test_an_endless_loop_is_stopped(folder, capfd, target):
    said = refused(capfd, f"my_lora:{target}", "--timeout", "1")
    line = line_with({"hangs": "while True", "hangs_in_c": ".match("}[target])
    assert said == f"it took longer than 1 s (--timeout), in my_lora.py, line {line}"


@pytest.mark.long
def test_an_endless_import_is_stopped(tmp_path, monkeypatch, capfd):
    (tmp_path / "endless.py").write_text("while True:\n    pass\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    said = refused(capfd, "endless", "--timeout", "1")
    assert re.fullmatch(r"it took longer than 1 s \(--timeout\), in endless.py, line [12]", said)


@pytest.mark.long
def test_files_of_the_folder_hide_none_of_pythons(folder, capfd):
    for name in ("json", "typing", "minilora", "tempfile"):
        (folder / f"{name}.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
    assert command.main(["my_lora.py:Plain"]) == 0, capfd.readouterr()


@pytest.mark.long
def test_a_slow_import_does_not_count_for_the_check(tmp_path, monkeypatch, capfd):
    waits = "import time\ntime.sleep(2.5)\n" + MODULE
    waits += "\nclass Slow:\n    def forward(self, *arrays):\n        x_is_new(arrays) and time.sleep(2.5)\n"
    waits += "        return forward(*arrays)\nslow = Slow()\n"
    (tmp_path / "waits.py").write_text(waits, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert command.main(["waits:slow", "--timeout", "4"]) == 0, capfd.readouterr()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_what_foreign_code_started_ends_with_it(folder, capfd):
    assert command.main(["my_lora:starts"]) == 0
    with open(folder / "started") as file:
        started = int(file.read())
    for _ in range(50):
        try:
            os.kill(started, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


@pytest.mark.long
@pytest.mark.parametrize("target", ["Plain", "forks", "threads"])
def test_what_a_right_layer_does_beside_is_no_failure(folder, capfd, target):
    if target == "forks" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    assert command.main([f"my_lora:{target}"]) == 0, capfd.readouterr()


@pytest.mark.long
def test_what_foreign_code_prints_cannot_steer_the_terminal(folder, capfd):
    assert command.main(["my_lora:prints"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("my_lora:prints: passed")
    assert err.splitlines() == [r"\x1b[31mred", "by its number"]


@pytest.mark.long
def test_no_escape_code_of_a_name_reaches_the_terminal(folder, capfd):
    assert command.main(["my_lora:names"]) == 1
    out, _ = capfd.readouterr()
    assert r"it returns those of \x1b[31m" in out
    assert all(line.isprintable() for line in out.splitlines())


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_report_that_cannot_be_written_is_no_verdict(folder):
    with open("/dev/full", "w") as full:
        done = run("my_lora", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("my_lora was checked, and the report could not be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX is needed")
def test_a_closed_output_is_no_verdict(folder):
    line = f'"{sys.executable}" -m minilora.conformance my_lora >&-'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "my_lora was checked, and the report could not be written: there is no standard output\n"


def test_a_reader_that_has_seen_enough_changes_no_verdict(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            if text:
                raise BrokenPipeError

    for right, code in ((OURS["linear"], 0), (implementation(merge=lambda weight, *arrays: weight + 1), 1)):
        report = check(right, name="mine")
        monkeypatch.setattr(apart, "check_apart", lambda *given, report=report, **more: report)
        monkeypatch.setattr(sys, "stdout", Broken())
        assert command.main(["mine"]) == code


@pytest.mark.parametrize("file", ["--json", "--xfails"])
def test_an_empty_name_of_a_file_is_an_error(monkeypatch, capsys, file):
    monkeypatch.setattr(apart, "check_apart", lambda *given, **more: pytest.fail("the check began"))
    with pytest.raises(SystemExit) as ended:
        command.main(["my_lora", file, ""])
    assert ended.value.code == 2
    assert f"argument {file}: the name is empty" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_number_above_zero(capsys, seconds):
    with pytest.raises(SystemExit) as ended:
        command.main(["my_lora", f"--timeout={seconds}"])
    assert ended.value.code == 2
    assert f"expected a number of seconds above 0, got {seconds!r}" in capsys.readouterr().err


@pytest.mark.long
def test_an_exception_of_its_own_on_import_is_said(tmp_path, monkeypatch, capfd):
    (tmp_path / "odd.py").write_text("class Own(BaseException): pass\nraise Own('x')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert refused(capfd, "odd") == "importing it raises Own: x (odd.py, line 2)"


# --- from Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["forward", "backward", "merge"])
def test_an_array_of_an_earlier_call_is_the_caller_s(function):
    kept = []

    def spoils(first, *arrays):
        if kept:
            kept.pop()[...] = 0
        kept.append(first)
        return LINEAR[function](first, *arrays)

    name = {"forward": "x", "backward": "dy", "merge": "weight"}[function]
    report = check(implementation(**{function: spoils}))
    said = f"a later call changes {name} of an earlier {function}, which belongs to the caller"
    assert report.claims["nothing is changed"] == said
    assert report.diagnoses == [said]
    assert not report.passed


def test_what_is_kept_and_left_alone_is_no_change():
    kept = []

    def forward(x, *arrays):
        kept.append((x, *arrays))
        return LINEAR["forward"](x, *arrays)

    assert check(implementation(forward=forward)).passed


def test_a_class_instead_of_an_object_is_said():
    class Mine:
        def __init__(self, scale):
            self.scale = scale

        def forward(self, *arrays):
            return LINEAR["forward"](*arrays)

    with pytest.raises(CannotRun, match=r"^Mine is a class, hand over an object: Mine\(\.\.\.\)$"):
        check(Mine)
    assert check(Mine(1)).passed


def test_the_line_of_the_user_s_file_is_told():
    def backward(*arrays):
        return np.linalg.inv(np.zeros((2, 2)))  # raises in a file of NumPy

    (text,) = check(implementation(backward=backward)).diagnoses
    line = backward.__code__.co_firstlineno + 1
    assert text.startswith("backward raises LinAlgError: Singular matrix (N=7 ")
    assert text.endswith(f", a bias), in test_child_process.py, line {line}")


def test_the_innermost_line_of_the_user_is_told():
    def inner():
        raise RuntimeError("here")

    def backward(*arrays):
        return inner()

    (text,) = check(implementation(backward=backward)).diagnoses
    assert text.endswith(f", in test_child_process.py, line {inner.__code__.co_firstlineno + 1}")


class Tensor:
    """As torch has them: it cannot become an array."""

    def __array__(self, *more, **options):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(("module", "hint"), [("torch", "; of torch, return y.detach().float().numpy()"), ("jax", "")])
def test_what_cannot_become_an_array_is_said(monkeypatch, module, hint):
    monkeypatch.setattr(Tensor, "__module__", module)

    def forward(x, *arrays):
        return Tensor()

    with pytest.raises(CannotRun) as refused:
        check(SimpleNamespace(forward=forward), name="mine")
    text = (
        "mine: forward returns a Tensor that is no array: RuntimeError: Can't call numpy() on Tensor that requires grad"
    )
    line = f", in test_child_process.py, line {forward.__code__.co_firstlineno}"
    assert str(refused.value) == f"{text}{hint} (N=7 in=5 out=3 r=2 alpha=3, a bias){line}"


def test_functions_that_share_what_raises_are_told_once():
    def shared(*arrays):
        raise RuntimeError("no GPU")

    def forward(x, weight, bias, *arrays):
        return shared() if bias is None else LINEAR["forward"](x, weight, bias, *arrays)

    def backward(dy, x, weight, bias, *arrays):
        return shared() if bias is None else LINEAR["backward"](dy, x, weight, bias, *arrays)

    report = check(SimpleNamespace(forward=forward, backward=backward))
    assert len(report.diagnoses) == 1
    assert report.claims["slope"].startswith("backward, wherever there is no bias, raises RuntimeError: no GPU")


# --- memory order ---------------------------------------------------------------------------------

LAYOUTS = {"C": lambda a: a.flags.c_contiguous, "F": lambda a: a.flags.f_contiguous,
           "strided": lambda a: not (a.flags.c_contiguous or a.flags.f_contiguous)}  # fmt: skip


@pytest.mark.parametrize("orientation", ["out, in", "in, out"])
def test_every_function_meets_every_memory_order(orientation):
    met = {}

    def seen(function):
        def with_orders(*arrays):
            turn = [a.T if orientation == "in, out" and i in (1, 3, 4) else a for i, a in enumerate(arrays)]
            met.setdefault(function, set()).update(
                name for name, lies in LAYOUTS.items() if all(lies(a) for a in arrays if np.ndim(a) == 2 and a.size > 9)
            )
            return LINEAR[function](*turn)

        return with_orders

    mine = SimpleNamespace(forward=seen("forward"), orientation=orientation)
    report = check(mine)
    assert report.passed, str(report)
    assert report.habits["memory order"] == "ok"
    assert met == {"forward": set(LAYOUTS)}


def as_c(array):
    """What a reader of raw memory takes an array for."""
    return np.ndarray(array.shape, array.dtype, np.lib.stride_tricks.as_strided(array, (array.size,), (8,)).copy())


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (
            lambda x: x.T.reshape(x.shape) if x.flags.f_contiguous and not x.flags.c_contiguous else x,
            "in Fortran order",
        ),
        (lambda x: as_c(x) if not (x.flags.f_contiguous or x.flags.c_contiguous) else x, "at every second place"),
    ],
)
def test_memory_that_is_read_as_c_order_fails(reads, said):
    def forward(x, *arrays):
        return LINEAR["forward"](reads(x), *arrays)

    report = check(implementation(forward=forward))
    assert not report.passed
    assert report.claims["memory order"].startswith(f"where arrays lie {said}, the output is off by ")
    assert report.diagnoses == [report.claims["memory order"]]


def test_what_is_wrong_in_every_order_has_no_habit():
    report = check(implementation(forward=lambda *arrays: LINEAR["forward"](*arrays) + 1))
    assert not report.passed
    assert report.habits["memory order"] == "ok"


def test_a_function_that_raises_in_every_order_has_no_habit():
    def merge(*arrays):
        raise NotImplementedError

    report = check(implementation(merge=merge))
    assert re.match("merge raises NotImplementedError", report.claims["merge"])
    assert report.habits["memory order"] == "ok"


INTO_ITS_FILES = {
    "begun": ("os.utime(sys.argv[-1], (4e9, 4e9)); time.sleep(1000)", "it took longer than 3 s (--timeout)"),
    "pipe": ("os.mkfifo(sys.argv[-3]); os.kill(os.getpid(), 9)", "it writes an answer of its own"),
    "empty": ("open(sys.argv[-3], 'w').write('{}'); os.kill(os.getpid(), 9)", "it writes an answer of its own"),
    "wrong": (
        "open(sys.argv[-3], 'w').write('{\"report\": {\"name\": 1}}'); os.kill(os.getpid(), 9)",
        "it writes an answer",
    ),
    "large": ("open(sys.argv[-3], 'wb').truncate(1 << 40); os.kill(os.getpid(), 9)", "it writes an answer of its own"),
}


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes are POSIX's")
@pytest.mark.parametrize("what", [pytest.param("begun", marks=pytest.mark.long), *list(INTO_ITS_FILES)[1:]])
def test_an_answer_of_foreign_code_s_own_is_no_verdict(tmp_path, monkeypatch, what):
    code, said = INTO_ITS_FILES[what]
    (tmp_path / "odd.py").write_text(f"import os, sys, time\ndef forward(*arrays):\n    {code}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotRun, match=re.escape(said)):
        apart.check_apart("odd", timeout=3)


LEAVES_ITS_SESSION = """
import os, pathlib, sys, time
replace = os.replace
def prints(*names):  # when the answer is there, and the process about to end
    os.write(1, b"".join(b"line %d\\n" % i for i in range(20000)))
    replace(*names)
os.replace = prints
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path("pid").write_text(str(os.getpid()))
        folder = os.path.dirname(sys.argv[-1])
        while True:
            open(os.path.join(folder, str(time.time())), "w").close()
    os.kill(os.getpid(), 9)
while not os.path.exists("pid"):
    time.sleep(0.01)
"""


@pytest.mark.skipif(os.name != "posix", reason="sessions are POSIX's")
def test_what_leaves_its_session_ends_too_and_loses_no_report_and_no_line(tmp_path, monkeypatch, capfd):
    """It also writes into the folder of the report until it is ended, and prints much at its end."""
    psutil = pytest.importorskip("psutil")
    text = LEAVES_ITS_SESSION + MODULE
    (tmp_path / "odd.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert apart.check_apart("odd:Plain").passed
    assert capfd.readouterr().err.endswith("line 19999\n")
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
