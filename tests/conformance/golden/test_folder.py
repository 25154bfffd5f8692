"""The folder of golden adapters: files as others write them, answers as our own decoder gives them, the same bits."""

import hashlib
import json
import os
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import FileRefused, Llama, adapt, adapters, attach, cli, load_adapter, merge
from minilora.conformance.golden import exact
from minilora.conformance.golden import folder as writing
from minilora.conformance.golden.bases import BASES, MERGES, TOKENS
from minilora.conformance.golden.cases import CASES as ALL
from minilora.conformance.golden.folder import adapter_names
from minilora.conformance.golden.leftovers import LEFTOVERS, ROUNDED
from minilora.conformance.golden.misreadings import MISREADINGS, MIXTURE_MISREADINGS
from minilora.language.tokens import load_tokenizer
from minilora.variants.sums import weighted_sum

from ...support.language import arrays_of, tiny_llama
from .conftest import FOUND, MIXTURES, index_of

CASES = [case for case in ALL if case not in (*FOUND, *MIXTURES)]

NOT_OURS = ("lora-bias", "pissa-raw", "modules-to-save", "bias-lora-only")
OURS = [case for case in CASES if case.answered and case.id not in NOT_OURS]
"""What `load_adapter` does not refuse."""


def model_of(golden, case):
    return Llama.load(golden / "bases" / case.base.name, dtype="float64")


def adapters_of(golden, entry):
    given = entry["adapter"] if isinstance(entry["adapter"], list) else [[entry["adapter"], 1.0]]
    found = [(load_adapter(golden / folder, dtype="float64"), weight) for folder, weight in given]
    if len(found) == 1:
        return found[0][0]
    paths = sorted({path for adapters, _ in found for path in adapters})
    parts = {path: [(a[path], w) for a, w in found if path in a] for path in paths}
    return {path: weighted_sum(*map(list, zip(*pairs, strict=True))) for path, pairs in parts.items()}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*holds the base's own weight")
@pytest.mark.parametrize("case", OURS, ids=lambda case: case.id)
def test_answers_are_those_of_the_decoder_beside_its_adapter(whole, case):
    entry = next(entry for entry in index_of(whole)["cases"] if entry["id"] == case.id)
    answers = load_file(whole / entry["answers"])
    adapted = attach(model_of(whole, case), adapters_of(whole, entry))
    np.testing.assert_allclose(adapted(np.array(entry["prompts"])), answers["logits"], rtol=0, atol=1e-11)
    (name,) = (name for name in answers if name.startswith("merged."))
    layer = merge(adapted)
    for part in name.split(".")[1:-1]:
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    rows = answers[name]
    np.testing.assert_allclose(layer.weight[: len(rows)], rows, rtol=1e-6)


@pytest.mark.long
def test_target_modules_name_what_has_tensors_and_no_other(whole):
    for case in CASES:
        for (given, _), name in zip(case.given, adapter_names(case), strict=True):
            config = json.loads((whole / name / "adapter_config.json").read_text())
            model, rng = case.base.model, np.random.default_rng(0)
            adapted = adapt(model, config["target_modules"], rank=1, alpha=1, rng=rng)
            assert set(adapters(adapted)) == set(given.modules)


def test_what_load_adapter_refuses_it_refuses_by_its_key(golden):
    for id, key in (("modules-to-save", "modules_to_save"), ("bias-lora-only", "bias")):
        with pytest.raises(FileRefused, match=key):
            load_adapter(golden / "adapters" / id)


def test_what_must_be_refused_is_refused_by_us(golden, index):
    by_the_model = ("refused-another-shape", "refused-unknown-module", "experts-refused-missing-expert")  # see below
    by_the_model += ("language-model-prefix", "alpha-missing")  # the first by the model, the second answered
    for entry in index["cases"]:
        if entry["refused"] and entry["id"] not in by_the_model:
            with pytest.raises(FileRefused):
                load_adapter(golden / entry["adapter"])
    base = Llama.load(golden / "bases" / "tied")
    with pytest.raises(ValueError, match="expected in -> out with out = "):
        attach(base, load_adapter(golden / "adapters" / "refused-another-shape"))
    with pytest.raises(ValueError, match=r"layers\.7"):
        attach(base, load_adapter(golden / "adapters" / "refused-unknown-module"))


