"""A merged checkpoint is W + delta where the adapter is, and the base bit for bit elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, Linear, LoRA, LoRALinear, load_adapter, merge_adapter, save_adapter
from minilora.cli import main
from minilora.files.tensors import TensorFile
from minilora.variants.adapter import Adapter

from ..support.memory import traced

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"


def draw(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def base_tensors(rng):
    """Two weights to be adapted, float32 and float64, between tensors that are not: all in their own type and shape."""
    return {
        "enc.q_proj.weight": draw(rng, 5, 3),
        "enc.q_proj.bias": draw(rng, 5),
        "enc.k_proj.weight": draw(rng, 5, 3),
        "head.weight": draw(rng, 4, 5, dtype="float64"),
        "steps": rng.integers(0, 99, (2, 3)),
        "mask": np.array([True, False]),
        "nothing": np.zeros((0, 4), "float16"),
        "scalar": np.array(3.0),
    }


@pytest.fixture
def files(tmp_path):
    """A base, and an adapter whose two layers differ in shape, rank and alpha."""
    rng = np.random.default_rng(0)
    base, tensors = tmp_path / "base.safetensors", base_tensors(rng)
    save_file(tensors, base, {"format": "pt", "note": "kept"})
    layers = {
        "enc.q_proj": LoRA(draw(rng, 2, 3), draw(rng, 5, 2), 3.0),
        "head": LoRA(draw(rng, 4, 5), draw(rng, 4, 4), 0.5),
    }
    save_adapter(tmp_path / "adapter", layers)
    return base, tmp_path / "adapter", tmp_path / "out.safetensors"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else path.lstat().st_mode
        for path in sorted(folder.rglob("*"))
    }


def shard(tensors, folder):
    """Save tensors in two shards with an index, as the large models come."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, some in parts.items() for name in some}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=1) + "\n")
    return folder


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "float32", "float64"]), flipped=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_merged_weight_is_the_sum_rounded_once(tmp_path_factory, seed, dtype, flipped):
    """Against float64: a rounding to the base's type, and those of the wide type that the sum is taken in."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("merge")
    n_in, n_out, r = (int(n) for n in rng.integers(1, 9, 3))
    weight = draw(rng, n_out, n_in, dtype=dtype)
    lora = LoRA(draw(rng, r, n_in), draw(rng, n_out, r), float(rng.uniform(0.1, 9)))
    save_file({"a.weight": np.ascontiguousarray(weight.T) if flipped else weight}, folder / "base.safetensors")
    save_adapter(folder / "adapter", {"a": lora}, fan_in_fan_out=flipped)
    merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    merged = load_file(folder / "out.safetensors")["a.weight"]
    assert merged.dtype == weight.dtype
    delta = lora.scaling * lora.lora_B.astype(float) @ lora.lora_A.astype(float)
    exact = (weight + delta).T if flipped else weight + delta
    # The products and their sum are rounded to the wide type, in which the terms are as large as `size`.
    wide = np.float64 if dtype == "float64" else np.float32
    size = np.abs(weight) + lora.scaling * np.abs(lora.lora_B).astype(float) @ np.abs(lora.lora_A)
    slack = (r + 2) * float(np.finfo(wide).eps) * (size.T if flipped else size)
    allowed = np.spacing(np.abs(exact).astype(dtype)).astype(float) / 2 + slack
    assert (np.abs(merged - exact) <= allowed * 1.001).all()


def test_merging_in_memory_and_on_disk_agree(files):
    base, adapter, out = files
    merge_adapter(base, adapter, out)
    before, after = load_file(base), load_file(out)
    for name, lora in load_adapter(adapter).items():
        lora = LoRA(*(f.astype(before[f"{name}.weight"].dtype) for f in (lora.lora_A, lora.lora_B)), lora.alpha)
        layer = LoRALinear(Linear(before[f"{name}.weight"]), lora)
        np.testing.assert_allclose(after[f"{name}.weight"], layer.merge().weight, rtol=1e-5, atol=1e-6)


def test_rank_stabilised_layers_of_own_rank_are_scaled_by_it(files):
    """alpha / sqrt(r), for each layer with its own alpha and its own r."""
    base, adapter, out = files
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    changes = merge_adapter(base, adapter, out)
    assert {c.module: c.scaling for c in changes} == {"enc.q_proj": 3 / 2**0.5, "head": 0.5 / 4**0.5}
    factors, before, after = load_file(adapter / "adapter_model.safetensors"), load_file(base), load_file(out)
    for change in changes:
        A, B = (factors[f"base_model.model.{change.module}.lora_{f}.weight"].astype(float) for f in "AB")
        np.testing.assert_allclose(
            after[change.name], before[change.name] + change.scaling * B @ A, rtol=2e-6, atol=1e-6
        )


def test_all_else_is_the_base_bit_for_bit(files):
    base, adapter, out = files
    changes = merge_adapter(base, adapter, out)
    before, after = base.read_bytes(), out.read_bytes()
    assert {(c.name, c.module, c.file, c.dtype, c.shape, c.layout, c.rank, c.scaling) for c in changes} == {
        ("enc.q_proj.weight", "enc.q_proj", "base.safetensors", "F32", (5, 3), "out-in", 2, 1.5),
        ("head.weight", "head", "base.safetensors", "F64", (4, 5), "out-in", 4, 0.125),
    }
    tensors = TensorFile(base).tensors
    starts = [tensors[c.name].start for c in changes]
    assert starts == sorted(starts)  # as they lie in the file
    assert len(before) == len(after)
    at = 0
    for spec in (tensors[c.name] for c in changes):
        assert before[at : spec.start] == after[at : spec.start]  # first the header, its metadata too
        assert before[spec.start : spec.end] != after[spec.start : spec.end]
        at = spec.end
    assert before[at:] == after[at:]


def test_bfloat16_and_float32_are_merged_in_one_file(files):
    """Each weight is widened to float32 at least, added to, and rounded to its own type once."""
    base, adapter, out = files
    rng = np.random.default_rng(3)
    bits = rng.integers(0x3C00, 0x4000, (4, 5), dtype=np.uint16)
    save_file({"enc.q_proj.weight": draw(rng, 5, 3), "head.weight": bits}, base)
    raw = base.read_bytes().replace(b'"dtype":"U16"', b'"dtype":"BF16"')
    base.write_bytes((int.from_bytes(raw[:8], "little") + 1).to_bytes(8, "little") + raw[8:])
    changes = {c.module: c for c in merge_adapter(base, adapter, out)}
    assert {name: c.dtype for name, c in changes.items()} == {"enc.q_proj": "F32", "head": "BF16"}
    before, after, loras = TensorFile(base), TensorFile(out), load_adapter(adapter)
    for name, lora in loras.items():
        exact = before.read(f"{name}.weight") + lora.delta().astype(float)
        merged = after.read(f"{name}.weight")
        unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - (7 if name == "head" else 23))
        assert (np.abs(merged - exact) <= 0.5 * unit + 4e-6 * (name != "head") + 1e-6).all()


def test_types_that_numpy_does_not_have_are_copied(files):
    base, adapter, out = files
    raw = base.read_bytes().replace(b'"BOOL"', b'"F8_E4M3"')
    length = int.from_bytes(raw[:8], "little") + 3
    base.write_bytes(length.to_bytes(8, "little") + raw[8:])
    merge_adapter(base, adapter, out)
    assert TensorFile(out).tensors["mask"].dtype == "F8_E4M3"


def whole(rng, *shape, dtype="float32"):
    """Whole numbers: no product and no sum of a few of them is rounded."""
    return rng.integers(-9, 10, shape).astype(dtype)


@pytest.mark.parametrize("block", [1, 8, 12, 24, 30, 40, 41, 80])
def test_a_weight_larger_than_a_block_is_merged_in_parts(tmp_path, monkeypatch, block):
    """Rows of 12 and of 40 bytes: a block is a number, a part of a row, a row, or some rows."""
    rng = np.random.default_rng(0)
    base, adapter, out = tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors"
    tensors = {"q.weight": whole(rng, 5, 3), "other": draw(rng, 7), "head.weight": whole(rng, 4, 5, dtype="f8")}
    save_file(tensors, base)
    layers = {
        "q": LoRA(whole(rng, 2, 3), whole(rng, 5, 2), 3.0),
        "head": LoRA(whole(rng, 4, 5), whole(rng, 4, 4), 0.5),
    }
    save_adapter(adapter, layers)
    monkeypatch.setattr(sys.modules["minilora.files.merge"], "BLOCK_BYTES", block)
    merge_adapter(base, adapter, out)
    merged = load_file(out)
    for name, layer in layers.items():
        expected = tensors[f"{name}.weight"] + layer.delta()
        np.testing.assert_array_equal(merged[f"{name}.weight"], expected)
    np.testing.assert_array_equal(merged["other"], tensors["other"])


@pytest.mark.parametrize("dtype", ["f2", pytest.param("f4", marks=pytest.mark.long)])
def test_a_row_larger_than_a_block_needs_little_memory(tmp_path, monkeypatch, dtype):
    """Rows of 8 or 16 MB in blocks of 0.5: beside the factors, which are as wide as a row, some blocks."""
    monkeypatch.setattr(sys.modules["minilora.files.merge"], "BLOCK_BYTES", 1 << 19)
    rng, width = np.random.default_rng(1), 4_000_000
    save_file({"a.weight": np.ones((2, width), dtype)}, tmp_path / "base.safetensors")
    factors = whole(rng, 1, width), np.ones((2, 1), "f4")
    save_adapter(tmp_path / "adapter", {"a": LoRA(*factors, 1.0)})
    with traced() as memory:
        merge_adapter(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    assert memory.peak < 1.3 * factors[0].nbytes + 5e6
    merged = load_file(tmp_path / "out.safetensors")["a.weight"]
    np.testing.assert_array_equal(merged, (np.ones((2, width), dtype) + factors[0]).astype(dtype))


def test_a_folder_of_two_checkpoints_is_merged_by_name_alone(files, tmp_path):
    base, adapter, _ = files
    folder, weights = tmp_path / "both", load_file(base)
    folder.mkdir()
    shutil.copy(base, folder / "model.safetensors")
    doubled = {"head.weight": 2 * weights["head.weight"]}
    save_file(weights | doubled, folder / "s.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights, "s.safetensors")}))
    before = contents(tmp_path)
    with pytest.raises(FileRefused, match=r"model.safetensors': beside model.safetensors.index.json, which names"):
        merge_adapter(folder, adapter, tmp_path / "out")
    assert contents(tmp_path) == before
    merge_adapter(folder / INDEX, adapter, tmp_path / "out")
    merge_adapter(folder / "model.safetensors", adapter, tmp_path / "one.safetensors")
    change = load_file(tmp_path / "one.safetensors")["head.weight"] - weights["head.weight"]
    merged = load_file(tmp_path / "out" / "s.safetensors")["head.weight"]
    np.testing.assert_allclose(merged, doubled["head.weight"] + change)


@pytest.fixture
def tied(tmp_path):
    """A model's folder and an adapter of its embedding and of one more layer."""
    rng, folder = np.random.default_rng(2), tmp_path / "model"
    folder.mkdir()
    weights = {"model.embed_tokens.weight": draw(rng, 7, 3), "model.norm.weight": draw(rng, 3)}
    save_file(weights | {"model.q_proj.weight": draw(rng, 4, 3)}, folder / "model.safetensors")
    embedding = Adapter(draw(rng, 1, 7), draw(rng, 3, 1), 2.0, kind="embedding")
    save_adapter(tmp_path / "adapter", {"model.embed_tokens": embedding})
    save_adapter(tmp_path / "q", {"model.q_proj": LoRA(draw(rng, 1, 3), draw(rng, 4, 1), 2.0)})
    return tmp_path


