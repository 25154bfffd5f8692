"""Adam's kernel, its text run as Python: it must do what the readable update does."""

import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minilora import Adam, Backend, get_backend
from minilora.fast.adam import gpu_update
from minilora.optim import adam_update

from ..support import cupy_standin


@given(
    seed=st.integers(0, 2**32 - 1),
    t=st.sampled_from([1, 2, 10, 1000, 100_000]),
    dtype=st.sampled_from(["float32", "float64"]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.99, 0.9)]),
)
def test_adams_kernel_does_what_the_readable_update_does(seed, t, dtype, scale, betas):
    """To a few roundings, since a compiler fuses multiplications with additions; no algebra may differ."""
    rng = np.random.default_rng(seed)
    theta, g, m, v = (scale * rng.standard_normal((4, 5))).astype(dtype), *np.zeros((3, 4, 5), dtype)
    g += scale * rng.standard_normal(g.shape)
    m += scale * rng.standard_normal(g.shape)
    v += scale**2 * rng.random(g.shape)
    cupy = cupy_standin.make()
    there = [cupy.asarray(array) for array in (theta, g, m, v)]
    before = theta.copy()
    options = {"lr": 0.01, "betas": betas, "eps": 1e-8}
    adam_update(theta, g, m, v, t, **options)
    gpu_update(Backend("cupy", cupy))(*there, t, **options)
    few = 8 * np.finfo(dtype).eps
    step = np.abs(theta - before)
    for found, expected, size in zip(there, (theta, g, m, v), (step + abs(theta), 0, scale, scale**2), strict=True):
        assert (np.abs(found.get() - expected) <= few * (size + np.abs(expected))).all()


def test_adam_launches_one_kernel_for_each_parameter(monkeypatch):
    launched = []

    class Kernel(cupy_standin.ElementwiseKernel):
        def __init__(self, in_params, out_params, operation, name):
            assert name == "minilora_adam"  # what a profiler shows
            super().__init__(in_params, out_params, operation)

        def __call__(self, *args):
            launched.append(args[-3].shape)
            super().__call__(*args)

    cupy = cupy_standin.make()
    vars(cupy)["ElementwiseKernel"] = Kernel
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    backend = get_backend("cupy")
    optimizer = Adam({"a": backend.zeros((300, 300), "float32"), "b": backend.zeros((2,), "float32")})
    optimizer.step({"a": backend.zeros((300, 300), "float32"), "b": backend.zeros((2,), "float32")})
    assert launched == [(300, 300), (2,)]
    assert gpu_update(get_backend("numpy")) is None
