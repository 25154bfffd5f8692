"""What is built can be installed elsewhere and run, and asks for no more than it says."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

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


def test_importing_the_package_imports_no_extra():
    """NumPy, safetensors and tqdm are asked for; matplotlib, CuPy and torch wait until they are needed."""
    modules = "minilora, minilora.cli, minilora.article, minilora.files.merge"
    script = f"import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(done.stdout.split())
    assert {"numpy", "safetensors", "tqdm"} <= loaded
    assert not {"psutil", "matplotlib", "cupy", "torch", "peft", "autograd", "hypothesis"} & loaded


def test_the_version_is_the_packages():
    import minilora

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "minilora/__init__.py"
    assert f'__version__ = "{minilora.__version__}"' in (ROOT / "minilora" / "__init__.py").read_text()


def test_every_kind_of_test_has_a_step():
    """But `gpu`: a machine without one has the stand-in."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]} - {"gpu"}
    commands = "".join((ROOT / ".ci" / name).read_text() for name in ("run", "nightly"))
    steps = re.findall(r"python\"? -m pytest -m (.+)", commands)
    assert markers <= set(re.findall(r"\w+", " ".join(steps)))
