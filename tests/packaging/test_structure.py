"""How the package is put together: which file may import which, and what an import costs."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import minilora
from minilora.conformance.problems.kinds import KINDS

PACKAGE = Path(minilora.__file__).parent
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py"))
PUBLIC = pytest.mark.parametrize("package", ["", "fast", "files", "language"])
FLOORS = [
    {"checks", "texts", "backend", "extras"},
    {"layer", "losses"},
    {"linear"},
    {"adapted", "lora", "layers"},
    {"variants", "adaptation", "quantization"},
    {"optim", "schedule", "gradients", "fast", "files", "training", "state", "batches", "fitting", "watching"},
    {"verify", "article"},
    {"language"},
    {"report", "conformance", "audit", "exercises"},
    {"cli"},
    {"__main__"},
]
"""From the ground up: each may import what stands below it, and what stands on its own floor, but in no circle."""
IMPORT = re.compile(r"^( *)from (\.+)([\w.]*) import (\([^)]*\)|.*)", re.M)
"""One of this package's own modules, by dots."""


def floor(module):
    """Return how high a module stands."""
    room = module.partition(".")[0] if not module.endswith(".__main__") else "__main__"  # where a process begins
    return next(height for height, rooms in enumerate(FLOORS) if room in rooms)


@cache
def text_of(module):
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def imports(module, *, inside=False):
    """Yield the modules of this package that a file imports when it is imported; or its functions' too."""
    package = module.split(".")[:-1]
    for indent, dots, base, names in IMPORT.findall(text_of(module)):
        if inside or not indent:
            folder = [*package[: len(package) - len(dots) + 1], *filter(None, base.split("."))]
            named = [[*folder, name] for name in re.findall(r"\w+", names)]
            for path in ([folder] if base else []) + named:  # `from . import x` is of x alone
                yield from {".".join(path), ".".join([*path, "__init__"])} & {*MODULES}  # a module, or a folder's


def test_imports_run_one_way():
    modules = set(MODULES) - {"__init__"}
    pairs = {(module, other) for module in modules for other in imports(module, inside=True)}
    assert len(pairs) > 2 * len(modules)
    assert [f"{module} imports {other}" for module, other in pairs if floor(other) > floor(module)] == []


def room(module):
    """Return the folder of the package that a file stands in, or the file itself; a process begins in neither."""
    return module if module.endswith("__main__") else module.partition(".")[0]


@pytest.mark.parametrize("of", [str, room], ids=["files", "folders"])
def test_nothing_imports_in_a_circle(of):
    """Neither a file nor a folder, imports inside functions included."""
    modules = [module for module in MODULES if module != "__init__"]
    wanted = {of(module): set() for module in modules}
    for module in modules:
        wanted[of(module)] |= {of(other) for other in imports(module, inside=True)} - {of(module)}
    cleared = set()

    def reach(name, seen=()):
        assert name not in seen, f"a circle: {' -> '.join([*seen, name])}"
        for other in sorted(wanted[name]) if name not in cleared else ():
            reach(other, (*seen, name))
        cleared.add(name)

    assert sum(map(len, wanted.values())) > 2 * len(wanted)
    for name in wanted:
        reach(name)


def test_folders_are_two_deep_at_most():
    assert [module for module in MODULES if module.count(".") > 2] == []


HOUSES = ("conformance.", "audit.", "exercises.")
JUDGE = [module for module in MODULES if module.startswith(HOUSES) and "__" not in module]
SHARED = {"add", "run", "main", "attend", "attend_backward", "RULES"}
"""Protocols that several files follow: of a command, of plain and blockwise attention, of the rules of an audit."""


def defined(module):
    """Return the names of a file's own classes and functions."""
    return re.findall(r"^(?:class|def) (\w+)", text_of(module), re.M)


def constants(module):
    """Return the names that a file assigns at its top."""
    targets = []
    for node in ast.parse(text_of(module)).body:
        targets += node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [name for target in targets if target for name in getattr(target, "elts", [target])]
    return [name.id for name in names if isinstance(name, ast.Name)]


def test_a_name_stands_for_one_thing_in_the_whole_house():
    names = Counter(name for module in MODULES for name in {*defined(module), *constants(module)})
    assert names["SUPPORTED"] == names["Adam"] == 1
    assert {name for name, count in names.items() if count > 1 and not name.startswith("_")} == SHARED


