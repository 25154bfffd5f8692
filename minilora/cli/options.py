"""What several commands take: a path, a backend, a language model, a figure."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .streams import printable, say

if TYPE_CHECKING:
    from ..backend import Backend
    from ..language.llama import Llama

BACKENDS = ("numpy", "cupy", "auto")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that names the default of an option, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is None or action.default is False
        return action.help if unsaid else super()._get_help_string(action)


def path(text: str) -> Path:
    """Read an argument that is a path: an empty one, of a variable that is not set, would be the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``, which `backend` reads."""
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=os.environ.get("MINILORA_BACKEND") or "numpy",
        help="library to compute with; auto is cupy where it works ($MINILORA_BACKEND sets the default)",
    )


def backend(options: argparse.Namespace) -> Backend:
    """Return the backend that was asked for; where "auto" had to fall back, say so in a line of our own."""
    from ..backend import get_backend

    if options.backend not in BACKENDS:  # the parser checks what is typed, not the default
        raise ValueError(f"MINILORA_BACKEND must be one of {', '.join(BACKENDS)}, got {options.backend!r}")
    return get_backend(options.backend)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``: `minilora.language.namedmodel` has the one that stands in where it is not given."""
    parser.add_argument(
        "--model",
        type=path,
        metavar="MODEL",
        help="a Hugging Face folder or a .gguf file on this machine; by default the small English model of the package "
        "glassllm",
    )


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantize``, which `minilora.language.namedmodel.load_model` takes as `bits`."""
    parser.add_argument(
        "--quantize",
        choices=["nf4", "file"],
        help="keep the frozen linear layers in few bits: nf4 quantises them, in blocks of 64 with double quantisation; "
        "file keeps the blocks that a .gguf file has (Q4_0, Q4_1, Q8_0)",
    )


def warn_beyond_context(model: Llama, tokens: int, what: str) -> None:
    """Say in a line where more tokens stand in a row than the model was made for; it computes them all the same."""
    context = model.config.max_position_embeddings
    if context is not None and tokens > context:
        say(f"{what} {tokens:,} tokens, and the model's context is {context:,}: what it says beyond may be nonsense")


def target_parameters(options: argparse.Namespace) -> list[str] | None:
    """Return ``--target-parameters`` as a list, or None where it is not given."""
    text = options.target_parameters
    return None if text is None else [name.strip() for name in text.split(",")]


def target_modules(options: argparse.Namespace) -> str | list[str] | None:
    """Return ``--target-modules``: names as a list; a regular expression, or all-linear, as it is; None without it."""
    text = options.target_modules
    if text is None:
        return None
    if not text and options.target_parameters is not None:
        return []
    names = [name.strip() for name in text.split(",")]
    return names if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def model_name(model: Path | None) -> str:
    """Return the model's name, to print."""
    return "glassllm's English model" if model is None else printable(str(model))


def check_output(path: Path, inputs: Iterable[tuple[Path, str]], name: str = "--json") -> None:
    """Refuse a file that could not be written without the loss of something, such as of one that is read."""
    from ..files.atomic import refuse_inputs, replaceable

    replaceable(path)
    refuse_inputs(name, path, inputs)


def check_plot(path: Path, inputs: Iterable[tuple[Path, str]] = ()) -> None:
    """Refuse a file that a figure could not be written to."""
    from .. import figures  # matplotlib is an extra

    figures.check_figure_path(path)
    check_output(path, inputs, "plot file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"plot file {str(path)!r}: the folder {str(path.parent)!r} cannot be written")


def plot(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all."""
    from ..files.atomic import written_whole

    with written_whole(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".").lower())
    print(f"\nfigure written to {printable(str(path))}")
