"""The command line: ``minilora`` or ``python -m minilora``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, article
from .backend import Backend, BackendUnavailable, get_backend
from .files import inspection
from .files.adapters import save_adapter
from .files.basefile import INDEX_NAME
from .files.merge import merge_adapter
from .training import TrainingDiverged
from .verify.selfcheck import prove

BACKENDS = ("numpy", "cupy", "auto")

DESCRIPTION = """\
LoRA from scratch in NumPy, every gradient by hand.

LoRA adapts a trained layer y = x W^T without touching W: it learns a change of weight of low rank,
delta = (alpha / rank) B A, from two thin factors A (rank x in) and B (out x rank).
"""

EPILOG = """\
start here:
  minilora article               the experiment of "Understanding LoRA with a minimal example", in a minute
  minilora article --epochs 10   the same, a tenth as long
  minilora article --rank 4      four times the parameters, for a change that needs one
  minilora check                 every hand-written gradient against measured slopes, on this machine
  minilora article --save DIR    write the adapter to a folder, in PEFT's layout
  minilora inspect DIR           what is in such a folder
  minilora merge BASE DIR -o OUT fold it into a checkpoint
  minilora article --help        all the options of a command

then read minilora/lora.py: the derivation and the code on one page.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minilora: {message} (try '{self.prog} --help')\n")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of an option, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "minilora", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_article(commands)
    _add_check(commands)
    _add_merge(commands)
    _add_inspect(commands)
    return parser


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("MINILORA_BACKEND") or "numpy",
        help="library to compute with; auto is cupy where it works ($MINILORA_BACKEND sets the default)",
    )


def _backend(options: argparse.Namespace) -> Backend:
    """Return the backend that was asked for; where "auto" had to fall back, say so in a line of our own."""
    if options.backend not in BACKENDS:  # the parser checks what is typed, not the default
        raise ValueError(f"MINILORA_BACKEND must be one of {', '.join(BACKENDS)}, got {options.backend!r}")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        backend = get_backend(options.backend)
    for note in notes:
        print(f"minilora: {note.message}", file=sys.stderr)
    return backend


def _add_article(commands: Any) -> None:
    run = commands.add_parser(
        "article",
        help="run the article's experiment and print its figures beside ours",
        description=(
            "Pre-train a full-rank linear layer, shift the task by a change of rank 1, learn the change with LoRA, "
            "merge it. Prints the losses beside the article's, and what was learned."
        ),
        formatter_class=_Defaults,
    )
    run.add_argument(
        "--rank", type=int, default=1, metavar="R", help="rank of the adapter: its parameters are R x (in + out)"
    )
    run.add_argument("--alpha", type=float, default=1.0, help="strength of the update, which is scaled by alpha / rank")
    run.add_argument(
        "--epochs", type=int, default=100, metavar="N", help="passes over the data, for the base and for the adapter"
    )
    run.add_argument("--batch-size", type=int, default=128, metavar="N", help="rows drawn for each step")
    run.add_argument("--lr", type=float, default=1e-3, help="Adam's step length")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the data, the start and the batches")
    run.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="precision of everything")
    _add_backend(run)
    run.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw losses, learned change and singular values (.png, .svg, .pdf)"
    )
    run.add_argument("--save", metavar="DIR", type=Path, help="write the adapter there, in PEFT's layout")
    run.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="keep the state of both trainings there after every epoch; the same command goes on from it",
    )
    run.set_defaults(command=_article)


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="check every hand-written gradient of this installation against measured slopes",
        description=(
            "Measure the slope of every forward pass by complex step, at several sizes, and compare it with the "
            "hand-written backward. Exit code 1 if any gradient is wrong."
        ),
        formatter_class=_Defaults,
    )
    check.add_argument("--seed", type=int, default=0, metavar="N", help="of the values")
    _add_backend(check)
    check.set_defaults(command=_check)


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="fold an adapter in PEFT's layout into a checkpoint's weights",
        description=(
            "Write a checkpoint that has the adapter folded into its weights: W + scaling B A. Types and all other "
            "tensors stay as they are. It needs the memory of a few rows, not of the checkpoint."
        ),
    )
    merge.add_argument(
        "base", type=Path, metavar="BASE", help=f"a .safetensors file, or the {INDEX_NAME} of a sharded checkpoint"
    )
    merge.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    merge.add_argument(
        "-o", "--output", type=Path, metavar="OUT", required=True, help="the file to write; with shards, a new folder"
    )
    merge.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would change, write nothing"
    )
    merge.set_defaults(command=_merge)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what is in an adapter in PEFT's layout",
        description=(
            "Print for each layer its shapes, rank, alpha, scaling and number of parameters, the Frobenius norm of its "
            "change of weight, and the share of the squared norm in each singular value."
        ),
    )
    inspect.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    inspect.add_argument("--plot", metavar="FILE", type=Path, help="draw norms and shares (.png, .svg, .pdf)")
    inspect.set_defaults(command=_inspect)


