"""``minilora evaluate``: the loss of a language model on a text or on examples, with an adapter and without."""

from __future__ import annotations

import argparse
import math
from typing import Any

from ..language.finetuning.cores import one_blas_thread
from .options import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    backend,
    model_name,
    path,
    warn_beyond_context,
)
from .streams import printable

MOST = 700.0
"""A loss whose exponential is a float: above it a perplexity is infinite."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure the loss of a language model, with an adapter and without",
        description=(
            "Print the loss in nats a token, and the perplexity, on all of a text or of a .jsonl file of examples, as "
            "finetune takes them; with --adapter of the model alone and of the model with the adapter."
        ),
        epilog="example: minilora evaluate unseen.txt --model SmolLM2-135M --adapter my-notes",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("text", type=path, metavar="FILE", help="a text file in UTF-8, or a .jsonl file of examples")
    add_model(parser)
    option("--adapter", type=path, metavar="DIR", help="an adapter of this model, in PEFT's layout")
    option("--length", type=int, metavar="N", help="tokens in a window (default: 128); longer examples are cut")
    add_quantize(parser)
    add_backend(parser)
    parser.set_defaults(command=run, before_numpy=one_blas_thread)


def run(options: argparse.Namespace) -> int:
    """Print the losses."""
    from ..files.adapters import load_adapter
    from ..language.data import load_data
    from ..language.finetuning.cores import worker_count
    from ..language.finetuning.heartbeat import Heartbeat
    from ..language.finetuning.losstable import write_line
    from ..language.namedmodel import load_model, model_path, with_adapters
    from ..language.text import evaluate_where_it_counts, next_token_loss

    where = backend(options)
    adapters = load_adapter(options.adapter, dtype="float32", backend=where) if options.adapter else {}
    with Heartbeat(write_line, "reading the tokenizer and the text") as beat:
        data = load_data(options.text, model_path(options.model), options.length, held_out=0)
        beat.now("reading the weights")
        model = load_model(options.model, "float32", where, options.quantize)
        data.check_vocabulary(model.lm_head.out_features)
        warn_beyond_context(model, data.X.shape[1], "an example has" if data.example else "a window has")
        print(f"{'data' if data.example else 'text':8} {printable(str(options.text))}: {data.summary}", flush=True)
        models = {model_name(options.model): model}
        if adapters:
            adapted = with_adapters(model, adapters, options.adapter, where, options.quantize)
            models[f"with {printable(str(options.adapter))}"] = adapted
        X, Y, threads = where.asarray(data.X), where.asarray(data.Y), worker_count(None, where.name)
        for name, layer in models.items():
            beat.now(f"measuring the loss of {name}")
            loss = evaluate_where_it_counts(layer, X, Y, next_token_loss, threads)
            perplexity = math.exp(loss) if loss < MOST else math.inf
            print(f"loss     {loss:.4f} nats a token, perplexity {perplexity:.4g}: {name}", flush=True)
    return 0
