"""Find prompts for the golden mixtures, and write `minilora/conformance/golden/mixtures/prompts.py`.

A prompt is good where the scores of a kept expert and of the next one are `MARGIN` apart at each token, where the
likeliest next token leads by `APART`, and where rounding to bfloat16 moves no logit by more than half the tolerance,
with the adapter merged into its base. Of the first good ones those two are taken whose last tokens keep all four
experts between them, so that no expert can be left out unseen, and by which most bugs are told apart.

Run it with python -m tests.support.find_mixture_prompts.
"""

from itertools import combinations
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from minilora.conformance.golden.answers import TOLERANCE
from minilora.conformance.golden.mixtures import answers, prompts
from minilora.conformance.golden.mixtures.bases import EXPERTS, KEPT
from minilora.conformance.golden.mixtures.cases import APART, MARGIN, MIXTURES
from minilora.conformance.golden.mixtures.formulas import MixtureFormulas

from minilora import Llama
from minilora.language.save import _config
from minilora.layers import experts

BATCH, PAIRS = 1000, 12


def logits_and_margins(model, ids):
    """Return logits (B, T, V), and of each prompt the least margin of its tokens, and the experts of the last one."""
    seen = []

    def best(z, top_k):
        seen.append((np.sort(z, axis=1)[:, ::-1], right(z, top_k)))
        return seen[0][1]

    right = experts.top_experts
    with mock.patch.object(experts, "top_experts", best):
        z = model(ids)
    scores, kept = seen[0]
    margins = (scores[:, KEPT - 1] - scores[:, KEPT]).reshape(len(ids), -1).min(axis=1)
    return z, margins, kept.reshape(*ids.shape, KEPT)[:, -1]


def in_bfloat16(case, arrays):
    """Return what transformers computes with the merged weights in bfloat16."""
    settings = _config(Path("config"), case.base.config, "float32", None)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()}, strict=False)
    merged = model.to(torch.bfloat16).eval()
    return lambda ids: merged(torch.tensor(ids)).logits.double().detach().numpy()


def find(case):
    """Return the seeds of two prompts that are good for a case."""
    arrays = case.base.arrays | MixtureFormulas().changed(case.base.arrays, case.given)
    model, rounded, good = Llama.build(case.base.config, arrays), in_bfloat16(case, arrays), []
    for start in range(0, 1_000_000, BATCH):
        ids = np.array([case.prompt(seed) for seed in range(start, start + BATCH)])
        z, margins, kept = logits_and_margins(model, ids)
        last = np.sort(z[:, -1], axis=-1)
        chosen = np.flatnonzero((margins >= MARGIN) & (last[:, -1] - last[:, -2] >= 1.1 * APART))
        if chosen.size:
            off = np.abs(rounded(ids[chosen]) - z[chosen]).max(axis=(1, 2))
            good += [(int(start + i), {*kept[i].tolist()}) for i in chosen[off <= TOLERANCE["bfloat16"] / 2.5]]
        pairs = [(p, q) for (p, one), (q, other) in combinations(good, 2) if len(one | other) == EXPERTS]
        if len(pairs) >= PAIRS:
            return max(pairs[:PAIRS], key=lambda pair: signatures(case, pair))


def signatures(case, pair):
    """Return how many bugs are told apart by two prompts."""
    with mock.patch.dict(prompts.MIXTURE_PROMPTS, {case.id: pair}):
        vars(case).pop("prompts", None)
        return len(answers.mixture_answers(case).signatures)


if __name__ == "__main__":
    lines = [f'    "{case.id}": {find(case)},' for case in MIXTURES if case.answered]
    text = '"""The seeds of each case\'s prompts, as `tests/support/find_mixture_prompts.py` finds them."""\n\n'
    text += "MIXTURE_PROMPTS: dict[str, tuple[int, int]] = {\n" + "\n".join(lines) + "\n}\n"
    Path(prompts.__file__).write_text(text)
