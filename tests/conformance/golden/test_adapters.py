"""What the files of a golden adapter hold, to the byte: PEFT's names, and its version where the layout hangs on it."""

import hashlib
import json
import os
import subprocess
import sys
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
BYTES = "25fe0568d9f643e238458e866d1b009ac775d508a4d08b882a54e80e25761171"
"""The sha256 of the folder's files, but for the version in the index."""


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_folder_has_the_bytes_that_it_had(golden, index):
    """A new case, row or session changes them; nothing else may."""
    files = digest(golden)
    files["index.json"] = json.dumps({**index, "minilora": ""})
    assert hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() == BYTES


@pytest.mark.full  # `.ci/run` writes the folder with older kernels, and the test above holds its bytes
def test_every_processor_writes_the_same_bits(golden, tmp_path):
    for kernel in ("Nehalem", "Haswell", ""):
        env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": "" if not kernel else "X86_V4 AVX512_ICL"}
        env |= {"OPENBLAS_CORETYPE": kernel} if kernel else {}
        command = [sys.executable, "-m", "minilora", "golden", str(tmp_path / f"golden{kernel}")]
        subprocess.run(command, env=env, check=True, capture_output=True)
        assert digest(tmp_path / f"golden{kernel}") == digest(golden)


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
