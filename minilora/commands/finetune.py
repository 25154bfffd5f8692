"""``minilora finetune``: an adapter of a language model, trained on a text."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

from ..files.errors import printable
from .cores import add_workers, workers
from .options import Defaults, add_backend, add_model, add_quantize, backend, load_model, model_name, model_path, path

LOG_EVERY = 20
"""Steps from one measurement of the held-out loss to the next."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "finetune",
        help="train an adapter of a language model on a text",
        description=(
            "Freeze a Llama-type language model, put LoRA beside the layers that you name, and train it to predict the "
            "next token of a text. Every tenth window of the text is held out, for the loss that is printed."
        ),
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("text", type=path, metavar="TEXT", help="a text file in UTF-8")
    option("--save", metavar="DIR", type=path, required=True, help="write the adapter there, in PEFT's layout")
    add_model(parser)
    option(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="what to adapt: names such as q_proj,v_proj, one regular expression for whole paths, or all-linear",
    )
    option("--rank", type=int, default=8, metavar="R", help="rank of each adapter")
    option("--alpha", type=float, default=16.0, help="strength of the update, which is scaled by alpha / rank")
    option("--steps", type=int, default=300, metavar="N", help="steps of Adam")
    option("--batch-size", type=int, default=16, metavar="N", help="windows of the text drawn for each step")
    option(
        "--micro-batch",
        type=int,
        metavar="N",
        help="windows at a time, whose gradients are added up to the batch's: the same step with less memory; half of "
        "the batch by default",
    )
    add_workers(parser)
    option("--length", type=int, default=128, metavar="N", help="tokens in a window")
    option("--lr", type=float, default=3e-3, help="Adam's step length")
    option("--seed", type=int, default=0, metavar="N", help="of the adapters' start and the batches")
    option("--dtype", choices=["float32", "float64"], default="float32", help="precision of everything")
    add_quantize(parser)
    add_backend(parser)
    option(
        "--checkpoint",
        metavar="FILE",
        type=path,
        help="keep the training's state there after every step; the same command goes on from it, to more --steps too",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Train, print the held-out loss before and after, and write the adapter."""
    import numpy as np

    from ..adaptation import adapt, adapters
    from ..fast import accumulate, keep_pages
    from ..files.adapters import save_adapter
    from ..files.tokenizer import load_tokenizer
    from ..layer import cache_bytes, parameter_bytes, parameter_count
    from ..text import next_token_loss, read_text, token_ids, windows
    from ..training import check_batch_size, evaluate, train

    _check(options)  # all that could fail after the training is tried before it
    keep_pages()
    where, source = backend(options), model_path(options)
    threads = workers(options, where)
    text, tokenizer = read_text(options.text), load_tokenizer(source)
    model = load_model(options, options.dtype, where)
    ids = token_ids(text, tokenizer.encode, model.lm_head.out_features)
    X, Y, X_held, Y_held = (where.asarray(array) for array in windows(ids, options.length))
    check_batch_size(options.batch_size, len(X), "X, the windows of the text")
    rng = np.random.default_rng(options.seed)
    adapted = adapt(model, _targets(options.target_modules), rank=options.rank, alpha=options.alpha, rng=rng)

    count, trained = parameter_count(model), parameter_count(adapted, trained=True)
    print(f"model    {model_name(options)}: {count:,} parameters in {options.dtype}, {where.device}")
    if options.quantize:
        whole, kept = count * np.dtype(options.dtype).itemsize, parameter_bytes(model)
        print(f"weights  {kept / 1e6:,.1f} MB with quantised linear layers, {whole / 1e6:,.1f} MB without")
    print(f"text     {printable(str(options.text))}: {len(ids):,} tokens, {len(X):,} windows of {options.length}")
    print(f"adapter  rank {options.rank} beside {len(adapters(adapted))} layers: {trained:,} parameters")
    rows = min(options.micro_batch or -(-options.batch_size // 2), options.batch_size)
    at_once = min(threads, -(-options.batch_size // rows))  # parts
    memory = at_once * cache_bytes(adapted.forward(X[:rows])[1])
    print(f"memory   {memory / 1e6:,.1f} MB of activations for the backward of {at_once} x {rows} windows\n")
    print("step  held-out loss, nats a token")
    print(f"{0:4}  {evaluate(adapted, X_held, Y_held, next_token_loss, threads):.3f}", flush=True)
    start = time.perf_counter()
    history = train(
        adapted,
        X,
        Y,
        epochs=options.steps,
        steps=1,
        batch_size=options.batch_size,
        lr=options.lr,
        rng=rng,
        log_every=LOG_EVERY,
        progress=True,
        checkpoint=options.checkpoint,
        loss=next_token_loss,
        gradients=accumulate(rows, threads),
        held_out=(X_held, Y_held),
    )
    seconds = time.perf_counter() - start
    save_adapter(options.save, adapters(adapted), base_model=options.model and str(options.model))
    for step, loss in zip(history.epochs, history.losses, strict=True):
        print(f"{step:4}  {loss:.3f}")
    print(f"\nadapter written to {printable(str(options.save))} after {seconds:.0f} s")
    return 0


def _targets(text: str) -> str | list[str]:
    """Return names as a list; a regular expression, or all-linear, as it is."""
    names = [name.strip() for name in text.split(",")]
    return names if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers out of range and places that cannot be written, before anything is read."""
    from ..checks import check_integer, check_number
    from ..files.adapterfolder import WEIGHTS_NAME
    from ..files.adapters import check_adapter_target
    from ..files.peftconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA

    for name in ("rank", "steps", "batch_size", "length"):
        check_integer(name, getattr(options, name), at_least=1)
    if options.micro_batch is not None:
        check_integer("micro_batch", options.micro_batch, at_least=1)
    check_integer("seed", options.seed, at_least=0)
    check_number("alpha", options.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
    check_number("lr", options.lr, above=0)
    check_adapter_target(options.save)
    save = _place(options.save)
    if options.model is not None and save == _place(options.model):
        raise ValueError(f"save {str(options.save)!r} is the model's folder, expected one of the adapter's own")
    if options.checkpoint is not None:
        file = _place(options.checkpoint)
        if file in (save, *save.parents, save / WEIGHTS_NAME, save / CONFIG_NAME):
            raise ValueError(f"the checkpoint {str(file)!r} would lie where the adapter goes: name another file")


def _place(path: Path) -> Path:
    """Return where a path leads. `Path.resolve` says the same, and fails on a circle of links before Python 3.13."""
    return Path(os.path.realpath(path))
