"""Golden adapters, mixtures, files as they are found and sessions in transformers with PEFT.

In float64 its numbers are the answers, and in others it passes, but where it reads wrongly.
"""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import cli
from minilora.conformance.golden.asking import request_of
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.diagnosing import diagnose
from minilora.conformance.golden.folder import read_index
from minilora.conformance.golden.judging import compare_golden

from ..conformance.golden.conftest import MIXTURES, index_of, written
from ..support.peers import PEERS, peft, save_file, torch, transformers
from ..support.peers import llama as hf
from ..support.tiny_peers import llama, tuned

pytestmark = PEERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "library" / "golden-results.md").read_text(encoding="utf-8")
WITHOUT_EXPERTS = [case for case in CASES if case.answered and not case.refused and case not in MIXTURES]
READ = [case.id for case in WITHOUT_EXPERTS if not case.base.nf4 and case.id != "language-model-prefix"]
NF4 = [case.id for case in WITHOUT_EXPERTS if case.base.nf4]
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
    return written(tmp_path_factory.mktemp("golden") / "golden")


@pytest.fixture(scope="module")
def index(golden):
    return index_of(golden)


@pytest.fixture(scope="module")
def cases(index):
    return {case["id"]: case for case in index["cases"]}


def adapted(base, given, dtype=torch.float64):
    """The model of a folder with PEFT's adapters: folders, each with its weight."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.model.rotary_emb = hf.LlamaRotaryEmbedding(model.config)
    for i, (folder, _) in enumerate(given):
        if i == 0:
            model = peft.PeftModel.from_pretrained(model, folder, "0", autocast_adapter_dtype=False)
        else:
            model.load_adapter(folder, str(i), autocast_adapter_dtype=False)
    if len(given) > 1:
        names, weights = [str(i) for i in range(len(given))], [weight for _, weight in given]
        model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        model.set_adapter("sum")
    elif given:
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scaling["0"] *= given[0][1]
    return model.eval()


def of_case(golden, index, case, dtype):
    """The model of a case, and its answers."""
    given = case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]
    base = golden / case.get("base", index["base"])
    model = adapted(base, [(golden / folder, weight) for folder, weight in given], dtype)
    return model, load_file(golden / case["answers"]) if "answers" in case else None


def logits(model, prompts):
    with torch.no_grad():
        return model(input_ids=torch.tensor(prompts)).logits.numpy()


def run(script, *arguments):
    """Run a script of examples/golden, and return what it printed."""
    command = [sys.executable, str(ROOT / "examples" / "golden" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("id", READ)
def test_answers_are_those_of_peft_in_float64(golden, index, cases, double, id):
    model, answers = of_case(golden, index, cases[id], torch.float64)
    np.testing.assert_allclose(logits(model, cases[id]["prompts"]), answers["logits"], rtol=0, atol=1e-9)
    if id != "lora-bias":  # which PEFT merges into a bias that the base must have
        (name,) = (name for name in answers if name.startswith("merged."))
        merged = model.merge_and_unload() if cases[id]["adapter"] else model
        weight = merged.get_parameter(name.removeprefix("merged.")).detach().numpy()
        np.testing.assert_allclose(weight[: len(answers[name])], answers[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("id", NF4)
def test_answers_beside_four_bits_are_those_of_bitsandbytes(golden, index, cases, id):
    model, answers = of_case(golden, index, cases[id], torch.float32)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # or it computes in bfloat16, where the processor can
    np.testing.assert_allclose(logits(model, cases[id]["prompts"]), answers["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_script_passes(golden, tmp_path, precision):
    """Whole, as a user runs it: what PEFT must refuse it refuses, and its rounding is within the tolerance."""
    results = tmp_path / "results"
    run("transformers_peft.py", golden, results, precision)
    known = {"refused-unknown-module": "PEFT loads what fits, and says nothing of the rest"}
    known |= {id: flags[0] for id, flags in WRONG_IN_PEFT.items()}
    (tmp_path / "known.txt").write_text("".join(f"{id}  {reason}\n" for id, reason in known.items()))
    options = ["--compare", str(results), "--json", str(tmp_path / "v.json"), "--xfails", str(tmp_path / "known.txt")]
    assert cli.main(["golden", str(golden), *options]) == 0
    verdicts = json.loads((tmp_path / "v.json").read_text())["cases"]
    assert {one["precision"] for one in verdicts if one["off"]} == {precision, "bfloat16"}


def test_a_missing_factor_is_no_error_in_peft(golden, index, cases):
    """It warns alone, so the script makes the warning an error; when PEFT raises, that line can go."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        of_case(golden, index, cases["refused-missing-factor"], torch.float32)
    assert any("missing adapter keys" in str(note.message) for note in notes)


