"""Arrays of libraries that we do not compute with are one TypeError, which names their kind and the way to NumPy.

The libraries are not needed for this: what is told apart is the module that a class says it comes from.
"""

import re

import numpy as np
import pytest

from minilora import (
    Adam,
    Conv2d,
    Embedding,
    Linear,
    Llama,
    LoRA,
    ReLU,
    best_adapter,
    cross_entropy,
    gradcheck,
    loraplus,
    mse,
    train,
    weighted_sum,
)
from minilora.checks import check_array
from minilora.language.config import LlamaConfig

RNG = np.random.default_rng(0)
N, IN, OUT = 6, 4, 3


def from_library(module, name, dtype=None):
    """Return a class that says it comes from another library; with a dtype of its own, which has no `kind`."""

    def __init__(self, host):
        self.host, self.shape = host, host.shape
        self.dtype = host.dtype if dtype is None else type("dtype", (), {"__repr__": lambda _: dtype})()

    return type(name, (), {"__init__": __init__, "__len__": lambda self: len(self.host), "__module__": module})


TENSOR = from_library("torch", "Tensor", "torch.float64")
LIBRARIES = {
    "torch.Tensor": TENSOR,
    "mine.Mine": type("Mine", (TENSOR,), {"__module__": "mine"}),
    "jaxlib.ArrayImpl": from_library("jaxlib._jax", "ArrayImpl"),
    "pandas.Series": from_library("pandas.core.series", "Series"),
    "tensorflow.EagerTensor": from_library("tensorflow.python.framework.ops", "EagerTensor", "<dtype: 'float64'>"),
    "new.array": from_library("new", "array", "new.float64"),
}


def host(*shape):
    return RNG.standard_normal(shape)


def built(odd):
    config = LlamaConfig(7, 4, 5, 1, 1, 1, 4, 1e-5, (1.0, 0.1))
    arrays = {name: host(*shape) for name, shape in config.shapes().items()}
    return Llama.build(config, arrays | {"model.norm.weight": odd(4)})


def fit(X, Y):
    return train(Linear(host(OUT, IN)), X, Y, epochs=1, batch_size=2, rng=RNG)


CALLS = {
    "Linear": (lambda odd: Linear(odd(OUT, IN)), "weight"),
    "Linear.forward": (lambda odd: Linear(host(OUT, IN))(odd(N, IN)), "x"),
    "Embedding.forward": (lambda odd: Embedding(host(7, 2))(odd(3)), "x"),
    "Conv2d.forward": (lambda odd: Conv2d(host(2, 1, 2, 2))(odd(1, 1, 3, 3)), "x"),
    "ReLU": (lambda odd: ReLU()(odd(N, IN)), "x"),
    "Llama.build": (built, "weight"),
    "mse": (lambda odd: mse(odd(N, OUT), host(N, OUT)), "prediction"),
    "cross_entropy's targets": (lambda odd: cross_entropy(host(N, OUT), odd(N)), "targets"),
    "Adam": (lambda odd: Adam({"a": odd(OUT)}), "params['a']"),
    "train's X": (lambda odd: fit(odd(N, IN), host(N, OUT)), "X"),
    "best_adapter": (lambda odd: best_adapter(odd(N, IN), host(N, OUT), rank=1), "X"),
    "gradcheck": (lambda odd: gradcheck(lambda p: p["a"].sum(), {"a": odd(OUT)}, {"a": host(OUT)}), "params['a']"),
}


def refusal_of(call, odd):
    """Return what a call says of an array that it cannot take."""
    with pytest.raises(TypeError) as error:
        CALLS[call][0](odd)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "call"), [*((kind, "mse") for kind in LIBRARIES), *(("torch.Tensor", call) for call in CALLS)]
)
def test_arrays_of_other_libraries_are_named_and_converted(kind, call):
    """All libraries go through one call, and one library through all calls: `checks` tells them apart for everyone."""
    name = CALLS[call][1]
    expected = f"{name} is a {kind}; convert it with numpy.asarray({name})"
    assert refusal_of(call, lambda *shape: LIBRARIES[kind](host(*shape))) == expected


@pytest.mark.parametrize("call", ["Linear", "Embedding.forward", "cross_entropy's targets", "Adam", "train's X"])
def test_lists_are_named_and_converted(call):
    said, name = refusal_of(call, lambda *shape: host(*shape).tolist()), CALLS[call][1]
    assert re.match(rf"{re.escape(name)} must be an array( of integers)?, got list; .* numpy.asarray\(", said)


def test_a_tensor_as_a_number_is_refused():
    tensor = TENSOR(np.array(2.0))
    for make in (lambda: loraplus(tensor), lambda: LoRA(host(1, 2), host(2, 1), tensor)):
        with pytest.raises(TypeError, match="must be a number, got"):
            make()
    with pytest.raises(TypeError, match=r"^weights\[0\] must be a number"):
        weighted_sum([LoRA(host(1, 2), host(2, 1), 1)], [tensor])


def test_a_library_that_behaves_like_numpy_goes_on():
    class Array:
        """As dask's and dpnp's: NumPy's types of numbers."""

        dtype, shape, __module__ = np.dtype("float64"), (2, 3), "likenumpy.core"

    check_array("x", Array())
    message = r"^x is a likenumpy array .* numpy arrays: convert it with numpy.asarray\(x\)$"
    with pytest.raises(TypeError, match=message):
        check_array("x", Array(), like=np.ones(2))


def test_a_class_is_no_array():
    with pytest.raises(TypeError, match=r"^weight must be an array, got the class LoRA, and no object of it$"):
        Linear(LoRA)
