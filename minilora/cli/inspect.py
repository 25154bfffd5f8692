"""``minilora inspect``: show the contents of an adapter in PEFT's layout."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..texts import printable
from .console import MOST_ROWS, add_all, check_plot, last_name, path, write_figure

if TYPE_CHECKING:
    from ..files.inspection import LayerSummary

SHOWN = 8
"""The number of singular values whose share a line of the table shows."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "inspect",
        help="show the contents of an adapter in PEFT's layout",
        description=(
            "Print for each layer its shapes, rank, alpha, scaling and number of parameters, the Frobenius norm of its "
            "change of weight, and the share of the squared norm in each singular value."
        ),
    )
    parser.add_argument("adapter", type=path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    add_all(parser)
    parser.add_argument("--plot", metavar="FILE", type=path, help="plot norms and shares (.png, .svg, .pdf)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --plot if minilora wrote it")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the table, and draw it if requested."""
    from ..files.adapters import system_message
    from ..files.disk import FIGURE_PATTERN, check_new_file
    from ..files.inspection import inspect_adapter

    check_plot(options.plot)
    check_new_file("plot file", options.plot, options.overwrite, FIGURE_PATTERN)
    summaries = inspect_adapter(options.adapter)
    print(table(summaries, options.all or len(summaries) <= MOST_ROWS))
    if system := system_message(options.adapter):
        print(f"\nsystem message: {printable(system, len(system))}")
    if options.plot:
        from . import figures

        write_figure(figures.plot_adapter(summaries), options.plot)
    return 0


def table(summaries: list[LayerSummary], every: bool = True) -> str:
    """Return the summaries as a table; unless `every`, those of the same kind and size share a row."""
    from ..texts import align

    kinds: dict[Any, list[LayerSummary]] = {}
    for s in summaries:
        name, m = s.path if every else last_name(s.path), s.module
        kinds.setdefault((name, str(m.form), *m.shape, m.rank, m.alpha, m.scaling), []).append(s)
    head = ("module", "kind", "out x in", "rank", "alpha", "scaling", "parameters", "|delta|")
    lines = [(*head, "share of each singular value" if every else "mean share of each singular value")]
    for (name, form, n_out, n_in, rank, alpha, scaling), found in kinds.items():
        least, most = (f"{pick(s.norm for s in found):.4g}" for pick in (min, max))
        shares = [sum(each) / len(found) for each in zip(*(s.shares for s in found), strict=True)]
        shown = " ".join(f"{100 * share:.1f}%" for share in shares[:SHOWN]) + " ..." * (len(shares) > SHOWN)
        parameters = f"{sum(s.parameters for s in found):,}"
        norm = least if least == most else f"{least} to {most}"
        label = name if every else f"{name} x {len(found)}"
        lines.append(
            (label, form, f"{n_out} x {n_in}", f"{rank}", f"{alpha:g}", f"{scaling:.4g}", parameters, norm, shown)
        )
    lines.append(("total", "", "", "", "", "", f"{sum(s.parameters for s in summaries):,}", "", ""))
    if all(str(s.module.form) == "linear" for s in summaries):
        return "\n".join(align([(module, *rest) for module, _, *rest in lines], left={0, 7}))
    return "\n".join(align(lines, left={0, 1, 8}))
