"""Bad input gets one error that names the argument, its value and what was expected.

What a file holds reaches a terminal in one line, without control characters, and never at length.
"""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import FileRefused, Linear, LoRA, LoRALinear, checks
from minilora.checks import (
    check_array,
    check_flag,
    check_integer,
    check_number,
    check_path,
    hub_hint,
    named,
    needed,
    printable,
    short,
    unmoved,
)
from minilora.cli.check import all_instances
from minilora.fast import residual_form
from minilora.layer import first_array

from .support.loops import drawn
from .support.problems import SQUARE

RNG = np.random.default_rng(0)
A, B, W, b = np.ones((2, 5)), np.ones((4, 2)), np.ones((4, 5)), np.ones(4)
single = np.float32

IMPOSSIBLE = [
    (lambda: Linear(np.ones(5)), "weight has shape (5,), expected (out, in) with no empty axis"),
    (lambda: Linear(np.ones((0, 5))), "weight has shape (0, 5), expected (out, in) with no empty axis"),
    (lambda: Linear(W.astype(int)), "weight has dtype int64, expected a floating-point dtype such as float32"),
    (lambda: Linear([[1.0]]), "weight must be an array, got list; convert it with numpy.asarray(weight)"),
    (lambda: Linear(None), "weight must be an array, got NoneType"),
    (lambda: Linear(W, np.ones(5)), "bias has shape (5,), expected (out,) with out = 4 as in weight"),
    (lambda: Linear(W, np.ones(1)), "bias has shape (1,), expected (out,) with out = 4 as in weight"),
    (lambda: Linear(W, b.astype(single)), "bias has dtype float32, expected float64 as in weight"),
    (lambda: Linear.init(0, 4, rng=RNG), "in_features must be at least 1, got 0"),
    (lambda: Linear.init(5, 4.0, rng=RNG), "out_features must be an integer, got 4.0"),
    (lambda: Linear.init(5, 4, rng=RNG, dtype="int8"), "dtype must be one of float16, float32, float64, got 'int8'"),
    (lambda: LoRA(A, np.ones((4, 3)), 1), "lora_B has shape (4, 3), expected (out, r) with r = 2 as in lora_A"),
    (lambda: LoRA(A[0], B, 1), "lora_A has shape (5,), expected (r, in) with no empty axis"),
    (lambda: LoRA(A, B.astype(single), 1), "lora_B has dtype float32, expected float64 as in lora_A"),
    (lambda: LoRA(A, B, 0), "alpha must be above 0 and finite, got 0"),
    (lambda: LoRA(A, B, float("nan")), "alpha must be above 0 and finite, got nan"),
    (lambda: LoRA(A, B, "3"), "alpha must be a number, got '3'"),
    (lambda: LoRA(A, B, True), "alpha must be a number, got True"),
    (lambda: LoRA.init(5, 4, rank=1.5, alpha=1, rng=RNG), "rank must be an integer, got 1.5"),
    (lambda: LoRA.init(0, 4, rank=2, alpha=1, rng=RNG), "in_features must be at least 1, got 0"),
    (lambda: LoRA.init(5, 0, rank=2, alpha=1, rng=RNG), "out_features must be at least 1, got 0"),
    (lambda: LoRA.init(5, 4, rank=0, alpha=1, rng=RNG), "rank must be at least 1, got 0"),
    (lambda: LoRALinear.from_linear(A, rank=1, alpha=1, rng=RNG), "linear must be a Linear, got ndarray"),
    (lambda: LoRALinear(W, LoRA(A, B, 1)), "base must be a Linear, got ndarray"),
    (lambda: LoRALinear(Linear(W), Linear(W)), "adapter must be a LoRA, got Linear"),
    (
        lambda: LoRALinear(Linear(W), LoRA(A[:, :3], B, 1)),
        "adapter is 3 -> 4 wide, expected in -> out with in = 5 as in base",
    ),
    (
        lambda: LoRALinear(Linear(W), LoRA(A, B[:2], 1)),
        "adapter is 5 -> 2 wide, expected in -> out with out = 4 as in base",
    ),
    (
        lambda: LoRALinear(Linear(W.astype(single)), LoRA(A, B, 1)),
        "adapter has dtype float64, expected float32 as in base",
    ),
]


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_a_layer_that_cannot_be_is_refused(make, message):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("rng", [None, 1, np.random.RandomState(0)])
def test_what_draws_no_number_is_no_generator(rng):
    with pytest.raises(TypeError, match=r"^rng must be a numpy.random.Generator such as numpy.random.default_rng\(0\)"):
        Linear.init(5, 4, rng=rng)


