"""Bugs in a mixture of experts and in adapters of its experts. Most replace one function of the library's own."""

from contextlib import contextmanager
from functools import partial

import numpy as np

from minilora import gradcheck
from minilora.layer import inner, nest, rows
from minilora.layers import experts, stacked
from minilora.layers.experts import MixtureOfExperts, Router, balance
from minilora.variants import stackedlora as factors

from .claims import backward_is_the_slope_of_forward, forward_is_the_reference, require_close
from .expert_cases import adapted_experts_case, mixture_case, over_all_case, router_case, shared_case
from .mutants import mutant
from .problems import Problem

TWO_CLAIMS = (forward_is_the_reference, backward_is_the_slope_of_forward)


@contextmanager
def replaced(module, functions):
    choice = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(choice)


def with_others(cls, module, **functions):
    """A layer's class that runs with other functions in place of those of a module."""

    class WithOthers(cls):
        def forward(self, x):
            with replaced(module, functions):
                return super().forward(x)

        def backward(self, dy, cache, *, need_dx=True):
            with replaced(module, functions):
                return super().backward(dy, cache, need_dx=need_dx)

    return WithOthers


# --- the router -----------------------------------------------------------------------------------

ROUTERS_WRONG = {
    "the lowest scores are kept": {"top_experts": lambda z, k: np.argsort(z.real, axis=1, kind="stable")[:, :k]},
    "the best expert in the last one's place": {"top_experts": lambda z, k: router_best(z, k)[:, [*range(k - 1), 0]]},
    "the kept in the order of their numbers": {"top_experts": lambda z, k: np.sort(router_best(z, k), axis=1)},
    "the softmax over rows": {"softmax": lambda z: np.exp(z) / np.exp(z).sum(axis=0)},
    "a sigmoid in place of the softmax": {"softmax": lambda z: 1 / (1 + np.exp(-z))},
    "dl without the row's sum": {"softmax_back": lambda p, dp: p * dp},
    "dl not times p": {"softmax_back": lambda p, dp: dp - inner(p, dp)},
    "dl with the mean in place of the sum": {"softmax_back": lambda p, dp: p * (dp - inner(p, dp) / p.shape[1])},
    "no gradient to the scores": {"softmax_back": lambda p, dp: 0 * p},
}
router_best = experts.top_experts
for name, functions in ROUTERS_WRONG.items():
    mutant(f"router: {name}", *TWO_CLAIMS, of=router_case)(with_others(Router, experts, **functions))
mutant("router: renormalised where it is not", *TWO_CLAIMS, of=over_all_case)(
    with_others(Router, experts, softmax=lambda z: np.exp(z) / np.exp(np.sort(z, axis=1)[:, -2:]).sum(axis=1)[:, None])
)
mutant("router: not renormalised", *TWO_CLAIMS, of=router_case)(
    with_others(Router, experts, masked_to_kept=lambda z, choice: z)
)
mutant("router: divided by the sum as by a constant", *TWO_CLAIMS, of=router_case)(
    with_others(Router, experts, softmax_back=lambda p, dp: p * dp - p * p * dp)
)


# --- the mixture ----------------------------------------------------------------------------------


def other_counts(choice, count):
    order, place, counts = gathered(choice, count)
    return order, place, [counts[-1], *counts[:-1]]


def unsorted(choice, count):
    """Rows in their own order, as if they were the experts'."""
    order, _, counts = gathered(choice, count)
    return np.arange(len(order)), np.arange(len(order)), counts


def order_for_inverse(choice, count):
    order, _, counts = gathered(choice, count)
    return order, order, counts


gathered = experts.gathered
MIXTURES_WRONG = {
    "the counts of rows one expert further": {"gathered": other_counts},
    "rows are not gathered": {"gathered": unsorted},
    "the order in place of its inverse": {"gathered": order_for_inverse},
    "gate and up exchanged": {"halves": lambda c: experts_halves(c)[::-1]},
    "gate and up alternate": {"halves": lambda c: (c[:, ::2], c[:, 1::2])},
    "the gate twice": {"halves": lambda c: (experts_halves(c)[0],) * 2},
    "dg from a mean": {"inner": lambda a, b: inner(a, b) / b.shape[-1]},
}
experts_halves = experts.halves
for name, functions in MIXTURES_WRONG.items():
    mutant(f"experts: {name}", *TWO_CLAIMS, of=mixture_case)(with_others(MixtureOfExperts, experts, **functions))


