"""``minilora export``: convert an adapter in PEFT's layout to llama.cpp's format."""

from __future__ import annotations

import argparse
from typing import Any

from ..texts import printable
from .console import add_model, path


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write an adapter in PEFT's layout as a .gguf file for llama.cpp",
        description=(
            "Write an adapter of a Llama decoder as a LoRA file for llama.cpp, in float32. rsLoRA and patterns are "
            "folded into the factors, so that llama.cpp computes the same scaling. Needs the package gguf."
        ),
    )
    parser.add_argument("adapter", type=path, metavar="ADAPTER", help="a folder in PEFT's layout")
    add_model(parser, "the decoder: a Hugging Face folder or a .gguf file", required=True)
    parser.add_argument("-o", "--output", type=path, metavar="FILE.gguf", required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if minilora wrote it")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Write the file, and print how many modules it adapts."""
    from ..files.disk import check_new_file
    from ..language.files.ggufexport import EXPORTED, export_adapter

    check_new_file("-o", options.output, options.overwrite, EXPORTED)
    names = export_adapter(options.adapter, options.model, options.output)
    print(f"{len(names) // 2} modules written to {printable(str(options.output))}")
    return 0