def _article(options: argparse.Namespace) -> int:
    if options.plot:
        from . import figures  # matplotlib is an extra

        figures.check_figure_path(options.plot)
    if options.save:
        _check_save(options.save)
    result = article.run(
        rank=options.rank,
        alpha=options.alpha,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        dtype=options.dtype,
        backend=_backend(options),
        progress=True,
        checkpoint=options.checkpoint,
    )
    print(article.report(result), end="")
    if options.save:
        save_adapter(options.save, {"fc": result.adapter})
        print(f"\nadapter written to {options.save}")
    if options.plot:
        figures.plot_article(result).savefig(options.plot)
        print(f"\nfigure written to {options.plot}")
    return 0


def _check_save(path: Path) -> None:
    """Refuse a folder that could not be written: better before the training than after it."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"--save {str(path)!r}: {str(there)!r} is a file, expected a folder or a new name")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--save {str(path)!r}: the folder {str(there)!r} cannot be written")


def _check(options: argparse.Namespace) -> int:
    backend = _backend(options)
    wrong = count = 0
    proof = list(prove(backend, options.seed))  # a bad seed speaks before the head of the table does
    print(f"{'gradient of':64}{'checked':>14}{'error':>10}{'allowed':>10}")
    for title, report in proof:
        for block in report.blocks:
            verdict = "ok" if block.passed else "WRONG"
            name, at = title.split("  ")
            what = f"{name + ' ' + block.name:34}{at}"
            print(f"{what:64}{block.checked:>14}{block.error:10.1e}{block.allowed:10.1e}  {verdict}")
            count += 1
            wrong += not block.passed
    how = f"complex step, float64, {backend.device}"
    print(f"\n{count - wrong} of {count} gradients agree with the measured slope ({how})")
    return 1 if wrong else 0


def _merge(options: argparse.Namespace) -> int:
    changes = merge_adapter(options.base, options.adapter, options.output, dry_run=options.dry_run, progress=True)
    lines = [("tensor", "file", "dtype", "shape", "rank", "scaling")]
    for c in changes:
        lines.append((c.name, c.file, c.dtype, " x ".join(map(str, c.shape)), f"{c.rank}", f"{c.scaling:.4g}"))
    print(inspection.align(lines, left={0, 1, 2}))
    tensors = "1 tensor" if len(changes) == 1 else f"{len(changes)} tensors"
    print(
        f"{tensors} would change; nothing was written" if options.dry_run else f"{tensors} merged into {options.output}"
    )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    if options.plot:
        from . import figures

        figures.check_figure_path(options.plot)
    summaries = inspection.inspect_adapter(options.adapter)
    print(inspection.table(summaries))
    if options.plot:
        figures.plot_adapter(summaries).savefig(options.plot)
        print(f"\nfigure written to {options.plot}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.

    Returns
    -------
    int
        0; 1 where `check` finds a wrong gradient; 2 where the input or the machine cannot do what was asked; 130 after
        Ctrl-C, and 141 where the output goes to a pipe that nobody reads any more, as shells have it.
    """
    options = _parser().parse_args(argv)
    try:
        status: int = options.command(options)
        sys.stdout.flush()  # a pipe that nobody reads shows here, and not when Python is already ending
        return status
    except BrokenPipeError:  # as in `minilora check | head`; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, MemoryError, BackendUnavailable, TrainingDiverged) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminilora: interrupted", file=sys.stderr)
        return 130
