"""Compute the answers to cases and requests: the right numbers, with the signatures of bugs.

A bug has a signature in a case if its numbers are at least `Case.apart` from the right ones and from every other
signature there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from ...language.config import MixtureConfig
from ..naming import Wrong
from .bases import LIVING, Base
from .cases import LOGIT_TOLERANCE, Case
from .exact import exact_logits
from .leftovers import LEFTOVERS, Engine, Moment, Sum, added
from .misreadings import MISREADINGS, MIXTURE_MISREADINGS
from .reading import AdapterData, NamedArrays, Reading
from .sessions import Request, Session, Use

APART = 10 * LOGIT_TOLERANCE["bfloat16"]
"""The least change that a bug makes to some logit after a prompt, in sessions and in cases without one of their own."""
SAME_WITHIN = 1e-6
"""Bugs whose numbers are this close count as equal, since only the order of a sum differs."""
Engines: TypeAlias = Mapping[str, Engine]
Numbers: TypeAlias = dict[str, np.ndarray]
"""Each bug's numbers, by its flag."""
Decoding: TypeAlias = tuple[MixtureConfig | None, bool]
"""The mixture that a reader uses, and whether active experts' updates are not scaled by the router's weights."""
PLAIN_DECODING: Decoding = (None, False)
SHOWN_ROWS, SIGNATURE_ROWS = 4, 1
"""The number of rows of a merged weight in the answers, and in a signature."""


@dataclass(frozen=True)
class CaseAnswers:
    """The right numbers, and each bug's signature by its flag."""

    logits: np.ndarray  # (prompts, T, V); for a request (prompts, V), after the last token, or at all positions
    signatures: dict[str, np.ndarray]  # logits (prompts, V) after the last token, or a request's at all positions
    merged: tuple[str, np.ndarray] | None = None  # a weight's name, and the weight with the adapters merged
    merged_signatures: dict[str, np.ndarray] = field(default_factory=dict)  # the merged weight's first rows, by flag
    each: bool = False  # whether the answers are for all positions of a request

    @property
    def ends(self) -> np.ndarray:
        """The logits (prompts, V) after the last token."""
        return self.logits if self.logits.ndim == 2 else self.logits[:, -1]

    def tensors(self) -> NamedArrays:
        """Return the tensors of a file of answers. Logits at all positions get names of their own."""
        if self.each:
            last = CaseAnswers(self.ends, {flag: z[:, -1] for flag, z in self.signatures.items()})
            every = {f"each.signature.{flag}": z.astype(np.float32) for flag, z in self.signatures.items()}
            return {**last.tensors(), "each.logits": self.logits, **every}
        tensors = {"logits": self.logits, "next_tokens": self.ends.argmax(axis=-1)}
        if self.merged is not None:
            name, weight = self.merged
            tensors[f"merged.{name}"] = weight[:SHOWN_ROWS].astype(np.float32)
        for flag, numbers in self.signatures.items():
            tensors[f"signature.{flag}"] = numbers.astype(np.float32)
            if self.merged is not None:
                tensors[f"signature.{flag}.merged"] = self.merged_signatures[flag].astype(np.float32)
        return tensors


def answers(case: Case) -> CaseAnswers:
    """Compute the answers to a case."""
    base, before = case.base, case.base.arrays
    table = MISREADINGS if base.mixture is None else MIXTURE_MISREADINGS
    misread = base.misread if case.given else base.misdecoded  # with an adapter, the decoder is not judged
    readings = {"": Reading()} | {row.flag: Reading(**row.replaced_in(case)) for row in table}
    changed = {flag: one.changed(before, case.given, misread, case.previous) for flag, one in readings.items()}
    decodings = {flag: one.decoding(base.mixture) if base.mixture else PLAIN_DECODING for flag, one in readings.items()}
    numbers = _end_logits(base, case.prompts, changed, decodings)
    if case.previous:
        flag = next(row.flag for row in table if row.replaced_in(case).get("previous") == "cached")
        old, length = Reading().changed(before, case.previous), case.prompts.shape[1] - 1
        numbers[flag] = _with_old_cache(base, case.prompts, length, old, changed[""])
    kept = distinct(numbers, table, case.apart)
    right = _logits(base, case.prompts, [changed[""]])[0]
    signatures = {flag: numbers[flag] for flag in kept}
    if not case.shown:
        return CaseAnswers(right, signatures)
    weights = {flag: base.in_file({**before, **changed[flag]})[case.shown] for flag in ("", *kept)}
    shown = {flag: weights[flag][:SIGNATURE_ROWS] for flag in kept}
    return CaseAnswers(right, signatures, (case.shown, weights[""]), shown)


