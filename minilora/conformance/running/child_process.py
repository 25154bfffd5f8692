"""Check an implementation in a process of its own: foreign code may end it, hang in it, or close its output.

`main` is what that process runs. It writes a report, or why there is none, into a file. Where it ends or hangs before
that, ``faulthandler`` says in another file which line ran last. What foreign code prints goes to the standard error, a
line at a time and without control characters.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any, NoReturn

from ...checks import FileRefused, printable
from ...files.disk import read_json, read_start
from ..checking.calling import is_theirs, line_of, raised
from ..checking.check import check
from ..checking.report import CannotRun, Report
from .target import imported

TIMEOUT = 20.0
GRACE = 1.0  # for the child to write down where it hangs
POLL = 0.05  # seconds from one look at whether the import is over to the next
MAX_ANSWER, MAX_TRACES = 1 << 26, 1 << 20
"""Bytes of a report, which has less than one million, and of what ``faulthandler`` writes, that are read."""
MARK, ROUNDS = "MINILORA_CHECK", 5
"""A variable of the environment, by which what a check has started is known."""
BEGIN = """
import sys
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
from minilora.conformance.running.child_process import main
sys.path.remove(folder)
main(*sys.argv[1:])
"""
"""What the child runs: this package, whatever files lie in the working folder; these are found from then on."""


def check_apart(target: str, *, dtype: str | None = None, timeout: float = TIMEOUT) -> Report:
    """Check what MODULE[:OBJECT] or FILE.py[:OBJECT] names, in a child process.

    Parameters
    ----------
    target : str
        What to check.
    dtype : str, optional
        As `minilora.conformance.check` takes it.
    timeout : float, optional
        How many seconds the import may take, and then the check.

    Returns
    -------
    Report
        As `minilora.conformance.check` gives it.

    Raises
    ------
    CannotRun
        If it cannot be imported or checked, takes longer, or ends the process.
    """
    with tempfile.TemporaryDirectory(prefix="minilora-", ignore_cleanup_errors=True) as folder:
        answer, traces, begun = (Path(folder, name) for name in ("answer.json", "traces.txt", "imported"))
        command = [sys.executable, "-P", "-c", BEGIN, str(Path(__file__).parents[3])]
        command += [target, dtype or "", str(timeout), str(answer), str(traces), str(begun)]
        status = _run(command, timeout + GRACE, begun)
        if os.path.lexists(answer):
            return _report(answer)
        line = _last_line(_start_of(traces))
    if status is None:
        raise CannotRun(f"it took longer than {timeout:g} s (--timeout){line}")
    how = f"by {_signal(-status)}" if status < 0 else f"with exit code {status}"
    raise CannotRun(f"it ends the process {how}{line}")


def _report(answer: Path) -> Report:
    """Return the report that the child wrote; refuse what foreign code may have put in its place."""
    try:
        message = read_json(answer, at_most=MAX_ANSWER)
        if message.keys() == {"cannot"}:
            raise CannotRun(str(message["cannot"]))
        report = Report.from_dict(message["report"])
        if report.as_dict() != message["report"] or not str(report):
            raise ValueError("it is no report")
    except CannotRun:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CannotRun("it writes an answer of its own where the report should be") from None
    return report


def _start_of(traces: Path) -> str:
    """Return what ``faulthandler`` wrote, as far as it can be of use."""
    try:
        return read_start(traces, MAX_TRACES).decode("utf-8", "replace")
    except FileRefused:
        return ""


def _run(command: list[str], timeout: float, begun: Path) -> int | None:
    """Run a command and show what it prints. Return its exit code, or None where it took too long and was stopped.

    The time counts anew from when the command writes the file `begun`.
    """
    reads, writes = os.pipe()
    mark = secrets.token_hex()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=writes, stderr=writes, start_new_session=True,
        env=os.environ | {MARK: mark},
    )  # fmt: skip
    os.close(writes)
    relay = Thread(target=_show, args=(os.fdopen(reads, "rb"),), daemon=True)
    relay.start()
    end, has_begun = time.monotonic() + timeout, False
    try:
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(POLL)
            if not has_begun and begun.exists():
                end, has_begun = time.monotonic() + timeout, True
        return None
    finally:
        with suppress(OSError):  # what it started ends with it
            os.killpg(child.pid, signal.SIGKILL) if os.name == "posix" else child.kill()
        child.wait()
        _end_marked(mark)
        relay.join(GRACE)


def _end_marked(mark: str) -> None:
    """End what the child started in sessions of their own: it has the child's environment."""
    import psutil

    for _ in range(ROUNDS):  # in one round another can begin
        marked = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    marked.append(process)
        if not marked:
            return
        psutil.wait_procs(marked, timeout=GRACE)


def _show(output: IO[bytes]) -> None:
    """Write what a process prints to the standard error, each line without control characters."""
    with output, suppress(OSError, ValueError):
        while line := output.readline(4096):
            if sys.stderr is not None:
                print(printable(line.decode("utf-8", "replace").rstrip("\r\n")), file=sys.stderr, flush=True)


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _last_line(traces: str) -> str:
    """Return the file and the line of the user's code that ran last, by what faulthandler wrote; or nothing."""
    for file, line in re.findall(r'File "(.*)", line (\d+) in ', traces):
        if is_theirs(file):
            return printable(f", in {os.path.basename(file)}, line {line}")
    return ""


# --- the child ------------------------------------------------------------------------------------


def _tell(answer: str, **message: Any) -> None:
    """Write an answer, whole or not at all."""
    Path(answer + ".part").write_text(json.dumps(message), encoding="utf-8")
    os.replace(answer + ".part", answer)


def main(target: str, dtype: str, timeout: str, answer: str, traces: str, begun: str) -> NoReturn:
    """Check, write the file `answer`, and end the process, whatever foreign code has left running in it.

    The file `traces` gets what ``faulthandler`` writes. The file `begun` is there from when the target is imported.
    """
    leave, checking = os._exit, os.getpid()

    def tell_and_leave(status: int) -> NoReturn:
        if os.getpid() == checking:  # a child of it ends so
            place = traceback.extract_stack(limit=2)[0]
            where = f"{os.path.basename(place.filename)}, line {place.lineno}"
            _tell(answer, cannot=f"it calls os._exit({status}), in {where}")
        leave(status)

    with open(traces, "w", encoding="utf-8") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(float(timeout), file=file)
        os._exit = tell_and_leave
        sys.path.insert(0, os.getcwd())
        try:
            implementation = imported(target)
            Path(begun).touch()
            faulthandler.dump_traceback_later(float(timeout), file=file)
            report = check(implementation, dtype=dtype or None, name=target)
            _check_output()
            message: dict[str, Any] = {"report": report.as_dict()}
        except (ImportError, AttributeError, CannotRun, OSError) as error:
            message = {"cannot": " ".join(str(error).split())}
        except BaseException as error:  # what `check` lets through: Ctrl-C, and what an attribute raises
            line = line_of(error)
            message = {"cannot": f"it raises {raised(error)}" + (f", in {line}" if line else "")}
        _tell(answer, **message)
        with suppress(Exception):
            sys.stdout.flush()
        leave(0)


def _check_output() -> None:
    """Refuse an implementation that closed the standard output: that of a program that uses it is gone."""
    try:
        sys.stdout.flush()
        os.fstat(1)
    except (OSError, ValueError, AttributeError):
        raise CannotRun("it closes the standard output") from None
