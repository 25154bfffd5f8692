"""Variants from outside the package: used as they are, or refused by name where something of them would be lost.

`VeRA` (arXiv 2310.11454) shares A and B, which do not train: y = b (d x A^T) B^T, and d (r,) and b (out,) train.
`Gain` is LoRA with a factor for each output, y = gain s x A^T B^T. `Forgets` has the array, and computes as LoRA does.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from minilora import (
    Adapter,
    Conv1d,
    DoRA,
    DoRAAdapter,
    Layer,
    Linear,
    LoRA,
    LoRALinear,
    ReLU,
    Sequential,
    adapt,
    adapters,
    attach,
    best_of_rank,
    gradcheck,
    merge,
    save_adapter,
    train,
    weighted_sum,
)
from minilora.adaptation import put_beside
from minilora.fast import residual_form
from minilora.layer import rows, walk
from minilora.variants.adapter import AdaptedRows
from minilora.verify.instances import layer_claim

from ..support.compare import assert_close, refused
from ..support.disk import contents

RNG = np.random.default_rng
A, B, GAIN = RNG(0).standard_normal((2, 4)), RNG(1).standard_normal((3, 2)), RNG(2).standard_normal(3)
X, BASE = RNG(3).standard_normal((7, 4)), Linear(RNG(4).standard_normal((3, 4)), RNG(5).standard_normal(3))
Y = RNG(6).standard_normal((7, 3))


# --- a layer of one's own ---


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
        return y, (h, z)

    def backward(self, dy, cache, *, need_dx=True):
        h, z = cache
        du = (dy * self.b) @ self.B
        dx = (du * self.d) @ self.A if need_dx else None
        return dx, {"d": (du * h).sum(axis=0), "b": (dy * z).sum(axis=0)}

    def trainable(self):
        return {} if self.frozen else {"d": self.d, "b": self.b}

    def delta(self):
        return (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)


@dataclass(eq=False, repr=False)
class VeRALinear(Layer):
    base: Linear
    adapter: VeRA

    def forward(self, x):
        y, cache = self.adapter.forward(x)
        y = self.base(x) + y
        return y, (cache,)

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = self.adapter.backward(dy, *cache, need_dx=need_dx)
        return (self.base.input_gradient(dy) + dx if need_dx else None), {f"adapter.{k}": g for k, g in grads.items()}

    def trainable(self):
        return {f"adapter.{name}": array for name, array in self.adapter.trainable().items()}

    def merge(self):
        return Linear(self.base.weight + self.adapter.delta(), self.base.bias.copy())


def model_of():
    fc1, fc2 = (Linear(RNG(n).standard_normal((n, m)), RNG(m).standard_normal(n)) for n, m in ((6, 4), (5, 6)))
    return Sequential(fc1=fc1, act=ReLU(), fc2=fc2)


def with_vera(targets="all-linear"):
    A, B = RNG(7).standard_normal((3, 6)), RNG(8).standard_normal((6, 3))

    def beside(path, linear):
        out, width = linear.shape
        return VeRALinear(linear, VeRA(A[:, :width], B[:out], RNG(9).standard_normal(3), RNG(10).standard_normal(out)))

    return put_beside(model_of(), targets, beside)


def test_it_trains_merges_and_is_listed():
    vera, x, y = with_vera(), RNG(1).standard_normal((64, 4)), RNG(2).standard_normal((64, 5))
    f, params, grads, cotangent = layer_claim(vera, x[:7], y[:7])
    assert gradcheck(f, params, grads, cotangent=cotangent).passed
    history = train(vera, x, y, epochs=20, batch_size=16, lr=0.03, rng=RNG(3))
    assert history.losses[-1] < history.losses[0]
    assert adapters(vera) == {"fc1": vera.fc1.adapter, "fc2": vera.fc2.adapter}
    merged = merge(vera)
    assert [type(layer) for _, layer in walk(merged)] == [Sequential, Linear, ReLU, Linear]
    assert_close(merged(x), vera(x), 1e-12)


def test_lora_stands_beside_another_layer():
    vera = with_vera(["fc1"])
    both = adapt(vera, ["fc2"], rank=2, alpha=4, rng=RNG(6))
    assert {path: type(adapter) for path, adapter in adapters(both).items()} == {"fc1": VeRA, "fc2": Adapter}
    assert list(both.trainable()) == [*vera.trainable(), "fc2.lora_A", "fc2.lora_B"]  # as in PEFT, both train
    with pytest.raises(ValueError, match="names no layer without an adapter"):
        adapt(vera, ["fc1"], rank=2, alpha=4, rng=RNG(6))
    with pytest.raises(ValueError, match="not layers without an adapter"):
        attach(vera, {"fc1.base": adapters(both)["fc2"]})


class Folds(Layer):
    """It merges, and has no adapter to show."""

    def merge(self):
        return BASE


@pytest.mark.parametrize("made", [Folds(), BASE, None], ids=["Folds", "Linear", "None"])
def test_only_adapted_layers_are_put_beside(made):
    said = r"beside\('fc1', ...\) must return a Layer with adapter and merge, got .+$"
    with pytest.raises(TypeError, match=said):
        put_beside(model_of(), ["fc1"], lambda path, layer: made)


@dataclass(eq=False, repr=False)
class GainLinear(Layer):
    """The array is the layer's, and not its adapter's."""

    base: Linear
    adapter: LoRA
    gain: np.ndarray

    def forward(self, x):
        y, cache = self.adapter.forward(x)
        return self.base(x) + self.gain * y, (cache, y)

    def merge(self):
        return Linear(self.base.weight + self.gain[:, None] * self.adapter.delta(), self.base.bias.copy())


@pytest.mark.parametrize("cls", [LoRA, Adapter])
def test_an_array_of_the_layer_is_not_lost(cls):
    model = put_beside(Sequential(fc=BASE), ["fc"], lambda path, base: GainLinear(base, cls(A, B, 3), GAIN))
    assert_close(merge(model)(X), model(X), 1e-12)
    said = "has a gain besides base and adapter: its adapter alone is not its change of weight"
    with refused(f"the layer 'fc', a GainLinear, {said}", TypeError):
        adapters(model)


# --- an adapter of one's own ---


@dataclass(eq=False, repr=False, kw_only=True)
class Forgets(Adapter):
    gain: np.ndarray


@dataclass(eq=False, repr=False, kw_only=True)
class ForgetsToo(LoRA):
    gain: np.ndarray


@dataclass(eq=False, repr=False, kw_only=True)
class Gain(Forgets):
    def forward(self, x):
        y, cache = super().forward(x)
        return self.gain * y, (*cache, y)

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy * self.gain, cache[:-1], need_dx=need_dx)
        return dx, grads | {"gain": (rows(dy) * rows(cache[-1])).sum(axis=0)}

    def delta(self):
        return self.gain[:, None] * super().delta()


@dataclass(eq=False, repr=False, kw_only=True)
class MergesWithout(Gain):
    delta = Adapter.delta


@dataclass(eq=False, repr=False, kw_only=True)
class ComputesWithout(Gain):
    forward, backward = Adapter.forward, Adapter.backward


@dataclass(eq=False, repr=False, kw_only=True)
class GainOnDoRA(DoRAAdapter):
    gain: np.ndarray


class Louder(Adapter):
    def forward(self, x):
        y, cache = super().forward(x)
        return 2 * y, cache


class Doubled(LoRA):
    def delta(self):
        return 2 * super().delta()


class HalfTrained(LoRA):
    """LoRA-FA: lora_A does not train. It computes as LoRA does."""

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"lora_B": grads["lora_B"]}

    def trainable(self):
        return {"lora_B": self.lora_B}


def own(cls=Gain, **more):
    array = {"gain": GAIN.copy()} if "gain" in cls.__dataclass_fields__ else {}
    return cls(A.copy(), B.copy(), 3, **array, **more)


def doras():
    return DoRAAdapter(A, B, 3, magnitude=np.ones(3))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        *((lambda cls=cls, put=put: put(BASE, own(cls)), "a gain, which a LoRALinear ignores")
          for cls in (Forgets, ForgetsToo, MergesWithout, ComputesWithout)
          for put in (LoRALinear, lambda base, adapter: attach(base, {"": adapter}))),
        (lambda: LoRALinear(BASE, doras()), "a magnitude, which a LoRALinear ignores"),
        (lambda: DoRA(BASE, GainOnDoRA(A, B, 3, magnitude=np.ones(3), gain=GAIN)), "a gain, which a DoRA ignores"),
        (lambda: AdaptedRows(Conv1d(np.ones((3, 2, 2))), own(Forgets, kind="conv1d", kernel=(2,))),
         "a gain, which a LoRALinear ignores"),
    ],
)  # fmt: skip
def test_no_layer_leaves_an_array_out(place, message):
    with pytest.raises(ValueError, match=rf"^(adapters\[''\]: )?adapter has {message}$"):
        place()


def test_an_adapter_that_computes_with_its_array_keeps_it():
    model, gain = attach(BASE, {"": own()}), GAIN.copy()
    assert_close(model(X), BASE(X) + gain * (1.5 * X @ A.T @ B.T), 1e-12)
    assert list(model.trainable()) == ["lora_A", "lora_B", "gain"]
    train(model, X, Y, epochs=3, batch_size=7, lr=0.1, rng=RNG(7))
    assert (model.adapter.gain != gain).all()
    assert_close(merge(model)(X), model(X), 1e-12)
    assert adapters(model)[""] is model.adapter
    half = LoRALinear(BASE, own(HalfTrained))
    assert adapters(half)[""] is half.adapter


@pytest.mark.parametrize(
    ("adapter", "what"),
    [
        (own(), r"tests\.Gain"),
        (doras(), "DoRAAdapter"),
        (own(Doubled), r"tests\.Doubled"),
        (own(Adapter, start=LoRA(A, B, 3)), "Adapter, which has a start"),
    ],
)
def test_only_changes_that_are_s_b_a_add_up(adapter, what):
    with pytest.raises(
        ValueError, match=rf"^adapters\[1\] is of the class {what}: its change of the original base is not s B A$"
    ):
        weighted_sum([own(Adapter), adapter], [1, 2])
    with pytest.raises(ValueError, match=rf"^adapters\[0\] is of the class {what}"):
        best_of_rank(adapter, 1)


OTHERS = [*((cls.__name__, lambda cls=cls: own(cls)) for cls in (ForgetsToo, Gain, Louder, Doubled, HalfTrained))]
OTHERS += [("VeRALinear", lambda: with_vera(["fc2"]).fc2), ("VeRA", lambda: with_vera(["fc2"]).fc2.adapter)]


@pytest.mark.parametrize(("name", "make"), OTHERS)
def test_no_file_of_another_class(tmp_path, name, make):
    save_adapter(tmp_path / "a", {"fc": LoRA(A, B, 5)})
    before = contents(tmp_path)
    for folder in ("a", "new"):
        with pytest.raises(TypeError, match=rf"layers\['fc'\].*{name}"):
            save_adapter(tmp_path / folder, {"gate": LoRA(A, B, 1), "fc": make()})
    assert contents(tmp_path) == before


def test_another_delta_is_not_moved_to_the_original_base():
    with pytest.raises(ValueError, match="adapter is a Gain, whose own delta does not move to the original base"):
        attach(BASE, {"": own(start=LoRA(A.copy(), B.copy(), 3))})


def test_the_residual_form_is_of_loras_own_gradients():
    for model in (own(Forgets), own(), LoRALinear(BASE, own())):
        with pytest.raises(TypeError, match="residual_form takes a LoRA, or a LoRALinear over a Linear, got"):
            residual_form(model, X, Y)
