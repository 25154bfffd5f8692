"""Golden adapters in transformers with PEFT: in float64 its numbers are the answers, and it passes in others."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import cli
from minilora.conformance.golden.cases import CASES as ALL

from ..conformance.golden.conftest import FOUND, MIXTURES, index_of, written
from ..support.peers import PEERS, peft, torch, transformers
from ..support.peers import llama as hf
from .test_golden_mixtures_peers import WRONG_IN_PEFT

pytestmark = PEERS


SCRIPT = Path(__file__).parents[2] / "examples" / "golden" / "transformers_peft.py"
CASES = [case for case in ALL if case not in (*FOUND, *MIXTURES)]
ANSWERED = [case.id for case in CASES if case.answered and not case.refused and not case.base.nf4]
NF4 = [case.id for case in CASES if case.base.nf4]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return written(tmp_path_factory.mktemp("golden") / "golden")


@pytest.fixture(scope="module")
def index(golden):
    return index_of(golden)


def adapted(golden, index, case, dtype):
    base = transformers.AutoModelForCausalLM.from_pretrained(golden / case.get("base", index["base"]), dtype=dtype)
    base.model.rotary_emb = hf.LlamaRotaryEmbedding(base.config)
    given = case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]
    if not given:
        return base.eval()
    model = peft.PeftModel.from_pretrained(base, golden / given[0][0], "0", autocast_adapter_dtype=False)
    for i, (folder, _) in enumerate(given[1:], start=1):
        model.load_adapter(golden / folder, str(i), autocast_adapter_dtype=False)
    if len(given) > 1:
        names, weights = [str(i) for i in range(len(given))], [weight for _, weight in given]
        model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        model.set_adapter("sum")
    return model.eval()


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("id", ANSWERED)
def test_answers_are_those_of_peft_in_float64(golden, index, double, id):
    case = next(case for case in index["cases"] if case["id"] == id)
    model, answers = adapted(golden, index, case, torch.float64), load_file(golden / case["answers"])
    with torch.no_grad():
        z = model(input_ids=torch.tensor(case["prompts"])).logits.numpy()
    np.testing.assert_allclose(z, answers["logits"], rtol=0, atol=1e-9)
    if id != "lora-bias":  # which PEFT merges into a bias that the base must have
        (name,) = (name for name in answers if name.startswith("merged."))
        merged = model.merge_and_unload() if case["adapter"] else model
        weight = merged.get_parameter(name.removeprefix("merged.")).detach().numpy()
        np.testing.assert_allclose(weight[: len(answers[name])], answers[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("id", NF4)
def test_answers_beside_four_bits_are_those_of_bitsandbytes(golden, index, id):
    case = next(case for case in index["cases"] if case["id"] == id)
    model, answers = adapted(golden, index, case, torch.float32), load_file(golden / case["answers"])
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # or it computes in bfloat16, where the processor can
    with torch.no_grad():
        z = model(input_ids=torch.tensor(case["prompts"])).logits.numpy()
    np.testing.assert_allclose(z, answers["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_script_passes(golden, tmp_path, precision):
    """Whole, as a user runs it: what PEFT must refuse it refuses, and its rounding is within the tolerance."""
    results = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(golden), str(results), precision], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    known = {"refused-unknown-module": "PEFT loads what fits, and says nothing of the rest"}
    known |= {id: flags[0] for id, flags in WRONG_IN_PEFT.items()}
    (tmp_path / "known.txt").write_text("".join(f"{id}  {reason}\n" for id, reason in known.items()))
    options = ["--compare", str(results), "--json", str(tmp_path / "v.json"), "--xfails", str(tmp_path / "known.txt")]
    assert cli.main(["golden", str(golden), *options]) == 0
    verdicts = json.loads((tmp_path / "v.json").read_text())["cases"]
    assert {one["precision"] for one in verdicts if one["off"]} == {precision, "bfloat16"}


def test_a_missing_factor_is_no_error_in_peft(golden, index):
    """It warns alone, so the script makes the warning an error; when PEFT raises, that line can go."""
    case = next(case for case in index["cases"] if case["id"] == "refused-missing-factor")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        adapted(golden, index, case, torch.float32)
    assert any("missing adapter keys" in str(note.message) for note in notes)
