"""Implementations to hold against the suite: this library's layers, layers that are wrong on purpose, and formulas."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np

from minilora import (
    Adam,
    Adapter,
    Conv1d,
    Conv2d,
    Embedding,
    Linear,
    LoRA,
    LoRALinear,
    QuantizedLinear,
    weighted_sum,
)
from minilora.conformance.problems import Problem
from minilora.conformance.problems.images import ConvolutionProblem, EmbeddingProblem
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.lowprecision import NF4Problem
from minilora.conformance.problems.several import CombineProblem, ExpertsProblem, FusedProblem
from minilora.conformance.problems.tolerance import round_to
from minilora.layers.stacked import StackedLinear
from minilora.variants.adapter import Rewritten
from minilora.variants.dora import DoRA, DoRAAdapter, lengths
from minilora.variants.stackedlora import StackedLoRA, StackedLoRALinear


def functions_of(layer, **more):
    """A layer of this library's protocol, by `layer(weight, bias, A, B, alpha, magnitude, **steps)`, as functions."""

    def forward(x, *arrays, **steps):
        return layer(*arrays, **steps)(x)

    def backward(dy, x, *arrays, **steps):
        built = layer(*arrays, **steps)
        dx, grads = built.backward(dy, built.forward(x)[1])
        return {"x": dx, **{name: g.reshape(like.shape) for name, g, like in _with_shapes(grads, arrays)}}

    def merge(weight, *arrays, **steps):
        return layer(weight, None, *arrays, **steps).merge().weight

    return SimpleNamespace(**{"forward": forward, "backward": backward, "merge": merge, **more})


def _with_shapes(grads, arrays):
    """Gradients of matrices in the shapes of the factors that were handed over."""
    _, _, A, B, _, *magnitude = arrays
    likes = {"lora_A": A, "lora_B": B, **({"magnitude": magnitude[0]} if magnitude else {})}
    return [(name, grad, likes[name] if A.ndim > 2 else grad) for name, grad in grads.items()]


def with_steps(function):
    """Name the options of a convolution among the parameters: the suite hands over those that are named."""

    def named(*arrays, stride=1, padding=0, dilation=1):
        return function(*arrays, stride=stride, padding=padding, dilation=dilation)

    return named


def adapter(A, B, alpha, **more):
    return Adapter(A.reshape(len(A), -1), B.reshape(len(B), -1), alpha, **more)


def linear(weight, bias, A, B, alpha, *, cls=LoRALinear, lora=LoRA):
    return cls(Linear(weight, bias), lora(A, B, alpha))


def rslora(weight, bias, A, B, alpha):
    return LoRALinear(Linear(weight, bias), Adapter(A, B, alpha, use_rslora=True))


def dora(weight, bias, A, B, alpha, magnitude=None, *, cls=DoRA, norm="constant"):
    if magnitude is None:
        return cls(Linear(weight, bias), Adapter(A, B, alpha))  # refused
    return cls(Linear(weight, bias), DoRAAdapter(A, B, alpha, magnitude=magnitude, dora_norm=norm))


def embedding(weight, bias, A, B, alpha, *, cls=Rewritten, base=Embedding):
    assert bias is None
    return cls(base(weight), adapter(A, B, alpha, kind="embedding"))


def convolution(weight, bias, A, B, alpha, *, cls=Rewritten, base=None, **steps):
    base = base or {3: Conv1d, 4: Conv2d}[weight.ndim]
    kind = f"conv{weight.ndim - 2}d"
    return cls(base(weight, bias, **steps), adapter(A, B, alpha, kind=kind, kernel=weight.shape[2:]))


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


def conv_functions(layer=convolution):
    functions = functions_of(layer, init=init)
    return SimpleNamespace(**vars(functions) | {f: with_steps(getattr(functions, f)) for f in ("forward", "backward")})


def full_norm(*arrays, **more):
    return dora(*arrays, norm="full", **more)


def dropped_out():
    """Dropout with a given mask, of our base and our adapter."""

    def forward(x, weight, bias, A, B, alpha, mask):
        return Linear(weight, bias)(x) + LoRA(A, B, alpha)(x * mask)

    def backward(dy, x, weight, bias, A, B, alpha, mask):
        lora = LoRA(A, B, alpha)
        dx, grads = lora.backward(dy, lora.forward(x * mask)[1])
        return {"x": Linear(weight, bias).input_gradient(dy) + mask * dx, **grads}

    def merge(weight, A, B, alpha):
        return LoRALinear(Linear(weight), LoRA(A, B, alpha)).merge().weight

    return SimpleNamespace(forward=forward, backward=backward, merge=merge, init=init)


