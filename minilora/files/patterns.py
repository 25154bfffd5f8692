"""Regular expressions that came in a file: looked up as PEFT does, and bounded before they run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tensorfile import AdapterFileError

MATCHING_STEPS = 1e9
"""A bound on the work of all patterns on all module paths: a hostile regular expression can run for years."""
MAX_PATTERN = 1000
"""Characters of one regular expression."""


class Table:
    """A rank_pattern or an alpha_pattern.

    Parameters
    ----------
    path : Path
        The configuration it stands in, for errors.
    key : str
        Its key there.
    table : mapping
        Values, by a regular expression for the end of a module's path.
    modules : list of str
        The paths that will be looked up.
    """

    def __init__(self, path: Path, key: str, table: Mapping[str, Any], modules: list[str]) -> None:
        self.table = table
        ends = [rf"(.*\.)?({pattern})$" for pattern in table]
        self.patterns = list(zip(table, compiled(path, key, ends, modules), strict=True))

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches."""
        for key, pattern in self.patterns:
            if pattern.match(module):
                return self.table[key]
        return self.table.get(module, default)


def compiled(path: Path, key: str, patterns: list[str], modules: list[str]) -> list[re.Pattern[str]]:
    """Compile regular expressions that came in a file, and refuse those that could take too long on these modules."""
    found, steps = [], 0.0
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise AdapterFileError(path, f"{key}: {short(pattern)} has {len(pattern)} characters, over {MAX_PATTERN}")
        steps += sum(_matching_steps(pattern, len(module)) for module in modules)
        if steps > MATCHING_STEPS:
            raise AdapterFileError(path, f"{key}: matching {short(pattern)} could take too long")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a later Python may read differently
                found.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(path, f"{key}: {short(pattern)} is not a regular expression: {error}") from error
    return found


def _matching_steps(pattern: str, n: int) -> float:
    """Bound the ways in which a backtracking search can try a pattern on n characters.

    k repeats in a row share up to n characters in (n + k over k) ways, an option doubles the ways, a choice of c
    multiplies them by c. A repeat of a group may repeat what repeats, a reference or a look-around is beyond this
    count: infinity.
    """
    bare = re.sub(r"\\[^\d]", "c", pattern)  # what stands escaped, or in a class, means itself
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", bare).replace("(?:", "(")
    bare = re.sub(r"([*+?}])\?", r"\1", bare)  # a lazy repeat is a repeat
    if re.search(r"\)[*+{]|\(\?|\\\d", bare):
        return math.inf
    repeats = len(re.findall(r"[*+{]", bare))
    choices = math.prod(part.count("|") + 1 for part in re.split(r"[()]", bare))
    return float(min(math.comb(n + repeats, repeats) * choices << bare.count("?"), 10**30))


def short(value: Any) -> str:
    """Return a value in words, and not in a thousand."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