TIED = "config.json says tie_word_embeddings, and the adapter changes 'model.embed_tokens' alone"


@pytest.mark.parametrize("config", ['{"tie_word_embeddings": true}', '{"tie_word_embeddings": false}', "{}", "{", None])
@pytest.mark.parametrize("base", ["model", "model/model.safetensors"])
def test_a_merge_into_a_tied_embedding_is_warned_of(tied, config, base):
    if config is not None:
        (tied / "model" / "config.json").write_text(config)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        merge_adapter(tied / base, tied / "adapter", tied / "out.safetensors")
        merge_adapter(tied / base, tied / "q", tied / "other.safetensors")
    assert [TIED in str(note.message) for note in notes] == [True] * (config is not None and "true" in config)
    assert all(note.filename == __file__ for note in notes)
    assert (tied / "out.safetensors").exists()


def test_the_merge_command_says_that_a_head_is_tied(tied, capsys):
    (tied / "model" / "config.json").write_text('{"tie_word_embeddings": true}')
    arguments = [str(tied / "model"), str(tied / "adapter"), "-o", str(tied / "out.safetensors")]
    assert main(["merge", *arguments]) == 0
    shown = capsys.readouterr()
    assert TIED in shown.err
    assert len(shown.err.splitlines()) == 1
    assert "1 tensor merged into" in shown.out


