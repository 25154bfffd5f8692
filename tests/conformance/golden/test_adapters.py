"""The folder of golden adapters: files as others write them, answers as our own decoder gives them, the same bits."""

import hashlib
import json
import re
import shutil
import sys

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, Llama, adapt, adapters, attach, cli, load_adapter, merge, merge_adapter
from minilora.conformance.golden import exact, signatures
from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.adapters import AdapterCase, damaged, drawn_adapter, pissa_factors
from minilora.conformance.golden.bases import BASES, EXPERTS_PER_TOKEN, Base, write_safetensors
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.leftovers import LEFTOVERS, ROUNDED
from minilora.conformance.golden.misreadings import MISREADINGS, MIXTURE_MISREADINGS
from minilora.conformance.golden.reading import Reading
from minilora.conformance.golden.sessions import SESSIONS
from minilora.conformance.problems import bugs as table
from minilora.files.tensors import TensorFile
from minilora.language.files.tokens import load_tokenizer
from minilora.variants.stackedlora import packed_B, stacked_A, stacked_B
from minilora.variants.sums import weighted_sum

from ...support.language import arrays_of, tiny_llama
from ...support.sample import one_in
from .conftest import MIXTURES

BY_ID = {case.id: case for case in CASES}
MARGIN = 0.25
"""How far the scores of a kept expert and of the next one are apart at least, so that rounding keeps the same ones."""


@pytest.fixture(scope="module")
def requests(index):
    return [request for session in index["sessions"] for request in session["requests"]]


def entry_of(index, case):
    return next(entry for entry in index["cases"] if entry["id"] == case.id)


# --- files as PEFT writes them ----------------------------------------------------------------------

BYTES = "25fe0568d9f643e238458e866d1b009ac775d508a4d08b882a54e80e25761171"
"""The sha256 of the folder's files, but for the version in the index."""


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_folder_has_the_bytes_that_it_had(golden, index):
    """A new case, row or session changes them; nothing else may, and no processor: CI runs this with older kernels too.

    This test comes first, and writes what others read.
    """
    files = digest(golden)
    files["index.json"] = json.dumps({**index, "minilora": ""})
    assert hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest() == BYTES


def test_pissas_factors_are_the_leading_part_of_a_weight():
    W = np.random.default_rng(0).standard_normal((5, 6)) @ np.diag([9.0, 5, 1, 0.5, 0.2, 0.1])
    A, B = pissa_factors(W, 2, 3.0)
    u, S, vt = np.linalg.svd(W)
    np.testing.assert_allclose(3 * B @ A, u[:, :2] * S[:2] @ vt[:2], atol=1e-9)
    np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-9)  # both have the same half


# --- answers ----------------------------------------------------------------------------------------


def test_a_converted_pissa_adds_what_the_raw_one_learnt():
    """Of twice the rank, for the original base: the change since the start, at the same scaling."""
    raw, converted = (
        drawn_adapter(
            np.random.default_rng(0),
            AdapterCase(("q_proj",), {"r": 2, "lora_alpha": 6}, pissa=form),
            Base("b", 1, True, 2),
        )
        for form in ("raw", "converted")
    )
    (path,) = raw.modules
    assert (converted.config["r"], converted.modules[path].lora_A.shape[0]) == (4, 4)
    deltas = [
        given.config["lora_alpha"] / given.config["r"] * given.modules[path].lora_B @ given.modules[path].lora_A
        for given in (raw, converted)
    ]
    np.testing.assert_allclose(deltas[1], deltas[0] - 3 * raw.starts[path], atol=1e-5)


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
    with pytest.raises(FileRefused, match=r"move lora_B's columns|train it again"):
        load_adapter(adapter)
    return folder


