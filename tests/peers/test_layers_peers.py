"""Against torch and PEFT in float64: embeddings, convolutions, DoRA, rsLoRA, PiSSA and sums of adapters."""

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings

from minilora import Adapter, Linear, adapt, attach, merge, weighted_sum
from minilora.adaptation import adapters

from ..support.cases import KINDS, Geometry, ids_of, plain_case
from ..support.compare import assert_close
from ..support.problems import ALL_ONES, RANK_ABOVE_WIDTHS, problems

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def module(kind, p):
    """The layer as torch has it, in float64, with the weights of the problem."""
    weight, bias = kind.matrix(p), kind.bias(p)
    if kind.name == "linear":
        layer = torch.nn.Linear(p.in_features, p.out_features, bias=bias is not None)
    elif kind.name == "embedding":
        layer, weight = torch.nn.Embedding(p.in_features, p.out_features), weight.T
    else:
        g = Geometry.of(p.seed, kind.axes)
        cls = (torch.nn.Conv1d, torch.nn.Conv2d)[kind.axes - 1]
        layer = cls(p.in_features, p.out_features, g.kernel, bias=bias is not None, **g.steps)
        weight = weight.reshape(kind.shape(p))
    layer = layer.double()
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def ours(kind, p):
    return kind.build(p, kind.matrix(p), kind.bias(p))


def inputs(kind, p):
    """Ids for an embedding, and otherwise numbers; for torch, as a leaf."""
    x = ids_of(p) if kind.name == "embedding" else kind.input(p)
    return x, torch.tensor(x, requires_grad=kind.name != "embedding")


def assert_same_pass(layer, theirs, x, their_x, p, parameters):
    """Compare output, dx, and the gradients of the parameters that torch has by our names."""
    y, cache = layer.forward(x)
    their_y = theirs(their_x)
    assert_close(y, their_y.detach().numpy(), 1e-12)
    dy = p.randn("dy", *y.shape)
    their_y.backward(torch.tensor(dy))
    dx, grads = layer.backward(dy, cache)
    if dx is not None:
        assert_close(dx, their_x.grad.numpy(), 1e-12)
    assert grads.keys() == parameters.keys()
    for name, grad in grads.items():
        assert_close(grad, parameters[name].grad.numpy().reshape(grad.shape), 1e-12)


@pytest.mark.parametrize("kind", list(KINDS.values())[1:], ids=list(KINDS)[1:])
@given(problem=problems())
@example(problem=ALL_ONES)
@settings(max_examples=50)
def test_the_layer_and_its_gradients_are_torchs(kind, problem):
    p = kind.small(problem)
    theirs = module(kind, p)
    parameters = {name: getattr(theirs, name) for name in plain_case(kind).arrays(p)}
    assert_same_pass(ours(kind, p), theirs, *inputs(kind, p), p, parameters)


