"""One clear error for bad input, raised before anything is changed.

Public functions call these guards first. After them comes only mathematics. Each message names the argument, the value
it had and the value that was expected.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Collection, Mapping
from functools import cache
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


def reference(layer: Any) -> Array | None:
    """Return the first array of a layer, whose library and precision its input must have; None where it has none."""
    for value in vars(layer).values():
        for part in value if isinstance(value, list) else (value,):
            found = part if is_array(part) else reference(part) if hasattr(part, "trainable") else None
            if found is not None:
                return found
    return None


def check_input(layer: Any, x: Array) -> None:
    """Refuse an input that does not fit a layer: its last axis is in_features long."""
    check_features("x", x, layer.in_features, "in_features", like=reference(layer))


def check_dy(layer: Any, dy: Array) -> None:
    """Refuse an upstream gradient that does not fit a layer: its last axis is out_features long."""
    check_features("dy", dy, layer.out_features, "out_features", like=reference(layer))


def check_cache(layer: Any, dy: Array, cache: Any) -> tuple[Any, ...]:
    """Return what a cache keeps, or refuse one that `layer.forward` did not return, or a `dy` that does not fit it."""
    if not isinstance(cache, tuple) or len(cache) < 2 or cache[0] is not layer:
        raise ValueError(f"cache does not come from this layer's forward: {layer!r:.200}")
    check_array("dy", dy, like=reference(layer))
    check_shape("dy", dy, cache[1])
    return cache[2:]


def check_weight(weight: Array, bias: Array | None) -> None:
    """Refuse arrays that are not a weight (out, in) and its bias (out,)."""
    check_matrix("weight", weight)
    if bias is not None:
        check_array("bias", bias, like=weight, like_name="weight")
        check_shape("bias", bias, (weight.shape[0],))


def check_factors(lora_A: Array, lora_B: Array, alpha: Any) -> float:
    """Return alpha as a float, or refuse arrays that are not two factors of one rank."""
    check_matrix("lora_A", lora_A)
    check_matrix("lora_B", lora_B, like=lora_A, like_name="lora_A")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(
            "lora_A (r, in) and lora_B (out, r) disagree on the rank: "
            f"lora_A has {lora_A.shape[0]} rows, lora_B has {lora_B.shape[1]} columns"
        )
    return check_number("alpha", alpha, above=0)


def check_beside(base: Any, base_type: type, adapter: Any, adapter_type: type) -> None:
    """Refuse a base and an adapter that cannot stand side by side."""
    check_instance("base", base, base_type)
    check_instance("adapter", adapter, adapter_type)
    check_array("adapter", reference(adapter), like=reference(base), like_name="base")
    for width in ("in_features", "out_features"):
        ours, theirs = getattr(adapter, width), getattr(base, width)
        if ours != theirs:
            raise ValueError(f"adapter has {width} = {ours}, expected {theirs} as in base")


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


def check_prompt(prompt: Any, vocabulary: int) -> list[int]:
    """Return a prompt as Python ints, or refuse one without a token, or with one that the model does not have."""
    if isinstance(prompt, (str, bytes)) or not hasattr(prompt, "__len__"):
        raise TypeError(f"prompt must be a sequence of token ids, got {type(prompt).__name__}")
    if len(prompt) == 0:
        raise ValueError("prompt is empty: give at least one token")
    ids, most = [check_integer(f"prompt[{i}]", token, at_least=0) for i, token in enumerate(prompt)], vocabulary - 1
    if max(ids) > most:
        raise ValueError(f"prompt[{ids.index(max(ids))}] must be at most {most}, got {max(ids)}")
    return ids


def check_children(layers: Mapping[str, Any], layer_type: type, reserved: Collection[str]) -> None:
    """Refuse a model's children that are no layers, or whose names are taken or no part of a path."""
    if not layers:
        raise ValueError("Sequential() has no layers: give at least one, by name, such as fc=Linear(...)")
    for name, layer in layers.items():
        check_instance(name, layer, layer_type)
        if name in reserved:
            raise ValueError(f"a layer cannot be named {name!r}: every layer has an attribute of that name")


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


def check_table(weight: Array) -> None:
    """Refuse what is not an embedding's weight, (V, dim)."""
    check_matrix("weight", weight)


def check_kernel(name: str, weight: Array, bias: Array | None, axes: int, groups: Any) -> None:
    """Refuse arrays that are not a convolution's weight (out, in, *kernel) and bias (out,), and groups."""
    if groups != 1:
        raise ValueError(f"groups={groups!r} is not supported: a {name} here connects every input to every output")
    check_array("weight", weight)
    if len(weight.shape) != axes + 2 or 0 in weight.shape:
        expected = "(out, in, " + ", ".join(("height", "width")[-axes:]) + ")"
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected {expected} with no empty axis")
    if bias is not None:
        check_array("bias", bias, like=weight, like_name="weight")
        check_shape("bias", bias, (weight.shape[0],))


