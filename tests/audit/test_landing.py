"""Where adapters land: models of other kinds, mixtures, models that see, and names of other programs."""

import json
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import load_adapter
from minilora.audit.auditing import audit
from minilora.checks import FileRefused

from .adapters import (
    EXPERTS,
    LAYERS,
    PREFIX,
    D,
    V,
    config,
    expert_factors,
    factors,
    gguf,
    model,
    paths,
    peft,
    renamed,
)

QV = ("q_proj", "v_proj")


def codes(report, *levels):
    return [finding.code for finding in report.findings if finding.level in levels]


def of_experts(folder, settings=None, tensors=lambda t: t, **options):
    more = {"target_modules": [], "target_parameters": EXPERTS} | (settings or {})
    return peft(folder, tensors(expert_factors(**options)), config(**more))


def written(folder, arrays, settings=None):
    """A model's folder with these arrays."""
    folder.mkdir()
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings or {}))
    return folder


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("exchanged", [False, True])
def test_experts_of_both_packings_are_sound(tmp_path, apart, exchanged):
    settings = {"peft_version": "0.18.1" if exchanged else "0.21.2"}
    adapter = of_experts(tmp_path / "a", settings, exchanged=exchanged)
    report = audit(adapter, model(tmp_path / "m", experts=4, apart=apart))
    assert report.word == "SOUND", str(report)
    assert codes(report, "note") == (["packing-of-old-peft"] if exchanged else []) + ["target-parameters"]
    assert {k.adapted for k in report.kinds if k.name.startswith("experts'")} == {LAYERS}
    assert all(k.adapted == 0 for k in report.kinds if not k.name.startswith("experts'"))


def test_experts_whose_weights_lie_the_other_way_round_are_sound(tmp_path):
    for version in ("0.18.1", "0.19.0", "0.21.2"):
        adapter = of_experts(tmp_path / version, {"peft_version": version}, exchanged=version == "0.19.0")
        report = audit(adapter, model(tmp_path / f"m{version}", experts=4, in_out=True))
        assert report.word == "SOUND", str(report)


def test_experts_beside_attention_and_a_shared_expert_are_counted_apart(tmp_path):
    tensors = expert_factors() | factors(paths("q_proj"))
    adapter = peft(tmp_path / "a", tensors, config("q_proj", target_parameters=EXPERTS))
    report = audit(adapter, model(tmp_path / "m", experts=4, shared=True))
    assert report.word == "SOUND", str(report)
    counts = {kind.name: (kind.adapted, kind.total) for kind in report.kinds}
    assert counts["experts' gate_up_proj"] == counts["q_proj"] == (LAYERS, LAYERS)
    assert counts["shared expert's up_proj"] == (0, LAYERS)


def test_arrays_that_are_named_without_their_module_are_the_experts(tmp_path):
    tensors = expert_factors() | factors(paths("q_proj"))
    bare = [name.rpartition(".")[2] for name in EXPERTS]
    adapter = peft(tmp_path / "a", tensors, config("q_proj", target_parameters=bare))
    report = audit(adapter, model(tmp_path / "m", experts=4))
    assert report.word == "SOUND", str(report)
    assert load_adapter(adapter)["model.layers.0.mlp.experts.gate_up_proj"].experts == 4


def test_an_adapter_of_the_shared_expert_alone_is_told(tmp_path):
    rng, tensors = np.random.default_rng(0), {}
    for i in range(LAYERS):
        name = f"{PREFIX}model.layers.{i}.mlp.shared_expert.up_proj"
        tensors |= {
            f"{name}.lora_A.weight": rng.standard_normal((2, D)),
            f"{name}.lora_B.weight": rng.standard_normal((7, 2)),
        }
    report = audit(peft(tmp_path / "a", tensors, config("up_proj")), model(tmp_path / "m", experts=4, shared=True))
    assert report.word == "SOUND", str(report)
    (note,) = [f for f in report.findings if f.code == "experts-untouched"]
    assert "the shared expert alone" in note.text


BROKEN_EXPERTS = {
    "exchanged, by today's version": ("packing-exchanged", {}, {"exchanged": True}, {}),
    "exchanged, without a version": ("packing-undecided", {"peft_version": None}, {"exchanged": True}, {}),
    "square, without a version": ("packing-undecided", {"peft_version": None}, {"m": 4}, {"square": True}),
    "packed as today, by an old version": ("packing-contradicted", {"peft_version": "0.18.0"}, {}, {}),
    "another number of experts": ("experts-differ", {}, {"E": 3}, {}),
    "another rank": ("rank-differs", {"r": 3}, {}, {}),
    "one array named alone": ("target-parameters", {"target_parameters": EXPERTS[:1]}, {}, {}),
}


