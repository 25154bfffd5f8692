"""A merged checkpoint is W + s B A where the adapter is, the base bit for bit elsewhere, and there whole or not."""

import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import FileRefused, LoRA, merge_adapter, save_adapter
from minilora.cli import main
from minilora.files import merge
from minilora.files.dtypes import FLOATS
from minilora.files.tensors import BLOCK_BYTES, TensorFile
from minilora.variants.adapter import Adapter

from ..support.adapter_folder import change_json, merged
from ..support.disk import contents
from ..support.memory import traced

INDEX = "model.safetensors.index.json"
Q, HEAD = "enc.q_proj.weight", "head.weight"
BITS = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}
"""Of each type's fraction."""
KINDS = {dtype.name: kind for kind, dtype in FLOATS.items()} | {"int64": "I64", "bool": "BOOL"}


def draw(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


def ones(*shape):
    return np.ones(shape, "f4")


def write(path, tensors):
    """Write a safetensors file by hand: an array, or a type that NumPy does not have, a shape and bytes."""
    header, body = {"__metadata__": {"format": "pt", "note": "kept"}}, b""
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple):
            tensor = KINDS[tensor.dtype.name], tensor.shape, tensor.tobytes()
        kind, shape, raw = tensor
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def parts(path):
    """The files of a checkpoint, in their order."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def read(path):
    """All tensors of a file, or of the files in a folder: type, and numbers in float64, or bytes."""
    found = {}
    for part in parts(path):
        file = TensorFile(part)
        for name, spec in file.tensors.items():
            raw = part.read_bytes()[spec.start : spec.end]
            found[name] = spec.dtype, file.read(name).astype(float) if spec.dtype in BITS else raw
    return found


def base_tensors(rng, q="F32", head="F64"):
    """Two weights to be adapted, in these types, between tensors that are not: all in their own type and shape."""

    def weight(kind, *shape):
        return draw(rng, *shape, dtype="float64").astype(FLOATS[kind])

    return {
        HEAD: weight(head, 4, 5), Q: weight(q, 5, 3), "enc.q_proj.bias": draw(rng, 5),
        "enc.k_proj.weight": draw(rng, 5, 3), "steps": rng.integers(0, 99, (2, 3)), "mask": np.array([True, False]),
        "eighths": ("F8_E4M3", (2,), b"ab"), "nothing": np.zeros((0, 4), "f2"), "scalar": np.array(3.0),
    }  # fmt: skip


def shard(tensors, folder):
    """Save tensors in two shards with an index, as the large models come."""
    folder.mkdir(exist_ok=True)
    parts = {"model-1-of-2.safetensors": sorted(tensors)[::2], "model-2-of-2.safetensors": sorted(tensors)[1::2]}
    for file, names in parts.items():
        write(folder / file, {name: tensors[name] for name in names})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=1) + "\n")
    return folder


class Job:
    """A base, an adapter whose two layers differ in shape, rank and alpha, and where the merged base is to stand."""

    def __init__(self, folder, sharded=False, seed=0, q="F32", head="F64", **settings):
        rng, self.folder = np.random.default_rng(seed), folder
        self.adapter, tensors, end = folder / "adapter", base_tensors(rng, q, head), "" if sharded else ".safetensors"
        self.base, self.out = folder / f"base{end}", folder / f"out{end}"
        shard(tensors, self.base) if sharded else write(self.base, tensors)
        q, head = LoRA(draw(rng, 2, 3), draw(rng, 5, 2), 3.0), LoRA(draw(rng, 4, 5), draw(rng, 4, 4), 0.5)
        self.layers = {"enc.q_proj": q, "head": head}
        self.save(self.layers, **settings)

    def save(self, layers, use_rslora=False, **options):
        save_adapter(self.adapter, layers, overwrite=True, **options)
        change_json(self.adapter / "adapter_config.json", use_rslora=use_rslora)

    def merge(self, **options):
        return merge_adapter(self.base, self.adapter, self.out, **options)

    def refused(self, said, error=FileRefused, **options):
        """Expect an error that says that, and the disk as it was; of what is asked wrongly also from a dry run."""
        before, usual = contents(self.folder), {"base": self.base, "adapter": self.adapter, "out": self.out}
        for dry_run in (False, True) if error is ValueError else (False,):
            with pytest.raises(error) as refusal:
                merge_adapter(**usual | {"dry_run": dry_run} | options)
            assert said in str(refusal.value).replace(str(self.folder), "~")
        assert contents(self.folder) == before


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture(params=[False, True], ids=["one file", "shards"])
def either(tmp_path, request):
    return Job(tmp_path, sharded=request.param)


# --- what is merged -------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1), q=st.sampled_from([*BITS]), head=st.sampled_from([*BITS]), sharded=st.booleans(),
    use_rslora=st.booleans(), block=st.sampled_from([1, 8, 12, 24, 30, 40, 41, 80, 1 << 24]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_a_merged_weight_is_rounded_once_and_all_else_copied(
    tmp_path_factory, seed, q, head, sharded, use_rslora, block
):
    """In blocks of a number, a part of a row, a row or some rows. The oracle is float64."""
    job = Job(tmp_path_factory.mktemp("m"), sharded, seed, q, head, use_rslora=use_rslora)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(merge, "BLOCK_BYTES", block)
        planned, changes = job.merge(dry_run=True), job.merge()
    assert planned == changes
    before, after = read(job.base), read(job.out)
    assert {name: kind for name, (kind, _) in before.items()} == {name: kind for name, (kind, _) in after.items()}
    sizes = {"enc.q_proj": (3.0, 2, (5, 3)), "head": (0.5, 4, (4, 5))}
    assert {(c.name, c.module, c.dtype, c.shape, c.layout, c.rank, c.scaling) for c in changes} == {
        (f"{m}.weight", m, before[f"{m}.weight"][0], shape, "out-in", r, alpha / (r**0.5 if use_rslora else r))
        for m, (alpha, r, shape) in sizes.items()
    }
    order = {name: spec.start for part in parts(job.base) for name, spec in TensorFile(part).tensors.items()}
    assert changes == sorted(changes, key=lambda c: (c.file, order[c.name]))
    for c in changes:
        kind, W = before[c.name]
        A, B = (array.astype(float) for array in (job.layers[c.module].lora_A, job.layers[c.module].lora_B))
        exact, size = W + c.scaling * B @ A, np.abs(W) + c.scaling * np.abs(B) @ np.abs(A)
        unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - BITS[kind])
        slack = (c.rank + 2) * np.finfo("f8" if kind == "F64" else "f4").eps * size  # of the type it is added up in
        assert (np.abs(after.pop(c.name)[1] - exact) <= 0.5 * unit + 1.001 * slack + 2.0**-25).all()
    for name, (_, value) in after.items():
        np.testing.assert_array_equal(value, before[name][1])
    for old, new in zip(map(TensorFile, parts(job.base)), map(TensorFile, parts(job.out)), strict=True):
        assert list(old.tensors) == list(new.tensors)
        assert old.metadata.items() < new.metadata.items()  # the mark is more
    if sharded:
        assert sorted(os.listdir(job.base)) == sorted(os.listdir(job.out))
        assert (job.base / INDEX).read_bytes() == (job.out / INDEX).read_bytes()
    assert not list(job.folder.glob("*.part"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_each_number_is_rounded_as_in_peft(tmp_path, dtype):
    """Bit for bit: factors, products, scaling and sum in float32, and then once to the base's type."""
    rng = np.random.default_rng(0)
    weight, A, B = draw(rng, 300, 200, dtype=dtype), draw(rng, 3, 200, dtype="float16"), draw(rng, 300, 3) / 3
    after = merged(tmp_path, {"a.weight": weight}, {"a": LoRA(A.astype("f4"), B, 0.7)})
    wide = weight.astype("f4") + (B @ A.astype("f4")) * np.float32(0.7 / 3)
    np.testing.assert_array_equal(after["a.weight"], wide.astype(dtype))