def check_each_axis(name: str, value: Any, axes: int, at_least: int) -> tuple[int, ...]:
    """Return one integer for each axis of a kernel: from a number for all of them, or from as many."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be an integer or {axes} of them, got {value!r}")
    return tuple(check_integer(name, v, at_least=at_least) for v in values)


def check_image(layer: Any, x: Array) -> None:
    """Refuse an input that does not fit a convolution: (N, in, *sizes), and no kernel larger than the padded image."""
    check_array("x", x, like=layer.weight)
    shape, weight = tuple(x.shape), layer.weight.shape
    if len(shape) != len(weight) or shape[1] != weight[1]:
        raise ValueError(f"x has shape {shape}, expected {len(weight)} axes, (N, {weight[1]}, ...)")
    if min(layer.positions(shape)) < 1:
        raise ValueError(f"x has shape {shape}: with padding {layer.padding} it is smaller than the kernel {layer!r}")


def check_target_modules(target_modules: Any) -> None:
    """Refuse what is not a list of module paths or their ends, or one regular expression."""
    if isinstance(target_modules, str):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is not a regular expression: {error}") from None
    elif not isinstance(target_modules, Collection) or not all(isinstance(name, str) for name in target_modules):
        raise TypeError(f"target_modules must be a list of names or a regular expression, got {target_modules!r}")


def check_rewriting(base: Any) -> None:
    """Refuse what is no layer that rewrites its input to rows."""
    if not hasattr(base, "rewrite"):
        raise TypeError(f"base must be an Embedding, a Conv1d or a Conv2d, got {type(base).__name__}")


def check_adapter(adapter: Any, kinds: Collection[str], norms: Collection[str]) -> None:
    """Refuse an adapter of an unknown kind, or one whose magnitude or start does not fit its factors."""
    check_choice("kind", adapter.kind, kinds)
    check_choice("dora_norm", adapter.dora_norm, norms)
    if adapter.magnitude is not None:
        check_array("magnitude", adapter.magnitude, like=adapter.lora_A, like_name="lora_A")
        check_shape("magnitude", adapter.magnitude, (adapter.lora_B.shape[0],))
    if adapter.start is not None:
        check_shape("start.lora_A", adapter.start.lora_A, adapter.lora_A.shape)
        check_shape("start.lora_B", adapter.start.lora_B, adapter.lora_B.shape)


def check_magnitude(adapter: Any) -> None:
    """Refuse an adapter without a magnitude where DoRA needs one."""
    if adapter.magnitude is None:
        raise ValueError("adapter has no magnitude: DoRA needs one, an array of shape (out,)")


def check_rank_within(rank: Any, sizes: tuple[int, ...]) -> int:
    """Return a rank as an int, or refuse one above the smallest of the sizes."""
    number = check_integer("rank", rank, at_least=1)
    if number > min(sizes):
        raise ValueError(f"rank must be at most {min(sizes)}, got {rank}")
    return number


def check_summands(adapters: Any, weights: Any) -> list[float]:
    """Return weights as floats, or refuse adapters that cannot be added up."""
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"expected one weight for each adapter, got {len(adapters)} adapters, {len(weights)} weights")
    first = adapters[0]
    for i, adapter in enumerate(adapters):
        check_array(f"adapters[{i}]", adapter.lora_A, like=first.lora_A, like_name="adapters[0]")
        if adapter.shape != first.shape:
            raise ValueError(f"adapters[{i}] has shape {adapter.shape}, expected {first.shape} as adapters[0]")
        for name in ("magnitude", "start"):
            if getattr(adapter, name, None) is not None:
                raise ValueError(f"adapters[{i}] has a {name}: its change of the original base is not s B A")
    return [check_number(f"weights[{i}]", w, above=-math.inf) for i, w in enumerate(weights)]


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


def check_norm(weight: Array, eps: Any) -> float:
    """Return eps as a float, or refuse a weight that is not (d,)."""
    check_array("weight", weight)
    if len(weight.shape) != 1 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (d,), not empty")
    return check_number("eps", eps, above=0)


def check_frequencies(frequencies: Any) -> tuple[float, ...]:
    """Return the frequencies of rotations as floats, or refuse what are not at least one."""
    if not isinstance(frequencies, (tuple, list)) or not frequencies:
        raise ValueError(f"frequencies must be a tuple of one number or more, got {frequencies!r}")
    return tuple(check_number(f"frequencies[{j}]", f, above=0, or_equal=True) for j, f in enumerate(frequencies))


def check_rows(layer: Any, x: Array) -> None:
    """Refuse an input that has no axis of positions, (..., T, in), or no position on it."""
    check_input(layer, x)
    if len(x.shape) < 2 or x.shape[-2] == 0:
        expected = f"(..., T, {layer.in_features}) with at least one position"
        raise ValueError(f"x has shape {tuple(x.shape)}, expected {expected}")


def check_gated(layer: Any) -> None:
    """Refuse three layers whose widths do not make a gated MLP."""
    d, m = layer.gate_proj.in_features, layer.gate_proj.out_features
    check_widths("up_proj", layer.up_proj, d, m)
    check_widths("down_proj", layer.down_proj, m, d)


def check_attention(layer: Any) -> None:
    """Refuse layers whose widths do not make attention: whole heads, in whole groups, over one input."""
    d, D = layer.q_proj.in_features, layer.rotary.in_features
    H, K = layer.q_proj.out_features // D, layer.k_proj.out_features // D
    if 0 in (H, K) or H % K:
        raise ValueError(
            f"q_proj has {layer.q_proj.out_features} outputs and k_proj {layer.k_proj.out_features}: "
            f"expected H * {D} and K * {D}, where K divides H"
        )
    check_widths("q_proj", layer.q_proj, d, H * D)
    check_widths("k_proj", layer.k_proj, d, K * D)
    check_widths("v_proj", layer.v_proj, d, K * D)
    check_widths("o_proj", layer.o_proj, H * D, layer.o_proj.out_features)


def check_widths(name: str, layer: Any, in_features: int, out_features: int) -> None:
    """Refuse a layer of other widths."""
    if (layer.in_features, layer.out_features) != (in_features, out_features):
        got = f"{layer.in_features} -> {layer.out_features}"
        raise ValueError(f"{name} is {got} wide, expected {in_features} -> {out_features}")
