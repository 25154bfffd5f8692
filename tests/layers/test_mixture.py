"""What is true of a mixture of experts beside the claims: corners, idle experts, what is kept, bad input."""

import warnings

import numpy as np
import pytest

from minilora import GatedMLP, Linear, LoRA, adapt, adapters, attach, merge, train
from minilora.language.memory import cache_bytes
from minilora.layer import freeze, rebuild, walk
from minilora.layers.experts import Experts
from minilora.layers.mixture import MixtureOfExperts, sort_by_expert
from minilora.layers.router import Router, balance
from minilora.layers.stacked import StackedLinear
from minilora.variants.stackedlora import StackedLoRA, StackedLoRALinear

from ..support.cupy_standin import traffic

D, M, E = 6, 5, 4


def randn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def mixture(seed=0, top_k=2, experts=E, dtype="float64", **options):
    arrays = (randn([seed, i], *s) for i, s in enumerate(((experts, D), (experts, 2 * M, D), (experts, D, M))))
    router, gate_up, down = (StackedLinear(a.astype(dtype)) for a in arrays)
    return MixtureOfExperts(Router(router, top_k, **options), Experts(gate_up, down))


def expert(layer, e):
    """One expert as a gated MLP of its own."""
    gate_up, down = layer.experts.gate_up_proj.weight[e], layer.experts.down_proj.weight[e]
    return GatedMLP(Linear(gate_up[:M]), Linear(gate_up[M:]), Linear(down))


def test_one_renormalised_expert_leaves_the_router_no_gradient():
    layer, x = mixture(top_k=1), randn(1, 9, D)
    y, cache = layer.forward(x)
    _, grads = layer.backward(randn(2, 9, D), cache)
    assert (grads["gate.weight"] == 0).all()
    choice = layer.gate.route(x)[1][:, 0]
    np.testing.assert_allclose(y, [expert(layer, e)(row) for e, row in zip(choice, x, strict=True)], atol=1e-12)


def test_with_all_experts_kept_both_softmaxes_are_one():
    outputs = [mixture(top_k=E, norm_topk_prob=flag)(randn(1, 9, D)) for flag in (True, False)]
    np.testing.assert_allclose(*outputs, atol=1e-13)


def test_rows_come_back_where_they_were():
    choice = np.array([[2, 0], [0, 3], [2, 3]])
    order, place, counts = sort_by_expert(choice, 4)
    pairs = choice.ravel()
    assert pairs[order].tolist() == [0, 0, 2, 2, 3, 3]
    assert (order[place] == np.arange(6)).all()
    assert counts == [2, 0, 2, 2]
    assert order.tolist() == [1, 2, 0, 4, 3, 5]  # within an expert, in the order of rows


def test_frozen_experts_keep_no_inputs():
    x, layer = randn(1, 50, D), mixture()
    choice, frozen = (cache_bytes(m.forward(x)[1]) for m in (layer, freeze(layer)))
    inputs = 8 * 50 * (D + 2 * (D + M))  # the router's, and of each kept expert both products'
    assert choice - frozen == inputs


def test_a_mixtures_step_waits_once_and_copies_counts_alone(standin):
    layer = rebuild(mixture(dtype="float32"), array=standin.asarray)
    x = standin.asarray(randn(1, 9, D).astype("float32"))
    traffic.reset()
    y, cache = layer.forward(x)
    assert (traffic.to_device, traffic.to_host) == (0, 1)
    layer.backward(y, cache)
    assert (traffic.to_device, traffic.to_host) == (0, 1)


