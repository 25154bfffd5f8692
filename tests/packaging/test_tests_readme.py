"""What `tests/README.md` says of the tree is true of it."""

import re
import tomllib
from pathlib import Path

import pytest

from ..support.mutants import MUTANTS
from ..support.replaced import BUGS

ROOT = Path(__file__).parents[2]
README = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
NAMED = re.findall(r"\]\(([\w/.]+)\)|`((?:\w+/)*\w+\.(?:py|toml)|(?:\w+/)+|tests/[\w/]+)`", README)


@pytest.mark.parametrize("path", sorted({one or other for one, other in NAMED}))
def test_a_path_that_is_named_exists(path):
    assert (ROOT / path).exists() or (ROOT / "tests" / path).exists()


def test_the_tree_mirrors_the_package_but_for_named_folders():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    others = {name for name in folders if not (ROOT / "minilora" / name).is_dir()}
    assert others == set(re.findall(r"`(\w+)/`", README))
    assert not [*(ROOT / "tests" / "support").rglob("test_*.py")]


def test_each_mark_is_named():
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert all(f"`{mark.partition(':')[0]}`" in README for mark in marks["markers"])


def test_the_bugs_by_hand_have_names_of_their_own():
    assert len({bug.name for bug in (*BUGS, *MUTANTS)}) == len(BUGS) + len(MUTANTS)


def test_a_tests_name_has_at_most_ten_words():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    names = re.findall(r"^ *def test_(\w+)\(", "\n".join(texts), re.M)
    assert [name for name in names if name.count("_") >= 10] == []


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 45
