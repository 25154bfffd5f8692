"""NumPy is enough for the core. What needs another package names it, and the extra that installs it.

`bare` is a process, with all that it starts, in which no package can be imported but NumPy and minilora.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

import minilora
from minilora.extras import EXTRAS

from .test_readme import BLOCKS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SITE = """
import sys


class NumPyAlone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {"numpy", "minilora", *sys.stdlib_module_names, *KNOWN}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


KNOWN = {"sitecustomize", "usercustomize", "mine"}
sys.meta_path.insert(0, NumPyAlone)
"""
LINE = re.compile(
    r"(?P<why>.+) needs (?P<package>\w+) \(No module named '(?P=package)[\w.]*'\): "
    r'pip install "minilora\[(?P<extra>\w+)\]" \(or, in a clone, pip install -e "\.\[(?P=extra)\]"\)'
)


@pytest.fixture
def bare(tmp_path):
    """Return a function that runs a script where there is NumPy alone, in an empty folder, and returns its output."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    (tmp_path / "work").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}

    def run(script):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "work", env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_process_has_numpy_alone(bare):
    tried = ["msgspec", "safetensors", "tqdm", "ml_dtypes", "pytest", "numpy", "json"]
    script = f"""if True:
        for name in {tried}:
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                print(error.name)"""
    assert bare(script).split() == tried[:5]


NAMES = """
from importlib import import_module

for package in ("minilora", "minilora.fast", "minilora.files", "minilora.language", "minilora.conformance"):
    module = import_module(package)
    for name in module.__all__:
        try:
            getattr(module, name)
        except ImportError as error:
            print(f"{package}.{name}", error, sep="\\t")
"""
OF_FILES = {"CheckpointError", "load_adapter", "merge_adapter", "save_adapter"}
OF_MODELS = {"found_by_weight", "load_tokenizer", "save_llama"}


def test_each_public_name_works_or_names_its_extra(bare):
    found = dict(line.split("\t") for line in bare(NAMES).splitlines())
    said = {name: LINE.fullmatch(text) for name, text in found.items()}
    assert all(said.values()), found
    assert {name: match["why"] for name, match in said.items()} == {name: name for name in said}
    assert {name: match["extra"] for name, match in said.items()} == {
        **{f"minilora.{name}": "files" for name in OF_FILES},
        **{f"minilora.files.{name}": "files" for name in OF_FILES - {"CheckpointError"} | {"save_llama"}},
        **{f"minilora.language.{name}": "models" for name in OF_MODELS},
    }


COMMANDS = {
    "article --epochs 2 --batch-size 8": 0,
    "article --plot a.png": ("a figure", "plot"),
    "article --save a": ("--save", "files"),
    "article --checkpoint a": ("--checkpoint", "files"),
    "check": 0,
    "conformance mine.py": 0,
    "conformance mine.py --json report.json": 0,  # and again, over the first one's report
    "conformance mine.py --json report.json --all": 0,
    "conformance --start numpy -o started.py": 0,
    "finetune mine.py --save a": ("minilora finetune", "models"),
    "generate Hello": ("minilora generate", "models"),
    "evaluate mine.py": ("minilora evaluate", "models"),
    "merge m a -o o": ("minilora merge", "files"),
    "inspect a": ("minilora inspect", "files"),
    "export a --model m -o a.gguf": ("minilora export", "files"),
    "vectors v": ("minilora vectors", "files"),
    "vectors v --compare w": ("minilora vectors", "files"),
    "golden g": ("minilora golden", "files"),
    "golden g --compare a": ("minilora golden", "files"),
    "audit a --model m": ("minilora audit", "files"),
    "diagnose l --model m --adapter a": ("minilora diagnose", "files"),
}
"""Each command, and its exit code; or what it says needs a package, and the extra."""
RUN = """
import contextlib, io, sys
from functools import partial
from pathlib import Path
from minilora import article, cli
from minilora.cli import check

Path("mine.py").write_text("def forward(x, weight, bias, lora_A, lora_B, alpha):\\n"
    "    y = x @ weight.T + alpha / len(lora_A) * (x @ lora_A.T @ lora_B.T)\\n"
    "    return y if bias is None else y + bias\\n")
article.run = partial(article.run, n=40, in_features=6, out_features=5)
whole = check.all_instances()
check.all_instances = lambda: {name: whole[name] for name in (*list(whole)[:2], "Llama, LoRA")}
for command in COMMANDS:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(command.split())
    with contextlib.redirect_stdout(io.StringIO()) as helped, contextlib.suppress(SystemExit):
        cli.main([command.split()[0], "--help"])
    assert helped.getvalue().startswith("usage: "), command
    print(command, status, err.getvalue().strip() if status else out.getvalue().count("\\n"), sep="\\t")
"""


