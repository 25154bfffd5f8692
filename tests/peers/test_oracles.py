"""Gradients against HIPS/autograd: another derivation, by another program, of forwards written a second time."""

import autograd.numpy as anp
import pytest
from autograd import grad
from hypothesis import example, given

from minilora import LoRA, mse
from minilora.fast import residual_form

from ..support.cases import PRODUCTS
from ..support.compare import assert_close
from ..support.problems import ALL_ONES, RANK_ABOVE_WIDTHS, problems


def linear(p):
    return anp.einsum("ni,oi->no", p["x"], p["weight"]) + p.get("bias", 0.0)


def lora(p, scaling):
    return scaling * anp.einsum("ni,ki,ok->no", p["x"], p["lora_A"], p["lora_B"])


def forward(case, problem, p):
    if case.name == "Linear":
        return linear(p)
    update = lora(p, problem.alpha / problem.rank)
    return update if case.name == "LoRA" else update + linear({"x": p["x"], **problem.full})


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=RANK_ABOVE_WIDTHS)
def test_backward_agrees_with_autograd(case, problem):
    params, dy = case.params(problem), problem.dy
    expected = grad(lambda p: anp.sum(dy * forward(case, problem, p)))(params)
    actual = case.gradients(problem, params, dy)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(actual[name], expected[name], 1e-13)


@given(problem=problems())
def test_mse_agrees_with_autograd(problem):
    expected = grad(lambda prediction: anp.mean((prediction - problem.target) ** 2))(problem.dy)
    assert_close(mse(problem.dy, problem.target)[1], expected, 1e-13)


@given(problem=problems())
@example(problem=RANK_ABOVE_WIDTHS)
def test_the_residual_form_agrees_with_autograd(problem):
    def loss(p):
        return anp.mean((lora({"x": problem.x, **p}, problem.alpha / problem.rank) - problem.target) ** 2)

    expected = grad(loss)(problem.factors)
    for name, actual in residual_form(LoRA(**problem.factors, alpha=problem.alpha), problem.x, problem.target).items():
        assert_close(actual, expected[name], 1e-13)