@pytest.mark.parametrize("base", [base for base in BASES if base.gguf], ids=lambda base: base.name)
def test_the_gguf_copy_is_the_base_and_its_tokenizer(golden, base):
    folder, file = golden / "bases" / base.name, golden / "bases" / f"{base.name}.gguf"
    ours, theirs = Llama.load(folder, dtype="float64"), Llama.load(file, dtype="float64")
    for name, array in arrays_of(ours).items():
        np.testing.assert_array_equal(arrays_of(theirs)[name], array)
    np.testing.assert_allclose(ours.config.frequencies, theirs.config.frequencies, rtol=1e-7)
    one, other = load_tokenizer(folder), load_tokenizer(file)
    text = "The cat sat on the mat, and then (of course) it said: 'in the end'\n"
    assert one.encode(text) == other.encode(text)
    assert one.decode(one.encode(text)) == text
    assert len(one.encode(text)) < len(text)
    assert one.end == other.end == {1}


def test_a_file_has_the_scaling_that_its_case_is_drawn_with():
    """PiSSA's factors are twice as wide once they are converted, and so is alpha."""
    for case in (case for case in CASES if "r=" not in case.damage):
        for adapter, (config, _) in zip(case.adapters, case.files(), strict=True):
            drawn = adapter.config["lora_alpha"] / adapter.config["r"]
            assert config["lora_alpha"] / config["r"] == drawn, case.id


def test_a_base_says_how_many_positions_it_has(golden):
    """transformers writes it, and mistral.rs reads no base without."""
    for base in BASES:
        config = json.loads((golden / "bases" / base.name / "config.json").read_text())
        assert config["max_position_embeddings"] == base.positions


def test_sizes_are_such_that_a_mix_up_shows(golden):
    for base in (base for base in BASES if not base.square and not base.mixture):
        c = base.config
        assert c.num_attention_heads * c.head_dim != c.hidden_size
        assert 1 < c.num_key_value_heads < c.num_attention_heads
        for name, shape in c.shapes().items():
            assert all(size % 64 == 0 for size in shape)
            assert len(shape) == 1 or shape[0] != shape[1], name
        assert (golden / "bases" / base.name / "model.safetensors").stat().st_size < 1 << 20
    for case in CASES:
        for given, _ in case.given:
            for module in given.modules.values():
                assert all(factor.all() for factor in vars(module).values() if factor is not None)  # no zero
                square = any(factor.shape[0] == factor.shape[1] for factor in (module.lora_A, module.lora_B))
                assert square == (case.id == "square-factor")


@pytest.mark.long
def test_every_known_bug_shows_in_some_case(whole):
    index = index_of(whole)
    shown = {flag for case in index["cases"] for flag in case.get("flags", ())}
    assert shown == {bug.flag for bug in (*MISREADINGS, *MIXTURE_MISREADINGS)}
    assert set(index["flags"]) == {bug.flag for bug in (*MISREADINGS, *MIXTURE_MISREADINGS, *LEFTOVERS, ROUNDED)}


def test_the_index_is_as_its_schema_says(golden, index):
    schema = json.loads((golden / index["$schema"]).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(index, schema)
    short = {**index, "cases": index["cases"][:2], "sessions": []}
    (case, *_), (session, *_) = index["cases"], index["sessions"]
    request = session["requests"][0]
    changes = [{"format": 2}, {"cases": []}, {"more": 1}, {"tolerance": {}}]
    for key in ("id", "answers", "prompts", "adapter"):
        changes.append({"cases": [{k: v for k, v in case.items() if k != key}]})
    for broken in ({"adapters": [{"name": "one"}]}, {"unload": []}, {"merged": False}, {"prompts": []}, {"more": 1}):
        changes.append({"sessions": [{**session, "requests": [{**request, **broken}]}]})
    for change in changes:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**short, **change}, schema)


def test_the_index_says_how_many_rows_a_weight_has(golden, index):
    merged, signature = (index["rows"][name] for name in ("merged", "signature"))
    assert signature < merged
    for case in index["cases"]:
        for name, array in load_file(golden / case["answers"]).items() if "answers" in case else ():
            if name.startswith("merged."):
                assert len(array) == merged
            elif name.endswith(".merged"):
                assert len(array) == signature


def test_a_case_that_is_answered_after_another_names_it_and_has_its_prompts():
    (second,) = [case for case in CASES if case.after]
    first = next(case for case in CASES if case.id == second.after)
    found = {case.id: writing.entry(case, None) for case in (first, second)}
    assert found[second.id]["after"] == first.id != second.id
    assert "after" not in found[first.id]
    assert found[second.id]["prompts"] == found[first.id]["prompts"]
    assert found[second.id]["adapter"] != found[first.id]["adapter"]


