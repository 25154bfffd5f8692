"""Golden mixtures: the decoder's own numbers, apart from each other, and a foreign reader's mistakes by their names."""

import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, Llama, attach, load_adapter, merge_adapter
from minilora.conformance import check
from minilora.conformance.golden import exact
from minilora.conformance.golden.bases import BASES, GATE_UP, KEPT, write_safetensors
from minilora.conformance.golden.bases import EXPERTS_DOUBLE as DOUBLE
from minilora.conformance.golden.bases import EXPERTS_FUSED as FUSED
from minilora.conformance.golden.cases import TOLERANCE
from minilora.conformance.golden.formulas import Formulas
from minilora.conformance.golden.judging import compare
from minilora.conformance.golden.misreadings import MISREADINGS, MIXTURE_MISREADINGS
from minilora.conformance.golden.signatures import answers as answers_to
from minilora.conformance.problems import bugs as table
from minilora.variants.stackedlora import packed_B, stacked_A, stacked_B

from . import foreign_mixtures
from .conftest import MIXTURES, index_of, written
from .foreign_mixtures import BUGS


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The folder with the cases of mixtures alone."""
    return written(tmp_path_factory.mktemp("golden") / "mixtures", MIXTURES, ())


@pytest.fixture(scope="module")
def index(golden):
    return index_of(golden)


READ = {"rows_of_A", "columns_of_B", "factors_of", "scaling_of", "exchanged"}
APART, MARGIN = 0.75, 0.25
ANSWERED = [case for case in MIXTURES if case.answered]
SEPTEMBERS = "experts-lora-b-is-read-expert-slowest"
CASE = {case.id: case for case in MIXTURES}


def entry_of(index, case):
    return next(entry for entry in index["cases"] if entry["id"] == case.id)


def merged_model(case):
    arrays = case.base.arrays
    return Llama.build(case.base.config, arrays | Formulas().changed(arrays, case.given))


@pytest.mark.parametrize("case", [CASE["experts-shared"], CASE["experts-lora-b-layout"]], ids=lambda case: case.id)
def test_exact_logits_of_a_mixture_are_the_decoders(case):
    arrays = case.base.arrays | Formulas().changed(case.base.arrays, case.given)
    z = exact.logits(case.base.config, arrays, case.prompts)
    np.testing.assert_allclose(z, merged_model(case)(case.prompts), rtol=0, atol=1e-11)
    ends = exact.logits(case.base.config, arrays, case.prompts, last=1)
    np.testing.assert_array_equal(ends, z[:, -1:])


def test_an_expert_slowest_lora_b_is_a_wrong_answer_of_its_own():
    answers = answers_to(CASE["experts-gate-up-alone"])
    wrong = answers.signatures[SEPTEMBERS]
    others = [answers.logits[:, -1], *(z for flag, z in answers.signatures.items() if flag != SEPTEMBERS)]
    assert min(np.abs(wrong - z).max() for z in others) >= APART > 2 * TOLERANCE["bfloat16"]


def test_rows_of_the_suite_have_its_flag_its_sentence_and_its_formula():
    rows = {row.flag: row for row in MIXTURE_MISREADINGS}
    of_files = [bug for bug in table.BUGS if bug.kinds == ("experts",) and set(bug.of(None)) <= READ]
    assert len(of_files) == 11
    for bug in of_files:
        row = rows[bug.flag]
        assert (row.says, row.source, row.parts) == (bug.says, bug.source, bug.parts)


def test_a_flag_and_a_sentence_stand_once():
    flags, names = ([getattr(row, part) for row in MIXTURE_MISREADINGS] for part in ("flag", "says"))
    assert len(set(flags)) == len(set(names)) == len(MIXTURE_MISREADINGS) >= 24
    others = {row.says: row.flag for row in (*table.BUGS, *MISREADINGS)}
    assert all(others.get(row.says, row.flag) == row.flag for row in MIXTURE_MISREADINGS)
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", flag) for flag in flags)


def test_widths_are_such_that_in_and_out_can_be_exchanged_in_two_bases_alone():
    shapes = {base.name: base.stored[GATE_UP].shape[1:] for base in BASES if base.mixture}  # (2 m, d)
    assert [name for name, (rows, d) in shapes.items() if rows == d] == ["experts-double", "experts-fused"]
    assert [name for name, (rows, d) in shapes.items() if rows == 2 * d] == ["experts-square"]
    for name, array in DOUBLE.stored.items():
        np.testing.assert_array_equal(FUSED.stored[name], array)


def test_no_two_experts_have_equal_scores_near_the_kept_ones():
    """So a program that rounds keeps the same experts."""
    for case in ANSWERED:
        scores = []
        model = merged_model(case)
        mixture = model.model.layers[0].mlp
        h = model.model.embed_tokens(case.prompts)
        block = model.model.layers[0]
        u = h + block.self_attn(block.input_layernorm(h))
        scores = mixture.gate.weight(block.post_attention_layernorm(u).reshape(-1, u.shape[-1]))
        best = np.sort(scores, axis=1)[:, ::-1]
        assert (best[:, KEPT - 1] - best[:, KEPT]).min() >= MARGIN, case.id


def packed_as_today(adapter, folder):
    """Return the adapter's folder, or one with the same adapters as PEFT packs them today."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    grouped = config.pop("lora_B_layout", None) == "grouped_by_expert"
    exchanged = config.get("peft_version") == "0.19.0"
    if not grouped and not exchanged:
        return adapter
    tensors, E = load_file(adapter / "adapter_model.safetensors"), 4
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        A, B = tensors[key], tensors[other := key.replace("lora_A", "lora_B")]
        if grouped:
            tensors[other] = packed_B(B.reshape(len(B), E, -1).swapaxes(0, 1))
        if exchanged:  # (B_e A_e)^T = A_e^T B_e^T
            tensors[key] = np.ascontiguousarray(stacked_B(B, E).swapaxes(1, 2).reshape(len(A), -1))
            tensors[other] = packed_B(stacked_A(A, E).swapaxes(1, 2))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.19.1"}))
    with pytest.raises(FileRefused, match=r"reorder lora_B's columns|train it again"):
        load_adapter(adapter)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("case", ANSWERED, ids=lambda case: case.id)
