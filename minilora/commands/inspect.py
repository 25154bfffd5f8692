"""``minilora inspect``: what is in an adapter in PEFT's layout."""

from __future__ import annotations

import argparse
from typing import Any

from .options import check_plot, path, plot


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
    from ..files import inspection

    if options.plot:
        check_plot(options.plot)
    summaries = inspection.inspect_adapter(options.adapter)
    print(inspection.table(summaries))
    if options.plot:
        from .. import figures

        plot(figures.plot_adapter(summaries), options.plot)
    return 0
