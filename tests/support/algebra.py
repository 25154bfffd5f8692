"""Every small mistake of algebra in the package's mathematics, made by a program, one at a time.

A transpose lost or too many, operands or answers exchanged, a factor or a summand left out, another operation, a sign,
a sum in place of a mean, another axis, a bound off by one: mutmut changes no `@`, no `.T` and no order. So a new layer
needs no wrong copies of its own.
"""

import ast
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType

PLACES = (
    "lora.",
    "linear.",
    "losses.",
    "optim.adam_update",
    "layers.",
    "variants.",
    "fast.blockwise.",
    "fast.experts_by_rows.",
    "fast.residual.",
)
"""Where the mathematics is, below minilora."""
OTHERS = (
    "layers.nf4.",
    "layers.quantized.",
    "layers.convolution._each_axis",
    "layers.rotary.frequencies",
    "layers.rotary._angles",
)
"""What has tests of its own: codes, how arguments are read, and tables that are kept from one call to the next."""
OTHER = {ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Add: ast.Sub, ast.Sub: ast.Add}
IN_PLACE = {"iadd": "isub", "isub": "iadd", "imul": "itruediv"}
REDUCTIONS = {"sum": "mean", "mean": "sum"}
BOUNDS = {ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Lt: ast.LtE, ast.LtE: ast.Lt}


def is_transpose(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "T"


def wrong(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what may be written in the place of a node by mistake, with what is wrong about it."""
    if isinstance(node, ast.BinOp):
        left, right, op = node.left, node.right, node.op
        if isinstance(op, ast.MatMult):
            yield "exchanged", ast.BinOp(right, op, left)
            if not is_transpose(left):
                yield "left transposed", ast.BinOp(ast.Attribute(left, "T", ast.Load()), op, right)
            if not is_transpose(right):
                yield "right transposed", ast.BinOp(left, op, ast.Attribute(right, "T", ast.Load()))
        elif isinstance(op, ast.Pow):
            yield "without the power", left
        elif type(op) in OTHER and not {type(left), type(right)} & {ast.JoinedStr, ast.IfExp}:  # and no text
            yield "without the right", left
            if isinstance(op, (ast.Mult, ast.Add)):
                yield "without the left", right
            yield "other operation", ast.BinOp(left, OTHER[type(op)](), right)
    elif is_transpose(node):
        yield "not transposed", node.value  # type: ignore[attr-defined]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "without the sign", node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in BOUNDS and len(node.ops) == 1:
        yield "off by one", ast.Compare(node.left, [BOUNDS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Dict) and len(node.values) == 2:
        yield "exchanged", ast.Dict(node.keys, node.values[::-1])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "transpose":
        *axes, one, other = node.args
        yield "other axes", ast.Call(node.func, [*axes, other, one], [])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IN_PLACE:
        yield "other operation", ast.Call(ast.Name(IN_PLACE[node.func.id], ast.Load()), node.args, [])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in REDUCTIONS:
        new = copy.deepcopy(node)
        new.func.attr = REDUCTIONS[node.func.attr]
        yield new.func.attr, new
        for word in node.keywords:
            if word.arg == "axis" and isinstance(word.value, (ast.Constant, ast.UnaryOp)):
                new = copy.deepcopy(node)
                axis = next(other for other in new.keywords if other.arg == "axis")
                axis.value = ast.Constant(-1 if ast.literal_eval(word.value) == 0 else 0)
                yield "other axis", new


def exchanged(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield a return of several answers with the first two exchanged."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        one, other, *more = node.value.elts
        if not isinstance(one, (ast.Constant, ast.Attribute)):
            yield "exchanged", ast.Return(ast.Tuple([other, one, *more], ast.Load()))


@dataclass(frozen=True)
class Mistake:
    """A function of the package, and one node of it that is changed."""

    function: FunctionType
    what: str
    place: int  # of the node, as a walk comes to it
    new: ast.AST

    def __str__(self) -> str:
        return f"{place_of(self.function)}: {self.what}"

    @contextmanager
    def made(self) -> Iterator[None]:
        """Run the function with the mistake: whoever calls it, under whatever name, and behind its guard."""
        definition, right = defined(self.function), self.function.__code__
        target = next(islice(ast.walk(definition), self.place, None))
        self.function.__code__ = compiled(Put(target, copy.deepcopy(self.new)).visit(definition), self.function)
        try:
            yield
        finally:
            self.function.__code__ = right


def mistakes(function: FunctionType) -> list[Mistake]:
    """Return a function's mistakes."""
    return [
        Mistake(function, f"{what}: {ast.unparse(node)}", place, new)
        for place, node in enumerate(ast.walk(defined(function)))
        for what, new in (*wrong(node), *exchanged(node))
    ]


class Put(ast.NodeTransformer):
    """Put one node in the place of another."""

    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self.target, self.new = target, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.target else self.generic_visit(node)


def defined(function: FunctionType) -> ast.FunctionDef:
    """Return a function's definition without decorators, types and defaults; of a property's lambda likewise."""
    code = function.__code__
    node = next(node for node in nodes(code.co_filename) if first_line(node) == code.co_firstlineno)
    arguments, body = copy.deepcopy((node.args, node.body))
    body = body if isinstance(body, list) else [ast.Return(body)]
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    made = ast.FunctionDef("mistaken", arguments, body, [], None, None)
    for part in ast.walk(made):
        if isinstance(part, (ast.arg, ast.AnnAssign)):
            part.annotation = ast.Constant(None)
    return made


@cache
def nodes(file: str) -> list[ast.FunctionDef | ast.Lambda]:
    """Return every function of a file."""
    return [n for n in ast.walk(ast.parse(Path(file).read_text())) if isinstance(n, (ast.FunctionDef, ast.Lambda))]


def first_line(node: ast.FunctionDef | ast.Lambda) -> int:
    return min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))


def compiled(definition: ast.AST, function: FunctionType) -> CodeType:
    """Return the code of a definition, with the names that the function has from around it, such as super()'s class."""
    free = function.__code__.co_freevars
    around = ast.parse("def around():\n" + "".join(f"    {name} = None\n" for name in free) + "    pass")
    around.body[0].body.append(definition)  # type: ignore[attr-defined]
    module = compile(ast.fix_missing_locations(around), "<mistake>", "exec")
    (outer,) = (c for c in module.co_consts if isinstance(c, CodeType))
    (inner,) = (c for c in outer.co_consts if isinstance(c, CodeType))
    return inner


def functions() -> dict[CodeType, FunctionType]:
    """Return every function and method of the mathematics, by its code."""
    found: dict[CodeType, FunctionType] = {}

    def add(value: object) -> None:
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        value = inspect.unwrap(value) if callable(value) else value  # type: ignore[arg-type]
        if isinstance(value, FunctionType) and value.__module__.startswith("minilora."):
            made = value.__code__.co_filename != sys.modules[value.__module__].__file__  # by a dataclass
            place = place_of(value)
            guard = "check_" in place or "__post_init__" in place
            if not made and not guard and place.startswith(PLACES) and not place.startswith(OTHERS):
                found[value.__code__] = value

    for name, module in list(sys.modules.items()):
        if name.startswith("minilora."):
            for value in list(vars(module).values()):
                for inner in vars(value).values() if isinstance(value, type) else (value,):
                    add(inner)
    return found


def place_of(function: FunctionType) -> str:
    return f"{function.__module__}.{function.__qualname__}".removeprefix("minilora.")


def reached(call: Callable[[], object]) -> set[CodeType]:
    """Return the code of every function that a call runs."""
    found: set[CodeType] = set()

    def note(frame, event, _):
        if event == "call":
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found
