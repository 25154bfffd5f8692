"""What must hold for a layer, a loss or an optimizer: functions that raise `ClaimBroken` where it does not.

The tests hand them the layers of this library, which must pass, and layers that are wrong on purpose, which must not.
A claim knows arrays and the protocol of `minilora.layer`, and nothing of how a layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora import Adapter, Conv1d, Linear, adapters, attach, merge
from minilora.conformance.problems.problem import Problem
from minilora.layer import freeze
from minilora.variants.sums import discarded, singular_values
from minilora.verify.gradcheck import gradcheck

Arrays = dict[str, np.ndarray]
Loss = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]


@dataclass(frozen=True)
class SmallIntegers(Problem):
    """The same in integers from -2 to 2: with alpha / r a power of two, even float16 computes these exactly."""

    def randn(self, name: str, *shape: int) -> np.ndarray:
        """Return the values rounded."""
        values: np.ndarray = np.rint(super().randn(name, *shape)).clip(-2, 2)
        return values


class ClaimBroken(AssertionError):
    """A claim does not hold; the message says where."""


@dataclass(frozen=True)
class Case:
    """A layer to be judged: how it is built from arrays, and what its forward should give."""

    name: str  # for a report
    arrays: Callable[[Problem], Arrays]  # its parameters in float64, under the names of its `trainable`
    build: Callable[[Problem, Arrays], Any]  # the layer, with arrays that may be complex, or of any precision
    reference: Callable[[Problem, Arrays, np.ndarray], np.ndarray]  # the output for x, computed in another way
    input: Callable[[Problem], np.ndarray] = lambda problem: problem.x  # x; Gaussian (n, in) by default
    claims: tuple[Callable[[Case, Problem], None], ...] = ()  # what is claimed of it, for whoever runs the case
    may_be_zero: tuple[str, ...] = ()  # whose slopes are all zero at some problems, where `gradcheck` would refuse

    def params(self, problem: Problem) -> Arrays:
        """Return the input and the parameters: all that the output depends on."""
        return {"x": self.input(problem), **self.arrays(problem)}

    def output(self, problem: Problem) -> Callable[[Arrays], np.ndarray]:
        """Return the forward as a function of `params`, as `gradcheck` takes it."""
        return lambda p: self.build(problem, p)(p["x"])

    def dy(self, problem: Problem, name: str = "dy") -> np.ndarray:
        """Return a Gaussian gradient at the output."""
        return problem.randn(name, *self.output(problem)(self.params(problem)).shape)

    def gradients(self, problem: Problem, params: Arrays, dy: np.ndarray) -> Arrays:
        """Return what the backward gives for the input and the parameters."""
        layer = self.build(problem, params)
        dx, grads = layer.backward(dy, layer.forward(params["x"])[1])
        return {"x": dx, **grads}


def require(condition: Any, message: str) -> None:
    """Raise `ClaimBroken` unless the condition holds."""
    if not condition:
        raise ClaimBroken(message)


def require_close(name: str, value: Any, expected: Any, tolerance: float) -> None:
    """Compare as gradcheck does: absolutely below 1, relative to the largest entry above."""
    require(np.shape(value) == np.shape(expected), f"{name} has shape {np.shape(value)}, expected {np.shape(expected)}")
    if np.size(expected):
        error, allowed = np.max(np.abs(value - expected)), tolerance * max(1.0, np.max(np.abs(expected)))
        require(error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.1g}")


def require_same(name: str, value: Any, expected: Any) -> None:
    """Compare bit by bit."""
    if not np.array_equal(value, expected, equal_nan=True):
        # The message takes longer than the comparison, so it is made only here.
        raise ClaimBroken(f"{name} differs: {value} and {expected}")


def _require_all_close(grads: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float) -> None:
    require(grads.keys() == expected.keys(), f"gradients of {sorted(grads)}, expected of {sorted(expected)}")
    for name, grad in grads.items():
        require_close(f"the gradient of {name}", grad, expected[name], tolerance)


def _require_all_same(grads: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    require(grads.keys() == expected.keys(), f"gradients of {sorted(grads)}, expected of {sorted(expected)}")
    for name, grad in grads.items():
        require_same(f"the gradient of {name}", grad, expected[name])


# --- a layer's forward and backward ---------------------------------------------------------------


def forward_is_the_reference(case: Case, problem: Problem) -> None:
    """The output is what another way of computing it gives."""
    params = case.params(problem)
    layer = case.build(problem, params)
    expected = case.reference(problem, params, params["x"])
    require_close("the output", layer(params["x"]), expected, 1e-13)
    require_close("the output", layer.forward(params["x"])[0], expected, 1e-13)


def backward_is_the_slope_of_forward(case: Case, problem: Problem) -> None:
    """By complex step to 1e-12, and by central differences."""
    params, dy = case.params(problem), case.dy(problem)
    grads, f = case.gradients(problem, params, dy), case.output(problem)
    zero = case.may_be_zero
    gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12, allow_zero=zero)
    gradcheck(f, params, grads, cotangent=dy, method="central", tolerance=1e-8, allow_zero=zero)


def float32_follows_float64(case: Case, problem: Problem) -> None:
    """In single precision everything is of that precision, and close to the same in double precision."""
    params, dy = case.params(problem), case.dy(problem).astype(np.float32)
    single = {name: p.astype(np.float32) for name, p in params.items()}
    exact = {name: p.astype(np.float64) for name, p in single.items()}
    answers = {"y": case.output(problem)(single), **case.gradients(problem, single, dy)}
    expected = {"y": case.output(problem)(exact), **case.gradients(problem, exact, dy.astype(np.float64))}
    for name, array in answers.items():
        require(array.dtype == np.float32, f"{name} is {array.dtype} for float32")
        require(expected[name].dtype == np.float64, f"{name} is {expected[name].dtype} for float64")
    _require_all_close(answers, expected, 5e-5)


def backward_is_pure(case: Case, problem: Problem) -> None:
    """Twice the same bits; nothing the caller holds is changed, or handed back under another name."""
    params, dy = case.params(problem), case.dy(problem)
    held = {**params, "dy": dy}
    before = {name: array.copy() for name, array in held.items()}
    layer = case.build(problem, params)
    y, cache = layer.forward(params["x"])
    require(not np.shares_memory(y, params["x"]), "the output shares memory with the input")
    first, second = ({"x": dx, **grads} for dx, grads in (layer.backward(dy, cache) for _ in range(2)))
    for name, array in held.items():
        require_same(f"{name} after the backward", array, before[name])
    _require_all_same(first, second)
    for name, grad in first.items():
        shared = any(np.shares_memory(grad, array) for array in (*held.values(), y, second[name]))
        require(not shared, f"the gradient of {name} shares memory with what the caller holds")


def backward_is_linear_in_the_cotangent(case: Case, problem: Problem) -> None:
    """The backward of a sum is the sum of the backwards, and of zero it is zero."""
    params, dy, other = case.params(problem), case.dy(problem), case.dy(problem, "target")
    first, second = case.gradients(problem, params, dy), case.gradients(problem, params, other)
    both = case.gradients(problem, params, 2 * dy - 3 * other)
    _require_all_close(both, {name: 2 * first[name] - 3 * second[name] for name in first}, 1e-11)
    nothing = case.gradients(problem, params, 0 * dy)
    _require_all_same(nothing, {name: np.zeros_like(grad) for name, grad in first.items()})


def backward_knows_no_large_and_no_small(case: Case, problem: Problem) -> None:
    """Scaled by a power of two, dy gives the same digits."""
    for dtype in (np.float32, np.float64):
        params = {name: p.astype(dtype) for name, p in case.params(problem).items()}
        dy = case.dy(problem).astype(dtype)
        once = case.gradients(problem, params, dy)
        for power in (-60, 60):
            scaled = case.gradients(problem, params, np.ldexp(dy, power))
            _require_all_same(scaled, {name: np.ldexp(grad, power) for name, grad in once.items()})


def backward_without_dx_is_the_same(case: Case, problem: Problem) -> None:
    """need_dx=False gives None for dx, and the same gradients under the names of trainable()."""
    params, dy = case.params(problem), case.dy(problem)
    layer = case.build(problem, params)
    _, cache = layer.forward(params["x"])
    _, grads = layer.backward(dy, cache)
    dx, alone = layer.backward(dy, cache, need_dx=False)
    require(dx is None, "dx is not None where nobody asked for it")
    require(grads.keys() == layer.trainable().keys(), f"gradients of {list(grads)}, not of {list(layer.trainable())}")
    _require_all_same(alone, grads)


def a_frozen_layer_only_passes_dx(case: Case, problem: Problem) -> None:
    """Frozen, a layer gives the same output and the same dx, and no gradient."""
    params, dy = case.params(problem), case.dy(problem)
    layer = case.build(problem, params)
    frozen = freeze(layer)
    (y, cache), (frozen_y, frozen_cache) = layer.forward(params["x"]), frozen.forward(params["x"])
    require_same("the frozen output", frozen_y, y)
    dx, grads = frozen.backward(dy, frozen_cache)
    require_same("the frozen dx", dx, layer.backward(dy, cache)[0])
    require(not grads and not frozen.trainable(), f"a frozen layer has gradients of {list(grads)}")


def memory_order_makes_no_difference(case: Case, problem: Problem) -> None:
    """Values count, not how they lie: Fortran order, every other entry of a larger array, backwards."""
    layouts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "Fortran": lambda a: a.copy(order="F"),
        "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        "backwards": lambda a: a[::-1].copy()[::-1],
    }
    params, dy = case.params(problem), case.dy(problem)
    y, grads = case.output(problem)(params), case.gradients(problem, params, dy)
    for lay in layouts.values():
        moved = {name: lay(p) for name, p in params.items()}
        require_close("the output", case.output(problem)(moved), y, 1e-13)
        _require_all_close(case.gradients(problem, moved, lay(dy)), grads, 1e-13)


def a_layer_remembers_nothing_but_its_cache(case: Case, problem: Problem) -> None:
    """Two forwards, then both backwards; then other numbers in the same arrays. Each time as from a new layer."""
    for dtype in (np.float32, np.float64):
        params = {name: p.astype(dtype) for name, p in case.params(problem).items()}
        layer, x, dy = case.build(problem, params), params["x"], case.dy(problem).astype(dtype)
        other = x[::-1] + np.ones_like(x)
        (y, cache), (other_y, other_cache) = layer.forward(x), layer.forward(other)
        require(not np.shares_memory(y, other_y), "two outputs share memory")
        for input, output, c in ((x, y, cache), (other, other_y, other_cache)):
            new = case.build(problem, params)
            expected, new_cache = new.forward(input)
            require_same("the output", output, expected)
            (dx, grads), (new_dx, new_grads) = layer.backward(dy, c), new.backward(dy, new_cache)
            _require_all_same({"x": dx, **grads}, {"x": new_dx, **new_grads})
        layer(x)
        for p in params.values():
            p[...] = p[::-1].copy() + 1
        require_same("the output for new numbers", layer(x), case.build(problem, params)(x))


def no_rows_give_no_rows(case: Case, problem: Problem) -> None:
    """An empty batch has an empty output, an empty dx, and gradients of zero."""
    params = case.params(problem)
    layer, x = case.build(problem, params), params["x"]
    y, cache = layer.forward(x[:0])
    require(y.shape == (0, *layer(x).shape[1:]), f"no rows give an output of shape {y.shape}")
    dx, grads = layer.backward(y, cache)
    require(dx.shape == x[:0].shape, f"no rows give a dx of shape {dx.shape}")
    _require_all_same(grads, {name: np.zeros_like(p) for name, p in layer.trainable().items()})


CLAIMS = (
    forward_is_the_reference,
    backward_is_the_slope_of_forward,
    float32_follows_float64,
    backward_is_pure,
    backward_is_linear_in_the_cotangent,
    backward_knows_no_large_and_no_small,
    backward_without_dx_is_the_same,
    a_frozen_layer_only_passes_dx,
    memory_order_makes_no_difference,
    a_layer_remembers_nothing_but_its_cache,
    no_rows_give_no_rows,
)
"""Of every layer."""


def leading_axes_are_rows(case: Case, problem: Problem) -> None:
    """(2, n, in) and (2 n, in) are the same rows; a vector (in,) is one row; (2, 0, in) has no rows."""
    params = case.params(problem)
    layer = case.build(problem, params)
    x = problem.randn("leading x", 2, problem.n, problem.in_features)
    y, cache = layer.forward(x)
    dy = problem.randn("leading dy", *y.shape)
    dx, grads = layer.backward(dy, cache)
    for shape in ((2 * problem.n,), (problem.n, 1, 2), (1, 2 * problem.n)):
        flat_y, flat_cache = layer.forward(x.reshape(*shape, -1))
        flat_dx, flat_grads = layer.backward(dy.reshape(*shape, -1), flat_cache)
        require_close("the output", flat_y.reshape(y.shape), y, 1e-13)
        require_close("dx", flat_dx.reshape(dx.shape), dx, 1e-13)
        _require_all_close(flat_grads, grads, 1e-13)
    y, cache = layer.forward(x[0, 0])
    row_y, row_cache = layer.forward(x[0, :1])
    (dx, grads), (row_dx, row_grads) = layer.backward(dy[0, 0], cache), layer.backward(dy[0, :1], row_cache)
    require_close("the output of a vector", y, row_y[0], 1e-13)
    require_close("dx of a vector", dx, row_dx[0], 1e-13)
    _require_all_close(grads, row_grads, 1e-13)
    for name, grad in grads.items():
        require(not np.shares_memory(grad, dy), f"the gradient of {name} is dy's own memory")
    require(layer(x[:, :0]).shape == (2, 0, problem.out_features), "(2, 0, in) does not give (2, 0, out)")


ROW_CLAIMS = (leading_axes_are_rows,)
"""Of a layer that treats each row alone."""


def a_step_of_one_measures_the_slope_exactly(case: Case, problem: Problem) -> None:
    """The output is linear in each array, so a central difference has no truncation error, at any step."""
    params, dy = case.params(problem), case.dy(problem)
    grads, f = case.gradients(problem, params, dy), case.output(problem)
    options = {"step": 1.0, "tolerance": 1e-12, "allow_zero": case.may_be_zero}
    gradcheck(f, params, grads, cotangent=dy, method="central", **options)


def every_precision_is_exact_on_small_integers(case: Case, problem: Problem) -> None:
    """Products and sums of small integers have no rounding, also in float16."""
    integers = SmallIntegers(**{**vars(problem), "alpha": 2.0 * problem.rank})
    exact, dy = case.params(integers), case.dy(integers)
    expected = {"y": case.output(integers)(exact), **case.gradients(integers, exact, dy)}
    for dtype in (np.float16, np.float32):
        params = {name: p.astype(dtype) for name, p in exact.items()}
        answers = {"y": case.output(integers)(params), **case.gradients(integers, params, dy.astype(dtype))}
        _require_all_same(answers, expected)
        for name, array in answers.items():
            require(array.dtype == dtype, f"{name} is {array.dtype} for {np.dtype(dtype)}")


LINEAR_CLAIMS = (a_step_of_one_measures_the_slope_exactly, every_precision_is_exact_on_small_integers)
"""Of a layer whose output is linear in each of its arrays."""


# --- the adapter ----------------------------------------------------------------------------------


def delta_is_the_matrix_of_forward(cls: Callable[..., Any], problem: Problem) -> None:
    """The output is x times the change of weight that the adapter says it stands for."""
    lora = cls(**problem.factors, alpha=problem.alpha)
    delta = lora.delta()
    require(delta.shape == (problem.out_features, problem.in_features), f"delta has shape {delta.shape}")
    require_close("x delta^T", problem.x @ delta.T, lora(problem.x), 1e-13)


def merging_changes_no_output(case: Case, problem: Problem) -> None:
    """With the adapters folded into new weights, the model's or the layer's own way."""
    params = case.params(problem)
    layer = case.build(problem, params)
    y = layer(params["x"])
    require_close("the merged output", merge(layer)(params["x"]), y, 1e-11)
    if hasattr(layer, "merge"):
        merged, held = layer.merge(), [*vars(layer.base).values(), *params.values(), *layer.trainable().values()]
        arrays = [other for other in held if isinstance(other, np.ndarray)]
        for array in vars(merged).values():
            shared = isinstance(array, np.ndarray) and any(np.shares_memory(array, other) for other in arrays)
            require(not shared, "what is merged shares memory with its base or its adapter")
        require_close("the layer's own merged output", merged(params["x"]), y, 1e-11)
        if isinstance(layer.base, Linear):
            require_close("W + delta", layer.base.weight + layer.delta(), layer.merge().weight, 1e-12)


def terms_of(problem: Problem, *, more: int) -> list[Adapter]:
    """Three adapters, every other one with rsLoRA's scaling, each of `more` ranks more than the last."""
    return [
        Adapter(
            problem.randn(f"A{i}", problem.rank + more * i, problem.in_features),
            problem.randn(f"B{i}", problem.out_features, problem.rank + more * i),
            problem.alpha + i,
            use_rslora=i % 2 == 1,
        )
        for i in range(3)
    ]


