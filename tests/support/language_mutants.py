"""Bugs in the layers of a language model. Most run the library's own layer with one of its functions replaced."""

import math
from contextlib import contextmanager
from functools import partial

import numpy as np

from minilora import Attention, GatedMLP, RMSNorm, Rotary, SiLU, gradcheck
from minilora.layer import rows
from minilora.layers import attention
from minilora.layers.rotary import rotate

from .claims import backward_is_the_slope_of_forward, forward_is_the_reference, require_close
from .language_cases import attention_case, gated_case, norm_case, rotary_case
from .mutants import mutant
from .problems import Problem

TWO_CLAIMS = (forward_is_the_reference, backward_is_the_slope_of_forward)

norm_mutant = partial(mutant, of=norm_case)
rotary_mutant = partial(mutant, of=rotary_case)
gated_mutant = partial(mutant, of=gated_case)


# --- RMSNorm --------------------------------------------------------------------------------------


class WrongNorm(RMSNorm):
    """RMSNorm with its parts open to a subclass."""

    def root(self, x):
        return np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps)

    def forward(self, x):
        r = self.root(x)
        y = x / r * self.weight
        return y, (self, y.shape, x, r)

    def mean(self, dx_hat, x_hat):
        return (dx_hat * x_hat).mean(axis=-1, keepdims=True)

    def dx(self, dy, x_hat, r):
        return (dy * self.weight - x_hat * self.mean(dy * self.weight, x_hat)) / r

    def dg(self, dy, x, r):
        return rows(dy * x / r).sum(axis=0)

    def backward(self, dy, cache, *, need_dx=True):
        *_, x, r = cache
        return (self.dx(dy, x / r, r) if need_dx else None), {"weight": self.dg(dy, x, r)}


@norm_mutant("RMSNorm: the mean's term missing in dx", *TWO_CLAIMS)
class NoMean(WrongNorm):
    def mean(self, dx_hat, x_hat):
        return 0


@norm_mutant("RMSNorm: a sum in place of the mean in dx", *TWO_CLAIMS)
class SumForMean(WrongNorm):
    def mean(self, dx_hat, x_hat):
        return (dx_hat * x_hat).sum(axis=-1, keepdims=True)


@norm_mutant("RMSNorm: eps outside the root", *TWO_CLAIMS)
class EpsOutside(WrongNorm):
    def root(self, x):
        return np.sqrt((x * x).mean(axis=-1, keepdims=True)) + self.eps


@norm_mutant("RMSNorm: the row's length in place of its root mean square", *TWO_CLAIMS)
class Length(WrongNorm):
    def root(self, x):
        return np.sqrt((x * x).sum(axis=-1, keepdims=True) + self.eps)


@norm_mutant("RMSNorm: the mean over rows", *TWO_CLAIMS)
class OverRows(WrongNorm):
    def root(self, x):
        return np.sqrt((x * x).mean(axis=0, keepdims=True) + self.eps)


@norm_mutant("RMSNorm: the weight forgotten in dx", *TWO_CLAIMS)
class NoWeight(WrongNorm):
    def dx(self, dy, x_hat, r):
        return super().dx(dy / self.weight, x_hat, r)


@norm_mutant("RMSNorm: dx not divided by r", *TWO_CLAIMS)
class Undivided(WrongNorm):
    def dx(self, dy, x_hat, r):
        return super().dx(dy, x_hat, 1)


@norm_mutant("RMSNorm: the weight's gradient from x in place of x / r", *TWO_CLAIMS)
class FromX(WrongNorm):
    def dg(self, dy, x, r):
        return super().dg(dy, x, 1)


# --- rotary positions -----------------------------------------------------------------------------


@rotary_mutant("Rotary: the backward turns the same way", *TWO_CLAIMS)
class SameWay(Rotary):
    def backward(self, dy, cache, *, need_dx=True):
        return self.forward(dy)[0], {}


@rotary_mutant("Rotary: the backward does not turn", *TWO_CLAIMS)
class NoWayBack(Rotary):
    def backward(self, dy, cache, *, need_dx=True):
        return dy.copy(), {}


@rotary_mutant("Rotary: neighbours paired in place of halves", *TWO_CLAIMS)
class Neighbours(Rotary):
    def halves(self, x):
        return np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)

    def neighbours(self, x):
        return np.stack(np.split(x, 2, axis=-1), axis=-1).reshape(x.shape)

    def forward(self, x):
        y, cache = super().forward(self.halves(x))
        return self.neighbours(y), cache

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(self.halves(dy), cache)
        return self.neighbours(dx), grads


