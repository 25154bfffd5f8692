"""The command line: ``minilora`` or ``python -m minilora``. Each command has its own file, except for the judge's five.

`article`, `trace` and `check` work on numbers, `finetune`, `generate` and `evaluate` on a language model, `merge`,
`inspect` and `export` on files. `judge` has the five commands that check other programs. `console` has the shared code,
and `figures` draws.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..extras import requiring
from .console import discard, flush_or_discard, print_error, say, say_interrupted, warnings_in_lines

COMMANDS = ["finetune", "generate", "evaluate", "merge", "inspect", "export", "article", "trace", "check", "judge"]
"""The modules of the commands, in the order of the help."""
OF_LANGUAGE = COMMANDS[:3]

DESCRIPTION = """\
LoRA from scratch in NumPy, every gradient by hand.

LoRA adapts a trained layer y = x W^T without touching W: it learns a low-rank update of the weight,
delta = (alpha / rank) B A, as the product of two thin factors, A (rank x in) and B (out x rank).
"""

EPILOG = """\
fine-tune a language model:
  minilora finetune TEXT --save DIR  train an adapter of a small language model on a text
  minilora finetune CHATS.jsonl --model MODEL --save DIR
                                     the same for your own model, on chats, or on prompts and completions
  minilora generate PROMPT           continue a text with the model; --adapter DIR adds an adapter
  minilora evaluate FILE             measure a model's loss on a text; --adapter DIR also measures an adapter's
  minilora merge MODEL DIR -o OUT    merge an adapter into a model: OUT loads wherever MODEL does
  minilora inspect DIR               show what is in an adapter's folder
  minilora export DIR --model MODEL -o FILE.gguf
                                     convert it for llama.cpp

learn:
  minilora article                   the experiment of "Understanding LoRA with a minimal example", in a minute
  minilora article --epochs 10       the same, a tenth as long
  minilora article --rank 4          the same with four times the parameters
  minilora trace                     one training step: each equation, its line of code and its values
  minilora check                     every hand-written gradient against measured slopes, on this machine

check what others made:
  minilora audit DIR --model FOLDER  is this adapter sound, and does it fit the model?
  minilora diagnose LOGITS --model FOLDER --adapter DIR
                                     what did an engine do with it?
  minilora conformance MODULE        is your own LoRA right, and if not, what is wrong with it?
  minilora golden DIR                adapters with known answers, to test a program that reads them
  minilora article --help            all the options of a command

then read minilora/lora.py: the derivation and the code on one page.
"""


OTHER_NAMES = {
    "--learning-rate": "--lr", "--num-epochs": "--epochs", "--num-train-epochs": "--epochs", "--max-steps": "--steps",
    "--lora-r": "--rank", "--lora-alpha": "--alpha", "--lora-dropout": "--dropout", "--output-dir": "--save",
}  # fmt: skip
"""Options of other programs, each with its name here."""


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors that reports when its help cannot be written."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # refused here, since this parser knows the command's options
            name = unknown[0].partition("=")[0].replace("_", "-")
            near = get_close_matches(OTHER_NAMES.get(name, name), self._option_string_actions, 1, 0.7)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {near[0]}?' if near else ''}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        say(f"{message} (try '{self.prog} --help')")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)


@cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "minilora", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for file in COMMANDS:
        import_module(f".{file}", __package__).add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default the process's.

    Returns
    -------
    int
        0; 1 if `check` finds a wrong gradient; 2 if the input or the machine does not allow the command; 130 after
        Ctrl-C, and 141 if the reader of the output has closed the pipe, as in shells.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # do not fail on a name that the terminal cannot show
    try:
        status = _run(argv)
        print(end="", flush=True)  # a closed pipe is noticed here, not while Python shuts down
        return status
    except BrokenPipeError:  # as in `minilora check | head`
        discard(sys.stdout)
        return 141
    except OSError as error:  # an error of a file, or of stdout itself
        say(str(error) or type(error).__name__)
        flush_or_discard(sys.stdout)
        return 2
    except KeyboardInterrupt:
        say_interrupted()
        return 130


def _run(argv: Sequence[str] | None) -> int:
    """Run a command; if it fails, report why in one line."""
    try:
        options = _parser().parse_args(argv)
        options.typed = list(sys.argv[1:] if argv is None else argv)  # to print how to resume after Ctrl-C
    except SystemExit:
        print(end="", flush=True)  # from --help
        raise
    getattr(options, "before_numpy", lambda: None)()  # BLAS reads its number of threads when it is loaded
    from ..backend import BackendUnavailable
    from ..training import TrainingDiverged

    try:
        name = options.typed[0]
        with warnings_in_lines(), requiring(f"minilora {name}", "models" if name in OF_LANGUAGE else ""):
            return int(options.command(options))
    except (ValueError, TypeError, MemoryError, BackendUnavailable, TrainingDiverged) as error:
        say(str(error) or type(error).__name__)
        for line in getattr(error, "more", ()):
            print_error(f"  {line}")
        return 2
