"""The units of models, rows of matrices however they are stored; and the words of findings."""

import re
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import quantize as in_four_bits
from minilora.audit.findings import NOTE, WRONG, Finding, about, counted, listed, one_per_code
from minilora.audit.headers import open_model
from minilora.audit.rounding import valid_roundings
from minilora.audit.units import NUMBERS_AT_A_TIME, Matrix, Source, head_dim, in_memory, unit_of
from minilora.language import save_llama
from minilora.layer import walk
from minilora.layers.rotary import halves_from_interleaved
from minilora.texts import FileRefused

from ..support.language import tiny_llama
from .adapters import D, closed, gguf_model, ones, written

BEFORE = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("model.norm", ("model.norm", None, "")),
        (f"{BEFORE}.12.up_proj", (f"{BEFORE}.gate_up_proj", 12, "up_proj")),
        (f"{BEFORE}.3.down_proj", (f"{BEFORE}.down_proj", 3, "down_proj")),
        ("model.layers.0.block_sparse_moe.experts.3.w3", (f"{BEFORE}.gate_up_proj", 3, "up_proj")),
        ("model.layers.0.block_sparse_moe.experts.3.w2", (f"{BEFORE}.down_proj", 3, "down_proj")),
        ("model.layers.0.block_sparse_moe.gate", ("model.layers.0.mlp.gate", None, "")),
        (f"{BEFORE}.3.other", (f"{BEFORE}.3.other", None, "")),
    ],
)
def test_an_experts_layer_is_a_part_of_its_array(path, unit):
    assert unit_of(path) == unit


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_any_rows_of_a_matrix_are_read(parts):
    """Of so many tensors, each behind other numbers in its own; also of a matrix that is cut, and of one in memory."""
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal(7 + i + 4 * 3 + 2) for i in range(parts)}

    def numbers(name, start, stop):
        assert start < stop  # no part of which no row is asked for is read
        return tensors[name][start:stop]

    matrix = Matrix(numbers, "f8", tuple((f"t{i}", 7 + i) for i in range(parts)), 4, 3)
    whole = np.concatenate([tensors[f"t{i}"][7 + i : 7 + i + 12].reshape(4, 3) for i in range(parts)])
    held = in_memory(whole.reshape(2, -1), matrix)
    assert (matrix.shape, matrix.name, matrix.dtype) == (held.shape, held.name, held.dtype) == (whole.shape, "t0", "f8")
    for top, bottom in combinations(range(len(whole) + 1), 2):
        np.testing.assert_array_equal(matrix.read(top, bottom), whole[top:bottom])
        np.testing.assert_array_equal(held.read(top, bottom), whole[top:bottom])
        if parts == 1 or top % 4 == bottom % 4 == 0:
            cut = matrix.cut(top, bottom)
            np.testing.assert_array_equal(cut.read(0, bottom - top), whole[top:bottom])
            assert cut.shape == (bottom - top, 3)