R, S = Router(StackedLinear(np.ones((E, D))), 2), StackedLinear(np.ones((E, D, M)))
TWO = Experts(StackedLinear(np.ones((E, 2 * M, D))), S)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StackedLinear(np.ones(3)), ValueError,
         r"weight has shape \(3,\), expected \(E, out, in\) or \(out, in\), with no empty axis$"),
        (lambda: StackedLinear(np.ones((2, 0, 3))), ValueError, r"weight has shape \(2, 0, 3\), expected"),
        (lambda: StackedLinear([[1.0]]), TypeError, "weight must be an array, got list"),
        (lambda: S(np.ones((3, M))), ValueError, "counts must be 4 numbers of rows, 3 in all, got None"),
        (lambda: S.forward(np.ones((3, M)), [1, 1, 0, 0]), ValueError, r".*, 3 in all, got \[1, 1, 0, 0\]$"),
        (lambda: S.forward(np.ones((3, M)), [1, 2, 0]), ValueError, "counts must be 4 numbers of rows, 3 in all, got"),
        (lambda: S.forward(np.ones((3, M)), [1, 2, 0, 0, 0]), ValueError, "counts must be 4 numbers of rows"),
        (lambda: S.forward(np.ones((1, 3, M)), [1, 1, 1, 0]), ValueError,
         r"x has shape \(1, 3, 5\), expected rows \(R, in\)$"),
        (lambda: Router(StackedLinear(np.ones((E, D))), 5), ValueError, "top_k must be at most 4, got 5"),
        (lambda: Router(StackedLinear(np.ones((E, D))), 0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Router(np.ones((E, D)), 1), TypeError, "weight must be a StackedLinear, got"),
        (lambda: Router(StackedLinear(np.ones((E, D))), 1, 1), TypeError, "norm_topk_prob must be True or False"),
        (lambda: R(np.ones((2, D + 1))), ValueError, "x has 7 entries .*, expected in_features = 6"),
        (lambda: Experts(S, S), ValueError, "down_proj is 5 -> 6 wide, expected m -> in with in = 5"),
        (lambda: Experts(StackedLinear(np.ones((2, 2 * M, D))), S), ValueError,
         "gate_up_proj is of 2 experts, 10 wide, expected 4 and 10, to go with down_proj"),
        (lambda: Experts(StackedLinear(np.ones((E, 2 * M + 1, D))), S), ValueError,
         "gate_up_proj is of 4 experts, 11 wide, expected 4 and 10"),
        (lambda: Experts(TWO.gate_up_proj, S, np.tanh), TypeError, "act_fn must be a Layer, got ufunc"),
        (
            lambda: MixtureOfExperts(R, TWO, GatedMLP(*[Linear(np.ones((D, D)))] * 3), Linear(np.ones((D, D)))),
            ValueError,
            "shared_expert_gate has 6 outputs, expected 1",
        ),
        (lambda: MixtureOfExperts(Router(StackedLinear(np.ones((3, D))), 2), TWO), ValueError,
         "gate scores 3 experts, and there are 4"),
        (lambda: MixtureOfExperts(R, TWO, None, Linear(np.ones((1, D)))), ValueError,
         "shared_expert and shared_expert_gate go together: give both or none$"),
        (lambda: StackedLoRA(np.ones((4, 5)), np.ones((3, 4)), 1, experts=3), ValueError,
         "lora_A has 4 rows, expected as many for each of 3 experts$"),
        (lambda: StackedLoRALinear(S, StackedLoRA(np.ones((2, M)), np.ones((D, 2)), 1, experts=2)), ValueError,
         "adapter is of 2 experts, and base has 4"),
        (lambda: balance(np.ones((2, 3), int), 1), TypeError, "scores has dtype int64, expected a float"),
        (lambda: balance(np.ones((2, 3)), 4), ValueError, "top_k must be at most 3, got 4"),
    ],
)  # fmt: skip
def test_what_makes_no_mixture_is_refused(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


# --- adapters -------------------------------------------------------------------------------------

NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(layer, names=NAMES, seed=3, **options):
    options = {"rank": 2, "alpha": 3, "rng": np.random.default_rng(seed), "target_parameters": names} | options
    return adapt(layer, options.pop("target_modules", []), **options)


def with_shared(seed=0):
    layer, shapes = mixture(seed), ((M, D), (M, D), (D, M), (1, D))
    linears = [Linear(randn([seed, 5, i], *shape)) for i, shape in enumerate(shapes)]
    return MixtureOfExperts(layer.gate, layer.experts, GatedMLP(*linears[:3]), linears[3])


def moved(model):
    for i, p in enumerate(model.trainable().values()):
        p += randn([9, i], *p.shape).astype(p.dtype) / 3
    return model


def test_an_adapted_mixture_starts_as_it_was_and_learns():
    layer, x = mixture(), randn(1, 9, D)
    model = adapted(layer, [*NAMES, "gate.weight"])
    assert (model(x) == layer(x)).all()
    assert list(model.trainable()) == [
        f"{path}.lora_{part}" for path in ("gate.weight", *NAMES) for part in "AB"
    ]  # fmt: skip
    target = layer(x) + randn(2, 9, D) / 10
    history = train(model, x, target, epochs=30, batch_size=9, lr=0.01, rng=np.random.default_rng(0))
    assert history.losses[-1] < 0.9 * history.losses[0]


def test_an_idle_expert_has_zeros_in_its_adapter_too():
    layer = mixture()
    layer.gate.weight.weight[3] = 0
    layer.gate.weight.weight[:3, 0], x = 1, np.abs(randn(1, 5, D))
    layer.gate.weight.weight[:3, 1:] = 0
    model = moved(adapted(layer, rank=3))
    _, cache = model.forward(x)
    _, grads = model.backward(randn(2, 5, D), cache)
    for name in ("gate_up_proj", "down_proj"):
        dA, dB = grads[f"experts.{name}.lora_A"], grads[f"experts.{name}.lora_B"]
        assert (dA[9:] == 0).all()
        assert (dB[:, 3::E] == 0).all()
        assert (dA[:6] != 0).any()
        assert (dB[:, 0::E] != 0).any()


def test_a_rank_that_gains_nothing_for_an_expert_is_said():
    """Of each expert's own widths, not of the packed factors; and of the router, whose rank is E at most."""
    layer = mixture()
    widths = {name: min(shape) for name, shape in zip(NAMES, ((2 * M, D), (D, M)), strict=True)}
    largest = min(widths.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(layer, rank=largest)
    narrow = next(name for name, width in widths.items() if width == largest)
    with pytest.warns(UserWarning, match=f"^rank {largest + 1} .* of 1 of .* '{narrow}': .* rank={largest} says"):
        adapted(layer, [narrow], rank=largest + 1)


def test_adapters_are_attached_again_and_merged_as_they_are():
    layer, x = mixture(), randn(1, 9, D)
    model = moved(adapted(layer, ["gate.weight", *NAMES], use_rslora=True))
    found = adapters(model)
    assert list(found) == ["gate.weight", *NAMES]
    for path, adapter in found.items():
        assert (adapter.rank, adapter.alpha) == (2, 3)
        assert np.isclose(adapter.scaling, 3 / 2**0.5)
        assert adapter.delta().shape == dict(walk(layer))[path].weight.shape
        assert adapter.lora_A is model.trainable()[f"{path}.lora_A"]
    assert (attach(layer, found)(x) == model(x)).all()
    merged = merge(model)
    np.testing.assert_allclose(merged(x), model(x), atol=1e-11)
    assert merged.trainable().keys() == layer.trainable().keys()


def test_a_mixtures_arrays_stay_as_they_are():
    layer = with_shared()
    before = {name: p.copy() for name, p in layer.trainable().items()}
    model = moved(adapted(layer, target_modules=["up_proj"]))
    y, cache = model.forward(randn(1, 9, D))
    model.backward(y, cache)
    merge(model)
    for name, p in layer.trainable().items():
        assert (p == before[name]).all()


@pytest.mark.parametrize(
    ("modules", "parameters", "reached"),
    [
        (["up_proj"], None, {"shared_expert.up_proj"}),
        (["down_proj"], None, {"shared_expert.down_proj"}),
        ([], ["down_proj"], {"experts.down_proj"}),
        ([], ["gate.weight"], {"gate.weight"}),
        (["up_proj"], ["experts.gate_up_proj"], {"shared_expert.up_proj", "experts.gate_up_proj"}),
        (
            "all-linear",
            None,
            {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")} | {"shared_expert_gate"},
        ),
        (".*up_proj", None, {"shared_expert.up_proj"}),
    ],
)
def test_a_name_reaches_what_peft_lets_it_reach(modules, parameters, reached):
    rng = np.random.default_rng(0)
    model = adapt(with_shared(), modules, rank=1, alpha=1, rng=rng, target_parameters=parameters)
    assert adapters(model).keys() == reached


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"names": ["experts.up"]}, ValueError,
         "target_parameters names 'experts.up', which is not an array of a mixture without an adapter; there are .*. "
         "The layers of a shared expert, and all others, belong in target_modules$"),
        ({"names": [*NAMES, "up_proj"]}, ValueError, "target_parameters names 'up_proj', which is not an array of a"),
        ({"names": "gate.weight"}, TypeError, "target_parameters must be a list of names, not an expression, got 'gat"),
        ({"use_dora": True}, ValueError, "target_parameters excludes use_dora, as in PEFT"),
        ({"init": "pissa"}, ValueError, "target_parameters excludes init='pissa', as in PEFT"),
        ({"target_modules": None}, TypeError, "target_modules must be a list of names or a regular expression"),
        ({"target_modules": ["nothing"]}, ValueError, r"target_modules=\['nothing'\] names no layer"),
        ({"names": [], "target_modules": []}, ValueError, r"target_modules=\[\] names no layer"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
        ({"alpha": 0}, ValueError, "alpha must be above 0"),
        ({"layer": adapted(mixture(), NAMES[:1])}, ValueError,
         r".* without an adapter; there are .'gate.weight', 'experts.down_proj'"),
    ],
)  # fmt: skip
def test_what_adapt_refuses_draws_no_number(change, error, message):
    rng = np.random.default_rng(5)
    before = rng.bit_generator.state
    with pytest.raises(error, match=f"^{message}"):
        adapted(**{"layer": mixture(), "names": NAMES[:1], "rng": rng} | change)
    assert rng.bit_generator.state == before


@pytest.mark.parametrize(
    ("path", "adapter", "message"),
    [
        ("experts.down_proj", LoRA(np.ones((8, M)), np.ones((D, 8)), 1),
         r"adapters\['experts.down_proj'\]: adapter must be a StackedLoRA, got LoRA$"),
        ("experts.down_proj", StackedLoRA(np.ones((6, M)), np.ones((D, 6)), 1, experts=3),
         "adapters.*: adapter is of 3 experts, and base has 4"),
        ("shared_expert.up_proj", StackedLoRA(np.ones((2, D)), np.ones((M, 2)), 1),
         "adapters.*: adapter is of kind 'parameter', expected 'linear' for Linear"),
        ("experts", StackedLoRA(np.ones((2, D)), np.ones((M, 2)), 1),
         "adapters names .*, which are not layers without an adapter; there are"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(path, adapter, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        attach(with_shared(), {path: adapter})


def test_one_seed_gives_one_adapter_on_every_device(place):
    layer = mixture(dtype="float32")
    here, there = (adapted(put, seed=4) for put in (rebuild(layer, array=place.put), layer))
    for name, p in there.trainable().items():
        place.assert_same(here.trainable()[name], p)
