"""Checks of arguments, which raise one clear error before anything is changed.

Only silent mistakes are refused here, and the most frequent ones: a list or a tensor instead of an array, or a string
instead of a number. Each message names the argument, its value and the expected value. Everything else is left to
NumPy.
"""

from __future__ import annotations

import math
import operator
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .texts import short

Array: TypeAlias = Any
"""A NumPy array, or an array of a library that behaves like NumPy (CuPy)."""

MAX_SIZE = 2**31 - 1
"""The largest width or rank that is accepted."""
MIN_ALPHA, MAX_ALPHA = 1e-30, 1e30
"""The range of alpha; beyond it a scaling could vanish or overflow."""

# The complex types are for the complex step of `gradcheck`: complex128 computes with float64's precision.
_PRECISION = {f: f for f in ("float16", "float32", "float64")} | {"complex64": "float32", "complex128": "float64"}

REAL_DTYPES = frozenset(map(np.dtype, ("float16", "float32", "float64")))
"""The real dtypes that layers compute with."""

IMAGINARY = 1e-6
"""The largest imaginary part that can come from the complex step, which starts at 1e-20 and passes through layers."""

ASTYPE = "{name}.astype('{dtype}')"
RECAST = "minilora.layer.rebuild({name}, array=lambda a: a.astype('{dtype}'))"
"""Code that converts an array, or a layer, to another dtype, for messages."""

_OTHER_ARITHMETIC = (np.matrix, np.ma.MaskedArray)
"""NumPy's classes with another product or with masked entries."""
_OTHER_LIBRARIES = ("torch", "jax", "jaxlib", "tensorflow", "pandas", "polars", "scipy")
"""Libraries whose arrays align rows by name, multiply as matrices, or cannot be changed in place."""


# --- arrays ---


def is_array(value: Any) -> bool:
    """Return whether a value is an array of any library."""
    return type(value) is np.ndarray or (hasattr(value, "dtype") and hasattr(value, "shape"))


def dtype_name(array: Array) -> str:
    """Return the bare name of an array's dtype, such as ``"float32"``, in any library."""
    return _bare_name(array.dtype)


@cache
def _bare_name(dtype: Any) -> str:
    """Return the cached name, since NumPy takes microseconds to make it. torch writes "torch.float32"."""
    return str(dtype).rpartition(".")[2]


def kind_of(value: Any) -> str:
    """Return a value's class for a message, with the library of the class."""
    if isinstance(value, type):
        return f"the class {value.__name__}, and no object of it"
    library, name = type(value).__module__.partition(".")[0], type(value).__name__
    return name if library in ("builtins", "numpy", "__main__", __package__) else f"{library}.{name}"


def check_kind(name: str, value: Any, expected: str = "an array") -> None:
    """Require an array that computes like NumPy's."""
    convert = f"; convert it with numpy.asarray({name})"
    if isinstance(value, type) or not is_array(value):
        returned = ": take the one that is meant, of (loss, gradient), (y, cache) or (dx, gradients)"
        advice: dict[type, str] = {list: convert, tuple: returned}
        raise TypeError(f"{name} must be {expected}, got {kind_of(value)}{advice.get(type(value), '')}")
    plain = isinstance(value.dtype, np.dtype) and not isinstance(value, _OTHER_ARITHMETIC)
    if not plain or _library(value) in _OTHER_LIBRARIES:
        raise TypeError(f"{name} is a {kind_of(value)}{convert}")


def check_array(name: str, value: Array, like: Array = None, like_name: str = "the layer", how: str = ASTYPE) -> None:
    """Require an array of real floating-point numbers, of the library and precision of `like`; `how` converts it."""
    if type(value) is type(like) is np.ndarray and value.dtype == like.dtype and value.dtype.kind == "f":
        return  # the usual case
    _check_dtype(name, value, like, like_name, how)
    if value.dtype.kind == "c" and value.size and float(abs(value.imag).max()) > IMAGINARY:
        raise TypeError(
            f"{name} holds complex numbers, and layers compute with real ones: take {name}.real, or its real and "
            "imaginary parts side by side"
        )


