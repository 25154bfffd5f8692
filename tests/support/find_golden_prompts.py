"""Find prompts for the golden adapters, and write `minilora/conformance/golden/prompts.py`.

A prompt is good where the likeliest next token leads by `APART`, and where rounding to bfloat16 moves no logit by more
than half the tolerance, with the adapter merged into its base.

Run it with python -m tests.support.find_golden_prompts.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import transformers
from minilora.conformance.golden.answers import APART, TOLERANCE

from minilora import Llama
from minilora.conformance.golden import prompts
from minilora.conformance.golden.folder import CASES
from minilora.conformance.golden.formulas import Formulas
from minilora.language.gguf import SIZES

BATCH = 400


def in_bfloat16(case):
    """Return what transformers computes with the merged weights in bfloat16."""
    changed = Formulas().changed(case.base.arrays, case.given)
    sizes = {name: getattr(case.base.config, name) for name in SIZES if name != "rope_theta"}
    rope = {"rope_parameters": dict(case.base.config.rope), "tie_word_embeddings": False}
    rope["attention_bias"] = case.base.biased
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **rope))
    for name, array in {**case.base.arrays, **changed}.items():
        module = model.get_submodule(name.rpartition(".")[0])
        setattr(module, name.rpartition(".")[2], torch.nn.Parameter(torch.tensor(array, dtype=torch.float32)))
    merged = model.to(torch.bfloat16).eval()
    return lambda ids: merged(torch.tensor(ids)).logits.double().detach().numpy()


def decoder(case):
    """Return a case's decoder, its adapters merged."""
    config = dataclasses.replace(case.base.config, tie_word_embeddings=False)
    changed = Formulas().changed(case.base.arrays, case.given)
    arrays = {**case.base.arrays, **changed}
    expected = config.shapes()
    biases = {name: arrays.pop(name) for name in list(arrays) if name not in expected}
    model = Llama.build(config, arrays)
    for name, bias in biases.items():
        layer = model
        for part in name.split(".")[:-1]:
            layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        layer.bias = bias
    return model


def find(cases):
    """Return the seeds of two prompts that are good for each of the cases."""
    models, found = [(decoder(case), in_bfloat16(case)) for case in cases], []
    for start in range(0, 1_000_000, BATCH):
        ids = np.array([cases[0].prompt(seed) for seed in range(start, start + BATCH)])
        chosen = np.arange(BATCH)
        for model, rounded in models:
            if chosen.size:
                z = model(ids[chosen])
                last = np.sort(z[:, -1], axis=-1)
                good = last[:, -1] - last[:, -2] >= 1.1 * APART
                chosen, z = chosen[good], z[good]
            if chosen.size:
                off = np.abs(rounded(ids[chosen]) - z).max(axis=(1, 2))
                chosen = chosen[off <= TOLERANCE["bfloat16"] / 2.5]
        found += [int(start + i) for i in chosen]
        if len(found) >= 2:
            return found[:2]


if __name__ == "__main__":
    groups = {case.id: [case, *(c for c in CASES if c.after == case.id)] for case in CASES if case.answered}
    groups = {id: cases for id, cases in groups.items() if not cases[0].after}
    lines = [f'    "{id}": {tuple(find(cases))},' for id, cases in groups.items()]
    text = '"""The seeds of each case\'s prompts, as `tests/support/find_golden_prompts.py` finds them."""\n\n'
    text += "PROMPTS: dict[str, tuple[int, int]] = {\n" + "\n".join(lines) + "\n}\n"
    Path(prompts.__file__).write_text(text)
