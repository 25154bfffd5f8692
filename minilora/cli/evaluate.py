"""``minilora evaluate``: measure the loss of a language model on a text or on examples, with and without an adapter."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..language.recipe import SKIP_BAD_HELP
from ..texts import printable
from .console import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    add_system,
    check_output,
    chosen_backend,
    files,
    given_or_saved,
    limit_blas,
    loading,
    path,
)

LARGEST_LOSS = 700.0
"""The largest loss with a finite perplexity, exp(loss)."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the loss of a language model, with and without an adapter",
        description=(
            "Print the loss in nats a token, and the perplexity, on a whole text or .jsonl file of examples, in the "
            "formats of finetune; with --adapter, both for the model without the adapter and with it."
        ),
        epilog="example: minilora evaluate unseen.txt --model smollm2 --adapter my-notes",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("text", type=path, metavar="FILE", help="a text file in UTF-8, or a .jsonl file of examples")
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    add_system(option, "of each chat that has none")
    option(
        "--length",
        type=int,
        metavar="N",
        help="tokens in a window (default: 128); longer examples are truncated to it (default: none is)",
    )
    option("--skip-bad", type=path, metavar="FILE", help=SKIP_BAD_HELP)
    add_quantize(parser)
    add_backend(parser)
    parser.set_defaults(command=run, before_numpy=limit_blas)


def run(options: argparse.Namespace) -> int:
    """Print the losses."""
    from ..language.data import BadLine, load_data
    from ..language.finetune import default_workers, print_skipped, warn_beyond_context, write_skipped
    from ..language.losstable import shown_parts
    from ..language.source import AdapterSource, ModelSource
    from ..language.text import check_vocabulary, evaluate_where_it_counts, next_token_loss

    check_output(options.skip_bad, files("the file to measure", options.text), "--skip-bad")
    backend, source = chosen_backend(options.backend), ModelSource(options.model)
    adapter = AdapterSource.open(options.adapter, "float32", backend) if options.adapter else None
    system = given_or_saved(options.system, adapter)
    skipped: list[BadLine] | None = None if options.skip_bad is None else []
    data = load_data(options.text, source, options.length, held_out=0, system=system, skipped=skipped)
    if options.system and not data.chats:
        raise ValueError(f"--system applies to chats, but {str(options.text)!r} has none")
    if skipped:
        write_skipped(options.skip_bad, skipped, overwrite=False)
        print_skipped(options.skip_bad, skipped)
    with loading(source.name):
        model = source.load("float32", backend, options.quantize)
    check_vocabulary(data.largest_id, model.lm_head.out_features)
    warn_beyond_context(model, data.X.shape[1], "an example has" if data.example else "a window has")
    print(f"{'data' if data.example else 'text':8} {printable(str(options.text))}: {data.summary}", flush=True)
    for note in data.notes:
        print(f"         {note}", flush=True)
    if system and data.chats:
        kept = "" if options.system else " (the adapter's; --system replaces it)"
        print(f"system   {printable(system, 80)}{kept}", flush=True)
    models = {source.name: model}
    if adapter is not None:
        models[f"with {printable(str(adapter.path))}"] = adapter.attached(model, backend, options.quantize)
    X, Y, workers = backend.asarray(data.X), backend.asarray(data.Y), default_workers(backend)
    for name, layer in models.items():
        loss = evaluate_where_it_counts(layer, X, Y, next_token_loss, workers, shown_parts)
        perplexity = math.exp(loss) if loss < LARGEST_LOSS else math.inf
        print(f"loss     {loss:.4f} nats a token, perplexity {perplexity:.4g}: {name}", flush=True)
    return 0
