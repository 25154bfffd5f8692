"""One clear error for bad input, raised before anything is changed.

Public functions call these guards first. After them comes only mathematics. Each message names the argument, the value
it had and the value that was expected.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Mapping
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array, or an array of a library that behaves like NumPy (CuPy)."""

Rate: TypeAlias = float | Mapping[str, float]
"""A step length for every parameter, or one for each ending of a name."""

MAX_SIZE = 2**31 - 1
"""Of a width or a rank."""
IGNORED = -100
"""The target that `minilora.cross_entropy` passes over, as in PyTorch."""

# The complex types are there for the complex step of `gradcheck`: complex128 computes with float64's precision.
_PRECISION = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}

_OTHER_ARITHMETIC = (np.matrix, np.ma.MaskedArray)
"""NumPy's classes whose * is another product, or some of whose entries do not count."""


def is_array(value: Any) -> bool:
    """Return whether a value is an array of some library."""
    return hasattr(value, "dtype") and hasattr(value, "shape")


def dtype_name(array: Array) -> str:
    """Return the bare name of an array's dtype, ``"float32"``, in whichever library it lives."""
    return _bare_name(array.dtype)


@cache
def _bare_name(dtype: Any) -> str:
    """Return the name. It is kept: NumPy takes microseconds to write it. torch writes "torch.float32"."""
    return str(dtype).rpartition(".")[2]