@pytest.mark.parametrize(
    ("rows", "columns", "options", "ends"),
    [
        (5, NUMBERS_AT_A_TIME // 2, {}, [(0, 2), (2, 4), (4, 5)]),
        (3, 2 * NUMBERS_AT_A_TIME, {}, [(0, 1), (1, 2), (2, 3)]),  # a row at least
        (7, NUMBERS_AT_A_TIME // 5, {"step": 2}, [(0, 4), (4, 7)]),
        (7, NUMBERS_AT_A_TIME // 5, {"step": 6}, [(0, 6), (6, 7)]),
        (9, NUMBERS_AT_A_TIME // 4, {"first": 1}, [(0, 1), (1, 5), (5, 9)]),
        (3, 0, {}, [(0, 3)]),
        (0, 3, {}, []),
    ],
)
def test_blocks_of_rows_follow_each_other(rows, columns, options, ends):
    assert [*Matrix(None, "f4", (("t", 0),), rows, columns).blocks(**options)] == ends


def test_a_tensors_type_is_that_of_its_numbers(tmp_path):
    arrays = {"a.weight": np.ones(2, "f2"), "b": np.ones(2, "i8"), "c": np.ones((2, 3, 4), "f4"), "d": np.array(1.0)}
    source = Source(open_model(written(tmp_path / "m", arrays)))
    assert [source.dtype(name).kind for name in arrays] == ["f", "u", "f", "f"]
    assert [source.is_exact(name) for name in arrays] == [True, False, True, True]
    assert not any(source.in_few_bits(name) for name in arrays)
    shapes = {unit: [matrix.shape for matrix in matrices] for unit, matrices in source.units.items()}
    assert shapes == {"a.weight": [(2, 1)], "b": [(2, 1)], "c": [(3, 4)] * 2, "d": [(1, 1)]}
    np.testing.assert_array_equal(source.units["c"][1].read(0, 3), arrays["c"][1])


def test_a_gguf_model_without_heads_has_no_known_rows(tmp_path):
    source = Source(open_model(gguf_model(tmp_path / "m.gguf", {"attn_q": (12, D)}, more=["output"])))
    with pytest.raises(FileRefused, match=r"llama\.attention\.key_length is missing$"):
        source.is_exact("model.layers.0.self_attn.q_proj.weight")
    assert source.is_exact("lm_head.weight")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_models_rows_are_those_of_transformers(tmp_path, kind):
    from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize

    rng, Q8_0 = np.random.default_rng(0), GGMLQuantizationType.Q8_0
    q, k, v = (rng.standard_normal((8, 32)).astype(dtype) for dtype in ("f4", "f2", "f4"))
    writer = GGUFWriter(tmp_path / "m.gguf", kind)
    writer.add_embedding_length(8)
    writer.add_head_count(2)
    writer.add_tensor("blk.0.attn_q.weight", q)
    writer.add_tensor("blk.0.attn_k.weight", k)
    writer.add_tensor("blk.0.attn_v.weight", quantize(v, Q8_0), raw_dtype=Q8_0)
    source = Source(open_model(closed(writer, tmp_path / "m.gguf")))
    names = [f"model.layers.0.self_attn.{last}_proj.weight" for last in "qkv"]
    assert [source.dtype(name) for name in names] == ["float32", "float16", "float32"]
    assert [source.in_few_bits(name) for name in names] == [False, False, True]
    assert [source.is_exact(name) for name in names] == [True, True, False]
    assert source.quantized_dtype is None
    right = [halves_from_interleaved(array, 4) if kind == "llama" else array for array in (q, k)]
    for name, array in zip([*names, names[0]], [*right, dequantize(quantize(v, Q8_0), Q8_0), right[0]], strict=True):
        np.testing.assert_array_equal(source.part(name, 5, 77), array.ravel()[5:77])


def test_a_folder_in_four_bits_has_weights(tmp_path):
    network = in_four_bits(tiny_llama(dtype="float32"))
    save_llama(network, tmp_path / "m")
    source, names = Source(open_model(tmp_path / "m")), {*load_file(tmp_path / "m" / "model.safetensors")}
    layers = {f"{path}.weight": layer.weight for path, layer in walk(network) if f"{path}.weight.absmax" in names}
    assert len(layers) == len(source.quantized) > 4
    assert source.quantized_dtype == "float32"
    for name, weight in layers.items():
        assert (source.in_few_bits(name), source.is_exact(name), source.dtype(name)) == (True, False, "float32")
        assert source.shape(name) == weight.shape
        np.testing.assert_array_equal(source.part(name, 3, 40), weight.ravel()[3:40])
    assert {*source.units} == {name for name in names if name.count(".weight.") == 0}


def test_experts_apart_stand_in_their_order(tmp_path):
    arrays = {f"b.experts.{e}.{last}.weight": np.full((3, 4), i * 100 + e, "f4")
              for i, last in enumerate(("up_proj", "gate_proj", "down_proj")) for e in (10, 2)}  # fmt: skip
    arrays |= ones({"c.block_sparse_moe.experts.0.w1.weight": (3, 4), "d.experts.0.up_proj.bias": 3})
    units = Source(open_model(written(tmp_path / "m", arrays))).units
    found = {unit: [matrix.read(0, matrix.shape[0])[:, 0].tolist() for matrix in of] for unit, of in units.items()}
    assert found == {
        "b.experts.gate_up_proj": [[102] * 3 + [2] * 3, [110] * 3 + [10] * 3],
        "b.experts.down_proj": [[202] * 3, [210] * 3],
        "c.mlp.experts.gate_up_proj": [[1] * 3], "d.experts.0.up_proj.bias": [[1] * 3],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"head_dim": 16, "hidden_size": 64, "num_attention_heads": 2}, 16),
        ({"hidden_size": 64, "num_attention_heads": 2}, 32),
        ({"head_dim": 0, "hidden_size": 64, "num_attention_heads": 4}, 16),
        ({"hidden_size": 64}, None), ({"num_attention_heads": 2}, None), ({}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_heads_width_is_said_or_computed(config, width, is_gguf):
    names = {"head_dim": "attention.key_length", "hidden_size": "embedding_length",
             "num_attention_heads": "attention.head_count"}  # fmt: skip
    said = {f"llama.{names[key]}": number for key, number in config.items()} | {"general.architecture": "llama"}
    headers = SimpleNamespace(path="m", config=said if is_gguf else config, is_gguf=is_gguf)
    if width is not None:
        assert head_dim(headers) == width
        return
    missing = "llama.attention.key_length" if is_gguf else "head_dim"
    with pytest.raises(
        FileRefused, match=f"^'m': {re.escape(f'the width of a head is unknown: {missing} is missing')}$"
    ):
        head_dim(headers)


# --- findings ---


def test_three_names_are_told_and_the_rest_counted():
    three = "'a', 'b', 'c'"
    told = {"a": "'a'", "abc": three, "abcd": f"{three} and 1 more key", "abcde": f"{three} and 2 more keys"}
    assert {names: listed([*names], "key") for names in told} == told
    assert listed([*"abcd"]) == f"{three} and 1 more module"
    assert [counted(n, "row") for n in (0, 1, 2, 12345)] == ["0 rows", "1 row", "2 rows", "12,345 rows"]


def test_a_finding_is_about_names_and_what_is_alike():
    assert [*about(WRONG, "code", "{names}", [])] == []
    (one,) = about(NOTE, "code", "{count} of {x}: {names}", ["a", "b"], "tensor", x=3)
    assert one == Finding(NOTE, "code", "2 tensors of 3: 'a', 'b'", ("a", "b"))
    faults = [("a", (WRONG, "x", "first")), ("b", (NOTE, "x", "note")), ("c", (WRONG, "x", "second"))]
    assert [*one_per_code(faults)] == [
        Finding(WRONG, "x", "'a': first; likewise in 2 modules: 'a', 'c'", ("a", "c")),
        Finding(NOTE, "x", "'b': note", ("b",)),
    ]


@pytest.mark.parametrize("between", [None, np.float16])
def test_a_base_in_few_bits_went_through_its_type(between):
    assert {road.base for road in valid_roundings(np.float32, np.float32, np.float32, between)} == {None, between}
