"""Golden mixtures in transformers with PEFT: its numbers are the answers, but where it reads wrongly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minilora.conformance.golden.judging import compare_golden

from ..conformance.golden.conftest import MIXTURES, written

pytestmark = pytest.mark.peers
pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "golden"
PAGE = (ROOT / "docs" / "library" / "golden-results.md").read_text(encoding="utf-8")
WRONG_IN_PEFT = {
    "experts-lora-b-layout": ("experts-lora-b-layout-is-not-read",),
    "experts-peft-0-19-0": ("experts-in-and-out-are-exchanged",),
    "experts-old-names": ("experts-are-left-out",),
    "experts-old-names-rslora": ("experts-rslora-root-is-that-of-gate-and-up-together",),
}
"""What PEFT 0.21.2 reads wrongly, and the bug by which the verdict names it."""
RECORDED = pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the page has what PEFT 0.21.2 does")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return written(tmp_path_factory.mktemp("golden") / "mixtures", MIXTURES, ())


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@RECORDED
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_peft_is_right_but_in_four_named_cases(golden, tmp_path, precision):
    run("transformers_peft.py", golden, tmp_path / "results", precision, "--cases", "experts-")
    verdicts = {
        case.id: case for case in compare_golden(golden, tmp_path / "results").cases if case.id.startswith("experts-")
    }
    wrong = {id: case.flags for id, case in verdicts.items() if case.state != "right"}
    assert wrong == WRONG_IN_PEFT
    assert max(case.off for id, case in verdicts.items() if id not in wrong) < 1


@RECORDED
@pytest.mark.full
def test_adapters_with_old_names_are_merged_rightly_as_recorded():
    """Its table is this script's output; what is rounding may round otherwise."""
    rows = [line for line in run("../upstream/peft_old_names.py").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    for row in rows:
        name, effect, ours, theirs = row.strip("| ").split(" | ")
        assert float(ours) < 1e-5
        recorded = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
        _, page_effect, page_ours, page_theirs = recorded.strip("| ").split(" | ")
        assert effect == page_effect
        assert float(page_ours) < 1e-5
        assert theirs == page_theirs if float(theirs) > 0.1 else float(page_theirs) < 1e-5
    assert sum(float(row.strip("| ").split(" | ")[3]) > 0.1 for row in rows) == 4


UPSTREAM = {
    "peft_old_rslora_experts.py": r"scaling of gate_up_proj: 4\.0825, expected 2\.8868",
    "peft_old_qwen2_moe.py": r"off by [1-9].*, expected 0; warnings about the adapter: 0",
    "peft_dense_layers_of_a_mixture.py": r"adapters in layer 1: 0, expected 3",
    "peft_old_patterns_of_experts.py": r"rank_pattern of w2: RuntimeError",
    "peft_target_parameters_options.py": r"layers_to_transform=\[0\]: adapters in layers \['0', '1'\]",
    "peft_llama4_experts.py": r"gate_up_proj: lora_A \(12, 24\), lora_B \(16, 12\); expected \(12, 16\) and \(24, 12\)",
}


@RECORDED
@pytest.mark.full
@pytest.mark.parametrize("script", UPSTREAM)
def test_a_script_for_upstream_shows_its_bug(script):
    assert re.search(UPSTREAM[script], run(f"../upstream/{script}"))
