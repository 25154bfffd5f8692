"""Arrays of two libraries in one call are refused, everywhere, by name and with the way to convert."""

import numpy as np
import pytest

from minilora import (
    Adam,
    Linear,
    LoRA,
    LoRALinear,
    best_adapter,
    best_adapter_from_gram,
    evaluate,
    mse,
    train,
)
from minilora.fast import residual_form

N, IN, OUT, RANK = 6, 4, 3, 2


def mixtures():
    """Return (call, argument): each call hands `odd` arrays to a layer or function that otherwise holds `own` ones."""

    def linear(own):
        return Linear(own(OUT, IN), own(OUT))

    def lora(own):
        return LoRA(own(RANK, IN), own(OUT, RANK), 1.0)

    def backward(layer, own, odd):
        return layer.backward(odd(N, OUT), layer.forward(own(N, IN))[1])

    def fit(own, X, Y):
        return train(linear(own), X, Y, epochs=1, batch_size=2, rng=np.random.default_rng(0))

    def state(own, odd):
        optimizer = Adam({"a": own(OUT)})
        return optimizer.load_state_dict({"t": 1, "m": {"a": own(OUT)}, "v": {"a": odd(OUT)}})

    return {
        "Linear": (lambda own, odd: Linear(own(OUT, IN), odd(OUT)), "bias"),
        "LoRA": (lambda own, odd: LoRA(own(RANK, IN), odd(OUT, RANK), 1.0), "lora_B"),
        "LoRALinear": (lambda own, odd: LoRALinear(linear(own), lora(odd)), "adapter"),
        "Linear.forward": (lambda own, odd: linear(own).forward(odd(N, IN)), "x"),
        "Linear.__call__": (lambda own, odd: linear(own)(odd(N, IN)), "x"),
        "Linear.backward": (lambda own, odd: backward(linear(own), own, odd), "dy"),
        "Linear.input_gradient": (lambda own, odd: linear(own).input_gradient(odd(N, OUT)), "dy"),
        "LoRA.forward": (lambda own, odd: lora(own).forward(odd(N, IN)), "x"),
        "LoRA.backward": (lambda own, odd: backward(lora(own), own, odd), "dy"),
        "residual_form of LoRA x": (lambda own, odd: residual_form(lora(own), odd(N, IN), own(N, OUT)), "x"),
        "residual_form of LoRA": (lambda own, odd: residual_form(lora(own), own(N, IN), odd(N, OUT)), "y"),
        "LoRALinear.forward": (lambda own, odd: LoRALinear(linear(own), lora(own)).forward(odd(N, IN)), "x"),
        "LoRALinear.backward": (lambda own, odd: backward(LoRALinear(linear(own), lora(own)), own, odd), "dy"),
        "residual_form of LoRALinear": (
            lambda own, odd: residual_form(LoRALinear(linear(own), lora(own)), own(N, IN), odd(N, OUT)),
            "y",
        ),
        "mse": (lambda own, odd: mse(own(N, OUT), odd(N, OUT)), "target"),
        "Adam": (lambda own, odd: Adam({"a": own(OUT), "b": odd(OUT)}), r"params\['b'\]"),
        "Adam.step": (lambda own, odd: Adam({"a": own(OUT)}).step({"a": odd(OUT)}), r"grads\['a'\]"),
        "Adam.load_state_dict": (state, r"state\['v'\]\['a'\]"),
        "train X": (lambda own, odd: fit(own, odd(N, IN), own(N, OUT)), "X"),
        "train Y": (lambda own, odd: fit(own, own(N, IN), odd(N, OUT)), "Y"),
        "evaluate X": (lambda own, odd: evaluate(linear(own), odd(N, IN), own(N, OUT)), "X"),
        "evaluate Y": (lambda own, odd: evaluate(linear(own), own(N, IN), odd(N, OUT)), "Y"),
        "best_adapter": (lambda own, odd: best_adapter(own(N, IN), odd(N, OUT), rank=1), "residual"),
        "best_adapter_from_gram": (lambda own, odd: best_adapter_from_gram(own(IN, IN), odd(IN, OUT), rank=1), "XtR"),
    }


HOLDERS = {
    "Linear": "weight",
    "LoRA": "lora_A",
    "LoRALinear": "base",
    "mse": "prediction",
    "Adam": r"params\['a'\]",
    "Adam.step": "params",
    "Adam.load_state_dict": "params",
    "best_adapter": "X",
    "best_adapter_from_gram": "XtX",
}


@pytest.mark.parametrize(("call", "host_is_odd"), [("Linear", False), *((call, True) for call in mixtures())])
def test_two_libraries_in_one_call_are_refused_with_advice(standin, call, host_is_odd):
    rng = np.random.default_rng(0)

    def host(*shape):
        return rng.standard_normal(shape)

    def there(*shape):
        return standin.asarray(host(*shape))

    own, odd = (there, host) if host_is_odd else (host, there)
    act, argument = mixtures()[call]
    way = rf"get_backend\('cupy'\).{'asarray' if host_is_odd else 'to_numpy'}\("
    holder = HOLDERS.get(call, "the layer")
    with pytest.raises(TypeError, match=rf"^{argument} is a \w+ array and {holder} holds \w+ arrays: .*{way}"):
        act(own, odd)


def test_subclasses_of_numpys_array_are_numpy(tmp_path):
    mapped = np.memmap(tmp_path / "x", dtype="float64", mode="w+", shape=(N, IN))
    layer = Linear(np.ones((OUT, IN)))
    assert layer(mapped).shape == (N, OUT)
    with pytest.raises(TypeError, match=r"x has dtype float32"):
        layer(np.float32(1) * np.ones((N, IN), "float32"))
