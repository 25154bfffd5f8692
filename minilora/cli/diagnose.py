"""``minilora diagnose``: what an engine did with an adapter."""

from __future__ import annotations

import argparse
from typing import Any

from .options import check_output, path


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
    import json

    from ..conformance.diagnosis.diagnosing import diagnose
    from ..files.atomic import written_whole

    if options.json is not None:
        folders = [options.model, options.adapter, options.logits]
        files = [file for one in folders for file in (one.glob("*") if one.is_dir() else [one]) if file.is_file()]
        check_output(options.json, [(file, "a file that is read") for file in files])
    diagnosis = diagnose(options.model, options.adapter, options.logits)
    if options.json is not None:
        with written_whole(options.json) as file:
            file.write((json.dumps(diagnosis.json(), indent=1) + "\n").encode())
    print(diagnosis)
    return diagnosis.status
