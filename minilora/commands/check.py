"""``minilora check``: every hand-written gradient of this installation against measured slopes."""

from __future__ import annotations

import argparse
from typing import Any

from .options import Defaults, add_backend, backend


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="check every hand-written gradient of this installation against measured slopes",
        description=(
            "Measure the slope of every forward pass by complex step, at several sizes, and compare it with the "
            "hand-written backward. Exit code 1 if any gradient is wrong."
        ),
        formatter_class=Defaults,
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the values")
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each gradient. Returns 1 where one is wrong."""
    from ..verify.selfcheck import prove

    where = backend(options)
    wrong = count = 0
    proof = list(prove(where, options.seed))  # a bad seed speaks before the head of the table does
    print(f"{'gradient of':64}{'checked':>14}{'error':>10}{'allowed':>10}")
    for title, report in proof:
        for block in report.blocks:
            verdict = "ok" if block.passed else "WRONG"
            name, at = title.split("  ")
            what = f"{name + ' ' + block.name:34}{at}"
            print(f"{what:64}{block.checked:>14}{block.error:10.1e}{block.allowed:10.1e}  {verdict}")
            count += 1
            wrong += not block.passed
    how = f"complex step, float64, {where.device}"
    print(f"\n{count - wrong} of {count} gradients agree with the measured slope ({how})")
    return 1 if wrong else 0
