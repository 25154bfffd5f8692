"""``python -m minilora.conformance MODULE[:OBJECT]``: hold a LoRA of your own against the formulas."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from ..files.errors import printable
from .calling import line_of, raised
from .reference import UNIT
from .suite import CannotRun, check, save_json


def imported(target: str) -> Any:
    """Return the module or the object that MODULE[:OBJECT] names.

    Raises
    ------
    ImportError, AttributeError, CannotRun
        If there is none, or the module raises.
    """
    module, _, path = target.partition(":")
    if not module or module.endswith(".py") or {"/", os.sep} & set(module):
        raise CannotRun("expected the name of a module, such as my_module for my_module.py")
    try:
        found = importlib.import_module(module)
    except ImportError:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({os.path.basename(place.filename)}, line {place.lineno})"
        raise CannotRun(f"importing it raises {raised(error)}{where}") from None
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 where a claim is broken, and 2 where nothing could be checked."""
    parser = argparse.ArgumentParser(
        "python -m minilora.conformance",
        description="Hold an implementation of LoRA against the formulas, and name what is wrong with it.",
    )
    parser.add_argument("implementation", metavar="MODULE[:OBJECT]", help="what has forward, and perhaps backward")
    parser.add_argument("--dtype", choices=list(UNIT), help="the precision to check in")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    options = parser.parse_args(argv)
    if options.json == "":
        parser.error("argument --json: expected the name of a file, got ''")
    sys.path.insert(0, os.getcwd())
    name = options.implementation
    try:
        with _exit_raises():
            report = check(imported(name), dtype=options.dtype, name=name)
        if options.json:
            save_json(report, options.json)
    except (ImportError, AttributeError, CannotRun, OSError) as error:
        return _cannot(name, "could not be checked", " ".join(str(error).split()))
    except BaseException as error:  # what `check` lets through: Ctrl-C, and what an attribute raises
        line = line_of(error)
        return _cannot(name, "could not be checked", f"it raises {raised(error)}" + (f", in {line}" if line else ""))
    try:
        if sys.stdout is None:  # as after >&- in a shell
            raise OSError("there is no standard output")
        print(report, flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head has
        _discard_output()
    except (OSError, ValueError) as error:  # a full disk, a closed file, letters that it has no bytes for
        _discard_output()
        return _cannot(name, "was checked, and the report could not be written", str(error))
    return 0 if report.passed else 1


def _cannot(name: str, what: str, why: str) -> int:
    """Say in one line what could not be done, and return the exit code."""
    print(printable(f"{name} {what}: {why}"), file=sys.stderr)
    return 2


def _discard_output() -> None:
    """Let what is left of the output go nowhere, or Python would fail once more at its end."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _exit_raises() -> Iterator[None]:
    """Make os._exit raise in this process: one that ends in the middle of a check looks like one that passed."""
    leave, checking = os._exit, os.getpid()

    def exit_raises(status: int) -> NoReturn:
        if os.getpid() != checking:  # a child, which ends so
            leave(status)
        raise SystemExit(f"os._exit({status})")

    os._exit = exit_raises
    try:
        yield
    finally:
        os._exit = leave


if __name__ == "__main__":
    raise SystemExit(main())