class Holder(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def with_peft(kind, p, **options):
    """PEFT's model and, by our names, its parameters with the values of ours."""
    config = peft.LoraConfig(target_modules=["layer"], r=p.rank, lora_alpha=p.alpha, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Holder(module(kind, p)), config)
    layer = model.base_model.model.layer
    if kind.axes:  # PEFT 0.21 forgets the dilation of its own A, and then cannot add the two outputs
        layer.lora_A["default"].dilation = layer.base_layer.dilation
    if kind.name == "embedding":
        found = {"lora_A": layer.lora_embedding_A["default"], "lora_B": layer.lora_embedding_B["default"]}
    else:
        found = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if options.get("use_dora"):
        found["magnitude"] = layer.lora_magnitude_vector["default"].weight
    return model, found


def arrays(kind, p, dora):
    found = {
        "lora_A": p.randn("lora_A", p.rank, kind.width(p)),
        "lora_B": p.randn("lora_B", p.out_features, p.rank) / (4 * p.alpha if dora else 1),
    }
    return found | ({"magnitude": 1 + abs(p.randn("magnitude", p.out_features))} if dora else {})


@KIND
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
@given(problem=problems())
@example(problem=ALL_ONES)
@example(problem=RANK_ABOVE_WIDTHS)
@settings(max_examples=20)
def test_the_adapted_layer_and_its_gradients_are_pefts(kind, options, problem):
    p = kind.small(problem)
    theirs, parameters = with_peft(kind, p, **options)
    model = adapt(ours(kind, p), "", rank=p.rank, alpha=p.alpha, rng=np.random.default_rng(0), **options)
    if options.get("use_dora"):  # PEFT starts with the magnitude of the base too
        assert_close(model.adapter.magnitude, parameters["magnitude"].detach().numpy().ravel(), 1e-12)
    for name, array in arrays(kind, p, "use_dora" in options).items():
        getattr(model.adapter, name)[...] = array
        parameters[name].data = torch.tensor(array).reshape(parameters[name].shape)
    assert_same_pass(model, theirs, *inputs(kind, p), p, parameters)
    merged, their_merged = merge(model), theirs.merge_and_unload().layer
    assert_close(merged.weight, their_merged.weight.detach().numpy(), 1e-12)


@KIND
def test_adapters_have_pefts_shapes_and_start(kind):
    """The start's spread, over many draws of PEFT's and ours; and its shapes, as `kind` and `kernel` say them."""
    p = RANK_ABOVE_WIDTHS
    found = {}
    for seed in range(30):
        torch.manual_seed(seed)
        _, parameters = with_peft(kind, p)
        model = adapt(ours(kind, p), "", rank=p.rank, alpha=1, rng=np.random.default_rng(seed))
        for name in ("lora_A", "lora_B"):
            mine, theirs = found.setdefault(name, ([], []))
            mine.append(getattr(model.adapter, name).ravel())
            theirs.append(parameters[name].detach().numpy().ravel())
    (adapter,) = adapters(model).values()
    ones = (1,) * len(adapter.kernel)
    assert adapter.lora_A.reshape(p.rank, -1, *adapter.kernel).shape == tuple(parameters["lora_A"].shape)
    assert (*adapter.lora_B.shape, *ones) == tuple(parameters["lora_B"].shape)
    assert attach(ours(kind, p), {"": adapter}).trainable().keys() == {"lora_A", "lora_B"}
    for mine, theirs in found.values():
        mine, theirs = np.concatenate(mine), np.concatenate(theirs)
        assert mine.std() == pytest.approx(theirs.std(), rel=0.15)
        assert np.abs(mine).max() == pytest.approx(np.abs(theirs).max(), rel=0.3)


def test_pissa_starts_where_pefts_does():
    """PEFT's PiSSA refuses float64."""
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(9, 7)
    weight = rng.standard_normal((7, 9)).astype(np.float32)
    layer.weight.data = torch.tensor(weight)
    config = peft.LoraConfig(target_modules=["layer"], r=3, lora_alpha=6, init_lora_weights="pissa")
    theirs = peft.get_peft_model(Holder(layer), config).base_model.model.layer
    model = adapt(Linear(weight), "", rank=3, alpha=6, rng=rng, init="pissa")
    assert_close(model.base.weight, theirs.base_layer.weight.detach().numpy(), 1e-5)
    assert_close(model.delta(), theirs.get_delta_weight("default").detach().numpy(), 1e-5)
    for name in ("lora_A", "lora_B"):  # singular vectors have a sign of their own
        expected = getattr(theirs, name)["default"].weight.detach().numpy()
        assert_close(np.abs(getattr(model.adapter, name)), np.abs(expected), 1e-4)


@given(problem=problems())
@settings(max_examples=20)
def test_sums_of_adapters_are_pefts(problem):
    kind, p = KINDS["linear"], problem
    weights = [1.5, -0.5]
    terms = [
        Adapter(p.randn(f"A{i}", p.rank, p.in_features), p.randn(f"B{i}", p.out_features, p.rank), p.alpha)
        for i in range(2)
    ]
    theirs, _ = with_peft(kind, p)
    theirs.add_adapter("other", peft.LoraConfig(target_modules=["layer"], r=p.rank, lora_alpha=p.alpha))
    layer = theirs.base_model.model.layer
    for name, term in zip(("default", "other"), terms, strict=True):
        layer.lora_A[name].weight.data = torch.tensor(term.lora_A)
        layer.lora_B[name].weight.data = torch.tensor(term.lora_B)
    theirs.add_weighted_adapter(["default", "other"], weights, "cat", combination_type="cat")
    total = weighted_sum(terms, weights)
    assert_close(total.delta(), layer.get_delta_weight("cat").detach().numpy(), 1e-12)
    # "linear" is no sum of the changes: it adds the factors, whose product has cross terms. Its weights are float32.
    theirs.add_weighted_adapter(["default", "other"], weights, "linear", combination_type="linear")
    assert_close(
        weighted_sum(terms, weights, "linear").delta(), layer.get_delta_weight("linear").detach().numpy(), 1e-6
    )
    r = min(p.rank, *total.shape)
    theirs.add_weighted_adapter(["default", "other"], weights, "svd", combination_type="svd", svd_rank=r)
    assert_close(weighted_sum(terms, weights, "svd", r).delta(), layer.get_delta_weight("svd").detach().numpy(), 1e-10)