def distinct(numbers: Mapping[str, np.ndarray], table: Sequence[Wrong], apart: float, equal: float = -1.0) -> list[str]:
    """Return the flags of the bugs whose numbers differ by `apart` from the right ones, numbers[""], and each other.

    Among bugs closer than that, the one that gets the least wrong is kept, then the alphabetically first. Bugs whose
    numbers are within `equal` of a kept one's are kept as well.
    """
    kept: list[str] = []
    for row in sorted(table, key=lambda row: (row.count, row.flag)):
        bad = numbers[row.flag]
        others = (distance(bad, numbers[other]) for other in kept)
        if distance(bad, numbers[""]) >= apart and all(off >= apart or off <= equal for off in others):
            kept.append(row.flag)
    return [row.flag for row in table if row.flag in kept]


def distance(array: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of an entry."""
    return float(np.abs(array - expected).max())


# --- logits -----------------------------------------------------------------------------------------


def _logits(
    base: Base,
    ids: np.ndarray,
    changed: Sequence[NamedArrays],
    decoding: Decoding = PLAIN_DECODING,
    *,
    last: int = 0,
    cached: int = 0,
) -> np.ndarray:  # (v, prompts, T, V)
    """Return the logits of decoders that differ from the base in these arrays, which may include new biases."""
    before, (mixture, whole) = base.arrays, decoding
    names = {name for one in changed for name in one}
    arrays = {name: np.stack([one[name] if name in one else _default(base, name) for one in changed]) for name in names}
    z = exact_logits(base.config, {**before, **arrays}, ids, cached, last, mixture, before if whole else None)
    return np.broadcast_to(z, (len(changed), *z.shape[-3:]))


def _default(base: Base, name: str) -> np.ndarray:
    """Return one of the base's arrays; a bias that the base does not have is zero."""
    if name in base.arrays:
        return base.arrays[name]
    return np.zeros(len(base.arrays[f"{name.removesuffix('.bias')}.weight"]))


def _end_logits(
    base: Base, ids: np.ndarray, changed: Mapping[str, NamedArrays], decodings: Mapping[str, Decoding]
) -> dict[str, np.ndarray]:
    """Return the logits (prompts, V) after the last token, keyed by bug; equal decoders are computed once."""
    ends: dict[str, np.ndarray] = {}
    decoders = {id(one): one for one in changed.values()}
    keys = {number: _key(base, one) for number, one in decoders.items()}
    for decoding in dict.fromkeys(decodings.values()):
        first: dict[Any, str] = {}
        twin: dict[str, str] = {}
        for flag in (flag for flag in changed if decodings[flag] == decoding):
            twin[flag] = first.setdefault(keys[id(changed[flag])], flag)
        z = _logits(base, ids, [changed[flag] for flag in first.values()], decoding, last=1)[:, :, 0]
        of_first = dict(zip(first.values(), z, strict=True))
        ends |= {flag: of_first[other] for flag, other in twin.items()}
    return {flag: ends[flag] for flag in changed}


def _key(base: Base, changed: NamedArrays) -> frozenset[tuple[str, bytes]]:
    """Return a key that is the same for equal decoders."""
    differ = {name: array for name, array in changed.items() if (array != _default(base, name)).any()}
    return frozenset((name, array.tobytes()) for name, array in differ.items())


def _with_old_cache(
    base: Base, ids: np.ndarray, length: int, old: NamedArrays, new: NamedArrays
) -> np.ndarray:  # (prompts, V)
    """Return logits after the last token, if the first `length` tokens' keys and values come from `old`."""
    return _logits(base, ids, [old, new], cached=length, last=1)[1, :, 0]


# --- sessions ---------------------------------------------------------------------------------------


def session_answers(session: Session) -> list[CaseAnswers]:
    """Compute the answers to each request of a session."""
    return [_of_request(session.requests[:n], request) for n, request in enumerate(session.requests)]


def _of_request(before: Sequence[Request], request: Request) -> CaseAnswers:
    engines = {"": Engine()} | {row.flag: Engine(**row.replaced_in(request)) for row in LEFTOVERS}
    at = _within if request.each else _following if request.generate else _after
    loaded = _loaded([*before, request])
    numbers: dict[str, list[np.ndarray]] = {flag: [] for flag in engines}
    for j, (prompt, now) in enumerate(zip(request.prompts, request.adapters, strict=True)):
        moment = Moment(now, [other.adapters[j] for other in before], request.adapters, loaded)
        for flag, z in at(prompt, engines, moment, before, request.generate).items():
            numbers[flag].append(z)
    found = {flag: np.stack(rows) for flag, rows in numbers.items()}
    found |= {flag: found[""][one.order(request.adapters)] for flag, one in engines.items() if one.order}
    kept = {flag: found[flag] for flag in distinct(found, LEFTOVERS, APART, SAME_WITHIN)}
    return CaseAnswers(found[""], kept, each=request.each or request.generate > 0)


def _loaded(requests: Sequence[Request]) -> list[Use]:
    """Return the adapters that requests loaded and did not unload."""
    uses: dict[str, Use] = {}
    for request in requests:
        uses = {name: use for name, use in uses.items() if name not in request.unload}
        uses |= {use.name: use for use in request.load}
    return list(uses.values())


def _after(prompt: np.ndarray, engines: Engines, m: Moment, before: Sequence[Request], _: int) -> Numbers:
    """Return the logits (V,) after the last token, keyed by bug."""
    changed = {flag: _changed(engine.sum(m), m) for flag, engine in engines.items()}
    ends = _end_logits(LIVING, prompt[None], changed, dict.fromkeys(engines, PLAIN_DECODING))
    for flag, engine in engines.items():
        if cache := engine.cached(m):
            old, length = _changed(added(*cache), m), cached_length(prompt, before)
            ends[flag] = _with_old_cache(LIVING, prompt[None], length, old, changed[""])
    return {flag: z[0] for flag, z in ends.items()}


def _within(prompt: np.ndarray, engines: Engines, m: Moment, *_: Any) -> Numbers:
    """Return the logits (T - 1, V) after each token but the last, keyed by bug; no cache is used."""
    known: dict[Any, np.ndarray] = {}
    numbers = {}
    for flag, engine in engines.items():
        within = engine.within(m)
        changed = _changed(engine.sum(m) if within is None else within, m)
        if (key := _key(LIVING, changed)) not in known:
            known[key] = _logits(LIVING, prompt[None], [changed])[0, 0]
        numbers[flag] = known[key][1:] if engine.late else known[key][:-1]
    return numbers


def _following(prompt: np.ndarray, engines: Engines, m: Moment, _: Any, count: int) -> Numbers:
    """Return the logits (count, V) after the prompt and each generated token but the last, keyed by bug."""
    known: dict[Any, np.ndarray] = {}
    numbers = {}
    for flag, engine in engines.items():
        generated, old = engine.generated(m), _changed(engine.sum(m), m)
        new = old if generated is None else _changed(generated, m)
        if (key := (_key(LIVING, old), _key(LIVING, new))) not in known:
            known[key] = _generated(prompt[None], count, old, new)
        numbers[flag] = known[key]
    return numbers


def _generated(ids: np.ndarray, count: int, old: NamedArrays, new: NamedArrays) -> np.ndarray:  # (1, T) -> (count, V)
    """Return the logits of greedily generated tokens, by `new` with the prompt's keys and values from `old`."""
    rows, cached = [], ids.shape[1]
    for i in range(count):
        decoders = [old] if old is new else [old, new]
        rows.append(_logits(LIVING, ids, decoders, last=1, cached=cached)[0 if i == 0 else -1, 0, 0])
        ids = np.append(ids, [[rows[-1].argmax()]], axis=1)
    return np.stack(rows)


def cached_length(prompt: np.ndarray, before: Sequence[Request]) -> int:
    """Return how many of a prompt's tokens can be cached: those shared with an earlier prompt, never the last."""
    longest = 0
    for other in chain.from_iterable(request.prompts for request in before):
        longest = max(longest, int((np.append(other == prompt, False)).argmin()))
    return min(longest, len(prompt) - 1)


def _changed(sum: Sum | None, m: Moment) -> NamedArrays:
    return _living(tuple(added(m.now) if sum is None else sum))


@lru_cache(maxsize=64)  # most bugs answer most prompts correctly
def _living(sum: tuple[tuple[AdapterData, float], ...]) -> NamedArrays:
    return Reading().changed(LIVING.arrays, sum)
