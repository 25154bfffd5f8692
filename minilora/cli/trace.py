"""``minilora trace``: print one training step of a layer, equation by equation, with each gradient's measured slope."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ..checks import Array
    from ..layer import Layer
    from ..verify.trace import Slope, Trace, TracedLine

PAGE_WIDTH = 100
VALUES = 60
"""The column in which values begin."""
ROUNDING = 1e-12
"""Differences below this are rounding, which depends on the machine."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="print one training step of a layer: each equation, its line of code and its values",
        description=(
            "Run forward, loss, backward and a step of Adam, and print each numbered line as it ran: the equation's "
            "number, the line of code, and the shape and values of its result, row by row. Next to each gradient is "
            "the measured slope. Without options, trace the layer of the lesson 'The gradients, by hand', in integers."
        ),
    )
    names = "a layer by its name in minilora check, such as DoRA, RMSNorm or 'Embedding, LoRA' (default: LoRALinear)"
    parser.add_argument("--layer", metavar="NAME", help=names)
    parser.add_argument("--rank", type=int, metavar="R", help="rank of the adapter (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the values (default: 0)")
    parser.add_argument("--json", action="store_true", help="print all values in full, as JSON")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print the trace."""
    from dataclasses import asdict

    from ..verify.trace import by_pencil, trace

    plain = options.layer is None and options.rank is None and options.seed is None
    name, problem = ("LoRALinear", by_pencil()) if plain else requested_layer(options)
    found = trace(*problem)
    if options.json:
        whole = {"layer": name} | asdict(found)
        print(json.dumps(whole, default=lambda array: {"shape": array.shape, "values": array.tolist()}))
    else:
        print(*text(name, found), sep="\n")
    return 0


def requested_layer(options: argparse.Namespace) -> tuple[str, tuple[Layer, Array, Array]]:
    """Return the requested layer of `check`, an input and a target; DoRA is short for 'Linear, DoRA'."""
    from difflib import get_close_matches

    from ..layer import walk
    from ..verify.trace import drawn_layer
    from .check import all_instances

    rows, asked = all_instances(), options.layer or "LoRALinear"
    known = {name.lower(): name for name in rows}
    name = known.get(asked.lower()) or known.get(f"linear, {asked.lower()}")
    if name is None:
        close = [known[key] for key in get_close_matches(asked.lower(), known, 2, 0.5)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "minilora check prints their names"
        raise ValueError(f"--layer {asked!r} is not a layer of minilora check; {hint}")
    given = {key: value for key in ("rank", "seed") if (value := getattr(options, key)) is not None}
    problem = drawn_layer(rows[name], **given)
    if "rank" in given and all(getattr(part, "rank", None) != options.rank for _, part in walk(problem[0])):
        raise ValueError(f"--rank {options.rank}: the layer {name!r} has no adapter of this rank")
    return name, problem


# --- as text ----------------------------------------------------------------------------------------------------------


def text(name: str, trace: Trace) -> Iterator[str]:
    """Yield the lines of a trace, at most `PAGE_WIDTH` columns wide, without those that repeat earlier values."""
    seen: set[Any] = set()
    column = max(map(len, trace.given))
    yield from (f"One training step of {name}", "", "GIVEN")
    yield from (f"  {key:{column}}  {shaped(value, PAGE_WIDTH - column - 4)}" for key, value in trace.given.items())
    for phase in ("forward", "loss", "backward"):
        yield from ("", phase.upper(), *numbered(getattr(trace, phase), seen))
    how = {"complex": "complex step", "central": "central differences"}[trace.method]
    yield from ("", f"SLOPES of the loss, measured by {how}, beside what backward returned")
    for slope in trace.slopes:
        yield from beside(slope, max(len(label(s)) for s in trace.slopes))
    if trace.step:
        yield from ("", f"STEP of Adam, lr = {trace.lr:g}")
        for array, lines in trace.step.items():
            yield from numbered(lines, seen, array)
        before, after = trace.losses
        yield from ("", f"The loss was {before:.6g}, and is {after:.6g} after the step.")


def numbered(lines: list[TracedLine], seen: set[Any], array: str = "") -> Iterator[str]:
    """Yield numbered lines with their values, below the function that they ran in."""
    place, width = "", max(map(len, ["", *(line.equation for line in lines)])) + 2
    for line in lines:
        of = array or line.layer
        ran = (of, line.file, line.line, *(value is not None and value.tobytes() for value in line.values.values()))
        if ran in seen:
            continue
        seen.add(ran)
        if place != (place := f"  {of}{': ' * bool(of)}{line.function}, {line.file}"):
            yield place
        head = f"    {f'({line.equation})':{width}}  "
        indent = " " * (len(head) + 2)
        *above, last = textwrap.wrap(line.code, PAGE_WIDTH, initial_indent=head, subsequent_indent=indent)
        for name, value in line.values.items():
            result = f"{name} " * (len(line.values) > 1)
            result += shaped(value, PAGE_WIDTH - VALUES - len(result))
            if len(last) + 2 > VALUES:
                above, last = [*above, last], ""
            last = f"{last:{VALUES}}{result}"
        yield from (*above, last)


def beside(slope: Slope, column: int) -> Iterator[str]:
    """Yield the first entries of a gradient, and below each the measured slope and the difference."""
    size, room = slope.gradient.size, PAGE_WIDTH - column - 14
    count = size if 11 * size <= room else (room - 24) // 11  # the line ends with the maximum over all entries
    below = [difference(abs(v)) for v in slope.difference.ravel()]
    rows = [("backward", slope.gradient), ("measured", slope.measured)]
    for name, (how, array) in zip((label(slope), ""), rows, strict=True):
        cells = "".join(f"{v:11.4g}" for v in cleaned(array).ravel()[:count])
        yield f"  {name:{column}}  {how:10}{cells}{'   ...' * (size > count)}"
    of_all = f"   of all {size}: {difference(abs(slope.difference).max())}" * (size > count)
    yield f"  {'':{column}}  difference{''.join(f'{cell:>11}' for cell in below[:count])}{of_all}"


def label(slope: Slope) -> str:
    """Return a gradient's name and shape."""
    return f"{slope.name} {slope.gradient.shape}"


def difference(value: float) -> str:
    """Format a difference; one that is only rounding is given as a bound."""
    return f"< {ROUNDING:.0e}" if value < ROUNDING else f"{value:.1e}"


def shaped(array: np.ndarray | None, room: int) -> str:
    """Return an array's shape and as many of its first entries as fit, with rows separated by semicolons."""
    if array is None:
        return "None"
    shown = f"{array.shape}  " if array.shape else ""
    for i, value in enumerate(cleaned(array).ravel()):
        row_begins = array.ndim > 1 and i % array.shape[-1] == 0
        entry = f"{'' if not i else '; ' if row_begins else ' '}{value:.4g}"
        if len(shown) + len(entry) + 4 * (i + 1 < array.size) > room:
            return f"{shown} ..."
        shown += entry
    return shown.rstrip()  # an expert may have no rows


def cleaned(array: np.ndarray) -> np.ndarray:
    """Return the array with entries set to zero that differ from it only by rounding."""
    import numpy as np

    return np.where(np.abs(array) <= ROUNDING * min(1.0, np.abs(array).max(initial=0)), 0.0, array)
