"""``minilora inspect``: what is in an adapter in PEFT's layout."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .console import align, check_plot, path, write_figure

if TYPE_CHECKING:
    from ..files.inspection import LayerSummary

SHOWN = 8
"""Singular values whose share a line of the table shows."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what is in an adapter in PEFT's layout",
        description=(
            "Print for each layer its shapes, rank, alpha, scaling and number of parameters, the Frobenius norm of its "
            "change of weight, and the share of the squared norm in each singular value."
        ),
    )
    parser.add_argument("adapter", type=path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    parser.add_argument("--plot", metavar="FILE", type=path, help="draw norms and shares (.png, .svg, .pdf)")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the table, and draw it where that was asked for."""
    from ..files.inspection import inspect_adapter

    check_plot(options.plot)
    summaries = inspect_adapter(options.adapter)
    print(table(summaries))
    if options.plot:
        from . import figures

        write_figure(figures.plot_adapter(summaries), options.plot)
    return 0


def table(summaries: list[LayerSummary]) -> str:
    """Return the summaries as a table, for a terminal. Plain linear layers alone need no column of kinds."""
    head = ("module", "kind", "out x in", "rank", "alpha", "scaling", "parameters", "|delta|")
    lines = [(*head, "share of each singular value")]
    for s in summaries:
        shares = " ".join(f"{100 * share:.1f}%" for share in s.shares[:SHOWN]) + " ..." * (len(s.shares) > SHOWN)
        numbers = (f"{s.rank}", f"{s.alpha:g}", f"{s.scaling:.4g}", f"{s.parameters:,}", f"{s.norm:.4g}")
        lines.append((s.module, str(s.form), f"{s.out_features} x {s.in_features}", *numbers, shares))
    lines.append(("total", "", "", "", "", "", f"{sum(s.parameters for s in summaries):,}", "", ""))
    if all(str(s.form) == "linear" for s in summaries):
        return align([(module, *rest) for module, _, *rest in lines], left={0, 7})
    return align(lines, left={0, 1, 8})