def adapters_of(golden, entry, tmp_path):
    given = entry["adapter"] if isinstance(entry["adapter"], list) else [[entry["adapter"], 1.0]]
    found = [(load_adapter(packed_as_today(golden / f, tmp_path / "today"), dtype="float64"), w) for f, w in given]
    if len(found) == 1:
        return found[0][0]
    paths = sorted({path for adapters, _ in found for path in adapters})
    parts = {path: [(a[path], w) for a, w in found if path in a] for path in paths}
    return {path: weighted_sum(*map(list, zip(*pairs, strict=True))) for path, pairs in parts.items()}


REFUSED = ("lora-bias", "pissa-raw", "modules-to-save", "bias-lora-only", "trained-tokens", "language-model-prefix")
"""What `load_adapter` refuses, or no module of the model fits."""
OURS = [case for case in CASES if case.answered and case.id not in REFUSED and "old-names" not in case.id]


@pytest.mark.filterwarnings("ignore:.*contains the base weight")
@pytest.mark.parametrize("case", one_in(6, OURS, [case.id for case in OURS]))
def test_answers_are_those_of_the_decoder_beside_its_adapter(golden, index, tmp_path, case):
    entry = entry_of(index, case)
    answers = load_file(golden / entry["answers"])
    model = Llama.load(golden / "bases" / case.base.name, dtype="float64")
    adapted = attach(model, adapters_of(golden, entry, tmp_path))
    np.testing.assert_allclose(adapted(np.array(entry["prompts"])), answers["logits"], rtol=0, atol=1e-11)
    if case.base.mixture:
        return
    (name,) = (name for name in answers if name.startswith("merged."))
    layer = merge(adapted)
    for part in name.split(".")[1:-1]:
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    rows = answers[name]
    np.testing.assert_allclose(layer.weight[: len(rows)], rows, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in MIXTURES if case.answered], ids=lambda case: case.id)
def test_answers_of_mixtures_are_those_of_the_files_merged(golden, index, tmp_path, case):
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
    if name is not None:
        rows, merged = answers[name], load_file(tmp_path / "merged" / "model.safetensors")
        np.testing.assert_allclose(merged[name.removeprefix("merged.")][: len(rows)], rows, rtol=1e-5, atol=1e-6)


def test_bugs_lie_ten_tolerances_apart_and_so_do_tokens(golden, index, requests):
    """Of mixtures two and a half; in a session some bugs give the same numbers."""
    bfloat16 = index["tolerance"]["bfloat16"]
    assert index["apart"] >= 10 * bfloat16
    for entry in (*index["cases"], *requests):
        if "answers" not in entry:
            continue
        apart, of_session = entry.get("apart", index["apart"]), "id" not in entry
        assert apart > 2 * bfloat16
        ours = load_file(golden / entry["answers"])
        each = "each." if "each.logits" in ours else ""
        ends = ours[f"{each}logits"] if of_session else ours["logits"][:, -1]
        numbers = [ends, *(ours[f"{each}signature.{flag}"] for flag in entry["flags"])]
        for i, one in enumerate(numbers):
            offs = [np.abs(one - other).max() for other in numbers[:i]]
            assert all(off >= 0.999 * apart or (of_session and j > 0 and off < 1e-4) for j, off in enumerate(offs))
        if "each" not in entry:
            last = np.sort(ends, axis=-1)
            assert (last[..., -1] - last[..., -2]).min() >= (2 * bfloat16 if of_session else apart)
        np.testing.assert_array_equal(ours["next_tokens"], (ends[:, -1] if each else ends).argmax(axis=-1))


def test_every_known_bug_shows_somewhere_and_is_in_the_index(index, requests):
    readers = {bug.flag for bug in (*MISREADINGS, *MIXTURE_MISREADINGS)}
    assert {flag for case in index["cases"] for flag in case.get("flags", ())} == readers
    engines = {bug.flag for bug in LEFTOVERS}
    assert {flag for request in requests for flag in request["flags"]} == engines
    assert set(index["flags"]) == {*readers, *engines, ROUNDED.flag}


