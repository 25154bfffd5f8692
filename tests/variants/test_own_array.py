"""An array that an adapter of one's own has besides its two factors: it counts, or it is refused by its name.

`Gain` is LoRA with a factor for each output, y = gain s x A^T B^T. Written in full it computes with the gain; the
class `Forgets` has the same array, and computes as LoRA does.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from minilora import (
    Adapter,
    Conv1d,
    DoRA,
    Layer,
    Linear,
    LoRA,
    LoRALinear,
    Sequential,
    adapt,
    adapters,
    attach,
    best_of_rank,
    load_adapter,
    merge,
    save_adapter,
    train,
    weighted_sum,
)
from minilora.adaptation import put_beside
from minilora.fast import residual_form
from minilora.layer import rows
from minilora.variants.dora import DoRAAdapter
from minilora.variants.rewritten import Rewritten

from ..support.compare import assert_close

RNG = np.random.default_rng
A, B, GAIN = RNG(0).standard_normal((2, 4)), RNG(1).standard_normal((3, 2)), RNG(2).standard_normal(3)
X, BASE = RNG(3).standard_normal((7, 4)), Linear(RNG(4).standard_normal((3, 4)), RNG(5).standard_normal(3))


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
class GainOnDoRA(DoRAAdapter):
    gain: np.ndarray


def forgetting(cls=Forgets):
    return cls(A.copy(), B.copy(), 3, gain=GAIN.copy())


def own():
    return forgetting(Gain)


FORGETFUL = (Forgets, ForgetsToo, MergesWithout)


# --- beside a base ---


@pytest.mark.parametrize("cls", FORGETFUL)
def test_a_lora_linear_refuses_an_array_it_leaves_out(cls):
    with pytest.raises(ValueError, match=r"adapter has a gain, which a LoRALinear leaves out: .* put_beside"):
        LoRALinear(BASE, forgetting(cls))
    with pytest.raises(ValueError, match=r"adapters\[''\]: adapter has a gain, which a LoRALinear leaves out"):
        attach(BASE, {"": forgetting(cls)})


def test_a_convolution_refuses_an_array_it_leaves_out():
    conv = Conv1d(np.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="adapter has a gain, which a LoRALinear leaves out"):
        Rewritten(conv, Forgets(A, B, 3, kind="conv1d", kernel=(2,), gain=GAIN))


def test_dora_refuses_an_array_beside_its_magnitude():
    with pytest.raises(ValueError, match="adapter has a gain, which a DoRA leaves out"):
        DoRA(BASE, GainOnDoRA(A, B, 3, magnitude=np.ones(3), gain=GAIN))


def test_an_adapter_that_computes_with_its_array_keeps_it():
    model, gain = attach(BASE, {"": own()}), GAIN.copy()
    assert_close(model(X), BASE(X) + gain * (1.5 * X @ A.T @ B.T), 1e-12)
    assert list(model.trainable()) == ["lora_A", "lora_B", "gain"]
    Y = RNG(6).standard_normal((7, 3))
    train(model, X, Y, epochs=3, batch_size=7, lr=0.1, rng=RNG(7))
    assert (model.adapter.gain != gain).all()
    assert_close(merge(model)(X), model(X), 1e-12)
    assert adapters(model)[""].gain is model.adapter.gain


# --- sums ---


@pytest.mark.parametrize("cls", [*FORGETFUL, Gain])
def test_no_sum_of_adapters_with_an_array(cls):
    plain = Adapter(A, B, 3)
    for terms in ([forgetting(cls), plain], [plain, forgetting(cls)]):
        i = terms.index(plain) ^ 1
        with pytest.raises(ValueError, match=rf"adapters\[{i}\] has a gain: its change of the .* is not s B A"):
            weighted_sum(terms, [1, 2])
    with pytest.raises(ValueError, match=r"adapters\[0\] has a gain"):
        best_of_rank(forgetting(cls), 1)


class Doubled(LoRA):
    """Another change of weight, and no array."""

    def delta(self):
        return 2 * super().delta()


def test_no_sum_of_adapters_with_another_change():
    with pytest.raises(ValueError, match=r"adapters\[1\] is a Doubled, which has a delta of its own"):
        weighted_sum([LoRA(A, B, 3), Doubled(A, B, 3)], [1, 2])


# --- files ---


@pytest.fixture
def folder(tmp_path):
    """Return a folder with an adapter, and check that it is still there afterwards."""
    path = tmp_path / "adapter"
    save_adapter(path, {"fc": LoRA(A, B, 5)})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    yield path
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("cls", [*FORGETFUL, Gain])
def test_no_file_of_an_adapter_with_an_array(folder, cls):
    for layers in ({"fc": forgetting(cls)}, {"fc": LoRA(A, B, 1), "gate": forgetting(cls)}):
        with pytest.raises(TypeError, match=rf"layers\['\w+'\] must be .*, got {cls.__name__}, .*: it has a gain"):
            save_adapter(folder, layers)


class Louder(Adapter):
    def forward(self, x):
        y, cache = super().forward(x)
        return 2 * y, cache


class Scaled(LoRA):
    scaling = property(lambda self: 7.0)


@pytest.mark.parametrize(("cls", "what"), [(Louder, "forward"), (Doubled, "delta"), (Scaled, "scaling")])
def test_no_file_of_a_subclass_that_computes_otherwise(folder, cls, what):
    with pytest.raises(TypeError, match=rf"got {cls.__name__}, .*: it has a {what} of its own"):
        save_adapter(folder, {"fc": cls(A, B, 3)})
    if what != "delta":
        model = put_beside(Sequential(fc=BASE), ["fc"], lambda path, linear: LoRALinear(linear, cls(A, B, 3)))
        with pytest.raises(TypeError, match=rf"got {cls.__name__}, .*: it has a {what} of its own"):
            save_adapter(folder, adapters(model))


class HalfTrained(LoRA):
    """LoRA-FA: lora_A does not train. It computes as LoRA does."""

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"lora_B": grads["lora_B"]}

    def trainable(self):
        return {"lora_B": self.lora_B}


class Beside(LoRALinear):
    """A subclass that computes the same."""


def test_a_subclass_that_computes_as_lora_is_saved(tmp_path):
    model = Sequential(fc=Beside(BASE, HalfTrained(A, B, 3)))
    for layers in ({"fc": HalfTrained(A, B, 3)}, {"fc": model.fc}, adapters(model)):
        save_adapter(tmp_path, layers)
        assert_close(attach(Sequential(fc=BASE), load_adapter(tmp_path))(X), model(X), 1e-12)


# --- an array of the layer, and not of its adapter ---


@dataclass(eq=False, repr=False)
class GainLinear(Layer):
    base: Linear
    adapter: LoRA
    gain: np.ndarray

    def forward(self, x):
        y, cache = self.adapter.forward(x)
        return self.base(x) + self.gain * y, (self, y.shape, cache, y)

    def merge(self):
        return Linear(self.base.weight + self.gain[:, None] * self.adapter.delta(), self.base.bias.copy())


@pytest.mark.parametrize("cls", [LoRA, Adapter])
def test_an_array_of_the_layer_is_not_lost_either(folder, cls):
    model = put_beside(Sequential(fc=BASE), ["fc"], lambda path, base: GainLinear(base, cls(A, B, 3), GAIN))
    assert_close(merge(model)(X), model(X), 1e-12)
    (adapter,) = adapters(model).values()
    assert adapter.lora_A is A
    assert_close(adapter.delta(), 1.5 * B @ A, 1e-12)
    with pytest.raises(TypeError, match=r"layers\['fc'\] must be .*: it has a gain"):
        save_adapter(folder, adapters(model))
    with pytest.raises(TypeError, match=r"layers\['fc'\] must be .*, got GainLinear, for which PEFT's"):
        save_adapter(folder, {"fc": model.fc})
    with pytest.raises(ValueError, match=r"adapters\[0\] has a gain"):
        weighted_sum([adapter], [1])
    with pytest.raises(ValueError, match="adapter has a gain, which a LoRALinear leaves out"):
        attach(Sequential(fc=BASE), adapters(model))


def test_a_change_of_its_own_is_not_moved_to_the_original_base():
    started = Gain(A, B, 3, gain=GAIN, start=LoRA(A.copy(), B.copy(), 3))
    with pytest.raises(
        ValueError, match="adapter is a Gain with a delta of its own: over the original base it is none"
    ):
        attach(BASE, {"": started})


def test_the_residual_form_has_no_gradient_of_an_array():
    for model in (forgetting(), own(), LoRALinear(BASE, own())):
        with pytest.raises(TypeError, match="residual_form takes a LoRA, or a LoRALinear over a Linear, got"):
            residual_form(model, X, RNG(6).standard_normal((7, 3)))


# --- a plain adapter has none ---


def test_doras_magnitude_is_doras_alone():
    plain, dora = (adapt(BASE, "", rank=2, alpha=3, rng=RNG(0), use_dora=dora).adapter for dora in (False, True))
    assert (type(plain), plain.further()) == (Adapter, {})
    assert (type(dora), list(dora.further())) == (DoRAAdapter, ["magnitude"])
    with pytest.raises(TypeError, match="magnitude"):
        Adapter(A, B, 3, magnitude=np.ones(3))


def test_a_start_by_pissa_is_no_further_array():
    model = adapt(BASE, "", rank=2, alpha=3, rng=RNG(0), init="pissa")
    assert model.adapter.start is not None
    assert model.adapter.further() == {}
    LoRALinear(model.base, model.adapter)
