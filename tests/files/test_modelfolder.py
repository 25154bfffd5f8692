"""A merged folder is a model that loads, with all that stands beside the weights, and with its tied head untied."""

import json
import os
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Adapter, FileRefused, Llama, attach, load_adapter, merge, merge_adapter, quantize, save_adapter
from minilora.files import modelfolder
from minilora.files.modelfolder import companions, ties_head, with_own_head
from minilora.files.tensors import open_weights
from minilora.language import save_llama

from ..support.adapter_folder import change_json
from ..support.disk import contents
from ..support.model_folder import BESIDE, IDS, INDEX, drawn, of_kind, write


def refused(base, adapter, out, message, error=ValueError):
    before = contents(adapter.parent)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            merge_adapter(base, adapter, out, dry_run=dry_run)
    assert contents(adapter.parent) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_folder_is_the_adapted_model(tmp_path, adapter, shards):
    base, templates = write(tmp_path / "base", shards=shards), "additional_chat_templates"
    (base / templates).mkdir()
    (base / templates / "tool_use.jinja").write_text("TOOLS")
    merge_adapter(base, adapter, tmp_path / "out")
    adapted = attach(Llama.load(base), load_adapter(adapter))
    np.testing.assert_allclose(Llama.load(tmp_path / "out")(IDS), adapted(IDS), atol=1e-4)
    weights = {path.name for path in base.glob("model*")}
    files = {*BESIDE, "config.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | weights | {templates}
    for name in (*files, f"{templates}/tool_use.jinja", *([INDEX] if shards > 1 else [])):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


OUT = "a link to a file outside the model's folder, which is not copied: expected one inside"


def link_out(name):
    """Make a file of the model a link to something private: the merged folder is made to be given away."""

    def change(base):
        (base.parent / "key").write_text("private")
        (base / name).unlink(missing_ok=True)
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).symlink_to(base.parent / "key")

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: os.mkfifo(base / "vocab.txt"), "vocab.txt': not a regular file"),
        (lambda base: (base / "vocab.txt").symlink_to("vocab.txt"), "vocab.txt': Too many levels"),
        (lambda base: (base / "config.json").write_text("{"), "config.json': Input data was truncated"),
        *(
            (link_out(name), f"{name}': {OUT}$")
            for name in ("LICENSE.txt", "tokenizer.json", "additional_chat_templates/rag.jinja")
        ),
    ],
)
def test_a_folder_that_cannot_be_copied_is_refused_first(tmp_path, adapter, change, message):
    base = write(tmp_path / "base")
    change(base)
    refused(base, adapter, tmp_path / "out", message, FileRefused)


def test_links_are_followed_and_files_written(tmp_path, adapter):
    """As in a cache of the Hugging Face hub."""
    model = tmp_path / "models--x"
    cache = model / "snapshots" / "rev"
    cache.mkdir(parents=True)
    write(model / "blobs")
    for path in (model / "blobs").iterdir():
        (cache / path.name).symlink_to(f"../../blobs/{path.name}")
    merge_adapter(cache, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "merges.txt").read_text() == BESIDE["merges.txt"]
    (model / "private.txt").write_text("beside the blobs")
    (cache / "LICENSE.txt").symlink_to("../../private.txt")
    refused(cache, adapter, tmp_path / "out2", f"LICENSE.txt': {OUT}$", FileRefused)


def test_what_says_how_a_model_is_built_is_copied(tmp_path):
    copied = {"a.json", "b.jinja", "c.model", "d.txt", "e.tiktoken", "f.py", "config.json"}
    passed = {".hidden.json", "x.index.json", "adapter_config.json", "g.bin", "h.safetensors", "i.md", "LICENSE"}
    for name in copied | passed:
        (tmp_path / name).write_text("{}")
    for folder in ("j.json", "additional_chat_templates"):
        (tmp_path / folder).mkdir()
    (tmp_path / "additional_chat_templates" / "k.jinja").write_text("k")
    (tmp_path / "additional_chat_templates" / "l.txt").write_text("l")
    assert set(companions(tmp_path, untied=False)) == copied | {"additional_chat_templates/k.jinja"}