class Plain(MixtureOfExperts):
    """The mixture expert by expert, with its parts open to a subclass: no row is gathered, and shares are a matrix."""

    def weigh(self, G, o):
        return G * o

    def dG(self, dy, o):
        return (dy * o).sum(axis=1)

    def do(self, G, dy):
        return G * dy

    def forward(self, x):
        h, (g, choice, g_cache) = rows(x), self.gate.route(rows(x))
        E = self.experts.count
        G = np.stack([(g * (choice == e)).sum(axis=1) for e in range(E)], axis=1)  # (N, E)
        steps = []
        for e in range(E):
            n = np.flatnonzero((choice == e).any(axis=1))
            counts = [len(n) if other == e else 0 for other in range(E)]
            steps.append((n, *self.experts.forward(h[n], counts)))
        y = np.zeros(h.shape, np.result_type(h, g, *(o for _, o, _ in steps)))
        for e, (n, o, _) in enumerate(steps):
            y[n] += self.weigh(G[n, e, None], o)
        return y.reshape(x.shape), (self, x.shape, g_cache, choice, G, steps)

    def backward(self, dy, cache, *, need_dx=True):
        *_, g_cache, choice, G, steps = cache
        d, dG, dx, grads = rows(dy), np.zeros_like(G), np.zeros_like(rows(dy)), {}
        for e, (n, o, o_cache) in enumerate(steps):
            dG[n, e] = self.dG(d[n], o)
            more, found = self.experts.backward(self.do(G[n, e, None], d[n]), o_cache)
            dx[n] += more
            grads = {name: grads.get(name, 0) + grad for name, grad in found.items()}
        dx_gate, g_grads = self.gate.backward(np.take_along_axis(dG, choice, axis=1), g_cache)
        dx = self.dx(dx, dx_gate).reshape(dy.shape)
        return (dx if need_dx else None), nest("gate", g_grads) | nest("experts", grads)

    def dx(self, experts, gate):
        return experts + gate


plain_mutant = partial(mutant, of=mixture_case)


@plain_mutant("experts: outputs not weighted", *TWO_CLAIMS)
class Unweighted(Plain):
    def weigh(self, G, o):
        return o


@plain_mutant("experts: weighted by the root", *TWO_CLAIMS)
class Root(Plain):
    def weigh(self, G, o):
        return G**0.5 * o


@plain_mutant("experts: do not weighted", *TWO_CLAIMS)
class UnweightedBack(Plain):
    def do(self, G, dy):
        return dy


@plain_mutant("experts: half of dg", *TWO_CLAIMS)
class HalfOfDg(Plain):
    def dG(self, dy, o):
        return (dy * o).sum(axis=1) / 2


@plain_mutant("experts: dx without the router's", *TWO_CLAIMS)
class WithoutRouter(Plain):
    def dx(self, experts, gate):
        return experts


@plain_mutant("experts: dx through the router alone", *TWO_CLAIMS)
class RouterAlone(Plain):
    def dx(self, experts, gate):
        return gate


@mutant("shared expert: not opened by its gate", *TWO_CLAIMS, of=shared_case)
class AlwaysOpen(MixtureOfExperts):
    def forward(self, x):
        with replaced(experts, {"logistic": lambda t: 1 + 0 * t}):
            return super().forward(x)


@mutant("shared expert: the slope of its gate forgotten", *TWO_CLAIMS, of=shared_case)
class NoSlope(MixtureOfExperts):
    def _shared_backward(self, dy, cache, *, need_dx):
        dx, grads = super()._shared_backward(dy, cache, need_dx=need_dx)
        _, t_cache, s, q = cache
        right, _ = self.shared_expert_gate.backward(q * (1 - q) * inner(dy, s), t_cache)
        wrong, found = self.shared_expert_gate.backward(q * inner(dy, s), t_cache)
        return (dx - right + wrong if need_dx else None), grads | nest("shared_expert_gate", found)


# --- stacks and their adapters --------------------------------------------------------------------