def four_bits(packed, absmax, bias, A, B, alpha, nested_absmax=None, mean=0.0):
    shape = (len(B), A.shape[1])
    nested = {} if nested_absmax is None else {"nested_absmax": nested_absmax, "mean": mean}
    return LoRALinear(QuantizedLinear(packed, absmax, shape, bias, dtype=A.dtype, **nested), LoRA(A, B, alpha))


def nf4_functions(layer=four_bits, **more):
    """The functions of a layer in four bits, whose base is two arrays."""

    def forward(x, *arrays, nested_absmax=None, mean=0.0):
        return layer(*arrays, nested_absmax, mean)(x)

    def backward(dy, x, *arrays, nested_absmax=None, mean=0.0):
        built = layer(*arrays, nested_absmax, mean)
        dx, grads = built.backward(dy, built.forward(x)[1])
        return {"x": dx, **grads}

    def merge(packed, absmax, A, B, alpha, nested_absmax=None, mean=0.0):
        return layer(packed, absmax, None, A, B, alpha, nested_absmax, mean).merge().weight

    own = {
        "forward": forward,
        "backward": backward,
        "merge": merge,
        "init": init,
    }
    return SimpleNamespace(**own | more)


def slot_rows(widths):
    """Where each slot's outputs stand."""
    ends = np.cumsum(widths)
    return [slice(end - width, end) for end, width in zip(ends, widths, strict=True)]


def fused():
    """Slots, of our base and an adapter of ours for each."""

    def adapters(A, B, alpha, widths):
        own = zip(A, B, alpha, slot_rows(widths), strict=True)
        return [None if a is None else (LoRA(a, b, s), rows) for a, b, s, rows in own]

    def forward(x, weight, bias, *slots):
        y = Linear(weight, bias)(x)
        for lora, rows in filter(None, adapters(*slots)):
            y[..., rows] += lora(x)
        return y

    def backward(dy, x, weight, bias, *slots):
        dx, grads = Linear(weight, bias).input_gradient(dy), {"lora_A": [], "lora_B": []}
        for one in adapters(*slots):
            own_dx, own = one[0].backward(dy[..., one[1]], one[0].forward(x)[1]) if one else (0, {})
            dx = dx + own_dx
            for name, listed in grads.items():
                listed.append(own.get(name))
        return {"x": dx, **grads}

    def merge(weight, *slots):
        merged = weight.copy()
        for lora, rows in filter(None, adapters(*slots)):
            merged[rows] += lora.delta()
        return merged

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


def beside_bfloat16():
    """Our adapter in float32 beside our base, whose outputs are rounded to bfloat16."""

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
    """Experts: our stack and our adapter, which take the rows expert by expert."""

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
    """Our sum of adapters, as a change of weight."""

    def combined(As, Bs, alphas, stabilised, weights, rank=None):
        terms = [Adapter(A, B, alpha, use_rslora=root)
                 for A, B, alpha, root in zip(As, Bs, alphas, stabilised, strict=True)]  # fmt: skip
        return weighted_sum(terms, weights, kind, rank).delta()

    return combined


OURS = {
    "linear": functions_of(linear, init=init, step=step),
    "rslora": functions_of(rslora, init=init),
    "dora": functions_of(dora, init=dora_init),
    "embedding": functions_of(embedding, init=lambda i, o, r, rng: (np.zeros((r, i)), rng.standard_normal((o, r)))),
    "conv1d": conv_functions(),
    "conv2d": conv_functions(),
    "dropout": dropped_out(),
    "nf4": nf4_functions(),
    "mixed": beside_bfloat16(),
    "fused": fused(),
    "experts": stacked(),
    "combine": SimpleNamespace(cat=summed("cat"), linear=summed("linear"), svd=summed("svd")),
}


def with_kinds(**kinds):
    """Our linear layer, with other kinds beside it; or a kind that takes the place of the linear one."""
    first = kinds.pop("linear", OURS["linear"])
    return SimpleNamespace(**vars(first), kinds=kinds)


def implementation(**functions):
    return SimpleNamespace(**{**vars(OURS["linear"]), **functions})


# --- formulas as an implementation ----------------------------------------------------------------


