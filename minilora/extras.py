"""The optional packages, with the extra that installs each, and the error when one is missing.

The core needs only NumPy. Any other package is imported where it is used: by `needed`, or inside `requiring`, like the
command line and the lazy names of `minilora`. The error names what needs the package, and the command that installs the
extra. pyproject.toml says what each package is for.
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
    """A package of an extra is missing; the message names both, and what needs the package."""


def install(extra: str) -> str:
    """Return the command that installs an extra; pip keeps the installed minilora."""
    return f'pip install "minilora[{extra}]" (or, in a clone, pip install -e ".[{extra}]")'


@contextmanager
def requiring(why: str, extra: str = "") -> Iterator[None]:
    """Turn the ImportError of an extra's package into `MissingPackage`.

    `why` says what needs the package, and `extra` names the extra to install, by default the package's.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingPackage(f"{why} needs {package} ({error}): {install(extra or EXTRAS[package])}") from error


def needed(module: str, why: str) -> Any:
    """Import a module of an optional package; `why` says what needs it."""
    with requiring(why):
        return import_module(module)