def sums_are_exact(weighted_sum: Callable[..., Any], problem: Problem) -> None:
    """With weights below zero and of zero; of one rank also by factors that are added, with their cross terms."""
    for weights in ((1, 1, 1), (1, -1, 0.5), (-2, 0, 3), problem.randn("weights", 3)):
        terms, alike = terms_of(problem, more=1), terms_of(problem, more=0)
        total, added = weighted_sum(terms, weights), weighted_sum(alike, weights, "linear")
        expected = sum(w * term.delta() for w, term in zip(weights, terms, strict=True))
        require_close("the sum", total.delta(), expected, 1e-12)
        require_close("the output of the sum", total(problem.x), problem.x @ expected.T, 1e-12)
        require(total.rank == sum(term.rank for term in terms), f"the sum has rank {total.rank}")
        require((added.rank, added.scaling) == (problem.rank, 1), f"added: {added.rank}, {added.scaling}")
        expected = np.zeros(added.shape)
        for w, term in zip(weights, alike, strict=True):
            for v, other in zip(weights, alike, strict=True):
                c, d = w * term.scaling, v * other.scaling
                expected += (c if term is other else np.sign(d) * abs(c * d) ** 0.5) * term.lora_B @ other.lora_A
        require_close("the factors added", added.delta(), expected, 1e-12)


