"""Where a test computes: NumPy, NumPy with inputs that nobody may write to, the stand-in for CuPy, a GPU."""

import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from minilora import Backend, BackendUnavailable, get_backend


@dataclass(frozen=True)
class Place:
    """A backend, and what its results may differ by from NumPy's.

    Where `exact`, results must be bit-equal. Adam's kernel takes its steps in another order than the readable
    `adam_update`, and a compiler fuses multiplications with additions, so where it runs nothing that Adam touched is
    compared bit by bit: that is `exact_adam`.
    """

    backend: Backend
    exact: bool = True
    exact_adam: bool = True
    read_only: bool = False

    def put(self, host: np.ndarray) -> Any:
        """Return host values as an array of this place, to be read."""
        array = self.backend.asarray(host.copy())
        if self.read_only:
            array.flags.writeable = False
        return array

    def put_parameter(self, host: np.ndarray) -> Any:
        """Return host values as an array of this place, to be trained."""
        return self.backend.asarray(host.copy())

    def assert_same(self, found: Any, expected: Any, *, adam: bool = False) -> None:
        """Compare an array of this place with NumPy's."""
        assert isinstance(found, (self.backend.xp.ndarray, np.generic)), f"{type(found)} is of another library"
        host, expected = self.backend.to_numpy(found), np.asarray(expected)
        assert host.shape == expected.shape
        assert host.dtype == expected.dtype
        if self.exact and (self.exact_adam or not adam):
            np.testing.assert_array_equal(host, expected)
        else:
            tolerance = {"uint8": 0, "float32": 5e-5, "float64": 1e-9 if adam else 1e-12}[host.dtype.name]
            bound = tolerance * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(host, expected, rtol=0, atol=bound)

    def assert_all_same(self, found: dict[str, Any], expected: dict[str, Any], *, adam: bool = False) -> None:
        """Compare arrays of this place with NumPy's, by their names."""
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            self.assert_same(found[name], array, adam=adam)


def real_cupy() -> Backend:
    """Return CuPy on a GPU, or skip the test; with MINILORA_REQUIRE_GPU=1, fail it.

    MINILORA_CUPY names another library to take CuPy's place: .ci/another-library tries dpnp.
    """
    if "MINILORA_CUPY" in os.environ:
        sys.modules["cupy"] = import_module(os.environ["MINILORA_CUPY"])
    try:
        return get_backend("cupy")
    except BackendUnavailable as reason:
        if os.environ.get("MINILORA_REQUIRE_GPU") == "1":
            pytest.fail(f"MINILORA_REQUIRE_GPU=1, but {reason}")
        pytest.skip(str(reason))


PLACES = {
    "numpy": Place(get_backend("numpy")),
    "read-only numpy": Place(get_backend("numpy"), read_only=True),
}


def elsewhere(*more: tuple[str, str]) -> pytest.MarkDecorator:
    """Run a test at some places, in one precision each: what computes in the wrong one shows on each."""
    here = [("read-only numpy", "float64"), ("stand-in", "float32"), *more]
    there = [pytest.param("gpu", dtype, marks=pytest.mark.gpu) for dtype in ("float32", "float64")]
    return pytest.mark.parametrize(("place", "dtype"), [*here, *there], indirect=["place"])