@pytest.mark.parametrize("folder", ["golden", pytest.param("whole", marks=pytest.mark.long)])
def test_the_folder_holds_what_the_index_names_and_is_small(request, folder):
    golden = request.getfixturevalue(folder)
    index = index_of(golden)
    named = {"index.json", index["$schema"], *(base["gguf"] for base in index["bases"].values() if "gguf" in base)}
    folders = set(index["bases"])
    for case in index["cases"]:
        named |= {case["answers"]} if "answers" in case else set()
        folders |= {case["adapter"]} if isinstance(case["adapter"], str) else {folder for folder, _ in case["adapter"]}
        assert len({len(prompt) for prompt in case["prompts"]}) == 1
    requests = [request for session in index["sessions"] for request in session["requests"]]
    named |= {request["answers"] for request in requests}
    folders |= {use["folder"] for request in requests for use in request["adapters"] if use}
    assert len({entry["id"] for key in ("cases", "sessions") for entry in index[key]}) == sum(
        len(index[key]) for key in ("cases", "sessions")
    )
    files = {path.relative_to(golden).as_posix(): path.stat().st_size for path in golden.rglob("*") if path.is_file()}
    assert {path for path in files if path.rpartition("/")[0] not in folders} == named
    assert sum(files.values()) < 10_000_000


def test_exact_logits_are_the_decoders_with_several_weights_at_once():
    model = tiny_llama()
    ids = np.random.default_rng(0).integers(0, 20, (2, 7))
    arrays = {name.lstrip("."): array for name, array in arrays_of(model).items()}
    np.testing.assert_allclose(exact.logits(model.config, arrays, ids), model(ids), rtol=0, atol=1e-13)
    name = "model.layers.0.mlp.up_proj.weight"
    several = exact.logits(model.config, {**arrays, name: np.stack([arrays[name], 2 * arrays[name]])}, ids)
    np.testing.assert_allclose(several[0], model(ids), rtol=0, atol=1e-13)
    model.model.layers[0].mlp.up_proj.weight *= 2
    np.testing.assert_allclose(several[1], model(ids), rtol=0, atol=1e-13)


def test_exact_functions_are_those_of_the_processor():
    x = np.linspace(-60, 60, 4001)
    np.testing.assert_allclose(exact.exp(x), np.exp(x), rtol=4e-16)
    cos, sin = exact.turns(np.abs(x) / 8)
    np.testing.assert_allclose(cos, np.cos(x / 8), rtol=0, atol=2e-14)
    np.testing.assert_allclose(sin, np.sin(np.abs(x) / 8), rtol=0, atol=2e-14)


def test_the_tokens_are_those_that_the_merges_make():
    assert len(TOKENS) == len(set(TOKENS)) == 128
    for merge_ in MERGES:
        assert all(part in TOKENS[: TOKENS.index(merge_.replace(" ", ""))] for part in merge_.split(" "))


def test_only_a_new_or_an_empty_folder_is_written(tmp_path, golden, monkeypatch):
    monkeypatch.setattr(writing, "CASES", CASES[1:2])
    monkeypatch.setattr(writing, "SESSIONS", ())
    (tmp_path / "empty").mkdir()
    assert writing.write(tmp_path / "empty") == 1
    assert (tmp_path / "empty" / "index.json").is_file()
    (tmp_path / "file").write_text("as it was")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    for name in ("empty", "file", "link"):
        with pytest.raises(ValueError, match="is there already"):
            writing.write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "as it was"
    assert not (tmp_path / "new").exists()


def test_without_its_package_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["golden", str(tmp_path / "golden")]) == 2
    assert "pip install gguf" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_every_processor_writes_the_same_bits(whole, tmp_path):
    def digest(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    for kernel in ("Nehalem", "Haswell", ""):
        env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": "" if not kernel else "X86_V4 AVX512_ICL"}
        env |= {"OPENBLAS_CORETYPE": kernel} if kernel else {}
        command = [sys.executable, "-m", "minilora", "golden", str(tmp_path / f"golden{kernel}")]
        subprocess.run(command, env=env, check=True, capture_output=True)
        assert digest(tmp_path / f"golden{kernel}") == digest(whole)
