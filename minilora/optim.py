"""Adam, Algorithm 1 of the paper in the paper's letters; clipping, weight decay, and a step length that changes.

With g the gradient at step t, and all operations entry by entry:

    m_t = beta1 m_{t-1} + (1 - beta1) g                   (20)
    v_t = beta2 v_{t-1} + (1 - beta2) g^2                 (21)
    m_hat = m_t / (1 - beta1^t)                           (22)
    v_hat = v_t / (1 - beta2^t)                           (23)
    theta_t = theta_{t-1} - lr m_hat / (sqrt(v_hat) + eps)    (24)

m and v start at zero, which pulls them towards zero in the first steps; (22) and (23) undo that. The first step is
-lr g / (|g| + eps): its length is lr whatever the scale of the loss.

Before (20), clipping shortens gradients that are longer than C, all arrays taken together. Before (24), weight decay
shrinks theta itself: added to g instead, it would be divided by sqrt(v_hat):

    n = sqrt(sum of g^2)                                  (clip.1)
    g' = g C / max(n, C)                                  (clip.2)
    theta' = (1 - lr lambda) theta_{t-1}                  (decay.1)

A `Schedule` multiplies lr by f_t. There are T steps in all, w of them the warmup, and u_t is the share of the others
that is done before step t:

    u_t = max(0, t - 1 - w) / (T - w)                    (rate.1)
    f_t = min(1, t / w) d(u_t)                           (rate.2)    without a warmup, d(u_t)

    d(u) = 1                     constant
    d(u) = 1 - u                 linear                  (rate.3)
    d(u) = (1 + cos(pi u)) / 2   cosine                  (rate.4)

Why a warmup: Adam's first steps are as long as later ones, and follow the mean of a few gradients. Why a decay: near a
minimum, a step of the same length ends beyond it.

The functions of the same names in transformers have (t - 1) / w in the place of t / w, so that their first step has the
rate 0 and changes nothing; behind the warmup they are these.

Sources: Kingma and Ba, "Adam: A Method for Stochastic Optimization", arXiv 1412.6980, Algorithm 1; Pascanu, Mikolov and
Bengio, arXiv 1211.5063, Algorithm 1, for clipping; Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
arXiv 1711.05101, Algorithm 2. There the decay has no factor lr; in PyTorch and here it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from operator import iadd, imul, isub, itruediv
from typing import Any, TypeAlias

import numpy as np

from .backend import backend_of, check_apart
from .checks import (
    Array,
    check_choice,
    check_dict,
    check_integer,
    check_library,
    check_number,
    check_same_keys,
    check_shape,
    check_trainable,
)
from .layer import homes, sum_tied

Rate: TypeAlias = float | Mapping[str, float]
"""A step length for every parameter, or one for each ending of a name."""

BLOCK = 65_536
"""Entries that `Adam` updates at a time, so that what (20) to (24) make of them stays in a core's cache."""

DECAYS = ("constant", "linear", "cosine")


def adam_update(
    theta: Array, g: Array, m: Array, v: Array, t: int, *, lr: float, betas: tuple[float, float], eps: float
) -> None:
    """Take step t, counted from 1, for one array: theta, m and v, of the shape and dtype of g, change in place.

    ``iadd(a, b)`` is ``a += b``, and likewise the others: so each equation is one line.
    """
    beta1, beta2 = betas
    m = iadd(imul(m, beta1), (1 - beta1) * g)  # eq. (20)
    v = iadd(imul(v, beta2), imul(g**2, 1 - beta2))  # eq. (21)
    m_hat = m / (1 - beta1**t)  # eq. (22)
    v_hat = v / (1 - beta2**t)  # eq. (23)
    isub(theta, itruediv(imul(m_hat, lr), iadd(v_hat**0.5, eps)))  # eq. (24)


def gradient_norm(grads: Mapping[str, Array]) -> Array:
    """Return the length of all gradients together, an array without axes; NaN where one holds NaN."""
    norm: Array = sum((g**2).sum() for g in grads.values()) ** 0.5  # eq. (clip.1)
    return norm


def clip(grads: Mapping[str, Array], most: float) -> dict[str, Array]:
    """Return gradients that are at most so long together; shorter ones keep their bits, and of NaN all is NaN."""
    norm = gradient_norm(grads)
    xp = backend_of(norm).xp
    return {name: g * (most / xp.maximum(norm, most)) for name, g in grads.items()}  # eq. (clip.2)


