"""A stand-in for CuPy: it computes with NumPy, refuses what CuPy refuses, and counts what would cost time on a GPU.

Its arrays wrap NumPy arrays and are none themselves, so nothing of NumPy's works on them by accident. It knows only
the names, and only the keywords, that stand in cupy_api.json, which list_cupy_api.py wrote from the real wheel. Where
CuPy is lenient and a habit would still be bad (``np.sqrt`` of a GPU array, a list as an index), it is stricter.
"""

import json
import operator
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

API = json.loads(Path(__file__).with_name("cupy_api.json").read_text())


@dataclass
class Traffic:
    """How often the host waited for the device, and how often an array crossed over; a single number only waits."""

    waits: int = 0
    to_device: int = 0
    to_host: int = 0
    copied: int = 0  # bytes of the largest stack that a product copied

    def reset(self):
        self.waits = self.to_device = self.to_host = self.copied = 0


traffic = Traffic()

WAITING = {"nonzero", "flatnonzero", "argwhere", "unique", "compress", "extract", "bincount", "item", "tolist"}
CREATING = {"array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray"}
COPYING = {"reshape", "ravel"}  # CuPy promises no view of them, whatever it does
UNKNOWN = {"data", "flat", "flags", "base", "cstruct", "random", "fft"}  # CuPy has them; nobody here needs them


def unwrap(value):
    """Return what NumPy is to compute with in place of an argument."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: CuPy does not mix with NumPy arrays")
    if isinstance(value, (list, tuple)):
        if not all(isinstance(item, (ndarray, int, np.integer, tuple, slice, type(None))) for item in value):
            raise TypeError(f"Unsupported type {type(value)}: CuPy does not take sequences of numbers")
        return type(value)(unwrap(item) for item in value)
    return value


def wrap(value):
    """Return a result as CuPy would: an array on the device, with no axes where NumPy gives a scalar."""
    if isinstance(value, (np.ndarray, np.generic, bool)):
        return ndarray(np.asarray(value))
    if isinstance(value, (tuple, list)):
        return tuple(wrap(item) for item in value)
    return value


def note_copies(*stacks):
    """CuPy's product of stacks copies each that is not contiguous, whole; of two matrices it copies none."""
    if max(stack.ndim for stack in stacks) > 2:
        traffic.copied = max([traffic.copied, *(stack.nbytes for stack in stacks if not stack.flags.c_contiguous)])


def guarded(title, name, function):
    """Return a function that takes and gives device arrays, and knows the keywords that CuPy knows."""
    known = API[title][name]

    def call(*args, **kwargs):
        if known is not None and not kwargs.keys() <= set(known):
            raise TypeError(
                f"{title}.{name}() got an unexpected keyword argument: {sorted(kwargs.keys() - set(known))}"
            )
        traffic.waits += name in WAITING or (name == "where" and len(args) == 1)
        if name == "take":
            kwargs["mode"] = "wrap"  # CuPy does not look whether an index is out of range
        if kwargs.get("out") is None:
            kwargs.pop("out", None)
        elif not isinstance(kwargs["out"], ndarray):
            raise TypeError("return arrays must be of cupy.ndarray")
        result = function(*map(unwrap, args), **{key: unwrap(value) for key, value in kwargs.items()})
        if name in COPYING:
            result = result.copy()
        return result if name in ("item", "tolist") else kwargs["out"] if "out" in kwargs else wrap(result)

    if (title, name) == ("cupy", "add"):
        call.at = _add_at
    return call


class ndarray:
    """An array on the device that is not there."""

    __slots__ = ("_host",)
    __array_ufunc__ = None  # np.sqrt(array) and numpy_array + array
    __hash__ = None
    shape = property(lambda self: self._host.shape)  # which every check asks for, as for the next
    dtype = property(lambda self: self._host.dtype)

    def __init__(self, host):
        self._host = host

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Use `.get()`.")

    def __array_function__(self, *_):
        return NotImplemented

    def __getattr__(self, name):
        if name.startswith("_") or name in UNKNOWN or name not in API["cupy.ndarray"]:
            raise AttributeError(f"the stand-in for CuPy {API['version']} has no cupy.ndarray.{name}")
        member = getattr(self._host, name)
        return guarded("cupy.ndarray", name, member) if callable(member) else wrap(member)

    def __len__(self):
        return len(self._host)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index):
        parts = [_index(part) for part in index] if isinstance(index, tuple) else [_index(index)]
        traffic.waits += any(isinstance(part, np.ndarray) and part.dtype == bool for part in parts)
        if len(parts) == 1 and isinstance(parts[0], np.ndarray) and parts[0].dtype != bool:
            return wrap(np.take(self._host, parts[0], axis=0, mode="wrap"))
        return wrap(self._host[tuple(parts)])

    def __setitem__(self, index, value):
        parts = [_index(part) for part in index] if isinstance(index, tuple) else [_index(index)]
        self._host[tuple(parts)] = _operand(value)

    def scatter_add(self, slices, value):
        warnings.warn(
            "`ndarray.scatter_add` is deprecated. Please use `cupy.add.at` instead.", DeprecationWarning, stacklevel=2
        )
        _add_at(self, slices, value)

    def __deepcopy__(self, memo):
        return self.copy()

    def get(self):
        traffic.waits += 1
        traffic.to_host += 1
        return self._host.copy()

    def __repr__(self):
        return repr(self.get())

    def __str__(self):
        return str(self.get())

    def __format__(self, spec):
        return format(self.get() if self.ndim else self.item(), spec)


ndarray.__module__ = "cupy"


