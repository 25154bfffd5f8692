"""What is being done, said while it takes long: no silence leaves a person in doubt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

FIRST, FURTHER = 8.0, 60.0
"""Seconds of a thing that is being done after which it is named, and after which it is named again."""


class Heartbeat:
    """A thread that writes what is being done, where that takes long.

    Use it in a ``with`` statement, and say what begins: ``beat.now("reading the weights")``.

    Parameters
    ----------
    write : callable
        ``write(text)`` prints a text at once.
    what : str
        What is being done first.
    """

    def __init__(self, write: Callable[[str], None], what: str) -> None:
        self.write, self.done = write, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.now(what)

    def now(self, what: str) -> None:
        """Say what is being done from now on."""
        self.since = time.perf_counter()
        self.what, self.due = what, self.since + FIRST

    def __enter__(self) -> Heartbeat:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.done.wait(min(FIRST, 0.25)):
            now = time.perf_counter()
            if now > self.due:
                self.due = now + FURTHER
                self.write(f"{self.what}, for {now - self.since:.0f} s now")
