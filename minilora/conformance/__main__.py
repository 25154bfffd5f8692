"""``python -m minilora.conformance MODULE[:OBJECT]``: hold a LoRA of your own against the formulas."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from .calling import raised
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
    except (Exception, SystemExit) as error:
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
    sys.path.insert(0, os.getcwd())
    try:
        report = check(imported(options.implementation), dtype=options.dtype, name=options.implementation)
        if options.json:
            save_json(report, options.json)
    except (ImportError, AttributeError, CannotRun, OSError) as error:
        print(f"{options.implementation} could not be checked: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        print(report, flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
