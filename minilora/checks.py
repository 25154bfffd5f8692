"""One clear error for bad input, raised before anything is changed.

Public functions call these guards first. After them comes only mathematics. Each message names the argument, the value
it had and the value that was expected.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array, or an array of a library that behaves like NumPy (CuPy)."""

MAX_SIZE = 2**31 - 1
"""Of a width or a rank."""

# The complex types are there for the complex step of `gradcheck`: complex128 computes with float64's precision.
_PRECISION = {
    "float16": "float16",
    "float32": "float32",
    "float64": "float64",
    "complex64": "float32",
    "complex128": "float64",
}

IMAGINARY = 1e-6
"""The largest imaginary part that may be one of the complex step, which begins with 1e-20 and goes through layers."""

_OTHER_ARITHMETIC = (np.matrix, np.ma.MaskedArray)
"""NumPy's classes whose * is another product, or some of whose entries do not count."""

_CONVERSIONS = {
    "torch": "{}.detach().cpu().numpy()",
    "jax": "numpy.asarray({})",
    "jaxlib": "numpy.asarray({})",
    "tensorflow": "{}.numpy()",
    "pandas": "{}.to_numpy()",
    "polars": "{}.to_numpy()",
    "scipy": "{}.toarray()",  # its sparse matrices
}
"""Libraries whose arrays do not compute as NumPy's do, and how one becomes NumPy's. None of them is imported here."""


def is_array(value: Any) -> bool:
    """Return whether a value is an array of some library."""
    return type(value) is np.ndarray or (hasattr(value, "dtype") and hasattr(value, "shape"))


def dtype_name(array: Array) -> str:
    """Return the bare name of an array's dtype, ``"float32"``, in whichever library it lives."""
    return _bare_name(array.dtype)


@cache
def _bare_name(dtype: Any) -> str:
    """Return the name. It is kept: NumPy takes microseconds to write it. torch writes "torch.float32"."""
    return str(dtype).rpartition(".")[2]


@cache
def _conversion(cls: type) -> str | None:
    """Return how an object of a class, or of one derived from it, becomes a NumPy array, or None."""
    roots = (parent.__module__.partition(".")[0] for parent in cls.__mro__)
    return next((_CONVERSIONS[root] for root in roots if root in _CONVERSIONS), None)


def kind_of(value: Any) -> str:
    """Return what a value is, for a message: its class, with the library that the class comes from."""
    if isinstance(value, type):
        return f"the class {value.__name__}, and no object of it"
    library, name = type(value).__module__.partition(".")[0], type(value).__name__
    return name if library in ("builtins", "numpy", "__main__", __package__) else f"{library}.{name}"


def shown(value: Any, at_most: int = 200) -> str:
    """Return a value as Python writes it, cut short."""
    try:
        text = repr(value)
    except ValueError:  # of an integer with more digits than Python writes
        return f"an integer of {value.bit_length()} bits"
    return text if len(text) <= at_most else f"{text[:at_most]} ..."


def check_kind(name: str, value: Any, expected: str = "an array") -> None:
    """Refuse what is not an array that computes as NumPy's do, and say how it becomes one."""
    way = _conversion(type(value))  # type: ignore[arg-type]
    if way is not None:
        raise TypeError(f"{name} is a {kind_of(value)}; convert it with {way.format(name)}")
    if isinstance(value, tuple) and (advice := _returned(value)):
        raise TypeError(f"{name} must be {expected}, got a tuple {advice.format(name)}")
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be {expected}, got {kind_of(value)}; convert it with numpy.asarray({name})")
    if not is_array(value) or isinstance(value, type):
        raise TypeError(f"{name} must be {expected}, got {kind_of(value)}")
    if not isinstance(value.dtype, np.dtype):  # what behaves like NumPy has NumPy's types
        raise TypeError(f"{name} is a {kind_of(value)}; convert it with numpy.asarray({name})")
    if isinstance(value, _OTHER_ARITHMETIC):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a plain array: convert it with numpy.asarray")


def _returned(value: tuple[Any, ...]) -> str:
    """Return what to take of a tuple that a loss, a forward or a backward returned; empty for another one."""
    if len(value) != 2:
        return ""
    first, second = value
    if is_array(first) and not first.shape and is_array(second) and second.shape:
        return "(loss, gradient), as a loss returns it: take the gradient, {}[1]"
    if is_array(first) and isinstance(second, tuple) and second and hasattr(second[0], "forward"):
        return "(y, cache), as forward returns it: take y, {}[0]"
    if (first is None or is_array(first)) and isinstance(second, Mapping):
        return "(dx, gradients), as backward returns it: take dx, {}[0]"
    return ""


def check_array(name: str, value: Array, like: Array = None, like_name: str = "the layer") -> None:
    """Refuse what is not an array of real floating-point numbers, or not of the library and precision of `like`."""
    if type(value) is type(like) is np.ndarray and value.dtype == like.dtype and value.dtype.kind == "f":
        return  # the usual case: every layer asks at every step, and `like` was looked at before
    _check_dtype(name, value, like, like_name)
    if value.dtype.kind == "c" and value.size and float(abs(value.imag).max()) > IMAGINARY:
        raise TypeError(
            f"{name} holds complex numbers, and layers compute with real ones: take {name}.real, or its real and "
            "imaginary parts side by side"
        )


def _check_dtype(name: str, value: Array, like: Array, like_name: str) -> None:
    """Refuse what is not a floating-point array, or not of the library and precision of `like`."""
    if type(value) is not np.ndarray:  # the common case needs no more than that
        check_kind(name, value)
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
    _check_dtype(name, value, like, like_name)
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
    if theirs == "numpy" and ours != "cupy":
        advice = f"convert it with numpy.asarray({name})"
    elif theirs == "numpy":
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


