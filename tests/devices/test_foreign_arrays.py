"""Arrays of libraries that we do not compute with are one TypeError, which names their kind and the way to NumPy.

The libraries are not needed for this: what is told apart is the module that a class says it comes from.
"""

import re

import numpy as np
import pytest

from minilora import (
    MLP,
    Adam,
    Attention,
    Conv2d,
    DoRA,
    DoRAAdapter,
    Embedding,
    Linear,
    Llama,
    LoRA,
    LoRALinear,
    ReLU,
    Rotary,
    best_adapter,
    best_adapter_from_gram,
    cross_entropy,
    evaluate,
    gradcheck,
    loraplus,
    mse,
    taylor_orders,
    train,
    weighted_sum,
)
from minilora.checks import check_array
from minilora.fast import residual_form
from minilora.language.config import LlamaConfig

from .test_two_libraries import mixtures

RNG = np.random.default_rng(0)
N, IN, OUT, RANK = 6, 4, 3, 2


def from_library(module, name, dtype=None):
    """Return a class that says it comes from another library; with a dtype of its own, which has no `kind`."""

    def __init__(self, host):
        self.host, self.shape = host, host.shape
        self.dtype = host.dtype if dtype is None else type("dtype", (), {"__repr__": lambda _: dtype})()

    methods = {
        "__init__": __init__,
        "__len__": lambda self: len(self.host),
        "__array__": lambda self, *_, **__: self.host,
        "__getitem__": lambda self, index: type(self)(self.host[index]),
    }
    return type(name, (), {**methods, "__module__": module})


LIBRARIES = {
    "torch": (from_library("torch", "Tensor", "torch.float64"), "torch.Tensor"),
    "torch of integers": (from_library("torch", "Tensor", "torch.int64"), "torch.Tensor"),
    "a class of one's own": (
        type("Mine", (from_library("torch", "Tensor", "torch.float64"),), {"__module__": "mine"}),
        "mine.Mine",
    ),
    "jax": (from_library("jaxlib._jax", "ArrayImpl"), "jaxlib.ArrayImpl"),
    "pandas": (from_library("pandas.core.series", "Series"), "pandas.Series"),
    "tensorflow": (
        from_library("tensorflow.python.framework.ops", "EagerTensor", "<dtype: 'float64'>"),
        "tensorflow.EagerTensor",
    ),
    "a library nobody knows": (from_library("new", "array", "new.float64"), "new.array"),
}


def host(*shape):
    return RNG.standard_normal(shape)


def attention():
    q, k, v, o = (Linear(host(IN, IN)) for _ in range(4))
    return Attention(q, k, v, o, Rotary((1.0, 0.1)))


def backward(layer, x, dy):
    return layer.backward(dy, layer.forward(x)[1])


def built(odd):
    config = LlamaConfig(7, 4, 5, 1, 1, 1, 4, 1e-5, (1.0, 0.1))
    arrays = {name: host(*shape) for name, shape in config.shapes().items()}
    return Llama.build(config, arrays | {"model.norm.weight": odd(4)})


def fit(X, Y, **more):
    return train(Linear(host(OUT, IN)), X, Y, epochs=1, batch_size=2, rng=RNG, **more)


def square(params):
    return (params["a"] * params["a"]).sum()


