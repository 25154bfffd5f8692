r"""Check whether arrays satisfy a printed formula by reading its TeX as a reader does, then evaluating it.

``dA = dh^\top x`` is computed with whole arrays: two of the same shape are multiplied entry by entry, others as
matrices. ``dh_{nk} = s \sum_o dy_{no} B_{ok}`` is computed entry by entry: an index runs over the axis at whose place
it is written, and axes in front of the indexed ones are a batch. ``\underset{(r,\,in)}{dA}`` is dA with its shape,
which is checked. In ``a = b = c`` both sides must be equal. An equation ends at ``\\`` or ``\quad``; a condition after
it, ``\quad (u \le t)``, restricts it: elsewhere the array must be 0 or minus infinity. Adjacent letters are one name,
so a product of letters needs a space, ``s B A``; a name with a subscript that is part of it, such as ``W_q`` or
``m_{t-1}``, is looked up whole. A left side that is more than a name, ``M x``, is computed too, unless a value has the
name ``Mx``. ``u \cdot v`` of two vectors is a number, and the slope ``\frac{\partial y_{no}}{\partial B_{ok}}`` is an
entry of the array ``dydB``. Matrices may be printed in numbers.

The formula becomes Python, term by term; `stated` compares it with the lines of code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np


def stacked(rows: str) -> str:
    r"""Return the rows of a printed matrix as a stack, ``\vstack([a,b],[c,d])``; a column has no inner brackets."""
    cells = [row.replace("&", ",") for row in rows.split(r"\\")]
    return rf"\vstack({','.join(f'[{row}]' if ',' in row else row for row in cells)})"


SUBSTITUTIONS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"\\mathrel\{\+\}=", r"\\pluseq "),
    (r"\\frac\{\\partial L\}\{\\partial (\w+)(_\{\w+\})?\}", r"d\1\2"),
    (r"\\frac\{\\partial (\w+)_\{(\w+)\}\}\{\\partial (\w+)_\{(\w+)\}\}", r"d\1d\3_{\2 \4}"),
    (r"\\partial (\w+)_\{(\w+)\} / \\partial (\w+)_\{(\w+)\}", r"d\1d\3_{\2 \4}"),
    (r"\\operatorname\{([a-z]+)(?:\\,)?([a-z]*)\}", r"\\\1\2 "),
    (r"\\tfrac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"(d?)\\hat(?:\{(\w)\}| (\w))", r"\1\2\3hat"),
    (r"\\Delta\s*W", "DeltaW"),
    (r"\\\\\[[\d.]+em\]", r"\\\\"),
    (r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", lambda matrix: stacked(matrix[1])),
    (r"\\\\\s*&=|\\leftarrow", "="),
    (r"\\begin\{cases\}([^&]*)&([^&]*)\\\\([^&]*)&([^&]*)\\end\{cases\}", r"(\1[\2] + \3[\4])"),
    (r"\\(?:begin|end)\{aligned\}|(?<!\\)\\[,;! ]|\\(?:[bB]ig+[lr]?|left|right|textstyle)(?![A-Za-z])|&|\{\}", " "),
    (r"\\\|(.*?)\\\||\\lVert(.*?)\\rVert", r"\\norm(\1\2)"),
    (r"\|([^|]*)\|", r"\\lvert \1 \\rvert"),
    (r"\\tfrac", r"\\frac"),
]
"""Patterns of TeX that the reader does not know, each with a form that it does."""
TOKEN = re.compile(r"\\text\{[^}]*\}|\\\\|\\[A-Za-z]+'*|\d+(?:\.\d+)?|[A-Za-z]+'*|\S")
RELATIONS = {"=": "==", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\in": "in"}
FUNCTIONS = {rf"\{name}": f"np.{name}" for name in ("cos", "sin", "tanh", "log", "sign")}
FUNCTIONS[r"\norm"] = "np.linalg.norm"
INDEXED = {r"\sum": "sum", r"\max": "max", r"\min": "min", r"\argmin": "argmin", r"\text{mean}": "mean"}
"""Operators that may have an index below them to run over."""
END_OF_PRODUCT = {*("", "+", "-", ")", "]", "}", ",", r"\\", r"\quad", r"\qquad", r"\rvert", r"\pluseq"), *RELATIONS}
"""Tokens that end a product of factors."""


@dataclass
class Printed:
    """One printed equation, whose sides are translated to Python."""

    name: str
    indices: list[str]  # of the left side; "" is a whole axis
    shape: str  # as Python source of a list, empty if no shape is printed
    sides: list[str]
    adds: bool  # whether the sign is += instead of =
    condition: str
    value: str  # Python source of a left side that is more than a name with its indices


def difference(tex: str, names: dict[str, Any], found: list[np.ndarray]) -> str:
    """Return how arrays differ from a formula; "" if they do not.

    The first equations belong to the arrays, in order; the others must have a name that has a value.
    """
    reader = Reader(tex, names)
    printed = list(reader.equations())
    if len(printed) < len(found):
        return f"there are {len(found)} arrays but only {len(printed)} equations"
    scope = {"np": np, "names": names, "sizes": reader.sizes, "times": times, "dot": dot, "entry": entry}
    scope |= {"shaped": shaped, "widths": {}}

    def left(equation: Printed) -> np.ndarray:
        """Return the value of a left side for which no array was passed."""
        if not equation.value:
            return np.asarray(names[equation.name])
        counts = [reader.sizes[index] for index in equation.indices]
        points = (dict(zip(equation.indices, point, strict=True)) for point in product(*map(range, counts)))
        values = np.array([eval(equation.value, scope | at) for at in points])
        return values.reshape(*counts, *values.shape[1:])

    targets = [*found, *(left(equation) for equation in printed[len(found) :])]
    for equation, target in zip(printed, targets, strict=True):
        axes = len(equation.indices)
        shaped(target, eval(equation.shape), scope["widths"])
        if f"{equation.name.removesuffix('-1')}-1" in names:  # x_i or x_{i-1}: one must not be mistaken for the other
            own = np.asarray(names[equation.name])
            if own.shape != target.shape or (equation.name.endswith("-1") and unequal(target, own)):
                return f"it is not {equation.name}"
        target = trailing(target, axes)
        if 0 < target.ndim < axes:  # one axis for two indices, y_{n,(c,l)}
            target = target.reshape([reader.sizes[index] for index in equation.indices])
        for index, count in zip(equation.indices, target.shape[target.ndim - axes :], strict=True):
            if index and reader.sizes.setdefault(index, count or 1) != count:
                return f"it has {count} entries along {index}, expected {reader.sizes[index]}"
        for point in product(*(range(reader.sizes[index]) for index in equation.indices if index)):
            at = dict(zip(filter(None, equation.indices), point, strict=True))
            place = (..., *(at.get(index, slice(None)) for index in equation.indices))
            computed = np.asarray(target[place] if axes else target)
            if eval(equation.condition, scope | at):
                before = trailing(np.asarray(names[equation.name]), axes)[place] if equation.adds else 0
                values = [before + eval(side, scope | at) for side in equation.sides]
            else:
                values = [np.where(np.isneginf(computed), -np.inf, 0)]
            for value in values:
                if problem := unequal(computed, np.asarray(value)):
                    return problem
    return ""


def unequal(found: np.ndarray, stated: np.ndarray) -> str:
    """Return how two arrays differ; "" if they do not."""
    if found.shape != stated.shape:
        return f"its shape is {found.shape}, expected {stated.shape}"
    close = np.isclose(found, stated, rtol=1e-10, atol=1e-12)
    if close.all():
        return ""
    return f"it gives {found[~close].flat[0]:.6g}, but the equation gives {stated[~close].flat[0]:.6g}"


def times(a: Any, b: Any) -> Any:
    """Return the product of numbers, of same-shaped arrays entry by entry, or else of matrices."""
    return a * b if np.ndim(a) == 0 or np.ndim(b) == 0 or np.shape(a) == np.shape(b) else a @ b


def dot(a: Any, b: Any) -> Any:
    """Return the product that a dot denotes: for two vectors it is a number."""
    return a @ b if np.ndim(a) == np.ndim(b) == 1 else times(a, b)


def shaped(array: Any, labels: list[str], widths: dict[str, int]) -> Any:
    """Return the array unchanged after checking its printed shape; a label has the same width in all shapes."""
    for label, width in zip(labels, np.shape(array), strict=False):
        if widths.setdefault(label, width) != width:
            raise ValueError(f"{label} is {widths[label]} in one shape and {width} in another")
    return array


def entry(array: Any, *place: Any) -> Any:
    """Return an entry, indexed on the last axes; a computed index must be a whole number from 0 on."""
    array = trailing(np.asarray(array), len(place))
    if any(not isinstance(axis, slice) and axis < 0 for axis in place):
        raise ValueError(f"there is no entry {place}")
    return array[(..., *(axis if isinstance(axis, slice) else int(axis) for axis in place))][()]


def trailing(array: np.ndarray, axes: int) -> np.ndarray:
    """Return the array without its last axis, if that has one entry and no index."""
    return array[..., 0] if 0 < axes < array.ndim and array.shape[-1] == 1 else array


class Reader:
    """A recursive-descent parser that turns a formula into Python; most methods return source code."""

    def __init__(self, tex: str, names: dict[str, Any]):
        for pattern, replacement in SUBSTITUTIONS:
            tex = re.sub(pattern, replacement, tex)
        self.tokens = TOKEN.findall(tex)
        self.names = names
        self.indices: list[str] = []  # those that run at the current position
        self.sizes: dict[str, int] = {}  # the range of each index
        self.depth = 0  # of nested brackets

    @property
    def next(self) -> str:
        """The next token; within brackets, ends of lines are skipped."""
        while self.depth and self.tokens[:1] == [r"\\"]:
            del self.tokens[0]
        return self.tokens[0] if self.tokens else ""

    def take(self, *expected: str) -> str:
        """Consume and return the next token, which must be one of the expected ones."""
        if expected and self.next not in expected:
            raise ValueError(f"expected {' or '.join(expected)}, got {self.next or 'the end of the formula'}")
        self.next  # noqa: B018, skips the end of a line within brackets
        return self.tokens.pop(0)

    def bracket(self, opening: str, closing: str, read: Callable[[], Any]) -> Any:
        """Parse the tokens between two brackets with `read`."""
        self.take(opening)
        self.depth += 1
        value = read()
        self.take(closing)
        self.depth -= 1
        return value

    def group(self) -> list[str]:
        """Return the tokens of a group in braces, or else the next token."""
        found, depth = [self.take()], 1
        while found[0] == "{" and depth:
            found.append(self.take())
            depth += {"{": 1, "}": -1}.get(found[-1], 0)
        return found[1:-1] or found

    def size(self, label: str, count: int) -> None:
        """Record the range of an index: the length of the shortest axis that it indexes."""
        self.sizes[label] = min(count, self.sizes.get(label, count))

    def equations(self) -> Iterator[Printed]:
        """Parse the equations, one at a time."""
        while self.next:
            if self.next in (",", r"\\", r"\quad", r"\qquad"):
                self.take()
                continue
            left, shape = [], "[]"
            while self.next not in ("=", r"\pluseq"):
                left.append(self.take())
            rest = self.tokens
            if left[0] == r"\underset":
                self.tokens = left[1:]
                width, inside = self.shape(), self.group()
                if not self.tokens:  # the shape belongs to the whole side, not to a factor
                    shape, left = width, inside
            name, indices, value, self.indices = joined(left), [], "", []
            if name not in self.names and left[1:2] == ["_"] and (len(left) == 3 or left[2] == "{"):
                name, indices = joined(left[:1]), self.running(left[2:])
                if not indices:
                    raise ValueError(f"unknown name {joined(left)!r}")
                if not self.letters(left[2:]) and name in self.names:  # a computed index, ``y_{j + D/2}``
                    self.indices, self.tokens = indices, left
                    value = self.factor()
            elif name not in self.names and len(left) > 1:
                self.tokens = left
                value = self.sum()
                if self.tokens:
                    raise ValueError(f"unknown name {joined(left)!r}")
            self.tokens = rest
            self.indices = [index for index in indices if index]
            adds, sides = self.next == r"\pluseq", [value] if value and not indices else []
            while self.next in ("=", r"\pluseq"):
                self.take()
                sides.append(self.sum())
            holds = "True"
            if self.tokens[:2] == [r"\quad", "("]:
                self.take()
                holds = self.bracket("(", ")", self.relation)
            yield Printed(name, indices, shape, sides, adds, holds, value)

    def letters(self, tokens: list[str]) -> list[str]:
        """Return the indices of a subscript of letters only, with "" for a whole axis; otherwise []."""
        plain = [token for token in tokens if token not in "{},()"]
        if not all(token == r"\cdot" or token.isalpha() for token in plain):
            return []
        return [letter for token in plain for letter in ([""] if token == r"\cdot" else token)]

    def shape(self) -> str:
        """Parse a printed shape into the source of a list."""
        return repr([token for token in self.group() if token not in "(,)"])

    def running(self, subscript: list[str]) -> list[str]:
        """Return the indices of a left side; in a computed one, ``j + D/2``, only the letters that run."""
        known = self.names.get("fixed", {}) if self.letters(subscript) else self.names
        letters = self.letters(subscript) or [token for token in subscript if token.isalpha()]
        return [letter for letter in letters if letter not in known]

    def relation(self) -> str:
        """Parse a condition, ``u < t``; words in it are skipped."""
        parts = [self.sum()]
        while self.next in RELATIONS:
            sign = RELATIONS[self.take()]
            parts += [sign, self.sum()]
        while self.next not in (")", "]", ",", ""):  # words
            self.take()
        return " ".join(parts) if len(parts) > 1 or self.next in ("]", ",") else "True"

    def sum(self) -> str:
        """Parse a sum of terms."""
        source = self.take() if self.next in ("+", "-") else ""
        source += self.product()
        while self.next in ("+", "-"):
            source += f" {self.take()} {self.product()}"
        return f"({source})"

    def product(self) -> str:
        """Parse a product of factors, some of them divisors."""
        source = self.factor()
        while self.next not in END_OF_PRODUCT and not self.next.startswith(r"\text{ "):
            sign = self.take() if self.next in ("/", r"\cdot") else ""
            factor = self.factor()
            product = "dot" if sign == r"\cdot" else "times"
            source = f"{source} / {factor}" if sign == "/" else f"{product}({source}, {factor})"
        return source

    def factor(self) -> str:
        """Parse an atom with its superscripts and subscripts."""
        source = self.atom()
        while self.next in ("^", "_"):
            if self.take() == "_":
                source = f"entry({source}, {self.place(self.group())})"
            elif self.next == r"\top":
                self.take()
                source = f"{source}.T"
            else:
                source = f"{source} ** {self.argument()}"
        return source

    def argument(self) -> str:
        """Parse the contents of braces, or else the next atom."""
        return self.bracket("{", "}", self.sum) if self.next == "{" else self.atom()

    def arguments(self) -> str:
        """Parse a function's arguments: a list in brackets, or the rest of the term."""
        if self.next != "(":
            return self.product()

        return self.bracket("(", ")", lambda: ", ".join(self.listed()))

    def listed(self) -> list[str]:
        """Parse a list of comma-separated sums."""
        parts = [self.sum()]
        while self.next == ",":
            self.take()
            parts.append(self.sum())
        return parts

    def atom(self) -> str:
        """Parse a bracket, a number, a function call, an operator over an index, or a name."""
        if self.next in ("(", "{", r"\lvert"):
            closing = {"(": ")", "{": "}", r"\lvert": r"\rvert"}[self.next]
            return ("abs" if self.next == r"\lvert" else "") + self.bracket(self.next, closing, self.sum)
        if self.next == "[":
            return self.bracket("[", "]", self.indicator_or_row)
        if self.next == r"\vstack":
            self.take()
            return f"np.vstack([{self.arguments()}])"
        token = joined([self.take()]) if self.next.startswith(r"\text") and self.next not in INDEXED else self.take()
        if token[0].isdigit():
            return token
        if token == r"\frac":
            return f"({self.argument()} / {self.argument()})"
        if token == r"\sqrt":
            return f"np.sqrt({self.argument()})"
        if token == r"\underset":
            shape = self.shape()
            return f"shaped({self.bracket('{', '}', self.sum)}, {shape}, widths)"
        if token == r"\underbrace":
            value, _, _ = self.bracket("{", "}", self.sum), self.take("_"), self.group()
            return value
        if token == r"\pi":
            return "np.pi"
        if token in FUNCTIONS:
            return f"{FUNCTIONS[token]}({self.arguments()})"
        if token in INDEXED:
            return self.over(INDEXED[token]) if self.next == "_" else f"np.{INDEXED[token]}imum({self.arguments()})"
        if token == "e" and self.next == "^":
            self.take()
            return f"np.exp({self.argument()})"
        return self.name(token)

    def indicator_or_row(self) -> str:
        """Parse an indicator, ``[a < P]``, which is 1 or 0, or a matrix of adjacent blocks, ``[A, B]``."""
        first = self.relation()
        if self.next != ",":
            return f"(1 * ({first}))"
        self.take()
        return f"np.hstack([{', '.join([first, *self.listed()])}])"

    def over(self, taken: str) -> str:
        """Parse a sum, a maximum or a mean over indices."""
        self.take("_")
        below = self.group()
        end = next((i for i, token in enumerate(below) if token in RELATIONS or token.startswith(r"\text")), len(below))
        indices = self.letters(below[:end]) or self.running(below[:end])  # or those of a condition, ``s p + k = l``
        rest, outer = self.tokens, self.indices
        self.indices, condition = [*outer, *indices], "True"
        sign = below[end] if end < len(below) else ""
        if sign in RELATIONS and (sign != r"\in" or joined(below[end + 1 : end + 2]) in self.names):
            self.tokens = below
            condition = self.relation()
        self.tokens = rest
        source, self.indices = self.product(), outer
        loops = " ".join(f"for {index} in range(sizes[{index!r}])" for index in indices)
        return f"np.{taken}([{source} {loops} if {condition}], axis=0)"

    def name(self, token: str) -> str:
        """Parse a name with what it stands for: an index, an array, an entry of one, or a function call."""
        token, rest = joined([token]), list(self.tokens)
        if self.next in ("_", "^") and (whole := joined([token, self.take(), *self.group()])) in self.names:
            token = whole
        else:
            self.tokens = rest
        if token in self.indices and self.next != "_":
            return f"names['at'][{token!r}][{token}]" if token in self.names.get("at", {}) else token
        if token not in self.names:
            raise ValueError(f"unknown name {token!r}")
        source = f"names[{token!r}]"
        if callable(self.names[token]):
            return f"{source}({self.arguments()})"
        if self.next != "_":
            return source
        self.take()
        return f"entry({source}, {self.place(self.group(), np.asarray(self.names[token]))})"

    def place(self, subscript: list[str], array: np.ndarray | None = None) -> str:
        """Parse a subscript into an entry's place; each index runs over the axis of the array that it indexes."""
        parts, rest, fixed = [], self.tokens, self.names.get("fixed", {})
        if self.letters(subscript):
            subscript = [token for token in subscript if token not in "()"]
        for part in " ".join(subscript).split(","):
            tokens = part.split()
            letters = self.letters(tokens)
            if letters and all(letter in ("", *self.indices, *fixed) for letter in letters):
                parts += [letter or "slice(None)" for letter in letters]
            else:
                self.tokens = tokens
                parts.append(self.sum())
        self.tokens = rest
        if array is not None:
            shape = trailing(array, len(parts)).shape
            for part, count in zip(parts, shape[len(shape) - len(parts) :], strict=True):
                if part in self.indices:
                    self.size(part, count)
        return ", ".join(str(fixed.get(part, part)) for part in parts)


def joined(tokens: list[str]) -> str:
    """Return a name as it is looked up: without braces and backslashes."""
    return re.sub(r"\\text\{([^}]*)\}", r"\1", "".join(tokens)).translate(str.maketrans("", "", "{}\\")).strip()
