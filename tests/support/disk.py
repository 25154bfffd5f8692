"""What lies in a folder, so that a test can say that nothing has changed; and calls that are cut short."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from minilora.files import disk


def contents(folder="."):
    """Return all that is in a folder, by its path there: a file's bytes, and of all else its kind."""
    found = Path(folder).rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else oct(p.lstat().st_mode) for p in found}


class Killed(BaseException):
    """Where a process is killed, nothing that comes later is done."""


@contextmanager
def cut_at(at, names=("fsync", "replace", "link", "listdir", "rmdir"), once=False):
    """Let the call of that number fail, among those that change the disk; unless `once`, each later one too.

    What is yielded are the calls.
    """
    calls = []

    def failing(real):
        def call(*args, **options):
            calls.append(args)
            if len(calls) == at or (len(calls) > at and not once):
                raise Killed
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setattr(os, name, failing(getattr(os, name)))
        patched.setattr(disk, "exchange_folders", failing(disk.exchange_folders))
        yield calls