@pytest.mark.parametrize("config", ["{}", '{"tie_word_embeddings": true, "more": [1]}'])
def test_an_untied_models_configuration_says_that_it_is(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    untied = companions(tmp_path, untied=True)["config.json"]
    assert json.loads(untied) == json.loads(config) | {"tie_word_embeddings": False}
    assert companions(tmp_path, untied=False)["config.json"] == tmp_path / "config.json"


def test_weights_alone_are_merged_into_a_file(tmp_path, adapter):
    base = write(tmp_path / "base")
    merge_adapter(base, adapter, tmp_path / "whole")
    merge_adapter(base, adapter, tmp_path / "one.safetensors")
    merge_adapter(base / "model.safetensors", adapter, tmp_path / "two")
    for file in ("one.safetensors", "two"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    merge_adapter(write(tmp_path / "shards", shards=3), adapter, tmp_path / "folder.safetensors")
    assert (tmp_path / "folder.safetensors" / "config.json").exists()


@pytest.mark.parametrize("shards", [1, 3])
def test_neither_the_base_nor_the_adapter_is_written_over(tmp_path, adapter, shards):
    base = write(tmp_path / "base", shards=shards)
    (tmp_path / "link").symlink_to("base")
    for out in (base, adapter, tmp_path / "link", base / "config.json", base / ".." / "base"):
        refused(base, adapter, out, "exists, expected an empty or new folder: the base is a model's folder")
    refused(base, adapter, tmp_path / "no" / "out", "there is no folder")


def test_a_merge_that_fails_on_its_way_leaves_nothing(tmp_path, adapter, monkeypatch):
    base = write(tmp_path / "base")

    def failing(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(modelfolder.shutil, "copyfileobj", failing)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="the disk is full"):
        merge_adapter(base, adapter, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "base"),
    [("g.gguf", "g.gguf"), ("g.safetensors", "g.safetensors"), ("g", "g"), ("m/model.safetensors", "m")],
)
def test_a_gguf_file_is_known_whatever_its_name(tmp_path, adapter, file, base):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"GGUF" + bytes(100))
    said = f"{file}': it is a .gguf file. `minilora export` converts"
    refused(tmp_path / base, adapter, tmp_path / "out", said, FileRefused)


def test_a_base_in_four_bits_names_the_way_that_works(tmp_path, adapter):
    base, out = tmp_path / "base", tmp_path / "out"
    save_llama(quantize(of_kind()), base)
    refused(
        base,
        adapter,
        out,
        r"merge with minilora.merge: save_llama\(merge\(attach\(Llama.load\(BASE\), load_adap",
        FileRefused,
    )
    model = attach(Llama.load(base), load_adapter(adapter))
    save_llama(merge(model), out)  # as the message says
    np.testing.assert_allclose(Llama.load(out)(IDS), model(IDS), atol=1e-4)


# --- the head ---


def head_in_the_file(base):
    arrays = load_file(base / "model.safetensors")
    save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}, base / "model.safetensors")


def silent_config(base):
    """Of some kinds config.json need not say that it is tied: the class has a head, and the file does not."""
    change_json(base / "config.json", tie_word_embeddings="absent")


