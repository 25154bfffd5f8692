"""Mixtures of experts of transformers, with PEFT's adapters of their parameters: outputs and gradients are ours."""

import sys
from types import ModuleType

import numpy as np
import pytest

from minilora import GatedMLP, Linear
from minilora.layers.experts import Experts, MixtureOfExperts
from minilora.layers.router import Router, balance
from minilora.layers.stacked import StackedLinear

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from transformers.models.mixtral import modeling_mixtral as mixtral  # noqa: E402
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2  # noqa: E402
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3  # noqa: E402

D, M = 10, 6
PROJECTIONS = ("gate_up_proj", "down_proj")


class InDouble(ModuleType):
    """torch, to a module that asks for float32 whatever its arrays are."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Their routers stay in float64; as they are, they compute in float32."""
    for module in (mixtral, qwen2, qwen3):
        monkeypatch.setattr(module, "torch", InDouble("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def block_of(family, experts, kept, seed, *, renormalised=True):
    """A mixture as transformers has it, with random weights, inside a module that has it as its `mlp`."""
    sizes = {"hidden_size": D, "num_experts_per_tok": kept, "hidden_act": "silu"}
    many = {"num_experts": experts, "moe_intermediate_size": M, "norm_topk_prob": renormalised}
    if family == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=experts, intermediate_size=M)
        block = mixtral.MixtralSparseMoeBlock
    elif family == "qwen3":
        config, block = transformers.Qwen3MoeConfig(**sizes, **many), qwen3.Qwen3MoeSparseMoeBlock
    else:
        config = transformers.Qwen2MoeConfig(**sizes, **many, shared_expert_intermediate_size=M + 1)
        block = qwen2.Qwen2MoeSparseMoeBlock
    config._experts_implementation = "eager"  # the others take no float64, or round
    model = torch.nn.Module()
    model.mlp = block(config).double()
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 * 1.5)
    return model


def numpy_of(tensor):
    return tensor.detach().numpy().copy()


def ours(block):
    """The same mixture here."""
    arrays = {name: numpy_of(p) for name, p in block.named_parameters()}
    router = Router(
        StackedLinear(arrays["gate.weight"]), block.gate.top_k, getattr(block.gate, "norm_topk_prob", True)
    )
    experts = Experts(*(StackedLinear(arrays[f"experts.{name}"]) for name in PROJECTIONS))
    if "shared_expert_gate.weight" not in arrays:
        return MixtureOfExperts(router, experts)
    shared = (Linear(arrays[f"shared_expert.{name}_proj.weight"]) for name in ("gate", "up", "down"))
    return MixtureOfExperts(router, experts, GatedMLP(*shared), Linear(arrays["shared_expert_gate.weight"]))


def both(model, x, dy, names):
    """What they compute: y, dx, and the gradients of the arrays named."""
    x = torch.tensor(x, requires_grad=True)
    y = model.mlp(x)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.tensor(dy)).sum().backward()
    grads = {name: numpy_of(p.grad) for name, p in names.items() if p.grad is not None}
    return {"y": numpy_of(y), "x": numpy_of(x.grad)} | grads


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        allowed = 1e-12 * max(1.0, np.abs(value).max())
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)


def computed(layer, x, dy):
    y, cache = layer.forward(x)
    dx, grads = layer.backward(dy, cache)
    return {"y": y, "x": dx} | grads


KINDS = [("mixtral", True), ("qwen3", True), ("qwen3", False), ("qwen2", True), ("qwen2", False)]
SIZES = {"several": (5, 2, 9), "one kept": (4, 1, 9), "all kept": (4, 4, 9), "one token": (4, 2, 1), "idle": (9, 2, 2)}
"""Experts, kept ones, tokens. Of nine experts, two tokens reach four at most."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "renormalised"), KINDS)
def test_outputs_and_all_gradients_are_those_of_transformers(family, renormalised, size):
    experts, kept, tokens = SIZES[size]
    model = block_of(family, experts, kept, seed=1, renormalised=renormalised)
    x, dy = np.random.default_rng(2).standard_normal((2, 1, tokens, D))
    layer = ours(model.mlp)
    expected = both(model, x, dy, dict(model.mlp.named_parameters()))
    found = computed(layer, x, dy)
    close(found, expected)
    idle = np.setdiff1d(np.arange(experts), layer.gate.route(x)[1])
    assert len(idle) >= (5 if size == "idle" else 0)
    for name in PROJECTIONS:
        assert (found[f"experts.{name}"][idle] == 0).all()


def test_the_balance_is_transformers_auxiliary_loss():
    scores = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = tuple(l.clone().requires_grad_() for l in scores)
    expected = mixtral.load_balancing_loss_func(layers, 5, 2)
    expected.backward()
    loss, d_scores = balance(scores.numpy().reshape(-1, 5), 2)
    assert abs(loss - expected.item()) < 1e-12
    np.testing.assert_allclose(d_scores, np.concatenate([numpy_of(l.grad) for l in layers]), rtol=0, atol=1e-14)