def the_best_rank_leaves_the_discarded_values(best: Callable[..., Any], problem: Problem) -> None:
    """No matrix of that rank is nearer than the singular values that are left out."""
    lora = terms_of(problem, more=1)[1]
    values = np.linalg.svd(lora.delta(), compute_uv=False)
    most = min(lora.rank, *lora.shape)
    require_close("the singular values", singular_values(lora), values[:most], 1e-11)
    for r in range(1, most + 1):
        error, found = np.linalg.norm(values[r:]), best(lora, r)
        require(found.rank == r, f"the best of rank {r} has rank {found.rank}")
        require_close("the error", np.linalg.norm(lora.delta() - found.delta()), error, 1e-11)
        require_close("the error that is told", discarded(lora, r), error, 1e-11)


def rslora_divides_by_the_root(scaling: Callable[..., float], problem: Problem) -> None:
    """And plain LoRA by the rank."""
    for use_rslora, power in ((True, 0.5), (False, 1)):
        found = scaling(problem.alpha, problem.rank, use_rslora=use_rslora)
        require_close("the scaling", found, problem.alpha / problem.rank**power, 1e-14)


def adapted_begins_as_its_base(adapt: Callable[..., Any], problem: Problem) -> None:
    """By every start, rank-stabilised or not; and when it has moved, it is the same over the original base."""
    layers = (Linear(**problem.full), problem.x), (Conv1d(problem.full["weight"][..., None]), problem.x[..., None])
    starts: tuple[dict[str, Any], ...] = (
        {},
        {"use_dora": True},
        {"init": "pissa"},
        {"init": "pissa", "use_dora": True},
    )
    rank, rng = min(problem.rank, problem.in_features, problem.out_features), np.random.default_rng(problem.seed)
    for layer, x in layers:
        for options in (start | {"use_rslora": root} for start in starts for root in (False, True)):
            adapted = adapt(layer, "", rank=rank, alpha=problem.alpha, rng=rng, **options)
            require_close(f"the output with {options}", adapted(x), layer(x), 1e-11)
            for array in adapted.trainable().values():
                array += 0.1
            again = attach(layer, adapters(adapted))
            require_close(f"over the original base with {options}", again(x), adapted(x), 1e-11)


