"""A variant from outside the package, VeRA (arXiv 2310.11454): placed, trained, merged, listed, and refused as a file.

    h = x A^T,   u = d h,   z = u B^T,   y = b z        A (r, in) and B (out, r) are shared and do not train

Only d (r,) and b (out,) train, so the change of weight is diag(b) B diag(d) A.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from minilora import (
    Adapter,
    Layer,
    Linear,
    LoRALinear,
    ReLU,
    Sequential,
    adapt,
    adapters,
    attach,
    gradcheck,
    load_adapter,
    merge,
    save_adapter,
    train,
)
from minilora.adaptation import put_beside
from minilora.layer import walk
from minilora.verify.instances import layer_claim

from ..support.compare import assert_close

RNG = np.random.default_rng
RANK = 3


@dataclass(eq=False, repr=False)
class VeRA(Layer):
    A: np.ndarray
    B: np.ndarray
    d: np.ndarray
    b: np.ndarray

    def forward(self, x):
        h = x @ self.A.T
        z = (h * self.d) @ self.B.T
        y = z * self.b
        return y, (self, y.shape, h, z)

    def backward(self, dy, cache, *, need_dx=True):
        h, z = cache[2:]
        du = (dy * self.b) @ self.B
        dx = (du * self.d) @ self.A if need_dx else None
        if self.frozen:
            return dx, {}
        return dx, {"d": (du * h).sum(axis=0), "b": (dy * z).sum(axis=0)}

    def trainable(self):
        return {} if self.frozen else {"d": self.d, "b": self.b}

    def delta(self):
        return (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)


@dataclass(eq=False, repr=False)
class Beside(Layer):
    base: Linear
    adapter: VeRA

    def forward(self, x):
        y, cache = self.adapter.forward(x)
        y = self.base(x) + y
        return y, (self, y.shape, cache)

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = self.adapter.backward(dy, cache[2], need_dx=need_dx)
        return (self.base.input_gradient(dy) + dx if need_dx else None), {f"adapter.{k}": g for k, g in grads.items()}

    def trainable(self):
        return {f"adapter.{name}": array for name, array in self.adapter.trainable().items()}

    def merge(self):
        return Linear(self.base.weight + self.adapter.delta(), self.base.bias.copy())


def model_of(rng):
    fc1, fc2 = (Linear(rng.standard_normal((n, m)), rng.standard_normal(n)) for n, m in ((6, 4), (5, 6)))
    return Sequential(fc1=fc1, act=ReLU(), fc2=fc2)


def adapted(rng, targets="all-linear"):
    A, B = rng.standard_normal((RANK, 6)), rng.standard_normal((6, RANK))

    def beside(path, linear):
        out, width = linear.shape
        vectors = {"d": rng.standard_normal(RANK), "b": rng.standard_normal(out)}
        return Beside(linear, VeRA(A[:, :width], B[:out], **vectors))

    model = model_of(rng)
    return model, put_beside(model, targets, beside)


def test_only_the_vectors_of_the_named_layers_train():
    model, vera = adapted(RNG(0), ["fc2"])
    assert list(vera.trainable()) == ["fc2.adapter.d", "fc2.adapter.b"]
    assert type(vera.fc2) is Beside
    assert type(model.fc2) is Linear
    assert np.shares_memory(vera.fc1.weight, model.fc1.weight)


def test_its_gradients_are_the_slopes():
    _, vera = adapted(RNG(0))
    f, params, grads, cotangent = layer_claim(vera, RNG(1).standard_normal((7, 4)), RNG(2).standard_normal((7, 5)))
    assert gradcheck(f, params, grads, cotangent=cotangent, method="central", tolerance=1e-7).passed


def test_it_trains_and_merges_by_its_own_merge():
    rng = RNG(3)
    _, vera = adapted(rng)
    X, Y = rng.standard_normal((64, 4)), rng.standard_normal((64, 5))
    history = train(vera, X, Y, epochs=20, batch_size=16, lr=0.03, rng=rng)
    assert history.losses[-1] < history.losses[0]
    merged = merge(vera)
    assert [type(layer) for _, layer in walk(merged)] == [Sequential, Linear, ReLU, Linear]
    assert_close(merged(X), vera(X), 1e-12)
    assert list(merged.trainable()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def test_adapters_returns_its_own_adapter():
    _, vera = adapted(RNG(4))
    found = adapters(vera)
    assert list(found) == ["fc1", "fc2"]
    assert found["fc1"] is vera.fc1.adapter
    assert found["fc2"] is vera.fc2.adapter


def test_lora_stands_beside_it_on_another_layer():
    _, vera = adapted(RNG(5), ["fc1"])
    both = adapt(vera, ["fc2"], rank=2, alpha=4, rng=RNG(6))
    assert {path: type(adapter) for path, adapter in adapters(both).items()} == {"fc1": VeRA, "fc2": Adapter}
    assert list(both.trainable()) == ["fc2.lora_A", "fc2.lora_B"]
    x = RNG(7).standard_normal((3, 4))
    assert_close(merge(both)(x), both(x), 1e-12)
    with pytest.raises(ValueError, match="names no layer without an adapter"):
        adapt(vera, ["fc1"], rank=2, alpha=4, rng=RNG(6))
    with pytest.raises(ValueError, match="no layers without an adapter"):
        attach(vera, {"fc1.base": adapters(both)["fc2"]})


@pytest.mark.parametrize("as_layers", [False, True])
def test_saving_it_is_refused_by_path_and_class(tmp_path, as_layers):
    _, vera = adapted(RNG(8), ["fc2"])
    both = adapt(vera, ["fc1"], rank=2, alpha=4, rng=RNG(9))
    before = adapters(adapt(model_of(RNG(0)), ["fc1"], rank=1, alpha=1, rng=RNG(9)))
    save_adapter(tmp_path, before)
    given = {"fc1": both.fc1, "fc2": both.fc2} if as_layers else adapters(both)
    name = "Beside" if as_layers else "VeRA"
    with pytest.raises(TypeError, match=rf"layers\['fc2'\] must be a LoRA or a LoRALinear, got {name}"):
        save_adapter(tmp_path, given)
    assert load_adapter(tmp_path)["fc1"].rank == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Louder(Adapter):
    """It computes something else than its factors say."""

    def forward(self, x):
        y, cache = super().forward(x)
        return 2 * y, cache


def test_a_subclass_of_lora_is_not_saved_as_lora(tmp_path):
    one = Louder(np.ones((1, 4)), np.ones((6, 1)), 1)
    model = put_beside(model_of(RNG(0)), ["fc1"], lambda path, linear: LoRALinear(linear, one))
    assert adapters(model) == {"fc1": one}
    for given in (adapters(model), {"fc1": model.fc1}):
        with pytest.raises(TypeError, match=r"layers\['fc1'\] .* got Louder"):
            save_adapter(tmp_path / "new", given)
    assert not (tmp_path / "new").exists()


class Folds(Layer):
    """It merges, and has no adapter to show."""

    def __init__(self, base):
        self.base = base

    def merge(self):
        return self.base


@pytest.mark.parametrize("make", [Folds, lambda layer: layer, lambda layer: None], ids=["Folds", "Linear", "None"])
def test_what_is_no_adapted_layer_is_not_placed(make):
    with pytest.raises(TypeError, match=r"beside\('fc1', ...\) returned a .*, expected a Layer with an adapter and"):
        put_beside(model_of(RNG(0)), ["fc1"], lambda path, layer: make(layer))


def test_a_layer_that_merges_and_has_no_adapter_is_named():
    model = Sequential(fc=Folds(Linear(np.ones((2, 3)))))
    with pytest.raises(TypeError, match=r"the layer 'fc', a Folds, can merge and has no attribute adapter"):
        adapters(model)
