"""Find seeds of prompts for a case or a session of the golden adapters, for `minilora/conformance/golden/cases.toml`.

A prompt is good where the likeliest next token leads by what is asked, and where rounding to bfloat16 moves no logit by
more than half the tolerance, with the adapters merged into the base. Beside a mixture the scores of a kept expert and
of the next one are `MARGIN` apart at each token, and the last tokens of the two prompts keep all experts between them,
so that no expert can be left out unseen. In a session it is good beside each adapter that is asked for. Of the first
good ones those are taken by which most bugs are told apart.

Run it with python -m tests.support.find_golden_prompts ID ...
"""

import dataclasses
import sys
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import transformers

from minilora import Llama
from minilora.conformance.golden.bases import EXPERT_COUNT, EXPERTS_PER_TOKEN, LIVING
from minilora.conformance.golden.cases import CASES, LOGIT_TOLERANCE
from minilora.conformance.golden.leftovers import added
from minilora.conformance.golden.reading import Reading
from minilora.conformance.golden.sessions import SESSIONS, USES
from minilora.conformance.golden.signatures import answers, session_answers
from minilora.language.files.save import _config
from minilora.layer import walk
from minilora.layers import router

BATCH, PAIRS, MARGIN = 400, 12, 0.25
SEEDS_TRIED, GOOD = 600, 7


class Merged:
    """A case's decoder, its adapters merged: in float64, and as transformers computes it in bfloat16."""

    def __init__(self, case):
        config = dataclasses.replace(case.base.config, tie_word_embeddings=False)
        arrays = case.base.arrays | Reading().changed(case.base.arrays, case.given)
        self.model = Llama.build(config, {name: arrays[name] for name in config.shapes()})
        layers = dict(walk(self.model))
        for name in arrays.keys() - config.shapes().keys():
            layers[name.removesuffix(".bias")].bias = arrays[name]
        settings = _config(Path("config"), config, "float32", None)
        theirs = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        theirs._experts_implementation = "eager"
        rounded = transformers.AutoModelForCausalLM.from_config(theirs)
        for name, array in arrays.items():
            module, _, attribute = name.rpartition(".")
            parameter = torch.nn.Parameter(torch.tensor(array, dtype=torch.float32))
            setattr(rounded.get_submodule(module), attribute, parameter)
        self.rounded = rounded.to(torch.bfloat16).eval()

    def off(self, ids, z):
        """Return how far bfloat16 is off, for each prompt and token."""
        theirs = self.rounded(torch.tensor(ids)).logits.double().detach().numpy()
        return np.abs(theirs - z).max(axis=2)

    def logits(self, ids):
        """Return logits (B, T, V), the least margin of each prompt's tokens, and the experts of its last one."""
        seen, right = [], router.top_experts

        def best(z, top_k):
            seen.append((np.sort(z, axis=1)[:, ::-1], right(z, top_k)))
            return seen[-1][1]

        with mock.patch.object(router, "top_experts", best):
            z = self.model(ids)
        if not seen:
            return z, np.full(len(ids), np.inf), [{*range(EXPERT_COUNT)}] * len(ids)
        scores, kept = seen[0]
        margins = (scores[:, EXPERTS_PER_TOKEN - 1] - scores[:, EXPERTS_PER_TOKEN]).reshape(len(ids), -1).min(axis=1)
        return z, margins, [{*row} for row in kept.reshape(*ids.shape, EXPERTS_PER_TOKEN)[:, -1].tolist()]


def leads(z):
    """Return by how much the likeliest next token leads, for each prompt."""
    last = np.sort(z[:, -1], axis=-1)
    return last[:, -1] - last[:, -2]


