"""Comparisons that several test files make."""

import re
from contextlib import contextmanager

import numpy as np
import pytest

from minilora import LoRA, LoRALinear, gradcheck, mse
from minilora.conformance.problems import Problem
from minilora.linear import Linear
from minilora.texts import FileRefused

from .claims import require_close


def assert_close(found, expected, tolerance: float) -> None:
    """Compare as gradcheck does: absolutely below 1, relative to the largest entry above."""
    require_close("what was found", found, expected, tolerance)


DECIMAL = re.compile(r"\d[\d,]*\.\d+")


def same_but_rounding(text: str, other: str) -> bool:
    """Whether two texts are equal but for the last decimal of their numbers, in which processors differ by a unit."""
    if DECIMAL.sub("#", text) != DECIMAL.sub("#", other):
        return False
    for pair in zip(DECIMAL.findall(text), DECIMAL.findall(other), strict=True):
        decimals = max(len(number.partition(".")[2]) for number in pair)
        a, b = (float(number.replace(",", "")) for number in pair)
        if abs(a - b) > 1.5 * 10.0**-decimals:
            return False
    return True


@contextmanager
def refused(message, error=FileRefused):
    """Require an error, by its message in full."""
    with pytest.raises(error) as found:
        yield
    assert str(found.value) == message


def calls_of(monkeypatch, owner, name):
    """Return a list that gets the arguments of each call of a function."""
    calls, right = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(args) or right(*args, **options))
    return calls


def gradients_are_the_slope_of_mse(gradients, problem: Problem) -> None:
    """Of a function (model, x, y) such as `minilora.fast.residual_form`, for an adapter alone and beside a base."""
    x, target = problem.x, problem.target
    full, factors = problem.full, problem.factors

    def adapter(p):
        return LoRA(p["lora_A"], p["lora_B"], problem.alpha)

    def beside(p):
        return LoRALinear(Linear(**{name: a.astype(p["lora_A"].real.dtype) for name, a in full.items()}), adapter(p))

    for build in (adapter, beside):
        grads = gradients(build(factors), x, target)
        gradcheck(lambda p, build=build: mse(build(p)(x), target)[0], factors, grads, method="complex", tolerance=1e-12)
        single = build({name: p.astype(np.float32) for name, p in factors.items()})
        for name, grad in gradients(single, x.astype(np.float32), target.astype(np.float32)).items():
            assert grad.dtype == np.float32
            assert_close(grad, grads[name], 2e-4)  # the rounded factors and data alone move it by as much