def _add_at(array, index, values):
    """On a GPU this is atomic, so that the order of the sum is not NumPy's."""
    if not isinstance(array, ndarray):
        raise TypeError(f"Unsupported type {type(array)}")
    parts = [_index(part) for part in index] if isinstance(index, tuple) else [_index(index)]
    np.add.at(array._host, tuple(parts), _operand(values))


def _operand(value):
    if isinstance(value, (list, tuple)):
        raise TypeError(f"Unsupported type {type(value)}")
    return unwrap(value)


def _index(part):
    """Return one part of an index. CuPy moves lists and NumPy arrays over to the device, silently: refused here."""
    if isinstance(part, (list, np.ndarray)):
        raise TypeError(f"an index of type {type(part)} would be copied to the device each time")
    return part._host if isinstance(part, ndarray) else part


def _add_operators():
    def forward(function):
        def operate(self, other):
            if not isinstance(other, ndarray) and getattr(other, "__array_ufunc__", True) is None:
                return NotImplemented  # as NEP 13 has it, and CuPy does it
            if function is operator.matmul:
                note_copies(self._host, _operand(other))
            return wrap(function(self._host, _operand(other)))

        return operate

    def reflected(function):
        return lambda self, other: wrap(function(_operand(other), self._host))

    def in_place(function):
        def update(self, other):
            function(self._host, _operand(other))
            return self

        return update

    def unary(function):
        return lambda self: wrap(function(self._host))

    def number(kind):
        def convert(self):
            traffic.waits += 1
            return kind(self._host.item())

        return convert

    for kind in (bool, int, float, complex):
        setattr(ndarray, f"__{kind.__name__}__", number(kind))
    arithmetic = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"]
    keyword = {"and": "and_", "or": "or_"}
    for name in arithmetic:
        function = getattr(operator, keyword.get(name, name))
        setattr(ndarray, f"__{name}__", forward(function))
        setattr(ndarray, f"__r{name}__", reflected(function))
        if f"__i{name}__" in API["cupy.ndarray"]:  # there is no @=
            setattr(ndarray, f"__i{name}__", in_place(getattr(operator, f"i{name}")))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(ndarray, f"__{name}__", forward(getattr(operator, name)))
    for name in ("neg", "pos", "abs", "invert"):
        setattr(ndarray, f"__{name}__", unary(getattr(operator, name)))


_add_operators()


class Namespace:
    """A module of the stand-in: NumPy's functions, guarded, under the names that CuPy has."""

    def __init__(self, title, source=None, **own):
        self.__dict__.update(own, _title=title, _source=source)

    def __getattr__(self, name):
        if name in UNKNOWN or name not in API.get(self._title, ()):
            raise AttributeError(f"the stand-in for CuPy {API['version']} has no {self._title}.{name}")
        member = getattr(self._source, name)
        return member if isinstance(member, type) or not callable(member) else guarded(self._title, name, member)


class Device:
    """The device that is not there."""

    id = 0

    def synchronize(self):
        traffic.waits += 1


def _creator(name):
    function = getattr(np, name)

    def create(obj, dtype=None):
        if isinstance(obj, ndarray):
            return wrap(function(obj._host, dtype=dtype))
        traffic.to_device += 1
        return ndarray(np.array(obj, dtype=dtype))  # never the caller's own memory

    return create


def _asnumpy(array):
    return array.get() if isinstance(array, ndarray) else np.asarray(array)


class ElementwiseKernel:
    """A kernel whose statements are run as Python: they must be C and Python alike."""

    def __init__(self, in_params, out_params, operation, name="kernel"):
        self.inputs, self.outputs = ([p.split() for p in text.split(",")] for text in (in_params, out_params))
        self.operation = operation
        if not operation.strip().endswith(";") or re.search(r"\*\*|//|\band\b|\bor\b|#", operation):
            raise ValueError(f"this is no C: {operation}")

    def __call__(self, *args):
        declared = self.inputs + self.outputs
        if len(args) != len(declared):
            raise TypeError(f"Wrong number of arguments: {len(args)}, expected {len(declared)}")
        types, values = {}, {}
        for (kind, _), value in zip(declared, args, strict=True):
            if isinstance(value, ndarray) and types.setdefault(kind, value.dtype) != value.dtype:
                raise TypeError(f"Type is mismatched: {kind} is both {types[kind]} and {value.dtype}")
        for (kind, name), value in zip(declared, args, strict=True):
            if not isinstance(value, (ndarray, int, float)):
                raise TypeError(f"Unsupported type {type(value)}")
            values[name] = value._host.copy() if isinstance(value, ndarray) else types[kind].type(value)
        for statement in filter(None, map(str.strip, self.operation.split(";"))):
            exec(statement, {"__builtins__": {}, "sqrt": np.sqrt}, values)
        for (kind, name), array in zip(self.outputs, args[len(self.inputs) :], strict=True):
            if values[name].dtype != types[kind] or values[name].shape != array.shape:
                raise TypeError(f"{name} became {values[name].dtype} {values[name].shape}")
            array._host[...] = values[name]


def make(*, kernels=True):
    """Return a module to stand in ``sys.modules["cupy"]``; without kernels it is like any other library there."""
    runtime = Namespace(
        "cupy.cuda.runtime",
        getDevice=lambda: 0,
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda device: {"name": b"the device that is not there"},
    )
    own = {name: _creator(name) for name in CREATING} | ({"ElementwiseKernel": ElementwiseKernel} if kernels else {})
    return Namespace(
        "cupy",
        np,
        __version__=API["version"],
        ndarray=ndarray,
        is_available=lambda: True,
        asnumpy=_asnumpy,
        linalg=Namespace("cupy.linalg", np.linalg),
        cuda=Namespace("cupy.cuda", Device=Device, is_available=lambda: True, runtime=runtime),
        **own,
    )
