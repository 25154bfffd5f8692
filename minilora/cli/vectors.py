"""``minilora vectors``: problems and answers for implementations in other languages."""

from __future__ import annotations

import argparse
from typing import Any

from .console import check_output, compared, path, printable


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "vectors",
        help="write problems and answers for a LoRA in another language, or judge its answers",
        description=(
            "Write problems and answers as safetensors, with an index in JSON: linear layers, embeddings, "
            "convolutions, rsLoRA, DoRA both ways, dropout, a base in NF4 or bfloat16, fused slots, experts, ten steps "
            "of Adam; float64, float32, float16 and bfloat16. "
            "With --compare, judge the answers that a program wrote. Exit code 1 if a claim is broken."
        ),
    )
    parser.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="a new folder for the vectors; with --compare, the folder that has them",
    )
    parser.add_argument("--compare", type=path, metavar="RESULTS", help="a folder with a program's answers")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the verdicts there, with all ids and versions")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the vectors, or print a verdict for each precision. Returns 1 where one is wrong."""
    from ..conformance import vectors

    if options.json and options.compare is None:
        raise ValueError("--json: expected --compare RESULTS with it")
    if options.compare is None:
        count = vectors.write(options.folder)
        print(f"{count} cases written to {printable(str(options.folder))}; index.json says what is in them")
        return 0
    check_output(options.json, compared(options))
    reports = vectors.compare(options.folder, options.compare)
    status = 0 if all(report.passed for report in reports) else 1
    if options.json:
        from ..conformance.checking.report import save_json

        verdicts = [
            report.as_dict() | {"failing": [case.id for case in report.every_case() if case.failed]}
            for report in reports
        ]
        save_json(options.json, status=status, precisions=verdicts)
    print("\n\n".join(map(str, reports)))
    return status