CALLS = {
    "Linear": (lambda odd: Linear(odd(OUT, IN)), "weight"),
    "Linear.forward": (lambda odd: Linear(host(OUT, IN))(odd(N, IN)), "x"),
    "Linear.backward": (lambda odd: backward(Linear(host(OUT, IN)), host(N, IN), odd(N, OUT)), "dy"),
    "DoRAAdapter": (lambda odd: DoRAAdapter(host(1, IN), host(OUT, 1), 1, magnitude=odd(OUT)), "magnitude"),
    "Embedding.forward": (lambda odd: Embedding(host(7, 2))(odd(3)), "x"),
    "Conv2d's bias": (lambda odd: Conv2d(host(2, 1, 2, 2), odd(2)), "bias"),
    "Conv2d.forward": (lambda odd: Conv2d(host(2, 1, 2, 2))(odd(1, 1, 3, 3)), "x"),
    "Attention.extend": (lambda odd: attention().extend(odd(1, N, IN), None), "x"),
    "MLP.forward": (lambda odd: MLP.init(IN, 5, OUT, rng=RNG, dtype="float64")(odd(N, IN)), "x"),
    "ReLU": (lambda odd: ReLU()(odd(N, IN)), "x"),
    "Llama.build": (built, r"arrays\['model.norm.weight'\]"),
    "mse": (lambda odd: mse(odd(N, OUT), host(N, OUT)), "prediction"),
    "cross_entropy": (lambda odd: cross_entropy(odd(N, OUT), np.zeros(N, int)), "logits"),
    "cross_entropy's targets": (lambda odd: cross_entropy(host(N, OUT), odd(N)), "targets"),
    "Adam": (lambda odd: Adam({"a": odd(OUT)}), r"params\['a'\]"),
    "train's X": (lambda odd: fit(odd(N, IN), host(N, OUT)), "X"),
    "train's Y": (lambda odd: fit(host(N, IN), odd(N, OUT)), "Y"),
    "train's held_out": (
        lambda odd: fit(host(N, IN), host(N, OUT), held_out=(odd(N, IN), host(N, OUT))),
        "held_out: X",
    ),
    "evaluate": (lambda odd: evaluate(Linear(host(OUT, IN)), odd(N, IN), host(N, OUT)), "X"),
    "best_adapter": (lambda odd: best_adapter(odd(N, IN), host(N, OUT), rank=1), "X"),
    "best_adapter_from_gram": (lambda odd: best_adapter_from_gram(odd(IN, IN), host(IN, OUT), rank=1), "XtX"),
    "gradcheck": (lambda odd: gradcheck(square, {"a": odd(OUT)}, {"a": host(OUT)}), r"params\['a'\]"),
    "gradcheck's cotangent": (
        lambda odd: gradcheck(square, {"a": host(OUT)}, {"a": host(OUT)}, cotangent=odd(OUT)),
        "cotangent",
    ),
    "taylor_orders": (lambda odd: taylor_orders(square, {"a": host(OUT)}, {"a": odd(OUT)}), r"grads\['a'\]"),
    "residual_form": (
        lambda odd: residual_form(LoRA(host(1, IN), host(OUT, 1), 1), odd(N, IN), host(N, OUT)),
        "x",
    ),
    **{
        f"beside NumPy: {call}": (lambda odd, act=act: act(host, odd), name)
        for call, (act, name) in mixtures().items()
        if call != "LoRALinear"
    },
}


def refusal_of(call, odd):
    """Return what a call says of an array that it cannot take."""
    act, _ = CALLS[call]
    with pytest.raises(TypeError) as error:
        act(odd)
    return str(error.value)


@pytest.mark.parametrize(
    ("library", "call"),
    [*((library, "mse") for library in LIBRARIES), *(("torch", call) for call in CALLS if call != "mse")],
)
def test_arrays_of_other_libraries_are_named_and_converted(library, call):
    """All libraries go through one call, and one library through all calls: `checks` tells them apart for everyone."""
    cls, kind = LIBRARIES[library]
    name = CALLS[call][1].replace("\\", "")
    expected = f"{name} is a {kind}; convert it with numpy.asarray({name.removeprefix('held_out: ')})"
    assert refusal_of(call, lambda *shape: cls(host(*shape))) == expected


@pytest.mark.parametrize("call", ["Linear", "Embedding.forward", "cross_entropy's targets", "Adam", "train's X"])
def test_lists_are_named_and_converted(call):
    said = refusal_of(call, lambda *shape: host(*shape).tolist())
    assert re.match(rf"{CALLS[call][1]} must be an array( of integers)?, got list; .* numpy.asarray\(", said)


def test_a_tensor_as_a_number_is_refused():
    tensor = LIBRARIES["torch"][0](np.array(2.0))
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
    with pytest.raises(
        TypeError, match=r"^x is a likenumpy array .* numpy arrays: convert it with numpy.asarray\(x\)$"
    ):
        check_array("x", Array(), like=np.ones(2))


@pytest.mark.parametrize("cls", [DoRA, LoRALinear])
def test_a_class_is_no_array(cls):
    with pytest.raises(
        TypeError, match=f"^weight must be an array, got the class {cls.__name__}, and no object of it$"
    ):
        Linear(cls)