def test_the_products_are_taken_in_the_wide_type(files):
    """Factors in float16 are widened first: their product would overflow."""
    base, adapter, out = files
    A, B = np.full((2, 3), 300, "f2"), np.full((5, 2), 300, "f2")
    save_adapter(adapter, {"enc.q_proj": LoRA(A, B, 1.0)})
    merge_adapter(base, adapter, out)
    np.testing.assert_allclose(load_file(out)["enc.q_proj.weight"], load_file(base)["enc.q_proj.weight"] + 90_000)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_number_is_rounded_as_in_peft(tmp_path, dtype):
    """Bit for bit: products, scaling and sum in float32, and then once to the base's type."""
    rng = np.random.default_rng(0)
    weight, A, B = draw(rng, 300, 200, dtype=dtype), draw(rng, 3, 200, dtype="float16"), draw(rng, 300, 3) / 3
    save_file({"a.weight": weight}, tmp_path / "base.safetensors")
    save_adapter(tmp_path / "adapter", {"a": LoRA(A.astype("f4"), B, 0.7)})
    merge_adapter(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    wide = weight.astype("f4") + (B @ A.astype("f4")) * np.float32(0.7 / 3)
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")["a.weight"], wide.astype(dtype))


@pytest.mark.parametrize(
    ("A", "B", "dtype"),
    [
        ([[1e30, 1.0]], [[1e30]], "F32"),  # the product is infinite
        ([[1e30, 1.0], [-1e30, 1.0]], [[1e30, 1e30]], "F32"),  # infinity less infinity
        ([[3e38, 1.0]], [[1.0]], "F32"),  # the sum is
        ([[1e5, 1.0]], [[1.0]], "F16"),
        ([[1.0, 3.4e38]], [[1.0]], "BF16"),  # which float32 still holds
    ],
)
def test_a_sum_beyond_the_type_is_refused(tmp_path, A, B, dtype):
    A, B = np.array(A), np.array(B)
    weight = {"F32": np.full((1, 2), 3e38, "f4"), "F16": np.ones((1, 2), "f2"), "BF16": np.ones((1, 2), bfloat16)}
    base = tmp_path / "base.safetensors"
    save_file({"a.weight": weight[dtype]}, base)
    save_adapter(tmp_path / "adapter", {"a": LoRA(A, B, float(len(A)))})
    with pytest.raises(FileRefused) as error:
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    reason = f"'a.weight': the merged weight is beyond the range of {dtype} from row 0 on"
    assert str(error.value) == f"'{base}': {reason}"
    assert not (tmp_path / "out").exists()


class Bar:
    """A bar that remembers what it was asked to show."""

    def __init__(self, shown, **options):
        self.shown = shown
        shown.append(options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.shown.append(count)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_bar_counts_the_bytes_of_all_tensors(files, tmp_path, monkeypatch, sharded):
    base, adapter, out = files
    source = shard(load_file(base), tmp_path / "sharded") if sharded else base
    for options, disable in (({}, True), ({"progress": False}, True), ({"progress": True}, None)):
        shown = []
        monkeypatch.setattr(sys.modules["minilora.files.merge"], "tqdm", lambda *a, s=shown, **k: Bar(s, *a, **k))
        merge_adapter(source, adapter, out, **options)
        bar, *counts = shown
        total = sum(tensor.nbytes for tensor in load_file(base).values())
        assert bar == {"total": total, "unit": "B", "unit_scale": True, "disable": disable}
        assert sum(counts) == total
        shutil.rmtree(out) if sharded else out.unlink()


@pytest.mark.parametrize("ask", ["index", "folder"])
def test_a_sharded_checkpoint_is_merged_shard_by_shard(files, tmp_path, ask):
    base, adapter, out = files
    tensors = load_file(base)
    shard(tensors, tmp_path / "sharded")
    merge_adapter(base, adapter, out)
    target = tmp_path / "merged"
    merge_adapter(tmp_path / "sharded" / (INDEX if ask == "index" else ""), adapter, target)
    assert (target / INDEX).read_bytes() == (tmp_path / "sharded" / INDEX).read_bytes()
    merged = {}
    for file in target.glob("*.safetensors"):
        merged |= load_file(file)
    for name, tensor in load_file(out).items():
        np.testing.assert_array_equal(merged[name], tensor)
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in (tmp_path / "sharded").iterdir())
    assert not list(tmp_path.glob("*.part"))


def test_a_dry_run_says_the_same_and_writes_nothing(files, tmp_path):
    base, adapter, out = files
    before = contents(tmp_path)
    planned = merge_adapter(base, adapter, out, dry_run=True)
    assert contents(tmp_path) == before
    assert merge_adapter(base, adapter, out) == planned


def test_half_an_adapter_is_not_merged(tmp_path):
    """One of two modules lies in the base, without its first part."""
    save_file({"q.weight": np.zeros((3, 2), "f4"), "p.weight": np.zeros((3, 2), "f4")}, tmp_path / "base")
    lora = LoRA(np.ones((1, 2), "f4"), np.ones((3, 1), "f4"), 1.0)
    for other in ("b.r", "p"):
        save_adapter(tmp_path / "a", {"a.q": lora, other: lora})
        with pytest.raises(FileRefused, match=r"there is no 'a.q.weight', which the adapter changes"):
            merge_adapter(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_all_lack_their_first_part_are_found(files, tmp_path):
    base, _, out = files
    rng = np.random.default_rng(1)
    lora = LoRA(draw(rng, 2, 3), draw(rng, 5, 2), 1.0)
    save_adapter(tmp_path / "a", {"transformer.enc.q_proj": lora, "transformer.enc.k_proj": lora})
    changes = merge_adapter(base, tmp_path / "a", out)
    assert {(c.module, c.name) for c in changes} == {
        (f"transformer.enc.{name}_proj", f"enc.{name}_proj.weight") for name in "qk"
    }
    assert load_file(out)["enc.k_proj.weight"].tobytes() != load_file(base)["enc.k_proj.weight"].tobytes()
    save_adapter(tmp_path / "b", {"enc.enc.q_proj": lora})
    (change,) = merge_adapter(base, tmp_path / "b", tmp_path / "out2")  # the first part alone
    assert change.name == "enc.q_proj.weight"
    save_adapter(tmp_path / "a", {"transformer.enc.q_proj": lora, "head": lora})
    with pytest.raises(FileRefused, match=r"no 'transformer.enc.q_proj.weight'.* there is 'enc.q_proj.weight'"):
        merge_adapter(base, tmp_path / "a", out)


def assert_refused(base, adapter, out, match, error=FileRefused):
    before = contents(adapter.parent)
    with pytest.raises(error, match=match) as refusal:
        merge_adapter(base, adapter, out)
    if error is ValueError:  # what is asked for is wrong: a dry run says so too
        with pytest.raises(error, match=match):
            merge_adapter(base, adapter, out, dry_run=True)
    assert contents(adapter.parent) == before
    if error is FileRefused:
        assert str(refusal.value).startswith(f"'{adapter.parent}")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {"enc.q_proj.weight": t["enc.q_proj.weight"].T.copy()}, "the other way round it would fit"),
        (lambda t: {"enc.q_proj.weight": np.ones((5, 4), "f4")}, r"shape \[5, 4\]"),
        (lambda t: {"enc.q_proj.weight": np.ones((5, 3), "i1")}, "I8.*quantised"),
        (lambda t: {"enc.q_proj.weight": np.ones((15, 1), "u1")}, "U8.*quantised"),
        (lambda t: {"enc.q_proj.qweight": np.ones((5, 3), "i4")}, "quantised"),
        (lambda t: {"enc.k_proj.weight": np.ones((5, 3), "f4")}, "no 'enc.q_proj.weight'"),
        (lambda t: {"enc.q_proj.weight": np.full((5, 3), 65000, "f2")}, "beyond the range of F16"),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(files, tmp_path, change, match):
    base, adapter, out = files
    rng = np.random.default_rng(0)
    save_adapter(adapter, {"enc.q_proj": LoRA(draw(rng, 2, 3) * 1000, draw(rng, 5, 2), 3.0)})
    save_file(change(load_file(base)), base)
    assert_refused(base, adapter, out, match)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"enc.q_proj.weight": np.ones((5, 4), "f4")},
            "'enc.q_proj.weight' has shape [5, 4], the adapter is for [5, 3] (stored out-in)",
        ),
        (
            {"enc.q_proj.weight": np.ones((3, 5), "f4")},
            "'enc.q_proj.weight' has shape [3, 5], the adapter is for [5, 3] (stored out-in, and the other way round "
            "it would fit: see layouts)",
        ),
        ({"enc.q_proj.weight": np.ones(15, "f4")}, "'enc.q_proj.weight' has shape [15], the adapter is for a matrix"),
        (
            {"enc.q_proj.weight": np.ones((5, 3), "i1")},
            "'enc.q_proj.weight' has dtype I8, expected one of F16, BF16, F32, F64: quantised, unsupported: merge into "
            "the model that it was quantised from",
        ),
        *(
            (
                {f"enc.q_proj.{part}": np.ones((5, 3), "i4")},
                "there is no 'enc.q_proj.weight', which the adapter changes: the base is quantised there, which is not "
                "supported: merge into the model that it was quantised from",
            )
            for part in ("qweight", "weight_packed", "weight.absmax")
        ),
        (
            {"a": np.ones(1), "dec.q_proj.weight": np.ones(1)},
            "there is no 'enc.q_proj.weight', which the adapter changes: there is 'dec.q_proj.weight'",
        ),
        ({"a": np.ones(1)}, "there is no 'enc.q_proj.weight', which the adapter changes: there is 'a'"),
        ({}, "there is no 'enc.q_proj.weight', which the adapter changes: there is 'nothing'"),
    ],
)
def test_a_refusal_of_the_base_is_said_in_full(files, tensors, message):
    base, adapter, out = files
    save_adapter(adapter, {"enc.q_proj": LoRA(np.ones((2, 3), "f4"), np.ones((5, 2), "f4"), 3.0)})
    save_file(tensors, base)
    with pytest.raises(FileRefused) as error:
        merge_adapter(base, adapter, out)
    assert str(error.value) == f"'{base}': {message}"
    assert not out.exists()


