"""The answers to a case of a mixture: logits, a merged weight, and the signatures of the bugs that show in it.

Of a bug that changes which experts are kept the decoder is another one. So the bugs are computed in groups that have
one decoder each, and those of a group together.
"""

from __future__ import annotations

import numpy as np

from ....language.config import MixtureConfig
from ..answers import ROWS, Answers, distance
from ..exact import logits
from ..formulas import Arrays
from .cases import APART, MixtureCase
from .formulas import MixtureFormulas
from .misreadings import MIXTURE_MISREADINGS

Decoding = tuple[MixtureConfig, bool]


def mixture_answers(case: MixtureCase) -> Answers:
    """Compute the answers to a case."""
    flags, decodings, changed = _different(case)
    ends = np.empty((len(flags), len(case.prompts), case.base.config.vocab_size))
    for decoding in dict.fromkeys(decodings):
        group = [i for i, other in enumerate(decodings) if other == decoding]
        ends[group] = _logits(case, decoding, [changed[i] for i in group], ends=True)
    apart: list[int] = []
    for i in range(1, len(flags)):
        if all(distance(ends[i], ends[j]) >= APART for j in (0, *apart)):
            apart.append(i)
    weights = [_shown(case, changed[i]) for i in (0, *apart)]
    signatures = {flags[i]: (ends[i], rows[:ROWS]) for i, rows in zip(apart, weights[1:], strict=True)}
    merged = (case.shown, weights[0]) if case.shown else None
    return Answers(_logits(case, decodings[0], changed[:1])[0], merged, signatures)


def _logits(case: MixtureCase, decoding: Decoding, changed: list[Arrays], *, ends: bool = False) -> np.ndarray:
    """Return the logits of v decoders that read a mixture in one way, with the arrays that each has changed.

    They are (v, prompts, T, V), or with `ends` (v, prompts, V).
    """
    before, (mixture, unweighted) = case.base.arrays, decoding
    names = {name for arrays in changed for name in arrays}
    stacked = {name: np.stack([arrays.get(name, before[name]) for arrays in changed]) for name in names}
    plain = before if unweighted else None
    last = 1 if ends else 0
    z = logits(case.base.config, {**before, **stacked}, case.prompts, last=last, mixture=mixture, plain=plain)
    z = np.broadcast_to(z, (len(changed), *z.shape[-3:]))
    return z[:, :, 0] if ends else z


def _shown(case: MixtureCase, changed: Arrays) -> np.ndarray:
    """Return the weight whose merged numbers are in the answers, if there is one."""
    if not case.shown:
        return np.empty(0)
    return case.base.in_file({**case.base.arrays, **changed})[case.shown]


def _different(case: MixtureCase) -> tuple[list[str], list[Decoding], list[Arrays]]:
    """Return the flags of all bugs that change something, "" first for none, and of each the decoder and the arrays.

    Of bugs that change the same, only the first has its flag here.
    """
    before, flags, decodings, changed = case.base.arrays, list[str](), list[Decoding](), list[Arrays]()
    seen = set()
    mixture = case.base.config.mixture
    assert mixture is not None
    right = MixtureFormulas()
    for flag, formulas in [("", right), *((row.flag, right.with_parts(**row.parts)) for row in MIXTURE_MISREADINGS)]:
        arrays, decoding = formulas.changed(before, case.given), formulas.decoding(mixture)
        key = decoding, *((n, a.tobytes()) for n, a in sorted(arrays.items()) if not np.array_equal(a, before[n]))
        if key not in seen:
            seen.add(key)
            flags.append(flag)
            decodings.append(decoding)
            changed.append(arrays)
    return flags, decodings, changed
