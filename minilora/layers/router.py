"""The router of a mixture, which chooses K of E experts for each row, with weights.

    l_ne = sum_i x_ni W_ei                      (moe.1)    (N, d) -> (N, E)      W (E, d), the router's weight
    g_nk = p_ne at the k-th kept expert e       (moe.2)    (N, K)                p = softmax of row n of l over S

S is all experts, or only the kept ones (`norm_topk_prob`). The second is also called renormalised: among the kept,
p_e / sum_j p_j = exp(l_e) / sum_j exp(l_j), whatever the sum over all was. So the two differ only in S.

WHICH experts are kept is a step function of l. A small change of l changes it only where two scores are equal, so its
derivative is zero where it exists: the choice is a constant, and l acts on the loss only through g. Among equal scores,
the expert with the lower number is kept, as in a stable sort. (Other programs leave that open: torch.topk may keep the
first ones or the last ones.) Backward, dp is dg at the kept experts and zero at the others. From there
it is the softmax of attention, (att.6), with the sum over S:

    dl_ne = p_ne (dp_ne - sum_j p_nj dp_nj)     (moe.3)    (N, E)                p is 0 outside of S, and so is dl
    dx_ni = sum_e dl_ne W_ei                    (moe.4)    (N, d)                and dW = dl^T x, by (8)

Two consequences. With one kept expert and S the kept ones, g is 1 whatever l is, and the router has no gradient at all.
With S all experts, each row of W has a gradient, also that of an expert which no row keeps.

THE BALANCE. A router that always keeps the same experts wastes the others. Let f_e be the share of the rows that keep
expert e, a constant like the choice, and p the softmax over all experts:

    loss = E sum_e f_e mean_n p_ne              (moe.14)
    dp_ne = E f_e / N                           (moe.15)   (N, E)                then dl by (moe.3)

It is K if all experts are kept equally often or have equal p, and larger if frequently kept experts also have large p.
A small multiple of it is added to a model's loss, over the stacked scores of all layers.

Sources: Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538; Fedus et al., "Switch Transformers",
arXiv 2101.03961, for the balance; the names are those of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..backend import backend_of
from ..checks import Array, check_array, check_flag, check_integer
from ..layer import Cache, Layer, inner, nest, rows
from .attention import softmax
from .stacked import StackedLinear


@dataclass(eq=False, repr=False)
class Router(Layer):
    """A linear layer that scores the experts, with a softmax. Its output is each row's weights of its kept experts."""

    weight: Annotated[StackedLinear, "in -> E"]  # one weight (E, d)
    top_k: int  # K, the number of experts per row
    norm_topk_prob: bool = True  # whether S is the kept experts; then a row's K weights sum to 1

    takes = "... in"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.top_k = check_integer("top_k", self.top_k, at_least=1, at_most=self.experts)
        self.norm_topk_prob = check_flag("norm_topk_prob", self.norm_topk_prob)

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., d) -> (..., K)
        """Return g, the best expert's first, and a cache with p and the choice."""
        scores, weight_cache = self.weight.forward(rows(x))  # eq. (moe.1)  (N, E)
        choice = top_experts(scores, self.top_k)
        p = softmax(masked_to_kept(scores, choice) if self.norm_topk_prob else scores)
        g = p[kept_index(choice)]  # eq. (moe.2)  (N, K)
        g = g.reshape(*x.shape[:-1], self.top_k)
        return g, (x.shape, weight_cache, p, choice)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., d), and the gradient of the weight, of dy = dg (..., K)."""
        shape, weight_cache, p, choice = cache
        dp = backend_of(dy).zeros(p.shape, dy.dtype)
        dp[kept_index(choice)] = rows(dy)
        d_scores = softmax_back(p, dp)
        dx, grads = self.weight.backward(d_scores, weight_cache, need_dx=need_dx)  # eq. (moe.4)
        return None if dx is None else dx.reshape(shape), nest("weight", grads)

    def route(self, x: Array) -> tuple[Array, Array, Cache]:  # (..., d) -> (..., K), (N, K)
        """Return g, the numbers of the kept experts, and the cache."""
        g, cache = self.forward(x)
        return g, cache.kept[-1], cache

    experts = property(lambda self: self.weight.out_features, doc="How many experts there are, E.")
    shape = property(lambda self: (self.top_k, self.weight.in_features), doc="(K, d).")


def top_experts(scores: Array, top_k: int) -> Array:  # (N, E) -> (N, K)
    """Return the indices of each row's highest scores, the highest first; among equal scores, the lower index first."""
    return backend_of(scores).xp.argsort(-scores.real, axis=1, kind="stable")[:, :top_k]


def kept_index(choice: Array) -> tuple[Array, Array]:  # (N, K) -> an index of (N, E)
    """Return the index of each row's kept experts."""
    return backend_of(choice).xp.arange(len(choice))[:, None], choice


def rows_per_expert(choice: Array, experts: int) -> Array:  # (N, K) -> (E,)
    """Return the number of rows per expert; `bincount` would make a GPU wait."""
    return (choice.reshape(-1, 1) == backend_of(choice).xp.arange(experts)).sum(axis=0)


def masked_to_kept(scores: Array, choice: Array) -> Array:  # (N, E) -> (N, E)
    """Return the kept experts' scores, and minus infinity elsewhere, whose exp is 0."""
    xp = backend_of(scores).xp
    masked = xp.full_like(scores, -xp.inf)
    masked[kept_index(choice)] = scores[kept_index(choice)]
    return masked


def softmax_back(p: Array, dp: Array) -> Array:  # (N, E), (N, E) -> (N, E)
    """Return the gradient with respect to the scores, given that of their softmax."""
    d_scores = p * (dp - inner(p, dp))  # eq. (moe.3)
    return d_scores


def balance(scores: Array, top_k: int) -> tuple[Array, Array]:  # (N, E) -> (), (N, E)
    """Return the load-balancing loss of a router, and its gradient with respect to the scores.

    Parameters
    ----------
    scores : array (N, E), float
        The router's scores, ``router.weight.forward(x)[0]``; those of several layers are stacked.
    top_k : int
        The number of experts per row.

    Returns
    -------
    loss : array without axes
        E sum_e f_e mean_n p_ne, as in transformers without masked positions.
    d_scores : array (N, E)
        Its gradient.
    """
    check_array("scores", scores)
    n, E = scores.shape
    choice = top_experts(scores, check_integer("top_k", top_k, at_least=1, at_most=E))
    f = rows_per_expert(choice, E).astype(scores.dtype) / n
    p, xp = softmax(scores), backend_of(scores).xp
    loss = E * (f * p.mean(axis=0)).sum()  # eq. (moe.14)
    dp = xp.broadcast_to(E * f / n, p.shape)  # eq. (moe.15)
    return loss, softmax_back(p, dp)
