"""Bad input gets one error that names the argument, its value and what was expected.

What a file holds reaches a terminal in one line, without control characters, and never at length.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import minilora
from minilora import MLP, Adam, Linear, LoRA, LoRALinear, ReLU, train
from minilora.checks import check_array, check_flag, check_integer, check_number, check_path, restoring_rng
from minilora.cli.check import all_instances
from minilora.layer import Layer, first_array
from minilora.variants.sums import weighted_sum

from .support.loops import drawn
from .support.problems import SQUARE

RNG = np.random.default_rng(0)
Plain = type("Plain", (np.ndarray,), {"__module__": "numpy"})  # a subclass of NumPy's array
A, B, W, b = np.ones((2, 5)), np.ones((4, 2)), np.ones((4, 5)), np.ones(4)
single = np.float32


@pytest.mark.parametrize("error", [ValueError, TypeError, MemoryError])
def test_a_refused_start_leaves_the_generator_where_it_stood(error):
    rng = np.random.default_rng(0)

    def refused():
        with restoring_rng(rng):
            rng.standard_normal(3)
            raise error

    with pytest.raises(error):
        refused()
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    with restoring_rng(rng):
        rng.standard_normal(3)
    assert rng.bit_generator.state != np.random.default_rng(0).bit_generator.state


# --- the guards around forward and backward -------------------------------------------------------


def remedy(error, **given):
    """Return what the code gives that a message advises."""
    return eval(str(error.value).partition(": convert it with ")[2], {"minilora": minilora, **given})


def lora(dtype):
    return LoRA.init(5, 4, rank=2, alpha=1, rng=np.random.default_rng(0), dtype=dtype)


REMEDIES = {
    "a first call with NumPy's ones": ({"x": np.ones((3, 5))}, lambda x: Linear(W.astype("f4"))(x)),
    "part of a layer": ({"bias": b.astype("f4")}, lambda bias: Linear(W, bias)),
    "an entry": ({"grads": {"p": b.astype("f4")}}, lambda grads: Adam({"p": b.copy()}).step(grads)),
    "a layer in a layer": ({"adapter": lora("float64")}, lambda adapter: LoRALinear(Linear(W.astype("f4")), adapter)),
    "a layer in a list": (
        {"adapters": [lora("float32"), lora("float64")]},
        lambda adapters: weighted_sum(adapters, [1, 2]),
    ),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_a_message_about_a_dtype_ends_with_code_that_helps(case):
    given, use = REMEDIES[case]
    with pytest.raises(
        TypeError, match=r" has dtype float\d\d, expected float\d\d as in .*: convert it with "
    ) as error:
        use(**given)
    ((name, value),) = given.items()
    right = remedy(error, **given)
    use(**{name: {"p": right} if isinstance(value, dict) else [value[0], right] if isinstance(value, list) else right})


def test_complex_numbers_are_not_cast_away():
    with pytest.raises(TypeError, match=r"^x has dtype complex64, expected float64 as in the layer$"):
        Linear(W)(np.ones((3, 5), "c8"))


@pytest.mark.parametrize("row", all_instances())
def test_every_layer_has_the_guards(row):
    layer, x = drawn(row, SQUARE)
    y, cache = layer.forward(x)
    other = np.float32 if y.dtype == np.float64 else np.float64
    wrong = {
        "dy has shape": (y[:1] if len(y) > 1 else np.concatenate([y, y]), cache),
        f"dy has dtype {np.dtype(other)}" if first_array(layer) is not None else "dy must be": (
            y.astype(other) if first_array(layer) is not None else y.tolist(),
            cache,
        ),
        "cache does not come from this layer's forward: ": (y, cache._replace(layer=object())),
        "dy and cache are exchanged: call backward": (cache, y),
    }
    for message, arguments in wrong.items():
        with pytest.raises((ValueError, TypeError)) as error:
            layer.backward(*arguments)
        assert str(error.value).startswith(message)
    if x.dtype.kind == "f" and first_array(layer) is not None:
        with pytest.raises(TypeError, match=r"^x has dtype float16, expected float\d\d as in the layer: ") as error:
            layer.forward(x.astype(np.float16))
        layer.forward(remedy(error, x=x.astype(np.float16)))


class Between(Layer):
    """A model that hands its inner layer, and its backward, something else than it got."""

    def __init__(self, change):
        self.inner, self.change = Linear(W), change

    def forward(self, x):
        y, cache = self.inner.forward(self.change.get("x", lambda x: x)(x))
        return y, (cache,)

    def backward(self, dy, cache, *, need_dx=True):
        return self.inner.backward(self.change.get("dy", lambda dy: dy)(dy), cache[0])


CHANGES = [
    (lambda a: a.astype(np.float32), TypeError, "has dtype float32, expected float64 as in the layer"),
    (lambda a: a.astype(np.longdouble), TypeError, "has dtype "),
    (lambda a: a + 1j, TypeError, "holds complex numbers"),
    (lambda a: a[..., :-1], ValueError, "has "),
    (lambda a: a.tolist(), TypeError, "must be an array, got list"),
    (lambda a: np.ma.masked_array(a), TypeError, "is a MaskedArray"),
]


@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize(("change", "error", "said"), CHANGES)
def test_the_layers_of_a_model_are_guarded_too(name, change, error, said):
    model, x = Between({name: change}), np.ones((3, 5))
    with pytest.raises(error, match=rf"^{name} {said}"):
        model.backward(np.ones((3, 4)), model.forward(x)[1])


ARRAYS = [
    *(np.ones((2, 2), dtype) for dtype in ("float16", "float32", "float64", "longdouble", "int64", "complex128", "O")),
    np.ones((2, 2), ">f8"), np.ones((2, 2)).view(np.matrix), np.ma.ones((2, 2)), np.ones((2, 2)).view(Plain),
    np.float64(1), [1.0], None, 1.0, np.ones((0, 2)), np.ones((2, 2)) + 0.5j,
]  # fmt: skip


@pytest.mark.parametrize(
    "layer", [ReLU(), *(Linear(W[:2, :2].astype(dtype)) for dtype in ("f2", "f4", "f8"))], ids=repr
)
def test_a_guard_refuses_what_the_check_refuses(layer):
    """The usual case passes without the check, which would pass it too."""
    _, cache = layer.forward(np.ones((2, 2), "f8" if isinstance(layer, ReLU) else layer.weight.dtype))
    for name, ask in {"x": layer.forward, "dy": lambda dy: layer.backward(dy, cache)}.items():
        for value in ARRAYS:
            expected = said = ""
            try:
                check_array(name, value, like=first_array(layer))
            except TypeError as error:
                expected = str(error)
            try:
                ask(value)
            except (TypeError, ValueError) as error:
                said = "" if "shape" in str(error) else str(error)
            assert said == expected


def calls_of(work):
    """Return how often each function of the package is called."""
    home, counts = str(Path(minilora.__file__).parent), Counter()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(home):
            counts[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return counts


@pytest.mark.parametrize("kind", ["LoRALinear", "MLP"])
@pytest.mark.parametrize("options", [{"epochs": 5, "log_every": 1}, {"max_steps": 30}, {"epochs": 2, "held_out": True}])
def test_a_training_checks_at_the_door(kind, options):
    """Fewer than one call in five is one of a check, and of a longer training the share is no larger."""
    rng = np.random.default_rng(0)
    model = MLP.init(5, 6, 4, rng=rng)
    if kind == "LoRALinear":
        model = LoRALinear.from_linear(model.fc1, rank=2, alpha=4, rng=rng)
    X = rng.standard_normal((64, 5)).astype(single)
    Y = rng.standard_normal((64, model.out_features if kind == "LoRALinear" else 4)).astype(single)
    options = {**options, "batch_size": 16} | ({"held_out": (X, Y)} if "held_out" in options else {})
    counts = calls_of(lambda: train(model, X, Y, rng=rng, **options))
    checks = sum(count for name, count in counts.items() if name.lstrip("_").startswith("check"))
    assert counts["check_input"] < 20  # where something may be wrong: at the door, and none at a step
    assert counts["check_cache"] == 0
    assert 0 < checks < sum(counts.values()) / 5


@pytest.mark.parametrize("cache", [None, (), 3.0, (1, 2)])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(ValueError, match=r"^cache does not come from this layer's forward: Linear\(weight=\(4, 5\)"):
        Linear(W).backward(np.ones((3, 4)), cache)


@pytest.mark.parametrize("kind", ["Linear", "LoRALinear", "RMSNorm", "SiLU", "Conv1d", "Attention", "GatedMLP"])
def test_an_input_with_imaginary_parts_is_refused_before_computing(kind):
    layer, x = drawn(kind, SQUARE)
    before = x.copy()
    with pytest.raises(TypeError, match=r"x holds complex numbers, .*: take x\.real, or its real and imaginary parts"):
        layer.forward(x + 0.5j)
    np.testing.assert_array_equal(x, before)
    one = x.astype(complex)
    one.flat[-1] += 2e-6j  # which the mean of all entries would hide
    with pytest.raises(TypeError, match="x holds complex numbers"):
        layer.forward(one)
    assert layer(x + 1e-20j).dtype == np.complex128  # the complex step
    with pytest.raises(TypeError, match="x holds complex numbers"):
        Linear(W + 1e-20j)(np.full(5, 0.5j))


def test_a_subclass_of_numpys_array_is_of_its_library():
    mine, yours = (type("Own", (np.ndarray,), {"__module__": name}) for name in ("mine", "yours"))
    np.testing.assert_array_equal(Linear(W.view(mine))(np.ones(5).view(yours)), Linear(W)(np.ones(5)))


def test_half_precision_is_a_precision_of_its_own():
    layer = Linear(W.astype(np.float16))
    assert layer(np.ones((3, 5), np.float16)).dtype == np.float16
    with pytest.raises(TypeError, match="expected float16"):
        layer(np.ones((3, 5), np.float32))


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 1j, b"1", bytearray(b"1"), "1", None, [1.0], memoryview(b"1")])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"^lr must be a number, got"):
        check_number("lr", value, above=0)
    with pytest.raises(TypeError, match=r"^n must be an integer, got"):
        check_integer("n", value, at_least=0)


def test_numpys_flags_complex_numbers_and_arrays_are_no_numbers():
    for value in (np.True_, np.complex64(1), np.array(True), np.ones(1), np.ones((1, 1)), np.str_("1")):
        with pytest.raises(TypeError, match=r"^lr must be a number, got"):
            check_number("lr", value, above=0)
    for value in (np.float32(0.5), np.float16(0.5), np.array(0.5)):
        number = check_number("lr", value, above=0)
        assert (type(number), number) == (float, 0.5)
    assert type(check_number("lr", np.uint8(3), above=0)) is float


def test_only_flags_are_flags():
    assert check_flag("f", np.True_) is True
    assert check_flag("f", False) is False
    for value in (0, 1, "false", None, np.array(True)):
        with pytest.raises(TypeError, match=r"^f must be True or False, got"):
            check_flag("f", value)


def test_a_path_is_returned_as_one(tmp_path):
    assert check_path("p", str(tmp_path)) == tmp_path == check_path("p", tmp_path)
