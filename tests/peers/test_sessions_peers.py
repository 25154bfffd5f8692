"""Golden sessions, and files as they are found, in transformers with PEFT: in float64 its numbers are the answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import cli
from minilora.conformance.golden.asking import request_of
from minilora.conformance.golden.folder import read_index

from ..conformance.golden.conftest import FOUND, index_of, written
from ..support.peers import PEERS, peft, torch, transformers
from ..support.peers import llama as hf

pytestmark = PEERS


SCRIPTS = Path(__file__).parents[2] / "examples" / "golden"
READ = [case.id for case in FOUND if case.answered and case.id != "language-model-prefix"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The sessions, and the cases of files as they are found."""
    return written(tmp_path_factory.mktemp("peers") / "golden", FOUND)


def adapted(base, folder=None, weight=1.0):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model.model.rotary_emb = hf.LlamaRotaryEmbedding(model.config)
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder, "one", autocast_adapter_dtype=False)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scaling["one"] *= weight
    return model.eval()


def ends(model, prompts):
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts)).logits[:, -1].numpy()


def test_a_session_is_peft_beside_each_adapter_alone(golden, double):
    """What a living engine must answer is what a new one answers."""
    for session in read_index(golden).sessions:
        for entry in (one for one in session.requests if not one.each and not one.generate):
            request, right = request_of(golden, entry), load_file(golden / entry.answers)["logits"]
            for prompt, use, expected in zip(request.prompts, request.adapters, right, strict=True):
                model = adapted(golden / session.base, *((use.folder, use.weight) if use else ()))
                np.testing.assert_allclose(ends(model, prompt[None])[0], expected, rtol=0, atol=1e-8)


def test_each_position_of_a_request_is_pefts(golden, double):
    """Of the prompt from one pass, of tokens that follow from `generate`, with its cache."""
    for session in read_index(golden).sessions:
        for entry in (one for one in session.requests if one.each or one.generate):
            request, right = request_of(golden, entry), load_file(golden / entry.answers)["each.logits"]
            for prompt, use, expected in zip(request.prompts, request.adapters, right, strict=True):
                model = adapted(golden / session.base, *((use.folder, use.weight) if use else ()))
                ids = torch.tensor(prompt[None])
                if request.each:
                    with torch.no_grad():
                        found = model(input_ids=ids).logits[0, :-1].numpy()
                else:
                    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
                    made = model.generate(input_ids=ids, max_new_tokens=request.generate, **options)
                    found = torch.cat(made.logits).numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("id", READ)
def test_a_file_as_it_is_found_is_what_peft_reads(golden, double, id):
    index = index_of(golden)
    case = next(case for case in index["cases"] if case["id"] == id)
    model = adapted(golden / case.get("base", index["base"]), golden / case["adapter"])
    expected = load_file(golden / case["answers"])["logits"][:, -1]
    np.testing.assert_allclose(ends(model, case["prompts"]), expected, rtol=0, atol=1e-8)


@pytest.mark.full
def test_the_script_finds_the_hot_swap_that_drops_patterns(golden, tmp_path):
    """Where this fails since PEFT swaps rightly, its line in docs/library/golden-results.md can go."""
    results, script = tmp_path / "results", SCRIPTS / "transformers_peft.py"
    done = subprocess.run(
        [sys.executable, str(script), str(golden), str(results), "--sessions"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    cli.main(["golden", str(golden), "--compare", str(results), "--json", str(tmp_path / "v.json")])
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert not verdict["unanswered sessions"]
    wrong = [one for one in verdict["cases"] if "." in one["id"] and one["state"] != "right"]
    names = {"same-name": (1, 3, 4), "long-prefix-same-name": (1, 2)}
    assert [one["id"] for one in wrong] == [f"{name}.{n}" for name, numbers in names.items() for n in numbers]
    flag = "patterns-are-dropped-where-an-adapter-is-swapped-in"
    assert all(flag in one["flags"] for one in wrong[:-1])  # in the last it moves a logit by less than signatures do
    assert verdict["diagnoses"][0]["flag"] == flag
