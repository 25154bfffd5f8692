"""Find the line of the user's code where an exception was raised or a function begins."""

from __future__ import annotations

import os
import traceback
from typing import Any

from ...texts import printable


def error_text(error: BaseException) -> str:
    """Format an exception on one line, without control characters."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))


def line_of(error: BaseException) -> str:
    """Return the file and line of the user's code that raised; empty if only libraries and this suite are involved."""
    for place in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_code(place.filename):
            return printable(f", in {os.path.basename(place.filename)}, line {place.lineno}")
    return ""


def line_of_function(function: Any) -> str:
    """Return the file and line where a function of the user's begins; empty if unknown."""
    code = getattr(getattr(function, "func", function), "__code__", None)  # look inside a functools.partial
    return printable(f", in {os.path.basename(code.co_filename)}, line {code.co_firstlineno}") if code else ""


def is_user_code(file: str) -> bool:
    """Return whether a file is the user's own, not from this suite, Python or an installed package."""
    not_theirs = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(os.__file__))
    return not file.startswith(("<", *not_theirs)) and "-packages" not in file