@rotary_mutant("Rotary: turned the other way", *TWO_CLAIMS)
class OtherWay(Rotary):
    def angles(self, x, start):
        cos, sin = super().angles(x, start)
        return cos, -sin


@rotary_mutant("Rotary: positions from 1", *TWO_CLAIMS)
class FromOne(Rotary):
    def angles(self, x, start):
        return super().angles(x, start + 1)


@rotary_mutant("Rotary: the exponent -j/D in place of -2j/D", *TWO_CLAIMS)
class SlowFrequencies(Rotary):
    def __post_init__(self):
        self.frequencies = tuple(f**0.5 for f in self.frequencies)


# --- attention ------------------------------------------------------------------------------------


@contextmanager
def replaced(functions):
    kept = {name: getattr(attention, name) for name in functions}
    vars(attention).update(functions)
    try:
        yield
    finally:
        vars(attention).update(kept)


def attention_with(**functions):
    """Attention that runs with other functions in place of those of `minilora.layers.attention`."""

    class WithOthers(Attention):
        def forward(self, x):
            with replaced(functions):
                return super().forward(x)

        def backward(self, dy, cache, *, need_dx=True):
            with replaced(functions):
                return super().backward(dy, cache, need_dx=need_dx)

    return WithOthers


def backward_with(**parts):
    """The backward between the projections, with some of its products replaced."""
    part = {
        "dv": lambda P, do: P.swapaxes(-1, -2) @ do,
        "dP": lambda do, v: do @ v.swapaxes(-1, -2),
        "dS": lambda P, dP: P * (dP - (P * dP).sum(axis=-1, keepdims=True)),
        "dq": lambda dS, k, c: dS @ k * c,
        "dk": lambda dS, q, c: dS.swapaxes(-1, -2) @ q * c,
        **parts,
    }

    def attend_backward(do, q, k, v, P):
        do_rows, q_rows, k_rows, v_rows = map(attention.group_rows, (do, q, k, v))
        c = q.shape[-1] ** -0.5
        dS = part["dS"](P, part["dP"](do_rows, v_rows))
        dq, dk, dv = part["dq"](dS, k_rows, c), part["dk"](dS, q_rows, c), part["dv"](P, do_rows)
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)

    return attend_backward


def masked(later, value=-np.inf):
    """A mask that hides `later(u, t)`."""

    def mask(S, T):
        U = S.shape[-1]
        S.reshape(*S.shape[:2], -1, T, U)[..., later(np.arange(U), np.arange(T)[:, None])] = value
        return S

    return mask


def last_of_group(product):
    """What the last head of a group adds to its keys' gradient, and not the sum over the heads."""

    def of(dS, q, *c):
        U = dS.shape[-1]
        return product(dS[..., -U:, :], q[..., -U:, :], *c)

    return of


RIGHT_BACKWARD = attention_with(attend_backward=backward_with())
"""To show that the scaffold is right."""

ATTENTION_WRONG = {
    "mask missing": {"mask": lambda S, T: S},
    "mask off by one: the next position is seen": {"mask": masked(lambda u, t: u > t + 1)},
    "mask off by one: its own position is hidden": {"mask": masked(lambda u, t: (u >= t) & (t > 0))},
    "mask transposed": {"mask": masked(lambda u, t: u < t)},
    "masked scores 0 in place of minus infinity": {"mask": masked(lambda u, t: u > t, value=0)},
    "softmax over the queries": {
        "softmax": lambda S: np.exp(S) / np.exp(S).sum(axis=-2, keepdims=True),
    },
    "sum of all shares in place of each row's": {
        "softmax": lambda S: np.exp(S) / np.exp(S).sum(axis=(-1, -2), keepdims=True),
    },
    "dS without the row's sum": {"attend_backward": backward_with(dS=lambda P, dP: P * dP)},
    "dS with the sum over queries": {
        "attend_backward": backward_with(dS=lambda P, dP: P * (dP - (P * dP).sum(axis=-2, keepdims=True)))
    },
    "dS with the mean in place of the sum": {
        "attend_backward": backward_with(dS=lambda P, dP: P * (dP - (P * dP).mean(axis=-1, keepdims=True)))
    },
    "dS not times P": {
        "attend_backward": backward_with(dS=lambda P, dP: dP - (P * dP).sum(axis=-1, keepdims=True)),
    },
    "scale forgotten in dq": {"attend_backward": backward_with(dq=lambda dS, k, c: dS @ k)},
    "scale forgotten in dk": {"attend_backward": backward_with(dk=lambda dS, q, c: dS.swapaxes(-1, -2) @ q)},
    "scale twice in dq": {"attend_backward": backward_with(dq=lambda dS, k, c: dS @ k * c * c)},
    "dk of a group's last head alone": {
        "attend_backward": backward_with(dk=last_of_group(lambda dS, q, c: dS.swapaxes(-1, -2) @ q * c))
    },
    "dv of a group's last head alone": {
        "attend_backward": backward_with(dv=last_of_group(lambda P, do: P.swapaxes(-1, -2) @ do))
    },
    "dS not transposed in dk": {
        "attend_backward": backward_with(dk=lambda dS, q, c: dS[..., : dS.shape[-1], :] @ q[..., : dS.shape[-1], :] * c)
    },
}
for name, functions in ATTENTION_WRONG.items():
    mutant(f"attention: {name}", *TWO_CLAIMS, of=attention_case)(attention_with(**functions))

