"""Bad input to a layer gets one error that names the argument, its value and what was expected."""

import numpy as np
import pytest

from minilora import Linear, LoRA, LoRALinear
from minilora.checks import check_array
from minilora.fast import residual_form

from .support.cases import PRODUCTS
from .support.loops import drawn
from .support.problems import SQUARE, Problem

PROBLEM = Problem(n=3, in_features=5, out_features=4, rank=2)
RNG = np.random.default_rng(0)
A, B, W, b = np.ones((2, 5)), np.ones((4, 2)), np.ones((4, 5)), np.ones(4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(np.ones(5)), ValueError, r"weight has shape \(5,\), expected \(out, in\) with no empty axis"),
        (lambda: Linear(np.ones((0, 5))), ValueError, r"weight has shape \(0, 5\)"),
        (lambda: Linear(W.astype(int)), TypeError, "weight has dtype int64, expected a floating-point dtype"),
        (lambda: Linear([[1.0]]), TypeError, "weight must be an array, got list"),
        (lambda: Linear(W, np.ones(5)), ValueError, r"bias has shape \(5,\), expected \(out,\) with out = 4"),
        (lambda: Linear(W, np.ones(1)), ValueError, r"bias has shape \(1,\), expected \(out,\) with out = 4"),
        (lambda: Linear(W, b.astype(np.float32)), TypeError, "bias has dtype float32, expected float64 as in weight"),
        (lambda: Linear.init(0, 4, rng=RNG), ValueError, "in_features must be at least 1, got 0"),
        (lambda: Linear.init(5, 4.0, rng=RNG), TypeError, "out_features must be an integer, got 4.0"),
        (lambda: Linear.init(5, 4, rng=1), TypeError, "rng must be a numpy.random.Generator"),
        (
            lambda: Linear.init(5, 4, rng=RNG, dtype=int),
            TypeError,
            "dtype must be one of float16, float32, float64, got <class 'int'>",
        ),
        (
            lambda: LoRA(A, np.ones((4, 3)), 1),
            ValueError,
            r"^lora_B has shape \(4, 3\), expected \(out, r\) with r = 2 as in lora_A$",
        ),
        (lambda: LoRA(A[0], B, 1), ValueError, r"lora_A has shape \(5,\)"),
        (lambda: LoRA(A, B[:, 0], 1), ValueError, r"lora_B has shape \(4,\)"),
        (
            lambda: LoRA(A, B.astype(np.float32), 1),
            TypeError,
            "lora_B has dtype float32, expected float64 as in lora_A",
        ),
        (lambda: LoRA(A, B, 0), ValueError, "alpha must be above 0 and finite, got 0"),
        (lambda: LoRA(A, B, -1.5), ValueError, "alpha must be above 0 and finite, got -1.5"),
        (lambda: LoRA(A, B, float("nan")), ValueError, "alpha must be above 0 and finite, got nan"),
        (lambda: LoRA(A, B, float("inf")), ValueError, "alpha must be above 0 and finite, got inf"),
        (lambda: LoRA(A, B, None), TypeError, "alpha must be a number, got None"),
        (lambda: LoRA(A, B, "3"), TypeError, "alpha must be a number, got '3'"),
        (lambda: LoRA(A, B, True), TypeError, "alpha must be a number, got True"),
        (lambda: LoRA(A, B, 10**400), ValueError, "alpha must be above 0 and finite, got 1000"),
        (lambda: Linear.init(5, 4, rng=RNG, backend="cupy"), TypeError, "must be a Backend, .*, got 'cupy'"),
        (lambda: LoRA.init(5, 4, rank=1, alpha=1, rng=RNG, backend="cupy"), TypeError, "must be a Backend, .*, got 'c"),
        (lambda: LoRALinear(W, LoRA(A, B, 1)), TypeError, "base must be a Linear, got ndarray"),
        (lambda: LoRALinear(Linear(W), Linear(W)), TypeError, "adapter must be a LoRA, got Linear"),
        (
            lambda: LoRALinear.from_linear(W, rank=1, alpha=1, rng=RNG),
            TypeError,
            "linear must be a Linear, got ndarray",
        ),
        (lambda: LoRA.init(5, 4, rank=0, alpha=1, rng=RNG), ValueError, "rank must be at least 1, got 0"),
        (lambda: LoRA.init(5, 4, rank=1.5, alpha=1, rng=RNG), TypeError, "rank must be an integer, got 1.5"),
        (lambda: LoRA.init(5, 4, rank=1, alpha=1, rng=None), TypeError, "rng must be a numpy.random.Generator"),
        (lambda: LoRA.init(0, 4, rank=1, alpha=1, rng=RNG), ValueError, "in_features must be at least 1"),
        (lambda: LoRA.init(5, 0, rank=1, alpha=1, rng=RNG), ValueError, "out_features must be at least 1"),
        (lambda: LoRALinear(Linear(W), LoRA(A[:, :3], B, 1)), ValueError, "3 -> 4 wide, expected .* with in = 5"),
        (lambda: LoRALinear(Linear(W), LoRA(A, B[:2], 1)), ValueError, "5 -> 2 wide, expected .* with out = 4"),
        (
            lambda: LoRALinear(Linear(W.astype(np.float32)), LoRA(A, B, 1)),
            TypeError,
            "adapter has dtype float64, expected float32 as in base",
        ),
    ],
)
def test_a_layer_that_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
class TestEveryLayer:
    def layer(self, case):
        return case.build(PROBLEM, case.params(PROBLEM))

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (
                np.ones((3, 4)),
                ValueError,
                r"x has 4 entries on its last axis \(shape \(3, 4\)\), expected in_features = 5",
            ),
            (np.array(1.0), ValueError, r"x has no axes \(shape \(\)\), expected in_features = 5"),
            (np.ones((3, 5), np.float32), TypeError, "x has dtype float32, expected float64 as in the layer"),
            (np.ones((3, 5), int), TypeError, "x has dtype int64, expected a floating-point dtype"),
            (np.ones((3, 5), object), TypeError, "x has dtype object, expected a floating-point dtype"),
            ([[1.0] * 5], TypeError, "x must be an array, got list"),
        ],
    )
    def test_forward_refuses(self, case, x, error, message):
        with pytest.raises(error, match=message):
            self.layer(case).forward(x)
        with pytest.raises(error, match=message):
            self.layer(case)(x)

    @pytest.mark.parametrize(
        ("dy", "error", "message"),
        [
            (np.ones((3, 5)), ValueError, r"dy has shape \(3, 5\), expected \(3, 4\)"),
            (np.ones((2, 4)), ValueError, r"dy has shape \(2, 4\), expected \(3, 4\)"),
            (np.ones((1, 3, 4)), ValueError, r"dy has shape \(1, 3, 4\), expected \(3, 4\)"),
            (np.ones((3, 4), np.float32), TypeError, "dy has dtype float32, expected float64 as in the layer"),
            (1.0, TypeError, "dy must be an array, got float"),
        ],
    )
    def test_backward_refuses(self, case, dy, error, message):
        layer = self.layer(case)
        _, cache = layer.forward(PROBLEM.x)
        with pytest.raises(error, match=message):
            layer.backward(dy, cache)

    def test_backward_refuses_the_cache_of_a_twin_layer(self, case):
        _, cache = self.layer(case).forward(PROBLEM.x)
        with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
            self.layer(case).backward(PROBLEM.dy, cache)

    @pytest.mark.parametrize("cache", [None, (), 3.0, (1, 2)])
    def test_backward_refuses_what_is_no_cache(self, case, cache):
        with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
            self.layer(case).backward(PROBLEM.dy, cache)