@pytest.mark.parametrize("what", BROKEN_EXPERTS)
def test_what_is_wrong_with_experts_is_named(tmp_path, what):
    code, settings, options, sizes = BROKEN_EXPERTS[what]
    report = audit(of_experts(tmp_path / "a", settings, **options), model(tmp_path / "m", experts=4, **sizes))
    assert code in codes(report, "wrong", "suspicious"), str(report)


def test_the_experts_of_mlx_lm_land_under_their_other_name(tmp_path):
    rng, tensors = np.random.default_rng(0), {}
    for i in range(LAYERS):
        name = f"model.layers.{i}.mlp.switch_mlp.up_proj"
        tensors |= {f"{name}.lora_a": rng.standard_normal((4, 2, D)), f"{name}.lora_b": rng.standard_normal((4, 6, 2))}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapters.safetensors")
    settings = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 2, "scale": 20.0}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    report = audit(tmp_path / "a", model(tmp_path / "m", experts=4, apart=True))
    assert (report.word, report.landing.lost) == ("SOUND", []), str(report)


def test_biases_that_were_trained_and_are_not_in_the_file_are_told(tmp_path):
    arrays = {f"model.layers.{i}.self_attn.q_proj.weight": np.ones((12, D), "f4") for i in range(LAYERS)}
    arrays |= {f"model.layers.{i}.self_attn.q_proj.bias": np.ones(12, "f4") for i in range(LAYERS)}
    adapter = peft(tmp_path / "a", factors(paths("q_proj")), config("q_proj", bias="lora_only"))
    assert "trained-bias-missing" in codes(audit(adapter, written(tmp_path / "m", arrays)), "wrong")
    assert "trained-bias-missing" not in codes(audit(adapter, model(tmp_path / "n")), "wrong")


def test_the_folder_above_an_adapter_is_pointed_to_it(tmp_path):
    peft(tmp_path / "mine", factors(paths("q_proj")), config("q_proj"))
    with pytest.raises(FileRefused, match="its folder 'mine' holds one"):
        audit(tmp_path)


def test_an_adapter_of_matrices_that_the_model_has_in_one_is_told_so(tmp_path):
    arrays = {f"model.layers.{i}.self_attn.qkv_proj.weight": np.ones((20, D), "f4") for i in range(LAYERS)}
    report = audit(peft(tmp_path / "a", factors(paths(*QV)), config(*QV)), written(tmp_path / "m", arrays))
    assert "has q_proj, k_proj, v_proj in one matrix, 'model.layers.0.self_attn.qkv_proj'" in report.diagnoses[0]
    tensors = {n.replace("q_proj", "qkv_proj"): a for n, a in factors(paths("q_proj")).items()}
    report = audit(peft(tmp_path / "b", tensors, config("qkv_proj")), model(tmp_path / "n"))
    assert "has q_proj, k_proj, v_proj apart" in report.diagnoses[0]


def test_experts_that_are_named_and_missing_are_told(tmp_path):
    adapter = peft(tmp_path / "a", factors(paths("q_proj")), config("q_proj", target_parameters=EXPERTS))
    report = audit(adapter, model(tmp_path / "m", experts=4))
    assert codes(report, "wrong") == ["target-parameters-missing"]


@pytest.mark.parametrize("what", ["embed_tokens", "lm_head"])
def test_a_tied_model_is_worth_a_note(tmp_path, what):
    path = "lm_head" if what == "lm_head" else "model.embed_tokens"
    adapter = peft(tmp_path / "a", factors([path, *paths("q_proj")]), config(what, "q_proj"))
    report = audit(adapter, model(tmp_path / "m", tied=True))
    assert (report.word, codes(report, "note")) == ("SOUND", ["tied-head"]), str(report)


def test_shards_of_a_model_are_one(tmp_path):
    adapter = peft(tmp_path / "a", factors(paths(*QV)), config(*QV))
    report = audit(adapter, model(tmp_path / "m", shards=5))
    assert report.word == "SOUND"
    assert {k.name: (k.adapted, k.total) for k in report.kinds}["q_proj"] == (LAYERS, LAYERS)


def test_an_adapter_of_the_model_without_its_head_is_sound(tmp_path):
    tensors = renamed(factors(paths(*QV)), f"{PREFIX}model.", PREFIX)
    mapping = {"base_model_class": "LlamaModel", "parent_library": "transformers"}
    adapter = peft(tmp_path / "a", tensors, config(*QV, task_type=None, auto_mapping=mapping))
    report = audit(adapter, model(tmp_path / "m"))
    assert (report.word, codes(report, "note")) == ("SOUND", ["prefix-model-missing"]), str(report)


