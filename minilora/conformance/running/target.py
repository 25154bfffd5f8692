"""Find what is to be checked: MODULE[:OBJECT], as the command and the pytest plugin take it, or a path to a file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ..checking.calling import raised
from ..checking.report import CannotRun

FILE = re.compile(r"(.+\.py)(?::(.*))?", re.DOTALL)


def sources(target: str) -> list[Path]:
    """Return the files of this folder that MODULE[:OBJECT] or FILE.py[:OBJECT] may mean. Nothing is imported."""
    if match := FILE.fullmatch(target):
        return [Path(match[1])]
    name = target.partition(":")[0].replace(".", "/")
    return [Path(f"{name}.py"), Path(name, "__init__.py")]


def imported(target: str) -> Any:
    """Return the module or the object that MODULE[:OBJECT] or FILE.py[:OBJECT] names.

    Raises
    ------
    ImportError, AttributeError, CannotRun
        If there is none, or the module raises.
    """
    match = FILE.fullmatch(target)
    module, path = match.groups() if match else target.partition(":")[::2]
    if not module or (not match and {"/", os.sep} & set(module)):
        raise CannotRun("expected the name of a module, such as my_module, or a file, such as folder/my_module.py")
    if match and not os.path.isfile(module):
        raise CannotRun(f"there is no file {module!r}")
    try:
        subject = _of_file(module) if match else importlib.import_module(module)
    except ImportError:
        raise
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({os.path.basename(place.filename)}, line {place.lineno})"
        raise CannotRun(f"importing it raises {raised(error)}{where}") from None
    for part in path.split(".") if path else ():
        subject = getattr(subject, part)
    return subject


def _of_file(path: str) -> ModuleType:
    """Import a file, whatever else has its name. It finds the modules that lie beside it."""
    folder, file = os.path.split(os.path.abspath(path))
    name = file.removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CannotRun(f"{path!r} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