def test_factors_in_float16_are_widened_before_their_product(job):
    job.save({"enc.q_proj": LoRA(np.full((2, 3), 300, "f2"), np.full((5, 2), 300, "f2"), 1.0)})
    job.merge()
    np.testing.assert_allclose(read(job.out)[Q][1], read(job.base)[Q][1] + 90_000)


def test_nan_in_the_base_is_merged_and_reported(either):
    """In a weight that the adapter changes, and in one that is copied."""
    tensors = base_tensors(np.random.default_rng(0))
    tensors[Q][1, 1], tensors["enc.k_proj.weight"][0, 0] = np.nan, -np.inf
    shard(tensors, either.base) if either.base.is_dir() else write(either.base, tensors)
    what = "the base has NaN or infinity in 2 tensors, the first is 'enc."
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(either.base))}.*: {what}.* and so has '.*out.*'$"):
        either.merge()
    after = read(either.out)
    assert np.isnan(after[Q][1]).sum() == np.isinf(after["enc.k_proj.weight"][1]).sum() == 1


@pytest.mark.long
def test_a_merge_needs_less_memory_than_a_tensor(tmp_path):
    save_file({f"l.{i}.weight": ones(4096, 3840) for i in range(2)}, tmp_path / "base")
    save_adapter(tmp_path / "adapter", {f"l.{i}": LoRA(ones(4, 3840), ones(4096, 4), 1.0) for i in range(2)})
    with traced() as memory:
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert BLOCK_BYTES < memory.peak < 4 * 4096 * 3840


