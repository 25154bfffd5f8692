"""The array libraries: create arrays on NumPy or CuPy, and copy them back.

The mathematics elsewhere is written with ``@``, ``.T``, ``+`` and methods. Arrays of both libraries have
these, so a layer computes wherever its arrays are. Three things depend on the library: creating an array, copying it to
the host, and the few functions that are not methods. Any library whose arrays have NumPy's methods can replace CuPy.

CuPy is looked up among the imported modules, and only `get_backend` imports it: on a machine without it, nothing tries.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import and_
from typing import Any

import numpy as np

from .checks import Array
from .extras import install


class BackendUnavailable(RuntimeError):
    """The requested library cannot compute on this machine; the message says why, and what to do."""


@dataclass(frozen=True)
class Backend:
    """An array library and its device."""

    name: str  # "numpy" or "cupy"
    xp: Any  # the library's module, for functions that are not methods of arrays

    @property
    def device(self) -> str:
        """A readable name of the hardware."""
        if self.name == "numpy":
            return f"CPU ({platform.machine()})"
        try:
            runtime = self.xp.cuda.runtime
            name = runtime.getDeviceProperties(runtime.getDevice())["name"]
            return str(name.decode() if isinstance(name, bytes) else name)
        except Exception:  # the name is optional, and a stand-in for CuPy may lack it
            return "GPU"

    def asarray(self, host: Any, dtype: Any = None) -> Array:
        """Return `host` as an array of this library, rounded to `dtype`, copying only if necessary."""
        return self.xp.asarray(host, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array of zeros."""
        return self.xp.zeros(shape, dtype=dtype)

    def to_numpy(self, array: Array) -> np.ndarray:
        """Return `array` on the host; this waits for the device."""
        return np.asarray(array) if self.name == "numpy" else self.xp.asnumpy(array)

    def synchronize(self) -> None:
        """Wait until the device has finished all pending work, as for timing."""
        if self.name == "numpy":
            return
        device = getattr(getattr(self.xp, "cuda", None), "Device", None)
        if device is not None:
            device().synchronize()
        else:  # work is done in order, so reading one number waits for everything before it
            self.to_numpy(self.zeros((1,), "float32"))


_NUMPY = Backend("numpy", np)


def get_backend(name: str) -> Backend:
    """Return the named backend after checking that it works.

    Parameters
    ----------
    name : {"numpy", "cupy", "auto"}
        ``"auto"`` chooses CuPy if it works, and otherwise NumPy, with a warning that says why. ``"cupy"`` never
        falls back.

    Returns
    -------
    Backend
        A working backend.

    Raises
    ------
    BackendUnavailable
        If CuPy is not installed, finds no usable device, or fails a first small computation.
    ValueError
        If the name is unknown.
    """
    if name == "numpy":
        return _NUMPY
    if name == "cupy":
        return Backend("cupy", _working_cupy())
    if name == "auto":
        try:
            return get_backend("cupy")
        except BackendUnavailable as reason:
            warnings.warn(f"computing with NumPy: {reason}", stacklevel=2)
            return _NUMPY
    raise ValueError(f"backend must be 'numpy', 'cupy' or 'auto', got {name!r}")


def backend_or_numpy(backend: Backend | None) -> Backend:
    """Return the backend given by an optional argument, by default NumPy."""
    if backend is None:
        return _NUMPY
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be a Backend, as minilora.get_backend('cupy') returns it, got {backend!r}")
    return backend


def _working_cupy() -> Any:
    """Import CuPy and multiply two matrices, since a successful import does not mean that it can compute."""
    try:
        import cupy
    except Exception as error:  # usually an ImportError, but a broken installation may raise anything
        state = "not installed" if isinstance(error, ModuleNotFoundError) else "not installed correctly"
        raise BackendUnavailable(
            f"CuPy is {state} ({error}): {install('cuda12')}, or cuda13, whichever your driver runs"
        ) from None
    try:  # CuPy raises many types here, all with CUDA's message
        # This needs the compiler, a CuPy kernel and cuBLAS, which a wheel without its CUDA libraries lacks.
        square = cupy.arange(4, dtype="float32").reshape(2, 2)
        total = float((square @ square).sum())
    except Exception as error:
        raise BackendUnavailable(
            f"CuPy cannot compute here ({type(error).__name__}: {error}): check the driver with nvidia-smi, that the "
            "wheel's CUDA version fits it, and that the wheel's [ctk] extra is installed"
        ) from None
    if total != 22:
        raise BackendUnavailable(f"CuPy computed 2 + 3 + 6 + 11 = {total:g}: the device or its driver is broken")
    return cupy


def backend_of(array: Array) -> Backend:
    """Return the backend of an array."""
    if isinstance(array, (np.ndarray, np.generic)):
        return _NUMPY
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return Backend("cupy", cupy)
    raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")


def add_at(array: Array, index: Any, values: Array) -> None:
    """Add values to the entries at an index in place; repeated entries accumulate."""
    backend_of(array).xp.add.at(array, index, values)


def all_finite(arrays: Sequence[Array]) -> bool:
    """Return whether all entries of all arrays are finite; this waits for the device once."""
    flags = [backend_of(array).xp.isfinite(array).all() for array in arrays]
    return bool(reduce(and_, flags)) if flags else True


def check_apart(params: Mapping[str, Array]) -> None:
    """Require that no two arrays share memory, as far as the library can tell. One array may have several names."""
    for (one, p), (other, q) in combinations(params.items(), 2):
        tell = getattr(backend_of(p).xp, "shares_memory", None)
        if p is not q and tell is not None and tell(p, q):
            raise ValueError(f"params[{one!r}] and params[{other!r}] share memory: give one array both names")


def check_finite(**arrays: Array) -> None:
    """Require finite numbers. Memory-mapped arrays are not scanned."""
    ends = {k: [a.min(), a.max()] for k, a in arrays.items() if a.dtype.kind == "f" and not isinstance(a, np.memmap)}
    if all_finite([end for pair in ends.values() for end in pair]):  # in the usual case this waits for the device once
        return
    name = next(name for name, pair in ends.items() if not all_finite(pair))
    host = backend_of(arrays[name]).to_numpy(arrays[name])
    at = np.argwhere(~np.isfinite(host))[0]
    raise ValueError(f"{name} holds NaN or infinity: entry {tuple(int(i) for i in at)} is {host[tuple(at)]}")
