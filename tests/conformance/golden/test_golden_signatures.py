"""Each known mistake of the golden adapters is named, from its own numbers, where the golden folder tells it apart."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.conformance.golden.bases import write_base, write_json, write_safetensors
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.diagnosing import diagnose
from minilora.conformance.golden.signatures import answers

pytestmark = pytest.mark.long

SHOWN = (
    "rslora-with-patterns",
    "dora-rslora",
    "lora-bias",
    "tied-embedding",
    "head",
    "modules-to-save",
    "bias-lora-only",
    "experts-double",
    "experts-shared",
    "experts-rslora",
    "experts-old-names",
)
JUDGED = [case for case in CASES if case.id in SHOWN]
"""One case of each kind: all of them take minutes, and the other cases have the same mistakes."""
NOT_HERE = {
    "rope-turns-neighbours", "attention-is-scaled-by-hidden-size-over-heads", "experts-the-update-is-not-weighted",
    "experts-the-shares-are-renormalised-wrongly", "experts-the-shared-expert-is-left-out",
}  # fmt: skip
"""Mistakes of a decoder, and not of what reads adapters."""
OF_TWO_LAYERS = {
    "layers-are-swapped": "layers-are-reversed",
    "layer-0-is-left-out": "the-second-half-of-the-layers-alone",
    "layer-1-is-left-out": "the-first-half-of-the-layers-alone",
}
"""What such a row is called for a model with any number of layers."""


def check(folder, case, config, tensors, ours):
    """Diagnose the right answers, and each signature, of a case whose base is written."""
    (folder / "adapter").mkdir()
    write_json(folder / "adapter" / "adapter_config.json", config)
    write_safetensors(folder / "adapter" / "adapter_model.safetensors", tensors)
    for flag, z in {"": ours.ends, **ours.signatures}.items():
        if flag in NOT_HERE or "previous" in flag or flag.startswith("nf4"):
            continue
        arrays = {"prompts": np.ascontiguousarray(case.prompts, "i8"), "logits": np.ascontiguousarray(z, "f4")}
        save_file(arrays, folder / "answers.safetensors")
        diagnosis = diagnose(folder / "base", folder / "adapter", folder / "answers.safetensors")
        assert diagnosis.status == bool(flag), str(diagnosis)
        assert OF_TWO_LAYERS.get(flag, flag) in diagnosis.json()["flags"], str(diagnosis)


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case.id)
def test_each_signature_is_its_own_mistake(case, tmp_path):
    ((config, tensors),) = case.files()
    write_base(tmp_path / "base", case.base)
    check(tmp_path, case, config, tensors, answers(case))
