"""One clear error for bad input, raised before anything is changed.

The other rooms call these guards on their first lines, so that what follows is mathematics alone. Each
message names the argument, the value it had and the value that was expected.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array, or an array of a library that behaves like NumPy (CuPy)."""

# The complex types are there for the complex step of `gradcheck`: complex128 computes with float64's precision.
_PRECISION = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}


def dtype_name(array: Array) -> str:
    """Return the bare name of an array's dtype, ``"float32"``, in whichever library it lives."""
    return str(array.dtype).rpartition(".")[2]


def check_array(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Refuse what is not a floating-point array, or not of the library and precision of `like`."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
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


def check_cache(layer: Any, dy: Array, cache: Any) -> None:
    """Refuse a cache that `layer.forward` did not return, or a `dy` that does not fit its output."""
    if not isinstance(cache, tuple) or len(cache) < 2 or cache[0] is not layer:
        raise ValueError(f"cache does not come from this layer's forward: {layer!r}")
    x, out_features = cache[1], layer.out_features
    check_array("dy", dy, like=x, like_name="x")
    check_shape("dy", dy, (*x.shape[:-1], out_features))


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


def check_number(name: str, value: Any, *, above: float, below: float = math.inf, or_equal: bool = False) -> float:
    """Return `value` as a Python float (a NumPy scalar would promote), or refuse it outside (above, below)."""
    try:
        if isinstance(value, (str, bytes, bool)):  # which float() would take
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
