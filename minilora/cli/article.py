"""``minilora article``: the article's experiment, with its numbers next to ours."""

from __future__ import annotations

import argparse
from contextlib import nullcontext, suppress
from typing import Any

from ..texts import printable
from . import console

RUN_SETTINGS = ("rank", "alpha", "epochs", "batch_size", "lr", "seed", "dtype", "checkpoint")
"""The options that `minilora.article.run` accepts under the same names."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "article",
        help="reproduce the article's experiment, and print its numbers next to ours",
        description=(
            "Pre-train a full-rank linear layer, shift the task by a change of rank 1, learn the change with LoRA, "
            "and merge it. Print the losses next to the article's, and what was learned."
        ),
        formatter_class=console.Defaults,
    )
    option = parser.add_argument
    option("--rank", type=int, default=1, metavar="R", help="rank of the adapter: its parameters are R x (in + out)")
    option("--alpha", type=float, default=1.0, help="strength of the update, which is scaled by alpha / rank")
    option(
        "--epochs", type=int, default=100, metavar="N", help="passes over the data, for the base and for the adapter"
    )
    option("--batch-size", type=int, default=128, metavar="N", help="rows drawn for each step")
    option("--lr", type=float, default=1e-3, help="Adam's learning rate")
    option("--seed", type=int, default=0, metavar="N", help="seed of the data, the initialisation and the batches")
    option("--dtype", choices=["float32", "float64"], default="float32", help="dtype of all arrays")
    console.add_backend(parser)
    option(
        "--plot",
        metavar="FILE",
        type=console.path,
        help="plot losses, learned change and singular values (.png, .svg, .pdf)",
    )
    option("--save", metavar="DIR", type=console.path, help="write the adapter to this folder, in PEFT's layout")
    option(
        "--overwrite",
        action="store_true",
        help="replace an adapter in the folder of --save, and the file of --plot, if minilora wrote them",
    )
    option(
        "--checkpoint",
        metavar="FILE",
        type=console.path,
        help="save the training state of the base and of the adapter after every epoch, to this file and one next to "
        "it; rerun the command to resume",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the experiment, print its report, and write the requested files."""
    from .. import article
    from ..checks import MAX_ALPHA, MIN_ALPHA, check_number
    from ..extras import requiring
    from ..fast import keep_pages
    from ..files.disk import FIGURE_PATTERN, check_new_file

    keep_pages()
    check_number("alpha", options.alpha, above=MIN_ALPHA, below=MAX_ALPHA)  # before the training rather than after it
    console.check_plot(options.plot)
    check_new_file("plot file", options.plot, options.overwrite, FIGURE_PATTERN)
    if options.save:
        with requiring("--save"):
            from ..files.adapters import check_adapter_target, check_no_adapter, check_own_adapter, save_adapter

        check_adapter_target(options.save)
        check_no_adapter(options.save, options.overwrite)
        check_own_adapter(options.save)
    if progress := _kept(options):
        console.say(f"the checkpoint is at {progress}")

    def tell(text: str) -> None:
        """Print text without buffering; with --save, ignore a closed pipe, so that the adapter is still saved."""
        with suppress(OSError) if options.save else nullcontext():
            print(text, end="", flush=True)

    try:
        settings = {name: getattr(options, name) for name in RUN_SETTINGS}
        result = article.run(**settings, backend=console.chosen_backend(options.backend), tell=tell)
    except KeyboardInterrupt:
        console.say_interrupted()
        if progress := _kept(options):
            console.say_how_to_resume(f"{progress} is saved", options.typed)
        return 130
    if options.save:
        save_adapter(options.save, {"fc": result.adapter}, overwrite=True)
        print(f"\nadapter written to {printable(str(options.save))}")
    if options.plot:
        from . import figures

        console.write_figure(figures.plot_article(result), options.plot)
    return 0


def _kept(options: argparse.Namespace) -> str:
    """Describe the progress in the checkpoint; return "" if there is none."""
    if options.checkpoint is None:
        return ""
    from ..article import checkpoint_files
    from ..extras import requiring

    with requiring("--checkpoint"):
        from ..files.checkpoint import read_checkpoint

    files = checkpoint_files(options.checkpoint)
    for name in reversed(files):  # the adapter's is the last one
        saved = read_checkpoint(files[name])
        if saved is not None:
            return f"epoch {saved.epoch} of {options.epochs} of the {name} ({options.checkpoint})"
    return ""
