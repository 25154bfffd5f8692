"""``minilora diagnose``: what an engine did with an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from .console import check_output, files, path, write_json


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "diagnose",
        help="say from an engine's logits what it did with an adapter of yours",
        description=(
            "Compute what a decoder and an adapter give, and what they would give under each known mistake, and "
            "say which of them an engine's logits are. LOGITS is a safetensors file with `prompts` (P, T) of token "
            "ids, and `logits` (P, T, V) or (P, V), or `log_probabilities` of the same shape, with `ids` beside "
            "them where they are of some tokens; its metadata may say `computed_in`, such as bfloat16. Exit code 0 "
            "where the logits are right, 1 where they are wrong, 2 where they cannot be judged."
        ),
    )
    parser.add_argument("logits", type=path, metavar="LOGITS", help="what the engine answered, a .safetensors file")
    parser.add_argument(
        "--model", type=path, metavar="MODEL", required=True, help="the decoder: a Hugging Face folder or a .gguf file"
    )
    parser.add_argument(
        "--adapter", type=path, metavar="ADAPTER", required=True, help="the adapter, as `minilora audit` takes it"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="write the diagnosis to a file too")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the diagnosis. Returns 0 of right logits, 1 of wrong ones, 2 where they do not tell."""
    from ..conformance.diagnosis.diagnosing import diagnose

    inputs = (options.model, options.adapter, options.logits)
    check_output(options.json, [file for path in inputs for file in files("a file that is read", path)])
    diagnosis = diagnose(options.model, options.adapter, options.logits)
    write_json(options.json, diagnosis.json())
    print(diagnosis)
    return diagnosis.status
