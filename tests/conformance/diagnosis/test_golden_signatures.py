"""Each known mistake of the golden adapters is named, from its own numbers, where the golden folder tells it apart."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.conformance.diagnosis.diagnosing import diagnose
from minilora.conformance.golden.answers import answers
from minilora.conformance.golden.bases import write_base, write_json, write_safetensors
from minilora.conformance.golden.cases import CASES, files

pytestmark = pytest.mark.long

JUDGED = [case for case in CASES if case.answered and len(case.adapters) == 1 and not case.refused]
NOT_HERE = {"rope-turns-neighbours", "attention-is-scaled-by-hidden-size-over-heads"}
"""Mistakes of a decoder, and not of what reads adapters."""
OF_TWO_LAYERS = {
    "layers-are-swapped": "layers-are-reversed",
    "layer-0-is-left-out": "the-second-half-of-the-layers-alone",
    "layer-1-is-left-out": "the-first-half-of-the-layers-alone",
}
"""What such a row is called for a model with any number of layers."""


@pytest.mark.parametrize("case", JUDGED, ids=lambda case: case.id)
def test_each_signature_is_its_own_mistake(case, tmp_path):
    ((config, tensors),) = files(case)
    write_base(tmp_path / "base", case.base)
    (tmp_path / "adapter").mkdir()
    write_json(tmp_path / "adapter" / "adapter_config.json", config)
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", tensors)
    ours = answers(case)
    signatures = {flag: z for flag, (z, _) in ours.signatures.items()}
    for flag, z in {"": ours.logits[:, -1], **signatures}.items():
        if flag in NOT_HERE or "previous" in flag or flag.startswith("nf4"):
            continue
        arrays = {"prompts": np.ascontiguousarray(case.prompts, "i8"), "logits": np.ascontiguousarray(z, "f4")}
        save_file(arrays, tmp_path / "answers.safetensors")
        diagnosis = diagnose(tmp_path / "base", tmp_path / "adapter", tmp_path / "answers.safetensors")
        assert diagnosis.status == bool(flag), str(diagnosis)
        assert OF_TWO_LAYERS.get(flag, flag) in diagnosis.json()["flags"], str(diagnosis)
