"""`minilora check` sees what a change to the library would break: each of these is planted, and must be found."""

import functools
import inspect
from importlib import import_module
from pkgutil import walk_packages

import numpy as np
import pytest

import minilora
from minilora import MLP, Layer, LoRA
from minilora.cli.check import all_instances
from minilora.fast import residual
from minilora.layer import walk
from minilora.verify import instances
from minilora.verify.instances import Drawing

from ..support.cupy_standin import traffic

WITHOUT_A_ROW = {
    "Adapted": "what it computes is for its subclasses to say",
    "Convolution": "the number of axes is for Conv1d and Conv2d to say",
    "Sequential": "MLP is one, of three layers",
    "FrozenQuantizedLinear": "the format is for QuantizedLinear to say",
    "BlockLinear": "its blocks come from a file: tests/language/files/test_gguf.py",
    "CheckpointedBlock": "its gradients have the bits of a Block's: tests/language/test_llama.py",
}


def layers_of_the_package():
    """Return every subclass of Layer that a module of the package defines, by name."""
    for module in walk_packages(minilora.__path__, "minilora."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    found, left = {}, [Layer]
    while left:
        left += (subclasses := left.pop().__subclasses__())
        found |= {cls.__name__: cls for cls in subclasses if cls.__module__.startswith("minilora.")}
    return found


@functools.cache
def classes_in_rows():
    """Return the layers' classes in each row."""
    rng = np.random.default_rng(0)
    drawing = Drawing(4, 3, 2, 2, 1.0, lambda *shape: rng.standard_normal(shape), rng)
    return {name: {type(layer) for _, layer in walk(row(drawing)[0])} for name, row in all_instances().items()}


def test_every_layer_of_the_package_has_a_row():
    found = {cls.__name__ for classes in classes_in_rows().values() for cls in classes}
    without = layers_of_the_package().keys() - found
    assert without == WITHOUT_A_ROW.keys(), "a row is missing in minilora/verify/instances.py"


def test_every_backward_returns_dx_by_default():
    backwards = [cls.backward for cls in layers_of_the_package().values() if "backward" in vars(cls)]
    assert len(backwards) >= 13
    assert all(inspect.signature(backward).parameters["need_dx"].default is True for backward in backwards)


def is_found(rows):
    """Return whether some report of the self-check fails: those after it are not made."""
    return not all(report.passed for _, report in instances.prove(instances=rows))


@pytest.mark.parametrize("sizes", [1, pytest.param(len(instances.INSTANCE_SIZES), marks=pytest.mark.long)])
def test_every_layer_passes_at_every_size(monkeypatch, sizes):
    monkeypatch.setattr(instances, "INSTANCE_SIZES", instances.INSTANCE_SIZES[:sizes])
    verdicts = {title: report.passed for title, report in instances.prove(instances=all_instances())}
    assert all(verdicts.values())
    names = {title.partition("  ")[0] for title in verdicts}
    forms = {f"residual_form of {name}" for name in ("LoRA", "LoRALinear", "LoRALinear, no bias")}
    assert names == {*all_instances(), "mse", "cross_entropy", *forms}
    assert len(verdicts) == len(names) * len(instances.INSTANCE_SIZES)


def test_ranks_and_scalings_differ_from_size_to_size():
    ranks, alphas = {size[3] for size in instances.INSTANCE_SIZES}, {size[4] for size in instances.INSTANCE_SIZES}
    scalings = {size[4] / size[3] for size in instances.INSTANCE_SIZES}
    assert len(ranks) == len(alphas) == len(scalings) == len(instances.INSTANCE_SIZES)


def spoiled(method, spoil, changed):
    """A backward whose result goes through `spoil(dx, grads)`; `changed` gets a mark for each that this changed."""

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = method(self, dy, cache, need_dx=need_dx)
        other_dx, other_grads = spoil(dx, grads)
        changed.extend(name for name, grad in grads.items() if other_grads[name] is not grad)
        changed.extend(["dx"] * (other_dx is not dx))
        return other_dx, other_grads

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


WITH_BACKWARD = sorted(
    name
    for name, cls in layers_of_the_package().items()
    if "backward" in vars(cls) and name != "CheckpointedBlock"  # it has no row
)
PLANTED = {
    "a weight's gradient doubled": ("Linear", twice),
    "a bias's gradient doubled": ("Linear", last_bias_twice),
    "the factors' gradients doubled": ("LoRA", twice),
    "a magnitude's gradient doubled": ("DoRA", twice),
    "attention's dx doubled": ("Attention", dx_twice),
    "gradients of a layer that has none doubled": ("Tanh", twice),
}


def rows_with(cls):
    """Return the rows in which a layer's backward is this class's: the others cannot see a change of it."""
    return {
        name: all_instances()[name]
        for name, classes in classes_in_rows().items()
        if any(issubclass(c, cls) for c in classes)
    }


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_change_is_found(monkeypatch, small_check, planted):
    """Where there is nothing to change, nothing is found."""
    name, spoil = PLANTED[planted]
    cls, changed = layers_of_the_package()[name], []
    monkeypatch.setattr(cls, "backward", spoiled(cls.backward, spoil, changed))
    assert is_found(rows_with(cls)) == bool(changed)


@pytest.mark.long
def test_a_change_of_every_backward_is_found(monkeypatch, small_check):
    for name in WITH_BACKWARD:
        cls, changed = layers_of_the_package()[name], []
        with monkeypatch.context() as patch:
            patch.setattr(cls, "backward", spoiled(cls.backward, lambda *found: dx_twice(*twice(*found)), changed))
            assert is_found(rows_with(cls)), name


@pytest.mark.parametrize("scaling", sorted({size[4] / size[3] for size in instances.INSTANCE_SIZES}))
def test_a_constant_in_place_of_alpha_over_r_is_found(monkeypatch, scaling):
    """One size has just this scaling and cannot see it; the others must."""
    monkeypatch.setattr(LoRA, "forward", with_scaling(LoRA.forward, scaling))
    assert is_found({"LoRA": all_instances()["LoRA"]})


def test_a_wrong_residual_form_is_found(monkeypatch):
    right = residual.residual_form
    monkeypatch.setattr(instances, "residual_form", lambda *a: {k: 1.001 * g for k, g in right(*a).items()})
    monkeypatch.setattr(instances, "INSTANCE_SIZES", instances.INSTANCE_SIZES[1:3])
    failed = [title for title, report in instances.prove(instances={}) if not report.passed]
    assert len(failed) == 3 * 2


@pytest.mark.long
def test_it_computes_where_it_is_told(standin, small_check):
    traffic.reset()
    reports = list(instances.prove(standin, instances=all_instances()))
    assert all(report.passed for _, report in reports)
    assert traffic.to_device > len(reports)
    assert traffic.waits > 10 * len(reports)
    traffic.reset()
    list(instances.prove(instances=all_instances()))
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)


def test_any_layer_can_be_checked_this_way():
    rng = np.random.default_rng(0)
    model = MLP.init(3, 4, 2, activation="tanh", rng=rng, dtype="float64")
    f, params, grads, cotangent = instances.layer_claim(model, rng.standard_normal((5, 3)), rng.standard_normal((5, 2)))
    assert params.keys() == grads.keys() == {"x", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert f(params).shape == cotangent.shape
