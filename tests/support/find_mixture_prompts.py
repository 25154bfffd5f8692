"""Find a prompt for each of the golden mixtures, and write `minilora/conformance/golden/mixtures/prompts.py`.

A prompt is good where the scores of a kept expert and of the next one are `MARGIN` apart at each token, where the
likeliest next token leads by `APART`, and where rounding to bfloat16 moves no logit by more than half the tolerance,
with the adapter merged into its base. Of the first good ones that is taken by which most bugs are told apart.

Run it with python -m tests.support.find_mixture_prompts.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

from minilora import Llama
from minilora.conformance.golden.answers import TOLERANCE
from minilora.conformance.golden.mixtures import answers, prompts
from minilora.conformance.golden.mixtures.bases import KEPT
from minilora.conformance.golden.mixtures.cases import APART, MARGIN, MIXTURES
from minilora.conformance.golden.mixtures.formulas import MixtureFormulas
from minilora.language.modelfiles.huggingface.folderwriter import _config
from minilora.layers import router

BATCH, GOOD = 1000, 30


def logits_and_margins(model, ids):
    """Return logits (B, T, V), and of each prompt the least margin of its tokens."""
    scores = []

    def best(z, top_k):
        scores.append(np.sort(z, axis=1)[:, ::-1])
        return right(z, top_k)

    right = router.best
    with mock.patch.object(router, "best", best):
        z = model(ids)
    return z, (scores[0][:, KEPT - 1] - scores[0][:, KEPT]).reshape(len(ids), -1).min(axis=1)


def in_bfloat16(case, arrays):
    """Return what transformers computes with the merged weights in bfloat16."""
    settings = _config(Path("config"), case.base.config, "float32", None)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    merged = model.to(torch.bfloat16).eval()
    return lambda ids: merged(torch.tensor(ids)).logits.double().detach().numpy()


def find(case):
    """Return the seed of a prompt that is good for a case."""
    arrays = case.base.arrays | MixtureFormulas().changed(case.base.arrays, case.given)
    model, rounded, good = Llama.build(case.base.config, arrays), in_bfloat16(case, arrays), []
    for start in range(0, 1_000_000, BATCH):
        ids = np.array([case.prompt(seed) for seed in range(start, start + BATCH)])
        z, margins = logits_and_margins(model, ids)
        last = np.sort(z[:, -1], axis=-1)
        chosen = np.flatnonzero((margins >= MARGIN) & (last[:, -1] - last[:, -2] >= 1.1 * APART))
        if chosen.size:
            off = np.abs(rounded(ids[chosen]) - z[chosen]).max(axis=(1, 2))
            good += [int(start + i) for i in chosen[off <= TOLERANCE["bfloat16"] / 2.5]]
        if len(good) >= GOOD:
            break
    return max(good, key=lambda seed: signatures(case, seed))


def signatures(case, seed):
    """Return how many bugs are told apart by a prompt."""
    with mock.patch.dict(prompts.MIXTURE_PROMPTS, {case.id: seed}):
        vars(case).pop("prompts", None)
        return len(answers.mixture_answers(case).signatures)


if __name__ == "__main__":
    lines = [f'    "{case.id}": {find(case)},' for case in MIXTURES if case.answered]
    text = '"""The seed of each case\'s prompt, as `tests/support/find_mixture_prompts.py` finds it."""\n\n'
    text += "MIXTURE_PROMPTS: dict[str, int] = {\n" + "\n".join(lines) + "\n}\n"
    Path(prompts.__file__).write_text(text)
