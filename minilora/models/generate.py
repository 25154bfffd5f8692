"""Text, one token at a time: the model scores every token that could come next, one is chosen, and so on.

    z = scores of the V tokens that could come next             (V,)
    greedy:     the token of the largest z
    sampled:    token v with probability exp(z_v / c) / sum_u exp(z_u / c), at temperature c

Each new token needs the keys and values of all tokens before it, and these do not change: position t reads from up to t
alone. So the model keeps them (its `past`), and a new token costs one position and not the whole text again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import check_instance, check_integer, check_number, check_rng, shown
from .llama import Llama


def generate(
    model: Llama,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.0,
    rng: np.random.Generator | None = None,
    end: Collection[int] = (),
) -> Iterator[int]:
    """Yield the ids that follow a prompt, each as soon as it is chosen.

    Parameters
    ----------
    model : Llama
        With adapters or without.
    prompt : sequence of int
        Token ids, at least one.
    tokens : int
        The most to yield, at least 1.
    temperature : float
        0 always takes the likeliest token. Above 0 tokens are drawn: the nearer to 0, the surer the likeliest.
    rng : numpy.random.Generator, optional
        Draws them, on the host: one seed, one text on every device, up to the rounding of the scores. Needed above 0.
    end : collection of int
        Ids after which the text is over; they are not yielded.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range. Nothing is computed then.
    """
    check_instance("model", model, Llama)
    ids = _check_prompt(prompt, model.lm_head.out_features)
    tokens = check_integer("tokens", tokens, at_least=1)
    temperature = check_number("temperature", temperature, above=0, or_equal=True)
    if temperature > 0:
        check_rng(rng)
    return _generate(model, ids, tokens, temperature, rng, _check_end(end))


def _generate(
    model: Llama,
    ids: list[int],
    tokens: int,
    temperature: float,
    rng: np.random.Generator | None,
    end: Collection[int],
) -> Iterator[int]:
    where = backend_of(model.model.norm.weight)
    logits, past = model.extend(where.asarray([ids]))
    for left in reversed(range(tokens)):
        token = choose(where.to_numpy(logits[0]), temperature, rng)
        if token in end:
            return
        yield token
        if left:
            logits, past = model.extend(where.asarray([[token]]), past)


def choose(z: np.ndarray, temperature: float, rng: np.random.Generator | None) -> int:  # (V,) -> ()
    """Return the likeliest token, or one that is drawn."""
    if temperature == 0 or rng is None:
        return int(z.argmax())
    with np.errstate(over="ignore"):  # divided by a tiny temperature, what is below the largest is minus infinity
        p = np.exp((z.astype(np.float64) - z.max()) / temperature)  # the largest is 1: nothing overflows
    return int(rng.choice(len(p), p=p / p.sum()))


def _check_end(end: Any) -> frozenset[int]:
    """Return the ids that end a text, or refuse what is not a collection of ids."""
    if isinstance(end, (str, bytes)) or not isinstance(end, Collection):
        raise TypeError(f"end must be a collection of token ids such as [{shown(end)}], got {shown(end)}")
    return frozenset(check_integer("an id of end", token, at_least=0) for token in end)


def _check_prompt(prompt: Any, vocabulary: int) -> list[int]:
    """Return a prompt as Python ints, or refuse one without a token, or with one that the model does not have."""
    if isinstance(prompt, (str, bytes)) or not hasattr(prompt, "__len__"):
        raise TypeError(f"prompt must be a sequence of token ids, got {type(prompt).__name__}")
    if len(prompt) == 0:
        raise ValueError("prompt is empty: give at least one token")
    ids, most = [check_integer(f"prompt[{i}]", token, at_least=0) for i, token in enumerate(prompt)], vocabulary - 1
    if max(ids) > most:
        raise ValueError(f"prompt[{ids.index(max(ids))}] must be at most {most}, got {max(ids)}")
    return ids
