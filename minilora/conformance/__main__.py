"""``python -m minilora.conformance MODULE[:OBJECT]``: hold a LoRA of your own against the formulas."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .suite import CannotRun, check, save_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 where a claim is broken, and 2 where nothing could be checked."""
    parser = argparse.ArgumentParser(
        "python -m minilora.conformance",
        description="Hold an implementation of LoRA against the formulas, and name what is wrong with it.",
    )
    parser.add_argument("implementation", metavar="MODULE[:OBJECT]", help="what has forward, and perhaps backward")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], help="the precision to check in")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    options = parser.parse_args(argv)
    module, _, path = options.implementation.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        for part in path.split(".") if path else ():
            found = getattr(found, part)
        report = check(found, dtype=options.dtype, name=options.implementation)
        if options.json:
            save_json(report, options.json)
    except (ImportError, AttributeError, CannotRun, OSError) as error:
        print(f"{options.implementation} could not be checked: {error}", file=sys.stderr)
        return 2
    try:
        print(report, flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
