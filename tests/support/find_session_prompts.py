"""Find prompts for the golden sessions, and print their seeds for `minilora/conformance/golden/sessions.py`.

A prompt is good where the likeliest next token leads by more than rounding to bfloat16 can move two logits, and where
that rounding moves no logit by more than half the tolerance, with each adapter merged that the session asks for. Of
the good ones those are taken with which most bugs show.

Run it with python -m tests.support.find_session_prompts.
"""

from functools import cache
from itertools import combinations
from types import SimpleNamespace

import numpy as np
from minilora.conformance.golden.answers import TOLERANCE
from minilora.conformance.golden.sessionanswers import session_answers

from minilora.conformance.golden.bases import LIVING
from minilora.conformance.golden.leftovers import added
from minilora.conformance.golden.sessions import SEEDS, SESSIONS

from .find_golden_prompts import decoder, in_bfloat16

LEAD = 3 * TOLERANCE["bfloat16"]
SEEDS_TRIED, GOOD = 600, 7


@cache
def models(use):
    """Return the decoder with an adapter merged, and the same in bfloat16."""
    state = SimpleNamespace(base=LIVING, given=added(use))
    return decoder(state), in_bfloat16(state)


def good(uses, ids):
    """Return whether a prompt (1, T) is good beside each of the adapters."""
    for use in uses:
        exact, rounded = models(use)
        z = exact(ids)[0, -1]
        last = np.sort(z)
        if last[-1] - last[-2] < LEAD or np.abs(rounded(ids)[0, -1] - z).max() > TOLERANCE["bfloat16"] / 2:
            return False
    return True


def find(session):
    """Return the seeds of a session's prompts."""
    steps, count = session.steps, len(SEEDS[session.id])
    if session.long:
        seeds, begin = [], 0
        for n, step in enumerate(steps):
            for seed in range(begin, begin + SEEDS_TRIED):
                prompt = session.prompts([0] * n + [seed] + [0] * (count - n - 1))[n]
                if good(step.adapters, prompt) and prompt[0, -6] not in {one for one, _ in seeds}:
                    seeds.append((prompt[0, -6], seed))
                    break
        return tuple(seed for _, seed in seeds)
    uses = {use for step in steps for use in step.adapters}
    fine = [seed for seed in range(SEEDS_TRIED) if good(uses, session.prompts([seed])[0])][:GOOD]

    def shown(seeds):
        SEEDS[session.id] = seeds
        vars(session).pop("requests", None)
        return sum(len(request.signatures) for request in session_answers(session))

    return max(combinations(fine, count), key=shown)


if __name__ == "__main__":
    for session in SESSIONS:
        print(f'    "{session.id}": {find(session)},', flush=True)