STACKS_WRONG = {
    "the first expert's weight for all": {"grouped": lambda x, W, counts: x @ W[0].T},
    "dx by the first expert's weight": {"grouped_back": lambda dy, W, counts: dy @ W[0]},
    "every expert has the gradient of all rows": {
        "products": lambda dy, x, counts: np.stack([dy.T @ x for _ in counts]),
    },
    "the gradient of an expert is a mean over its rows": {
        "products": lambda dy, x, counts: right_products(dy, x, counts) / np.maximum(counts, 1)[:, None, None],
    },
}
right_products = stacked.products
for name, functions in STACKS_WRONG.items():
    mutant(f"stack: {name}", *TWO_CLAIMS, of=mixture_case)(with_others(MixtureOfExperts, stacked, **functions))


def slow_B(B, experts):
    """September 2026's: B read with the expert as the slow index."""
    return B.reshape(len(B), experts, -1).swapaxes(0, 1)


def pack_slow(B):
    return B.swapaxes(0, 1).reshape(B.shape[1], -1)


def fast_A(A, experts):
    return A.reshape(-1, experts, A.shape[1]).swapaxes(0, 1)


PACKINGS_WRONG = {
    "B with the expert as the slow index": {"stacked_B": slow_B, "packed_B": pack_slow},
    "A with the expert as the fast index": {"stacked_A": fast_A},
    "the gradient of B packed with the expert slow": {"packed_B": pack_slow},
    "the A of the expert before": {
        "stacked_A": lambda A, experts: np.roll(A.reshape(experts, -1, A.shape[1]), 1, axis=0)
    },
    "alpha over four and a half ranks": {"scaling": lambda alpha, rank, use_rslora: alpha / (4.5 * rank)},
    "1.1 alpha over the root of the rank": {"scaling": lambda alpha, rank, use_rslora: 1.1 * alpha / rank**0.5},
    "the gradients of both factors one and a half times": {
        "products": lambda dy, x, counts: right_products(dy, x, counts) * 1.5,
    },
}
for name, functions in PACKINGS_WRONG.items():
    mutant(f"experts with LoRA: {name}", *TWO_CLAIMS, of=adapted_experts_case)(
        with_others(MixtureOfExperts, factors, **functions)
    )


# --- the balance ----------------------------------------------------------------------------------


def balance_is_the_sum_written_out(loss, problem: Problem) -> None:
    """Expert by expert, and its gradient by complex step."""
    E, K = 3 + problem.rank % 3, 2
    scores = problem.randn("scores", 3 + problem.n, E)
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    choice = np.argsort(-scores, axis=1)[:, :K]
    terms = [sum(e in row for row in choice) / len(p) * p[:, e].mean() for e in range(E)]
    value, gradient = loss(scores, K)
    require_close("the loss", value, np.array(E * sum(terms)), 1e-13)
    params = {"scores": scores}
    gradcheck(lambda p: loss(p["scores"], K)[0], params, {"scores": gradient}, method="complex", tolerance=1e-12)


def balance_with(times=lambda n, E: E, share=lambda choice, n: 1 / n, scale=1.0, back=experts.softmax_back):
    def loss(scores, top_k):
        n, E = scores.shape
        f = experts.tallied(experts.top_experts(scores, top_k), E) * share(top_k, n)
        p = experts.softmax(scores)
        return times(n, E) * (f * p.mean(axis=0)).sum(), scale * back(p, p * 0 + times(n, E) * f / n)

    return loss


BALANCES_WRONG = {
    "not times the number of experts": balance_with(times=lambda n, E: 1),
    "f a share of the pairs, and not of the rows": balance_with(share=lambda top_k, n: 1 / (n * top_k)),
    "the gradient not divided by the rows": lambda z, k: (balance(z, k)[0], balance(z, k)[1] * len(z)),
    "the softmax's gradient without its sum": balance_with(back=lambda p, dp: p * dp),
    "the gradient twice": balance_with(scale=2.0),
}
for name, wrong in BALANCES_WRONG.items():
    mutant(f"balance: {name}", balance_is_the_sum_written_out)(wrong)

RIGHT = {
    "router": (router_case, (with_others(Router, experts, top_experts=router_best),), TWO_CLAIMS),
    "mixture": (mixture_case, (Plain,), TWO_CLAIMS),
    "mixture with others": (mixture_case, (with_others(MixtureOfExperts, experts, halves=experts_halves),), TWO_CLAIMS),
    "experts with LoRA": (adapted_experts_case, (with_others(MixtureOfExperts, factors),), TWO_CLAIMS),
    "balance": (lambda loss: loss, (balance, balance_with()), (balance_is_the_sum_written_out,)),
}
"""What the bugs are made of, without one, which must pass. The layers themselves are in test_gradients.py."""
