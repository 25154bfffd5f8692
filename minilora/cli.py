"""The command line: ``minilora`` or ``python -m minilora``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .files.errors import printable

# The commands import what they need: so much NumPy and its libraries take to load, that Ctrl-C often comes then.
if TYPE_CHECKING:
    from .backend import Backend

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
    """A parser whose errors are one line, and which does not hide that its help could not be written."""

    def error(self, message: str) -> NoReturn:
        _say(f"{message} (try '{self.prog} --help')")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


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


def _path(text: str) -> Path:
    """Read an argument that is a path: an empty one, of a variable that is not set, would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _backend(options: argparse.Namespace) -> Backend:
    """Return the backend that was asked for; where "auto" had to fall back, say so in a line of our own."""
    from .backend import get_backend

    if options.backend not in BACKENDS:  # the parser checks what is typed, not the default
        raise ValueError(f"MINILORA_BACKEND must be one of {', '.join(BACKENDS)}, got {options.backend!r}")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        backend = get_backend(options.backend)
    for note in notes:
        _say(str(note.message))
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
        "--plot", metavar="FILE", type=_path, help="draw losses, learned change and singular values (.png, .svg, .pdf)"
    )
    run.add_argument("--save", metavar="DIR", type=_path, help="write the adapter there, in PEFT's layout")
    run.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=_path,
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
        "base",
        type=_path,
        metavar="BASE",
        help="a .safetensors file; of a sharded checkpoint its .safetensors.index.json",
    )
    merge.add_argument("adapter", type=_path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    merge.add_argument(
        "-o", "--output", type=_path, metavar="OUT", required=True, help="the file to write; with shards, a new folder"
    )
    merge.add_argument(
        "--layout",
        metavar="NAME=LAYOUT",
        action="append",
        type=_layout,
        help="how the base stores the weights of the modules of that name: out-in (a Linear) or in-out (GPT-2's "
        "Conv1D); may be given several times",
    )
    merge.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would change, write nothing"
    )
    merge.set_defaults(command=_merge)


def _layout(text: str) -> tuple[str, str]:
    """Read NAME=LAYOUT."""
    name, sign, layout = text.rpartition("=")
    if not name or not sign or layout not in ("out-in", "in-out"):
        raise argparse.ArgumentTypeError(f"expected NAME=out-in or NAME=in-out, got {text!r}")
    return name, layout


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show what is in an adapter in PEFT's layout",
        description=(
            "Print for each layer its shapes, rank, alpha, scaling and number of parameters, the Frobenius norm of its "
            "change of weight, and the share of the squared norm in each singular value."
        ),
    )
    inspect.add_argument("adapter", type=_path, metavar="ADAPTER_DIR", help="a folder in PEFT's layout")
    inspect.add_argument("--plot", metavar="FILE", type=_path, help="draw norms and shares (.png, .svg, .pdf)")
    inspect.set_defaults(command=_inspect)


def _article(options: argparse.Namespace) -> int:
    from . import article
    from .files.adapters import save_adapter

    # All that could fail after the training is tried before it.
    _check_article(options)
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
    if options.save:
        save_adapter(options.save, {"fc": result.adapter})
    print(article.report(result), end="")
    if options.save:
        print(f"\nadapter written to {printable(str(options.save))}")
    if options.plot:
        from . import figures

        _plot(figures.plot_article(result), options.plot)
    return 0


def _check_article(options: argparse.Namespace) -> None:
    """Refuse what the run could not do in the end."""
    import numpy as np

    from .files.adapters import check_adapter_target
    from .files.peftconfig import MAX_ALPHA, MIN_ALPHA

    if options.plot:
        _check_plot(options.plot)
    if options.save:
        check_adapter_target(options.save)
    if options.rank > 0:
        try:
            np.empty((options.rank, 2001), options.dtype)  # the adapter: is there that much memory?
        except ValueError as error:
            raise ValueError(f"rank {options.rank} is too large: {error}") from None
    if math.isfinite(options.alpha) and options.alpha > 0 and not MIN_ALPHA < options.alpha < MAX_ALPHA:
        raise ValueError(f"alpha must be between {MIN_ALPHA:g} and {MAX_ALPHA:g}, got {options.alpha:g}")