def test_a_checkpoint_of_the_model_without_its_head_is_taken(tmp_path):
    adapter = peft(tmp_path / "a", factors(paths(*QV)), config(*QV))
    report = audit(adapter, model(tmp_path / "m", first="", tied=True))
    assert report.word == "SOUND", str(report)


OLD_AND_NEW = {"model.language_model.": "language_model.model.", "model.": "language_model.model."}


def seeing(folder, first, **settings):
    """A model that sees: a decoder under another beginning, and a part that sees."""
    base = model(folder.with_name("text"))
    from safetensors.numpy import load_file

    arrays = {name.replace("model.", first): a for name, a in load_file(base / "model.safetensors").items()}
    arrays |= {f"vision_tower.layers.{i}.self_attn.q_proj.weight": np.ones((6, 6), "f4") for i in range(2)}
    return written(folder, arrays, settings)


@pytest.mark.parametrize("files", ["language_model.model.", "model.language_model.", "model."])
def test_the_names_in_files_of_a_model_that_sees_are_known(tmp_path, files):
    tensors = renamed(factors(paths(*QV)), f"{PREFIX}model.", f"{PREFIX}model.language_model.")
    adapter = peft(tmp_path / "a", tensors, config() | {"target_modules": r".*language_model.*\.(q_proj|v_proj)"})
    report = audit(adapter, seeing(tmp_path / "m", files, architectures=["LlavaForConditionalGeneration"]))
    assert report.word == "SOUND", str(report)
    assert "vision's q_proj" in [kind.name for kind in report.kinds if not kind.adapted]


@pytest.mark.parametrize(
    ("name", "word"), [("LlavaForConditionalGeneration", "SUSPICIOUS"), ("GemmaForCausalLM", "SOUND")]
)
def test_names_without_language_model_are_right_for_the_language_part_alone(tmp_path, name, word):
    adapter = peft(tmp_path / "a", factors(paths(*QV)), config(*QV))
    report = audit(adapter, seeing(tmp_path / "m", "language_model.model.", architectures=[name]))
    assert report.word == word, str(report)
    assert "prefix-language-model-missing" in codes(report, "note", "suspicious")


def test_weights_in_few_bits_are_found_and_not_measured(tmp_path):
    arrays = {f"{path}.{end}": np.ones((3, 4), "u1") for path in paths(*QV) for end in ("qweight", "qzeros")}
    report = audit(peft(tmp_path / "a", factors(paths(*QV)), config(*QV)), written(tmp_path / "m", arrays))
    assert report.word == "SOUND"
    assert (len(report.landing.packed), len(report.landing.fitting)) == (2 * LAYERS, 0)


def test_weights_stored_the_other_way_round_are_known_by_their_bias(tmp_path):
    arrays = {f"h.{i}.attn.c_attn.weight": np.ones((D, 3 * D), "f4") for i in range(2)}
    arrays |= {f"h.{i}.attn.c_attn.bias": np.ones(3 * D, "f4") for i in range(2)}
    rng, tensors = np.random.default_rng(0), {}
    for i in range(2):
        name = f"{PREFIX}transformer.h.{i}.attn.c_attn"
        tensors |= {
            f"{name}.lora_A.weight": rng.standard_normal((2, D)),
            f"{name}.lora_B.weight": rng.standard_normal((3 * D, 2)),
        }
    base = written(tmp_path / "m", arrays)
    for flag in (True, False):
        report = audit(peft(tmp_path / f"a{flag}", tensors, config("c_attn", fan_in_fan_out=flag)), base)
        assert report.word == "SOUND", str(report)
        assert len(report.landing.turned) == 2


def test_a_flag_that_no_weight_bears_out_is_suspicious(tmp_path):
    adapter = peft(tmp_path / "a", factors(paths(*QV)), config(*QV, fan_in_fan_out=True))
    assert codes(audit(adapter, model(tmp_path / "m")), "suspicious") == ["fan-in-fan-out"]


