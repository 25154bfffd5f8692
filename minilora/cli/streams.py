"""What the process writes to: messages of one line, streams that are closed, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

LONGEST_COMMAND = 20_000
"""Characters of a command that are shown: it is to be copied whole."""


def printable(text: str, *limit: int) -> str:
    """Return a text in one line without control characters, its middle left out where it is too long."""
    from .. import checks  # needs NumPy, without which the command line starts

    return checks.printable(text, *limit)


def say(message: str) -> None:
    """Write one line to stderr, whatever is in the message and wherever stderr goes."""
    print_error(f"minilora: {printable(message)}")


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Write each warning as one line, once, and not as Python does, with a line of our source."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(str(message))
        yield


def say_interrupted() -> None:
    """Tell that Ctrl-C ended the command, on a line of its own."""
    print_error("\nminilora: interrupted")


def say_goes_on(state: str, typed: list[str]) -> None:
    """Tell what is kept of a command that was stopped, and what to type to go on."""
    program = ["python", "-m", "minilora"] if os.path.basename(sys.argv[0]) == "__main__.py" else ["minilora"]
    say(f"{state}, and this command goes on from there:")
    print_error(f"  {printable(shlex.join([*program, *typed]), LONGEST_COMMAND)}")


def print_error(text: str) -> None:
    """Write a text to stderr, wherever that goes."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def open_streams() -> None:
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


def flush_or_discard(stream: Any) -> None:
    """Write what is still to be written to a stream, or let it go nowhere where the stream cannot take it."""
    try:
        stream.flush()
    except OSError:
        discard(stream)


def discard(stream: Any) -> None:
    """Let what is still to be written to a stream go nowhere, so that Python does not fail on it when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process at once, as long as there is nothing to tidy up.

    An interrupted import of a compiled module is no KeyboardInterrupt any more but some ImportError.
    """

    def end(*_: Any) -> NoReturn:
        say_interrupted()
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