def check_ids(
    name: str, value: Array, count: int, *, like: Array = None, like_name: str = "the layer", ignored: int | None = None
) -> None:
    """Refuse what is not an array of integers from 0 to count - 1, or `ignored`. A GPU's are not looked at: that waits.

    NumPy would take negative numbers from the end, and CuPy any number at all.
    """
    if type(value) is not np.ndarray:
        check_kind(name, value, "an array of integers")
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


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return `value`, or refuse what is not one of the choices."""
    if not isinstance(value, (str, int)) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}")
    return str(value)


def check_sizes(**sizes: Any) -> list[int]:
    """Return sizes as Python ints, or refuse one that is not an integer from 1 to `MAX_SIZE`."""
    return [check_integer(name, size, at_least=1, at_most=MAX_SIZE) for name, size in sizes.items()]


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
        raise TypeError(f"{name} must be a dict, got {kind_of(value)}")


def check_instance(name: str, value: Any, expected: type) -> None:
    """Refuse what is not of the `expected` class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {kind_of(value)}")


def check_same_keys(name: str, value: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse a dict whose keys are not exactly the `expected` ones."""
    check_dict(name, value)
    if value.keys() != set(expected):
        missing, extra = sorted(set(expected) - value.keys()), sorted(value.keys() - set(expected), key=str)
        raise ValueError(f"{name} must have the keys {sorted(expected)}: missing {missing}, extra {extra}")


def check_integer(name: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """Return `value` as a Python int, or refuse what is not an integer in these limits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {shown(value)}") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    if at_most is not None and number > at_most:
        raise ValueError(f"{name} must be at most {at_most}, got {shown(value)}")
    return number


def _is_real(value: Any) -> bool:
    """Return whether a value is one real number, of Python's or in an array without axes."""
    if hasattr(value, "dtype"):
        return getattr(value.dtype, "kind", None) in ("f", "i", "u") and not getattr(value, "shape", ())
    return not isinstance(value, (str, bytes, bytearray, memoryview, bool, complex))


def check_number(name: str, value: Any, *, above: float, below: float = math.inf, or_equal: bool = False) -> float:
    """Return `value` as a Python float (a NumPy scalar would promote), or refuse it outside (above, below)."""
    try:
        if not _is_real(value):  # float() would take more: texts, bytes, truth values, the real part of a number
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not (above < number < below or (or_equal and number == above)):
        lower = "at least" if or_equal else "above"
        upper = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be {lower} {above:g} and {upper}, got {shown(value)}")
    return number


def check_rng(rng: Any) -> None:
    """Refuse what is not a `numpy.random.Generator`."""
    if not isinstance(rng, np.random.Generator):
        raise TypeError(f"rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got {rng!r}")


@contextmanager
def unmoved(rng: np.random.Generator) -> Iterator[None]:
    """Put a generator back to where it stood, where what is started with it is refused."""
    state = rng.bit_generator.state
    try:
        yield
    except Exception:
        rng.bit_generator.state = state
        raise


def check_rank_within(rank: Any, sizes: tuple[int, ...]) -> int:
    """Return a rank as an int, or refuse one above the smallest of the sizes."""
    number = check_integer("rank", rank, at_least=1)
    if number > min(sizes):
        raise ValueError(f"rank must be at most {min(sizes)}, got {shown(rank)}")
    return number


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


# --- errors about files, in one line of printable characters ---

LONGEST_NAME, LONGEST_MESSAGE = 200, 1200
"""Characters of one name or value, and of a whole message."""
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(?<!\.gguf)(?<!\.npz)(?<!\.json)(?<!\.safetensors)")
"""``owner/model``: how a hub names a model."""
INSTALL = {"gguf": "gguf tokenizers"}
"""What to install for a package, where that is more than the package: a .gguf file's tokenizer needs both."""


class FileRefused(ValueError):
    """A file, of whatever kind, cannot be used; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(printable(f"{str(path)!r}: {reason}"))


def printable(text: str, at_most: int = LONGEST_MESSAGE) -> str:
    """Return a text in one line without control characters, its middle left out where it is too long."""
    if len(text) > at_most:  # first, so that a very long text costs no more than its ends
        half = at_most // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(value: Any, at_most: int = LONGEST_NAME) -> str:
    """Return a value as Python writes it, its middle left out where it is too long."""
    if isinstance(value, str) and len(value) > at_most:
        value = value[:at_most] + value[-at_most:]  # repr of the whole would be cut to no more than this
    return printable(repr(value), at_most)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Make one line of whatever a library says about a file: ``'PATH': reason``."""
    try:
        yield
    except FileRefused:
        raise
    except OSError as error:
        raise FileRefused(path, (error.strerror or str(error)) + hub_hint(Path(path))) from error
    except Exception as error:  # of safetensors, msgspec, json, gguf: each has classes of its own
        raise FileRefused(path, str(error) or type(error).__name__) from error


@contextmanager
def named(label: str) -> Iterator[None]:
    """Put the name of what is looked at before an error about it: ``adapters['q']: ...``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{label}: {error}") from None


def hub_hint(path: Path) -> str:
    """Return what to give in place of a hub's name of a model, where a path is one and leads nowhere; or ""."""
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    return f". If it is a model's name on a hub, download it ('hf download {name} --local-dir DIR') and give the folder"


def needed(package: str, why: str) -> Any:
    """Import a package that only some models' files need, or say how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{why} needs {package} ({error}): pip install {INSTALL.get(package, package)}") from error