def of_case(case):
    """Return the seeds of two prompts that are good for a case, and for those that are asked the same ones."""
    models = [Merged(one) for one in (case, *(other for other in CASES if other.after == case.id))]
    good = []
    for start in range(0, 1_000_000, BATCH):
        seeds = np.arange(start, start + BATCH)
        kept = dict.fromkeys(seeds.tolist())
        for model in models:
            ids = np.array([case.prompt(seed) for seed in seeds]).reshape(len(seeds), -1)
            if not seeds.size:
                break
            z, margins, ends = model.logits(ids)
            fine = (leads(z) >= 1.1 * case.apart) & (margins >= MARGIN)
            fine[fine] = (
                model.off(ids[fine], z[fine]).max(axis=1) <= LOGIT_TOLERANCE["bfloat16"] / 2.5 if fine.any() else False
            )
            kept |= dict(zip(seeds.tolist(), ends, strict=True))
            seeds = seeds[fine]
        good += [(seed, kept[seed]) for seed in seeds.tolist()]
        pairs = [(p, q) for (p, one), (q, other) in combinations(good, 2) if len(one | other) == EXPERT_COUNT]
        if pairs and not case.base.mixture:
            return pairs[0]
        if len(pairs) >= PAIRS:
            return max(pairs[:PAIRS], key=lambda pair: len(answers(dataclasses.replace(case, seeds=pair)).signatures))


@cache
def living(use):
    return Merged(SimpleNamespace(base=LIVING, given=added(use)))


def is_good(uses, ids, generate=1):
    """Return whether a prompt (1, T), and the tokens that follow it, are good beside each of the adapters."""
    for model in map(living, uses):
        for tokens in followed(model, ids, generate - 1):
            z, _, _ = model.logits(tokens)
            if z[0, -1].argmax() < 2:  # a special token ends a text
                return False
            if (
                leads(z)[0] < 3 * LOGIT_TOLERANCE["bfloat16"]
                or model.off(tokens, z)[0].max() > LOGIT_TOLERANCE["bfloat16"] / 2
            ):
                return False
    return True


def followed(model, ids, count):
    """Yield a prompt (1, T), and it with one more token after the other, the likeliest."""
    yield ids
    for _ in range(count):
        ids = np.append(ids, model.logits(ids)[0][:, -1].argmax(axis=-1)[:, None], axis=1)
        yield ids


def of_session(session):
    """Return the seeds of a session's prompts."""
    steps = [[USES[name] for name in step["adapters"]] for step in session.steps]
    count = len(session.seeds)
    if session.long:  # each request has a prompt of its own
        seeds = []
        for uses in steps:
            taken = {session.prompts([seed])[0][0, -6] for seed in seeds}
            tried = ((seed, session.prompts([seed])[0]) for seed in range(SEEDS_TRIED))
            seeds.append(next(s for s, ids in tried if ids[0, -6] not in taken and is_good(uses, ids)))
        return tuple(seeds)
    uses = {use for step in steps for use in step}
    generate = max(step.get("generate", 1) for step in session.steps)
    fine = [seed for seed in range(SEEDS_TRIED) if is_good(uses, session.prompts([seed])[0], generate)][:GOOD]

    def shown(seeds):
        return sum(len(one.signatures) for one in session_answers(with_tokens(session, seeds)))

    return max(combinations(fine, count), key=shown)


def with_tokens(session, seeds):
    """Return a session with other prompts, and the tokens that follow them in its first request, where it has such."""
    session = dataclasses.replace(session, seeds=seeds)
    if not session.generated:
        return session
    first = dataclasses.replace(session, steps=session.steps[:1])
    return dataclasses.replace(session, generated=session_answers(first)[0].logits.argmax(axis=-1).tolist())


if __name__ == "__main__":
    for id in sys.argv[1:]:
        case = next((case for case in CASES if case.id == id), None)
        if case:
            print(f"{id}: prompts = {list(of_case(case))}", flush=True)
            continue
        session = next(one for one in SESSIONS if one.id == id)
        found = with_tokens(session, of_session(session))
        print(f"{id}: prompts = {list(found.seeds)}, generated = {found.generated}", flush=True)
