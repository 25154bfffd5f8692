"""A trace of one training step of a layer, equation by equation, as ``minilora trace`` prints it.

`trace` runs the layer's own forward, the mean squared error, the layer's own backward and Adam. While they run, Python
reports each line before it is executed (`sys.settrace`). A line whose comment has the number of an equation is kept
once it has run: its number, its code, and the values that it assigned or returned. So what is shown is what ran, in
that order, and nothing is computed a second time. Next to each gradient stands the measured slope of the loss.

Layers of other packages are traced too, where their lines have such comments.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from ..checks import Array, check_instance, check_integer, is_array
from ..layer import Layer, first_names, members, rebuild, sum_tied, walk
from ..linear import Linear
from ..lora import LoRA, LoRALinear
from ..losses import mse
from ..optim import Adam
from .gradcheck import Params, Slopes, check_claim
from .instances import Drawing, Row, mse_of

NUMBER = re.compile(r"# eq\. \(((?:[a-z]+\.)?\d+)\)")
"""Matches the comment with a line's number."""
LineArrays = dict[str, np.ndarray | None]
"""Arrays by name; None if a line computes none, such as a dx that is not needed."""
PACKAGES = Path(__file__).parents[2]
"""The folder of minilora."""


@dataclass(frozen=True)
class TracedLine:
    """A numbered line that was executed."""

    equation: str  # "4", or "dora.2"
    file: str  # minilora/lora.py
    line: int
    code: str  # without its comment
    function: str  # LoRA.backward
    layer: str  # the path of the layer; "" for the model itself, and outside it
    values: LineArrays  # by the assigned name; "return" for a returned value


@dataclass(frozen=True)
class Slope:
    """A gradient, and the slope of the loss along each of its entries."""

    name: str  # "x", or a name of `trainable()`
    gradient: np.ndarray
    measured: np.ndarray
    difference: np.ndarray


@dataclass(frozen=True)
class Trace:
    """One training step: its input, each executed numbered line, and the results."""

    given: dict[str, np.ndarray]  # x, target, and the layer's arrays and numbers by path
    forward: list[TracedLine]
    loss: list[TracedLine]
    backward: list[TracedLine]
    method: str  # how the slopes were measured, "complex" or "central"
    slopes: list[Slope]
    lr: float
    step: dict[str, list[TracedLine]]  # for each trainable array, by name
    losses: tuple[float, float]  # before and after the step


def trace(layer: Layer, x: Array, target: Array, *, lr: float = 0.1) -> Trace:
    """Run one training step with a copy of a layer, and return each executed numbered line with its values.

    Parameters
    ----------
    layer : Layer
        It stays as it is. Its arrays are NumPy's, in float64.
    x : array
        The layer's input. Ids have no gradient.
    target : array, float64
        Of the output's shape; the loss is the mean squared error.
    lr : float
        Adam's step length.

    Returns
    -------
    Trace
        Values are copies. The slope is measured along every entry, so this is for small layers.

    Raises
    ------
    ValueError, TypeError
        If the arrays do not fit together, are not float64, or the slope cannot be measured.
    """
    check_instance("layer", layer, Layer)
    layer = rebuild(layer, array=lambda array: array.copy())  # Adam changes it in place
    given = {"x": np.array(x), "target": np.array(target)} | dict(_numbers_of(layer))
    paths = {id(part): path for path, part in walk(layer)}
    (y, cache), forward = record(layer.forward, x, paths=paths)
    (loss, dy), of_loss = record(mse, y, target, paths={})
    (dx, grads), backward = record(layer.backward, dy, cache, paths=paths)
    params, steps = layer.trainable(), {}
    inputs, at_inputs = ({}, {}) if dx is None else ({"x": x}, {"x": dx})
    method, slopes = _measured(partial(mse_of, layer, x, target), inputs | params, at_inputs | grads)
    for name, g in sum_tied(grads, first_names(params)).items():  # one array at a time, like Adam itself
        _, steps[name] = record(Adam({name: params[name]}, lr).step, {name: g}, paths={})
    losses = float(loss), float(mse(layer(x), target)[0])
    return Trace(given, forward, of_loss, backward, method, slopes, lr, steps, losses)


def by_pencil() -> tuple[Layer, Array, Array]:
    """Return layer, input and target of the lesson "The gradients, by hand", of rank 1 and in whole numbers."""
    base = Linear(np.array([[1.0, 0], [2, 1]]))
    adapter = LoRA(np.array([[2.0, -1]]), np.array([[1.0], [-1]]), alpha=2)
    return LoRALinear(base, adapter), np.array([[1.0, 1], [2, 0], [0, 3]]), np.array([[0.0, 1], [13, -10], [-9, 12]])


def drawn_layer(row: Row, *, rank: int = 1, seed: int = 0) -> tuple[Layer, Array, Array]:
    """Return a small layer from `INSTANCES`, with an input and a target; all numbers have one decimal."""
    rank = check_integer("rank", rank, at_least=1, at_most=100)  # every entry's slope is measured
    rng = np.random.default_rng(check_integer("seed", seed, at_least=0))

    def randn(*shape: int) -> Array:
        short = rng.standard_normal(shape).round(1)
        return np.where(short == 0, 0.1, short)  # ReLU has no slope at zero

    layer, x = row(Drawing(2, 3, 2, rank, 2.0 * rank, randn, rng))
    return layer, x, randn(*layer(x).shape)


