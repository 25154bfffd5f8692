"""``minilora check``: every hand-written gradient of this installation against measured slopes."""

from __future__ import annotations

import argparse
from typing import Any

from .console import Defaults, add_backend, chosen_backend


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
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the values")
    add_backend(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print a line for each gradient, and those that are wrong again at the end. Returns 1 where one is."""
    from ..language.llamainstance import ALL_INSTANCES
    from ..verify.instances import prove

    backend = chosen_backend(options.backend)
    proof = list(prove(backend, options.seed, ALL_INSTANCES))  # a bad seed speaks before the head of the table does
    blocks = [(title.split("  "), block) for title, report in proof for block in report.blocks]
    names = [f"{name} {block.name}" for (name, _), block in blocks]
    width, places = max(map(len, names)), max(len(at) for (_, at), _ in blocks)
    head = f"{'gradient of':{width}}  {'at':{places}}{'checked':>14}{'error':>10}{'allowed':>10}"
    print(head)
    wrong = []
    for name, ((_, at), block) in zip(names, blocks, strict=True):
        numbers = f"{block.checked:>14}{block.error:10.1e}{block.allowed:10.1e}"
        row = f"{name:{width}}  {at:{places}}{numbers}  {'ok' if block.passed else 'WRONG'}"
        print(row)
        if not block.passed:
            slopes = f"{block.analytic:.9g}, and the measured slope is {block.numeric:.9g}"
            at_worst = "along one direction" if block.worst is None else f"at {block.worst}"
            wrong += [row, f"    {at_worst} it is {slopes}", *(f"    {sentence}" for sentence in block.diagnosis)]
    if wrong:
        print("\nThe wrong ones again:", head, *wrong, sep="\n")
    count, failed = len(blocks), sum(not block.passed for _, block in blocks)
    how = f"complex step, float64, {backend.device}"
    print(f"\n{count - failed} of {count} gradients agree with the measured slope ({how})")
    return 1 if failed else 0
