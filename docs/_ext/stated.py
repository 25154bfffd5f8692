"""Check that an equation on a page is what a line of the code computes.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, a comment
``<!-- equation 5 dA dh x -->`` above a formula names its variables. The printed formula itself is evaluated
(`formulas`). `problems` returns the disagreements:

- a number without an equation, an equation without a line, an equation stated twice;
- a line that does not mention the equation's variables;
- a line whose value differs from the printed formula's on the random arrays of `samples`: a wrong sign in either.

It does not need Sphinx, so that the tests can call it; `equations` puts the equations on the site.
"""

from __future__ import annotations

import ast
import importlib
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from formulas import difference
from numbered import EQUATION, OPTION, TAG, Line
from samples import RANKS, samples

from minilora import Linear
from minilora.layers.quantized import FrozenQuantizedLinear


@dataclass(frozen=True)
class Equation:
    """An equation as a page states it."""

    label: str  # "5" or "act.1"
    names: list[str]  # the variables that its lines must mention
    tex: str = ""  # the printed formula
    shown: str = ""  # a shorter form of its line of code, if that uses names that a reader has not met


def problems(equations: list[Equation], lines: list[Line]) -> list[str]:
    """Return the disagreements between the equations and the lines of code."""
    stated = [equation.label for equation in equations]
    found = [f"equation ({n}) is stated {stated.count(n)} times" for n in sorted(set(stated)) if stated.count(n) > 1]
    found += [f"{x}: no equation ({x.label}) for `{x.code}`" for x in lines if x.label not in stated]
    for equation in equations:
        own = [line for line in lines if line.label == equation.label]
        if not own:
            found.append(f"equation ({equation.label}) has no line of code with # eq. ({equation.label})")
        for line in own:
            # h in one place and H in another are the same variable, for one row and for all.
            lost = [n for n in equation.names if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", line.code, re.I)]
            if lost:
                found.append(
                    f"{line}: equation ({equation.label}) mentions {', '.join(lost)}, the line does not: `{line.code}`"
                )
            elif differs_by := differs(equation, line):
                found.append(f"{line}: `{line.code}` is not equation ({equation.label}): {differs_by}")
    return found


def differs(equation: Equation, line: Line) -> str:
    """Return how a line's value differs from the equation's on the same random arrays; "" if it does not."""
    for rank, biased in product(RANKS, (True, False) if "b" in equation.names else (True,)):
        stated, coded = samples(equation.label, rank), samples(equation.label, rank)
        if not biased:  # the line has another branch for a layer without b
            stated["b"], coded["b"] = 0, None
        stated |= stated.pop("printed", {})
        try:
            found = _arrays(_value(line, coded, equation.names))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        try:
            if "named" in stated:
                stated, found = stated | stated["named"](*found), []
            problem = difference(equation.tex, stated, found)
        except Exception as error:
            return f"the equation cannot be computed, {type(error).__name__}: {error}"
        if problem:
            return problem
    return ""


def _value(line: Line, names: dict[str, Any], mentioned: list[str]) -> Any:
    """Return the value that a line computes: what it assigns, returns, or writes to the array that it updates.

    Of several values, ``y, cache = ...``, return those that the equation mentions.
    """
    (statement,) = ast.parse(line.code).body
    value = statement.value
    if isinstance(statement, ast.AugAssign):
        value = ast.BinOp(ast.parse(ast.unparse(statement.target), mode="eval").body, statement.op, value)
    names["self"] = names.get("layers", {}).get(line.cls)
    scope = {**vars(importlib.import_module(line.module)), **names}
    result = eval(compile(ast.fix_missing_locations(ast.Expression(value)), str(line), "eval"), scope)
    if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Tuple):
        parts = tuple(part for part, name in zip(result, target.elts, strict=True) if ast.unparse(name) in mentioned)
        return parts if len(parts) > 1 else parts[0]
    if isinstance(statement, ast.Expr):  # a call that updates its first argument
        return names[ast.unparse(value.args[0])]
    return result


def _arrays(value: Any) -> list[np.ndarray]:
    """Return the arrays to compare: an array, those of a tuple or a dict, or a layer's own and its scaling.

    For a layer that stores codes, return the weight that they encode.
    """
    if isinstance(value, tuple) and all(isinstance(part, float) for part in value):
        value = np.array(value)
    if isinstance(value, FrozenQuantizedLinear):
        value = value.weight
    if isinstance(value, Linear):
        value = (value.weight, 0 if value.bias is None else value.bias)
    if hasattr(value, "trainable"):
        value = (*value.trainable().values(), *([value.scaling] if hasattr(value, "scaling") else []))
    if isinstance(value, dict):
        value = tuple(value.values())
    return [np.asarray(part) for part in (value if isinstance(value, tuple) else (value,))]


def read_page(text: str) -> list[Equation]:
    """Return the equations that a page states, from its text."""
    text = re.sub(r"^````.*?^````", "", text, flags=re.S | re.M)  # these only show what an equation looks like
    found = []
    for block in EQUATION.finditer(text):
        tags = TAG.findall(block["tex"])
        if tags != [block["label"]]:
            raise ValueError(f"equation ({block['label']}) is printed with the number {', '.join(tags) or 'none'}")
        tex = TAG.sub("", block["tex"]).strip()
        found.append(
            Equation(block["label"], block["names"].split(), tex, **dict(OPTION.findall(block["options"] or "")))
        )
    return found
