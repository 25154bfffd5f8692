"""Where in the user's code something happened: an exception's line, a function's first."""

from __future__ import annotations

import os
import traceback
from typing import Any

from ...texts import printable


def raised(error: BaseException) -> str:
    """Return an exception on one line, without control characters."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))


def line_of(error: BaseException) -> str:
    """Say in which file and line of the user's code it raised; empty where only libraries and this suite show."""
    for place in reversed(traceback.extract_tb(error.__traceback__)):
        if is_theirs(place.filename):
            return printable(f", in {os.path.basename(place.filename)}, line {place.lineno}")
    return ""


def line_of_function(function: Any) -> str:
    """Say in which file and line a function of the user's begins; empty where that is not known."""
    code = getattr(getattr(function, "func", function), "__code__", None)  # of a partial, its function's
    return printable(f", in {os.path.basename(code.co_filename)}, line {code.co_firstlineno}") if code else ""


def is_theirs(file: str) -> bool:
    """Return whether a file is the user's, and not of this suite, of Python or of a package that is installed."""
    not_theirs = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__))
    return not file.startswith(("<", *not_theirs)) and "-packages" not in file
