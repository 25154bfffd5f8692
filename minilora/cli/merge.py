"""``minilora merge``: merge an adapter in PEFT's layout into a model's weights."""

from __future__ import annotations

import argparse
from typing import Any

from ..texts import printable
from .console import MOST_ROWS, NAMED_MODELS_HELP, add_all, by_kind, model, path


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "merge",
        help="merge an adapter in PEFT's layout into a model's weights",
        description=(
            "Write a model with the adapter merged into its weights: W + scaling B A. A model's folder becomes a "
            "folder that loads like the base, with its configuration and tokenizer; a file of weights becomes a file. "
            "Dtypes and all other tensors stay as they are. Only a few rows are in memory at a time. A .gguf file "
            "becomes a folder in float32 with its tokenizer; for that, the whole model must fit into memory."
        ),
        epilog="example: minilora merge model.safetensors my-adapter -o merged.safetensors",
    )
    option = parser.add_argument
    option(
        "base",
        type=model,
        metavar="BASE",
        help="a model's folder (Hugging Face's layout); or its weights alone: a .safetensors file, or the "
        f".safetensors.index.json of shards; or a .gguf file{NAMED_MODELS_HELP}",
    )
    option("adapter", type=path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    option(
        "-o",
        "--output",
        type=path,
        metavar="OUT",
        required=True,
        help="the output: a new folder if BASE is a folder or has shards, otherwise a file",
    )
    option(
        "--layout",
        metavar="NAME=LAYOUT",
        action="append",
        type=_layout,
        help="how the base stores the weights of modules called NAME: out-in (a Linear) or in-out (GPT-2's Conv1D); "
        "may be given several times",
    )
    add_all(parser)
    option("--overwrite", action="store_true", help="replace the file OUT if minilora wrote it")
    option("--dry-run", action="store_true", help="check everything and print what would change, but write nothing")
    parser.set_defaults(command=run)


def _layout(text: str) -> tuple[str, str]:
    """Parse NAME=LAYOUT."""
    name, sign, layout = text.rpartition("=")
    if not name or not sign or layout not in ("out-in", "in-out"):
        raise argparse.ArgumentTypeError(f"expected NAME=out-in or NAME=in-out, got {text!r}")
    return name, layout


def run(options: argparse.Namespace) -> int:
    """Write the merged weights, and print a line for each tensor that changed."""
    from ..files.disk import TENSORS_PATTERN, check_new_file
    from ..files.merge import merge_adapter
    from ..texts import align

    layouts = dict(options.layout or ())
    if options.base.suffix == ".gguf":
        return run_gguf(options)
    if not options.dry_run:
        check_new_file("-o", options.output, options.overwrite, TENSORS_PATTERN)
    changes = merge_adapter(
        options.base, options.adapter, options.output, layouts=layouts, dry_run=options.dry_run, progress=True
    )
    head = ("tensor", "file", "dtype", "shape", "layout", "rank", "scaling")
    lines: list[tuple[str, ...]] = []
    for c in changes:
        shape = " x ".join(map(str, c.shape))
        layout = str(c.form).replace("linear", c.layout)
        lines.append((c.name, printable(c.file), c.dtype, shape, layout, f"{c.rank}", f"{c.scaling:.4g}"))
    lines = lines if options.all or len(lines) <= MOST_ROWS else by_kind(lines)
    print(*align([head, *lines], left={0, 1, 2, 4}), sep="\n")
    tensors = "1 tensor" if len(changes) == 1 else f"{len(changes)} tensors"
    if options.dry_run:
        print(f"{tensors} would change; nothing was written")
    else:
        print(f"{tensors} merged into {printable(str(options.output))}")
    return 0


def run_gguf(options: argparse.Namespace) -> int:
    """Merge the adapter into a .gguf model, and write the result as a folder."""
    from ..language.files.save import merge_gguf

    if options.layout or options.dry_run:
        raise ValueError("--layout and --dry-run apply to safetensors, but the model is a .gguf file")
    changes = merge_gguf(options.base, options.adapter, options.output)
    print(f"{len(changes)} layers merged into {printable(str(options.output))}, in float32 and with the tokenizer")
    return 0
