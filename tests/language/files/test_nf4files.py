"""Weights in NF4 as bitsandbytes writes them, and a decoder saved as a folder: both ways, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import (
    NF4,
    Llama,
    QuantizedLinear,
    adapters,
    merge,
    merge_adapter,
    quantize,
    save_adapter,
)
from minilora.language import save_llama
from minilora.language.files.nf4files import NF4_STATE, quantization_config
from minilora.layer import rebuild, walk
from minilora.layers.nf4 import scale_book
from minilora.layers.rotary import frequencies
from minilora.texts import FileRefused

from ...support.adapter_folder import change_json
from ...support.compare import refused
from ...support.disk import contents
from ...support.language import adapted, arrays_of, drawn
from ...support.model_folder import shard

IDS = np.random.default_rng(0).integers(0, 29, (2, 6))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def decoder(dtype="float32", **settings):
    """Biases, grouped queries, heads wider than the stream, and no width that is a multiple of a block."""
    sizes = {"vocab_size": 29, "hidden_size": 18, "intermediate_size": 25, "head_dim": 6, "attention_bias": True}
    return drawn(0, dtype, **sizes | {"frequencies": frequencies(6, 500.0)} | settings)


MODELS = {
    "floats": lambda: decoder(),
    "float64": lambda: decoder("float64"),
    "tied": lambda: decoder(tie_word_embeddings=True),
    "NF4": lambda: quantize(decoder()),
    "NF4, tied": lambda: quantize(decoder(tie_word_embeddings=True, mlp_bias=True)),
    "NF4, scales of 32 bits": lambda: quantize(decoder(), block_size=128, double_quant=False),
    "NF4, some": lambda: quantize(decoder(), ["q_proj", "layers.1.mlp.down_proj"]),
    "NF4, the head too": lambda: quantize(decoder(), ".*_proj|lm_head"),
    "NF4, float64": lambda: quantize(decoder("float64")),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_read_back_bit_for_bit(tmp_path, name):
    model = MODELS[name]()
    save_llama(model, tmp_path / "m")
    again = Llama.load(tmp_path / "m", dtype=model.model.norm.weight.dtype)
    assert again.config == model.config
    found, expected = arrays_of(again), arrays_of(model)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype
        np.testing.assert_array_equal(found[path], array)
    kinds = [
        [(type(layer), getattr(layer, "mean", 0), getattr(layer, "block_size", 0)) for _, layer in walk(m)]
        for m in (again, model)
    ]
    assert kinds[0] == kinds[1]
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_a_model_is_saved_from_a_device(tmp_path, standin):
    """With the same bytes, twice."""
    model = quantize(decoder())
    for name, one in (("a", model), ("b", rebuild(model, array=standin.asarray))):
        save_llama(one, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a").keys() == {"config.json", "model.safetensors"}
    there = Llama.load(tmp_path / "b", backend=standin)
    assert isinstance(there.model.layers[1].mlp.down_proj.packed, standin.xp.ndarray)


def test_rotary_settings_of_a_folder_are_saved(tmp_path):
    for i, rope in enumerate((
        {"rope_theta": 12345.5},
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "original_max_position_embeddings": 64},
    )):  # fmt: skip
        folder, again = tmp_path / str(i), tmp_path / f"{i} again"
        save_llama(decoder(), folder)
        change_json(folder / "config.json", **{"rope_theta": "absent", "rope_scaling": "absent"} | rope)
        model = Llama.load(folder)
        save_llama(model, again)
        assert Llama.load(again).config == model.config
        assert "rope_parameters" not in (again / "config.json").read_text(), "transformers 4 would pass over it"


def test_a_base_is_found_from_its_frequencies(tmp_path):
    for base, pairs in ((500.0, 3), (12345.678, 3), (1e6, 1)):
        model = decoder(frequencies=frequencies(2 * pairs, base), head_dim=2 * pairs)
        save_llama(model, tmp_path / str(base))
        found = Llama.load(tmp_path / str(base)).config.frequencies
        np.testing.assert_allclose(found, model.config.frequencies, rtol=1e-12)


# --- what is not saved ----------------------------------------------------------------------------


def test_what_a_folder_cannot_hold_is_refused(tmp_path):
    for model, error, message in (
        (lambda: adapted(["q_proj"], decoder()), ValueError,
         "model has an adapter of 'model.layers.0.self_attn.q_proj', which cannot be in the folder: "
         "save it with save_adapter and the model without it here, or merge(model) first"),
        (lambda: rebuild(decoder(), array=lambda a: a * np.nan), ValueError,
         "the model's model.embed_tokens.weight holds NaN or infinity"),
        (lambda: decoder().model, TypeError, "model must be a Llama, got Decoder"),
    ):  # fmt: skip
        with refused(message, error):
            save_llama(model(), tmp_path / "m")
        assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    for folder in ("m", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    (tmp_path / "file").write_text("y")
    before = contents(tmp_path)
    for place, message in (("m", "empty or new"), ("file", "empty or new"), ("no/m", "there is no folder")):
        with pytest.raises(ValueError, match=message):
            save_llama(decoder(), tmp_path / place)
    assert contents(tmp_path) == before
    save_llama(decoder(), tmp_path / "empty")
    assert len(contents(tmp_path / "empty")) == 2


# --- what is refused in a folder ------------------------------------------------------------------

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4") / "m"
    save_llama(quantize(decoder()), folder)
    return folder


@pytest.fixture
def model_dir(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, "m")
    return Path("m")


def edited(model_dir, part, change):
    """Change a part of a weight: by a function of its array; of its state some keys; or, by None, take it away."""
    name, path = f"{WEIGHT}.{part}" if part else WEIGHT, model_dir / "model.safetensors"
    tensors = load_file(path)
    array = tensors.pop(name)
    if isinstance(change, dict):
        said = json.loads(array.tobytes()) | change
        text = json.dumps({key: value for key, value in said.items() if value != "absent"})
        tensors[name] = np.frombuffer(text.encode(), np.uint8)
    elif change:
        tensors[name] = np.ascontiguousarray(change(array))
    save_file(tensors, path, {"format": "pt"})
    return model_dir


OTHER_NUMBERS = "has different numbers from bitsandbytes'"
DAMAGES = [  # a part, what becomes of it, and the message with ~ for the name of the weight
    (NF4_STATE, {"quant_type": "fp4"}, "STATE: Invalid enum value 'fp4' - at `$.quant_type`"),
    (NF4_STATE, {"blocksize": "absent"}, "STATE: Object missing required field `blocksize`"),
    (NF4_STATE, {"blocksize": 65}, "STATE: block_size must be a power of two, got 65"),
    (NF4_STATE, {"shape": [5, 5, 18]}, "STATE: Expected `array` of length 2 - at `$.shape`"),
    (NF4_STATE, {"shape": ["25", 18]}, "STATE: Expected `int`, got `str` - at `$.shape[0]`"),
    (NF4_STATE, {"shape": [18, 26]}, "'m': '~' has shape [18, 26], expected [25, 18]"),
    (NF4_STATE, {"nested_blocksize": 128}, "STATE: Invalid enum value 128 - at `$.nested_blocksize`"),
    (NF4_STATE, {"nested_dtype": "float16"}, "STATE: Invalid enum value 'float16' - at `$.nested_dtype`"),
    (NF4_STATE, {"nested_offset": 1e400}, "STATE: JSON is malformed: invalid character (byte 147)"),
    (NF4_STATE, {"nested_offset": "absent"}, "FILE: ~: absmax has dtype uint8, expected float32"),
    (NF4_STATE, lambda a: a[:-1], "STATE: Input data was truncated"),
    ("", lambda a: a[:-1], "FILE: ~: packed has shape (224,), expected (225,)"),
    ("", lambda a: a.astype("f4"), "FILE: ~: packed has dtype float32, expected uint8"),
    ("absmax", None, "FILE: there is no '~.absmax'"),
    ("absmax", lambda a: a[1:], "FILE: ~: absmax has shape (7,), expected (8,)"),
    ("nested_absmax", None, "FILE: there is no '~.nested_absmax'"),
    ("nested_absmax", lambda a: np.ones(2, "f4"), "FILE: ~: nested_absmax has shape (2,), expected (1,)"),
    ("nested_absmax", lambda a: a + np.inf, "'m': '~' holds NaN or infinity"),
    ("quant_map", None, "FILE: there is no '~.quant_map'"),
    ("quant_map", lambda a: a + np.float32(1e-3), f"FILE: '~.quant_map' {OTHER_NUMBERS}"),
    ("quant_map", lambda a: a[::-1], f"FILE: '~.quant_map' {OTHER_NUMBERS}"),
    ("nested_quant_map", lambda a: a + np.nan, f"FILE: '~.nested_quant_map' {OTHER_NUMBERS}"),
    (NF4_STATE, None, f"'m/config.json': quantization_config says that '{WEIGHT.removesuffix('.weight')}' is "
     "quantised, but its weight is not"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change", "message"), DAMAGES)
def test_a_damaged_weight_is_refused_by_name(model_dir, part, change, message):
    file = "'m/model.safetensors'"
    message = message.replace("STATE", f"{file}: {WEIGHT}.{NF4_STATE}").replace("FILE", file).replace("~", WEIGHT)
    with refused(message):
        Llama.load(edited(model_dir, part, change))


def said(model_dir, **changes):
    """Change what config.json says of the quantisation."""
    before = json.loads((model_dir / "config.json").read_text())["quantization_config"]
    change_json(model_dir / "config.json", quantization_config=before | changes)
    return model_dir


SAID = [
    *(({name: value}, f"quantization_config: {name} is {value!r}, supported: {supported}")
      for name, value, supported in [
          ("quant_method", "gptq", "'bitsandbytes'"),
          ("load_in_4bit", False, "True"),
          ("load_in_8bit", True, "False"),
          ("bnb_4bit_quant_type", "fp4", "'nf4'"),
          ("bnb_4bit_quant_storage", "bfloat16", "'uint8'"),
          *(("llm_int8_skip_modules", names, "a list of modules' names")
            for names in (["lm_head", "(a+)+$"], ["lm_head", "up.*"], "lm_head")),
      ]),
    *(({"llm_int8_skip_modules": names}, f"quantization_config says that {found}")
      for names, found in [
          (["lm_head", "up_proj"], "'model.layers.0.mlp.up_proj' is not quantised, but its weight is"),
          (["lm_head", "model.layers.1"],
           "'model.layers.1.self_attn.q_proj' is not quantised, but its weight is"),
          (["nothing"], "'lm_head' is quantised, but its weight is not"),
      ]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SAID)
def test_settings_that_say_otherwise_are_refused(model_dir, changes, message):
    with refused(f"'m/config.json': {message}"):
        Llama.load(said(model_dir, **changes))


def test_a_quantised_weight_of_which_nothing_is_said_is_refused(model_dir):
    change_json(model_dir / "config.json", quantization_config=None)
    weight = "'model.layers.0.self_attn.q_proj.weight'"
    with refused(f"'m/config.json': {weight} is quantised, and there is no quantization_config"):
        Llama.load(model_dir)


def test_what_changes_no_number_does_nothing(model_dir):
    """Settings of other methods; a stored type, to which transformers would round what was float32; and shards."""
    expected = Llama.load(model_dir)(IDS)
    said(model_dir, llm_int8_threshold=3.0, bnb_4bit_compute_dtype="bfloat16", _load_in_4bit=True, load_in_8bit=None)
    edited(model_dir, NF4_STATE, {"dtype": "bfloat16"})
    np.testing.assert_array_equal(Llama.load(model_dir)(IDS), expected)
    shard(model_dir, 2)
    np.testing.assert_array_equal(Llama.load(model_dir)(IDS), expected)


def test_the_books_in_a_file_are_those_that_decode(saved):
    tensors = load_file(saved / "model.safetensors")
    np.testing.assert_array_equal(tensors[f"{WEIGHT}.quant_map"], NF4)
    np.testing.assert_array_equal(tensors[f"{WEIGHT}.nested_quant_map"], scale_book())
    state = json.loads(tensors[f"{WEIGHT}.{NF4_STATE}"].tobytes())
    assert state.pop("nested_offset") == Llama.load(saved).model.layers[1].mlp.up_proj.mean
    assert state == {
        **{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [25, 18]},
        **{"nested_blocksize": 256, "nested_dtype": "float32"},
    }


def test_an_adapter_merges_into_four_bits_in_memory_only(model_dir, tmp_path):
    model = adapted(["up_proj"], Llama.load(model_dir))
    save_adapter(tmp_path / "a", adapters(model))
    with pytest.raises(FileRefused, match="a Llama in NF4 is merged by minilora"):
        merge_adapter(model_dir, tmp_path / "a", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    save_llama(merge(model), tmp_path / "merged")
    merged = Llama.load(tmp_path / "merged")
    np.testing.assert_allclose(merged(IDS), model(IDS), rtol=1e-3, atol=1e-4)
    kinds = {path.rpartition(".")[2]: type(layer) for path, layer in walk(merged) if path.endswith("_proj")}
    assert kinds["up_proj"] is not QuantizedLinear
    assert kinds["down_proj"] is QuantizedLinear


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def test_unquantised_layers_are_named_but_a_head_alone():
    for layers, skipped in (
        ({UP: True}, None),  # a tied head, which bitsandbytes leaves alone without a word
        ({UP: True, "lm_head": False}, None),
        ({UP: True, DOWN: False}, [DOWN, "lm_head"]),
        ({UP: True, DOWN: False, "lm_head": False}, [DOWN, "lm_head"]),
        ({UP: True, DOWN: False, "lm_head": True}, [DOWN]),
        ({UP: True, "lm_head": True}, []),
    ):
        assert quantization_config(layers) == {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }  # fmt: skip
        assert quantization_config(dict.fromkeys(layers, False)) is None
