"""LoRA from scratch in NumPy, every gradient derived and coded by hand; the same code on a GPU through CuPy.

Read these files in this order. Each adds one idea:

1. `minilora.lora`: the low-rank adapter, and a layer with an adapter beside it
2. `minilora.linear`: the layer that is adapted
3. `minilora.losses`: mean squared error, cross-entropy, and their gradients
4. `minilora.optim`: Adam, and how its step length changes
5. `minilora.training`: the loop, and which rows a step takes
6. `minilora.article`: the experiment of "Understanding LoRA with a minimal example", made of these five, and of
   `minilora.fast.residual_form` for speed

They stand on `minilora.layer` (what a layer promises), `minilora.backend` (NumPy or CuPy), `minilora.checks` (errors
for bad input) and `minilora.extras` (packages beyond NumPy). From one layer to a model: `minilora.layers` and
`minilora.adaptation`. What became of LoRA: `minilora.variants`. Is a gradient right? `minilora.verify`. The same
numbers with less work: `minilora.fast`.

Five doors lead on: `minilora.files` (adapters, merging, checkpoints), `minilora.language` (a language model,
fine-tuned), `minilora.conformance` (judges what other people wrote), `minilora.audit` (looks at an adapter's files) and
`minilora.exercises` (grades a backward of yours). `minilora.cli` is the command line.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

__version__ = "0.4.0"


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``: names and modules are imported when they are first used.

    So ``import minilora`` takes no time, and a name that needs a package of an extra says which. The names stand once,
    in the package's ``__init__.pyi``, which type checkers and editors read as well.
    """

    @cache
    def homes() -> dict[str, str]:
        """Return the module that each public name comes from."""
        import ast
        from pkgutil import get_data

        stub = ast.parse(get_data(package, "__init__.pyi") or b"")
        imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
        return {alias.name: "." * node.level + str(node.module) for node in imports for alias in node.names}

    @cache
    def modules() -> set[str]:
        from pkgutil import iter_modules

        return {module.name for module in iter_modules(sys.modules[package].__path__) if module.name[0] != "_"}

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(homes())
        if name.startswith("__") or not (name in homes() or name in modules()):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        from .extras import requiring

        with requiring(f"{package}.{name}", "models" if package == "minilora.language" else ""):
            if name not in homes():
                return import_module(f"{package}.{name}")
            value = getattr(import_module(homes()[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*(name for name in vars(sys.modules[package]) if name.startswith("__")), *homes(), *modules()})

    return get, names


__getattr__, __dir__ = lazily(__name__)