# --- the loss -------------------------------------------------------------------------------------


def mse_is_the_mean_written_out(loss: Loss, problem: Problem) -> None:
    """The mean of squares, one entry after another."""
    prediction, target = problem.dy, problem.target
    terms = [(prediction[i] - target[i]) ** 2 for i in np.ndindex(prediction.shape)]
    require_close("the loss", loss(prediction, target)[0], np.array(sum(terms) / len(terms)), 1e-14)


def mse_gradient_is_its_slope(loss: Loss, problem: Problem) -> None:
    """By complex step in float64, and float32 follows."""
    prediction, target = problem.dy, problem.target
    _, gradient = loss(prediction, target)
    f, params = (lambda p: loss(p["prediction"], target)[0]), {"prediction": prediction}
    gradcheck(f, params, {"prediction": gradient}, tolerance=1e-12)
    single, single_gradient = loss(prediction.astype(np.float32), target.astype(np.float32))
    for name, array in (("the loss", single), ("its gradient", single_gradient)):
        require(array.dtype == np.float32, f"{name} is {array.dtype} for float32")
    require_close("the gradient", single_gradient, gradient, 5e-5)


MSE_CLAIMS = (mse_is_the_mean_written_out, mse_gradient_is_its_slope)


def cross_entropy_is_the_mean_over_what_counts(loss: Loss, problem: Problem) -> None:
    """The loss written out over the rows that count, and its gradient by complex step."""
    logits = problem.randn("logits", 4 + problem.n, 2 + problem.out_features)
    targets = np.random.default_rng(problem.seed).integers(0, logits.shape[1], len(logits))
    targets[1::3] = -100
    terms = [math.log(sum(math.exp(v - z[t]) for v in z)) for z, t in zip(logits, targets, strict=True) if t >= 0]
    value, gradient = loss(logits, targets)
    require_close("the loss", value, np.array(sum(terms) / len(terms)), 1e-13)
    gradcheck(lambda p: loss(p["z"], targets)[0], {"z": logits}, {"z": gradient}, tolerance=1e-12)


