"""How the package is put together: which file may import which, and what an import costs."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py"))
# Each may import those before it. Files of a folder stand together, and go by their own order.
ORDER = ["checks", "backend", "layer", "fast.adam", "fast.gather", "losses", "linear", "optim", "lora", "layers"]
ORDER += [
    "variants",
    "fast.residual",
    "fast.parts",
    "fast.__init__",
    "models",
    "adaptation",
    "verify",
    "conformance",
    "files",
    "text",
    "training",
]
ORDER += ["article", "exercises", "figures", "commands", "cli", "__main__"]


def place(module):
    """Return where a module stands in the order."""
    return next(i for i, name in enumerate(ORDER) if module == name or module.startswith(f"{name}."))


def imports(module):
    """Yield the modules of this package that a file imports when it is imported; not what functions import."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    package = module.split(".")[:-1]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
            base = [part for part in base if part]
            for name in [".".join(base)] if node.module else [".".join([*base, alias.name]) for alias in node.names]:
                if name and PACKAGE.joinpath(*name.split(".")).with_suffix(".py").exists():
                    yield name


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_imports_run_one_way(module):
    for other in imports(module):
        same_folder = place(other) == place(module)
        assert same_folder or place(other) < place(module), f"{module} imports {other}"


def test_no_module_of_a_folder_imports_in_a_circle():
    cleared = set()

    def reach(module, seen=()):
        assert module not in seen, f"a circle: {' -> '.join([*seen, module])}"
        for other in imports(module) if module not in cleared else ():
            reach(other, (*seen, module))
        cleared.add(module)

    for module in MODULES:
        reach(module)


def test_no_module_is_hidden_by_a_public_name():
    tops = {module.partition(".")[0] for module in MODULES}
    assert not tops & set(minilora.__all__)
    for module in MODULES:
        if "__" not in module:
            found = import_module(f"minilora.{module}")
            assert found.__name__ == f"minilora.{module}"
            assert getattr(minilora, module.partition(".")[0]).__name__ == f"minilora.{module.partition('.')[0]}"


def test_public_names_are_listed_once_and_found():
    assert sorted(minilora._HOME) == sorted(minilora.__all__) == sorted(set(minilora.__all__))
    for name in minilora.__all__:
        assert getattr(minilora, name).__name__ == name
    assert set(minilora.__all__) <= set(dir(minilora))
    with pytest.raises(AttributeError, match="module 'minilora' has no attribute 'nothing'"):
        minilora.nothing  # noqa: B018


def test_type_checkers_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    listed = {(alias.name, node.module) for node in block.body for alias in node.names}
    assert listed == set(minilora._HOME.items())


def python(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    "use",
    [
        "import minilora.lora, minilora.linear, minilora.losses, minilora.optim",
        "from minilora import LoRA, LoRALinear, MLP, Adam, adapt, merge, gradcheck, best_adapter, cross_entropy",
        "import minilora.conformance.claims, minilora.fast; minilora.fast.residual_form",
    ],
)
def test_the_mathematics_needs_numpy_alone(use):
    done = python(BLOCKED.format(blocked={"safetensors", "tqdm", "matplotlib", "cupy", "torch"}) + use)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_alone_imports_nothing_else():
    done = python("import sys, minilora; print(*{name.partition('.')[0] for name in sys.modules})")
    assert not {"numpy", "safetensors", "tqdm", "matplotlib"} & set(done.stdout.split())


PAGES = {"lora": 150, "linear": 90, "optim": 120, "training": 170}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_stays_as_short_as_it_is(page):
    lines = (PACKAGE / f"{page}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= PAGES[page]


def test_the_first_equation_in_code_comes_early():
    lines = (PACKAGE / "lora.py").read_text(encoding="utf-8").splitlines()
    assert next(i for i, line in enumerate(lines, start=1) if "# eq. (1)" in line) < 90
    assert next(i for i, line in enumerate(lines, start=1) if "(6)" in line) < 30


def test_every_tests_name_is_ten_words_at_most():
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert len(node.name.split("_")) <= 11, f"{path.name}: {node.name}"