def test_a_rows_place_in_its_table_makes_no_difference(index, monkeypatch):
    """But for the order of the flags in the index."""
    for name in ("MISREADINGS", "MIXTURE_MISREADINGS", "LEFTOVERS"):
        monkeypatch.setattr(signatures, name, getattr(signatures, name)[::-1])
    for id in ("v-proj-alone", "square-factor", "experts-peft-0-19-0"):
        expected = entry_of(index, BY_ID[id])["flags"]
        assert sorted(signatures.answers(BY_ID[id]).signatures) == sorted(expected)
    session = next(session for session in SESSIONS if session.id == "scale")
    expected = next(entry for entry in index["sessions"] if entry["id"] == "scale")["requests"]
    for found, request in zip(signatures.session_answers(session), expected, strict=True):
        assert sorted(found.signatures) == sorted(request["flags"])


def test_a_flag_and_a_sentence_stand_once():
    of_suite = {bug.flag: bug for bug in table.BUGS}
    sentences = {bug.says: bug.flag for bug in (*table.BUGS, *MISREADINGS)}
    for rows in (MISREADINGS, MIXTURE_MISREADINGS, LEFTOVERS):
        assert len({row.flag for row in rows}) == len({row.says for row in rows}) == len(rows)
        assert all(sentences.get(row.says, row.flag) == row.flag for row in rows)
        assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", row.flag) for row in rows)
    packed = [row for row in MIXTURE_MISREADINGS if row.flag in of_suite and row.flag.startswith("experts-")]
    assert len(packed) == 11
    assert all((row.parts, row.source) == (of_suite[row.flag].parts, of_suite[row.flag].source) for row in packed)


def test_no_two_experts_have_equal_scores_near_the_kept_ones():
    """So a program that rounds keeps the same experts."""
    for case in (case for case in MIXTURES if case.answered):
        arrays = case.base.arrays
        model = Llama.build(case.base.config, arrays | Reading().changed(arrays, case.given))
        block, h = model.model.layers[0], model.model.embed_tokens(case.prompts)
        u = h + block.self_attn(block.input_layernorm(h))
        scores = block.mlp.gate.weight(block.post_attention_layernorm(u).reshape(-1, u.shape[-1]))
        best = np.sort(scores, axis=1)[:, ::-1]
        assert (best[:, EXPERTS_PER_TOKEN - 1] - best[:, EXPERTS_PER_TOKEN]).min() >= MARGIN, case.id


# --- files ------------------------------------------------------------------------------------------


def test_target_modules_name_what_has_tensors_and_no_other():
    for case in (case for case in CASES if not case.base.mixture and not case.damage):
        for (given, _), (config, _) in zip(case.given, case.files(), strict=True):
            adapted = adapt(case.base.model, config["target_modules"], rank=1, alpha=1, rng=np.random.default_rng(0))
            assert set(adapters(adapted)) == set(given.modules)


@pytest.mark.parametrize(
    "id", ["all-linear", "file-in-bfloat16", "file-in-float16", "dora-square", "alpha-float", "alpha-missing", "b-zero"]
)
def test_what_we_read_is_what_the_answer_is_of(golden, id):
    case = BY_ID[id]
    loaded, ((given, _),) = load_adapter(golden / "adapters" / id, dtype="float64"), case.given
    assert loaded.keys() == given.modules.keys()
    for path, module in given.modules.items():
        np.testing.assert_array_equal(loaded[path].lora_A, module.lora_A)
        np.testing.assert_array_equal(loaded[path].lora_B, module.lora_B)
        assert loaded[path].alpha == given.config["lora_alpha"]
    file = TensorFile(golden / "adapters" / id / "adapter_model.safetensors")
    assert {spec.dtype for spec in file.tensors.values()} == {case.stored or "F32"}
    config = json.loads((golden / "adapters" / id / "adapter_config.json").read_text())
    assert ("lora_alpha" in config) == (id != "alpha-missing")