def test_a_refusal_of_the_output_is_said_in_full(files, tmp_path, monkeypatch):
    base, adapter, out = files
    sharded, gone, weights = (
        shard(load_file(base), tmp_path / "sharded"),
        tmp_path / "no" / "o",
        "adapter_model.safetensors",
    )
    for source, target, message in (
        (base, base, f"out '{base}' is the base itself, expected another file"),
        (base, adapter / weights, f"out '{adapter / weights}' is a file of the adapter, expected another file"),
        (base, adapter, f"out is the folder '{adapter}', expected the name of a file to write"),
        (base, gone, f"out '{gone}': there is no folder '{tmp_path / 'no'}'"),
        (sharded, base, f"out '{base}' exists, expected a folder that is empty or new: the base has shards"),
    ):
        with pytest.raises(ValueError, match=r"^out ") as error:
            merge_adapter(source, adapter, target)
        assert str(error.value) == message
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"^out ") as error:
        merge_adapter(base, adapter, out)
    assert str(error.value) == f"out '{out}': the folder '{tmp_path}' cannot be written"


def test_transposed_square_factors_are_refused_against_the_base(files, tmp_path):
    """A stored (in, r) with in = r looks sound by itself; what it would adapt is not what is there."""
    base, adapter, out = files
    save_file({"a.weight": np.ones((5, 3), "f4")}, base)
    save_adapter(adapter, {"a": LoRA(np.ones((3, 5), "f4"), np.ones((3, 3), "f4"), 1.0)})
    assert_refused(base, adapter, out, r"shape \[5, 3\], the adapter is for \[3, 5\]")


