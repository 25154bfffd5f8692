"""Against HIPS/autograd and torch: their gradients, torch's Adam and a training as a whole, on the same arrays.

Each derives by another program, of forwards that are written a second time here.
"""

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad
from hypothesis import example, given, settings

from minilora import Adam, Linear, LoRA, LoRALinear, mse, train
from minilora.fast import residual_form
from minilora.optim import gradient_norm
from minilora.training import draw_batches

from ..support.cases import PRODUCTS
from ..support.compare import assert_close
from ..support.problems import ALL_ONES, RANK_ABOVE_WIDTHS, Problem, problems

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")


def tensors(arrays):
    return {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}


def frozen(case, problem):
    """What a layer computes with, and does not train."""
    return problem.full if case.name == "LoRALinear" else {}


def forward(einsum, problem, p):
    """y of what p has: a weight, factors, or both."""
    y = 0.0
    if "weight" in p:
        y = einsum("ni,oi->no", p["x"], p["weight"]) + p.get("bias", 0.0)
    if "lora_A" in p:
        y = y + problem.alpha / problem.rank * einsum("ni,ki,ok->no", p["x"], p["lora_A"], p["lora_B"])
    return y


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=RANK_ABOVE_WIDTHS)
def test_backward_agrees_with_autograd_and_torch(case, problem):
    params, dy = case.params(problem), problem.dy
    actual = case.gradients(problem, params, dy)
    full, theirs = frozen(case, problem), tensors(params)
    by_autograd = grad(lambda p: anp.sum(dy * forward(anp.einsum, problem, {**full, **p})))(params)
    forward(torch.einsum, problem, {**tensors(full), **theirs}).backward(torch.tensor(dy))
    assert actual.keys() == by_autograd.keys()
    for name in actual:
        assert_close(actual[name], by_autograd[name], 1e-13)
        assert_close(actual[name], theirs[name].grad.numpy(), 1e-12)


@given(problem=problems())
def test_mse_agrees_with_autograd_and_torch(problem):
    prediction = torch.tensor(problem.dy, requires_grad=True)
    loss = torch.nn.functional.mse_loss(prediction, torch.tensor(problem.target))
    loss.backward()
    ours, gradient = mse(problem.dy, problem.target)
    assert_close(ours, loss.detach().numpy(), 1e-13)
    assert_close(gradient, prediction.grad.numpy(), 1e-13)
    assert_close(gradient, grad(lambda p: anp.mean((p - problem.target) ** 2))(problem.dy), 1e-13)


@given(problem=problems())
@example(problem=RANK_ABOVE_WIDTHS)
def test_the_residual_form_agrees_with_autograd(problem):
    def loss(p):
        return anp.mean((forward(anp.einsum, problem, {"x": problem.x, **p}) - problem.target) ** 2)

    expected = grad(loss)(problem.factors)
    for name, actual in residual_form(LoRA(**problem.factors, alpha=problem.alpha), problem.x, problem.target).items():
        assert_close(actual, expected[name], 1e-13)


@pytest.mark.parametrize("decay_and_clipping", [False, True])
@given(problem=problems())
@settings(max_examples=20)
def test_adam_agrees_with_torch(decay_and_clipping, problem):
    """And AdamW with clip_grad_norm_, which divides by n + 1e-6: the factor is smaller by 1e-6 / n, of n above 1000."""
    params, most = {name: p.copy() for name, p in problem.factors.items()}, 3000.0
    theirs, clipped = tensors(problem.factors), 0
    optimizer, their_optimizer = Adam(params, lr=0.01), torch.optim.Adam(theirs.values(), lr=0.01)
    if decay_and_clipping:
        optimizer = Adam(params, lr=0.01, weight_decay=0.3, max_grad_norm=most)
        their_optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.3)
    for t in range(200):
        scale = 10.0 ** (3 + t % 3) if decay_and_clipping else 1.0
        grads = {name: scale * problem.randn(f"{name} {t}", *p.shape) for name, p in params.items()}
        optimizer.step(grads)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        if decay_and_clipping:
            norm = torch.nn.utils.clip_grad_norm_(theirs.values(), most)
            assert_close(gradient_norm(grads), norm.numpy(), 1e-13)
            clipped += float(norm) > most
        their_optimizer.step()
    assert not decay_and_clipping or 50 < clipped <= 200
    for name, p in params.items():
        assert_close(p, theirs[name].detach().numpy(), 1e-7 if decay_and_clipping else 1e-12)


@pytest.mark.parametrize("what", ["Linear", "LoRA on the residual", "LoRALinear"])
def test_two_hundred_training_steps_agree_with_torch(what):
    problem = Problem(n=400, in_features=12, out_features=9, rank=3, alpha=6.0)
    base = Linear(**{name: p.copy() for name, p in problem.full.items()})
    lora = LoRA(**{name: p.copy() for name, p in problem.factors.items()}, alpha=problem.alpha)
    target = problem.target
    if what == "Linear":
        case, model, params = PRODUCTS[0], base, problem.full
    elif what == "LoRALinear":
        case, model, params = PRODUCTS[2], LoRALinear(base, lora), problem.factors
    else:
        case, model, params, target = PRODUCTS[1], lora, problem.factors, target - base(problem.x)

    # 50 epochs of 4 steps: the batches come from the same generator.
    history = train(model, problem.x, target, epochs=50, batch_size=100, rng=np.random.default_rng(7), log_every=1)

    full, theirs, rng, losses = tensors(frozen(case, problem)), tensors(params), np.random.default_rng(7), []
    optimizer = torch.optim.Adam(theirs.values())
    x, y = torch.tensor(problem.x), torch.tensor(target)

    def loss(x, y):
        return torch.nn.functional.mse_loss(forward(torch.einsum, problem, {"x": x, **full, **theirs}), y)

    for _ in range(50):
        for rows in draw_batches(rng, 400, 100):
            optimizer.zero_grad()
            loss(x[rows], y[rows]).backward()
            optimizer.step()
        losses.append(loss(x, y).item())
    assert_close(np.array(history.losses), np.array(losses), 1e-9)
    for name, p in model.trainable().items():
        assert_close(p, theirs[name].detach().numpy(), 1e-9)
