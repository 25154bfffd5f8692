"""A folder locked for the moment in which files in it change places.

Promise: two processes never rename files of a folder at once, nobody reads between two renames, and a process that
dies leaves no lock behind.
Kept by: `flock` on the folder itself, where the system has it (Linux, macOS): it leaves no file, it ends with the
process that holds it, and readers share it. A lock file, as the package `filelock` makes it, stays in the folder,
cannot be made by those who may only read there, and is not shared.
Shown by: tests/guards/test_folderlocks.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ..checks import FileRefused

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_SECONDS = 10.0
"""How long a writer waits for others to finish their renames. A rename takes milliseconds."""


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other writers out of a folder, and where not `shared` readers too. Where there are no locks, do nothing.

    The lock is on the folder itself: it leaves no file behind, it ends with the process that holds it, and readers
    share it. A lock file, as the package `filelock` makes it, stays in the folder, cannot be made by those who may only
    read there, and is not shared.

    Raises
    ------
    FileRefused
        If another process keeps the lock for longer than `LOCK_SECONDS`.
    """
    try:
        # O_DIRECTORY: to open a pipe would wait for a writer for ever.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY) if fcntl else None
    except OSError:
        if not shared:
            raise
        handle = None  # a folder whose files may be read, but not their list
    if handle is None:
        yield
        return
    try:
        _wait_for_lock(handle, folder, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _wait_for_lock(handle: int, folder: Path, kind: int) -> None:
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise FileRefused(folder, f"another process has kept it locked for {LOCK_SECONDS:g} s") from None
            time.sleep(0.002)
        except OSError:  # a file system without locks
            return None
