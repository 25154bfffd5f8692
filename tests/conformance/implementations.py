"""Implementations for the suite to check: this library's layers, and the suite's own trials with planted mistakes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np

from minilora import Adam, Adapter, Conv1d, Conv2d, Embedding, Linear, LoRA, LoRALinear, QuantizedLinear, weighted_sum
from minilora.conformance import check
from minilora.conformance.problems.formulas import AdamFormulas, StartFormulas
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import UNIT, drawn, round_to
from minilora.layers.stacked import StackedLinear
from minilora.variants.adapter import AdaptedRows
from minilora.variants.dora import DoRA, DoRAAdapter, lengths
from minilora.variants.stackedlora import StackedLoRA, StackedLoRALinear

from .foreign import dropout, fused


def functions_of(layer, **more):
    """Return a layer of this library as functions; `layer(weight, bias, A, B, alpha, magnitude, **steps)` builds it."""

    def forward(x, *arrays, **steps):
        return layer(*arrays, **steps)(x)

    def backward(dy, x, weight, bias, A, B, *more, **steps):
        built = layer(weight, bias, A, B, *more, **steps)
        dx, grads = built.backward(dy, built.forward(x)[1])
        shaped = {"lora_A": grads["lora_A"].reshape(A.shape), "lora_B": grads["lora_B"].reshape(B.shape)}
        return {"x": dx, **grads, **shaped}

    def merge(weight, *arrays, **steps):
        return layer(weight, None, *arrays, **steps).merge().weight

    return SimpleNamespace(**{"forward": forward, "backward": backward, "merge": merge, **more})


def with_steps(function):
    """Add the options of a convolution to a function's signature, since the suite passes only those that are in it."""

    def named(*arrays, stride=1, padding=0, dilation=1):
        return function(*arrays, stride=stride, padding=padding, dilation=dilation)

    return named


def adapter(A, B, alpha, **more):
    return Adapter(A.reshape(len(A), -1), B.reshape(len(B), -1), alpha, **more)


def linear(weight, bias, A, B, alpha):
    return LoRALinear(Linear(weight, bias), LoRA(A, B, alpha))


def rslora(weight, bias, A, B, alpha):
    return LoRALinear(Linear(weight, bias), Adapter(A, B, alpha, use_rslora=True))


def dora(weight, bias, A, B, alpha, magnitude, *, norm="constant"):
    return DoRA(Linear(weight, bias), DoRAAdapter(A, B, alpha, magnitude=magnitude, dora_norm=norm))


def embedding(weight, bias, A, B, alpha):
    assert bias is None
    return AdaptedRows(Embedding(weight), adapter(A, B, alpha, kind="embedding"))


def convolution(weight, bias, A, B, alpha, **steps):
    base, kind = {3: (Conv1d, "conv1d"), 4: (Conv2d, "conv2d")}[weight.ndim]
    return AdaptedRows(base(weight, bias, **steps), adapter(A, B, alpha, kind=kind, kernel=weight.shape[2:]))


def init(in_features, out_features, rank, rng, kernel=()):
    lora = LoRA.init(in_features * math.prod(kernel), out_features, rank=rank, alpha=1, rng=rng, dtype="float64")
    ones = (1,) * len(kernel)
    return lora.lora_A.reshape(rank, in_features, *kernel), lora.lora_B.reshape(out_features, rank, *ones)


def dora_init(in_features, out_features, rank, rng, weight):
    A, B = init(in_features, out_features, rank, rng)
    return A, B, lengths(weight + Adapter(A, B, 1).delta())


def step(params, grads, state):
    state = state or Adam(params)
    state.step(grads)
    return state.params, state


def conv_functions():
    functions = functions_of(convolution, init=init)
    return SimpleNamespace(**vars(functions) | {f: with_steps(getattr(functions, f)) for f in ("forward", "backward")})


def full_norm(*arrays, **more):
    return dora(*arrays, norm="full", **more)


