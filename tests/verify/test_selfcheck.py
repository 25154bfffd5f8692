"""`minilora check` sees what a change to the library would break: each of these is planted, and must be found."""

import numpy as np
import pytest

from minilora import (
    MLP,
    Attention,
    GatedMLP,
    Linear,
    Llama,
    LoRA,
    LoRALinear,
    ReLU,
    RMSNorm,
    Rotary,
    Sequential,
    SiLU,
    Tanh,
)
from minilora.fast import residual
from minilora.layers.activation import ACTIVATIONS
from minilora.verify import selfcheck

from ..support.cupy_standin import traffic


def verdicts():
    return {title: report.passed for title, report in selfcheck.prove()}


def is_found():
    return not all(report.passed for _, report in selfcheck.prove())


def test_every_layer_passes_at_every_size():
    found = verdicts()
    assert all(found.values())
    names = {title.partition("  ")[0] for title in found}
    assert {"Linear", "LoRA", "LoRALinear", "mse", "cross_entropy"} <= names
    assert {cls.__name__ for cls in ACTIVATIONS.values()} <= names
    assert {"MLP", "MLP, LoRA on fc1", "MLP, LoRA on fc2"} <= names
    assert {"RMSNorm", "Rotary", "Attention", "GatedMLP", "Llama, LoRA"} <= names
    for of in ("LoRA", "LoRALinear"):
        assert f"residual_form of {of}" in names


def test_ranks_and_scalings_differ_from_size_to_size():
    ranks, alphas = {size[3] for size in selfcheck.SIZES}, {size[4] for size in selfcheck.SIZES}
    scalings = {size[4] / size[3] for size in selfcheck.SIZES}
    assert len(ranks) == len(alphas) == len(scalings) == len(selfcheck.SIZES)


def spoiled(method, spoil):
    """A backward whose result goes through `spoil(dx, grads)`."""

    def backward(self, dy, cache, *, need_dx=True):
        return spoil(*method(self, dy, cache, need_dx=need_dx))

    return backward


def with_scaling(method, constant):
    """A forward with a constant in place of alpha / r."""

    def forward(self, x):
        y, cache = method(self, x)
        return y / self.scaling * constant, cache

    return forward


def twice(dx, grads):
    return dx, {name: 2 * g for name, g in grads.items()}


def dx_twice(dx, grads):
    return None if dx is None else 2 * dx, grads


def last_bias_twice(dx, grads):
    return dx, {name: 2 * g if name == "bias" else g for name, g in grads.items()}


PLANTED = {
    "Linear's gradients doubled": (Linear, "backward", twice),
    "Linear's dx doubled": (Linear, "backward", dx_twice),
    "a bias's gradient doubled": (Linear, "backward", last_bias_twice),
    "LoRA's gradients doubled": (LoRA, "backward", twice),
    "LoRA's dx doubled": (LoRA, "backward", dx_twice),
    "LoRALinear's dx doubled": (LoRALinear, "backward", dx_twice),
    "ReLU's dx doubled": (ReLU, "backward", dx_twice),
    "Tanh's dx doubled": (Tanh, "backward", dx_twice),
    "SiLU's dx doubled": (SiLU, "backward", dx_twice),
    "Sequential's gradients doubled": (Sequential, "backward", twice),
    "RMSNorm's dx doubled": (RMSNorm, "backward", dx_twice),
    "Rotary's dx doubled": (Rotary, "backward", dx_twice),
    "Attention's gradients doubled": (Attention, "backward", twice),
    "GatedMLP's dx doubled": (GatedMLP, "backward", dx_twice),
    "Llama's gradients doubled": (Llama, "backward", twice),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_found(monkeypatch, planted):
    cls, name, spoil = PLANTED[planted]
    monkeypatch.setattr(cls, name, spoiled(getattr(cls, name), spoil))
    assert is_found()


@pytest.mark.parametrize("scaling", [1.5, 0.5, 4.0])
def test_a_constant_in_place_of_alpha_over_r_is_found(monkeypatch, scaling):
    """One size has just this scaling and cannot see it; the others must."""
    monkeypatch.setattr(LoRA, "forward", with_scaling(LoRA.forward, scaling))
    assert is_found()


def test_a_wrong_residual_form_is_found(monkeypatch):
    right = residual.residual_form
    monkeypatch.setattr(selfcheck, "residual_form", lambda *a: {k: 1.001 * g for k, g in right(*a).items()})
    monkeypatch.setattr(selfcheck, "SIZES", selfcheck.SIZES[1:3])
    assert sum(not passed for passed in verdicts().values()) == 3 * 2


def test_it_computes_where_it_is_told(standin, small_check):
    traffic.reset()
    reports = list(selfcheck.prove(standin))
    assert all(report.passed for _, report in reports)
    assert traffic.to_device > len(reports)
    assert traffic.waits > 10 * len(reports)
    traffic.reset()
    list(selfcheck.prove())
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)


def test_any_layer_can_be_checked_this_way():
    rng = np.random.default_rng(0)
    model = MLP.init(3, 4, 2, activation="tanh", rng=rng, dtype="float64")
    f, params, grads, cotangent = selfcheck.layer_claim(model, rng.standard_normal((5, 3)), rng.standard_normal((5, 2)))
    assert params.keys() == grads.keys() == {"x", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert f(params).shape == cotangent.shape