def test_answers_are_those_of_the_decoder_with_the_files_merged(golden, index, tmp_path, case):
    entry = entry_of(index, case)
    answers = load_file(golden / entry["answers"])
    base = tmp_path / "base"  # in float32: a merged weight is rounded as the base's are
    shutil.copytree(golden / entry["base"], base)
    write_safetensors(base / "model.safetensors", case.base.in_file(case.base.stored))
    merge_adapter(base, packed_as_today(golden / entry["adapter"], tmp_path / "today"), tmp_path / "merged")
    z = Llama.load(tmp_path / "merged", dtype="float64")(np.array(entry["prompts"]))
    np.testing.assert_allclose(z, answers["logits"], rtol=0, atol=1e-4)
    name = next((name for name in answers if name.startswith("merged.")), None)
    assert (name is None) == case.base.fused
    if name is None:
        return
    rows = answers[name]
    weight = load_file(tmp_path / "merged" / "model.safetensors")[name.removeprefix("merged.")]
    np.testing.assert_allclose(weight[: len(rows)], rows, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in ANSWERED if "old" not in case.id], ids=lambda case: case.id)
def test_answers_are_those_of_the_decoder_beside_its_adapter(golden, index, tmp_path, case):
    entry = entry_of(index, case)
    adapter = load_adapter(packed_as_today(golden / entry["adapter"], tmp_path / "today"), dtype="float64")
    adapted = attach(Llama.load(golden / entry["base"], dtype="float64"), adapter)
    z = load_file(golden / entry["answers"])["logits"]
    np.testing.assert_allclose(adapted(np.array(entry["prompts"])), z, rtol=0, atol=1e-11)


@pytest.mark.long
def test_an_adapter_of_three_experts_is_refused_beside_four(golden):
    id = "experts-refused-missing-expert"
    base = Llama.load(golden / "bases" / CASE[id].base.name)
    with pytest.raises((FileRefused, ValueError), match="expert"):
        attach(base, load_adapter(golden / "adapters" / id))


@pytest.mark.long
def test_bugs_lie_apart_by_more_than_two_tolerances_of_bfloat16(golden, index):
    shown = set()
    for case in ANSWERED:
        entry = entry_of(index, case)
        ours = load_file(golden / entry["answers"])
        assert entry["apart"] == APART > 2 * index["tolerance"]["bfloat16"]
        numbers = [ours["logits"][:, -1], *(ours[f"signature.{flag}"] for flag in entry["flags"])]
        for i, one in enumerate(numbers):
            assert all(np.abs(one - other).max() >= 0.999 * APART for other in numbers[:i])
        last = np.sort(numbers[0], axis=-1)
        assert (last[:, -1] - last[:, -2]).min() >= APART
        shown |= set(entry["flags"])
    assert {row.flag for row in MIXTURE_MISREADINGS if row.flag.startswith("experts-")} <= shown


def answer_all(golden, index, results, bug=None):
    results.mkdir()
    for entry in index["cases"]:
        if entry["id"].startswith("experts-"):
            z = foreign_mixtures.answer(golden, entry, bug)
            if z is not None:
                save_file({"logits": z}, results / f"{entry['id']}.safetensors")
    return results


def of_experts(judgement):
    return [case for case in judgement.cases if case.id.startswith("experts-")]


@pytest.mark.long
def test_a_foreign_reader_agrees_in_every_case(golden, index, tmp_path):
    verdicts = of_experts(compare(golden, answer_all(golden, index, tmp_path / "results")))
    assert {verdict.state for verdict in verdicts} == {"right"}
    assert max(verdict.off for verdict in verdicts) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS)
def test_a_foreign_readers_mistake_is_named_by_the_files(golden, index, tmp_path, bug):
    judgement = compare(golden, answer_all(golden, index, tmp_path / "results", bug))
    flag = next(iter(judgement.diagnoses))
    assert flag == BUGS[bug]
    assert judgement.names[flag] in str(judgement).splitlines()[0]
    wrong = [verdict for verdict in of_experts(judgement) if verdict.state == "wrong"]
    assert sum(flag in verdict.flags for verdict in wrong) > len(wrong) / 2


OF_THE_SUITE = {row.flag for row in table.BUGS if row.kinds == ("experts",)}
OF_A_LAYER = [bug for bug, flag in BUGS.items() if flag in OF_THE_SUITE]


@pytest.mark.long
@pytest.mark.parametrize("bug", [None, *OF_A_LAYER])
def test_a_foreign_readers_mistake_is_named_by_the_suite(bug):
    def linear(x, weight, bias, lora_A, lora_B, alpha):
        return x @ weight.T + (0 if bias is None else bias) + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T

    of_experts = SimpleNamespace(forward=partial(foreign_mixtures.forward, bug=bug))
    report = check(SimpleNamespace(forward=linear, kinds={"experts": of_experts}))
    diagnoses = report.kinds["experts"].diagnoses
    assert report.passed == (bug is None)
    assert [text.startswith(table.known(BUGS[bug]).says) for text in diagnoses] == ([True] if bug else [])
