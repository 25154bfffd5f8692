"""Foreign code may do anything: the command says what in a line, with exit code 2; the suite notes what it spoils."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance import __main__ as command

from .implementations import OURS, implementation

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

interrupt, generator, own = (Plain() for _ in range(3))
interrupt.forward = raising(KeyboardInterrupt())
generator.forward = raising(GeneratorExit())
own.forward = raising(Own("mine"))
broken, closes, leaves, forks, speaks, names = Broken(), Closes(), Leaves(), Forks(), Speaks(), Names()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    return tmp_path


def run(folder, *argv, **more):
    line = [sys.executable, "-m", "minilora.conformance", *argv]
    return subprocess.run(line, stderr=subprocess.PIPE, stdout=more.pop("stdout", subprocess.PIPE),
                          text=True, cwd=folder, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("interrupt", "it raises KeyboardInterrupt, in my_lora.py, line 14"),
        ("generator", "it raises GeneratorExit, in my_lora.py, line 14"),
        ("own", "it raises Own: mine, in my_lora.py, line 14"),
        ("broken", "it raises RuntimeError: no such thing, in my_lora.py, line 19"),
        ("leaves", "my_lora:leaves: forward raises SystemExit: os._exit(0) (N=7 in=5 out=3 r=2 alpha=3, a bias), "
                   "in my_lora.py, line 31"),
        ("speaks", r"my_lora:speaks: forward raises ValueError: \x1b[31mred\x07 (N=7"),
        ("Leaves", "my_lora:Leaves is a class, hand over an object: Leaves(...)"),
    ],
)  # fmt: skip
def test_what_foreign_code_does_is_said_in_a_line(folder, target, said):
    done = run(folder, f"my_lora:{target}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"my_lora:{target} could not be checked: {said}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().isprintable()


def test_a_class_of_static_functions_is_checked(folder):
    assert run(folder, "my_lora:Plain").returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_foreign_code_may_end(folder):
    done = run(folder, "my_lora:forks")
    assert done.returncode == 0, done.stderr


def test_os_exit_is_as_it_was_afterwards(folder, monkeypatch, capsys):
    leave = os._exit
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_lora", raising=False)
    assert command.main(["my_lora:leaves"]) == 2
    assert os._exit is leave
    sys.modules.pop("my_lora")


def test_no_escape_code_of_a_name_reaches_the_terminal(folder):
    done = run(folder, "my_lora:names")
    assert done.returncode == 1
    assert r"it returns those of \x1b[31m" in done.stdout
    assert all(line.isprintable() for line in done.stdout.splitlines())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_report_that_cannot_be_written_is_no_verdict(folder):
    with open("/dev/full", "w") as full:
        done = run(folder, "my_lora", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("my_lora was checked, and the report could not be written: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX is needed")
def test_a_closed_output_is_no_verdict(folder):
    line = f'"{sys.executable}" -m minilora.conformance my_lora >&-'
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, cwd=folder)
    assert done.returncode == 2
    assert done.stderr == "my_lora was checked, and the report could not be written: there is no standard output\n"


def test_an_output_that_foreign_code_closed_is_no_verdict(folder):
    done = run(folder, "my_lora:closes")
    assert done.returncode == 2
    assert done.stderr.startswith("my_lora:closes was checked, and the report could not be written: ")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_changes_no_verdict(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for right, code in ((OURS["linear"], 0), (implementation(merge=lambda weight, *arrays: weight + 1), 1)):
        monkeypatch.setattr(command, "imported", lambda target, right=right: right)
        monkeypatch.setattr(sys, "stdout", Broken())
        assert command.main(["mine"]) == code


def test_an_empty_name_for_json_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(command, "imported", lambda target: pytest.fail("the check began"))
    with pytest.raises(SystemExit) as ended:
        command.main(["my_lora", "--json", ""])
    assert ended.value.code == 2
    assert "argument --json: expected the name of a file, got ''" in capsys.readouterr().err


def test_an_exception_of_its_own_on_import_is_said(tmp_path):
    (tmp_path / "odd.py").write_text("class Own(BaseException): pass\nraise Own('x')\n", encoding="utf-8")
    done = run(tmp_path, "odd")
    assert done.returncode == 2
    assert done.stderr == "odd could not be checked: importing it raises Own: x (odd.py, line 2)\n"


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
    assert text.endswith(f", a bias), in test_hostile.py, line {line}")


def test_the_innermost_line_of_the_user_is_told():
    def inner():
        raise RuntimeError("here")

    def backward(*arrays):
        return inner()

    (text,) = check(implementation(backward=backward)).diagnoses
    assert text.endswith(f", in test_hostile.py, line {inner.__code__.co_firstlineno + 1}")


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
def test_memory_that_is_read_as_c_order_is_a_habit(reads, said):
    def forward(x, *arrays):
        return LINEAR["forward"](reads(x), *arrays)

    report = check(implementation(forward=forward))
    assert report.passed, str(report)
    assert report.habits["memory order"] == f"other numbers {said}"


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