def check_array(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Refuse what is not a floating-point array, or not of the library and precision of `like`."""
    if not is_array(value):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    if isinstance(value, _OTHER_ARITHMETIC):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a plain array: convert it with numpy.asarray")
    if like is not None:
        check_library(name, value, like, like_name)
        if value.dtype == like.dtype:  # the common case, and 2 microseconds cheaper than names
            return
    precision = _PRECISION.get(dtype_name(value))
    if precision is None:
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point dtype such as float32")
    if like is not None and precision != _PRECISION.get(dtype_name(like)):
        raise TypeError(f"{name} has dtype {value.dtype}, expected {like.dtype} as in {like_name}")


def check_trainable(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Refuse what Adam cannot work with: complex numbers, and float16, where eps and squares of gradients vanish."""
    check_array(name, value, like, like_name)
    if like is not None and value.dtype == like.dtype:  # which has been checked: this runs in every step
        return
    if dtype_name(value) not in ("float32", "float64"):
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32 or float64: others cannot be trained")


def check_library(name: str, value: Array, like: Array, like_name: str) -> None:
    """Refuse an array of another library than that of `like`: nothing is moved to or from a GPU silently."""
    if type(value) is type(like):
        return
    ours, theirs = _library(value), _library(like)
    if ours == theirs or isinstance(value, type(like)) or isinstance(like, type(value)):
        return
    if theirs == "numpy":
        advice = f"take {name} to the host with minilora.get_backend('cupy').to_numpy({name}), or make all with CuPy"
    else:
        advice = f"convert {name} with minilora.get_backend('cupy').asarray({name}), or make all with NumPy"
    raise TypeError(f"{name} is a {ours} array and {like_name} holds {theirs} arrays: {advice}")


def _library(array: Array) -> str:
    """Return the name of the library an array belongs to."""
    array = getattr(array, "like", array)  # one-hot rows belong to the library of the matrices that they multiply
    # NumPy's own scalars count, and subclasses such as numpy.memmap, wherever they are defined.
    return "numpy" if isinstance(array, (np.ndarray, np.generic)) else type(array).__module__.partition(".")[0]


def check_matrix(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Refuse what is not a floating-point matrix with at least one row and one column."""
    check_array(name, value, like, like_name)
    if len(value.shape) != 2 or 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected a matrix with no empty axis")


def check_features(name: str, value: Array, width: int, width_name: str, like: Array) -> None:
    """Refuse an array whose last axis is not `width` long."""
    check_array(name, value, like)
    shape = tuple(value.shape)
    if not shape or shape[-1] != width:
        got = f"{shape[-1]} entries on its last axis" if shape else "no axes"
        raise ValueError(f"{name} has {got} (shape {shape}), expected {width_name} = {width}")


def check_shape(name: str, value: Array, expected: tuple[int, ...]) -> None:
    """Refuse an array that does not have exactly the `expected` shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}")


def check_count(name: str, value: Array) -> int:
    """Return the number of entries, or refuse an array without any."""
    if 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: the mean of no entries does not exist")
    return math.prod(value.shape)


def check_targets(logits: Array, targets: Array) -> None:
    """Refuse what is not logits (..., V) and a class id, or `IGNORED`, for each row of them."""
    check_array("logits", logits)
    if not logits.shape or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with no empty axis")
    check_ids("targets", targets, logits.shape[-1], like=logits, like_name="logits", ignored=IGNORED)
    check_shape("targets", targets, logits.shape[:-1])


def check_ids(
    name: str, value: Array, count: int, *, like: Array = None, like_name: str = "the layer", ignored: int | None = None
) -> None:
    """Refuse what is not an array of integers from 0 to count - 1, or `ignored`. A GPU's are not looked at: that waits.

    NumPy would take negative numbers from the end, and CuPy any number at all.
    """
    if not is_array(value):
        raise TypeError(f"{name} must be an array of integers, got {type(value).__name__}")
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {value.dtype}, expected integers")
    if like is not None:
        check_library(name, value, like, like_name)
    if isinstance(value, np.ndarray) and value.size:
        wrong = (value < 0) | (value >= count)
        if ignored is not None:
            wrong &= value != ignored
        if wrong.any():
            at = np.unravel_index(int(wrong.argmax()), value.shape)
            raise ValueError(f"{name} holds {value[at]} at {tuple(map(int, at))}, expected 0 to {count - 1}")


def check_adam(params: Any, lr: Any, betas: Any, eps: Any) -> tuple[Any, tuple[float, float], float]:
    """Return Adam's settings as floats, or refuse them, or parameters that cannot be updated in place."""
    check_dict("params", params)
    if not params:
        raise ValueError("params is empty: there is nothing to train")
    first, *_ = params
    for name, p in params.items():
        check_trainable(f"params[{name!r}]", p)
        check_library(f"params[{name!r}]", p, like=params[first], like_name=f"params[{first!r}]")
        if isinstance(p, np.ndarray) and not p.flags.writeable:
            raise ValueError(f"params[{name!r}] is read-only: Adam updates it in place, so give a copy")
    check_no_overlap(params)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    beta1, beta2 = (check_number(f"betas[{i}]", b, above=0, below=1, or_equal=True) for i, b in enumerate(betas))
    return check_rates(lr, params), (beta1, beta2), check_number("eps", eps, above=0)


def check_no_overlap(params: Mapping[str, Array]) -> None:
    """Refuse two arrays that share memory, unless they are one array under two names. On a GPU nothing tells."""
    host = {id(p): (name, p) for name, p in params.items() if isinstance(p, np.ndarray)}
    for (one, p), (two, q) in combinations(host.values(), 2):
        if np.shares_memory(p, q):
            raise ValueError(
                f"params[{one!r}] and params[{two!r}] share memory and are two arrays: give one array both names"
            )


def check_like_params(
    label: str, arrays: Mapping[str, Array], params: Mapping[str, Array], home: Mapping[str, str] | None = None
) -> None:
    """Refuse arrays that differ in library, dtype or shape from the parameters of their names."""
    for name, array in arrays.items():
        p = params[home[name] if home else name]
        check_trainable(f"{label}[{name!r}]", array, like=p, like_name="params")
        check_shape(f"{label}[{name!r}]", array, p.shape)


def check_data(model: Any, X: Array, Y: Array, loss: Callable[[Array, Array], Any], *, every_id: bool = False) -> int:
    """Return the number of rows of X and Y, or refuse data that a model or a loss cannot take, or not together.

    It tries the first row; with `every_id`, also the rows that hold the smallest and the largest id. Ids on a GPU are
    not looked at.
    """
    if not hasattr(model, "trainable"):
        raise TypeError(f"model must be a layer such as LoRALinear, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"loss must be a function such as minilora.mse, got {loss!r}")
    like = next(iter(model.trainable().values()), None)
    for name, data in {"X": X, "Y": Y}.items():
        if not is_array(data):
            raise TypeError(f"{name} must be an array, got {type(data).__name__}")
        if data.dtype.kind not in "iu":
            check_array(name, data, like)
            check_trainable(name, data, like)
        elif like is not None:
            check_library(name, data, like, "the layer")
    widths: list[Any] = [getattr(model, width, None) for width in ("in_features", "out_features")]
    if X.dtype.kind == "f" and widths[0] is not None:
        check_features("X", X, widths[0], "in_features", like)
    if X.shape == () or X.shape[0] == 0 or (X.dtype.kind == "f" and len(X.shape) < 2):
        raise ValueError(f"X has shape {tuple(X.shape)}, expected (n, ..., in) with at least one row")
    if Y.shape[:1] != X.shape[:1]:
        raise ValueError(f"Y has shape {tuple(Y.shape)}, expected {X.shape[0]} rows as X has")
    if Y.dtype.kind in "iu" and not bool((Y != IGNORED).any()):
        raise ValueError(f"Y has no target that counts: all of them are {IGNORED}")
    if X.dtype.kind == Y.dtype.kind == "f" and None not in widths:
        check_shape("Y", Y, (*X.shape[:-1], widths[1]))
    with np.errstate(all="ignore"):
        loss(model(X[:1]), Y[:1])
        for row in _rows_of_extremes(X) | _rows_of_extremes(Y, ignored=IGNORED) if every_id else ():
            try:
                loss(model(X[row : row + 1]), Y[row : row + 1])
            except ValueError as error:
                raise ValueError(f"row {row} of X and Y: {error}") from None
    rows: int = X.shape[0]
    return rows


def _rows_of_extremes(ids: Array, ignored: int | None = None) -> set[int]:
    """Return the rows that hold the smallest and the largest id; no rows where the data are no ids, or on a GPU."""
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu" or not ids.size:
        return set()
    counted = ids if ignored is None else np.where(ids == ignored, ids.max(), ids)
    return {int(place) // (ids.size // len(ids)) for place in (counted.argmin(), ids.argmax())}


def check_held_out(model: Any, held_out: Any, loss: Callable[[Array, Array], Any]) -> tuple[Array, Array]:
    """Return held-out inputs and targets, or refuse those that a model or a loss cannot take."""
    if not isinstance(held_out, tuple) or len(held_out) != 2:
        raise TypeError(f"held_out must be two arrays, inputs and targets, got {type(held_out).__name__}")
    try:
        check_data(model, *held_out, loss, every_id=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"held_out: {error}") from None
    return held_out


def check_batch_size(batch_size: Any, n: int, of: str = "X") -> int:
    """Return the batch size as an int, or refuse one that is not between 1 and the number of rows."""
    size = check_integer("batch_size", batch_size, at_least=1)
    if size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of {of}, got {size}")
    return size


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value`, or refuse what is not one of the choices."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")
    return str(value)


def check_sizes(**sizes: Any) -> list[int]:
    """Return sizes as Python ints, or refuse one that is not an integer from 1 to `MAX_SIZE`."""
    numbers = [check_integer(name, size, at_least=1) for name, size in sizes.items()]
    for name, number in zip(sizes, numbers, strict=True):
        if number > MAX_SIZE:
            raise ValueError(f"{name} must be at most {MAX_SIZE}, got {number}")
    return numbers


def check_start(rng: Any, dtype: Any, alpha: Any = 1.0, **sizes: Any) -> list[int]:
    """Return a new layer's sizes as Python ints, or refuse what it cannot be started with, before a number is drawn."""
    numbers = check_sizes(**sizes)
    check_rng(rng)
    check_float_dtype("dtype", dtype)
    check_number("alpha", alpha, above=0)
    return numbers


def check_dict(name: str, value: Any) -> None:
    """Refuse what is not a dict, or another mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {type(value).__name__}")


def check_instance(name: str, value: Any, expected: type) -> None:
    """Refuse what is not of the `expected` class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {type(value).__name__}")


def check_same_keys(name: str, value: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse a dict whose keys are not exactly the `expected` ones."""
    check_dict(name, value)
    if value.keys() != set(expected):
        missing, extra = sorted(set(expected) - value.keys()), sorted(value.keys() - set(expected), key=str)
        raise ValueError(f"{name} must have the keys {sorted(expected)}: missing {missing}, extra {extra}")


def check_integer(name: str, value: Any, at_least: int) -> int:
    """Return `value` as a Python int, or refuse what is not an integer of at least `at_least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return number


def _is_real(value: Any) -> bool:
    """Return whether a value is one real number, of Python's or in an array without axes."""
    if hasattr(value, "dtype"):
        return value.dtype.kind in "fiu" and not getattr(value, "shape", ())
    return not isinstance(value, (str, bytes, bytearray, memoryview, bool, complex))


def check_number(name: str, value: Any, *, above: float, below: float = math.inf, or_equal: bool = False) -> float:
    """Return `value` as a Python float (a NumPy scalar would promote), or refuse it outside (above, below)."""
    try:
        if not _is_real(value):  # float() would take more: texts, bytes, truth values, the real part of a number
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not (above < number < below or (or_equal and number == above)):
        lower = "at least" if or_equal else "above"
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {lower} {above:g} and {upper}, got {value!r}")
    return number


def check_rng(rng: Any) -> None:
    """Refuse what is not a `numpy.random.Generator`."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got {rng!r}")


def check_rank_within(rank: Any, sizes: tuple[int, ...]) -> int:
    """Return a rank as an int, or refuse one above the smallest of the sizes."""
    number = check_integer("rank", rank, at_least=1)
    if number > min(sizes):
        raise ValueError(f"rank must be at most {min(sizes)}, got {rank}")
    return number


def check_rates(lr: Any, names: Collection[str]) -> Any:
    """Return lr, or the rates in a mapping, as floats; refuse a name without a rate, and an ending of no name."""
    if not isinstance(lr, Mapping):
        return check_number("lr", lr, above=0)
    rates = {end: check_number(f"lr[{end!r}]", rate, above=0) for end, rate in lr.items()}
    if unused := [end for end in rates if not any(name.endswith(end) for name in names)]:
        raise ValueError(f"lr has rates for {unused}, which end no name; there are {list(names)}")
    if without := [name for name in names if not any(name.endswith(end) for end in rates)]:
        raise ValueError(f"lr has no rate for {without}: give one for the ending, or for '', which ends every name")
    return rates


def rate_of(lr: Rate, name: str) -> float:
    """Return lr itself or, from a mapping, the rate of the longest ending of a name."""
    return lr[max(filter(name.endswith, lr), key=len)] if isinstance(lr, Mapping) else lr


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool, or refuse it: of a text such as "false", Python would say that it is true."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a path, or refuse it: an empty text would mean the working folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, got {value!r}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} must be the path of a file or folder, got {value!r}")
    return Path(value)


def check_float_dtype(name: str, value: Any) -> None:
    """Refuse what is not one of the floating-point types that adapters come in."""
    expected = ("float16", "float32", "float64")
    try:
        known = np.dtype(value).name in expected
    except (TypeError, ValueError, SyntaxError):
        known = False
    if not known:
        raise TypeError(f"{name} must be one of {', '.join(expected)}, got {value!r}")


if not TYPE_CHECKING:  # a type checker would take any name for one of these
    _MOVED = {"check_cache": "layer", "check_dy": "layer", "check_input": "layer"}

    def __getattr__(name: str) -> Any:
        """Return a guard that stood here until 0.3.0. Its old import works for one more version."""
        if name not in _MOVED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MOVED[name]}", __package__), name)
