"""The command line: help, errors of one line, exit codes, Ctrl-C, and streams that are closed, full or not read."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest

from minilora import TrainingDiverged, __version__, article, cli
from minilora.cli import OTHER_NAMES
from minilora.language.recipe import Recipe, option_name

from ..support.command_line import run

ROOT = Path(__file__).parents[2]


def test_help_names_the_defaults_that_exist(shell):
    text = " ".join(shell("article --help").split())
    assert "passes over the data, for the base and for the adapter (default: 100)" in text
    assert "None" not in text
    text = shell("generate --help")
    assert "(default: 0)" in text
    assert "False" not in text


def test_version(shell):
    assert shell("--version") == f"minilora {__version__}\n"


@pytest.mark.parametrize(
    "error", [ValueError("why"), TypeError("why"), TrainingDiverged("why"), MemoryError(), OSError()]
)
def test_what_a_command_cannot_do_is_one_line(monkeypatch, shell, error):
    def fails(**k):
        raise error

    monkeypatch.setattr(article, "run", fails)
    assert (shell.refused("article"), shell.out) == (str(error) or type(error).__name__, "")


def test_a_command_runs_in_a_thread_too(capsys):
    """There Python refuses to set what Ctrl-C does."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run("check --seed -1")))
    thread.start()
    thread.join()
    assert codes == [2]
    assert capsys.readouterr().err == "minilora: seed must be at least 0, got -1\n"


def test_ctrl_c_ends_cleanly(monkeypatch, shell):
    def interrupted(**k):
        raise KeyboardInterrupt

    monkeypatch.setattr(article, "run", interrupted)
    shell("article", code=130)
    assert shell.err == "\nminilora: interrupted\n"


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_ctrl_c_is_as_before_after_the_command(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert run("check --seed -1") == 2
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


# --- streams ---


class Full(io.StringIO):
    """A stream that takes nothing, as one to a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    def flush(self):
        self.write("")


def test_an_error_that_cannot_be_written_is_an_error_still(monkeypatch, capsys):
    for stream in (Full(), None):  # as after 2>&- in a shell
        monkeypatch.setattr(sys, "stderr", stream)
        assert run("article", "--rank", "0") == run("artcle") == 2
    assert capsys.readouterr().out == ""


def test_what_a_full_disk_did_not_take_is_let_go(adapter, monkeypatch, capsys):
    """Otherwise Python would try again when it ends, and fail with a traceback."""
    monkeypatch.setattr(sys, "stdout", full := Full())
    discarded = []
    monkeypatch.setattr(cli.console, "discard", discarded.append)
    assert run("inspect", str(adapter)) == 2
    assert capsys.readouterr().err == "minilora: [Errno 28] No space left on device\n"
    assert discarded == [full]


def test_the_module_is_a_command_that_a_reader_ends_quietly():
    """As in ``minilora --help | head``: no traceback, no message, and the exit code that shells give to SIGPIPE."""
    command = [sys.executable, "-m", "minilora", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 141


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell, nor SIGPIPE's exit code")
@pytest.mark.parametrize(
    ("command", "code", "err", "unbuffered"),
    [
        ("minilora --version", 0, "", ""),
        *((f"minilora {words} | true; exit ${{PIPESTATUS[0]}}", 141, "", unbuffered)
          for words in ("inspect ADAPTER", "--help") for unbuffered in ("", "1")),
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
)  # fmt: skip
def test_closed_and_full_streams_end_in_no_traceback(command, code, err, unbuffered, adapter):
    """``minilora`` stands for this one."""
    text = f'minilora() {{ {shlex.quote(sys.executable)} -m minilora "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", text.replace("ADAPTER", shlex.quote(str(adapter)))],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, err)
    assert done.stdout == (f"minilora {__version__}\n" if command.endswith("version") else "")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--learning-rate 1", "; did you mean --lr?"),
        ("--learning_rate=1", "; did you mean --lr?"),
        ("--target_modules q", "; did you mean --target-modules?"),
        ("--rnak 3", "; did you mean --rank?"),
        ("--nonsense", ""),
        ("more", ""),
    ],
)
def test_an_unknown_option_names_the_one_that_is_meant(shell, typed, hint):
    """And the help of the command, not that of all commands."""
    said = shell.refused(f"finetune text --save a {typed}")
    assert said == f"unrecognized arguments: {typed}{hint} (try 'minilora finetune --help')"


def test_names_of_other_programs_lead_to_options_of_ours():
    known = {option_name(field.name) for field in fields(Recipe)}
    assert {*OTHER_NAMES.values()} <= known
    assert not known & OTHER_NAMES.keys()
