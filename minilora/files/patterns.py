"""Matching of module paths with a configuration's names and regular expressions, as in PEFT.

The engine is Python's `re`, which PEFT uses too. A hostile expression could run for years, so `within_time` stops its
body after some seconds.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..texts import named, short

SECONDS = 3.0
"""The limit on the processor time for matching all expressions of a configuration."""


@contextmanager
def within_time() -> Iterator[None]:
    """Raise a ValueError if the body takes more than `SECONDS`; this needs the main thread and a system with timers."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise ValueError(
            f"matching takes more than {SECONDS:g} s. Name the modules by their full paths, or use fewer and simpler "
            "regular expressions"
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


def exclusions(
    modules: Sequence[str], linear: Iterable[bool], targets: list[str] | str, excludes: list[str] | str,
    layers: list[int] | int, layers_pattern: list[str] | str,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Yield each module that PEFT does not adapt, preceded by the key of the configuration that excludes it.

    `linear` tells for each module whether "all-linear" includes it. The other arguments are the configuration's values
    of ``target_modules``, ``exclude_modules``, ``layers_to_transform`` and ``layers_pattern``.
    """
    with named("target_modules"):
        wanted = linear if targets == "all-linear" else are_named(targets, modules)
    with named("exclude_modules"):
        excluded = are_named(excludes, modules)
    for module, is_wanted, is_excluded in zip(modules, wanted, excluded, strict=True):
        if not is_wanted or is_excluded:
            yield "exclude_modules" if is_wanted else "target_modules", module
    if isinstance(targets, list) and layers != []:
        names = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        chosen, whole = layers if isinstance(layers, list) else [layers], {*targets}
        with named("layers_pattern"):
            numbers = layer_numbers([name for name in names if name], modules)
        for module, number in zip(modules, numbers, strict=True):
            if number not in chosen and module not in whole:
                yield "layers_to_transform", module


def are_named(names: Sequence[str] | str, modules: Iterable[str]) -> list[bool]:
    """Return for each module whether its full path matches the expression, or its path ends in one of the names."""
    if isinstance(names, str):
        whole = compiled(names, names)
        return [whole.fullmatch(module) is not None for module in modules]
    ends = set(names)
    return [any(module[start.end() :] in ends for start in re.finditer(r"^|\.", module)) for module in modules]


def first_matches(patterns: Iterable[str], modules: Sequence[str]) -> list[int | None]:
    """Return for each module the index of the first pattern that matches its path, or the end of it after a dot."""
    exact = {"^" + re.escape(module): place for place, module in enumerate(modules)}  # as `save_adapter` writes it
    found: list[int | None] = [None] * len(modules)
    for number, pattern in enumerate(patterns):
        if pattern in exact:
            places: Iterable[int] = [exact[pattern]]
        else:  # `match` and not `fullmatch`, as in PEFT: for "a|b)(" the two differ
            match = compiled(rf"(.*\.)?({pattern})$", pattern).match
            places = (place for place, module in enumerate(modules) if found[place] is None and match(module))
        for place in places:
            if found[place] is None:
                found[place] = number
    return found


def layer_numbers(names: Sequence[str], modules: Iterable[str]) -> list[int | None]:
    """Return each module's layer number, which follows the first pattern that matches; None if none does."""
    patterns = [compiled(rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\.", name) for name in names]
    if not names:
        patterns = [re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")]
    matches = (next((match for pattern in patterns if (match := pattern.match(module))), None) for module in modules)
    return [match and int(match["layer"]) for match in matches]


def compiled(expression: str, shown: str) -> re.Pattern[str]:
    """Compile an expression; an error quotes `shown`, the part of it that comes from the configuration."""
    try:
        return re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{short(shown)} is not a regular expression: {error}") from error
