"""What is printed where stdout or stderr is closed, full, or read no more."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minilora import cli

from ..support.command_line import run

ROOT = Path(__file__).parents[2]


class Full(io.StringIO):
    """A stream that takes nothing, as one to a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        self.write("")


def test_an_error_that_cannot_be_written_is_an_error_still(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full())
    assert run("article", "--rank", "0") == run("artcle") == 2


def test_what_a_full_disk_did_not_take_is_let_go(adapter, monkeypatch, capsys):
    """Otherwise Python would try again when it ends, and fail with a traceback."""
    monkeypatch.setattr(sys, "stdout", full := Full())
    discarded = []
    monkeypatch.setattr(cli.console, "discard", discarded.append)
    assert run("inspect", str(adapter)) == 2
    assert capsys.readouterr().err == "minilora: [Errno 28] No space left on device\n"
    assert discarded == [full]


def in_shell(command, **options):
    """Run a command line in a shell, ``minilora`` standing for this one; return its exit code, stdout and stderr."""
    text = f'minilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}; {command}'
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell, nor SIGPIPE's exit code")


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["inspect"], ["--help"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(command, unbuffered, adapter):
    """As in ``minilora inspect | head``: no traceback, no message, and the exit code that shells give to SIGPIPE."""
    pipe, env = subprocess.PIPE, {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "minilora", *command, *[str(adapter)] * (command == ["inspect"])]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=env)
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@posix
@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "code", "err", "unbuffered"),
    [
        ("minilora inspect ADAPTER >&-", 0, "", ""),
        ("minilora inspect ADAPTER >&- 2>&- <&-", 0, "", "1"),
        ("minilora check --seed -1 2>&-", 2, "", ""),
        ("minilora --help >&-", 0, "", ""),
        ("minilora artcle 2>&-", 2, "", "1"),
        ("minilora check --seed -1 2>/dev/full", 2, "", ""),
        ("minilora artcle 2>/dev/full", 2, "", ""),
        ("minilora --help >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", ""),
        ("minilora --help >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", "1"),
        ("minilora inspect ADAPTER >/dev/full", 2, "minilora: [Errno 28] No space left on device\n", ""),
    ],
)
def test_closed_and_full_streams_end_in_no_traceback(command, code, err, unbuffered, adapter):
    command = command.replace("ADAPTER", shlex.quote(str(adapter)))
    assert in_shell(command, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}) == (code, "", err)