# --- mixtures -------------------------------------------------------------------------------------


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


# --- sessions -------------------------------------------------------------------------------------


def answered(model, request, prompt):
    """What a new engine says: of the last position, of each from one pass, or of what follows, with its cache."""
    if request.generate:
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        made = model.generate(input_ids=torch.tensor(prompt[None]), max_new_tokens=request.generate, **options)
        return torch.cat(made.logits).numpy()
    (z,) = logits(model, prompt[None])
    return z[:-1] if request.each else z[-1]


def test_a_session_is_peft_beside_each_adapter_alone(golden, double):
    """What a living engine must answer is what a new one answers."""
    for session in read_index(golden).sessions:
        for entry in session.requests:
            request, answers = request_of(golden, entry), load_file(golden / entry.answers)
            of_each = entry.each or entry.generate
            right, tolerance = (answers["each.logits"], 1e-5) if of_each else (answers["logits"], 1e-8)
            for prompt, use, expected in zip(request.prompts, request.adapters, right, strict=True):
                model = adapted(golden / session.base, [(use.folder, use.weight)] if use else [])
                np.testing.assert_allclose(answered(model, request, prompt), expected, rtol=0, atol=tolerance)


@pytest.mark.full
def test_the_script_finds_the_hot_swap_that_drops_patterns(golden, tmp_path):
    """Where this fails since PEFT swaps rightly, its line in docs/library/golden-results.md can go."""
    results = tmp_path / "results"
    run("transformers_peft.py", golden, results, "--sessions")
    cli.main(["golden", str(golden), "--compare", str(results), "--json", str(tmp_path / "v.json")])
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert not verdict["unanswered sessions"]
    wrong = [one for one in verdict["cases"] if "." in one["id"] and one["state"] != "right"]
    names = {"same-name": (1, 3, 4), "long-prefix-same-name": (1, 2)}
    assert [one["id"] for one in wrong] == [f"{name}.{n}" for name, numbers in names.items() for n in numbers]
    flag = "patterns-are-dropped-where-an-adapter-is-swapped-in"
    assert all(flag in one["flags"] for one in wrong[:-1])  # in the last it moves a logit by less than signatures do
    assert verdict["diagnoses"][0]["flag"] == flag


# --- a diagnosis ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A decoder and an adapter with DoRA and rsLoRA, as the two write them."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = llama(num_hidden_layers=3, initializer_range=0.15)
    model.save_pretrained(folder / "model")
    settings = {"lora_alpha": 10, "use_rslora": True, "use_dora": True, "target_modules": "all-linear"}
    tuned(model, folder / "adapter", size=0.2, **settings)
    return folder


def loaded(files):
    base = transformers.AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, files / "adapter")


def diagnosed(files, model, computed_in="float32"):
    """The diagnosis of what a model says of two prompts."""
    ids = torch.randint(2, 64, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tensors = {"prompts": ids, "logits": model(ids).logits.float().contiguous()}
    save_file(tensors, files / "logits.safetensors", {"computed_in": computed_in})
    return diagnose(files / "model", files / "adapter", files / "logits.safetensors")


def test_what_peft_computes_is_diagnosed_as_right(files):
    """Beside, merged, and in bfloat16 where that is declared."""
    model = loaded(files)
    assert diagnosed(files, model).status == 0
    assert diagnosed(files, model.merge_and_unload()).status == 0
    half = loaded(files).to(torch.bfloat16)
    assert diagnosed(files, half, "bfloat16").status == 0
    assert "as if computed in bfloat16" in diagnosed(files, half).text


def test_what_peft_does_not_compute_has_a_name(files):
    """An adapter that is switched off, and a merged model that was saved in bfloat16."""
    model = loaded(files)
    with model.disable_adapter():
        assert diagnosed(files, model).details["flags"] == ["the-adapter-is-not-applied"]
    merged = model.merge_and_unload().to(torch.bfloat16).float()
    assert diagnosed(files, merged).details["flags"] == ["all-weights-in-bfloat16"]
