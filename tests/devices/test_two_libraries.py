"""Arrays of libraries that we do not compute with, and of two in one call, are one TypeError with the way to convert.

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
    LoRALinear,
    ReLU,
    best_adapter,
    best_adapter_from_gram,
    cross_entropy,
    evaluate,
    gradcheck,
    loraplus,
    mse,
    train,
    weighted_sum,
)
from minilora.checks import check_array
from minilora.fast import residual_form
from minilora.language.config import LlamaConfig

from ..support.compare import refused

RNG = np.random.default_rng(0)
N, IN, OUT, RANK = 6, 4, 3, 2


def host(*shape):
    return RNG.standard_normal(shape)


def linear(own):
    return Linear(own(OUT, IN), own(OUT))


def lora(own):
    return LoRA(own(RANK, IN), own(OUT, RANK), 1.0)


def beside(own):
    return LoRALinear(linear(own), lora(own))


def back(layer, own, odd):
    return layer.backward(odd(N, OUT), layer.forward(own(N, IN))[1])


def fit(own, X, Y):
    return train(linear(own), X, Y, epochs=1, batch_size=2, rng=RNG)


def loaded(own, odd):
    return Adam({"a": own(OUT)}).load_state_dict({"t": 1, "m": {"a": own(OUT)}, "v": {"a": odd(OUT)}})


# --- two libraries in one call ---

LAYER = "the layer"
MIXTURES = {  # each hands `odd` arrays to what otherwise holds `own` ones: the call, the argument, and who holds those
    "Linear": (lambda own, odd: Linear(own(OUT, IN), odd(OUT)), "bias", "weight"),
    "LoRA": (lambda own, odd: LoRA(own(RANK, IN), odd(OUT, RANK), 1.0), "lora_B", "lora_A"),
    "LoRALinear": (lambda own, odd: LoRALinear(linear(own), lora(odd)), "adapter", "base"),
    "Linear.forward": (lambda own, odd: linear(own).forward(odd(N, IN)), "x", LAYER),
    "Linear.__call__": (lambda own, odd: linear(own)(odd(N, IN)), "x", LAYER),
    "Linear.backward": (lambda own, odd: back(linear(own), own, odd), "dy", LAYER),
    "LoRA.forward": (lambda own, odd: lora(own).forward(odd(N, IN)), "x", LAYER),
    "LoRA.backward": (lambda own, odd: back(lora(own), own, odd), "dy", LAYER),
    "residual_form of LoRA x": (lambda own, odd: residual_form(lora(own), odd(N, IN), own(N, OUT)), "x", LAYER),
    "residual_form of LoRA": (lambda own, odd: residual_form(lora(own), own(N, IN), odd(N, OUT)), "y", LAYER),
    "LoRALinear.forward": (lambda own, odd: beside(own).forward(odd(N, IN)), "x", LAYER),
    "LoRALinear.backward": (lambda own, odd: back(beside(own), own, odd), "dy", LAYER),
    "residual_form of LoRALinear": (lambda own, odd: residual_form(beside(own), own(N, IN), odd(N, OUT)), "y", LAYER),
    "Embedding.forward": (lambda own, odd: Embedding(own(7, 2))(odd(3).astype(int)), "x", LAYER),
    "cross_entropy's targets": (
        lambda own, odd: cross_entropy(own(N, OUT), odd(N).astype(int)), "targets", "logits"),
    "mse": (lambda own, odd: mse(own(N, OUT), odd(N, OUT)), "target", "prediction"),
    "Adam": (lambda own, odd: Adam({"a": own(OUT), "b": odd(OUT)}), "params['b']", "params['a']"),
    "Adam.step": (lambda own, odd: Adam({"a": own(OUT)}).step({"a": odd(OUT)}), "grads['a']", "params"),
    "Adam.load_state_dict": (loaded, "state['v']['a']", "params"),
    "train X": (lambda own, odd: fit(own, odd(N, IN), own(N, OUT)), "X", LAYER),
    "train Y": (lambda own, odd: fit(own, own(N, IN), odd(N, OUT)), "Y", LAYER),
    "evaluate X": (lambda own, odd: evaluate(linear(own), odd(N, IN), own(N, OUT)), "X", LAYER),
    "evaluate Y": (lambda own, odd: evaluate(linear(own), own(N, IN), odd(N, OUT)), "Y", LAYER),
    "best_adapter": (lambda own, odd: best_adapter(own(N, IN), odd(N, OUT), rank=1), "residual", "X"),
    "best_adapter_from_gram": (
        lambda own, odd: best_adapter_from_gram(own(IN, IN), odd(IN, OUT), rank=1), "XtR", "XtX"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "host_is_odd"), [("Linear", False), *((call, True) for call in MIXTURES)])
def test_two_libraries_in_one_call_are_refused_with_advice(standin, call, host_is_odd):
    def there(*shape):
        return standin.asarray(host(*shape))

    own, odd = (there, host) if host_is_odd else (host, there)
    act, argument, holder = MIXTURES[call]
    way = rf"get_backend\('cupy'\).{'asarray' if host_is_odd else 'to_numpy'}\("
    message = rf"^{re.escape(argument)} is a \w+ array and {re.escape(holder)} holds \w+ arrays: .*{way}"
    with pytest.raises(TypeError, match=message):
        act(own, odd)


def test_subclasses_of_numpys_array_are_numpy(tmp_path):
    mapped = np.memmap(tmp_path / "x", dtype="float64", mode="w+", shape=(N, IN))
    layer = Linear(np.ones((OUT, IN)))
    assert layer(mapped).shape == (N, OUT)
    with pytest.raises(TypeError, match=r"x has dtype float32"):
        layer(np.float32(1) * np.ones((N, IN), "float32"))


# --- a library that we do not compute with ---


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


def built(odd):
    config = LlamaConfig(7, 4, 5, 1, 1, 1, 4, 1e-5, (1.0, 0.1))
    arrays = {name: host(*shape) for name, shape in config.shapes().items()}
    return Llama.build(config, arrays | {"model.norm.weight": odd(4)})


CALLS = {
    **{
        name: (lambda odd, act=act: act(host, odd), argument)
        for name, (act, argument, _) in MIXTURES.items()
        if name != "LoRALinear"  # whose argument is a layer
    },
    "Embedding.forward": (lambda odd: Embedding(host(7, 2))(odd(3)), "x"),
    "Conv2d.forward": (lambda odd: Conv2d(host(2, 1, 2, 2))(odd(1, 1, 3, 3)), "x"),
    "ReLU": (lambda odd: ReLU()(odd(N, IN)), "x"),
    "Llama.build": (built, "weight"),
    "cross_entropy's targets": (lambda odd: cross_entropy(host(N, OUT), odd(N)), "targets"),
    "gradcheck": (lambda odd: gradcheck(lambda p: p["a"].sum(), {"a": odd(OUT)}, {"a": host(OUT)}), "params['a']"),
}


@pytest.mark.parametrize(
    ("kind", "call"), [*((kind, "mse") for kind in LIBRARIES), *(("torch.Tensor", call) for call in CALLS)]
)
def test_arrays_of_other_libraries_are_named_and_converted(kind, call):
    """All libraries go through one call, and one library through all calls: `checks` tells them apart for everyone."""
    act, name = CALLS[call]
    with refused(f"{name} is a {kind}; convert it with numpy.asarray({name})", TypeError):
        act(lambda *shape: LIBRARIES[kind](host(*shape)))


@pytest.mark.parametrize("call", ["Linear", "Embedding.forward", "cross_entropy's targets", "Adam", "train X"])
def test_lists_are_named_and_converted(call):
    act, name = CALLS[call]
    message = rf"^{re.escape(name)} must be an array( of integers)?, got list; .* numpy.asarray\("
    with pytest.raises(TypeError, match=message):
        act(lambda *shape: host(*shape).tolist())


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