@pytest.mark.parametrize(
    ("id", "said"),
    [
        ("modules-to-save", "modules_to_save"),
        ("bias-lora-only", "bias is 'lora_only'"),
        ("trained-tokens", "trainable_token_indices"),
        ("refused-empty", "no tensor"),
        ("refused-rank-zero", r"at `\$\.r`"),
        ("refused-rank-negative", r"at `\$\.r`"),
        ("refused-unknown-start", "init_lora_weights"),
        ("refused-missing-factor", r"there is no .*\.lora_B\.weight"),
        ("refused-another-rank", "for the rank 4"),
        ("refused-transposed", "for the rank 4"),
        ("refused-no-prefix", "does not have the form base_model"),
        ("pissa-raw", "init_lora_weights"),
        ("lora-bias", "lora_bias"),
        ("refused-another-shape", "expected in -> out with out = "),
        ("refused-unknown-module", r"layers\.7"),
        ("language-model-prefix", "language_model"),
        ("experts-refused-missing-expert", "is of 3 experts, and base has 4"),
    ],
)
def test_what_we_do_not_read_is_refused_by_its_name(golden, id, said):
    with pytest.raises((FileRefused, ValueError), match=said):
        attach(Llama.load(golden / "bases" / BY_ID[id].base.name), load_adapter(golden / "adapters" / id))


@pytest.mark.parametrize("base", [base for base in BASES if base.gguf], ids=lambda base: base.name)
def test_the_gguf_copy_is_the_base_and_its_tokenizer(golden, base):
    folder, file = golden / "bases" / base.name, golden / "bases" / f"{base.name}.gguf"
    ours, theirs = Llama.load(folder, dtype="float64"), Llama.load(file, dtype="float64")
    for name, array in arrays_of(ours).items():
        np.testing.assert_array_equal(arrays_of(theirs)[name], array)
    np.testing.assert_allclose(ours.config.frequencies, theirs.config.frequencies, rtol=1e-7)
    assert ours.config.max_position_embeddings == theirs.config.max_position_embeddings
    one, other = load_tokenizer(folder), load_tokenizer(file)
    text = "The cat sat on the mat, and then (of course) it said: 'in the end'\n"
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == text
    assert len(one.encode(text)) < len(text)
    assert one.end == other.end == {1}


def test_plain_decoders_alone_have_a_gguf_copy(golden):
    """None in 4 bits, with biases, with the square weights that DoRA is asked of, or with experts."""
    assert {file.stem for file in (golden / "bases").glob("*.gguf")} == {"untied", "tied", "living"}


def test_of_a_missing_expert_the_others_stay_as_they_were():
    """A has an expert's ranks in rows beside each other, and B has them E columns apart."""
    rng, r, E = np.random.default_rng(0), 2, 4
    A, B = rng.standard_normal((E * r, 5)), rng.standard_normal((3, r * E))
    _, left = damaged({}, {"x.lora_A.weight": A, "x.lora_B.weight": B}, "missing expert")
    fewer_A, fewer_B = left.values()
    for e in range(E - 1):
        delta = fewer_B[:, e :: E - 1] @ fewer_A[r * e : r * (e + 1)]
        np.testing.assert_array_equal(delta, B[:, e::E] @ A[r * e : r * (e + 1)])
    assert (len(fewer_A), fewer_B.shape[1]) == ((E - 1) * r, (E - 1) * r)


# --- the index --------------------------------------------------------------------------------------