def balance_is_the_sum_written_out(balance: Callable[..., Any], problem: Problem) -> None:
    """Expert by expert, and its gradient by complex step."""
    E, K = 3 + problem.rank % 3, 2
    scores = problem.randn("scores", 3 + problem.n, E)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    choice = np.argsort(-scores, axis=1)[:, :K]
    terms = [sum(e in row for row in choice) / len(p) * p[:, e].mean() for e in range(E)]
    value, gradient = balance(scores, K)
    require_close("the loss", value, np.array(E * sum(terms)), 1e-13)
    params = {"scores": scores}
    gradcheck(lambda p: balance(p["scores"], K)[0], params, {"scores": gradient}, method="complex", tolerance=1e-12)


# --- the optimizer --------------------------------------------------------------------------------


def adam_is_algorithm_1_in_scalars(cls: Callable[..., Any], problem: Problem) -> None:
    """Follow one number at a time through Algorithm 1, in Python floats."""
    lr, beta1, beta2, eps = 0.03, 0.8, 0.95, 1e-3  # an eps large enough for its place to be seen
    params = {name: p.copy() for name, p in problem.factors.items()}
    optimizer = cls(params, lr=lr, betas=(beta1, beta2), eps=eps)
    steps = [{name: problem.randn(f"{name} {t}", *p.shape) for name, p in params.items()} for t in range(4)]
    for grads in steps:
        optimizer.step(grads)
    for name, p in params.items():
        for i in np.ndindex(p.shape):
            theta, m, v = float(problem.factors[name][i]), 0.0, 0.0
            for t, grads in enumerate(steps, start=1):
                g = float(grads[name][i])
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * g**2
                theta -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)) ** 0.5 + eps)
            require_close(f"{name}{list(i)} after four steps", p[i], theta, 1e-13)