class Adam:
    """Adam for a dict of arrays, which `step` updates in place. An array under two names is one parameter.

    Arrays that cannot be trained and settings out of range are a ValueError or a TypeError.

    Parameters
    ----------
    params : dict of str to array
        What to train, float32 or float64.
    lr : float, or mapping of str to float
        A step's length, above 0; or one by the ending of a name, the longest that fits: ``{"": 1e-4, "lora_B": 2e-3}``.
    betas : (float, float)
        How much of the running means of g and g^2 each step keeps, in [0, 1).
    eps : float
        Keeps (24) from dividing by zero. It stands outside the root, as in the paper and in PyTorch.
    schedule : callable, optional
        ``schedule(t)``, the factor of lr in step t, such as a `Schedule`; by default 1 in each.
    weight_decay : float
        lambda, at least 0, of (decay.1), for every parameter.
    max_grad_norm : float, optional
        C of (clip.2), above 0; by default no gradient is clipped.

    Attributes
    ----------
    t : int
        The number of steps taken.
    params, m, v : dict of str to array
        The parameters and the running means, each array under the first of its names.
    """

    def __init__(
        self, params: Mapping[str, Array], lr: Rate = 1e-3, betas: tuple = (0.9, 0.999), eps: float = 1e-8,
        schedule: Callable[[int], float] | None = None, weight_decay: float = 0.0, max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        self.lr, self.betas, self.eps = check_adam(params, lr, betas, eps)
        self.weight_decay = check_number("weight_decay", weight_decay, above=0, or_equal=True)
        self.max_grad_norm = None if max_grad_norm is None else check_number("max_grad_norm", max_grad_norm, above=0)
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be a function, schedule(t), got {schedule!r}")
        self.schedule = schedule
        self.home = homes(params)
        self.params = {name: p for name, p in params.items() if self.home[name] == name}
        self.t = 0
        backend = backend_of(next(iter(self.params.values())))
        self.m = {name: backend.xp.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: backend.xp.zeros_like(p) for name, p in self.params.items()}
        self._update: Callable[..., None] = adam_update
        if backend.name != "numpy":
            from .fast.adam import gpu_update  # (20) to (24) in one kernel

            self._update = gpu_update(backend) or adam_update

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self.params.items())
        return f"Adam(lr={self.lr}, betas={self.betas}, eps={self.eps:g}, t={self.t}, {{{shapes}}})"

    def step(self, grads: Mapping[str, Array]) -> None:
        """Take one step against the gradients, one for each name given to `Adam`, of its array's shape and dtype.

        A wrong name or gradient is a ValueError or TypeError, and nothing has changed then.
        """
        check_same_keys("grads", grads, self.home)
        check_like_params("grads", grads, self.params, self.home)
        self.t += 1
        factor = 1.0 if self.schedule is None else float(self.schedule(self.t))
        grads, decay = sum_tied(grads, self.home), self.weight_decay
        if self.max_grad_norm is not None:
            grads = clip(grads, self.max_grad_norm)
        for name, g in grads.items():
            theta, m, v, lr = self.params[name], self.m[name], self.v[name], rate_of(self.lr, name) * factor
            if decay:
                theta *= 1 - lr * decay  # eq. (decay.1)
            for some in blocks(theta):
                self._update(theta[some], g[some], m[some], v[some], self.t, lr=lr, betas=self.betas, eps=self.eps)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state, ``{"t": int, "m": {name: array}, "v": {name: array}}``."""
        return {"t": self.t, **{k: {n: a.copy() for n, a in getattr(self, k).items()} for k in ("m", "v")}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state. One that does not fit is a ValueError or TypeError, and nothing has changed then."""
        check_same_keys("state", state, ("t", "m", "v"))
        t = check_integer("state['t']", state["t"], at_least=0)
        for moment in ("m", "v"):
            check_same_keys(f"state[{moment!r}]", state[moment], self.params)
            check_like_params(f"state[{moment!r}]", state[moment], self.params)
        self.t = t
        self.m, self.v = ({name: a.copy() for name, a in state[moment].items()} for moment in ("m", "v"))