def test_the_index_is_as_its_schema_says(golden, index):
    schema = json.loads((golden / index["$schema"]).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(index)
    short = {**index, "cases": index["cases"][:2], "sessions": []}
    (case, *_), (session, *_) = index["cases"], index["sessions"]
    changes = [{"format": 2}, {"cases": []}, {"more": 1}, {"tolerance": {}}]
    for key in ("id", "answers", "prompts", "adapter"):
        changes.append({"cases": [{k: v for k, v in case.items() if k != key}]})
    for broken in (
        *({"adapters": [{"name": "one"}]}, {"unload": []}, {"merged": False}, {"prompts": []}, {"more": 1}),
        *({"load": []}, {"load": [None]}, {"generate": 0}, {"each": False}),
    ):
        changes.append({"sessions": [{**session, "requests": [session["requests"][0] | broken]}]})
    assert validator.is_valid(short)
    assert [change for change in changes if validator.is_valid(short | change)] == []


def test_the_folder_holds_what_the_index_names_and_is_small(golden, index, requests):
    named = {"index.json", index["$schema"], *(base["gguf"] for base in index["bases"].values() if "gguf" in base)}
    folders = set(index["bases"])
    for case in index["cases"]:
        named |= {case["answers"]} if "answers" in case else set()
        folders |= {case["adapter"]} if isinstance(case["adapter"], str) else {folder for folder, _ in case["adapter"]}
        assert len({len(prompt) for prompt in case["prompts"]}) == 1
    named |= {request["answers"] for request in requests}
    uses = [use for request in requests for use in (*request["adapters"], *request.get("load", ())) if use]
    folders |= {use["folder"] for use in uses}
    ids = [entry["id"] for key in ("cases", "sessions") for entry in index[key]]
    assert len(ids) == len({*ids}) == 76
    files = {path.relative_to(golden).as_posix(): path.stat().st_size for path in golden.rglob("*") if path.is_file()}
    assert {path for path in files if path.rpartition("/")[0] not in folders} == named
    assert sum(files.values()) < 10_000_000


# --- the same bits ----------------------------------------------------------------------------------


def test_exact_logits_are_the_decoders_with_several_weights_at_once():
    model = tiny_llama()
    ids = np.random.default_rng(0).integers(0, 20, (2, 7))
    arrays = {name.lstrip("."): array for name, array in arrays_of(model).items()}
    np.testing.assert_allclose(exact.exact_logits(model.config, arrays, ids), model(ids), rtol=0, atol=1e-13)
    np.testing.assert_array_equal(
        exact.exact_logits(model.config, arrays, ids, last=1), exact.exact_logits(model.config, arrays, ids)[:, -1:]
    )
    name = "model.layers.0.mlp.up_proj.weight"
    several = exact.exact_logits(model.config, {**arrays, name: np.stack([arrays[name], 2 * arrays[name]])}, ids)
    np.testing.assert_allclose(several[0], model(ids), rtol=0, atol=1e-13)
    model.model.layers[0].mlp.up_proj.weight *= 2
    np.testing.assert_allclose(several[1], model(ids), rtol=0, atol=1e-13)


def test_exact_functions_are_those_of_the_processor():
    x = np.linspace(-60, 60, 4001)
    np.testing.assert_allclose(exact.exp(x), np.exp(x), rtol=4e-16)
    cos, sin = exact.cos_sin(np.abs(x) / 8)
    np.testing.assert_allclose(cos, np.cos(x / 8), rtol=0, atol=2e-14)
    np.testing.assert_allclose(sin, np.sin(np.abs(x) / 8), rtol=0, atol=2e-14)


def test_only_a_new_or_an_empty_folder_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "CASES", CASES[1:2])
    monkeypatch.setattr(writing, "SESSIONS", ())
    (tmp_path / "empty").mkdir()
    assert writing.write_golden(tmp_path / "empty") == 1
    assert (tmp_path / "empty" / "index.json").is_file()
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("empty", "file", "link"):
        with pytest.raises(ValueError, match="already exists"):
            writing.write_golden(tmp_path / name)
    assert (tmp_path / "file").read_text() == "as it was"
    assert not (tmp_path / "new").exists()


def test_without_its_package_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["golden", str(tmp_path / "golden")]) == 2
    assert 'pip install "minilora[files]"' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
