"""A program that came in a file runs in a process of its own, and no longer, and with no more memory, than is allowed.

A chat template is such a program, and so is a regular expression: two loops in each other run for years, and doubling
a text thirty times fills a gigabyte.

Promise: whatever it does, its caller gets an answer, or a `BoundsExceeded` after so much processor time or memory.
Kept by: both are looked up of the child alone, by psutil, so that a busy machine changes no verdict; then it is ended.
Shown by: tests/guards/test_boundedprocess.py.

The child runs `minilora.guards.answering`, which imports nothing of this package but the file with the answers.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

ANSWERING = Path(__file__).with_name("answering.py")
POLL = 0.01
"""Seconds from one look at the process to the next, while it computes."""


class BoundsExceeded(Exception):
    """A process computed too long, filled too much, or ended before it answered; the message says which."""


class BoundedProcess:
    """A process that answers questions, as JSON has them, one at a time. It begins with the first question.

    Use it in a ``with`` statement, or `close` it, so that the process ends.

    Parameters
    ----------
    answers : Path
        A file of Python with a function ``answer(question)``.
    seconds : float
        Of processor time that it may compute in all; more may be added to `seconds` at any time.
    memory : int
        Bytes that it may fill.
    """

    def __init__(self, answers: Path, *, seconds: float, memory: int) -> None:
        self.answers, self.seconds, self.memory = answers, seconds, memory
        self.used = 0.0  # processor time of the process, as far as it was looked up
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._measured: Any = None  # the process, as psutil sees it

    @property
    def runs(self) -> bool:
        """Whether the process has begun and was not ended."""
        return self._process is not None

    def ask(self, question: Any) -> Any:
        """Return the answer to a question.

        Raises
        ------
        BoundsExceeded
            If the process gives none within its bounds. It has been ended then; the next question begins another.
        """
        stdin = (self._process or self._start()).stdin
        with contextlib.suppress(OSError, AttributeError):  # of a process that has ended: then there is no answer
            stdin.write(json.dumps(question).encode() + b"\n")  # type: ignore[union-attr]
            stdin.flush()  # type: ignore[union-attr]
        while True:
            try:
                line = self._lines.get(timeout=POLL)
                break
            except queue.Empty:
                self._check_bounds()
        if not line:
            self._end("it ends the process that runs it")
        self._look()
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(Exception):  # that has ended by itself
                self._measured.kill()
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, AttributeError):  # of what the process has not read
                    stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> BoundedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        import psutil  # at the first question: few files ask one

        command = [sys.executable, "-P", str(ANSWERING), str(self.answers)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        self._lines, self.used = queue.SimpleQueue(), 0.0
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        try:
            self._measured = psutil.Process(json.loads(self._lines.get())["pid"])
        except (ValueError, psutil.Error):
            self._end("the process that runs it does not start")
        return self._process

    def _look(self) -> int:
        """Look up the processor time that the process has used, and return the bytes that it fills."""
        with contextlib.suppress(Exception):  # it has ended, and the queue will say so
            self.used = sum(self._measured.cpu_times()[:2])
            return int(self._measured.memory_info().rss)
        return 0

    def _check_bounds(self) -> None:
        filled = self._look()
        if self.used > self.seconds:
            self._end(f"it computes for more than {self.seconds:.1f} s")
        if filled > self.memory:
            self._end(f"it fills more than {self.memory / 1e6:.0f} MB of memory")

    def _end(self, reason: str) -> NoReturn:
        self.close()
        raise BoundsExceeded(reason)


def _read(stream: Any, lines: queue.SimpleQueue[bytes]) -> None:
    """Put each line of a stream into a queue, and an empty one at the stream's end."""
    with contextlib.suppress(OSError, ValueError):  # the stream is closed
        for line in stream:
            lines.put(line)
    lines.put(b"")