@dataclass(frozen=True)
class Schedule:
    """The factor of each step's length, for ``train(..., schedule=Schedule("cosine", steps=100, warmup=10))``.

    An unknown decay, and a warmup that leaves no step of the whole length, are a ValueError.

    Parameters
    ----------
    decay : {"constant", "linear", "cosine"}
        What follows the warmup.
    steps : int
        Of the whole training, T: the steps of all epochs together.
    warmup : int
        Steps at the start in which the length grows, w.
    """

    decay: str
    steps: int
    warmup: int = 0

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, DECAYS)
        check_integer("steps", self.steps, at_least=1)
        check_integer("warmup", self.warmup, at_least=0)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup} of {self.steps} steps, expected fewer: none has the whole rate")

    def __call__(self, t: int) -> float:
        """Return the factor of step t, from 1; behind the last step, of the last."""
        w, T = self.warmup, self.steps
        u = max(0, min(t, T) - 1 - w) / (T - w)  # eq. (rate.1)
        d = self.fall(u)
        return min(1.0, t / w) * d if w else d  # eq. (rate.2)

    def fall(self, u: float) -> float:
        """Return d(u): how much of the rate is left where a share u of the steps behind the warmup is over."""
        if self.decay == "linear":
            return 1 - u  # eq. (rate.3)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * u)) / 2  # eq. (rate.4)
        return 1.0


def blocks(array: Array) -> list[Any]:
    """Return indices that cut an array into blocks of rows; into one, where it is small or not NumPy's."""
    if not isinstance(array, np.ndarray) or array.size <= BLOCK:
        return [...]
    height = max(1, BLOCK * len(array) // array.size)
    return [slice(start, start + height) for start in range(0, len(array), height)]


def check_rates(lr: Any, names: Collection[str]) -> Any:
    """Return lr, or the rates in a mapping, as floats: every name must have a rate, and every ending a name."""
    if not isinstance(lr, Mapping):
        return check_number("lr", lr, above=0)
    rates = {end: check_number(f"lr[{end!r}]", rate, above=0) for end, rate in lr.items()}
    if unused := [end for end in rates if not any(name.endswith(end) for name in names)]:
        raise ValueError(f"lr has rates for {unused}, which end no name; there are {list(names)}")
    if without := [name for name in names if not any(name.endswith(end) for end in rates)]:
        raise ValueError(f"lr has no rate for {without}: give one for the ending, or for '', which ends every name")
    return rates


def rate_of(lr: Rate, name: str) -> float:
    """Return lr itself or, from a mapping, the rate of the longest ending of a name."""
    return lr[max(filter(name.endswith, lr), key=len)] if isinstance(lr, Mapping) else lr


def check_adam(params: Any, lr: Any, betas: Any, eps: Any) -> tuple[Any, tuple[float, float], float]:
    """Return Adam's settings as floats. Parameters must be of one library, and such as can be updated in place."""
    check_dict("params", params)
    if not params:
        raise ValueError("params is empty: there is nothing to train")
    first, *_ = params
    for name, p in params.items():
        check_trainable(f"params[{name!r}]", p)
        check_library(f"params[{name!r}]", p, like=params[first], like_name=f"params[{first!r}]")
        if isinstance(p, np.ndarray) and not p.flags.writeable:
            raise ValueError(f"params[{name!r}] is read-only: Adam updates it in place, so give a copy")
        if isinstance(p, np.ndarray) and p.size and _overlaps_itself(p):
            raise ValueError(f"params[{name!r}] has entries that share memory, as of a view: give a copy")
    check_apart({name: p for name, p in params.items() if isinstance(p, np.ndarray)})  # a GPU would wait for this
    beta1, beta2 = (check_number(f"betas[{i}]", b, above=0, below=1, or_equal=True) for i, b in enumerate(betas))
    return check_rates(lr, params), (beta1, beta2), check_number("eps", eps, above=0)


def _overlaps_itself(p: np.ndarray) -> bool:
    """Return whether an array's strides let two entries share memory: each step must reach beyond all shorter ones."""
    reach = p.itemsize
    for axis in np.argsort(np.abs(p.strides)):
        stride, size = abs(p.strides[axis]), p.shape[axis]
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_like_params(
    label: str, arrays: Mapping[str, Array], params: Mapping[str, Array], home: Mapping[str, str] | None = None
) -> None:
    """Require arrays of the library, dtype and shape of the parameters of their names."""
    for name, array in arrays.items():
        p = params[home[name] if home else name]
        check_trainable(f"{label}[{name!r}]", array, like=p, like_name="params")
        check_shape(f"{label}[{name!r}]", array, p.shape)
