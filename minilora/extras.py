"""The packages that some parts need and the core does not: which extra has each, and the line that says so.

The core is NumPy. Another package is imported where it is used: by `needed`, or inside `requiring`, as the command line
and the lazy names of `minilora` are. The line names what needs the package, and the command that installs the extra.
pyproject.toml says what each package is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

FILES_EXTRA = ("gguf", "ml_dtypes", "msgspec", "safetensors", "tqdm")
MODELS_EXTRA = ("filelock", "glassllm", "jinja2", "psutil", "threadpoolctl", "tokenizers")
EXTRAS = {**dict.fromkeys(FILES_EXTRA, "files"), **dict.fromkeys(MODELS_EXTRA, "models"), "matplotlib": "plot"}
"""The extra of each package."""


class MissingPackage(ImportError, ValueError):
    """A package is missing that an extra installs; the message names both, and what needs the package."""


def install(extra: str) -> str:
    """Return the command that installs an extra. pip keeps the minilora that is there."""
    return f'pip install "minilora[{extra}]" (or, in a clone, pip install -e ".[{extra}]")'


@contextmanager
def requiring(why: str, extra: str = "") -> Iterator[None]:
    """Turn the ImportError of an extra's package into `MissingPackage`.

    `why` is what needs the package, and `extra` the extra with all that it needs; by default that of the package.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackage(f"{why} needs {package} ({error}): {install(extra or EXTRAS[package])}") from error


def needed(module: str, why: str) -> Any:
    """Return a module of an extra's package; `why` is what needs it."""
    with requiring(why):
        return import_module(module)
