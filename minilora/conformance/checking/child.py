"""Find the implementation that a command line names, and check it in a process of its own.

Foreign code may crash, hang or end its process, which Python cannot catch. So the check runs in a child process, which
writes its report into a file. Where it ends before that, ``faulthandler`` has written which line ran last. The process
is no sandbox: the code can do what the user can.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ...fast.blas import BLAS_THREADS
from ...report import CannotRun
from ...texts import printable
from .kindreport import KindReport
from .places import is_theirs, line_of, raised

FILE = re.compile(r"(.+\.py)(?::(.*))?", re.DOTALL)
BEGIN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from {__name__} import check_here
del sys.path[0]
check_here(*sys.argv[1:])
"""
"""What the child runs: this package, whatever files lie in the working folder; these are found from then on."""


def sources(target: str) -> list[Path]:
    """Return the files of this folder that MODULE[:OBJECT] or FILE.py[:OBJECT] may mean. Nothing is imported."""
    if match := FILE.fullmatch(target):
        return [Path(match[1])]
    name = target.partition(":")[0].replace(".", "/")
    return [Path(f"{name}.py"), Path(name, "__init__.py")]


def imported(target: str) -> Any:
    """Return the module or the object that MODULE[:OBJECT] or FILE.py[:OBJECT] names.

    An ImportError, AttributeError or CannotRun says why there is none.
    """
    match = FILE.fullmatch(target)
    module, path = match.groups() if match else target.partition(":")[::2]
    if not module or (not match and {"/", os.sep} & set(module)):
        raise CannotRun("expected the name of a module, such as my_module, or a file, such as folder/my_module.py")
    if match and not os.path.isfile(module):
        raise CannotRun(f"there is no file {module!r}")
    try:
        subject = _of_file(module) if match else importlib.import_module(module)
    except ImportError:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({os.path.basename(place.filename)}, line {place.lineno})"
        raise CannotRun(f"importing it raises {raised(error)}{where}") from None
    for part in path.split(".") if path else ():
        subject = getattr(subject, part)
    return subject


def _of_file(path: str) -> ModuleType:
    """Import a file, whatever else has its name. It finds the modules that lie beside it."""
    folder, file = os.path.split(os.path.abspath(path))
    name = file.removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  # as of any file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_apart(target: str, *, dtype: str | None = None, timeout: float = 20.0) -> KindReport:
    """Check what MODULE[:OBJECT] or FILE.py[:OBJECT] names, in a child process.

    The import may take `timeout` seconds, and then the check. `CannotRun` says why there is no report.
    """
    with tempfile.TemporaryDirectory(prefix="minilora-", ignore_cleanup_errors=True) as folder:
        answer, traces = Path(folder, "answer"), Path(folder, "traces")
        command = [sys.executable, "-P", "-c", BEGIN, target, dtype or "", str(timeout), str(answer), str(traces)]
        output = subprocess.DEVNULL if sys.stderr is None else 2  # what it prints goes to the standard error
        # On a busy machine the threads of a BLAS wait for each other, and small products would reach the timeout.
        env = dict.fromkeys(BLAS_THREADS, "1") | os.environ
        status = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output).returncode
        if status == 0 and answer.exists():
            found = json.loads(answer.read_bytes())
            if isinstance(found, str):
                raise CannotRun(found)
            return KindReport.of(found)
        trace = traces.read_text("utf-8", "replace") if traces.exists() else ""
    if trace.startswith("Timeout"):
        raise CannotRun(f"it took longer than {timeout:g} s (--timeout){_last_line(trace)}")
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
    raise CannotRun(f"it ends the process {how}{_last_line(trace)}")


def _last_line(traces: str) -> str:
    """Say in which file and line of the user's code it was last, by what faulthandler wrote; empty where it was not."""
    for file, line in re.findall(r'File "(.*)", line (\d+) in ', traces):
        if is_theirs(file):
            return printable(f", in {os.path.basename(file)}, line {line}")
    return ""


def check_here(target: str, dtype: str, timeout: str, answer: str, traces: str) -> NoReturn:
    """Be the child: check, write the report or why there is none, and end, whatever foreign code has left running."""
    from .check import check  # the parent does without it

    with open(traces, "w", encoding="utf-8") as file:
        faulthandler.enable(file)
        faulthandler.dump_traceback_later(float(timeout), exit=True, file=file)
        sys.path.insert(0, os.getcwd())
        found: KindReport | str
        try:
            implementation = imported(target)
            faulthandler.dump_traceback_later(float(timeout), exit=True, file=file)
            found = check(implementation, dtype=dtype or None, name=target)
        except (ImportError, AttributeError, CannotRun, OSError) as error:
            found = " ".join(str(error).split())
        except BaseException as error:  # what `check` lets through: Ctrl-C, and what an attribute raises
            found = f"it raises {raised(error)}{line_of(error)}"
        faulthandler.cancel_dump_traceback_later()
        Path(answer).write_text(json.dumps(found if isinstance(found, str) else asdict(found)))
        with suppress(Exception):  # it may have closed it
            sys.stdout.flush()
        os._exit(0)
