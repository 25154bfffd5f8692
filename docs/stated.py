"""Whether an equation that a page states is what a line of the code computes.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, a block
``{equation}`` states the equation, names its variables, and says in entries what it computes. `problems` says what does
not fit:

- a number without an equation, an equation without a line, an equation stated twice;
- a line that does not speak of the equation's variables;
- a line that computes something else than ``entries``, on the random arrays of `samples`: a wrong sign, a lost factor.

It needs no Sphinx, so that the tests can ask it; `equations` puts the equations on the site.
"""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numbered import LABEL, Line
from samples import RANKS, samples

from minilora.layers.nf4 import CodedLinear


@dataclass(frozen=True)
class Equation:
    """An equation as a page states it."""

    label: str  # "5" or "act.1"
    names: list[str]  # the variables that its lines must mention
    entries: str = ""  # what it computes, a Python expression; "" where it is not evaluated


def problems(equations: list[Equation], lines: list[Line]) -> list[str]:
    """Say what does not fit between the equations and the lines of code."""
    stated = [equation.label for equation in equations]
    found = [f"equation ({n}) is stated {stated.count(n)} times" for n in sorted(set(stated)) if stated.count(n) > 1]
    found += [f"{x}: no equation ({x.label}) for `{x.code}`" for x in lines if x.label not in stated]
    for equation in equations:
        own = [line for line in lines if line.label == equation.label]
        if not own:
            found.append(f"equation ({equation.label}) has no line of code that says # eq. ({equation.label})")
        for line in own:
            # h in one place and H in another are the same variable, of one row and of all.
            lost = [n for n in equation.names if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", line.code, re.I)]
            if lost:
                found.append(
                    f"{line}: equation ({equation.label}) speaks of {', '.join(lost)}, the line does not: `{line.code}`"
                )
            elif equation.entries and (difference := differs(equation, line)):
                found.append(f"{line}: `{line.code}` is not equation ({equation.label}): {difference}")
    return found


def differs(equation: Equation, line: Line) -> str:
    """Say how a line's value differs from the equation's, both on the same random arrays; "" where it does not."""
    for rank, biased in product(RANKS, (True, False) if "b" in equation.names else (True,)):
        stated, coded = samples(equation.label, rank), samples(equation.label, rank)
        if not biased:  # the line has another branch where there is no b
            stated["b"], coded["b"] = 0, None
        try:
            expected = eval(equation.entries, stated)
        except Exception as error:
            return f"its entries cannot be computed, {type(error).__name__}: {error}"
        try:
            found = _value(line, coded)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if isinstance(found, tuple) and not isinstance(expected, tuple):
            # Of an output and its cache, or of dx and the gradients, the one that the equation gives.
            found = next((part for part in found if isinstance(part, type(expected))), found)
        pair = _arrays(found), _arrays(expected)
        shapes = [[array.shape for array in arrays] for arrays in pair]
        if shapes[0] != shapes[1]:
            return f"it has the shape {shapes[0]}, and not {shapes[1]}"
        for one, other in zip(*pair, strict=True):
            close = np.isclose(one, other, rtol=1e-10, atol=1e-12)
            if not close.all():
                first = np.unravel_index(np.argmin(close), close.shape)
                return f"it gives {one[first]:.6g} where the equation gives {other[first]:.6g}"
    return ""


def _value(line: Line, names: dict[str, Any]) -> Any:
    """Return the value that a line computes: what it assigns, returns, or makes of the array that it updates."""
    (statement,) = ast.parse(line.code).body
    value = statement.value
    if isinstance(statement, ast.AugAssign):
        value = ast.BinOp(ast.parse(ast.unparse(statement.target), mode="eval").body, statement.op, value)
    names["self"] = names.get("layers", {}).get(line.cls)
    scope = {**vars(importlib.import_module(line.module)), **names}
    result = eval(compile(ast.fix_missing_locations(ast.Expression(value)), str(line), "eval"), scope)
    if isinstance(statement, ast.Expr):  # a call that updates its first argument
        return names[ast.unparse(value.args[0])]
    return result


def _arrays(value: Any) -> list[np.ndarray]:
    """Return what there is to compare: an array, those of a tuple or a dict, or a layer's own and its scaling.

    Of a layer that keeps codes, the weight that they stand for.
    """
    if isinstance(value, CodedLinear):
        value = value.weight
    if hasattr(value, "trainable"):
        value = (*value.trainable().values(), *([value.scaling] if hasattr(value, "scaling") else []))
    if isinstance(value, dict):
        value = tuple(value.values())
    return [np.asarray(part) for part in (value if isinstance(value, tuple) else (value,))]


HEAD = re.compile(rf"^```\{{equation\}} (?P<label>{LABEL})(?P<names>.*)\n(?::entries: (?P<entries>.*)\n)?", re.M)


def read_page(text: str) -> list[Equation]:
    """Return the equations that a page states, from its text."""
    text = re.sub(r"^````.*?^````", "", text, flags=re.S | re.M)  # which only show what a directive looks like
    return [Equation(m["label"], m["names"].split(), m["entries"] or "") for m in HEAD.finditer(text)]
