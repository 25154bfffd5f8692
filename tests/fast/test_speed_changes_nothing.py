"""Every optimisation computes the same training: the losses agree to 1e-12 after a thousand steps in float64."""

import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear, evaluate, train

from ..support.problems import Problem

BATCH, ROWS, EPOCHS = 16, 400, 40  # 25 steps an epoch: a thousand in all
widths = st.integers(1, 9)
problems = st.builds(
    Problem, st.just(ROWS), widths, widths, st.integers(1, 3), st.just(0.7), seed=st.integers(0, 2**32 - 1)
)
kinds = st.sampled_from(["full", "lora", "adapter"])


def model_of(problem, kind):
    """One of three kinds of model, each with arrays of its own."""
    full, factors = ({name: p.copy() for name, p in arrays.items()} for arrays in (problem.full, problem.factors))
    base, adapter = Linear(**full), LoRA(**factors, alpha=problem.alpha)
    return {"full": base, "lora": LoRALinear(base, adapter), "adapter": adapter}[kind]


def losses(model, problem, target=None):
    """The losses of a training on targets that are noise, so that none goes to zero."""
    target, rng = problem.target if target is None else target, np.random.default_rng(problem.seed)
    return train(model, problem.x, target, epochs=EPOCHS, batch_size=BATCH, lr=0.01, rng=rng).losses


class WithoutShortcut:
    """A layer that offers `train` nothing but forward and backward."""

    def __init__(self, layer):
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.trainable, self.forward, self.backward = layer.trainable, layer.forward, layer.backward

    def __call__(self, x):
        return self.layer(x)


def replacing(module, name, plain):
    def of_plain(problem, kind):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[module], name, plain)
            return losses(model_of(problem, kind), problem)

    return of_plain


def base_once(problem, kind):
    """The base runs before the training, and its output is taken from the targets."""
    if kind != "lora":
        return losses(model_of(problem, kind), problem)
    return losses(model_of(problem, "adapter"), problem, problem.target - model_of(problem, "full")(problem.x))


# What each optimisation is replaced by.
PLAIN = {
    "Adam in place, by blocks": replacing("minilora.fast.adam", "BLOCK", 1),
    "outer products at rank 1": replacing("minilora.lora", "matmul", lambda narrow, factor: narrow @ factor),
    "rows gathered into a buffer": replacing("minilora.training", "take_rows", lambda a, rows, out: a[rows].copy()),
    "loss evaluated in blocks": replacing("minilora.training", "EVALUATION_ROWS", ROWS),
    "the residual form": lambda problem, kind: losses(WithoutShortcut(model_of(problem, kind)), problem),
    "the base at each step": base_once,
}


@pytest.mark.long
@pytest.mark.parametrize("optimisation", PLAIN)
@settings(max_examples=2, deadline=None)
@given(kinds, problems)
@example("lora", Problem(ROWS, 5, 4, 1))
def test_losses_are_the_same_without(optimisation, kind, problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", 37)
        ours = losses(model_of(problem, kind), problem)
    np.testing.assert_allclose(ours, PLAIN[optimisation](problem, kind), rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(kinds, problems, st.integers(1, ROWS))
def test_loss_in_blocks_is_the_loss_in_one_piece(kind, problem, block):
    model = model_of(problem, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", block)
        in_blocks = evaluate(model, problem.x, problem.target)
    assert in_blocks == pytest.approx(float(np.mean((model(problem.x) - problem.target) ** 2)), rel=1e-13)
