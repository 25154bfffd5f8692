"""Check the implementation that a command line names in a child process.

Foreign code may crash, hang or exit, which Python cannot catch. So the check runs in a child process, which writes its
report to a file. If the child ends before that, ``faulthandler`` has written which line ran last. The process is not a
sandbox: the code can do whatever the user can.
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
from .places import error_text, is_user_code, line_of

FILE_AND_OBJECT = re.compile(r"(.+\.py)(?::(.*))?", re.DOTALL)
PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from {__name__} import check_here
del sys.path[0]
check_here(*sys.argv[1:])
"""
"""The child's program. It imports this package first, so that no file in the working folder can shadow it."""


def sources(target: str) -> list[Path]:
    """Return the files in the working folder that MODULE[:OBJECT] or FILE.py[:OBJECT] may mean, importing nothing."""
    if match := FILE_AND_OBJECT.fullmatch(target):
        return [Path(match[1])]
    name = target.partition(":")[0].replace(".", "/")
    return [Path(f"{name}.py"), Path(name, "__init__.py")]


def imported(target: str) -> Any:
    """Import and return the module or object that MODULE[:OBJECT] or FILE.py[:OBJECT] names.

    Raises ImportError, AttributeError or CannotRun if there is none.
    """
    match = FILE_AND_OBJECT.fullmatch(target)
    module, path = match.groups() if match else target.partition(":")[::2]
    if not module or (not match and {"/", os.sep} & set(module)):
        raise CannotRun("expected the name of a module, such as my_module, or a file, such as folder/my_module.py")
    if match and not os.path.isfile(module):
        raise CannotRun(f"there is no file {module!r}")
    try:
        subject = _import_file(module) if match else importlib.import_module(module)
    except ImportError:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({os.path.basename(place.filename)}, line {place.lineno})"
        raise CannotRun(f"importing it raises {error_text(error)}{where}") from None
    for part in path.split(".") if path else ():
        subject = getattr(subject, part)
    return subject


def _import_file(path: str) -> ModuleType:
    """Import a file even if another module has its name. It can import modules from its own folder."""
    folder, file = os.path.split(os.path.abspath(path))
    name = file.removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  # true for any file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_in_child(target: str, *, dtype: str | None = None, timeout: float = 20.0) -> KindReport:
    """Check what MODULE[:OBJECT] or FILE.py[:OBJECT] names, in a child process.

    The import may take `timeout` seconds, and the check as long again. Raises CannotRun if there is no report.
    """
    with tempfile.TemporaryDirectory(prefix="minilora-", ignore_cleanup_errors=True) as folder:
        answer, traces = Path(folder, "answer"), Path(folder, "traces")
        command = [sys.executable, "-P", "-c", PROGRAM, target, dtype or "", str(timeout), str(answer), str(traces)]
        output = subprocess.DEVNULL if sys.stderr is None else 2  # its output goes to standard error
        # On a busy machine BLAS threads wait for each other, and even small products would reach the timeout.
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
    how = f"with {signal.Signals(-status).name}" if status < 0 else f"with exit code {status}"
    raise CannotRun(f"it ends the process {how}{_last_line(trace)}")


def _last_line(traces: str) -> str:
    """Return the file and line of the user's code that ran last according to faulthandler; empty if none did."""
    for file, line in re.findall(r'File "(.*)", line (\d+) in ', traces):
        if is_user_code(file):
            return printable(f", in {os.path.basename(file)}, line {line}")
    return ""


def check_here(target: str, dtype: str, timeout: str, answer: str, traces: str) -> NoReturn:
    """Run the check as the child, write the report or the error, and exit even if foreign code left threads running."""
    from .check import check  # not needed in the parent

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
        except BaseException as error:  # `check` does not catch Ctrl-C, or what reading an attribute raises
            found = f"it raises {error_text(error)}{line_of(error)}"
        faulthandler.cancel_dump_traceback_later()
        Path(answer).write_text(json.dumps(found if isinstance(found, str) else asdict(found)))
        with suppress(Exception):  # foreign code may have closed it
            sys.stdout.flush()
        os._exit(0)