def test_nan_in_the_base_is_the_base_s_own_affair(files):
    base, adapter, out = files
    tensors = load_file(base)
    tensors["enc.q_proj.weight"][1, 1] = np.nan
    save_file(tensors, base)
    merge_adapter(base, adapter, out)
    assert np.isnan(load_file(out)["enc.q_proj.weight"]).sum() == 1


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a.weight": "../base.safetensors"}, "plain name"),
        ({"a.weight": "/etc/base.safetensors"}, "plain name"),
        ({"a.weight": "..\\base.safetensors"}, "plain name"),
        ({"a.weight": "link.safetensors"}, "no 'a.weight'"),
        ({"a.weight": "round.safetensors"}, "Too many levels of symbolic links"),
        ({"a.weight": "none.safetensors"}, "No such file"),
        ({"a.weight": "model.bin"}, "expected .safetensors files"),
        ({"a.weight": 3}, "Expected `str`, got `int`"),
        ({"a.weight": "in.safetensors"}, f"no 'a.weight', which {INDEX} says it holds"),
        ({}, "weight_map is {}, expected .safetensors files"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_an_index_that_lies_is_refused(files, tmp_path, weight_map, match):
    base, adapter, out = files
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"b.weight": np.ones((2, 2))}, folder / "in.safetensors")
    (folder / "link.safetensors").symlink_to(base)
    (folder / "round.safetensors").symlink_to("round.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_refused(folder / INDEX, adapter, out, match)


def test_an_index_that_is_no_json_is_refused(files, tmp_path):
    _, adapter, out = files
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / INDEX).write_text("{")
    assert_refused(tmp_path / "sharded", adapter, out, rf"^'{tmp_path}/sharded/{INDEX}': Input data was truncated")