def test_input_gradient_refuses_a_dy_of_another_precision():
    with pytest.raises(TypeError, match="dy has dtype float32, expected float64 as in the layer"):
        Linear(W).input_gradient(np.ones((3, 4), np.float32))


@pytest.mark.parametrize("make", [lambda: LoRA(A, B, 1), lambda: LoRALinear(Linear(W), LoRA(A, B, 1))])
@pytest.mark.parametrize(
    ("x", "target", "error", "message"),
    [
        (np.ones((3, 4)), np.ones((3, 4)), ValueError, r"x has 4 entries on .*, expected in_features = 5"),
        (np.ones((3, 5), np.float32), np.ones((3, 4)), TypeError, "x has dtype float32, expected float64"),
        (np.ones((9, 5), np.float32), np.ones((9, 4)), TypeError, "x has dtype float32, expected float64"),
        (np.ones((3, 5)), np.ones((3, 5)), ValueError, r"y has shape \(3, 5\), expected \(3, 4\)"),
        (np.ones((3, 5)), np.ones((2, 4)), ValueError, r"y has shape \(2, 4\), expected \(3, 4\)"),
        (np.ones((3, 5)), np.ones((3, 4), np.float32), TypeError, "y has dtype float32"),
        ([[1.0] * 5], np.ones((1, 4)), TypeError, "x must be an array, got list"),
    ],
)
def test_residual_form_refuses(make, x, target, error, message):
    with pytest.raises(error, match=message):
        residual_form(make(), x, target)


def test_half_precision_is_a_precision_of_its_own():
    layer = Linear(W.astype(np.float16))
    assert layer(np.ones((3, 5), np.float16)).dtype == np.float16
    with pytest.raises(TypeError, match="expected float16"):
        layer(np.ones((3, 5), np.float32))


@pytest.mark.parametrize("kind", ["Linear", "LoRALinear", "RMSNorm", "SiLU", "Conv1d", "Attention", "GatedMLP"])
def test_an_input_with_imaginary_parts_is_refused_before_anything_is_computed(kind):
    layer, x = drawn(kind, SQUARE)
    before = x.copy()
    with pytest.raises(TypeError, match=r"x holds complex numbers, .*: take x\.real, or its real and imaginary parts"):
        layer.forward(x + 0.5j)
    np.testing.assert_array_equal(x, before)
    assert layer(x + 1e-20j).dtype == np.complex128  # the complex step


def test_a_weight_with_imaginary_parts_is_refused():
    with pytest.raises(TypeError, match="weight holds complex numbers"):
        Linear(np.ones((2, 3)) * 1j)


def test_complex_numbers_pass_where_their_precision_is_the_layers():
    """The complex step of gradcheck needs that."""
    assert Linear(W)(np.ones((3, 5), np.complex128)).dtype == np.complex128
    with pytest.raises(TypeError, match="x has dtype complex64, expected float64"):
        Linear(W)(np.ones((3, 5), np.complex64))


def test_a_byte_order_of_another_machine_is_refused():
    with pytest.raises(TypeError, match="x has dtype >f8, expected"):
        check_array("x", np.ones(3, ">f8"))


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