def test_each_command_works_or_names_its_extra(bare):
    rows = [line.split("\t") for line in bare(RUN.replace("COMMANDS", repr([*COMMANDS]))).splitlines()]
    assert [command for command, _, _ in rows] == [*COMMANDS]
    for command, status, said in rows:
        if COMMANDS[command] == 0:
            assert (status, int(said) > 2 or "-o" in command) == ("0", True), (command, said)
            continue
        match = LINE.fullmatch(said.removeprefix("minilora: "))
        assert match, (command, said)
        assert (status, match["why"], match["extra"]) == ("2", *COMMANDS[command]), command


def test_no_command_is_forgotten():
    (choices,) = [action.choices for action in minilora.cli._parser()._actions if isinstance(action.choices, dict)]
    assert {command.split()[0] for command in COMMANDS} == choices.keys()


IN_USE = {
    "train(layer, X, Y, epochs=1, rng=rng, progress=True)": ("progress=True", "tqdm", "files"),
    "train(layer, X, Y, epochs=1, rng=rng, checkpoint='c')": ("a checkpoint", "msgspec", "files"),
    "evaluate(layer, X, Y, workers=2)": ("a computation in parts", "threadpoolctl", "models"),
    "train(layer, X, Y, epochs=1, rng=rng, gradients=accumulate(2))": ("a computation in parts", "threadpoolctl",
                                                                        "models"),
    "Llama.load('m')": ("Llama.load", "msgspec", "files"),
    "article.run(n=40, in_features=6, out_features=5, checkpoint='c')": ("a checkpoint", "msgspec", "files"),
    "plot_learning([])": ("a figure", "matplotlib", "plot"),
}  # fmt: skip
"""What asks for a package only when it is used: what is said to need which."""
USE = """
import numpy as np
from minilora import Linear, Llama, article, evaluate, exercises, train
from minilora.cli.figures import plot_learning
from minilora.fast import accumulate

rng = np.random.default_rng(0)
X, Y, layer = np.ones((4, 3)), np.ones((4, 2)), Linear(np.zeros((2, 3)))
train(layer, X, Y, epochs=1, rng=rng)
assert not exercises.check_grad_B(lambda dy, h, s: dy.T @ h)
for call in CALLS:
    before = layer.weight.copy()
    try:
        eval(call)
    except ImportError as error:
        assert isinstance(error, ValueError) and (layer.weight == before).all()
        print("", call, error, sep="\\t")
"""


def test_what_is_used_later_names_its_extra_then(bare):
    rows = [
        line.split("\t")[1:] for line in bare(USE.replace("CALLS", repr([*IN_USE]))).splitlines() if line[0] == "\t"
    ]
    assert {call: LINE.fullmatch(said).groups() for call, said in rows} == IN_USE


def test_readmes_library_example_needs_numpy_alone(bare):
    (example, printed), *_ = [(code, text) for (kind, code), (_, text) in pairwise(BLOCKS) if kind == "python"]
    assert "from minilora import" in example
    assert bare(example) == printed


# --- the table ---


def packages(extra):
    """Return the packages of an extra itself, by the names that Python imports."""
    names = [re.match(r"[\w-]+(\[.*?\])?", line)[0] for line in PROJECT["optional-dependencies"][extra]]
    return {name.replace("-", "_") for name in names}


def test_the_table_is_that_of_the_project():
    assert [line.partition(">")[0] for line in PROJECT["dependencies"]] == ["numpy"]
    for extra in {*EXTRAS.values()}:
        own = {package.lower() for package, home in EXTRAS.items() if home == extra}
        assert packages(extra) - {"minilora[files]"} == own, extra
    assert "minilora[files]" in packages("models")
    assert "minilora[models,plot,dask]" in packages("test")
    assert {"minilora[models,plot]"} <= packages("docs")
    assert {"minilora[models]"} <= packages("peers")


def test_no_package_is_imported_that_no_extra_has():
    """CuPy has a message of its own, and whoever runs the plugin of pytest has pytest."""
    found = Counter()
    for path in (ROOT / "minilora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "needed":
                names = [ast.literal_eval(node.args[0])] if isinstance(node.args[0], ast.Constant) else ["tqdm"]
            found.update({name.partition(".")[0] for name in names} - sys.stdlib_module_names)
    assert found.keys() == {*EXTRAS, "numpy", "cupy", "pytest"}


def test_one_mechanism_says_how_to_install():
    texts = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "minilora").rglob("*.py")}
    assert [name for name, text in texts.items() if "pip install" in text] == ["extras.py"]