def test_a_folder_without_an_index_holds_one_file(files, tmp_path):
    base, adapter, out = files
    merge_adapter(base, adapter, out)
    (tmp_path / "folder").mkdir()
    shutil.copy(base, tmp_path / "folder" / "model.safetensors")
    merge_adapter(tmp_path / "folder", adapter, tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == out.read_bytes()


def test_nothing_is_destroyed(files, tmp_path):
    base, adapter, out = files
    assert_refused(base, adapter, base, "the base itself", ValueError)
    assert_refused(base, adapter, adapter / "adapter_model.safetensors", "a file of the adapter", ValueError)
    assert_refused(base, adapter, adapter / "adapter_config.json", "a file of the adapter", ValueError)
    os.link(base, tmp_path / "same")
    assert_refused(base, adapter, tmp_path / "same", "the base itself", ValueError)
    assert_refused(base, adapter, adapter, "is the folder", ValueError)
    assert_refused(base, adapter, tmp_path / "no" / "where", "there is no folder", ValueError)
    assert_refused(base, adapter, tmp_path / ("x" * 300), "cannot be written", ValueError)
    sharded = shard(load_file(base), tmp_path / "sharded")
    assert_refused(sharded, adapter, adapter, "empty or new", ValueError)
    assert_refused(sharded, adapter, sharded, "empty or new", ValueError)
    assert_refused(sharded, adapter, base, "empty or new", ValueError)
    base.write_bytes(base.read_bytes()[:-1])
    out.write_bytes(b"before")
    assert_refused(base, adapter, out, "file not fully covered")


@pytest.mark.parametrize("kind", ["pipe", "link to a file", "link to nothing"])
def test_only_a_regular_file_is_replaced(files, tmp_path, kind):
    base, adapter, out = files
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(adapter / "note" if kind == "link to a file" else "gone")
        (adapter / "note").write_bytes(b"precious")
    assert_refused(base, adapter, out, "expected a regular file or a new name", ValueError)


def test_a_base_named_like_an_unfinished_file_stays(files, tmp_path):
    base, adapter, out = files
    named = base.rename(tmp_path / "out.safetensors.part")
    before = named.read_bytes()
    merge_adapter(named, adapter, out)
    assert named.read_bytes() == before
    assert load_file(out).keys() == load_file(named).keys()


@pytest.mark.parametrize("ask", [".", "link", "mount"])
def test_a_folder_that_cannot_be_replaced_is_refused_first(files, tmp_path, monkeypatch, ask):
    base, adapter, _ = files
    source, out = shard(load_file(base), tmp_path / "sharded"), tmp_path / "empty"
    out.mkdir()
    monkeypatch.chdir(out if ask == "." else tmp_path)
    (tmp_path / "link").symlink_to("empty")
    if ask == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "empty")
    monkeypatch.setattr(sys.modules["minilora.files.merge"], "_write_merged", None)
    for target in {".": (Path("."), out), "link": (tmp_path / "link",), "mount": (out,)}[ask]:
        assert_refused(
            source, adapter, target, rf"^out '{target}' (is .* mount point|exists.*empty or new)", ValueError
        )


