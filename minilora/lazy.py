"""A package's public names and modules, each imported when it is first used.

So ``import minilora`` takes no time, and ``import minilora.lora`` needs NumPy alone. The names stand once, in the
package's ``__init__.pyi``: type checkers and editors read that file, and so does `attributes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


def attributes(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a package's ``__getattr__`` and ``__dir__``.

    The first imports what is asked for, once. The second lists the public names and the modules, for ``dir()`` and the
    Tab key; what begins with one underscore or is imported for the package's own use is in neither.
    """

    @cache
    def homes() -> dict[str, str]:
        """Return the module of each public name."""
        import ast  # at the first name: the command line starts without
        from pkgutil import get_data

        stub = ast.parse(get_data(package, "__init__.pyi") or b"")
        imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
        return {alias.name: f"{'.' * node.level}{node.module}" for node in imports for alias in node.names}

    @cache
    def modules() -> set[str]:
        """Return the names of the package's modules."""
        from pkgutil import iter_modules

        return {module.name for module in iter_modules(sys.modules[package].__path__) if module.name[0] != "_"}

    def get(name: str) -> Any:
        if name == "__all__":
            return sorted(homes())
        if name.startswith("__") or not (name in homes() or name in modules()):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name not in homes():
            return import_module(f"{package}.{name}")
        value = getattr(import_module(homes()[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        own = {name for name in vars(sys.modules[package]) if name.startswith("__")}
        return sorted({*own, *homes(), *modules()})

    return get, names
