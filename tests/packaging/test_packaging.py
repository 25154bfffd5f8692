"""What is built can be installed elsewhere and run, and tells a type checker what it has."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], check=True)
    return next(out.glob("*.whl"))


@pytest.mark.long
def test_the_wheel_installed_elsewhere_runs_the_article(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(install, check=True)
    script = "import sys, minilora, minilora.cli; print(minilora.__file__); sys.exit(minilora.cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "article", "--epochs", "1"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, *report = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert report[-1].startswith("7. Merged into one layer")
    assert (site / "bin" / "minilora").exists()


@pytest.mark.long
def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert top == {"minilora", next(t for t in top if t.endswith(".dist-info"))}
    files = [path for path in (ROOT / "minilora").rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
    of_the_package = {name for name in names if name.startswith("minilora/")}
    assert of_the_package == {path.relative_to(ROOT).as_posix() for path in files}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_version_is_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "minilora/__init__.py"
    assert f'__version__ = "{minilora.__version__}"' in (ROOT / "minilora" / "__init__.py").read_text()


def test_every_kind_of_test_has_a_step():
    """But `gpu`: a machine without one has the stand-in."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]} - {"gpu"}
    commands = "".join((ROOT / ".ci" / name).read_text() for name in ("run", "nightly"))
    steps = re.findall(r"python\"? -m pytest (?:-n \d )?-m (.+)", commands)
    assert markers <= set(re.findall(r"\w+", " ".join(steps)))


USE = """
from typing import assert_type

import numpy as np

from minilora import MLP, Linear, adapt, attach, merge, quantize, weighted_sum

rng = np.random.default_rng(0)
mlp = MLP.init(3, 4, 5, rng=rng)
adapted: MLP = adapt(mlp, ["fc1"], rank=2, alpha=2, rng=rng)
again: MLP = attach(mlp, {})
merged: MLP = merge(adapted)
assert_type(quantize(mlp), MLP)
print(adapted(np.ones((2, 3))))

layer = adapt(Linear(np.eye(3)), "", rank=1, alpha=1, rng=rng)
print(layer.adapter.rank, layer.base, layer.delta(), layer.scaling, merge(layer).weight)
total = weighted_sum([layer.adapter], [1.0])
"""


@pytest.mark.long
def test_misspelt_methods_of_models_are_found(tmp_path):
    """``mypy --strict`` complains of each misspelling, and of nothing else."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    wrong = [f"{model}.no_such_method()" for model in ("mlp", "adapted", "again", "merged", "quantize(mlp)", "total")]
    path = tmp_path / "use.py"
    path.write_text(USE + "\n".join(wrong))
    out, err, _ = api.run(["--strict", "--no-error-summary", f"--cache-dir={tmp_path}", str(path)])
    assert err == ""
    first = len(USE.splitlines()) + 1
    places = {int(line.removeprefix(f"{path}:").partition(":")[0]) for line in out.splitlines()}
    assert places == set(range(first, first + len(wrong)))
    assert all('has no attribute "no_such_method"' in line for line in out.splitlines())
