"""What the files of a golden adapter hold: PEFT's names, and its version where the layout hangs on that."""

from pathlib import Path

import numpy as np
import pytest

from minilora.conformance.golden.adapters import _without_last_expert, adapter_files, damaged, drawn_adapter, leading
from minilora.conformance.golden.bases import EXPERTS
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.sessions import LIVING_ADAPTERS, session_adapters
from minilora.conformance.golden.signatures import CaseAnswers

LAYERS = {
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B"),
    *("lora_B.bias", "lora_magnitude_vector", "base_layer.weight", "base_layer.bias", "lm_head.weight"),
    "trainable_tokens_delta",
}
SOUND = [case for case in CASES if not case.damage]


def test_tensors_have_the_names_that_peft_writes():
    names = [name for case in SOUND for _, tensors in case.files() for name in tensors]
    known = {end for end in LAYERS if any(name.endswith(f".{end}") for name in names)}
    assert known >= {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "base_layer.bias"}
    assert [name for name in names if not any(name.endswith(f".{end}") for end in LAYERS)] == []


@pytest.mark.parametrize("case", SOUND, ids=[case.id for case in SOUND])
def test_the_version_stands_beside_parameters(case):
    for adapter in case.adapters:
        given = drawn_adapter(np.random.default_rng(0), adapter, case.base)  # a case keeps its own
        config, _ = adapter_files(adapter, given, case.base)
        assert ("peft_version" in given.config) == ("peft_version" in config) == ("target_parameters" in config)


def test_a_damaged_file_has_both_factors_turned():
    tensors = {"x.lora_A.weight": np.zeros((2, 5)), "x.lora_B.weight": np.zeros((4, 2)), "other": np.zeros(3)}
    _, turned = damaged({}, dict(tensors), "transposed")
    assert {name: array.shape for name, array in turned.items()} == {
        "x.lora_A.weight": (5, 2), "x.lora_B.weight": (2, 4), "other": (3,),
    }  # fmt: skip


def test_each_adapter_of_a_session_has_its_folder():
    assert [folder for folder, _ in session_adapters()] == [Path("adapters", name) for name in LIVING_ADAPTERS]


def test_pissas_factors_are_the_leading_part_of_a_weight():
    W = np.random.default_rng(0).standard_normal((5, 6)) @ np.diag([9.0, 5, 1, 0.5, 0.2, 0.1])
    A, B = leading(W, 2, 3.0)
    u, S, vt = np.linalg.svd(W)
    np.testing.assert_allclose(3 * B @ A, u[:, :2] * S[:2] @ vt[:2], atol=1e-9)
    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-9)  # both have the same half


def test_an_expert_less_is_one_less_in_both_factors():
    rank = 2
    A, B = np.arange(EXPERTS * rank * 3.0).reshape(-1, 3), np.arange(5.0 * EXPERTS * rank).reshape(5, -1)
    assert _without_last_expert("x.lora_A.weight", A).tolist() == A[: (EXPERTS - 1) * rank].tolist()
    kept = [row for row in range(EXPERTS * rank) if row % EXPERTS < EXPERTS - 1]
    assert _without_last_expert("x.lora_B.weight", B).tolist() == B[:, kept].tolist()


def test_signatures_of_all_positions_stand_in_half_the_width():
    logits = np.random.default_rng(0).standard_normal((2, 3, 4))
    tensors = CaseAnswers(logits, {"bug": logits + 1}, each=True).tensors()
    assert tensors["each.signature.bug"].dtype == np.float32
    assert tensors["each.logits"].dtype == np.float64
    assert (tensors["logits"] == logits[:, -1]).all()