def _check_dtype(name: str, value: Array, like: Array, like_name: str, how: str = ASTYPE) -> None:
    """Require a floating-point array, of the library and precision of `like`."""
    if type(value) is not np.ndarray:  # in the common case this is enough
        check_kind(name, value)
    if like is not None:
        check_library(name, value, like, like_name)
        if value.dtype == like.dtype:  # the common case, 2 microseconds faster than comparing names
            return
    precision = _PRECISION.get(dtype_name(value))
    if precision is None:
        raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point dtype such as float32")
    if like is not None and precision != _PRECISION.get(dtype_name(like)):
        remedy = f": convert it with {how.format(name=name, dtype=like.dtype)}" if value.dtype.kind == "f" else ""
        raise TypeError(f"{name} has dtype {value.dtype}, expected {like.dtype} as in {like_name}{remedy}")


def check_trainable(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Require a dtype that Adam can train: not complex, and not float16, where eps and squared gradients vanish."""
    _check_dtype(name, value, like, like_name)
    if like is not None and value.dtype == like.dtype:  # checked before; this runs in every step
        return
    if dtype_name(value) not in ("float32", "float64"):
        raise TypeError(f"{name} has dtype {value.dtype}, expected float32 or float64: others cannot be trained")


def check_updatable(name: str, p: Array, first: Array, first_name: str) -> None:
    """Require a trainable array of the same library as the first, whose entries do not share memory."""
    check_trainable(name, p)
    check_library(name, p, like=first, like_name=first_name)
    if isinstance(p, np.ndarray) and not p.flags.writeable:
        raise ValueError(f"{name} is read-only: Adam updates it in place, so give a copy")
    if isinstance(p, np.ndarray) and p.size and overlaps_itself(p):
        raise ValueError(f"{name} has entries that share memory, as of a view: give a copy")


def overlaps_itself(p: np.ndarray) -> bool:
    """Return whether an array's strides let two entries share memory: each stride must exceed all smaller extents."""
    reach = p.itemsize
    for axis in np.argsort(np.abs(p.strides)):
        stride, size = abs(p.strides[axis]), p.shape[axis]
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_library(name: str, value: Array, like: Array, like_name: str) -> None:
    """Require an array of the same library as `like`: nothing is moved to or from a GPU silently."""
    if type(value) is type(like):
        return
    ours, theirs = _library(value), _library(like)
    if ours == theirs or isinstance(value, type(like)) or isinstance(like, type(value)):
        return
    if theirs == "numpy" and ours != "cupy":
        advice = f"convert it with numpy.asarray({name})"
    else:
        way = "to_numpy" if theirs == "numpy" else "asarray"
        advice = f"convert it with minilora.get_backend('cupy').{way}({name})"
    raise TypeError(f"{name} is a {ours} array and {like_name} holds {theirs} arrays: {advice}")


def _library(array: Array) -> str:
    """Return the name of an array's library."""
    array = getattr(array, "like", array)  # one-hot rows belong to the library of the matrices they multiply
    # NumPy's scalars count, and so do subclasses such as numpy.memmap, wherever they are defined.
    return "numpy" if isinstance(array, (np.ndarray, np.generic)) else type(array).__module__.partition(".")[0]


def check_shape(name: str, value: Array, expected: tuple[int, ...]) -> None:
    """Require exactly the `expected` shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected)}")


def check_not_empty(name: str, value: Array) -> int:
    """Return the number of entries, which must not be zero."""
    if 0 in value.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: the mean of no entries does not exist")
    return math.prod(value.shape)


def check_ids(
    name: str, value: Array, count: int, *, like: Array = None, like_name: str = "the layer", ignored: int | None = None
) -> None:
    """Require an array of ids from 0 to count - 1, or `ignored`. On a GPU they are not checked, which would wait."""
    if type(value) is not np.ndarray:
        check_kind(name, value, "an array of integers")
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {value.dtype}, expected integers")
    if like is not None:
        check_library(name, value, like, like_name)
    if isinstance(value, np.ndarray) and value.size:  # NumPy would count negative numbers from the end
        wrong = (value < 0) | (value >= count)
        if ignored is not None:
            wrong &= value != ignored
        if wrong.any():
            at = np.unravel_index(int(wrong.argmax()), value.shape)
            raise ValueError(f"{name} holds {value[at]} at {tuple(map(int, at))}, expected 0 to {count - 1}")


# --- other arguments ---


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Require one of the choices, and return it."""
    if not isinstance(value, (str, int)) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {short(value)}")
    return str(value)


def check_integer(name: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """Return `value` as a Python int within these limits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {short(value)}")
    number = operator.index(value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {short(value)}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {short(value)}")
    return number


def check_sizes(**sizes: Any) -> list[int]:
    """Return sizes as Python ints, from 1 to `MAX_SIZE`."""
    return [check_integer(name, size, at_least=1, at_most=MAX_SIZE) for name, size in sizes.items()]


def check_rank_within(rank: Any, sizes: tuple[int, ...]) -> int:
    """Return a rank as an int that is at most the smallest of the sizes."""
    return check_integer("rank", rank, at_least=1, at_most=min(sizes))


def check_number(name: str, value: Any, *, above: float, below: float = math.inf, or_equal: bool = False) -> float:
    """Return `value` as a Python float (a NumPy scalar would promote), in (above, below)."""
    try:
        # float() would also accept strings, booleans, real parts of numbers, and arrays with one entry
        no_number = isinstance(value, (str, bytes, bytearray, memoryview, bool, complex))
        if no_number or (hasattr(value, "dtype") and (value.shape or getattr(value.dtype, "kind", "") not in "fiu")):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {short(value)}") from None
    except OverflowError:  # an integer too large for a float
        number = math.inf
    if not (above < number < below or (or_equal and number == above)):
        lower = "at least" if or_equal else "above"
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {lower} {above:g} and {upper}, got {short(value)}")
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; a string such as "false" would be true in Python."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def check_float_dtype(name: str, value: Any) -> None:
    """Require a floating-point dtype that adapters can have."""
    expected = ("float16", "float32", "float64")
    try:
        known = np.dtype(value).name in expected
    except (TypeError, ValueError, SyntaxError):
        known = False
    if not known:
        raise TypeError(f"{name} must be one of {', '.join(expected)}, got {short(value)}")


def check_rng(rng: Any) -> None:
    """Require a `numpy.random.Generator`."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got {short(rng)}")


def check_layer(rng: Any, dtype: Any, alpha: Any = 1.0, **sizes: Any) -> list[int]:
    """Return a new layer's sizes as Python ints, checking all arguments before anything is drawn."""
    numbers = check_sizes(**sizes)
    check_rng(rng)
    check_float_dtype("dtype", dtype)
    check_number("alpha", alpha, above=0)
    return numbers


def warn_of_rank(rank: int, widths: Mapping[str, int]) -> None:
    """Warn if a rank exceeds the smaller width of layers, given by path; a single layer's path is empty."""
    narrow = {path: width for path, width in widths.items() if rank > width}
    if narrow:
        path, width = next(iter(narrow.items()))
        where = f"of {len(narrow)} of the adapted layers, such as {path!r}" if path else f"{width} of the layer"
        warnings.warn(
            f"rank {rank} is above the smaller width {where}: an update has at most rank {width} there, so "
            f"rank={width} says as much with fewer numbers",
            stacklevel=3,
        )


@contextmanager
def restoring_rng(rng: np.random.Generator) -> Iterator[None]:
    """Restore a generator's state if the body raises an error."""
    check_rng(rng)
    state = rng.bit_generator.state
    try:
        yield
    except Exception:
        rng.bit_generator.state = state
        raise


def check_instance(name: str, value: Any, expected: type) -> None:
    """Require an instance of the `expected` class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {kind_of(value)}")


def check_dict(name: str, value: Any) -> None:
    """Require a dict, or another mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, got {kind_of(value)}")


def check_same_keys(name: str, value: Mapping[str, Any], expected: Collection[str]) -> None:
    """Require a dict with exactly the `expected` keys."""
    check_dict(name, value)
    if value.keys() != set(expected):
        missing, extra = sorted(set(expected) - value.keys()), sorted(value.keys() - set(expected), key=str)
        raise ValueError(f"{name} must have the keys {sorted(expected)}: missing {missing}, extra {extra}")


def check_like(name: str, value: Mapping[str, Array], params: Mapping[str, Array]) -> None:
    """Require arrays under the names of `params`, each with its parameter's library, dtype and shape."""
    if not isinstance(value, dict) or value.keys() != params.keys():
        check_same_keys(name, value, params)
    for key, array in value.items():
        p = params[key]
        if type(array) is not type(p) or array.dtype != p.dtype or array.shape != p.shape:
            check_trainable(f"{name}[{key!r}]", array, like=p, like_name="params")
            check_shape(f"{name}[{key!r}]", array, p.shape)


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a path; an empty string would mean the working folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a path, got {short(value)}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} must be the path of a file or folder, got {short(value)}")
    return Path(value)