# --- which files, and which names -----------------------------------------------------------------


def test_a_base_is_a_folder_an_index_or_a_file(tmp_path):
    job = Job(tmp_path, sharded=True)
    job.merge()
    merge_adapter(job.base / INDEX, job.adapter, tmp_path / "by index")
    assert contents(tmp_path / "by index") == contents(job.out)
    (tmp_path / "single").mkdir()
    write(tmp_path / "single" / "model.safetensors", base_tensors(np.random.default_rng(0)))
    for base, out in (("single", "one"), ("single/model.safetensors", "two")):
        merge_adapter(tmp_path / base, job.adapter, tmp_path / out)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    shutil.copy(tmp_path / "single" / "model.safetensors", job.base)
    job.refused(f"base/model.safetensors': next to {INDEX}, which lists", out=tmp_path / "out2")
    merge_adapter(job.base / INDEX, job.adapter, tmp_path / "again")
    merge_adapter(job.base / "model.safetensors", job.adapter, tmp_path / "alone")
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "one").read_bytes()


def test_names_that_all_lack_their_first_part_are_found(job):
    lora = LoRA(ones(2, 3), ones(5, 2), 1.0)
    job.save({"transformer.enc.q_proj": lora, "transformer.enc.k_proj": lora})
    assert {(c.module, c.name) for c in job.merge()} == {
        (f"transformer.enc.{x}_proj", f"enc.{x}_proj.weight") for x in "qk"
    }
    job.save({"enc.enc.q_proj": lora})  # the first part alone
    assert [c.name for c in job.merge()] == [Q]
    for other, lost, there in (("head", "transformer.enc.q_proj", "enc.q_proj"), ("b.r", "b.r", "head")):
        job.save({"transformer.enc.q_proj": lora, other: lora})  # half an adapter is not merged
        job.refused(f"there is no '{lost}.weight', which the adapter changes: there is '{there}.weight'")


TIED = (
    "config.json ties head and embedding, but the adapter changes only 'model.embed_tokens'. A program that ties the "
    "two will change both, and its results will differ from those of the base with the adapter: merge the model's "
    "folder into a folder instead"
)
SAYS_TIED = '{"tie_word_embeddings": true}'


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("model/model.safetensors", SAYS_TIED),
        *(("model", said) for said in (SAYS_TIED, '{"tie_word_embeddings": false}', "{}", "{", None)),
    ],
)
def test_a_merge_into_a_tied_embedding_is_warned_of(tmp_path, capsys, config, base):
    (tmp_path / "model").mkdir()
    weights = {"model.embed_tokens.weight": ones(7, 3), "model.q_proj.weight": ones(4, 3)}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    save_adapter(tmp_path / "e", {"model.embed_tokens": Adapter(ones(1, 7), ones(3, 1), 2.0, kind="embedding")})
    save_adapter(tmp_path / "q", {"model.q_proj": LoRA(ones(1, 3), ones(4, 1), 2.0)})
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(config)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for adapter in "eq":
            merge_adapter(tmp_path / base, tmp_path / adapter, tmp_path / f"{adapter}.safetensors")
    tied = config is not None and "true" in config
    assert [str(note.message) for note in notes] == [f"{tmp_path}/model/{TIED}"] * tied
    assert main(["merge", *map(str, (tmp_path / base, tmp_path / "e", "-o", tmp_path / "o.safetensors"))]) == 0
    out, err = capsys.readouterr()
    assert (TIED in err, err.count("\n"), "1 tensor merged into" in out) == (tied, tied, True)