def test_an_empty_folder_takes_the_shards(files, tmp_path):
    base, adapter, _ = files
    source, out = shard(load_file(base), tmp_path / "sharded"), tmp_path / "empty"
    out.mkdir()
    merge_adapter(source, adapter, out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(source))


def test_of_two_sharded_merges_at_once_the_later_is_refused(files, tmp_path, monkeypatch):
    base, adapter, _ = files
    source, out = shard(load_file(base), tmp_path / "sharded"), tmp_path / "merged"
    real, calls = sys.modules["minilora.files.merge"]._write_merged, []

    def overtaken(*args):
        calls.append(args)
        if len(calls) == 1:
            merge_adapter(source, adapter, out)
        real(*args)

    monkeypatch.setattr(sys.modules["minilora.files.merge"], "_write_merged", overtaken)
    with pytest.raises(OSError, match="not empty"):
        merge_adapter(source, adapter, out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(source))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dry_run": "no"}, TypeError, "dry_run must be True or False, got 'no'"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        ({"base": ""}, ValueError, "base must be the path"),
        ({"adapter": None}, TypeError, "adapter must be a path"),
        ({"out": ""}, ValueError, "out must be the path"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(files, tmp_path, options, error, message):
    base, adapter, out = files
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        merge_adapter(**{"base": base, "adapter": adapter, "out": out, **options})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merge_that_fails_halfway_leaves_what_was_there(files, tmp_path, monkeypatch, sharded):
    base, adapter, out = files
    source = shard(load_file(base), tmp_path / "sharded") if sharded else base
    if not sharded:
        out.write_bytes(b"before")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    assert_refused(source, adapter, out, "disk full", OSError)


MEASURE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from minilora import merge_adapter
def peak():  # getrusage would count the parent's memory too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
start = peak()
merge_adapter(*sys.argv[1:])
print(peak() - start)
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
def test_a_merge_needs_little_memory_whatever_the_checkpoint_s_size(tmp_path):
    """120 MiB pass through in tensors of 60 MiB, and the peak grows by less than one of them."""
    save_file({f"l.{i}.weight": np.ones((4096, 3840), "f4") for i in range(2)}, tmp_path / "base.safetensors")
    lora = LoRA(np.ones((4, 3840), "f4"), np.ones((4096, 4), "f4"), 1.0)
    save_adapter(tmp_path / "adapter", {f"l.{i}": lora for i in range(2)})
    names = [str(tmp_path / name) for name in ("base.safetensors", "adapter", "out.safetensors")]
    grown = subprocess.run([sys.executable, "-c", MEASURE, *names], capture_output=True, text=True, check=True).stdout
    assert 4 < float(grown) < 60
