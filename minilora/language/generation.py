"""Text generation, one token at a time: the model scores every possible next token, and one is chosen.

    z = scores of the V possible next tokens                                          (V,)
    greedy:     the token with the largest z
    sampled:    token v with probability q_v, at temperature c
    top-p:      the same, among the fewest most likely tokens whose probabilities sum to at least P

    q_v = exp(z_v / c) / sum_u exp(z_u / c)                               (gen.1)     (V,)
    a_v = sum of q_u over the tokens u more likely than v                 (gen.2)     (V,)
    p_v = q_v [a_v < P] / sum_u q_u [a_u < P]                             (gen.3)     (V,)

In (gen.2), ties are broken in favour of the smaller id. The most likely token has a = 0, so it always stays. The others
stay until those before them sum to P. Without this cut, unlikely tokens would often be drawn, since there are so many
of them (Holtzman et al., https://arxiv.org/abs/1904.09751).

Each new token needs the keys and values of all earlier tokens. These do not change, since position t reads only
positions up to t. The model therefore caches them (its `past`), and a new token costs one position, not the whole text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ..backend import backend_of
from ..checks import check_ids, check_integer, check_number, check_rng
from .llama import Llama


def generate(
    model: Llama,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    rng: np.random.Generator | None = None,
    end: Collection[int] = (),
) -> Iterator[int]:
    """Return an iterator over the ids that follow a prompt, each computed only when it is requested.

    Parameters
    ----------
    model : Llama
        The model, with or without adapters.
    prompt : sequence of int
        Token ids, at least one.
    tokens : int
        The largest number of tokens to yield, at least 1.
    temperature : float
        0 always chooses the most likely token. Above 0, tokens are sampled; smaller values favour likely tokens.
    top_p : float
        Above 0 and at most 1: sample among the fewest most likely tokens whose probabilities sum to at least this.
    rng : numpy.random.Generator, optional
        Draws the tokens on the host, so that a seed gives the same text on every device, up to rounding of the
        scores. Required if `temperature` is above 0.
    end : collection of int
        Ids that end the text. They are not yielded.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, before anything is computed.
    """
    ids = np.asarray(prompt)
    if not ids.size:
        raise ValueError("prompt is empty: give at least one token")
    check_ids("prompt", ids, model.lm_head.out_features)
    if ids.ndim != 1:
        raise ValueError(f"prompt has shape {ids.shape}, expected (T,)")
    tokens, temperature, top_p = check_sampling(tokens, temperature, top_p)
    if temperature > 0:
        check_rng(rng)
    ends = {check_integer("an id of end", token, at_least=0) for token in end}
    backend = backend_of(model.model.norm.weight)

    def choices() -> Iterator[int]:
        with np.errstate(all="ignore"):
            logits, past = model.extend(backend.asarray(ids[None]))
        for remaining in reversed(range(tokens)):
            if not np.isfinite(z := backend.to_numpy(logits[0])).all():
                raise ValueError("a score of the next token is NaN or infinite: the adapter's numbers are too large")
            token = choose(z, temperature, rng, top_p)
            if token in ends:
                return
            yield token
            if remaining:
                logits, past = model.extend(backend.asarray([[token]]), past)

    return choices()


def check_sampling(tokens: int, temperature: float, top_p: float) -> tuple[int, float, float]:
    """Check that the settings are in range, and return them. `minilora generate` does so before it reads a model."""
    tokens = check_integer("tokens", tokens, at_least=1)
    temperature = check_number("temperature", temperature, above=0, or_equal=True)
    if (top_p := check_number("top_p", top_p, above=0)) > 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p:g}")
    return tokens, temperature, top_p


def choose(z: np.ndarray, temperature: float, rng: np.random.Generator | None, top_p: float = 1.0) -> int:  # (V,) -> ()
    """Return the most likely token if the temperature is 0, otherwise a sampled one."""
    if temperature == 0 or rng is None:
        return int(z.argmax())
    with np.errstate(over="ignore"):  # at a tiny temperature, all but the largest become minus infinity
        e = np.exp((z.astype(np.float64) - z.max()) / temperature)  # the largest is 1, so nothing overflows
    q = e / e.sum()  # eq. (gen.1)
    return int(rng.choice(len(q), p=q if top_p == 1 else nucleus(q, top_p)))


def nucleus(q: np.ndarray, P: float) -> np.ndarray:  # (V,) -> (V,)
    """Keep the fewest most likely tokens whose probabilities sum to at least P, and rescale these to sum to 1."""
    order = np.argsort(-q, kind="stable")
    a = np.empty_like(q)
    a[order] = np.cumsum(q[order]) - q[order]  # eq. (gen.2)
    p: np.ndarray = q * (a < P) / q[a < P].sum()  # eq. (gen.3)
    return p
