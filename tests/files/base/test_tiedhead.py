"""A head that was the embedding gets an array of its own where an adapter tells the two apart."""

import json
import sys
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import (
    Adapter,
    Llama,
    attach,
    merge_adapter,
    save_adapter,
)
from minilora.files.base.tiedhead import ties_head
from minilora.files.tensors import open_weights

from ...support.memory import traced
from ...support.model_folder import IDS, INDEX, drawn, of_kind, write
from ..test_merge import contents

TARGETS = [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]]


@pytest.mark.parametrize(
    ("targets", "shards", "options"), [*zip(TARGETS, [1, 3, 3], [{}, {"use_dora": True}, {}], strict=True)]
)
def test_a_tied_head_that_an_adapter_changes_is_untied(tmp_path, shards, targets, options):
    base = write(tmp_path / "base", tied=True, shards=shards)
    found = drawn(Llama.load(base), targets, **options)
    save_adapter(tmp_path / "adapter", found)
    how = " and 'model.embed_tokens' apart" if len(targets) == 2 and "lm_head" in targets[1] else " alone"
    with pytest.warns(
        UserWarning, match=rf"{how}\. So the merged model has a head of its own, and its config.json says"
    ):
        changes = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert {change.module for change in changes} == found.keys()
    merged = Llama.load(tmp_path / "out")
    assert not merged.config.tie_word_embeddings
    np.testing.assert_allclose(merged(IDS), attach(Llama.load(base), found)(IDS), atol=1e-4)
    before = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before | {"tie_word_embeddings": False}
    if shards > 1:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
        assert index["weight_map"].keys() == {name for file in files for name in file}
        assert index["metadata"]["total_size"] == sum(a.nbytes for file in files for a in file.values())
        assert index["metadata"]["total_parameters"] == 1 + merged.lm_head.weight.size


def test_a_tied_head_that_no_adapter_changes_stays_tied(tmp_path, adapter):
    base = write(tmp_path / "base", tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(base, adapter, tmp_path / "out")
    assert Llama.load(tmp_path / "out").config.tie_word_embeddings


def test_a_head_that_stands_in_the_file_is_kept(tmp_path):
    base = write(tmp_path / "base", tied=True)
    arrays = load_file(base / "model.safetensors")
    save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}, base / "model.safetensors")
    found = drawn(Llama.load(base), ["lm_head"])
    save_adapter(tmp_path / "adapter", found)
    with pytest.warns(UserWarning, match="has a head of its own"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    np.testing.assert_allclose(Llama.load(tmp_path / "out")(IDS), attach(Llama.load(base), found)(IDS), atol=1e-4)


def test_a_model_that_is_tied_by_its_kind_is_untied(tmp_path):
    """Of some kinds config.json need not say it: the class has a head, and the file does not."""
    base = write(tmp_path / "base", tied=True)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    save_adapter(tmp_path / "adapter", drawn(of_kind(True), ["embed_tokens"]))
    with pytest.warns(UserWarning, match="has a head of its own"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_missing_tied_head_is_asked_of_the_folder(tmp_path):
    base = write(tmp_path / "base", tied=True)
    save_adapter(tmp_path / "adapter", drawn(of_kind(True), ["lm_head"]))
    refused(
        base / "model.safetensors", tmp_path / "adapter", tmp_path / "out", "head is the embedding there. Merge the mo"
    )


def refused(base, adapter, out, message, error=ValueError):
    folder = adapter.parent
    before = contents(folder)
    for dry_run in (True, False):
        with pytest.raises(error, match=message):
            merge_adapter(base, adapter, out, dry_run=dry_run)
    assert contents(folder) == before


@pytest.mark.long
def test_untying_takes_the_memory_of_some_blocks(tmp_path, monkeypatch):
    """The embedding has 14 MB; a block 0.1, the factors some 0.4, and a configuration is read into 4."""
    monkeypatch.setattr(sys.modules["minilora.files.merge"], "BLOCK_BYTES", 1 << 17)
    rng, folder = np.random.default_rng(0), tmp_path / "base"
    folder.mkdir()
    E = rng.standard_normal((60_000, 60)).astype("f4")
    save_file({"model.embed_tokens.weight": E}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    A, B = np.ones((1, 60), "f4"), np.ones((60_000, 1), "f4")
    save_adapter(tmp_path / "adapter", {"lm_head": Adapter(A, B, 2.0)})
    with traced() as memory, pytest.warns(UserWarning, match="a head of its own"):
        merge_adapter(folder, tmp_path / "adapter", tmp_path / "out")
    assert memory.peak < 6e6
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], E)
    np.testing.assert_array_equal(merged["lm_head.weight"], E + 2)


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
