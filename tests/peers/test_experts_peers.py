"""Mixtures of experts of transformers, with PEFT's adapters of their parameters: outputs and gradients are ours."""

import numpy as np
import pytest

from minilora import GatedMLP, Linear, adapt, adapters, merge
from minilora.layers.experts import Experts
from minilora.layers.mixture import MixtureOfExperts
from minilora.layers.router import Router, balance
from minilora.layers.stacked import StackedLinear

from ..support.peers import PEERS, factors_of, mixtral, peft, torch, transformers, with_peft
from ..support.peers import qwen2_moe as qwen2
from ..support.peers import qwen3_moe as qwen3

pytestmark = [*PEERS, pytest.mark.usefixtures("double")]
D, M = 10, 6
PROJECTIONS = ("gate_up_proj", "down_proj")


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
    router = Router(StackedLinear(arrays["gate.weight"]), block.gate.top_k, getattr(block.gate, "norm_topk_prob", True))
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
SIZES = {
    "several": (5, 2, (2, 9)), "one kept": (4, 1, (1, 9)), "all kept": (4, 4, (1, 9)), "one token": (4, 2, (1, 1)),
    "idle": (9, 2, (1, 2)),
}  # fmt: skip
"""Experts, kept ones, sequences and tokens. Of nine experts, two tokens reach four at most."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("family", "renormalised"), KINDS)
def test_outputs_and_all_gradients_are_those_of_transformers(family, renormalised, size):
    experts, kept, tokens = SIZES[size]
    model = block_of(family, experts, kept, seed=1, renormalised=renormalised)
    x, dy = np.random.default_rng(2).standard_normal((2, *tokens, D))
    layer = ours(model.mlp)
    expected = both(model, x, dy, dict(model.mlp.named_parameters()))
    found = computed(layer, x, dy)
    close(found, expected)
    idle = np.setdiff1d(np.arange(experts), layer.gate.route(x)[1])
    assert len(idle) >= (5 if size == "idle" else 0)
    for name in PROJECTIONS:
        assert (found[f"experts.{name}"][idle] == 0).all()


TARGETS = {
    "both": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gate and up": ["mlp.experts.gate_up_proj"],
    "down": ["mlp.experts.down_proj"],
    "router": ["mlp.gate.weight"],
    "all": ["mlp.gate.weight", "mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
}


def factors_by_peft(model, targets, **options):
    """The factors of PEFT's adapters of a mixture, moved from their start, by our names."""
    found = factors_of(with_peft(model, target_parameters=targets, **options))
    return {name.removeprefix("mlp."): p for name, p in found.items()}


ADAPTED = [
    *((*kind, targets, "several", rslora) for kind in KINDS for targets in TARGETS for rslora in (False, True)),
    *(("mixtral", True, "both", size, False) for size in SIZES),
]


@pytest.mark.parametrize(("family", "renormalised", "targets", "size", "rslora"), ADAPTED)
def test_adapters_of_experts_are_pefts(family, renormalised, targets, size, rslora):
    experts, kept, tokens = SIZES[size]
    model = block_of(family, experts, kept, seed=3, renormalised=renormalised)
    base, names = ours(model.mlp), [target.removeprefix("mlp.") for target in TARGETS[targets]]
    rng = np.random.default_rng(4)
    layer = adapt(base, [], rank=3, alpha=5.0, rng=rng, target_parameters=names, use_rslora=rslora)
    factors = factors_by_peft(model, TARGETS[targets], use_rslora=rslora)
    assert layer.trainable().keys() == factors.keys()
    for name, p in layer.trainable().items():
        p[...] = numpy_of(factors[name])
    x, dy = rng.standard_normal((2, *tokens, D))
    expected = both(model, x, dy, factors)
    close(computed(layer, x, dy), expected)
    close({"y": merge(layer)(x)}, {"y": expected["y"]})
    assert np.abs(expected["y"] - base(x)).max() > 0.1
    assert adapters(layer).keys() == set(names)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_we_lack_beside_experts_peft_refuses_too(options):
    with pytest.raises((ValueError, NotImplementedError)):
        factors_by_peft(block_of("mixtral", 4, 2, seed=0), TARGETS["both"], **options)


def test_pefts_start_adds_nothing_and_has_our_bound():
    model = block_of("mixtral", 40, 2, seed=0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=[], target_parameters=TARGETS["down"]))
    layer = adapt(
        ours(block_of("mixtral", 40, 2, seed=0).mlp), [], rank=3, alpha=8, rng=np.random.default_rng(0),
        target_parameters=["experts.down_proj"],
    )  # fmt: skip
    ends = []
    theirs = {n: numpy_of(p) for n, p in adapted.named_parameters() if "lora_" in n}
    for factors in (list(theirs.values()), list(layer.trainable().values())):
        A, B = factors
        assert A.shape == (120, M)
        assert B.shape == (D, 120)
        assert (B == 0).all()
        ends.append(np.abs(A).max())
    np.testing.assert_allclose(ends, M**-0.5, rtol=0.01)


def test_the_balance_is_transformers_auxiliary_loss():
    scores = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layers = tuple(layer.clone().requires_grad_() for layer in scores)
    expected = mixtral.load_balancing_loss_func(layers, 5, 2)
    expected.backward()
    loss, d_scores = balance(scores.numpy().reshape(-1, 5), 2)
    assert abs(loss - expected.item()) < 1e-12
    np.testing.assert_allclose(d_scores, np.concatenate([numpy_of(layer.grad) for layer in layers]), rtol=0, atol=1e-14)