def four_bits(packed, absmax, bias, A, B, alpha, nested_absmax=None, mean=0.0):
    shape = (len(B), A.shape[1])
    nested = {} if nested_absmax is None else {"nested_absmax": nested_absmax, "mean": mean}
    return LoRALinear(QuantizedLinear(packed, absmax, shape, bias, dtype=A.dtype, **nested), LoRA(A, B, alpha))


def nf4_functions():
    """Return the functions of a layer in four bits, whose base is two arrays."""

    def forward(x, *arrays, nested_absmax=None, mean=0.0):
        return four_bits(*arrays, nested_absmax, mean)(x)

    def backward(dy, x, *arrays, nested_absmax=None, mean=0.0):
        built = four_bits(*arrays, nested_absmax, mean)
        dx, grads = built.backward(dy, built.forward(x)[1])
        return {"x": dx, **grads}

    def merge(packed, absmax, A, B, alpha, nested_absmax=None, mean=0.0):
        return four_bits(packed, absmax, None, A, B, alpha, nested_absmax, mean).merge().weight

    return SimpleNamespace(forward=forward, backward=backward, merge=merge, init=init)


def beside_bfloat16():
    """Return our float32 adapter on our base, with the base's outputs rounded to bfloat16."""

    def half(array):
        return round_to(array, "bfloat16")

    def forward(x, weight, bias, A, B, alpha):
        return half(half(Linear(weight, bias)(x)) + LoRA(A, B, alpha)(x))

    def backward(dy, x, weight, bias, A, B, alpha):
        lora = LoRA(A, B, alpha)
        dx, grads = lora.backward(dy, lora.forward(x)[1])
        return {"x": half(half(Linear(weight, bias).input_gradient(dy)) + half(dx)), **grads}

    def merge(weight, A, B, alpha):
        return half(LoRALinear(Linear(weight), LoRA(A, B, alpha)).merge().weight)

    return SimpleNamespace(forward=forward, backward=backward, merge=merge, init=init)


def stacked():
    """Return our stack of experts with our adapter, both of which process the rows expert by expert."""

    def adapter(weight, A, B, alpha):
        return StackedLoRALinear(StackedLinear(weight), StackedLoRA(A, B, alpha, experts=len(weight)))

    def ordered(weight, expert_ids):
        ids = expert_ids.reshape(-1)
        order = np.argsort(ids, kind="stable")
        return order, np.argsort(order), np.bincount(ids, minlength=len(weight)).tolist()

    def forward(x, weight, A, B, alpha, expert_ids):
        order, back, counts = ordered(weight, expert_ids)
        y, _ = adapter(weight, A, B, alpha).forward(x.reshape(-1, x.shape[-1])[order], counts)
        return y[back].reshape(*x.shape[:-1], -1 if y.size else y.shape[1])

    def backward(dy, x, weight, A, B, alpha, expert_ids):
        order, back, counts = ordered(weight, expert_ids)
        layer = adapter(weight, A, B, alpha)
        _, cache = layer.forward(x.reshape(-1, x.shape[-1])[order], counts)
        dx, grads = layer.backward(dy.reshape(-1, dy.shape[-1])[order], cache)
        return {"x": dx[back].reshape(x.shape), **grads}

    def merge(weight, A, B, alpha):
        return adapter(weight, A, B, alpha).merge().weight

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


def summed(kind):
    """Return our combination of adapters as a change of weight."""

    def combined(As, Bs, alphas, stabilised, weights, rank=None):
        terms = [Adapter(A, B, alpha, use_rslora=root)
                 for A, B, alpha, root in zip(As, Bs, alphas, stabilised, strict=True)]  # fmt: skip
        return weighted_sum(terms, weights, kind, rank).delta()

    return combined


def of_others(layer, **more):
    """Return foreign functions for a kind that this library has no layer for."""
    return SimpleNamespace(forward=layer.forward, backward=layer.backward, merge=layer.merge, **more)