def _check_plot(path: Path) -> None:
    """Refuse a file that a figure could not be written to."""
    from . import figures  # matplotlib is an extra
    from .files.writing import replaceable

    figures.check_figure_path(path)
    replaceable(path)
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"plot file {str(path)!r}: the folder {str(path.parent)!r} cannot be written")


def _plot(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    from .files.writing import written_whole

    with written_whole(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower())
    print(f"\nfigure written to {printable(str(path))}")


def _check(options: argparse.Namespace) -> int:
    from .verify.selfcheck import prove

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
    from .files.inspection import align
    from .files.merge import merge_adapter

    layouts = dict(options.layout or ())
    changes = merge_adapter(
        options.base, options.adapter, options.output, layouts=layouts, dry_run=options.dry_run, progress=True
    )
    lines = [("tensor", "file", "dtype", "shape", "layout", "rank", "scaling")]
    for c in changes:
        shape = " x ".join(map(str, c.shape))
        layout = c.layout + " DoRA" * c.form.dora if c.form.kind == "linear" else str(c.form)
        lines.append((c.name, printable(c.file), c.dtype, shape, layout, f"{c.rank}", f"{c.scaling:.4g}"))
    print(align(lines, left={0, 1, 2, 4}))
    tensors = "1 tensor" if len(changes) == 1 else f"{len(changes)} tensors"
    if options.dry_run:
        print(f"{tensors} would change; nothing was written")
    else:
        print(f"{tensors} merged into {printable(str(options.output))}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .files import inspection

    if options.plot:
        _check_plot(options.plot)
    summaries = inspection.inspect_adapter(options.adapter)
    print(inspection.table(summaries))
    if options.plot:
        from . import figures

        _plot(figures.plot_adapter(summaries), options.plot)
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
    _open_streams()
    try:
        status = _run(argv)
        sys.stdout.flush()  # a pipe that nobody reads shows here, and not when Python is already ending
        return status
    except BrokenPipeError:  # as in `minilora check | head`; what is still to be written goes nowhere
        _discard(sys.stdout)
        return 141
    except OSError as error:  # the output cannot be written
        _say(str(error))
        _discard(sys.stdout)
        return 2
    except KeyboardInterrupt:
        _say_interrupted()
        return 130


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; say in one line why it cannot be done."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # of --help
        raise
    with _ending_at_once():
        from .backend import BackendUnavailable
        from .files import merge  # noqa: F401  safetensors and tqdm with it
        from .training import TrainingDiverged
    try:
        status: int = options.command(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, MemoryError, BackendUnavailable, TrainingDiverged) as error:
        _say(str(error) or type(error).__name__)
        try:
            sys.stdout.flush()
        except OSError:  # it has been said
            _discard(sys.stdout)
        return 2


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, as long as there is nothing to tidy up.

    An interrupted import of a compiled module is no KeyboardInterrupt any more but some ImportError.
    """

    def end(*_: Any) -> NoReturn:
        _say_interrupted()
        os._exit(130)

    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_interrupted() -> None:
    _print_error("\nminilora: interrupted")


def _say(message: str) -> None:
    """Write one line to stderr, whatever is in the message and wherever stderr goes."""
    _print_error(f"minilora: {printable(message)}")


def _print_error(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def _open_streams() -> None:
    """Put something in the place of a closed stdin, stdout or stderr, as after ``>&-`` in a shell.

    The next file that is opened would otherwise get its number, and receive what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if number == 0 else "w"))
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to stop


def _discard(stream: Any) -> None:
    """Let what is still to be written to a stream go nowhere, so that Python does not fail on it when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