def test_no_two_files_of_the_judge_share_a_name():
    files = Counter(module.rpartition(".")[2] for module in JUDGE)
    assert [name for name, count in files.items() if count > 1] == []


def test_a_kinds_own_file_alone_asks_for_the_kind():
    """Whoever adds a kind of layers writes one file: the others ask the kind's record."""
    own = [module for module in JUDGE if module.startswith("conformance.problems.")]
    problems = {name for module in own for name in defined(module) if name.endswith("Problem")} - {"Problem"}
    found = []
    for module in JUDGE:
        if not module.startswith("conformance.") or module in own or module.startswith("conformance.golden."):
            continue  # a file's modules have kinds of their own
        for node in ast.walk(ast.parse(text_of(module))):
            if isinstance(node, ast.Compare) and "kind" in ast.unparse(node.left):
                texts = {constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)}
                found += [ast.unparse(node)] * bool(texts & set(KINDS))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                classes = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                found += [ast.unparse(node)] * bool(classes & problems)
    assert found == []


def test_one_file_rounds_to_bfloat16():
    """What others round goes through its `cast`, so that no version of ml_dtypes decides a bit.

    The judge rounds with NumPy alone, to the same numbers: tests/conformance/problems/test_lowprecision.py.
    """
    casts = re.compile(r"\.astype\((?=[^()]*(?:FLOATS|bfloat16|BF16))")
    found = [path.stem for path in PACKAGE.rglob("*.py") if casts.search(path.read_text(encoding="utf-8"))]
    assert casts.search('x.astype(FLOATS["BF16"])')
    assert found == []
    assert "astype(dtype" in (PACKAGE / "files" / "dtypes.py").read_text(encoding="utf-8")


def test_no_module_is_hidden_by_a_public_name():
    tops = {module.partition(".")[0] for module in MODULES}
    assert not tops & set(minilora.__all__)
    for module in MODULES:
        if "__" not in module:
            found = import_module(f"minilora.{module}")
            assert found.__name__ == f"minilora.{module}"
            assert getattr(minilora, module.partition(".")[0]).__name__ == f"minilora.{module.partition('.')[0]}"


def test_public_names_are_listed_once_and_found():
    assert minilora.__all__ == sorted(set(minilora.__all__))
    for name in minilora.__all__:
        assert getattr(getattr(minilora, name), "__name__", name) == name  # an array has no name
    with pytest.raises(AttributeError, match="module 'minilora' has no attribute 'nothing'"):
        minilora.nothing  # noqa: B018


@PUBLIC
def test_dir_lists_public_names_and_modules_alone(package):
    """What the Tab key shows."""
    module = import_module(f"minilora.{package}".strip("."))
    files = [path for path in Path(module.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()]
    modules = {path.stem for path in files if not path.stem.startswith("_")}
    assert {name for name in dir(module) if not name.startswith("__")} == {*module.__all__, *modules}
    assert all(hasattr(module, name) for name in modules)


@PUBLIC
def test_type_checkers_see_every_public_name(package):
    """The stub is the only list. ``import name as name`` is how a stub says that a name is public."""
    folder, names = PACKAGE / package, import_module(f"minilora.{package}".strip(".")).__all__
    tree = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8"))
    stubs = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.name == alias.asname for node in stubs for alias in node.names)
    assert sorted(alias.name for node in stubs for alias in node.names) == names
    for node in stubs:
        start = folder if node.level == 1 else folder.parent
        assert (start / Path(*node.module.split(".")).with_suffix(".py")).exists()


def printed(script):
    """Return what a process prints that has imported nothing yet."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=True).stdout


def test_each_import_needs_no_more_than_it_says():
    """matplotlib, CuPy and torch wait until they are needed; the command line's parser waits for nothing."""
    script = "import sys; before = {*sys.modules}"
    for more in ("", ".texts", ".cli as c; c._parser()", ".lora", ".article, minilora.files.merge"):
        script += f"\nimport minilora{more}\nprint(*{{name.partition('.')[0] for name in sys.modules.keys() - before}})"
    loaded = [set(line.split()) - set(sys.stdlib_module_names) for line in printed(script).splitlines()]
    *small, all_of_it = loaded
    assert small == [{"minilora"}, {"minilora"}, {"minilora"}, {"minilora", "numpy"}]
    assert {"numpy", "safetensors", "tqdm"} <= all_of_it
    assert not {"psutil", "matplotlib", "cupy", "torch", "peft", "autograd", "hypothesis"} & all_of_it