OURS = {
    "linear": functions_of(linear, init=init, step=step),
    "rslora": functions_of(rslora, init=init),
    "dora": functions_of(dora, init=dora_init),
    "embedding": functions_of(embedding, init=lambda i, o, r, rng: (np.zeros((r, i)), rng.standard_normal((o, r)))),
    "conv1d": conv_functions(),
    "conv2d": conv_functions(),
    "dropout": of_others(dropout, init=init),
    "nf4": nf4_functions(),
    "mixed": beside_bfloat16(),
    "fused": of_others(fused),
    "experts": stacked(),
    "combine": SimpleNamespace(cat=summed("cat"), linear=summed("linear"), svd=summed("svd")),
}


def with_kinds(**kinds):
    """Return our linear layer with further kinds; a kind may also replace the linear one."""
    first = kinds.pop("linear", OURS["linear"])
    return SimpleNamespace(**vars(first), kinds=kinds)


def implementation(**functions):
    return SimpleNamespace(**{**vars(OURS["linear"]), **functions})


# --- plain NumPy ----------------------------------------------------------------------------------


def positive_first(terms):
    """Sort positive terms before negative ones, the order with the largest partial sums."""
    return np.take_along_axis(terms, np.argsort(terms < 0, axis=-1, kind="stable"), axis=-1)


ORDERS = {
    "positive first": positive_first,
    "first to last": lambda terms: terms,
    "last to first": lambda terms: terms[..., ::-1],
    "from the largest": lambda terms: np.sort(terms, axis=-1)[..., ::-1],
    "large ones first": lambda terms: np.take_along_axis(terms, np.argsort(-np.abs(terms), axis=-1), axis=-1),
    "small ones first": lambda terms: np.take_along_axis(terms, np.argsort(np.abs(terms), axis=-1), axis=-1),
}


def product(order):
    """Return a matrix product that adds its terms one by one in a given order."""

    def of(left, right):
        terms = order(left[:, None, :] * right.T[None])
        return np.cumsum(terms, axis=-1, dtype=left.dtype)[..., -1]

    return of


def lora(mm, factor=lambda alpha, r: alpha / r):
    """Return a LoRA that uses a given matrix product and scaling."""

    def scaling(weight, A, alpha):
        return weight.dtype.type(factor(alpha, len(A)))

    def forward(x, weight, bias, A, B, alpha):
        y = mm(x, weight.T) + scaling(weight, A, alpha) * mm(mm(x, A.T), B.T)
        return y if bias is None else y + bias

    def backward(dy, x, weight, bias, A, B, alpha):
        dh = scaling(weight, A, alpha) * mm(dy, B)
        s = scaling(weight, A, alpha)
        return {"x": mm(dy, weight) + mm(dh, A), "lora_A": mm(dh.T, x), "lora_B": s * mm(dy.T, mm(x, A.T))}

    def merge(weight, A, B, alpha):
        return weight + scaling(weight, A, alpha) * mm(B, A)

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


PLAIN = lora(np.matmul)


def beside_forward(**functions):
    """Return functions added to a plain forward; checking all of `implementation` would take three times as long."""
    return SimpleNamespace(**{"forward": PLAIN.forward, **functions})


# --- a mistake, planted in the suite's own trials ---------------------------------------------------


@cache
def trials(kind, dtype):
    """Return a kind's trials, including those of the single claims, by the bytes of lora_A and whether alpha is 0."""
    first, *others = KINDS[kind].problems
    problems = (first, replace(first, seed=first.seed + 1), replace(first, alpha=0.0), *others)
    found = [drawn(problem, dtype, KINDS[kind].formulas) for problem in problems]
    return {(trial.arrays["lora_A"].tobytes(), trial.problem.alpha == 0): trial for trial in found}