@pytest.mark.parametrize(
    ("targets", "shards", "options", "change"),
    [
        (["embed_tokens"], 1, {}, None),
        (["lm_head", "q_proj"], 3, {"use_dora": True}, None),
        (["embed_tokens", "lm_head"], 3, {}, None),
        (["lm_head"], 1, {}, head_in_the_file),
        (["embed_tokens"], 1, {}, silent_config),
    ],
)
def test_a_tied_head_that_an_adapter_changes_is_untied(tmp_path, targets, shards, options, change):
    base, model = write(tmp_path / "base", tied=True, shards=shards), of_kind(tied=True)
    if change:
        change(base)
    found = drawn(model, targets, **options)
    save_adapter(tmp_path / "adapter", found)
    how = (
        " and 'model.embed_tokens' separately" if targets == ["embed_tokens", "lm_head"] else r" changes only '[\w.]+'"
    )
    says = "So the merged model has a separate head, and its config.json no longer ties the two"
    with pytest.warns(UserWarning, match=rf"{how}\. {says}$"):
        changes = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert {change.module for change in changes} == found.keys()
    merged = Llama.load(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    np.testing.assert_allclose(merged(IDS), attach(model, found)(IDS), atol=1e-4)
    before = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before | {"tie_word_embeddings": False}
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
        assert index["weight_map"].keys() == {name for file in files for name in file}
        assert index["metadata"]["total_size"] == sum(a.nbytes for file in files for a in file.values())
        assert index["metadata"]["total_parameters"] == 1 + merged.lm_head.weight.size


def test_a_total_of_an_index_that_is_no_number_stays(tmp_path):
    base = write(tmp_path / "base", tied=True, shards=3)
    change_json(base / INDEX, metadata={"total_size": "many"})
    assert json.loads(with_own_head(open_weights(base)).index_text)["metadata"] == {"total_size": "many"}


def test_a_tied_head_that_no_adapter_changes_stays_tied(tmp_path, adapter):
    base = write(tmp_path / "base", tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(base, adapter, tmp_path / "out")
    assert Llama.load(tmp_path / "out").config.tie_word_embeddings


def test_a_tied_table_is_known_wherever_it_is(tmp_path):
    save_file({"decoder.embed_tokens.weight": np.ones((5, 3), "f4")}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    adapter = Adapter(np.ones((2, 5), "f4"), np.ones((3, 2), "f4"), 1.0, kind="embedding")
    save_adapter(tmp_path / "a", {"decoder.embed_tokens": adapter})
    with pytest.warns(UserWarning, match=r"the adapter changes only 'decoder\.embed_tokens'\. A program that ties"):
        merge_adapter(tmp_path / "model.safetensors", tmp_path / "a", tmp_path / "out", dry_run=True)


def test_a_missing_tied_head_is_asked_of_the_folder(tmp_path):
    base = write(tmp_path / "base", tied=True)
    save_adapter(tmp_path / "adapter", drawn(of_kind(True), ["lm_head"]))
    said = "its head is tied to the embedding. Merge the model's folder into a folder, which gets a separate head$"
    refused(base / "model.safetensors", tmp_path / "adapter", tmp_path / "out", said)
    other = {path.replace("0", "7"): adapter for path, adapter in drawn(of_kind(True), ["q_proj"]).items()}
    save_adapter(tmp_path / "other", other)  # of no head
    refused(base / "model.safetensors", tmp_path / "other", tmp_path / "out", r"there is 'model\.layers\.0.*q_proj\.")
    arrays = load_file(base / "model.safetensors")
    save_file(arrays | {"b.embed_tokens.weight": np.ones((2, 3), "f4")}, base / "model.safetensors")
    said = f"^'{base}/model.safetensors': 2 tensors are named embed_tokens.weight, expected exactly one$"
    refused(base, tmp_path / "adapter", tmp_path / "out", said, FileRefused)


HEADLESS, WITH_HEAD = ("model.embed_tokens.weight",), ("model.embed_tokens.weight", "lm_head.weight")
CAUSAL = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "names", "tied"),
    [
        ({"tie_word_embeddings": True}, WITH_HEAD, True),
        ({"tie_word_embeddings": False, **CAUSAL}, HEADLESS, False),
        (CAUSAL, HEADLESS, True),  # some kinds of model are tied where config.json says nothing
        ({"architectures": ["GPT2LMHeadModel"]}, HEADLESS, True),
        (CAUSAL, WITH_HEAD, False),
        ({"architectures": ["LlamaModel"]}, HEADLESS, False),
        ({"tie_word_embeddings": 1}, HEADLESS, False),
        (None, HEADLESS, False),
    ],
)
def test_a_base_is_tied_where_its_configuration_says_so(tmp_path, config, names, tied):
    save_file(dict.fromkeys(names, np.ones((3, 2), "f4")), tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert ties_head(open_weights(tmp_path)) is tied
