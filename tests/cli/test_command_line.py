"""The command line: help, errors of one line, exit codes, streams that are closed, Ctrl-C."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minilora import TrainingDiverged, __version__, article, cli

from ..support.command_line import run

ROOT = Path(__file__).parents[2]
PARSERS = cli._parser()._subparsers._group_actions[0].choices


def test_help_teaches(shell):
    text = shell("--help")
    for said in ("y = x W^T", "delta = (alpha / rank) B A", "minilora article", "minilora check", "minilora/lora.py"):
        assert said in text


@pytest.mark.parametrize(("command", "parser"), PARSERS.items())
def test_every_option_has_help(command, parser):
    assert all(action.help for action in parser._actions)


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


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "minilora", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"minilora {__version__}\n")