def the_trial(kind, arguments):
    """Return the trial whose arrays a function received; anything else, such as an empty batch, is refused."""
    numbers = [a for given in arguments for a in (given if isinstance(given, list) else [given])]
    zero = any(isinstance(number, float) and number == 0 for number in numbers)
    arrays = [given for given in arguments if isinstance(given, np.ndarray)]
    for given in arguments:
        parts = given if isinstance(given, list) else [given]
        key = b"".join(a.tobytes() for a in parts if isinstance(a, np.ndarray))
        for trial in filter(None, (trials(kind, dtype).get((key, zero)) for dtype in UNIT)):
            if {a.shape for a in arrays} <= {a.shape for a in trial.arrays.values()}:
                return trial
    raise NotImplementedError


def from_formulas(kind="linear", wrong=None, *, shows=None):
    """Return an implementation that answers the suite's trials with some parts of the formulas replaced.

    Parts are a dict, or a function of the problem; they show in the answers of `shows`, or in all.
    """

    def answers(arguments):
        trial = the_trial(kind, arguments)
        parts = wrong(trial.problem) if callable(wrong) else wrong or {}
        bad = trial.answer(**parts)
        told = {name: bad.get(name) if shows is None or name in shows else a for name, a in trial.right.items()}
        split = getattr(trial.problem, "split", lambda name, array: array)
        return {name: split(name, a) if name in getattr(trial.problem, "listed", ()) else a for name, a in told.items()}

    def function(name):
        def named(*arguments, stride=1, padding=0, dilation=1, groups=1, nested_absmax=None, mean=0.0):
            answer = answers(arguments)[name]
            return round_to(answer, "bfloat16") if kind == "mixed" else answer

        return named

    def backward(*arguments, stride=1, padding=0, dilation=1, groups=1, nested_absmax=None, mean=0.0):
        return {name: a for name, a in answers(arguments).items() if name not in ("y", "merged")}

    layer = {"forward": function("y"), "backward": backward, "merge": function("merged")}
    sums = {name: function(name) for name in ("cat", "linear", "svd")}
    return SimpleNamespace(**sums if kind == "combine" else layer, detached_norm=kind != "dora-full")


# --- a known bug, in an implementation of the first kind that it is of -----------------------------


def start_of(**parts):
    """Return an init by `StartFormulas` with some parts replaced."""

    def start(in_features, out_features, rank, rng, kernel=()):
        A, B = init(in_features, out_features, rank, rng, kernel)
        sizes = (rank, in_features, out_features, int(np.prod(kernel)))
        return A * StartFormulas(**parts).spread(*sizes) / StartFormulas().spread(*sizes), B

    return start


def step_of(**parts):
    """Return a step by `AdamFormulas` with some parts replaced."""

    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        new = {k: AdamFormulas(**parts).after(p, m[k], v[k], grads[k], t + 1) for k, p in params.items()}
        params, m, v = ({k: found[i] for k, found in new.items()} for i in range(3))
        return params, (m, v, t + 1)

    return step


def planted(bug):
    """Return the first kind that a bug applies to, and the functions of an implementation that has the bug."""
    kind = bug.kinds[0]
    if bug.breaks == "adam":
        return "linear", vars(implementation(step=step_of(**bug.parts)))
    if bug.breaks == "start":
        return kind, vars(OURS[kind]) | {"init": start_of(**bug.parts)}
    if bug.breaks == "output dtype":
        return kind, vars(OURS[kind]) | {"forward": OURS["linear"].forward}
    return kind, vars(from_formulas(kind, bug.parts, shows=bug.shows or None))


def report_of(kind, dtype=None, **functions):
    """Return the report on functions of a kind; those of other kinds are added to our linear layer's forward."""
    wrong = SimpleNamespace(**functions)
    if kind == "linear":
        return check(wrong, dtype=dtype)
    declared = kind.removesuffix("-full")
    return check(SimpleNamespace(forward=PLAIN.forward, kinds={declared: wrong}), dtype=dtype).kinds[declared]
