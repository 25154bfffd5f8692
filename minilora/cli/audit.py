"""``minilora audit``: whether an adapter is right, and whether a model takes it."""

from __future__ import annotations

import argparse
from typing import Any

from .console import check_output, files, path, write_json


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "audit",
        help="look at an adapter, and at the model that it is for: is it right, and is it applied?",
        description=(
            "Read an adapter tensor by tensor and of the model the headers alone, and say what the adapter is, whether "
            "every tensor lands, and what is suspicious. Exit code 0 where it is sound, with notes or without, 1 where "
            "it is suspicious or wrong, 2 where it could not be looked at."
        ),
    )
    parser.add_argument(
        "adapter",
        type=path,
        metavar="ADAPTER",
        help="a folder of PEFT's or of mlx-lm's, a .gguf file, or a .safetensors file with the names of PEFT, MLX or "
        "kohya",
    )
    parser.add_argument(
        "--model", type=path, metavar="MODEL", help="a Hugging Face folder, its weights alone, or a .gguf file"
    )
    parser.add_argument(
        "--merge", action="store_true", help="read the model's weights too, and say what merging loses in few bits"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the report to a file too")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 0 of a sound adapter, 1 of another."""
    from ..conformance.audit.auditing import audit

    what = "a file that is looked at"
    check_output(options.json, [*files(what, options.adapter), *files(what, options.model)])
    report = audit(options.adapter, options.model, merge=options.merge)
    write_json(options.json, report.json())
    print(report)
    return report.status
