"""The answers to a session: of each request the logits after the last token, and those of the bugs that show in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from .answers import APART, distance
from .bases import LIVING
from .exact import logits
from .formulas import Arrays, Formulas
from .leftovers import LEFTOVERS, Moment, Sum, added
from .sessions import Request, Session

SAME = 1e-6
"""Bugs whose numbers are as near as this give the same ones: the order of a sum differs alone."""


@dataclass(frozen=True)
class RequestAnswers:
    """Right numbers of a request, and those of each bug that shows in it, by its flag."""

    logits: np.ndarray  # (prompts, V), after the last token
    signatures: dict[str, np.ndarray]  # likewise

    @property
    def lead(self) -> float:
        """By how much the likeliest next token leads, where it leads least."""
        last = np.sort(self.logits, axis=-1)
        return float((last[:, -1] - last[:, -2]).min())

    def tensors(self) -> Arrays:
        """Return what stands in a request's file."""
        signatures = {f"signature.{flag}": numbers.astype(np.float32) for flag, numbers in self.signatures.items()}
        return {"logits": self.logits, "next_tokens": self.logits.argmax(axis=-1), **signatures}


def session_answers(session: Session) -> list[RequestAnswers]:
    """Compute the answers to each request of a session."""
    return [_answers(session.requests[:n], request) for n, request in enumerate(session.requests)]


def _answers(before: Sequence[Request], request: Request) -> RequestAnswers:
    moments = [
        Moment(now, [other.adapters[j] for other in before], request.adapters) for j, now in enumerate(request.adapters)
    ]
    right = [added(moment.now) for moment in moments]
    uncached = {bug.flag: [bug.sum(moment) for moment in moments] for bug in LEFTOVERS}
    found = _ends(request.prompts, [right, *uncached.values()], right)
    numbers = dict(zip(uncached, found[1:], strict=True))
    for bug in LEFTOVERS:
        if bug.order:
            numbers[bug.flag] = found[0][bug.order(request.adapters)]
        if any(caches := [bug.cached(moment) for moment in moments]):
            numbers[bug.flag] = np.stack([
                _with_old_cache(prompt, shared(prompt, before), added(*cache), sum) if cache else usual
                for prompt, cache, sum, usual in zip(request.prompts, caches, right, found[0], strict=True)
            ])  # fmt: skip
    return RequestAnswers(found[0], _told_apart(found[0], numbers))


def _told_apart(right: np.ndarray, numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Leave out a bug whose numbers are near the right ones, or near another's and not the same."""
    apart: dict[str, np.ndarray] = {}
    for flag, bad in numbers.items():
        others = (distance(bad, other) for other in apart.values())
        if distance(bad, right) >= APART and all(off <= SAME or off >= APART for off in others):
            apart[flag] = bad
    return apart


def shared(prompt: np.ndarray, before: Sequence[Request]) -> int:
    """Return how many tokens a cache can have of a prompt: those it shares with an earlier one, never its last."""
    longest = 0
    for other in chain.from_iterable(request.prompts for request in before):
        longest = max(longest, int((np.append(other == prompt, False)).argmin()))
    return min(longest, len(prompt) - 1)


def _ends(prompts: np.ndarray, sums: Sequence[Sequence[Sum | None]], right: Sequence[Sum]) -> np.ndarray:
    """Return the logits (sums, prompts, V) after the last token, where for each prompt some adapters are added."""
    changed = [[_changed(usual if sum is None else sum) for sum, usual in zip(row, right, strict=True)] for row in sums]
    every = list(chain.from_iterable(changed))
    names = sorted({name for one in every for name in one})
    before = LIVING.arrays
    keys = [b"".join(one.get(name, before[name]).tobytes() for name in names) for one in every]
    first = {key: every[keys.index(key)] for key in keys}
    arrays = {name: np.stack([one.get(name, before[name]) for one in first.values()]) for name in names}
    z = logits(LIVING.config, {**before, **arrays}, prompts, last=1)
    z = np.broadcast_to(z, (len(first), *z.shape[-3:]))[:, :, 0]
    at = np.array([list(first).index(key) for key in keys]).reshape(len(sums), len(prompts))
    return np.asarray(z[at, np.arange(len(prompts))])


def _with_old_cache(prompt: np.ndarray, length: int, old: Sum, new: Sum) -> np.ndarray:  # (V,)
    """Return the logits after the last token, where the first tokens' keys and values are those of other adapters."""
    both, before = [_changed(old), _changed(new)], LIVING.arrays
    names = {*both[0], *both[1]}
    arrays = {name: np.stack([one.get(name, before[name]) for one in both]) for name in names}
    z = logits(LIVING.config, {**before, **arrays}, prompt[None], cached=length, last=1)
    return np.asarray(np.broadcast_to(z, (2, *z.shape[-3:]))[1, 0, 0])


def _changed(sum: Sum) -> Arrays:
    return Formulas().changed(LIVING.arrays, sum)