# --- refusals -------------------------------------------------------------------------------------

QUANTISED, RANGE = "merge into the model that it was quantised from", f"'{Q}': the merged weight is beyond the range of"
FITS = "the adapter is for [5, 3] (stored out-in"
BASES = [  # of an adapter of enc.q_proj, 5 x 3
    ({Q: ones(5, 4)}, f"'{Q}' has shape [5, 4], {FITS})"),
    ({Q: ones(3, 5)}, f"'{Q}' has shape [3, 5], {FITS}; the transposed layout would fit: see layouts)"),
    ({Q: ones(15)}, f"'{Q}' has shape [15], {FITS})"),
    *(
        ({Q: (kind, (5, 3), bytes(15))}, f"{kind}, expected one of F16, BF16, F32, F64: {QUANTISED}")
        for kind in ("I8", "U8")
    ),
    *(
        ({f"enc.q_proj.{part}": ones(5, 3)}, f"layer of the base is quantised, which is not supported: {QUANTISED}")
        for part in ("qweight", "weight_packed", "weight.absmax")
    ),
    ({"a": ones(1), "d.q_proj.weight": ones(1)}, f"there is no '{Q}', which the adapter changes: there is 'd.q_proj."),
    ({"a": ones(1)}, f"there is no '{Q}', which the adapter changes: there is 'a'"),
    ({}, f"there is no '{Q}', which the adapter changes: there is 'nothing'"),
    ({Q: np.full((5, 3), 65504, "f2")}, f"{RANGE} F16 from row 0 on"),
    ({Q: np.full((5, 3), np.finfo("f4").max)}, f"{RANGE} F32 from row 0 on"),
    ({Q: ("BF16", (5, 3), b"\x7f\x7f" * 15)}, f"{RANGE} BF16 from row 0 on"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "said"), BASES)
def test_a_base_that_the_adapter_does_not_fit_is_refused(job, tensors, said):
    job.save({"enc.q_proj": LoRA(np.full((2, 3), 1e18, "f4"), np.full((5, 2), 1e18, "f4"), 3.0)})
    write(job.base, tensors)
    job.refused(f"'~/base.safetensors': {said}" if said[0] in "'t" else said)