def problem_of(kind, arrays, alpha, **steps):
    """The sizes of arrays that were handed over."""
    if kind == "nf4":
        return four_bits_of(arrays, alpha)
    if kind == "fused":
        return fused_of(arrays, alpha, **steps)
    if kind == "experts":
        return experts_of(arrays, alpha, **steps)
    weight, A = arrays["weight"], arrays["lora_A"]
    sizes = {"n": len(arrays["x"]), "rank": len(A), "alpha": alpha, "bias": "bias" in arrays}
    if kind == "embedding":
        return EmbeddingProblem(in_features=weight.shape[0], out_features=weight.shape[1], **sizes)
    if kind.startswith("conv"):
        plain = {"stride": 1, "padding": 0, "dilation": 1}
        steps = {"groups": 1} | {name: (value,) * (A.ndim - 2) for name, value in plain.items()} | steps
        place = {"kernel": A.shape[2:], "sizes": arrays["x"].shape[2:]}
        return ConvolutionProblem(in_features=A.shape[1], out_features=len(weight), **sizes, **place, **steps)
    return Problem(in_features=weight.shape[1], out_features=weight.shape[0], **sizes)


def fused_of(arrays, alpha, widths, ranks):
    """The slots of arrays that were handed over: alpha is that of each slot."""
    first = next(a for a in alpha if a)
    one = len({a for a in alpha if a}) == 1
    sizes = {"bias": "bias" in arrays, "alpha": first, "one_rank": one}
    return FusedProblem.of(len(arrays["x"]), arrays["x"].shape[1], tuple(widths), tuple(ranks), **sizes)