def test_a_convolution_is_sound(tmp_path):
    rng = np.random.default_rng(0)
    name = f"{PREFIX}enc.conv"
    tensors = {
        f"{name}.lora_A.weight": rng.standard_normal((2, 3, 5, 5)),
        f"{name}.lora_B.weight": rng.standard_normal((7, 2, 1, 1)),
    }
    base = written(tmp_path / "m", {"enc.conv.weight": np.ones((7, 3, 5, 5), "f4")})
    report = audit(peft(tmp_path / "a", tensors, config("conv")), base)
    assert report.word == "SOUND", str(report)
    delta = np.einsum("orxy,rchw->ochw", tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"])
    assert np.isclose(report.numbers["enc.conv"].norm, 2 * np.linalg.norm(delta))


def test_a_gguf_adapter_lands_in_a_gguf_model_and_in_a_folder(tmp_path):
    from gguf import GGUFWriter

    adapter = gguf(tmp_path / "a.gguf", paths("q_proj", "up_proj"))
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    for i in range(LAYERS):
        for name, shape in (("attn_q", (12, D)), ("ffn_up", (10, D)), ("ffn_down", (D, 10))):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(shape, "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for base in (tmp_path / "m.gguf", model(tmp_path / "m")):
        report = audit(adapter, base)
        assert report.word == "SOUND", str(report)
        assert len(report.landing.fitting) == 2 * LAYERS
    plain = peft(tmp_path / "p", factors(paths("q_proj")), config("q_proj"))
    assert audit(plain, tmp_path / "m.gguf").word == "SOUND"


def test_the_vocabulary_may_have_grown(tmp_path):
    tensors = factors(paths("q_proj")) | {f"{PREFIX}lm_head.weight": np.ones((V + 2, D), "f4")}
    report = audit(peft(tmp_path / "a", tensors, config("q_proj")), model(tmp_path / "m"))
    assert (report.word, codes(report, "note")) == ("SOUND", ["vocabulary-grown", "embeddings-beside"])
    assert "resize_token_embeddings(18)" in str(report)


def test_a_part_of_an_image_model_takes_its_own_modules(tmp_path):
    unet = {f"down_blocks.{i}.attn.to_{x}.weight": np.ones((6, 6), "f4") for i in range(2) for x in "qv"}
    rng, tensors = np.random.default_rng(0), {}
    names = [f"lora_unet_down_blocks_{i}_attn_to_{x}" for i in range(2) for x in "qv"] + ["lora_te_text_model_q_proj"]
    for name in names:
        tensors |= {
            f"{name}.lora_down.weight": rng.standard_normal((2, 6)),
            f"{name}.lora_up.weight": rng.standard_normal((6, 2)),
            f"{name}.alpha": np.array(1.0),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    report = audit(tmp_path / "a.safetensors", written(tmp_path / "m", unet))
    assert (report.word, codes(report, "note")) == ("SOUND", ["another-part"]), str(report)
    assert audit(tmp_path / "a.safetensors", model(tmp_path / "other")).word == "WRONG"


def test_names_of_llama_cpp_that_are_not_known_accuse_nobody(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "phi3")
    for i in range(LAYERS):
        writer.add_tensor(f"blk.{i}.attn_qkv.weight", np.ones((20, D), "f4"))
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.ones((12, D), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = renamed(factors(paths("q_proj")), "q_proj", "qkv_proj")
    report = audit(peft(tmp_path / "a", tensors, config("qkv_proj")), tmp_path / "m.gguf")
    assert (report.word, codes(report, "note")) == ("SOUND", ["module-unknown"]), str(report)


def test_experts_under_old_names_land_and_are_noted(tmp_path):
    rng, tensors = np.random.default_rng(0), {}
    for i in range(LAYERS):
        for e in range(4):
            name = f"{PREFIX}model.layers.{i}.mlp.experts.{e}.down_proj"
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 6))
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((D, 2))
    report = audit(peft(tmp_path / "a", tensors, config("down_proj")), model(tmp_path / "m", experts=4, apart=True))
    assert (report.word, codes(report, "note")) == ("SOUND", ["old-expert-names"]), str(report)


@pytest.mark.long
def test_the_headers_of_a_model_of_70b_are_enough(tmp_path):
    d, kv, m, depth, shards = 8192, 1024, 28672, 80, 30
    sizes = {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m),
    }  # fmt: skip
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(depth) for name, shape in sizes.items()}
    weight_map = {}
    (tmp_path / "m").mkdir()
    for k in range(shards):
        file, header, end = f"model-{k + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in list(shapes)[k::shards]:
            size = 2 * shapes[name][0] * shapes[name][1]
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [end, end + size]}
            weight_map[name], end = file, end + size
        text = json.dumps(header).encode()
        with open(tmp_path / "m" / file, "wb") as sparse:
            sparse.write(len(text).to_bytes(8, "little") + text)
            sparse.truncate(8 + len(text) + end)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    rng, tensors = np.random.default_rng(0), {}
    for i in range(depth):
        name, (out, width) = f"{PREFIX}model.layers.{i}.self_attn.k_proj", (kv, d)
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, width)).astype("f2")
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((out, 2)).astype("f2")
    tracemalloc.start()
    report = audit(peft(tmp_path / "a", tensors, config("k_proj")), tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.word == "SOUND"
    assert {kind.name: (kind.adapted, kind.total) for kind in report.kinds}["k_proj"] == (depth, depth)
    assert peak < 100e6