@pytest.mark.parametrize("A", [[[1e30, 1.0]], [[1e30, 1.0], [-1e30, 1.0]]])  # infinity; infinity less infinity
def test_a_product_that_is_no_number_is_refused(tmp_path, A):
    job = Job(tmp_path)
    job.save({"a": LoRA(np.array(A), np.full((1, len(A)), 1e30), float(len(A)))})
    write(job.base, {"a.weight": ones(1, 2)})
    job.refused("'a.weight': the merged weight is beyond the range of F32 from row 0 on")


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        *(({Q: f"{way}base.safetensors"}, "plain name") for way in ("../", "/etc/", "..\\")),
        ({Q: "model.bin"}, "model.bin': it is an archive, such as a pickle saved by torch"),
        ({}, "there is no 'enc.q_proj.weight', which the adapter changes"),
        ({Q: 3}, "Expected `str`, got `int`"),
    ],
)
def test_an_index_that_lies_is_refused(job, weight_map, said):
    (job.folder / "sharded").mkdir()
    (job.folder / "sharded" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (job.folder / "sharded" / "model.bin").write_bytes(b"PK\3\4" + bytes(100))
    job.refused(said, base=job.folder / "sharded")


OUTS = {  # what stands there, by name; what is said of an out of that name
    "base.safetensors": "out '~/base.safetensors' is the base itself, expected another file",
    "same": "is the base itself",
    "adapter/adapter_model.safetensors": "model.safetensors' is a file of the adapter, expected another file",
    "adapter/adapter_config.json": "a file of the adapter",
    "adapter": "'~/adapter' is a folder, a device or a pipe, expected a regular file or a new path",
    "no/where": "out '~/no/where': there is no folder '~/no'",
    "pipe": "expected a regular file or a new path",
    "link": "expected a regular file or a new path",
    "dangling": "expected a regular file or a new path",
}


@pytest.mark.parametrize("out", OUTS)
def test_a_merge_destroys_nothing(job, out):
    os.link(job.base, job.folder / "same")
    os.mkfifo(job.folder / "pipe")
    (job.folder / "note").write_bytes(b"precious")
    (job.folder / "link").symlink_to("note")
    (job.folder / "dangling").symlink_to("gone")
    job.refused(OUTS[out], ValueError, out=job.folder / out)


def test_a_folder_takes_shards_where_it_is_empty_or_new(tmp_path, monkeypatch):
    job, full = Job(tmp_path, sharded=True), "exists, expected an empty or new folder: the base has shards"
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for out in (job.adapter, job.base, tmp_path / "file", tmp_path / "link"):
        job.refused(f"out '~/{out.name}' {full}", ValueError, out=out)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "empty")
    nothing = "is the working folder or a mount point, which cannot be replaced: choose a new one"
    job.refused(f"out '~/empty' {nothing}", ValueError, out=tmp_path / "empty")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (Path("."), tmp_path / "empty"):
        job.refused(nothing, ValueError, out=out)
    monkeypatch.undo()
    merge_adapter(job.base, job.adapter, tmp_path / "empty")
    assert sorted(os.listdir(tmp_path / "empty")) == sorted(os.listdir(job.base))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    job.refused("'~': the folder '~' is not writable", ValueError)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dry_run": "no"}, TypeError, "dry_run must be True or False, got 'no'"),
        ({"progress": 1}, TypeError, "progress must be True or False, got 1"),
        ({"base": ""}, ValueError, "base must be the path of a file or folder, got ''"),
        ({"adapter": None}, TypeError, "adapter must be a path, got None"),
        ({"out": ""}, ValueError, "out must be the path of a file or folder, got ''"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(job, options, error, said):
    job.refused(said, error, **options)


# --- whole or not at all --------------------------------------------------------------------------


def test_a_merge_that_fails_halfway_leaves_what_was_there(either, monkeypatch):
    if either.base.is_file():
        either.out.write_bytes(b"before")
        whole = either.base.read_bytes()
        either.base.write_bytes(whole[:-1])
        either.refused("file not fully covered")
        either.base.write_bytes(whole)
    full, words = OSError(errno.ENOSPC, "No space left on device"), OSError("so the library says")
    for error, said in ((full, f"No space left on device: '~/{either.out.name}'"), (words, "so the library says")):
        monkeypatch.setattr(os, "fsync", Mock(side_effect=error))
        either.refused(said, OSError)


def test_a_base_named_like_an_unfinished_file_stays(job):
    job.base = job.base.rename(job.folder / "out.safetensors.part")
    before = job.base.read_bytes()
    job.merge()
    assert job.base.read_bytes() == before
    assert read(job.out).keys() == read(job.base).keys()


@pytest.mark.parametrize(("options", "disable"), [({}, True), ({"progress": False}, True), ({"progress": True}, None)])
def test_the_bar_counts_the_bytes_of_all_tensors(either, monkeypatch, options, disable):
    bar = MagicMock()
    monkeypatch.setattr(merge, "tqdm", bar)
    either.merge(**options)
    total = sum(spec.end - spec.start for part in parts(either.base) for spec in TensorFile(part).tensors.values())
    bar.assert_called_once_with(total=total, unit="B", unit_scale=True, disable=disable)
    updates = bar.return_value.__enter__.return_value.update.call_args_list
    assert sum(update.args[0] for update in updates) == total
