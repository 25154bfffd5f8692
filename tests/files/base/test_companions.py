"""A model's folder is merged into a folder that loads, with all that stands beside the weights."""

import json
import os

import numpy as np
import pytest

from minilora import (
    FileRefused,
    Llama,
    attach,
    load_adapter,
    merge_adapter,
)
from minilora.files.base.companions import files_beside

from ...support.model_folder import BESIDE, IDS, INDEX, write
from ..test_merge import contents


@pytest.mark.parametrize("shards", [1, 3])
def test_a_merged_folder_is_the_adapted_model(tmp_path, adapter, shards):
    base = write(tmp_path / "base", shards=shards)
    merge_adapter(base, adapter, tmp_path / "out")
    adapted = attach(Llama.load(base), load_adapter(adapter))
    np.testing.assert_allclose(Llama.load(tmp_path / "out")(IDS), adapted(IDS), atol=1e-4)
    weights = {path.name for path in base.glob("model*")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*BESIDE, "config.json", "tokenizer.json", *weights}
    for name in (*BESIDE, "config.json", "tokenizer.json", *([INDEX] if shards > 1 else [])):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def refused(base, adapter, out, message, error=ValueError):
    folder = adapter.parent
    before = contents(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            merge_adapter(base, adapter, out, dry_run=dry_run)
    assert contents(folder) == before


@pytest.mark.parametrize("what", ["pipe", "circle"])
def test_what_is_no_regular_file_beside_is_refused_first(tmp_path, adapter, what):
    base = write(tmp_path / "base")
    os.mkfifo(base / "vocab.txt") if what == "pipe" else (base / "vocab.txt").symlink_to("vocab.txt")
    refused(
        base,
        adapter,
        tmp_path / "out",
        "vocab.txt': (not a regular file|Too many levels)",
        FileRefused,
    )


def test_a_configuration_that_is_no_json_is_refused(tmp_path, adapter):
    base = write(tmp_path / "base")
    (base / "config.json").write_text("{")
    refused(base, adapter, tmp_path / "out", "config.json': Input data was truncated", FileRefused)


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


@pytest.mark.parametrize("name", ["LICENSE.txt", "tokenizer.json", "additional_chat_templates/rag.jinja"])
def test_a_link_out_of_the_models_folder_is_not_followed(tmp_path, adapter, name):
    """The merged folder is made to be given away."""
    base = write(tmp_path / "base")
    (tmp_path / "key").write_text("private")
    (base / name).unlink(missing_ok=True)
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).symlink_to(tmp_path / "key")
    refused(base, adapter, tmp_path / "out", "a link out of the model's folder", FileRefused)


def test_further_chat_templates_are_merged_with_the_model(tmp_path, adapter):
    base = write(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS")
    merge_adapter(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "TOOLS"


def test_what_says_how_a_model_is_built_is_copied_and_nothing_else(tmp_path):
    copied = {"a.json", "b.jinja", "c.model", "d.txt", "e.tiktoken", "f.py", "config.json"}
    passed = {".hidden.json", "x.index.json", "adapter_config.json", "g.bin", "h.safetensors", "i.md", "LICENSE"}
    for name in copied | passed:
        (tmp_path / name).write_text("{}")
    for folder in ("j.json", "additional_chat_templates"):
        (tmp_path / folder).mkdir()
    (tmp_path / "additional_chat_templates" / "k.jinja").write_text("k")
    (tmp_path / "additional_chat_templates" / "l.txt").write_text("l")
    assert set(files_beside(tmp_path, untied=False)) == copied | {"additional_chat_templates/k.jinja"}


@pytest.mark.parametrize("config", ["{}", '{"tie_word_embeddings": true, "more": [1]}'])
def test_an_untied_models_configuration_says_that_it_is(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    untied = files_beside(tmp_path, untied=True)["config.json"]
    assert json.loads(untied) == json.loads(config) | {"tie_word_embeddings": False}
    assert files_beside(tmp_path, untied=False)["config.json"] == tmp_path / "config.json"