attention_mutant = partial(mutant, of=attention_case)


@attention_mutant("attention: scale forgotten", *TWO_CLAIMS)
class NoScale(Attention):
    """Forward and backward: the gradient is right, the function is not."""

    def forward(self, x):
        with replaced({"attend": lambda q, k, v: attend(q * q.shape[-1] ** 0.5, k, v)}):
            return super().forward(x)


@attention_mutant("attention: divided by D in place of its root", *TWO_CLAIMS)
class DividedByD(Attention):
    def forward(self, x):
        with replaced({"attend": lambda q, k, v: attend(q * q.shape[-1] ** -0.5, k, v)}):
            return super().forward(x)


@attention_mutant("attention: head h asks key h modulo K", *TWO_CLAIMS)
class Interleaved(Attention):
    def split(self, x):
        D = self.rotary.in_features
        *lead, T, width = x.shape
        K = self.k_proj.out_features // D
        return x.reshape(math.prod(lead), T, width // (K * D), K, D).transpose(0, 3, 2, 1, 4)

    def join(self, heads, shape):
        return heads.transpose(0, 3, 2, 1, 4).reshape(*shape[:-1], -1)


@attention_mutant("attention: the keys not turned", *TWO_CLAIMS)
class StillKeys(Attention):
    def forward(self, x):
        k = self.split(self.k_proj(x))
        with replaced({"attend": lambda q, _, v: attend(q, k, v)}):
            return super().forward(x)


@attention_mutant("attention: the gradient of the queries not turned back", *TWO_CLAIMS)
class QueriesNotTurnedBack(Attention):
    def backward(self, dy, cache, *, need_dx=True):
        forth = lambda dq, dk, dv, q, k: (rotate(dq, *self.rotary.angles(dq, 0)), dk, dv)  # noqa: E731
        with replaced({"attend_backward": lambda do, q, k, v, P: forth(*attend_backward(do, q, k, v, P), q, k)}):
            return super().backward(dy, cache, need_dx=need_dx)


attend, attend_backward = attention.attend, attention.attend_backward
normed, normed_back = attention.normed, attention.normed_back
NORMS_WRONG = {
    "q and k not normed": {
        "normed": lambda norm, heads: (heads, None),
        "normed_back": lambda norm, dy, cache: (dy, {}),
    },
    "one norm over all heads": {
        "normed": lambda norm, heads: (heads / np.sqrt((heads**2).mean(axis=(1, 2, 4), keepdims=True) + 0.3), None),
    },
    "the norms passed over in the backward": {
        "normed_back": lambda norm, dy, cache: (dy, normed_back(norm, dy, cache)[1]),
    },
}
for name, functions in NORMS_WRONG.items():
    mutant(f"attention: {name}", *TWO_CLAIMS, of=partial(attention_case, row="Attention, q and k normed"))(
        attention_with(**functions)
    )


# --- the gated MLP --------------------------------------------------------------------------------


class WrongSiLU(SiLU):
    """Another derivative."""

    def slope(self, x, q):
        return q * (1 + x * (1 - q))

    def backward(self, dy, cache, *, need_dx=True):
        x = cache[2]
        return dy * self.slope(x, 1 / (1 + np.exp(-x))), {}


def gated_with(slope):
    class Wrong(GatedMLP):
        def __post_init__(self):
            super().__post_init__()
            self.act_fn = type("Other", (WrongSiLU,), {"slope": lambda self, x, q: slope(x, q)})()

    return Wrong


SLOPES_WRONG = {
    "the logistic function's own slope": lambda x, q: q * (1 - q),
    "without the share of x": lambda x, q: q,
    "1 - x (1 - q)": lambda x, q: q * (1 - x * (1 - q)),
    "1 + x q": lambda x, q: q * (1 + x * q),
}
for name, slope in SLOPES_WRONG.items():
    gated_mutant(f"gated MLP: slope of SiLU, {name}", *TWO_CLAIMS)(gated_with(slope))


@gated_mutant("gated MLP: gate and up swapped", *TWO_CLAIMS)
class Swapped(GatedMLP):
    def forward(self, x):
        other = GatedMLP(self.up_proj, self.gate_proj, self.down_proj)
        y, cache = other.forward(x)
        return y, (self, y.shape, other, cache)

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = cache[2].backward(dy, cache[3], need_dx=need_dx)
        names = {"gate_proj": "up_proj", "up_proj": "gate_proj", "down_proj": "down_proj"}
        return dx, {f"{names[k.partition('.')[0]]}.{k.partition('.')[2]}": g for k, g in grads.items()}


@gated_mutant("gated MLP: the factor's own gradient in place of the other's", *TWO_CLAIMS)
class OwnFactor(GatedMLP):
    def backward(self, dy, cache, *, need_dx=True):
        *kept, p, u = cache
        return super().backward(dy, (*kept, u, p), need_dx=need_dx)


@gated_mutant("gated MLP: dx through the gate alone", *TWO_CLAIMS)
class ThroughGate(GatedMLP):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        db = self.down_proj.input_gradient(dy) * cache[-1]
        return dx - db @ self.up_proj.weight, grads


# --- cross-entropy with targets that do not count -------------------------------------------------


def cross_entropy_is_the_mean_over_what_counts(loss, problem: Problem) -> None:
    """The loss written out over the rows that count, and its gradient by complex step."""
    logits = problem.randn("logits", 4 + problem.n, 2 + problem.out_features)
    targets = np.random.default_rng(problem.seed).integers(0, logits.shape[1], len(logits))
    targets[1::3] = -100
    terms = [math.log(sum(math.exp(v - z[t]) for v in z)) for z, t in zip(logits, targets, strict=True) if t >= 0]
    value, gradient = loss(logits, targets)
    require_close("the loss", value, np.array(sum(terms) / len(terms)), 1e-13)
    gradcheck(lambda p: loss(p["z"], targets)[0], {"z": logits}, {"z": gradient}, tolerance=1e-12)


def loss_with(share=lambda counts: counts / counts.sum(), hot=lambda hot, counts: hot, scale=1.0):
    """Cross-entropy, with the share of each row and what is subtracted from its softmax open."""

    def loss(z, targets):
        counts = targets != -100
        ids = np.where(counts, targets, 0)
        q = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        d = (q - hot(np.eye(z.shape[1])[ids], counts)) * share(counts)[:, None] * scale
        return -(np.log(q[np.arange(len(z)), ids]) * share(counts)).sum(), d

    return loss


RIGHT_LOSS = loss_with()
LOSSES_WRONG = {
    "the mean over all rows": loss_with(share=lambda counts: counts / len(counts)),
    "rows that do not count, counted": loss_with(share=lambda counts: np.ones(len(counts)) / len(counts)),
    "a sum in place of the mean": loss_with(share=lambda counts: counts * 1.0),
    "the one-hot forgotten in the gradient": loss_with(hot=lambda hot, counts: 0),
    "the gradient twice": loss_with(scale=2.0),
    "the gradient not divided by the count": lambda z, t: (RIGHT_LOSS(z, t)[0], RIGHT_LOSS(z, t)[1] * (t >= 0).sum()),
}
for name, wrong in LOSSES_WRONG.items():
    mutant(f"cross-entropy: {name}", cross_entropy_is_the_mean_over_what_counts)(wrong)

RIGHT = {
    "RMSNorm": (norm_case, (WrongNorm,), TWO_CLAIMS),
    "attention": (attention_case, (RIGHT_BACKWARD, attention_with(mask=masked(lambda u, t: u > t))), TWO_CLAIMS),
    "gated MLP": (gated_case, (gated_with(lambda x, q: q * (1 + x * (1 - q))),), TWO_CLAIMS),
    "cross-entropy": (lambda loss: loss, (RIGHT_LOSS,), (cross_entropy_is_the_mean_over_what_counts,)),
}
"""What the bugs are made of, without one, which must pass. The layers themselves are in test_gradients.py."""
