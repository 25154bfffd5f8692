"""What lies in a folder, so that a test can say that nothing has changed; and calls that are cut short."""

import os
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name

import pytest


def contents(folder="."):
    """Return all that is in a folder, by its path there: a file's bytes, and of all else its kind."""
    found = Path(folder).rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else oct(p.lstat().st_mode) for p in found}


class Killed(BaseException):
    """Where a process is killed, nothing that comes later is done."""


@contextmanager
def cut_at(at, names=("fsync", "unlink", "replace", "rmdir"), once=False):
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
        yield calls


READS = ("minilora.files.disk.RegularFile.__init__", "os.stat", "minilora.files.tensors.safe_open", "numpy.fromfile")
"""What asks the disk for something while a file is read."""


@contextmanager
def paused_at(at, act):
    """Before the call of that number, among those that read, let something else happen; what is yielded are the calls.

    As where another process is given the time: `act` is called once, and its own calls are not counted.
    """
    calls, acting = [], []

    def pausing(name, real):
        def call(*args, **options):
            if not acting:
                calls.append(name)
                if len(calls) == at:
                    acting.append(True)
                    act()
                    acting.clear()
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in READS:
            patched.setattr(name, pausing(name, resolve_name(name)))
        yield calls