def adam_first_step_is_lr_whatever_the_scale(cls: Callable[..., Any], problem: Problem) -> None:
    """The first step is -lr sign(g), and scaling all gradients changes none of the steps."""
    moved = []
    signs = (-1.0) ** np.arange(problem.in_features)
    for scale in (1.0, 1e6):
        params = {"p": np.zeros(problem.in_features)}
        g = {"p": scale * (1 + np.abs(problem.randn("g", problem.in_features))) * signs}
        optimizer = cls(params, lr=0.01)
        optimizer.step(g)
        require_close("the first step", params["p"], -0.01 * np.sign(g["p"]), 1e-9)
        for _ in range(3):
            optimizer.step(g)
        moved.append(params["p"])
    require_close("four steps of larger gradients", moved[0], moved[1], 1e-9)


def adam_stands_still_without_gradient(cls: Callable[..., Any], problem: Problem) -> None:
    """Gradients of zero from the first step on move nothing."""
    params = {name: p.copy() for name, p in problem.factors.items()}
    optimizer = cls(params)
    for _ in range(3):
        optimizer.step({name: np.zeros_like(p) for name, p in params.items()})
    for name, p in params.items():
        require_same(name, p, problem.factors[name])


ADAM_CLAIMS = (
    adam_is_algorithm_1_in_scalars,
    adam_first_step_is_lr_whatever_the_scale,
    adam_stands_still_without_gradient,
)