def experts_of(arrays, alpha, expert_ids):
    """The experts of arrays that were handed over."""

    class Given(ExpertsProblem):
        expert_ids = None  # those of the arrays

    Given.expert_ids = expert_ids
    E, out, width = arrays["weight"].shape
    return Given(len(arrays["x"]), width, out, len(arrays["lora_A"]) // E, alpha, experts=E)


def four_bits_of(arrays, alpha):
    """The problem of the suite whose codes were handed over: a bug of the weight asks for its codes again."""
    A, B = arrays["lora_A"], arrays["lora_B"]
    sizes = {"in_features": A.shape[1], "out_features": len(B), "n": len(arrays["x"]), "rank": len(A), "alpha": alpha}
    tried = (
        NF4Problem(**sizes, bias="bias" in arrays, seed=seed, double="nested_absmax" in arrays) for seed in range(40)
    )
    return next(one for one in tried if np.array_equal(one.full["packed"], arrays["packed"]))


def answers_of(kind, parts, alpha, arrays, **steps):
    """What a kind's formulas give with some parts replaced; parts are a dict, or a function of the problem."""
    problem = problem_of(kind, arrays, alpha, **steps)
    arrays = {"dy": np.zeros_like(problem.dy), **arrays}
    parts = parts(problem) if callable(parts) else parts
    return problem.answer(KINDS[kind].formulas.with_parts(**parts), problem.flatten(arrays))


def from_formulas(kind="linear", wrong=lambda problem: {}, *, shows=None):
    """An implementation that answers by a kind's formulas with some parts replaced: in what `shows`, or in all."""

    def answer(names, alpha, steps, **arrays):
        p = {name: np.asarray(a, None if np.asarray(a).dtype.kind in "iu" else np.float64)
             for name, a in arrays.items() if a is not None}  # fmt: skip
        bad, good = (answers_of(kind, parts, alpha, p, **steps) for parts in (wrong, {}))
        told = {n: bad if shows is None or n in shows else good for n in names}
        return {n: found[n] for n, found in told.items() if n in found}

    def layer(weight, bias, A, B, alpha, more=None):
        last = "mask" if kind == "dropout" else "magnitude"
        return {"weight": weight, "bias": bias, "lora_A": A, "lora_B": B, "alpha": alpha, last: more}

    if kind == "combine":
        return _sums_from_formulas(wrong, shows)
    if kind == "nf4":
        return _four_bits_from_formulas(answer, shows, wrong)
    if kind == "fused":
        return _fused_from_formulas(answer)
    if kind == "experts":
        return _experts_from_formulas(answer)

    def forward(x, *arrays, **steps):
        y = answer(["y"], steps=steps, x=x, **layer(*arrays))["y"]
        return round_to(y, "bfloat16") if kind == "mixed" else y

    def backward(dy, x, *arrays, **steps):
        return answer(["x", "lora_A", "lora_B", "magnitude"], steps=steps, x=x, dy=dy, **layer(*arrays))

    def merge(weight, A, B, alpha, magnitude=None):
        size = 9  # of an image, if it is one
        x = np.zeros((1, A.shape[1], *(size,) * (A.ndim - 2)), int if kind == "embedding" else float)
        x = x[:, 0] if kind == "embedding" else x
        return answer(["merged"], steps={}, x=x, **layer(weight, None, A, B, alpha, magnitude))["merged"]

    if kind.startswith("conv"):

        def steps_of(f):
            def named(*arrays, stride, padding, dilation, groups):
                return f(*arrays, stride=stride, padding=padding, dilation=dilation, groups=groups)

            return named

        forward, backward = steps_of(forward), steps_of(backward)
    return SimpleNamespace(forward=forward, backward=backward, merge=merge, detached_norm=kind != "dora-full")


def _four_bits_from_formulas(answer, shows, wrong):
    """The same of a layer in four bits, whose base is codes and scales."""

    def given(packed, absmax, bias, A, B, alpha, nested_absmax, mean):
        nested = {} if nested_absmax is None else {"nested_absmax": nested_absmax, "mean": np.array([mean], "float32")}
        return {"packed": packed, "absmax": absmax, "bias": bias, "lora_A": A, "lora_B": B, "alpha": alpha} | nested

    def forward(x, *arrays, nested_absmax=None, mean=0.0):
        return answer(["y"], steps={}, x=x, **given(*arrays, nested_absmax, mean))["y"]

    def backward(dy, x, *arrays, nested_absmax=None, mean=0.0):
        return answer(["x", "lora_A", "lora_B"], steps={}, x=x, dy=dy, **given(*arrays, nested_absmax, mean))

    def merge(packed, absmax, A, B, alpha, nested_absmax=None, mean=0.0):
        arrays = given(packed, absmax, None, A, B, alpha, nested_absmax, mean)
        return answer(["merged"], steps={}, x=np.zeros((1, A.shape[1])), **arrays)["merged"]

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


def _sums_from_formulas(wrong, shows):
    """The same of adapters put together, from the lists that the functions are handed."""

    def ask(name, As, Bs, alphas, stabilised, weights, rank=1):
        adapters = [(len(A), w, root) for A, w, root in zip(As, weights, stabilised, strict=True)]
        problem = CombineProblem.of(As[0].shape[1], len(Bs[0]), rank, adapters, alpha=alphas[0])
        parts = wrong(problem) if callable(wrong) else wrong
        formulas = KINDS["combine"].formulas.with_parts(**parts if shows is None or name in shows else {})
        rows = {"lora_A": np.concatenate(As).astype(float), "lora_B": np.concatenate(Bs, axis=1).astype(float)}
        return problem.answer(formulas, rows)[name]

    return SimpleNamespace(**{name: partial(ask, name) for name in ("cat", "linear", "svd")})


def _fused_from_formulas(answer):
    """The same of slots: the lists as one array each, and back."""

    def sizes(A, B, alpha, widths):
        ranks = [0 if a is None else len(a) for a in A]
        whole = np.zeros((sum(widths), sum(ranks)))
        starts = np.cumsum([0, *ranks])
        for b, rows, start, rank in zip(B, slot_rows(widths), starts, ranks, strict=False):
            if rank:
                whole[rows, start : start + rank] = b
        A = np.concatenate([a for a in A if a is not None])
        return {"lora_A": A, "lora_B": whole}, {"widths": widths, "ranks": ranks}

    def ask(names, x, weight, bias, A, B, alpha, widths, **dy):
        factors, steps = sizes(A, B, alpha, widths)
        found = answer(names, steps=steps, alpha=alpha, x=x, weight=weight, bias=bias, **factors, **dy)
        starts = np.cumsum([0, *steps["ranks"]])
        own = list(zip(slot_rows(widths), starts, steps["ranks"], strict=False))
        lists = {
            "lora_A": lambda g: [g[start : start + rank] if rank else None for _, start, rank in own],
            "lora_B": lambda g: [g[rows, start : start + rank] if rank else None for rows, start, rank in own],
        }
        return {name: lists.get(name, lambda g: g)(g) for name, g in found.items()}

    def forward(x, *arrays):
        return ask(["y"], x, *arrays)["y"]

    def backward(dy, x, *arrays):
        return ask(["x", "lora_A", "lora_B"], x, *arrays, dy=dy)

    def merge(weight, *slots):
        return ask(["merged"], np.zeros((1, weight.shape[1])), weight, None, *slots)["merged"]

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


def _experts_from_formulas(answer):
    """The same of experts, each row's number last."""

    def ask(names, x, weight, A, B, alpha, expert_ids, **dy):
        arrays = {"x": x, "weight": weight, "lora_A": A, "lora_B": B, **dy}
        return answer(names, steps={"expert_ids": expert_ids}, alpha=alpha, **arrays)

    def forward(x, *arrays):
        return ask(["y"], x, *arrays)["y"]

    def backward(dy, x, *arrays):
        return ask(["x", "lora_A", "lora_B"], x, *arrays, dy=dy)

    def merge(weight, *factors):
        return ask(["merged"], np.zeros((1, weight.shape[2])), weight, *factors, np.zeros(1, int))["merged"]

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)
