"""LoRA from scratch in NumPy, every gradient derived and coded by hand; the same code on a GPU through CuPy.

Read these files in this order. Each adds one idea:

1. `minilora.lora`: the low-rank adapter, and a layer with an adapter
2. `minilora.linear`: the layer to adapt
3. `minilora.losses`: mean squared error, cross-entropy, and their gradients
4. `minilora.optim`: Adam
5. `minilora.training`: the training loop
6. `minilora.article`: the experiment of "Understanding LoRA with a minimal example", built from these five, and
   from `minilora.fast.residual_form` for speed

They are based on `minilora.layer` (the protocol of a layer), `minilora.backend` (NumPy or CuPy), `minilora.checks`
(errors for bad input) and `minilora.extras` (optional packages). `minilora.layers` and `minilora.adaptation` lead from
one layer to a model, `minilora.variants` has the variants of LoRA, `minilora.verify` checks gradients, and
`minilora.fast` computes the same numbers with less work.

Five packages build on these: `minilora.files` (adapters, merging, checkpoints), `minilora.language` (fine-tuning of a
language model), `minilora.conformance` (tests of other implementations), `minilora.audit` (checks of an adapter's
files) and `minilora.exercises` (grades your own backward). `minilora.cli` is the command line.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

__version__ = "0.4.0"


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``: names and modules are imported when they are first used.

    So ``import minilora`` is instant, and a name that needs an optional package says which one. The names are listed
    once, in the package's ``__init__.pyi``, which type checkers and editors read too.
    """

    @cache
    def homes() -> dict[str, str]:
        """Return the module of each public name."""
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
