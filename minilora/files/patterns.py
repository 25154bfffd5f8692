"""Which modules the names and regular expressions of a configuration mean, as in PEFT.

The engine is Python's `re`, which is PEFT's own. A hostile expression runs for years in it, so the bodies of
`within_time` are stopped after some seconds.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..texts import short

SECONDS = 3.0
"""Processor time for all expressions of a configuration on all module paths."""


@contextmanager
def within_time() -> Iterator[None]:
    """Raise a ValueError where the body takes more than `SECONDS`, in the main thread of a system with such timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise ValueError(
            f"matching takes more than {SECONDS:g} s. Name the modules by their whole paths, or use simpler and fewer "
            "regular expressions"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def are_named(names: Sequence[str] | str, modules: Iterable[str]) -> list[bool]:
    """Return of each module whether it is named: by one expression for its whole path, or by a name at its end."""
    if isinstance(names, str):
        whole = compiled(names, names)
        return [whole.fullmatch(module) is not None for module in modules]
    ends = set(names)
    return [any(module[start.end() :] in ends for start in re.finditer(r"^|\.", module)) for module in modules]


def first_matches(patterns: Iterable[str], modules: Sequence[str]) -> list[int | None]:
    """Return of each module the number of the first pattern that matches its path, or from a dot on the end of it."""
    exact = {"^" + re.escape(module): place for place, module in enumerate(modules)}  # as `save_adapter` writes them
    found: list[int | None] = [None] * len(modules)
    for number, pattern in enumerate(patterns):
        if pattern in exact:
            places: Iterable[int] = [exact[pattern]]
        else:  # PEFT's own expression, for its `match`: "a|b)(" tells the difference to another's `fullmatch`
            match = compiled(rf"(.*\.)?({pattern})$", pattern).match
            places = (place for place, module in enumerate(modules) if found[place] is None and match(module))
        for place in places:
            if found[place] is None:
                found[place] = number
    return found


def layer_numbers(names: Sequence[str], modules: Iterable[str]) -> list[int | None]:
    """Return of each module the number of its layer: what stands behind the first of these patterns that matches."""
    patterns = [compiled(rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\.", name) for name in names]
    if not names:
        patterns = [re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")]
    matches = (next((match for pattern in patterns if (match := pattern.match(module))), None) for module in modules)
    return [match and int(match["layer"]) for match in matches]


def compiled(expression: str, shown: str) -> re.Pattern[str]:
    """Return an expression that is built of what a configuration has, which an error shows."""
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{short(shown)} is not a regular expression: {error}") from error