def _numbers_of(layer: Layer) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays and numbers of a model's layers by path, including an adapter's scaling."""
    for path, part in walk(layer):
        own = dict(members(part)) | {name: v for name, v in vars(part).items() if type(v) in (int, float, tuple)}
        own |= {"scaling": part.scaling} if "alpha" in own else {}  # type: ignore[attr-defined]
        arrays = ((name, np.array(value)) for name, value in own.items() if not isinstance(value, Layer))
        yield from ((f"{path}.{name}".lstrip("."), a) for name, a in arrays if a.size and a.dtype.kind in "iuf")


def _measured(loss: Callable[[Params], Array], params: Params, grads: Params) -> tuple[str, list[Slope]]:
    """Return how slopes are measured, and for each array its gradient with the slopes."""
    check_claim(params, grads, None)
    slopes, found = Slopes(loss, params, None), []
    central = slopes.distrust_complex_step(np.random.default_rng(0))
    slope = slopes.central_slope if central else slopes.complex_slope
    for name, g in sum_tied(grads, slopes.home).items():
        measured = np.reshape([slope(name, np.eye(1, g.size, i).reshape(g.shape)) for i in range(g.size)], g.shape)
        found.append(Slope(name, g, measured, g - measured))
    return "central" if central else "complex", found


# --- executed lines ------


def record(function: Callable[..., Any], *given: Any, paths: Mapping[int, str]) -> tuple[Any, list[TracedLine]]:
    """Return a function's result, and each executed numbered line; `paths` are the layers' paths by identity."""
    lines: list[TracedLine] = []

    def enter(frame: FrameType, event: str, arg: Any) -> Any:
        numbered = _numbered(frame.f_code.co_filename)
        if not numbered or frame.f_code.co_name.startswith("<"):  # a comprehension belongs to its statement
            return None
        running: TracedLine | None = None

        def step(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal running
            now = numbered.get(frame.f_lineno) if event == "line" else None
            if running is not None and now is not running and event != "exception":
                function, values = frame.f_code.co_qualname, _values(running.code, frame, arg)
                lines.append(replace(running, function=function, layer=_path(frame, paths), values=values))
            running = now
            return step

        return step

    before = sys.gettrace()  # a debugger's, or a coverage tool's
    sys.settrace(enter)
    try:
        result = function(*given)
    finally:
        sys.settrace(before)
    return result, lines


@cache
def _numbered(file: str) -> dict[int, TracedLine]:
    """Return the numbered statements of a file under each of their lines."""
    source, found = "".join(linecache.getlines(file)), dict[int, TracedLine]()
    try:
        nodes = [*ast.walk(ast.parse(source))] if NUMBER.search(source) else []
    except SyntaxError:  # a page or a notebook, whose cells are Python
        return {}
    name = Path(file).relative_to(PACKAGES).as_posix() if Path(file).is_relative_to(PACKAGES) else Path(file).name
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)):
            text = source.splitlines()[node.lineno - 1 : node.end_lineno]
            code = " ".join(re.sub(r"\s+# .*", "", line).strip() for line in text)
            if number := NUMBER.search("\n".join(text)):
                span = range(node.lineno, node.lineno + len(text))
                found |= dict.fromkeys(span, TracedLine(number[1], name, node.lineno, code, "", "", {}))
    return found


def _path(frame: FrameType | None, paths: Mapping[int, str]) -> str:
    """Return the path of the model's innermost layer with a running method."""
    while frame is not None:
        if id(frame.f_locals.get("self")) in paths:
            return paths[id(frame.f_locals["self"])]
        frame = frame.f_back
    return ""


def _values(code: str, frame: FrameType, returned: Any) -> LineArrays:
    """Return the values that a statement assigned, returned, or changed in place as its call's first argument."""
    statement: Any = ast.parse(code).body[0]
    if isinstance(statement, ast.Return):
        return _arrays("return", returned)
    if isinstance(statement, ast.Expr):
        targets: Any = getattr(statement.value, "args", [])[:1]
    else:
        targets = statement.targets[-1:] if isinstance(statement, ast.Assign) else [statement.target]
    names = [ast.unparse(one) for target in targets for one in getattr(target, "elts", [target])]
    scope = {**frame.f_locals}  # the left-hand side of an assignment has no effect
    return {key: a for name in names for key, a in _arrays(name, eval(name, frame.f_globals, scope)).items()}


def _arrays(name: str, value: Any) -> LineArrays:
    """Return copies of the arrays in a value: an array, a number, None, gradients by name, or a layer."""
    if value is None or is_array(value) or isinstance(value, float):
        return {name: None if value is None else np.array(value)}
    inside = value if isinstance(value, dict) else dict(members(value)) if isinstance(value, Layer) else {}
    return {full: array for key, part in inside.items() for full, array in _arrays(f"{name}.{key}", part).items()}