@pytest.mark.parametrize("error", [ValueError, TypeError, MemoryError])
def test_a_refused_start_leaves_the_generator_where_it_stood(error):
    rng = np.random.default_rng(0)

    def refused():
        with unmoved(rng):
            rng.standard_normal(3)
            raise error

    with pytest.raises(error):
        refused()
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    with unmoved(rng):
        rng.standard_normal(3)
    assert rng.bit_generator.state != np.random.default_rng(0).bit_generator.state


# --- the guards around forward and backward -------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((3, 4)), "x has 4 entries on its last axis (shape (3, 4)), expected in_features = 5; out"),
        (np.ones((3, 1)), "x has 1 entries on its last axis (shape (3, 1)), expected in_features = 5"),
        (np.array(1.0), "x has no axes (shape ()), expected in_features = 5"),
        (np.ones((3, 5), single), "x has dtype float32, expected float64 as in the layer"),
        (np.ones((3, 5), int), "x has dtype int64, expected a floating-point dtype"),
        ([[1.0] * 5], "x must be an array, got list"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, message):
    with pytest.raises((ValueError, TypeError)) as error:
        Linear(W)(x)
    assert str(error.value).startswith(message)


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
        "cache does not come from this layer's forward: ": (y, (object(), *cache[1:])),
        "dy and cache are exchanged: call backward": (cache, y),
    }
    for message, arguments in wrong.items():
        with pytest.raises((ValueError, TypeError)) as error:
            layer.backward(*arguments)
        assert str(error.value).startswith(message)
    if x.dtype.kind == "f" and first_array(layer) is not None:
        with pytest.raises(TypeError, match=r"^x has dtype float\d\d, expected float\d\d as in the layer$"):
            layer.forward(x.astype(np.float16))


@pytest.mark.parametrize("cache", [None, (), 3.0, (1, 2)])
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(ValueError, match=r"^cache does not come from this layer's forward: Linear\(weight=\(4, 5\)"):
        Linear(W).backward(np.ones((3, 4)), cache)


def test_input_gradient_refuses_a_dy_of_another_precision():
    with pytest.raises(TypeError, match="dy has dtype float32, expected float64 as in the layer"):
        Linear(W).input_gradient(np.ones((3, 4), np.float32))


@pytest.mark.parametrize("kind", ["Linear", "LoRALinear", "RMSNorm", "SiLU", "Conv1d", "Attention", "GatedMLP"])
def test_an_input_with_imaginary_parts_is_refused_before_anything_is_computed(kind):
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


def test_a_weight_with_imaginary_parts_is_refused():
    with pytest.raises(TypeError, match="weight holds complex numbers"):
        Linear(np.ones((2, 3)) * 1j)


def test_complex_numbers_pass_where_their_precision_is_the_layers():
    """The complex step of gradcheck needs that."""
    assert Linear(W)(np.ones((3, 5), np.complex128)).dtype == np.complex128
    with pytest.raises(TypeError, match="x has dtype complex64, expected float64"):
        Linear(W)(np.ones((3, 5), np.complex64))


def test_half_precision_is_a_precision_of_its_own():
    layer = Linear(W.astype(np.float16))
    assert layer(np.ones((3, 5), np.float16)).dtype == np.float16
    with pytest.raises(TypeError, match="expected float16"):
        layer(np.ones((3, 5), np.float32))


def test_a_byte_order_of_another_machine_is_refused():
    with pytest.raises(TypeError, match="x has dtype >f8, expected"):
        check_array("x", np.ones(3, ">f8"))


# --- the residual form ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LoRA(A, B, 1), LoRALinear(Linear(W), LoRA(A, B, 1))], ids=["LoRA", "LoRALinear"])
@pytest.mark.parametrize(
    ("x", "target", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 4)), r"x has 4 entries on .*, expected in_features = 5"),
        (np.ones((3, 5), single), np.ones((3, 4)), "x has dtype float32, expected float64"),
        (np.ones((3, 5)), np.ones((3, 5)), r"y has shape \(3, 5\), expected \(3, 4\)"),
        (np.ones((3, 5)), np.ones((2, 4)), r"y has shape \(2, 4\), expected \(3, 4\)"),
        (np.ones((3, 5)), np.ones((3, 4), single), "y has dtype float32"),
        ([[1.0] * 5], np.ones((1, 4)), "x must be an array, got list"),
    ],
)
def test_residual_form_refuses(model, x, target, message):
    with pytest.raises((ValueError, TypeError), match=message):
        residual_form(model, x, target)


def test_residual_form_refuses_a_subclass_as_base():
    class Shifted(Linear):
        def forward(self, x):
            y, cache = super().forward(x)
            return y + 1, cache

    for model, got in (
        (LoRALinear(Shifted(W), LoRA(A, B, 1)), "LoRALinear over a Shifted"),
        (Linear(W), "Linear"),
    ):
        with pytest.raises(TypeError) as error:
            residual_form(model, np.ones((3, 5)), np.ones((3, 4)))
        assert str(error.value) == f"residual_form takes a LoRA, or a LoRALinear over a Linear, got {got}"


# --- numbers, and how values and files' contents are shown ---------------------------------------


@given(text=st.text(st.characters(), max_size=300))
def test_a_text_is_printable_and_stays_where_it_was(text):
    shown = printable(text)
    assert shown.isprintable()
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("\u202e\u2028", r"\u202e\u2028"),
        ("\udcff", r"\udcff"),
        ("é 漢", "é 漢"),
        ("é\n漢", r"é\n漢"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert printable("a" * 1200) == "a" * 1200
    assert printable("a" * 700 + "b" * 700) == "a" * 597 + " ... " + "b" * 597
    assert printable("abcdefghijkl", 10) == "ab ... kl"
    assert short("a" * 198) == "'" + "a" * 198 + "'"
    shown = short("a" * 10**6 + "b" * 10**6)
    assert shown == "'" + "a" * 96 + " ... " + "b" * 96 + "'"
    assert len(short(["a"] * 10**4)) <= 200
    assert short(7) == "7"
    assert short(10**5000) == "an integer of 16610 bits"
    assert short("\n") == r"'\n'"


def test_an_error_names_the_file_and_the_reason():
    assert str(FileRefused("a/b", "no\x07good")) == r"'a/b': no\x07good"
    assert len(str(FileRefused("a", "x" * 10**6))) <= 1200


@pytest.mark.parametrize("value", [True, 1j, b"1", bytearray(b"1"), "1", None, [1.0], memoryview(b"1")])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"^lr must be a number, got"):
        check_number("lr", value, above=0)
    with pytest.raises(TypeError, match=r"^n must be an integer, got"):
        check_integer("n", value, at_least=0)


def test_numpy_s_flags_complex_numbers_and_arrays_are_no_numbers():
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


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    assert needed("json", "a test").loads("[1]") == [1]
    monkeypatch.setitem(checks.INSTALL, "no_such_package", "this that")
    for package, install in (("no_such_package", "this that"), ("no_other_package", "no_other_package")):
        with pytest.raises(ValueError) as error:
            needed(package, "such a file")
        said = f"such a file needs {package} (No module named '{package}'): pip install {install}"
        assert str(error.value) == said


def test_a_hint_is_given_for_a_hubs_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert "download it" in hub_hint(Path("owner/model"))
    for other in (Path("here/model"), Path("a/b/c"), Path("model"), tmp_path / "owner"):
        assert hub_hint(other) == ""


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no"), ValueError, "q: no"),
        (TypeError("no"), TypeError, "q: no"),
        (np.linalg.LinAlgError("no"), ValueError, "q: no"),
        (UnicodeDecodeError("utf-8", b"a", 0, 1, "no"), ValueError, "q: 'utf-8' codec can't decode byte 0x61"),
        (FileRefused("f", "no"), FileRefused, "'f': no"),
        (KeyError("no"), KeyError, "'no'"),
    ],
)
def test_an_error_is_named_by_what_was_looked_at(error, kind, message):
    with pytest.raises(kind) as caught, named("q"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
